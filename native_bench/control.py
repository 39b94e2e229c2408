"""What Legion costs without payload: an empty job beside a bare ZeroMQ ping-pong, taking turns.

Owns both and the ping-pong's process. The ping-pong is what any Python program over ZeroMQ can't beat: two
blocking sockets, 64 bytes there and back.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Generator
from typing import Any

from legion_shm.errors import PeerFailed
from legion_shm.native_bench.model import Row
from legion_shm.native_bench.peers.base import TIMEOUT_S
from legion_shm.native_bench.peers.child import blocked_interrupts, die_with_parent
from legion_shm.native_bench.peers.legion import WORKER_NODES, job_of
from legion_shm.native_bench.peers.zeromq import bare_address, bare_socket
from legion_shm.native_bench.summary import summarize

__all__ = ["measure_control"]

_WARM_UP = 20
_MESSAGE = b"x" * 64


def measure_control(*, rounds: int, show: Callable[[str], None]) -> list[Row]:
    """An empty job, a job with 64 bytes there and back, and the ping-pong. Raises LegionError."""
    from legion_shm.config import WorkerSpec
    from legion_shm.supervisor.api import Supervisor

    spec = WorkerSpec(engine="graph", node_modules=[WORKER_NODES])
    flow = job_of("BenchEmpty")
    samples: dict[str, list[float]] = {"empty-job": [], "zeromq-bare": []}
    with Supervisor() as legion, _ping_pong() as ping:
        ways: dict[str, Callable[[], object]] = {
            "empty-job": lambda: legion.submit(flow, inputs=[1], spec=spec).result(timeout=TIMEOUT_S),
            "zeromq-bare": ping,
        }
        for number in range(_WARM_UP + rounds):
            if number % 50 == 0:
                show(f"control: round {number} of {_WARM_UP + rounds}")
            for name, way in ways.items():
                started_ns = time.monotonic_ns()
                way()
                took_us = (time.monotonic_ns() - started_ns) / 1000
                if number >= _WARM_UP:
                    samples[name].append(took_us)
    return [Row.of("control", name, "round_trip", summarize(values)) for name, values in samples.items()]


@contextlib.contextmanager
def _ping_pong() -> Generator[Callable[[], object]]:
    folder = tempfile.mkdtemp(prefix="legion-bench-")
    address = bare_address(folder)
    process = multiprocessing.get_context("spawn").Process(target=_pong, args=(address,), daemon=True)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        near, close = bare_socket(address, bind=True)
        stack.callback(close)
        with blocked_interrupts():
            process.start()

        def end() -> None:
            process.kill()
            process.join()
            process.close()

        stack.callback(end)

        def ping() -> object:
            try:
                near.send(_MESSAGE)
                return near.recv()
            except Exception as error:
                raise PeerFailed(f"the ZeroMQ ping-pong failed: {error}") from error

        ping()
        yield ping


def _pong(address: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    far: Any
    far, _ = bare_socket(address, bind=False)
    while True:
        far.send(far.recv())
