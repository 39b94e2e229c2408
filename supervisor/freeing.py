"""What came back when workers dropped their caches and models: measured in the worker, gathered here.

Owns the waiting of callers, and when a worker's heap gives back what nothing is in. Asking the workers is the
loop's.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "FreedMemory",
    "Freeing",
    "IdleHeap",
    "empty_gpu_caches",
    "forked",
    "freeze",
    "measured",
    "trim_heap",
]

_shared = False


@dataclass(frozen=True)
class FreedMemory:
    """What one worker gave back, in bytes: main memory that it alone had, and memory of its GPUs."""

    worker_id: str
    host_bytes: int
    gpu_bytes: int


class Freeing:
    """One request to free, on its way to some workers. The loop's thread fills it in, a caller's waits."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._awaited: dict[str, int] | None = None
        self._freed: dict[str, FreedMemory] = {}

    def sent_to(self, workers: Mapping[str, int]) -> None:
        """To these workers, each with the number of this request among all that it was sent."""
        with self._change:
            self._awaited = dict(workers)
            self._change.notify_all()

    def answered(self, freed: FreedMemory, number: int) -> None:
        """A worker's answer of this number; one to an earlier request says nothing about this one."""
        with self._change:
            if self._awaited is not None and number >= self._awaited.get(freed.worker_id, number + 1):
                del self._awaited[freed.worker_id]
                self._freed[freed.worker_id] = freed
                self._change.notify_all()

    def forget_all_but(self, living: Collection[str]) -> None:
        """A worker that has ended answers no more."""
        with self._change:
            if self._awaited is not None:
                self._awaited = {worker: n for worker, n in self._awaited.items() if worker in living}

    def wait(self, timeout_s: float) -> bool:
        """Whether every worker has answered, within a time."""
        with self._change:
            return self._change.wait_for(lambda: self._awaited is not None and not self._awaited, timeout_s)

    @property
    def freed(self) -> tuple[FreedMemory, ...]:
        with self._change:
            return tuple(self._freed.values())


class IdleHeap:
    """When the C library's heap gives back what is free in it: after a job, at once or after a pause.

    A job's tensors leave up to tens of megabytes there, in every worker. The next job takes them again page
    by page, so after short jobs they stay until nothing came for ``idle_s``. After a job that took
    ``LONG_JOB_S``, with no other one waiting, they go at once, which costs such jobs next to nothing.
    """

    LONG_JOB_S = 0.25
    """Giving back took 1 to 9 ms after jobs of ComfyUI."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._due_s: float | None = None

    def used(self, now_s: float, took_s: float = 0.0) -> None:
        """A job has ended that took so long."""
        self._due_s = now_s if took_s >= self.LONG_JOB_S else now_s + self._idle_s

    def due_in_s(self, now_s: float) -> float | None:
        """Seconds until `give_back` has something to do; None without a job since the last time."""
        return None if self._due_s is None else max(0.0, self._due_s - now_s)

    def give_back(self, now_s: float) -> bool:
        """Whether it was time, and done."""
        if self.due_in_s(now_s) != 0.0:
            return False
        self._due_s = None
        _free_matrix_buffers()
        trim_heap()
        return True


def forked() -> None:
    """What is frozen now is shared with the process that forked this one, and stays frozen.

    A collection writes into each object that it looks at, which would copy nearly all of that memory.
    """
    global _shared
    _shared = True


def freeze() -> None:
    """Let collections pass over what an engine's start made, unless that would be for ever."""
    if not _shared:
        gc.freeze()


def measured(free: Callable[[], None], give_up: Callable[[], None]) -> tuple[int, int]:
    """Call ``free``, then ``give_up``; the main memory and the GPU memory that came back, in bytes.

    Objects that the start of an engine froze are garbage like others then: the caches that it made first
    would otherwise keep what is in them for ever.
    """
    host, gpu = _host_bytes(), _gpu_bytes()
    if not _shared:
        gc.unfreeze()
    free()
    gc.collect()
    give_up()
    freeze()
    trim_heap()
    empty_gpu_caches()
    return max(0, host - _host_bytes()), max(0, gpu - _gpu_bytes())


def _free_matrix_buffers() -> None:
    """MKL keeps the largest matrices that it has packed, for this thread's next product.

    Those of other threads stay: they may be computing. torch holds MKL, and exports this of it on x86 alone.
    """
    torch: Any = sys.modules.get("torch")
    path = os.path.join(os.path.dirname(str(torch.__file__)), "lib", "libtorch_cpu.so") if torch else ""
    if os.path.isfile(path):
        free: Any = getattr(ctypes.CDLL(path), "mkl_serv_thread_free_buffers", None)
        if free is not None:
            free()


def trim_heap() -> None:
    """glibc keeps what was freed for the next allocation, unless it is told to give it back."""
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def empty_gpu_caches() -> None:
    """torch keeps what was freed on a GPU for its next allocation; nobody else can have it meanwhile."""
    cuda = _cuda_in_use()
    if cuda is not None:
        cuda.empty_cache()


def _host_bytes() -> int:
    """Memory that no other process has a part in; all that is resident, where the system tells no more."""
    import psutil

    process = psutil.Process()
    try:
        return int(process.memory_full_info().uss)
    except (psutil.Error, OSError):
        return int(process.memory_info().rss)


def _gpu_bytes() -> int:
    """What torch has taken of all GPUs, where this process uses them already; else 0."""
    cuda = _cuda_in_use()
    if cuda is None:
        return 0
    return sum(int(cuda.memory_reserved(device)) for device in range(cuda.device_count()))


def _cuda_in_use() -> Any:
    """``torch.cuda`` where this process has opened a GPU already; else None, and none is opened."""
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if cuda is not None and cuda.is_available() and cuda.is_initialized() else None
