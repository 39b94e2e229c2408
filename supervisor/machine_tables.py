"""What the supervisor knows of its jobs, workers and pools, and the orders that come out of it.

Owns the tables that the machine's parts share, and the one way in which a job ends. It decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from legion_shm.errors import LegionError
from legion_shm.events import TerminalState
from legion_shm.supervisor.state import JobRecord, PoolRecord, WorkerRecord
from legion_shm.supervisor.stimuli import Action, ResolveJob

__all__ = ["Limits", "Tables"]


@dataclass(frozen=True)
class Limits:
    """The settings that the machine decides by; see SupervisorSettings. Seconds."""

    max_workers: int
    heartbeat_timeout_s: float
    cancel_grace_s: float
    stop_grace_s: float
    term_grace_s: float
    restart_budget: int
    restart_backoff_s: float
    restart_backoff_max_s: float
    restart_reset_s: float


class Tables:
    """Not thread-safe: one thread handles everything."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobRecord] = {}
        self.workers: dict[str, WorkerRecord] = {}
        self.pools: dict[str, PoolRecord] = {}
        self.timed: dict[str, JobRecord] = {}  # those with a deadline: a long queue must not cost time
        self.closing = False
        self._orders: list[Action] = []

    def order(self, action: Action) -> None:
        self._orders.append(action)

    def take_orders(self) -> list[Action]:
        """What was ordered since the last call."""
        orders, self._orders = self._orders, []
        return orders

    def alive(self, pool: PoolRecord) -> list[WorkerRecord]:
        """The workers of a pool that are not on their way out."""
        workers = self.workers
        return [worker for name in pool.workers if (worker := workers[name]).state != "stopping"]

    def aim_lower(self, pool: PoolRecord) -> None:
        """Before a worker is ended that need not be replaced. A spare is none of the target."""
        if len(self.alive(pool)) <= pool.target:
            pool.target = max(0, pool.target - 1)

    def idle(self, pool: PoolRecord) -> int:
        return sum(1 for worker in pool.workers if self.workers[worker].state == "idle")

    def works(self, pool: PoolRecord) -> bool:
        """Whether a pool runs jobs, or has some to run."""
        return bool(pool.queue) or any(self.workers[worker].state == "busy" for worker in pool.workers)

    def resolve(self, job: JobRecord, state: TerminalState, error: LegionError | None) -> None:
        """End a job, for good."""
        job.to(state)
        del self.jobs[job.id]
        self.timed.pop(job.id, None)
        self.order(ResolveJob(job.id, state, error))
