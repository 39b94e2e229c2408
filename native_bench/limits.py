"""The physical limits that every figure stands against: measured by a small C program in the same run.

Owns the program's building and running, and what its figures mean as limits. The source comes with the
package;
it is compiled with ``cc`` into the user's cache, once per content. Without a compiler there are no limits
and no ratios, and the result says so.

    copy_warm_1, copy_warm_2        memcpy between warm memory, on one thread and on two
    copy_warm_1_nt, copy_warm_2_nt  the same with glibc's non-temporal threshold at 2 MiB
    copy_fresh_memfd                create, map, copy, unmap: what a segment per message costs
    fault                           first touch of fresh private pages
    read_whole, touch               using what came
    wake_spin, wake_futex, wake_eventfd   there and back between two processes, no payload
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from legion_shm.native_bench.model import Row
from legion_shm.native_bench.schedule import Size
from legion_shm.native_bench.summary import summarize

__all__ = ["Limits", "build_program", "measure_limits", "with_limits"]

_NT_THRESHOLD = "glibc.cpu.x86_non_temporal_threshold=0x200000"
_TIMEOUT_S = 120.0
_WAKE_ROUNDS = 2000
Samples = dict[tuple[str, int], list[float]]


class Limits:
    """Samples of all runs of the program, in microseconds, by name and bytes."""

    def __init__(self) -> None:
        self.samples: Samples = {}

    def add(self, samples: Mapping[tuple[str, int], Sequence[float]]) -> None:
        for key, values in samples.items():
            self.samples.setdefault(key, []).extend(values)

    def rows(self, sizes: Sequence[Size]) -> list[Row]:
        labels = {size.nbytes: size.label for size in sizes}
        return [
            Row.of("limit", name, "time", summarize(values), size_bytes=nbytes, size=labels.get(nbytes, ""))
            for (name, nbytes), values in self.samples.items()
        ]


def build_program() -> tuple[Path | None, str]:
    """The program, built if it is not there yet; or None and the reason."""
    if sys.platform != "linux":
        return None, "the program that measures limits is for Linux"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None, "no C compiler (cc, gcc or clang) was found"
    source = (files("legion_shm.native_bench") / "limits.c").read_bytes()
    digest = hashlib.blake2b(source + compiler.encode(), digest_size=8).hexdigest()
    folder = _cache_folder()
    program = folder / f"limits-{digest}"
    if program.exists():
        return program, ""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            path = Path(work, "limits.c")
            path.write_bytes(source)
            built = Path(work, "limits")
            command = [*compiler.split(), "-O2", "-std=gnu11", "-pthread", "-o", str(built), str(path)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode:
                return None, f"the C compiler failed: {done.stderr.strip()[-300:]}"
            built.replace(program)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"the C program could not be built: {error}"
    return program, ""


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "legion-shm" if base else Path.home() / ".cache" / "legion-shm"


def run_program(program: Path, arguments: Sequence[str], *, tunables: str = "") -> Samples:
    """Samples in microseconds by name and bytes. Raises OSError and its like where it can't be run."""
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    if tunables:
        environment["GLIBC_TUNABLES"] = tunables
    done = subprocess.run(
        [str(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
    )
    samples: Samples = {}
    for line in done.stdout.splitlines():
        name, nbytes, *values = line.split()
        samples[name, int(nbytes)] = [int(value) / 1000 for value in values]
    return samples


def measure_limits(sizes: Sequence[Size], *, quick: bool, limits: Limits, show: Callable[[str], None]) -> str:
    """Measure once more into ``limits``; the reason where that can't be. Called at a run's start and end."""
    program, reason = build_program()
    if program is None:
        return reason
    try:
        show("physical limits: waking")
        limits.add(run_program(program, ["wake", str(_WAKE_ROUNDS if not quick else 500)]))
        for size in sizes:
            show(f"physical limits: {size.label}")
            rounds = str(max(3, min(100, (64 << 20 if quick else 512 << 20) // size.nbytes)))
            arguments = ["copy", rounds, str(size.nbytes)]
            limits.add(run_program(program, arguments))
            tuned = run_program(program, arguments, tunables=_NT_THRESHOLD)
            limits.add(
                {(f"{name}_nt", n): v for (name, n), v in tuned.items() if name.startswith("copy_warm")}
            )
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return f"the program that measures limits failed: {error}"
    return ""


def with_limits(rows: Sequence[Row]) -> list[Row]:
    """The rows with the limit that each stands against.

    A round trip of private tensors can't beat two warm copies on two threads and using both tensors; one by
    handle can't beat using them; one on a GPU, two copies within it. Waking there and back comes on top
    (futex; half of it one way).
    """
    medians = {(row.case, row.size_bytes): row.median for row in rows if row.section == "limit"}
    wake = medians.get(("wake_futex", 0))
    zeromq = next((row.median for row in rows if (row.section, row.case) == ("control", "zeromq-bare")), None)
    done: list[Row] = []
    for row in rows:
        bound, words = None, ""
        if row.section == "transfer" and wake is not None:
            ways = 2 if row.metric == "round_trip" else 1
            used = {"touch": "touch", "read": "read_whole"}.get(row.use)
            use = medians.get((used, row.size_bytes)) if used else 0.0
            copies = [medians.get((f"copy_warm_{n}", row.size_bytes)) for n in (1, 2)]
            copy = min((each for each in copies if each is not None), default=None)
            if row.case in _BY_HANDLE:
                copy, words = 0.0, "wake, use"
            else:
                words = "wake, warm copies on up to 2 threads, use"
            if row.use == "cuda":
                copy, use = (medians.get((name, row.size_bytes)) for name in ("cuda_copy", "cuda_read"))
                words = "wake, copies within the GPU, use"
            if use is not None and copy is not None:
                bound = ways * (copy + use) + wake * ways / 2
        elif row.section == "control" and row.case != "zeromq-bare" and zeromq is not None:
            bound, words = zeromq, "a bare ZeroMQ ping-pong in Python"
        elif row.section == "control" and wake is not None:
            bound, words = wake, "a futex ping-pong in C"
        if bound:
            figures = {"limit": round(bound, 3), "bound_by": words, "ratio": round(row.median / bound, 3)}
            done.append(row.model_copy(update=figures))
        else:
            done.append(row)
    return done


_BY_HANDLE = frozenset({"legion-born", "legion-resident", "legion-forward", "legion-handle"})
