"""iceoryx2: publish and subscribe of slices of pages, samples loaned from its shared memory.

Settings: one service each way with one publisher and one subscriber, one sample in flight; memory allocated
once for the largest message (``initial_max_slice_len``); each sample is loaned uninitialized, filled by
``ctypes.memmove`` (which gives up the GIL), and used in place by the receiver; an event service each way
wakes the receiver, which blocks. Its files have a prefix and a folder of their own, so that they can be
removed.

The element is a page, not a byte: iceoryx2 rounds each element up to the alignment when it sizes its memory.
Aligned bytes take 4096 times what they hold, for messages of 400 MB 55 TB of addresses each way. A process
has no room to map that twice; the subscriber then receives nothing, and no error says so.
"""

from __future__ import annotations

import ctypes
import importlib
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

from legion_shm.native_bench.payload import as_tensor
from legion_shm.native_bench.peers.base import TIMEOUT_S, Peer, Session
from legion_shm.native_bench.peers.child import ChildSession, Link

__all__ = ["PEERS"]

_HEAD_WORDS = 8  # the shape, in a page before the bytes
_PAGE_BYTES = 4096


class _Page(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * _PAGE_BYTES),)

    @staticmethod
    def type_name() -> str:
        """By which iceoryx2 tells that both ends speak of the same."""
        return "LegionBenchPage"


def _pages(nbytes: int) -> int:
    """Of a message: the head's and as many as hold its bytes."""
    return 1 + -(-nbytes // _PAGE_BYTES)


class _IceoryxLink(Link):
    def __init__(self, name: str, folder: str, most_bytes: int, child: bool) -> None:
        ice: Any = importlib.import_module("iceoryx2")
        self._ice = ice
        ice.set_log_level(ice.LogLevel.Error)
        config = ice.config.default()
        config.global_cfg.prefix = ice.FileName.new(f"{name}_")
        config.global_cfg.root_path = ice.Path.new(folder)
        self._node = (
            ice.NodeBuilder.new()
            .config(config)
            .signal_handling_mode(ice.SignalHandlingMode.Disabled)
            .create(ice.ServiceType.Ipc)
        )
        there, back = self._service(f"{name}/there"), self._service(f"{name}/back")
        outgoing, incoming = (back, there) if child else (there, back)
        self._publisher = outgoing[0].publisher_builder().initial_max_slice_len(_pages(most_bytes)).create()
        self._notifier = outgoing[1].notifier_builder().create()
        self._subscriber = incoming[0].subscriber_builder().create()
        self._listener = incoming[1].listener_builder().create()
        self._services = (there, back)
        self._sample: Any = None

    def _service(self, name: str) -> tuple[Any, Any]:
        ice = self._ice
        topic = ice.ServiceName.new(name)
        data = (
            self._node.service_builder(topic)
            .publish_subscribe(ice.Slice[_Page])
            .payload_alignment(ice.Alignment.new(_PAGE_BYTES))
            .max_publishers(1)
            .max_subscribers(1)
            .subscriber_max_buffer_size(2)
            .open_or_create()
        )
        return data, self._node.service_builder(topic).event().open_or_create()

    def send(self, tensor: Any) -> None:
        nbytes = tensor.nbytes
        sample = self._publisher.loan_slice_uninit(_pages(nbytes))
        head = (ctypes.c_uint64 * _HEAD_WORDS)(tensor.dim(), *tensor.shape)
        address = sample.payload_ptr
        ctypes.memmove(address, head, ctypes.sizeof(head))
        ctypes.memmove(address + _PAGE_BYTES, tensor.data_ptr(), nbytes)
        sample.assume_init().send()
        self._notifier.notify()

    def receive(self) -> Any:
        sample = self._subscriber.receive()
        while sample is None:
            if not self._listener.timed_wait(self._ice.Duration.from_secs(int(TIMEOUT_S))):
                raise TimeoutError(f"nothing came within {TIMEOUT_S:g} s")
            sample = self._subscriber.receive()
        self._sample = sample
        address = sample.payload_ptr
        sides = (ctypes.c_uint64 * _HEAD_WORDS).from_address(address)
        shape = list(sides[1 : 1 + sides[0]])
        count = 4
        for side in shape:
            count *= side
        return as_tensor((ctypes.c_ubyte * count).from_address(address + _PAGE_BYTES), shape)

    def release(self) -> None:
        self._sample = None

    def close(self) -> None:
        self._sample = None
        for port in (self._publisher, self._notifier, self._subscriber, self._listener):
            port.delete()


class IceoryxPeer(Peer):
    name = "iceoryx2"
    title = "iceoryx2"
    settings = "publish-subscribe of slices of pages, pre-allocated, loaned, memmove in, event to wake"
    package = "iceoryx2"

    def open(self, most_bytes: int) -> Session:
        name, folder = f"legion-bench-{secrets.token_hex(6)}", tempfile.mkdtemp(prefix="legion-bench-")

        def clean() -> None:
            """What it leaves for the next process of the same configuration, of which there is none."""
            shutil.rmtree(folder, ignore_errors=True)
            for path in Path("/dev/shm").glob(f"{name}_*"):
                path.unlink(missing_ok=True)

        return ChildSession(_IceoryxLink, (name, folder, most_bytes), on_close=clean)


PEERS: list[Peer] = [IceoryxPeer()]
