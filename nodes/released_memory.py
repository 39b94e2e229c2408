"""Ending or emptying workers, and measuring what that gave back.

Owns the waiting and the measuring; the supervisor does the ending.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from legion_shm.clock import monotonic_s
from legion_shm.errors import LegionError
from legion_shm.nodes.bridge import raise_if_interrupted
from legion_shm.nodes.legion_yaml import Configuration
from legion_shm.nodes.shared_supervisor import current_supervisor, spec_for

if TYPE_CHECKING:
    from legion_shm.config import WorkerSpec
    from legion_shm.supervisor.api import Supervisor
    from legion_shm.supervisor.freeing import FreedMemory

__all__ = ["Released", "release_workers"]

_log = logging.getLogger("legion_shm.nodes")

_POLL_S = 0.05
_SLACK_S = 10.0
_MIB = 1 << 20


@dataclass(frozen=True)
class Released:
    """What came back, in MiB of main memory, and a sentence about it."""

    mib: float
    text: str


def release_workers(configuration: Configuration | None, *, stop: bool, timeout_s: float) -> Released:
    """End workers, or have them drop what they keep, after the jobs that they run.

    None: all of them. Raises LegionError after ``timeout_s`` seconds.
    """
    supervisor = current_supervisor()
    if supervisor is None:
        return _said(Released(0.0, "no worker is running"))
    spec = key = None
    if configuration is not None:
        from legion_shm.supervisor.resolve import resolve_spec

        spec = resolve_spec(spec_for(configuration))
        key = spec.key
    workers = [worker for worker in supervisor.workers() if key is None or worker.spec_key == key]
    if not workers:
        return _said(Released(0.0, "no such worker is running"))
    if not stop:
        return _said(_emptied(_free(supervisor, spec, timeout_s)))
    pids = [worker.pid for worker in workers if worker.pid is not None]
    before, gpu_before = _private_bytes(pids), _gpu_free_bytes()
    deadline_s = monotonic_s() + timeout_s
    supervisor.stop_workers(spec)
    ids = {worker.id for worker in workers}
    while ids & {worker.id for worker in supervisor.workers()}:
        _pause(deadline_s, f"{len(ids)} workers have not ended; they run jobs still")
    host_mib = max(0, before - _private_bytes(pids)) / _MIB
    return _said(_released(len(workers), "ended", host_mib, (_gpu_free_bytes() - gpu_before) / _MIB))


def _free(supervisor: Supervisor, spec: WorkerSpec | None, timeout_s: float) -> tuple[FreedMemory, ...]:
    """In a thread of its own, for this one looks whether it was interrupted."""
    with ThreadPoolExecutor(1, "legion-release") as helper:
        asked = helper.submit(supervisor.free, spec, wait_s=timeout_s)
        deadline_s = monotonic_s() + timeout_s + _SLACK_S
        while not asked.done():
            _pause(deadline_s, "the worker has not been emptied; it runs a job still")
        try:
            return asked.result()
        except TimeoutError:
            raise _not_yet("the worker has not been emptied; it runs a job still") from None


def _emptied(freed: tuple[FreedMemory, ...]) -> Released:
    host_mib = sum(worker.host_bytes for worker in freed) / _MIB
    return _released(len(freed), "emptied", host_mib, sum(worker.gpu_bytes for worker in freed) / _MIB)


def _released(workers: int, what: str, host_mib: float, gpu_mib: float) -> Released:
    text = f"{_counted(workers)} {what}, {host_mib:,.0f} MiB of memory came back"
    return Released(host_mib, f"{text}, and {gpu_mib:,.0f} MiB of GPU memory" if gpu_mib > 0 else text)


def _pause(deadline_s: float, what: str) -> None:
    raise_if_interrupted()
    if monotonic_s() > deadline_s:
        raise _not_yet(what)
    time.sleep(_POLL_S)


def _not_yet(what: str) -> LegionError:
    return LegionError(f"Legion: Release: {what}; wait longer (timeout), or cancel them")


def _counted(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _said(released: Released) -> Released:
    _log.info("Legion: %s", released.text)
    return released


def _private_bytes(pids: Iterable[int]) -> int:
    """Memory that only these processes have: what comes back when they end."""
    total = 0
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                total += _own_bytes(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def _own_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except OSError:  # the system tells no more than what is resident
        return int(process.memory_info().rss)


def _gpu_free_bytes() -> int:
    """Free memory of all GPUs, where this process uses them already; else 0."""
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_available() or not cuda.is_initialized():
        return 0
    return sum(int(cuda.mem_get_info(device)[0]) for device in range(cuda.device_count()))
