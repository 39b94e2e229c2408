"""ZeroMQ between two Python processes: the bytes as they are, and pickle 5 with its buffers out of band.

Settings: PAIR sockets over ``ipc://``, ``copy=False`` on both ends (the frame's memory is used in place on
arrival), no high-water mark, blocking receives. Raw: a small header frame and the tensor's bytes. Pickle 5:
``pickle.dumps(..., buffer_callback=...)``, each buffer a frame of its own.
"""

from __future__ import annotations

import pickle
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable
from typing import Any

from legion_shm.native_bench.payload import as_tensor, to_tensor
from legion_shm.native_bench.peers.base import TIMEOUT_S, Peer, Session
from legion_shm.native_bench.peers.child import ChildSession, Link

__all__ = ["PEERS", "bare_address", "bare_socket"]

_SIDE = struct.Struct("<Q")


def bare_address(folder: str) -> str:
    """``ipc`` in that folder; where ZeroMQ lacks it (Windows), a free port of the loopback interface."""
    import zmq

    if zmq.has("ipc"):
        return f"ipc://{folder}/s"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def bare_socket(address: str, *, bind: bool) -> tuple[Any, Callable[[], None]]:
    """One end of a pair, in a context of its own, and what closes both."""
    import zmq

    context: Any = zmq.Context()
    end: Any = context.socket(zmq.PAIR)
    end.setsockopt(zmq.SNDHWM, 0)
    end.setsockopt(zmq.RCVHWM, 0)
    end.setsockopt(zmq.LINGER, 0)
    end.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
    end.setsockopt(zmq.SNDTIMEO, int(TIMEOUT_S * 1000))
    if bind:
        end.bind(address)
    else:
        end.connect(address)

    def close() -> None:
        end.close(linger=0)
        context.term()

    return end, close


class _SocketLink(Link):
    def __init__(self, address: str, child: bool) -> None:
        import zmq

        self._again: Any = zmq.Again
        self._socket, self._close = bare_socket(address, bind=not child)

    def _receive_frames(self) -> list[Any]:
        try:
            return list(self._socket.recv_multipart(copy=False))
        except self._again:
            raise TimeoutError(f"nothing came within {TIMEOUT_S:g} s") from None

    def release(self) -> None:
        pass

    def close(self) -> None:
        from zmq.utils.garbage import gc

        self._close()
        collector: Any = gc
        collector.stop()  # pyzmq's thread behind copy=False; it starts anew where another link needs it


class _RawLink(_SocketLink):
    def send(self, tensor: Any) -> None:
        header = b"".join(map(_SIDE.pack, tensor.shape))
        self._socket.send_multipart((header, tensor.numpy()), copy=False)

    def receive(self) -> Any:
        header, frame = self._receive_frames()
        shape = [side for (side,) in _SIDE.iter_unpack(header.bytes)]
        return as_tensor(frame.buffer, shape)


class _PickleLink(_SocketLink):
    def send(self, tensor: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(tensor.numpy(), protocol=5, buffer_callback=buffers.append)
        self._socket.send_multipart((head, *(buffer.raw() for buffer in buffers)), copy=False)

    def receive(self) -> Any:
        head, *frames = self._receive_frames()
        array = pickle.loads(head.buffer, buffers=[frame.buffer for frame in frames])
        return to_tensor(array)


class ZmqPeer(Peer):
    def __init__(self, name: str, title: str, settings: str, link: Callable[..., Link]) -> None:
        self.name, self.title, self.settings, self._link = name, title, settings, link
        self.package, self.module = "pyzmq", "zmq"

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        folder = tempfile.mkdtemp(prefix="legion-bench-")
        return ChildSession(
            self._link,
            (bare_address(folder),),
            on_close=lambda: shutil.rmtree(folder, ignore_errors=True),
        )


PEERS: list[Peer] = [
    ZmqPeer("zeromq", "ZeroMQ, raw", "PAIR over ipc, copy=False both ends, no high-water mark", _RawLink),
    ZmqPeer(
        "pickle5-zeromq",
        "pickle 5 out of band, ZeroMQ",
        "pickle protocol 5 with buffer_callback, a frame per buffer, PAIR over ipc, copy=False",
        _PickleLink,
    ),
]
