"""torch.multiprocessing queues: torch's own way, with both of its sharing strategies.

Settings: ``torch.multiprocessing.SimpleQueue`` of the spawn context (no feeder thread, so a hop less than
``Queue``), one each way. ``file_descriptor`` sends a descriptor per tensor, ``file_system`` a name; both
make a new shared file for each tensor in private memory, and torch copies into it. Tensors of a GPU go by a
handle of CUDA's own, without a copy (``torch-cuda``); torch has that for its native allocator alone.
"""

from __future__ import annotations

import multiprocessing.connection
from typing import Any, Literal

from legion_shm.native_bench.peers.base import TIMEOUT_S, Peer, Session
from legion_shm.native_bench.peers.child import ChildSession, Link

__all__ = ["PEERS"]


def _torch_multiprocessing() -> Any:
    import torch.multiprocessing

    return torch.multiprocessing


class _QueueLink(Link):
    def __init__(self, strategy: str, there: Any, back: Any, child: bool) -> None:
        self._strategy = strategy
        self._set_strategy = _torch_multiprocessing().set_sharing_strategy
        self._out, self._in = (back, there) if child else (there, back)

    def send(self, tensor: Any) -> None:
        self._set_strategy(self._strategy)  # of the whole process: in ours, both ways take turns
        self._out.put(tensor)

    def receive(self) -> Any:
        if not multiprocessing.connection.wait([self._in._reader], TIMEOUT_S):
            raise TimeoutError(f"nothing came within {TIMEOUT_S:g} s")
        return self._in.get()

    def release(self) -> None:
        pass

    def close(self) -> None:
        for queue in (self._out, self._in):
            queue.close()


class TorchQueuePeer(Peer):
    def __init__(self, strategy: Literal["file_system", "file_descriptor"]) -> None:
        self.strategy = strategy
        self.name = f"torch-{strategy.replace('_', '-')}"
        self.title = f"torch.multiprocessing, {strategy}"
        self.settings = f"torch.multiprocessing SimpleQueue each way, spawn, sharing strategy {strategy}"

    def missing(self) -> str:
        if self.strategy in _torch_multiprocessing().get_all_sharing_strategies():
            return ""
        return f"torch has no sharing strategy {self.strategy} on this system"

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        context = _torch_multiprocessing().get_context("spawn")
        queues = (context.SimpleQueue(), context.SimpleQueue())
        return ChildSession(_QueueLink, (self.strategy, *queues), context=context)


class TorchCudaPeer(Peer):
    name = "torch-cuda"
    title = "torch.multiprocessing, CUDA IPC"
    settings = "torch.multiprocessing SimpleQueue each way, spawn, tensors of the GPU by CUDA IPC handles"
    device = "cuda"

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        context = _torch_multiprocessing().get_context("spawn")
        queues = (context.SimpleQueue(), context.SimpleQueue())
        return ChildSession(_QueueLink, ("file_system", *queues), context=context)


PEERS: list[Peer] = [TorchQueuePeer("file_system"), TorchQueuePeer("file_descriptor"), TorchCudaPeer()]
