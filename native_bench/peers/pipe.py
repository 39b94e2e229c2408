"""multiprocessing.Pipe with the tensor pickled: what a program does that knows nothing of shared memory.

Settings: pickle protocol 5 in band, of the numpy array (as small as a pickle of it gets; torch's own pickle
of a tensor is slower), one ``send_bytes`` per message over the duplex pipe (a Unix socket pair). A tensor of
a GPU is brought to the host before and back to the GPU afterwards (``pipe-cuda``).
"""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.connection import Connection
from typing import Any

from legion_shm.native_bench.payload import Device, to_tensor
from legion_shm.native_bench.peers.base import TIMEOUT_S, Peer, Session
from legion_shm.native_bench.peers.child import ChildSession, Link

__all__ = ["PEERS"]


class _PipeLink(Link):
    def __init__(self, near: Connection, far: Connection, device: Device, child: bool) -> None:
        self._device = device
        # The end that is not ours stays open in the parent until its close, for the child needs it at its
        # start.
        self._ends = (near, far)
        self._connection = far if child else near

    def send(self, tensor: Any) -> None:
        self._connection.send_bytes(pickle.dumps(tensor.cpu().numpy(), protocol=5))

    def receive(self) -> Any:
        if not self._connection.poll(TIMEOUT_S):
            raise TimeoutError(f"nothing came within {TIMEOUT_S:g} s")
        return to_tensor(pickle.loads(self._connection.recv_bytes())).to(self._device)

    def release(self) -> None:
        pass

    def close(self) -> None:
        for connection in self._ends:
            connection.close()


class PipePeer(Peer):
    name = "pipe"
    title = "Pipe, pickled"
    settings = "multiprocessing.Pipe (duplex), pickle protocol 5 of the numpy array in band, send_bytes"

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        return ChildSession(_PipeLink, (*multiprocessing.get_context("spawn").Pipe(), self.device))


class PipeCudaPeer(PipePeer):
    name = "pipe-cuda"
    title = "Pipe, pickled, on a GPU"
    settings = PipePeer.settings + "; tensor.cpu() before, .to() the GPU afterwards"
    device = "cuda"


PEERS: list[Peer] = [PipePeer(), PipeCudaPeer()]
