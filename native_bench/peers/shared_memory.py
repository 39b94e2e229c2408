"""multiprocessing.shared_memory, a new segment for each message: the standard library's recipe.

Settings: the sender creates a segment of the tensor's size, copies with numpy, sends the name over a Pipe,
and closes its mapping; the receiver attaches, uses the bytes in place, and unlinks. Segments are not tracked
twice: the receiver unlinks by name, and the sender's registration ends with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from legion_shm.native_bench.payload import as_tensor
from legion_shm.native_bench.peers.base import TIMEOUT_S, Peer, Session
from legion_shm.native_bench.peers.child import ChildSession, Link

__all__ = ["PEERS"]


class _SegmentLink(Link):
    def __init__(self, near: Connection, far: Connection, child: bool) -> None:
        self._ends = (near, far)
        self._connection = far if child else near
        self._held: SharedMemory | None = None
        self._sent: str | None = None

    def send(self, tensor: Any) -> None:
        memory = SharedMemory(create=True, size=tensor.nbytes)
        self._sent = memory.name
        np.copyto(as_tensor(memory.buf, tensor.shape).numpy(), tensor.numpy())
        self._connection.send((memory.name, tuple(tensor.shape)))
        memory.close()

    def receive(self) -> Any:
        if not self._connection.poll(TIMEOUT_S):
            raise TimeoutError(f"nothing came within {TIMEOUT_S:g} s")
        name, shape = self._connection.recv()
        self._held = SharedMemory(name)
        return as_tensor(self._held.buf, shape)

    def release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.unlink()
            _close(held)
        self._sent = None

    def close(self) -> None:
        self.release()
        for connection in self._ends:
            connection.close()
        if self._sent is not None:  # nobody took it
            with contextlib.suppress(FileNotFoundError):
                left = SharedMemory(self._sent)
                left.unlink()
                left.close()


def _close(memory: SharedMemory) -> None:
    with contextlib.suppress(BufferError):  # an error report still holds the tensor; its end ends the mapping
        memory.close()


class SharedMemoryPeer(Peer):
    name = "shared-memory"
    title = "multiprocessing.shared_memory"
    settings = "a new SharedMemory per message, numpy copy in, used in place, name over a Pipe"

    def missing(self) -> str:
        if sys.platform == "win32":
            return "on Windows a segment ends with its maker's handle, before the receiver has attached it"
        return ""

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        return ChildSession(_SegmentLink, multiprocessing.get_context("spawn").Pipe())


PEERS: list[Peer] = [SharedMemoryPeer()]
