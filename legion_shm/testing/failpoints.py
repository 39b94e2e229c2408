"""Named failpoints: a fault in the middle of something, as a place and not as a time.

Owns the list of places and what can happen there. Switched by the environment of the process that is to fail,
so a worker's by its spec and a supervisor's by its own:

    WorkerSpec(env={"LEGION_FAILPOINTS": "copy.half_done=kill, host.before_reply=pause:/tmp/gate"})
    LEGION_FAILPOINTS="segment.create=raise:ENOSPC@3" python program.py

    place=action[@number][?file]

``action``: ``kill`` (SIGKILL to itself; on Windows TerminateProcess), ``stop`` (SIGSTOP; not on Windows),
``exit`` (code 13, at once), ``raise:NAME`` (an OSError of that errno name, or MemoryError), ``pause:FILE``
(makes FILE.entered, waits for FILE.go).
``number``: only at that pass through the place in this process, else at each. ``file``: only while it is not
there, and it is made then: once, however many processes pass. In a program's own tests: `armed`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from legion_shm import faults
from legion_shm.errors import ConfigError

__all__ = ["PLACES", "arm", "armed"]

PLACES = {
    "host.before_hello": "worker: it has started, and said nothing yet",
    "host.before_ready": "worker: its engine runs, and it has not said so",
    "host.before_begun": "worker: a job has come, and it has not noted that it begins it",
    "host.after_begun": "worker: it has noted that it begins a job, and done nothing for it",
    "host.before_reply": "worker: the result lies in its arena, and is not sent",
    "host.after_reply": "worker: the result is sent",
    "host.while_stopping": "worker: it was told to stop, and is closing",
    "worker.segment_granted": "worker: its segment is granted, its descriptor not yet taken",
    "arena.after_reserve": "owner of an arena: a block is reserved, and empty",
    "copy.half_done": "any copy into shared memory: half of the bytes are written",
    "segment.create": "supervisor: a segment is about to be made",
    "gpu.create": "supervisor: a segment of a GPU's memory is about to be made",
    "gpu.granted": "worker: its segment of a GPU's memory is granted, and not open",
    "gpu.opened": "worker: a segment of a GPU's memory is open, and not proved",
    "gpu.copying": "any copy within a GPU's memory: it was begun, and is not awaited",
    "processes.after_spawn": "supervisor: a worker process was started, and is not looked after yet",
    "lending.before_descriptor": "supervisor: a segment's descriptor is about to be sent",
    "lending.after_descriptor": "supervisor: a descriptor is sent, the message that needs it is not",
    "orders.after_send_job": "supervisor: a job is sent to its worker",
    "inbox.after_leases": "supervisor: a result's leases are taken, its job is not resolved",
    "loop.before_end": "supervisor: its workers have ended, its files are not closed",
    "runtime_dir.after_lock": "supervisor: its lock file is there, its directory is not",
}

_PAUSE_S = 60.0
_POLL_S = 0.005


@dataclass
class _Fault:
    action: str
    number: int | None
    marker: Path | None
    passes: int = 0

    def happen(self, place: str) -> None:
        self.passes += 1
        if self.number is not None and self.passes != self.number:
            return
        if self.marker is not None:
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                return
        kind, _, rest = self.action.partition(":")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "exit":
            os._exit(13)
        elif kind == "raise":
            if rest == "MemoryError":
                raise MemoryError(f"at {place}")
            number = getattr(errno, rest)
            raise OSError(number, os.strerror(number))
        else:
            _pause(Path(rest))


def _pause(gate: Path) -> None:
    gate.with_name(f"{gate.name}.entered").touch()
    until_s = time.monotonic() + _PAUSE_S
    while not gate.with_name(f"{gate.name}.go").exists():
        if time.monotonic() >= until_s:
            raise TimeoutError(f"nobody made {gate}.go")
        time.sleep(_POLL_S)


def arm(text: str) -> None:
    """Put these faults in place in this process, instead of any before. ConfigError where it says nothing."""
    found: dict[str, _Fault] = {}
    for part in text.split(","):
        place, _, rest = (piece.strip() for piece in part.partition("="))
        rest, _, marker = rest.partition("?")
        action, _, number = rest.partition("@")
        kind, _, argument = action.partition(":")
        known = {
            "kill": not argument,
            "stop": not argument and sys.platform != "win32",
            "exit": not argument,
            "raise": argument == "MemoryError" or hasattr(errno, argument),
            "pause": bool(argument),
        }
        if place not in PLACES or not known.get(kind) or not (number or "1").isdecimal():
            raise ConfigError(
                f"{faults.VARIABLE}: {part.strip()!r} is no place=action[@number][?file]; the places are "
                f"{', '.join(PLACES)}; the actions kill, stop, exit, raise:ERRNO, pause:FILE",
                key=faults.VARIABLE,
            )
        found[place] = _Fault(action, int(number) if number else None, Path(marker) if marker else None)

    def hit(place: str) -> None:
        fault = found.get(place)
        if fault is not None:
            fault.happen(place)

    faults.hit = hit


@contextlib.contextmanager
def armed(text: str) -> Generator[None, None, None]:
    """`arm` for a block of a test, in this process."""
    before = faults.hit
    arm(text)
    try:
        yield
    finally:
        faults.hit = before
