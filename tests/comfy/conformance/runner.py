"""Runs ComfyUI's own execution tests, unmodified, against a Legion worker or against ComfyUI's HTTP server.

Owns the command line of that pytest run, in the ComfyUI checkout and with ComfyUI's Python, and the reading
of its outcome. What stands in place of the server is `legion_conformance`'s, a plugin of that run.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

__all__ = ["Outcome", "SuiteRun", "free_port", "run_suite", "suite_problem"]

_REPOSITORY = Path(__file__).resolve().parents[3]
_SUITE = "tests/execution"
_NEEDED = "aiohttp, pytest, websocket, torch, pydantic, zmq, msgpack, psutil, yaml"


@dataclass(frozen=True)
class Outcome:
    """How one test ended: ``passed``, ``failed`` (an error in its set-up, too) or ``skipped``, and why."""

    name: str
    state: str
    reason: str
    took_s: float

    @property
    def function(self) -> str:
        """Its name without module, class and parameters."""
        return self.name.partition("[")[0].rpartition(".")[2]

    @property
    def needs_no_server(self) -> bool:
        """Whether it is one of the unit tests that lie among the others, and tries nothing of Legion's."""
        return self.name.startswith("test_jobs.")


@dataclass(frozen=True)
class SuiteRun:
    """One run of the whole suite. ``output`` is what pytest and the workers wrote."""

    outcomes: tuple[Outcome, ...]
    exit_code: int
    output: str

    def counts(self) -> Counter[str]:
        return Counter(outcome.state for outcome in self.outcomes)

    def of(self, state: str) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.state == state)


def suite_problem(comfyui: Path, python: Path) -> str:
    """Why the suite cannot be run with these; empty if it can."""
    if os.name == "nt":
        return "the conformance run needs symbolic links and /bin/sh"
    if not (comfyui / _SUITE / "testing_nodes").is_dir():
        return f"{comfyui} has no {_SUITE}: conformance needs a checkout of ComfyUI, with its tests"
    tried = subprocess.run(
        [str(python), "-c", f"import {_NEEDED}"], capture_output=True, text=True, timeout=120
    )
    if tried.returncode:
        words = tried.stderr.strip().splitlines()
        return f"{python} lacks a package (of {_NEEDED}; websocket is websocket-client): {words[-1:]}"
    return ""


def run_suite(
    comfyui: Path,
    python: Path,
    *,
    baseline: bool = False,
    pytest_args: Sequence[str] = (),
    timeout_s: float = 1800.0,
    echo: bool = False,
) -> SuiteRun:
    """Run it. ``baseline``: against the HTTP server that the suite starts. ``echo``: show pytest's output.

    Raises subprocess.TimeoutExpired.
    """
    with tempfile.TemporaryDirectory(prefix="legion-conformance-") as made:
        scratch = Path(made)
        report, paths = scratch / "report.xml", scratch / "path"
        (scratch / "output").mkdir()
        paths.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(paths), "PYTHONUNBUFFERED": "1"}
        command = [str(python), "-m", "pytest", _SUITE, "-p", "no:cacheprovider"]
        if baseline:
            environment["PATH"] = (
                f"{_server_python(scratch, python)}{os.pathsep}{environment.get('PATH', '')}"
            )
        else:
            # No more than these two: the repository's folders have names that ComfyUI uses as well.
            (paths / "legion_shm").symlink_to(_REPOSITORY / "legion_shm")
            (paths / "legion_conformance.py").symlink_to(Path(__file__).with_name("legion_conformance.py"))
            command += ["-p", "legion_conformance"]
        command += [
            f"--output_dir={scratch / 'output'}",
            f"--port={free_port()}",
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit2",
            "-rs",
            *pytest_args,
        ]
        exit_code, output = _watched(command, comfyui, environment, scratch / "log", timeout_s, echo)
        outcomes = tuple(_read(report)) if report.exists() else ()
    return SuiteRun(outcomes, exit_code, output)


def _watched(
    command: list[str], folder: Path, environment: dict[str, str], log: Path, timeout_s: float, echo: bool
) -> tuple[int, str]:
    with log.open("wb") as written:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=None if echo else written,
            stderr=None if echo else subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            exit_code = process.wait(timeout_s)
        finally:
            if process.poll() is None:
                process.terminate()  # pytest's end closes the worker; a killed one takes it along
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(20)
    return exit_code, log.read_text(errors="replace")


def _server_python(scratch: Path, python: Path) -> Path:
    """A folder with the ``python`` that the suite starts ``main.py`` with: the given one, no front end."""
    folder, front_end = scratch / "bin", scratch / "frontend"
    folder.mkdir()
    front_end.mkdir()
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{python}" "$@" --front-end-root "{front_end}"\n')
    script.chmod(0o755)
    if shutil.which("python", path=str(folder)) is None:
        raise RuntimeError(f"{script} cannot be executed: is the temporary folder mounted noexec?")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _read(report: Path) -> Iterable[Outcome]:
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.execution.')}.{case.get('name', '')}"
        state, reason = "passed", ""
        for kind, meant in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            said = case.find(kind)
            if said is not None:
                state, reason = meant, said.get("message", "") or (said.text or "")
        yield Outcome(name, state, reason, float(case.get("time", 0)))
