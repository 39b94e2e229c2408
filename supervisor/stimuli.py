"""What goes into the state machine and what comes out: frozen classes named for facts and orders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from legion_shm.errors import LegionError, StartupError
from legion_shm.events import TerminalState

__all__ = [
    "Action",
    "AskStop",
    "CancelRequested",
    "CloseRequested",
    "HeartbeatSeen",
    "Interrupt",
    "JobReplied",
    "JobSubmitted",
    "PoolDefined",
    "RemotesChanged",
    "ResolveJob",
    "RetryNoted",
    "SendJob",
    "SignalWorker",
    "SpawnWorker",
    "Stalled",
    "StartFailed",
    "Stimulus",
    "StopRequested",
    "Tick",
    "WarmUpRequested",
    "WorkerExited",
    "WorkerReady",
]


# --- in -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolDefined:
    """A spec seen for the first time."""

    pool: str
    max_workers: int
    startup_timeout_s: float
    idle_timeout_s: float | None
    max_jobs_per_life: int | None
    warm_spares: int = 0


@dataclass(frozen=True)
class JobSubmitted:
    job: str
    pool: str
    deadline_s: float | None
    """Absolute, monotonic."""
    retries: int
    worker: str | None = None
    """The one that it must run in, for an object of its own is among the inputs."""
    limit_s: float | None = None
    """The ``deadline_s`` that the caller gave, for the error's text."""


@dataclass(frozen=True)
class CancelRequested:
    job: str


@dataclass(frozen=True)
class WarmUpRequested:
    pool: str
    workers: int


@dataclass(frozen=True)
class StopRequested:
    """Stop idle workers now and busy ones after their job; None means of every pool."""

    pool: str | None


@dataclass(frozen=True)
class CloseRequested:
    pass


@dataclass(frozen=True)
class WorkerReady:
    worker: str


@dataclass(frozen=True)
class StartFailed:
    """The worker said why it can't start, or could not even be spawned; its exit follows."""

    worker: str
    error: StartupError


@dataclass(frozen=True)
class HeartbeatSeen:
    worker: str


@dataclass(frozen=True)
class JobReplied:
    """The worker ended a job by itself: ``error`` is None when it is done."""

    worker: str
    job: str
    attempt: int
    outcome: TerminalState
    error: LegionError | None


@dataclass(frozen=True)
class WorkerExited:
    """The process is gone. ``cause`` says how, in words; ``exit_code`` as in subprocess.

    ``begun``: it had begun the job that it was given; False when the job was still on its way.
    """

    worker: str
    exit_code: int | None
    cause: str
    log_tail: tuple[str, ...]
    begun: bool = True


@dataclass(frozen=True)
class RemotesChanged:
    """So many more (or fewer) handles of a worker's objects are held."""

    worker: str
    change: int


@dataclass(frozen=True)
class Stalled:
    """The supervisor itself did not run for a while, so silence proves nothing."""


@dataclass(frozen=True)
class Tick:
    """Time has passed; every message that had arrived by now has been handled."""


Stimulus = (
    PoolDefined
    | JobSubmitted
    | CancelRequested
    | WarmUpRequested
    | StopRequested
    | CloseRequested
    | WorkerReady
    | StartFailed
    | HeartbeatSeen
    | JobReplied
    | WorkerExited
    | RemotesChanged
    | Stalled
    | Tick
)


# --- out ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpawnWorker:
    worker: str
    pool: str


@dataclass(frozen=True)
class SendJob:
    worker: str
    job: str
    attempt: int


@dataclass(frozen=True)
class Interrupt:
    worker: str
    job: str


@dataclass(frozen=True)
class AskStop:
    worker: str


@dataclass(frozen=True)
class SignalWorker:
    """To the worker's whole process group."""

    worker: str
    signal: Literal["SIGTERM", "SIGKILL"]


@dataclass(frozen=True)
class ResolveJob:
    """The job has ended, for good. Comes once for every accepted job."""

    job: str
    state: TerminalState
    error: LegionError | None


@dataclass(frozen=True)
class RetryNoted:
    job: str
    attempt: int
    reason: str


Action = SpawnWorker | SendJob | Interrupt | AskStop | SignalWorker | ResolveJob | RetryNoted
