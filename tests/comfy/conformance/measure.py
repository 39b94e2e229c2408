"""``EXE -m tests.comfy.conformance.measure --comfyui PATH``: starts, idle memory; workers' and the server's.

To be run from the repository with ComfyUI's Python, on a machine that does nothing else. In each round there
come one after the other, after one round that does not count:

- *server*: ``python main.py``, from its start to its first answer;
- *executed*: a headless ComfyUI in a process of its own, without a zygote: from the making of a `Supervisor`
  until its worker can take a job;
- *first*: the same with a zygote, as workers start by default;
- *following*: one more worker, of the supervisor that has the first;
- *restart*: from the ``kill -9`` of a worker until there are again as many that can take a job.

All have the command line arguments that are given after ``--``. Python keeps the bytecode of what it
compiles, as on a user's machine, but in a folder that is gone afterwards; the first round fills it. Where the
environment forbids bytecode, 700 files of ComfyUI are compiled in each start: ``--no-bytecode`` shows that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from threading import Event

import psutil

from legion_shm import Supervisor, WorkerSpec
from legion_shm.clock import monotonic_s
from tests.comfy.conformance.runner import free_port

_READY_WAIT_S = 120.0
_POLL_S = 0.02
_SETTLE_S = 3.0
"""From ready to the look at memory: the server goes on with a few things after its first answer."""

_KINDS = ("server", "executed", "first", "following", "restart")


class Figures:
    """Seconds to ready, and idle memory in bytes, by kind of start."""

    def __init__(self) -> None:
        self.ready_s: dict[str, list[float]] = {}
        self.uss: dict[str, list[int]] = {}
        self.pss: dict[str, list[int]] = {}

    def took(self, kind: str, ready_s: float) -> None:
        self.ready_s.setdefault(kind, []).append(ready_s)

    def memory_of(self, kind: str, pid: int) -> None:
        memory = psutil.Process(pid).memory_full_info()
        self.uss.setdefault(kind, []).append(memory.uss)
        self.pss.setdefault(kind, []).append(memory.pss)


def server(comfyui: Path, arguments: list[str], figures: Figures) -> None:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="legion-measure-") as front_end:
        command = [sys.executable, "main.py", *arguments, "--port", str(port), "--front-end-root", front_end]
        began_s = monotonic_s()
        process = subprocess.Popen(
            command,
            cwd=comfyui,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        try:
            _until(lambda: _answers(port, process))
            figures.took("server", monotonic_s() - began_s)
            Event().wait(_SETTLE_S)
            figures.memory_of("server", process.pid)
        finally:
            process.kill()
            process.wait(20)


def executed(spec: WorkerSpec, figures: Figures) -> None:
    began_s = monotonic_s()
    with Supervisor(zygote="off") as legion:
        legion.warm_up(spec)
        _until(lambda: len(_idle(legion)) == 1)
        figures.took("executed", monotonic_s() - began_s)
        Event().wait(_SETTLE_S)
        figures.memory_of("executed", _idle(legion).pop())


def forked(spec: WorkerSpec, figures: Figures) -> None:
    """The first one, the following one and the restart."""
    began_s = monotonic_s()
    with Supervisor() as legion:
        legion.warm_up(spec)
        _until(lambda: len(_idle(legion)) == 1)
        figures.took("first", monotonic_s() - began_s)
        Event().wait(_SETTLE_S)
        (first,) = _idle(legion)
        figures.memory_of("first", first)
        parent = psutil.Process(first).ppid()
        if parent != os.getpid():
            figures.memory_of("zygote", parent)

        began_s = monotonic_s()
        legion.warm_up(spec, workers=2)
        _until(lambda: len(_idle(legion)) == 2)
        figures.took("following", monotonic_s() - began_s)
        Event().wait(_SETTLE_S)
        (following,) = _idle(legion) - {first}
        figures.memory_of("following", following)

        began_s = monotonic_s()
        os.kill(following, signal.SIGKILL)
        _until(lambda: len(_idle(legion) - {following}) == 2)
        figures.took("restart", monotonic_s() - began_s)


def _idle(legion: Supervisor) -> set[int]:
    return {worker.pid for worker in legion.workers() if worker.state == "idle" and worker.pid is not None}


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"main.py ended with {process.returncode}")
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/prompt", timeout=5):
        return True
    return False


def _until(ready: Callable[[], bool]) -> None:
    deadline_s, pause = monotonic_s() + _READY_WAIT_S, Event()
    while not ready():
        if monotonic_s() > deadline_s:
            raise TimeoutError(f"not ready after {_READY_WAIT_S:g} s")
        pause.wait(_POLL_S)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-bytecode", action="store_true", help="compile everything in each start")
    parser.add_argument("arguments", nargs="*", metavar="-- COMFYUI_ARGUMENT")
    chosen = parser.parse_args()
    comfyui = chosen.comfyui.expanduser().resolve()
    arguments = chosen.arguments or ["--cpu"]
    spec = WorkerSpec(engine="comfy", comfyui_path=str(comfyui), extra_args=tuple(arguments), max_workers=2)
    with tempfile.TemporaryDirectory(prefix="legion-measure-") as folder:
        if chosen.no_bytecode:
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        else:
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
            os.environ["PYTHONPYCACHEPREFIX"] = folder
        figures = _rounds(comfyui, arguments, spec, chosen.runs)
    print("\n| | ready, s: median (worst) | of the server's | idle USS, MB | idle PSS, MB |")
    print("|---|---|---|---|---|")
    for kind in (*_KINDS, "zygote"):
        print(_row(figures, kind))


def _rounds(comfyui: Path, arguments: list[str], spec: WorkerSpec, runs: int) -> Figures:
    """One more than ``runs``, of which the first does not count."""
    figures = Figures()
    for number in range(runs + 1):
        load = os.getloadavg()[0]
        made = figures if number else Figures()
        server(comfyui, arguments, made)
        executed(spec, made)
        forked(spec, made)
        shown = ", ".join(f"{kind} {made.ready_s[kind][-1]:.2f}" for kind in _KINDS)
        print(f"round {number}: {shown} s (load before: {load:.1f})", flush=True)
    return figures


def _row(figures: Figures, kind: str) -> str:
    cells = [kind, "", "", "", ""]
    times = figures.ready_s.get(kind)
    if times:
        ratio = statistics.median(times) / statistics.median(figures.ready_s["server"])
        cells[1:3] = [f"{statistics.median(times):.2f} ({max(times):.2f})", f"{ratio:.2f}"]
    if kind in figures.uss:
        cells[3:] = [f"{statistics.median(each[kind]) / 1e6:.0f}" for each in (figures.uss, figures.pss)]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
