"""Legion's transport without a supervisor: a copy into an arena, the handle over ZeroMQ, a view of it there.

Two plain processes, with the parts that Legion itself is made of: `Arena` and `copy_memory` where a tensor is
sent, `Attachments` where it arrives (copy-on-write, bounds checked), memfd segments whose descriptors cross a
socket pair once. No job, lease table, codec or event: what `legion` takes beyond it is the price of those.
"""

from __future__ import annotations

import itertools
import shutil
import socket
import struct
import tempfile
import time
from typing import Any

from legion_shm.native_bench.payload import as_tensor
from legion_shm.native_bench.peers.base import Peer, Session
from legion_shm.native_bench.peers.child import ChildSession, Link
from legion_shm.native_bench.peers.zeromq import bare_address, bare_socket
from legion_shm.transport.arena import Arena, Block
from legion_shm.transport.attachments import Attachments
from legion_shm.transport.born_build import library_path
from legion_shm.transport.copying import copy_memory, use_library
from legion_shm.transport.fdpass import SegmentReceiver, send_segment_fd
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.segment import Segment, attach_segment, create_segment, supported_kinds

__all__ = ["PEERS"]

_HANDLE = struct.Struct("<QIQQQ")
_SIDE = struct.Struct("<Q")
_QUOTA_BYTES = 8 << 30


class _ArenaLink(Link):
    def __init__(self, address: str, near: socket.socket, far: socket.socket, child: bool) -> None:
        self._ends = (near, far)
        self._pair = far if child else near
        self._pair.setblocking(False)
        self._descriptors = SegmentReceiver(self._pair)
        self._socket, self._close = bare_socket(address, bind=not child)
        self._numbers = itertools.count(1)
        self._arena = Arena(arena_id=2 if child else 1, grow=self._grow, quota_bytes=_QUOTA_BYTES)
        self._theirs = Attachments(on_missing=self._await)
        self._sent: Block | None = None
        library, _ = library_path()
        if library is not None:
            use_library(str(library))

    def _grow(self, nbytes: int) -> tuple[int, Segment]:
        number = next(self._numbers)
        segment = create_segment("memfd", nbytes, name_prefix="legion-bench-")
        descriptor = segment.descriptor
        assert isinstance(descriptor, int), "memfd"
        send_segment_fd(self._pair, self._arena.arena_id, number, segment.nbytes, descriptor)
        return number, segment

    def _await(self, handle: BlockHandle, deadline_s: float) -> None:
        while not self._theirs.knows(handle.arena, handle.segment):
            if not self._descriptors.wait(deadline_s - time.monotonic()):
                return
            for arena, number, nbytes, fd in self._descriptors.receive_pending():
                self._theirs.add(arena, number, attach_segment("memfd", fd, nbytes))

    def send(self, tensor: Any) -> None:
        sent, self._sent = self._sent, None
        if sent is not None:  # the exchange that it was for is over on both sides
            self._arena.free(sent.handle)
        self._sent = block = self._arena.reserve(tensor.nbytes)
        copy_memory(block.address, tensor.data_ptr(), tensor.nbytes)
        handle = block.handle
        claim = _HANDLE.pack(handle.arena, handle.segment, handle.offset, handle.nbytes, handle.generation)
        self._socket.send(claim + b"".join(map(_SIDE.pack, tensor.shape)))

    def receive(self) -> Any:
        frame = self._socket.recv()
        handle = BlockHandle(*_HANDLE.unpack_from(frame))
        shape = [side for (side,) in _SIDE.iter_unpack(frame[_HANDLE.size :])]
        return as_tensor(self._theirs.view(handle), shape)

    def release(self) -> None:
        self._theirs.drain_released()

    def close(self) -> None:
        self._close()
        self._arena.close()
        self._theirs.close()
        self._descriptors.close()
        for end in self._ends:
            end.close()


class TransportPeer(Peer):
    name = "legion-transport"
    title = "Legion's transport alone"
    settings = (
        "one copy into an arena, handle over a bare ZeroMQ PAIR, copy-on-write view; no supervisor, no job"
    )
    kind = "legion"
    package = "legion-shm"

    def missing(self) -> str:
        return supported_kinds()["memfd"]

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        folder = tempfile.mkdtemp(prefix="legion-bench-")
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return ChildSession(
            _ArenaLink,
            (bare_address(folder), near, far),
            on_close=lambda: _clean(folder, near, far),
        )


def _clean(folder: str, *ends: socket.socket) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for end in ends:
        end.close()


PEERS: list[Peer] = [TransportPeer()]
