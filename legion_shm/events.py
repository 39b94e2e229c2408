"""What happens to a job, as the caller of `Job.events` sees it: frozen classes named for facts.

Every event carries ``job_id``, ``seq`` (0, 1, 2, ... within the job) and ``time_s`` (seconds of the
monotonic clock of the supervisor's machine, when the supervisor took note). ``kind`` is a short
constant for matching without imports; new kinds may be added, so skip those you do not know.
Exactly one event of a job is terminal: a `JobEnded`, the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from legion_shm.errors import LegionError

__all__ = [
    "TERMINAL_STATES",
    "Event",
    "EventsDropped",
    "JobEnded",
    "JobQueued",
    "JobRetrying",
    "JobStarted",
    "LogEvent",
    "NodeEvent",
    "PreviewEvent",
    "ProgressEvent",
    "TerminalState",
]

TerminalState = Literal["done", "failed", "cancelled", "lost"]
TERMINAL_STATES: frozenset[str] = frozenset({"done", "failed", "cancelled", "lost"})


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    name: ClassVar[str] = "event"

    job_id: str
    seq: int
    time_s: float

    @property
    def kind(self) -> str:
        return self.name

    @property
    def terminal(self) -> bool:
        """True for the one event after which no other comes."""
        return False


@dataclass(frozen=True)
class JobQueued(Event):
    """The job was accepted."""

    name = "queued"


@dataclass(frozen=True)
class JobStarted(Event):
    """The job was given to a worker; ``attempt`` counts from 1."""

    name = "started"
    worker_id: str
    engine: str
    attempt: int


@dataclass(frozen=True)
class NodeEvent(Event):
    """A node started, finished, or was not run because its cached outputs still hold."""

    name = "node"
    node_id: str
    class_type: str
    status: Literal["started", "finished", "cached"]


@dataclass(frozen=True)
class ProgressEvent(Event):
    """A node reports ``value`` of ``total`` steps. ``node_id`` is None where it was not told."""

    name = "progress"
    node_id: str | None
    value: float
    total: float


@dataclass(frozen=True)
class PreviewEvent(Event):
    """A preview image: ``data`` is an encoded picture of the format ``format`` (``"JPEG"``, ``"PNG"``)."""

    name = "preview"
    node_id: str | None
    format: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class LogEvent(Event):
    """A line that the worker wrote while it ran the job. ``stream``: ``stdout``, ``stderr`` or ``log``.

    For ``log`` (a record of :mod:`logging`), ``level`` is its level name and ``logger`` its logger.
    """

    name = "log"
    stream: Literal["stdout", "stderr", "log"]
    text: str
    level: str | None = None
    logger: str | None = None


@dataclass(frozen=True)
class JobRetrying(Event):
    """The worker was lost and the job, which asked for retries, waits for another one.

    ``attempt`` is the one that was lost.
    """

    name = "retrying"
    attempt: int
    reason: str


@dataclass(frozen=True)
class EventsDropped(Event):
    """``count`` events before this one are gone: they came faster than the bounded history holds."""

    name = "dropped"
    count: int


@dataclass(frozen=True)
class JobEnded(Event):
    """The terminal event; ``kind`` is the job's final state, ``error`` its error unless it is done."""

    state: TerminalState
    error: LegionError | None = None

    @property
    def kind(self) -> str:
        return self.state

    @property
    def terminal(self) -> bool:
        return True
