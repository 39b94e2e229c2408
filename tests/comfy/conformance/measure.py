"""``EXE -m tests.comfy.conformance.measure --comfyui PATH``: a worker's start and memory, and the server's.

To be run from the repository with ComfyUI's Python, on a machine that does nothing else. The two take turns,
after one start of each that does not count. Both have the command line arguments that are given after ``--``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Start:
    ready_s: float
    uss_bytes: int
    rss_bytes: int


def worker_start(comfyui: Path, arguments: list[str]) -> Start:
    """From the making of a Supervisor until its worker can take a job."""
    spec = WorkerSpec(engine="comfy", comfyui_path=str(comfyui), extra_args=tuple(arguments))
    began_s = monotonic_s()
    with Supervisor() as legion:
        legion.warm_up(spec)
        _until(lambda: any(worker.state == "idle" for worker in legion.workers()))
        ready_s = monotonic_s() - began_s
        pid = legion.workers()[0].pid
        assert pid is not None
        return _measured(ready_s, pid)


def server_start(comfyui: Path, arguments: list[str]) -> Start:
    """From the start of ``python main.py`` until its first answer."""
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
            return _measured(monotonic_s() - began_s, process.pid)
        finally:
            process.kill()
            process.wait(20)


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


def _measured(ready_s: float, pid: int) -> Start:
    Event().wait(_SETTLE_S)
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    memory = [member.memory_full_info() for member in family]
    return Start(ready_s, sum(item.uss for item in memory), sum(item.rss for item in memory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("arguments", nargs="*", metavar="-- COMFYUI_ARGUMENT")
    chosen = parser.parse_args()
    comfyui = chosen.comfyui.expanduser().resolve()
    arguments = chosen.arguments or ["--cpu"]
    starts: dict[str, list[Start]] = {"Legion worker": [], "HTTP server": []}
    for number in range(chosen.runs + 1):
        load = os.getloadavg()[0]
        for name, start in (("Legion worker", worker_start), ("HTTP server", server_start)):
            made = start(comfyui, arguments)
            if number:
                starts[name].append(made)
                print(f"{name}: {_text([made])} (load before: {load:.1f})", flush=True)
    for name, made_of in starts.items():
        print(f"{name}, median of {chosen.runs}: {_text(made_of)}")


def _text(starts: list[Start]) -> str:
    ready_s = statistics.median(start.ready_s for start in starts)
    uss = statistics.median(start.uss_bytes for start in starts)
    rss = statistics.median(start.rss_bytes for start in starts)
    return f"ready after {ready_s:.2f} s, USS {uss / 1e6:.0f} MB, RSS {rss / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
