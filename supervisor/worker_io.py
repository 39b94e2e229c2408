"""One worker as the loop sees it: its process, its sockets' names, its output, what it holds.

Owns the reading of a worker's output lines and the words for how it ended. It decides nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from legion_shm.config import WorkerSpec
from legion_shm.exit_codes import describe_exit
from legion_shm.ids import new_arena_id, new_token
from legion_shm.supervisor.spawned import SIGKILL, SIGTERM, SpawnedWorker
from legion_shm.transport.channel import Endpoint

__all__ = ["LineReader", "WorkerIO", "begun_mark", "describe_exit", "write_begun"]

Stream = Literal["stdout", "stderr"]

_READ_BYTES = 65536
_LINE_BYTES = 8192
_LINES_A_TURN = 1000


class LineReader:
    """Lines from a non-blocking descriptor. A carriage return ends a line too, as progress bars use it."""

    def __init__(self, fd: int, read: Callable[[int, int], bytes] | None = None) -> None:
        self.fd = fd
        self._read = read
        self.ended = False
        self._partial = b""

    def read(self) -> list[str]:
        """The whole lines that have come, bounded per call; an overlong one is broken up."""
        lines: list[bytes] = []
        read = self._read or os.read
        while not self.ended and len(lines) < _LINES_A_TURN:
            try:
                data = read(self.fd, _READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.ended = True
                lines.append(self._partial)
                self._partial = b""
                break
            *whole, self._partial = (self._partial + data).replace(b"\r", b"\n").split(b"\n")
            for line in whole:
                lines.extend(_pieces(line))
            *full, self._partial = _pieces(self._partial)
            lines.extend(full)
        return [line.decode("utf-8", "replace") for line in lines if line.strip()]


def _pieces(line: bytes) -> list[bytes]:
    return [line[start : start + _LINE_BYTES] for start in range(0, len(line), _LINE_BYTES)] or [b""]


@dataclass
class WorkerIO:
    """A worker from the order to spawn it until its last byte of output has been read."""

    id: str
    spec: WorkerSpec
    log_lines: int
    token: str = field(default_factory=new_token, repr=False)
    arena: int = field(default_factory=new_arena_id)
    frees_sent: int = 0
    frees_answered: int = 0
    endpoint: Endpoint | None = None
    spawned: SpawnedWorker | None = None
    readers: dict[int, tuple[Stream, LineReader]] = field(
        default_factory=dict[int, tuple[Stream, LineReader]]
    )
    tail: deque[str] = field(default_factory=deque[str])
    segments: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    gpu_segments: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])  # that it may have open
    blind_to: frozenset[str] = frozenset()  # devices whose memory it can't read
    greeted: set[str] = field(default_factory=set[str])
    engine: str = ""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    rss_bytes: int = 0
    ready: bool = False
    kill_wanted: bool = False
    gone_at_s: float | None = None
    status_awaited: bool = False  # it has ended, and the word on how is still to come
    violation: str = ""
    delivered: str = ""
    replies: int = 0
    awaits_segment: bool = False
    awaits_copies: bool = False
    unsent: deque[tuple[int, int]] = field(default_factory=deque[tuple[int, int]])
    unsent_since_s: float = 0.0
    withdraw: Callable[[], object] | None = None
    """Take it back while its process is only waited for."""
    _begun: LineReader | None = None
    _last_begun: str = ""

    def __post_init__(self) -> None:
        self.tail = deque(maxlen=self.log_lines)

    @cached_property
    def job_identity(self) -> bytes:
        return f"{self.id}.job.{self.token}".encode()

    @cached_property
    def control_identity(self) -> bytes:
        return f"{self.id}.control.{self.token}".encode()

    @property
    def identities(self) -> tuple[bytes, bytes]:
        return self.job_identity, self.control_identity

    def adopt(self, spawned: SpawnedWorker) -> None:
        self.spawned = spawned
        self._begun = LineReader(spawned.begun, spawned.read)
        self.readers = {
            spawned.stdout: ("stdout", LineReader(spawned.stdout, spawned.read)),
            spawned.stderr: ("stderr", LineReader(spawned.stderr, spawned.read)),
        }

    def has_begun(self, job: str, attempt: int) -> bool:
        """Whether it began this attempt of a job; what it wrote of that outlives it."""
        if self._begun is not None:
            lines = self._begun.read()
            if lines:
                self._last_begun = lines[-1]
        return self._last_begun == begun_mark(job, attempt)

    def break_off(self, violation: str) -> None:
        """End a worker that does not keep to the protocol; its exit resolves its job."""
        self.violation = violation
        self.tail.append(f"[legion] dropped for a protocol error: {violation}")
        self.signal("SIGKILL")

    def signal(self, name: Literal["SIGTERM", "SIGKILL"]) -> None:
        if self.spawned is None:
            self.kill_wanted = True  # as soon as it is there
            if self.withdraw is not None:
                self.withdraw()
        else:
            self.spawned.signal_group(SIGTERM if name == "SIGTERM" else SIGKILL)

    def read_lines(self) -> list[tuple[Stream, str]]:
        """What it wrote since the last call, into the tail as well."""
        lines: list[tuple[Stream, str]] = []
        if self.spawned is None or not self.spawned.has_output():
            return lines
        for stream, reader in self.readers.values():
            for line in reader.read():
                self.tail.append(line)
                lines.append((stream, line))
        return lines


def write_begun(fd: int, job: str, attempt: int) -> None:
    """Write that line, in the worker. Nobody has read the pipe for thousands of jobs where it is full."""
    try:
        os.write(fd, f"{begun_mark(job, attempt)}\n".encode())
    except BlockingIOError:
        return


def begun_mark(job: str, attempt: int) -> str:
    """The line that a worker writes when it begins a job."""
    return f"{job} {attempt}"
