"""The records and tables of the supervisor's state machine: which states there are and what may follow.

Data and legality alone; machine.py decides, loop.py acts.

    job     queued ─▶ running ─▶ done │ failed │ cancelled │ lost        queued ─▶ cancelled │ failed │ lost
                ▲        │   └─▶ ending ─▶ failed │ cancelled
                └────────┘ (retry)

    worker  starting ─▶ idle ◀─▶ busy        each ─▶ stopping ─▶ dead, each ─▶ dead
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from legion_shm.errors import LegionError, StartupError

__all__ = [
    "JOB_TABLE",
    "WORKER_TABLE",
    "IllegalTransition",
    "JobRecord",
    "JobState",
    "PoolRecord",
    "StopStage",
    "WorkerInfo",
    "WorkerRecord",
    "WorkerState",
]

JobState = Literal["queued", "running", "ending", "done", "failed", "cancelled", "lost"]
WorkerState = Literal["starting", "idle", "busy", "stopping", "dead"]
StopStage = Literal["none", "asked", "terminated", "killed"]

JOB_TABLE: dict[JobState, frozenset[JobState]] = {
    "queued": frozenset({"running", "failed", "cancelled", "lost"}),
    "running": frozenset({"queued", "ending", "done", "failed", "cancelled", "lost"}),
    "ending": frozenset({"failed", "cancelled"}),
    "done": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
    "lost": frozenset(),
}

WORKER_TABLE: dict[WorkerState, frozenset[WorkerState]] = {
    "starting": frozenset({"idle", "stopping", "dead"}),
    "idle": frozenset({"busy", "stopping", "dead"}),
    "busy": frozenset({"idle", "stopping", "dead"}),
    "stopping": frozenset({"dead"}),
    "dead": frozenset(),
}


class IllegalTransition(AssertionError):
    """Our own mistake: a state that may not follow. Nothing has been changed."""


@dataclass
class JobRecord:
    """A job that has not ended. ``end_error`` is what an ``ending`` job will end with.

    ``only_worker`` is where it must run, if not anywhere. ``not_begun`` counts the attempts whose workers
    died before they looked at the job. ``limit_s`` is the deadline as its caller gave it.
    """

    id: str
    pool: str
    submitted_s: float
    deadline_s: float | None
    retries: int
    only_worker: str | None = None
    limit_s: float | None = None
    state: JobState = "queued"
    attempt: int = 0
    deaths: int = 0
    not_begun: int = 0
    worker: str | None = None
    end_error: LegionError | None = None

    def to(self, state: JobState) -> None:
        if state not in JOB_TABLE[self.state]:
            raise IllegalTransition(f"job {self.id}: {self.state} -> {state}")
        self.state = state


@dataclass
class WorkerRecord:
    """A worker process that has not been seen to end. ``remotes`` handles of its objects are held."""

    id: str
    pool: str
    since_s: float
    last_seen_s: float
    state: WorkerState = "starting"
    job: str | None = None
    jobs_done: int = 0
    remotes: int = 0
    stage: StopStage = "none"
    stage_until_s: float | None = None
    expected: bool = False
    reason: str = ""
    start_error: StartupError | None = None
    interrupt_until_s: float | None = None

    def to(self, state: WorkerState) -> None:
        if state not in WORKER_TABLE[self.state]:
            raise IllegalTransition(f"worker {self.id}: {self.state} -> {state}")
        self.state = state


@dataclass
class PoolRecord:
    """The workers of equal specs and the jobs that wait for one of them.

    ``pinned`` counts the jobs in the queue that must run in one certain worker. ``target`` is how many
    workers should live; ``deaths`` counts those that died in a row without a job being done in between;
    ``given_up`` is set while the pool does not start workers any more; ``starved_since_s`` while it has
    jobs and no worker, for want of room; ``start_took_s`` is how long its last worker took to get ready;
    ``spares`` are wanted beyond the workers in service, from a job on until the pool has been idle for too
    long; ``worked_s`` is when a job last ended.
    """

    key: str
    max_workers: int
    startup_timeout_s: float
    idle_timeout_s: float | None
    max_jobs_per_life: int | None
    warm_spares: int = 0
    queue: deque[str] = field(default_factory=deque[str])
    pinned: int = 0
    workers: list[str] = field(default_factory=list[str])
    target: int = 0
    deaths: int = 0
    not_before_s: float = 0.0
    given_up: StartupError | None = None
    given_up_until_s: float = 0.0
    last_start_failure: str = ""
    same_start_failures: int = 0
    starved_since_s: float | None = None
    start_took_s: float = 0.0
    spares: int = 0
    worked_s: float = 0.0


@dataclass(frozen=True)
class WorkerInfo:
    """One worker, as ``Supervisor.workers()`` saw it. Sizes in bytes; ``pid`` is None before the spawn.

    ``state``: starting, idle, busy or stopping. ``engine`` is the one it runs, or the one its spec asks
    for while it starts. ``rss_bytes`` comes with its heartbeat. ``arena_bytes`` and ``gpu_arena_bytes``: what
    its arenas hold of main memory and of GPUs'.
    """

    id: str
    pid: int | None
    state: WorkerState
    engine: str
    host: str
    jobs_done: int
    rss_bytes: int
    arena_bytes: int
    gpu_arena_bytes: int
    job_id: str | None
    spec_key: str
