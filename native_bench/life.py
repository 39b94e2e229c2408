"""A worker's life in figures: start to ready, the first transfer, many in flight, memory held and given back.

Owns these measurements, each with supervisors of its own so that nothing is warm by accident. A start is
measured
as its user sees it: from submitting an empty job until its result. ``python-torch`` is the bare interpreter
importing torch, which no worker that must import it can beat.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from legion_shm.config import WorkerSpec
from legion_shm.errors import ContentsDiffer
from legion_shm.native_bench import payload
from legion_shm.native_bench.model import Row
from legion_shm.native_bench.payload import Order
from legion_shm.native_bench.peers.base import TIMEOUT_S
from legion_shm.native_bench.peers.legion import WORKER_NODES, job_of
from legion_shm.native_bench.schedule import Size
from legion_shm.native_bench.summary import summarize
from legion_shm.supervisor.api import Supervisor
from legion_shm.supervisor.result import Result

__all__ = ["measure_memory", "measure_starts", "measure_throughput"]

_IDLE_S = 0.5
_RETURN_WAIT_S = 10.0


def _spec(number: int = 0, **fields: Any) -> WorkerSpec:
    env = {"LEGION_BENCH_LIFE": str(number)}
    return WorkerSpec(engine="graph", node_modules=[WORKER_NODES], env=env, **fields)


def measure_starts(*, rounds: int, size: Size, show: Callable[[str], None]) -> list[Row]:
    """Cold (a supervisor's first worker), following (another one), replacement (after a ``kill -9``), and the
    first tensor of a size through a supervisor and a worker that have just been started: the whole job, in
    which a node class also runs for the first time, and the transfer alone. Raises LegionError.
    """
    samples: dict[str, list[float]] = {}
    for number in range(rounds):
        show(f"worker starts: {number + 1} of {rounds}")
        for name, value in _one_life(size).items():
            samples.setdefault(name, []).append(value)
    rows: list[Row] = []
    for name, values in samples.items():
        sized = {"size_bytes": size.nbytes, "size": size.label} if name.startswith("first_") else {}
        rows.append(Row.of("start", name, "time", summarize(values), **cast("Any", sized)))
    return rows


def _one_life(size: Size) -> dict[str, float]:
    order = Order(size.shape, "touch", 11, 12)
    command = [sys.executable, "-c", "import torch"]
    took = {"python-torch": _timed(lambda: subprocess.run(command, check=True))}
    with Supervisor() as legion:
        first, second = _spec(1), _spec(2)
        took["cold"] = _timed(lambda: _empty(legion, first))
        tensor = payload.make(order)
        results: list[Result] = []
        job = job_of("BenchTouch")
        took["first_use"] = _timed(
            lambda: results.append(legion.submit(job, inputs=[tensor], spec=first).result(timeout=TIMEOUT_S))
        )
        _check(results[0]["output_1"], order)
        stats = results[0].stats
        took["first_transfer"] = 1e6 * (stats.encode_s + stats.queue_s + stats.to_worker_s + stats.decode_s)
        took["following"] = _timed(lambda: _empty(legion, second))
        pid = next(each.pid for each in legion.workers() if each.pid and each.spec_key == second.key)
        os.kill(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + TIMEOUT_S
        while any(each.pid == pid for each in legion.workers()) and time.monotonic() < deadline_s:
            time.sleep(0.001)
        took["replacement"] = _timed(lambda: _empty(legion, second))
    return took


def measure_throughput(
    *, size: Size, rounds: int, in_flights: Sequence[int], show: Callable[[str], None]
) -> list[Row]:
    """GB/s of private tensors to workers, by how many are in flight and how many workers there are."""
    rows: list[Row] = []
    order = Order(size.shape, "touch", 21, 22)
    for workers in (1, 2):
        spec = _spec(10 + workers, max_workers=workers)
        with Supervisor() as legion:
            legion.warm_up(spec, workers=workers)
            for in_flight in in_flights:
                show(f"throughput: {in_flight} in flight, {workers} workers")
                tensors = [payload.make(order) for _ in range(in_flight)]
                values: list[float] = []
                for number in range(rounds + 2):
                    started_s = time.monotonic()
                    jobs = [legion.submit(job_of("BenchTouch"), inputs=[t], spec=spec) for t in tensors]
                    sums = [job.result(timeout=TIMEOUT_S)["output_1"] for job in jobs]
                    took_s = time.monotonic() - started_s
                    for touched in sums:
                        _check(touched, order)
                    if number >= 2:
                        values.append(in_flight * size.nbytes / took_s / 1e9)
                rows.append(
                    Row.of(
                        "throughput",
                        f"{workers} worker{'s' * (workers > 1)}, {in_flight} in flight",
                        "to_worker",
                        summarize(values),
                        size_bytes=size.nbytes,
                        size=size.label,
                        unit="GB/s",
                    )
                )
    return rows


def measure_memory(*, size: Size, show: Callable[[str], None]) -> list[Row]:
    """Shared memory held over the most that was ever in use at once, and what is left after idling."""
    show("memory held")
    in_flight = 4
    order = Order(size.shape, "touch", 31, 32)
    with Supervisor(idle_trim_s=_IDLE_S) as legion:
        spec = _spec(20)
        _empty(legion, spec)
        most = 0
        for _ in range(3):
            jobs = [
                legion.submit(job_of("BenchTouch"), inputs=[payload.make(order)], spec=spec)
                for _ in range(in_flight)
            ]
            most = max(most, _held_bytes())
            for job in jobs:
                _check(job.result(timeout=TIMEOUT_S)["output_1"], order)
        show("memory returned")
        deadline_s = time.monotonic() + _RETURN_WAIT_S
        while _held_bytes() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        left = _held_bytes()
    held = most / (in_flight * size.nbytes)
    return [
        Row.of("memory", "held-over-live", "ratio", summarize([held]), unit="ratio"),
        Row.of("memory", "left-after-idle", "bytes", summarize([left / 1e6]), unit="MB"),
    ]


def _held_bytes() -> int:
    """Bytes of Legion's anonymous shared memory that this process holds descriptors of, each file once."""
    seen: dict[int, int] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(entry).startswith("/memfd:legion-"):
                status = entry.stat()
                seen[status.st_ino] = status.st_blocks * 512
        except OSError:
            continue
    return sum(seen.values())


def _empty(legion: Supervisor, spec: WorkerSpec) -> None:
    legion.submit(job_of("BenchEmpty"), inputs=[1], spec=spec).result(timeout=TIMEOUT_S)


def _check(touched: object, order: Order) -> None:
    if touched != payload.expected_use(order):
        raise ContentsDiffer(f"a tensor of {order.nbytes} bytes arrived with other contents")


def _timed(work: Callable[[], object]) -> float:
    started_ns = time.monotonic_ns()
    work()
    return (time.monotonic_ns() - started_ns) / 1000
