"""What a supervisor could leave behind, as the system sees it: looked at before, compared after.

Owns looking. It ends no process and removes no file. Linux, where ``/proc`` tells; elsewhere only
threads are seen. What other living processes hold is theirs, and not counted; of shared memory with a name
only what supervisors with the same runtime directory made.

    before = snapshot()
    ...                              # supervisors come and go
    assert_nothing_left(before)      # waits for what is on its way out, then names what stayed
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path

from legion_shm.transport.runtime_dir import base_mark, default_base

__all__ = ["Snapshot", "assert_nothing_left", "snapshot"]

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "legion-"  # of portable segments and of memfds alike
_OTHERS_THREADS = (
    "legion-copy",  # the process's own, not a supervisor's: it stays for the next large copy
    "pytest_timeout",  # the clock of the test that runs, where there is no SIGALRM
)
_POLL_S = 0.01
_TRACKER: object = getattr(resource_tracker, "_resource_tracker", None)


@dataclass(frozen=True)
class Snapshot:
    """What was there: pids with their command, descriptors by kind, names of threads, segments, folders."""

    children: Mapping[str, str] = field(default_factory=dict[str, str])
    descriptors: Mapping[str, int] = field(default_factory=dict[str, int])
    threads: frozenset[str] = frozenset()
    segments: frozenset[str] = frozenset()
    runtime_dirs: frozenset[str] = frozenset()
    maps: int = 0

    def left_since(self, before: Snapshot) -> list[str]:
        """What is here now and was not there before, one line each."""
        children = {pid: command for pid, command in self.children.items() if pid not in before.children}
        left = [f"child process {pid}: {command}" for pid, command in children.items()]
        for kind, count in self.descriptors.items():
            more = count - before.descriptors.get(kind, 0)
            if more > 0:
                left.append(f"{more} more open descriptors of kind {kind}")
        left.extend(f"thread {name}" for name in sorted(self.threads - before.threads))
        left.extend(f"shared memory {name}" for name in sorted(self.segments - before.segments))
        left.extend(f"runtime entry {name}" for name in sorted(self.runtime_dirs - before.runtime_dirs))
        if self.maps > before.maps:
            left.append(f"{self.maps - before.maps} more mappings of shared memory")
        return left


def snapshot(runtime_dir: str | os.PathLike[str] | None = None) -> Snapshot:
    """What this process has now. ``runtime_dir``: as in SupervisorSettings, where it is not the default.

    multiprocessing's resource tracker, which lives as long as the process, is left out.
    """
    base = default_base() if runtime_dir is None else Path(runtime_dir)
    return Snapshot(
        children=dict(_children()),
        descriptors=Counter(_descriptors()),
        threads=frozenset(
            f"{thread.name} ({thread.ident})"
            for thread in threading.enumerate()
            if not thread.name.startswith(_OTHERS_THREADS)
        ),
        segments=frozenset(_segments(base)),
        runtime_dirs=frozenset(_runtime_entries(base)),
        maps=sum(1 for _ in _maps()),
    )


def assert_nothing_left(
    before: Snapshot, *, within_s: float = 5.0, runtime_dir: str | os.PathLike[str] | None = None
) -> None:
    """AssertionError naming what has come since ``before`` and is not gone within the time.

    A value that is still referred to keeps its mapping: let go of results first.
    """
    deadline_s = time.monotonic() + within_s
    while True:
        left = snapshot(runtime_dir).left_since(before)
        if not left:
            return
        if time.monotonic() >= deadline_s:
            raise AssertionError(f"left behind {within_s:g} s later:\n  " + "\n  ".join(left))
        time.sleep(_POLL_S)


def _children() -> Iterator[tuple[str, str]]:
    tracker = str(getattr(_TRACKER, "_pid", None))
    tasks = Path("/proc/self/task")
    for task in _names(tasks):
        for pid in _read(tasks / task / "children").split():
            if pid != tracker:
                command = _read(Path("/proc", pid, "cmdline")).replace("\0", " ")
                yield pid, command[:200] or "(ended, not reaped)"


def _descriptors() -> Iterator[str]:
    tracker_fd = str(getattr(_TRACKER, "_fd", None))
    folder = Path("/proc/self/fd")
    for fd in _names(folder):
        try:
            target = os.readlink(folder / fd)
        except OSError:  # the listing's own
            continue
        if fd != tracker_fd:
            yield re.sub(r"(?<=:)\[\d+\]$", "", target)


def _segments(base: Path) -> set[str]:
    names = set(_names(_SHARED_MEMORY, f"{_PREFIX}{base_mark(base)}"))
    if not names:
        return names
    for pid in _names(Path("/proc")):
        if pid.isdigit() and pid != str(os.getpid()):
            folder = Path("/proc", pid, "fd")
            for fd in _names(folder):
                with contextlib.suppress(OSError):
                    names.discard(Path(os.readlink(folder / fd)).name)
    return names


def _runtime_entries(base: Path) -> Iterator[str]:
    for name in _names(base):
        lock = base / f"{name.removesuffix('.lock')}.lock"
        if not _is_locked(lock):
            yield name


def _is_locked(lock: Path) -> bool:
    """Whether a supervisor that lives has it; one of this process shows by its thread as well."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _maps() -> Iterator[str]:
    for line in _read(Path("/proc/self/maps")).splitlines():
        if f"/memfd:{_PREFIX}" in line or f"{_SHARED_MEMORY}/{_PREFIX}" in line:
            yield line


def _names(folder: Path, prefix: str = "") -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.startswith(prefix)]
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
