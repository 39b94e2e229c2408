"""Workers that die without a job: how often they are replaced, how soon, and when a pool is given up.

Part of the machine: pure, time comes in as an argument. Rules 4 and 5 of machine.py are decided here.
"""

from __future__ import annotations

import copy

from legion_shm.errors import StartupError
from legion_shm.supervisor.machine_tables import Limits, Tables
from legion_shm.supervisor.state import PoolRecord, WorkerRecord
from legion_shm.supervisor.stimuli import WorkerExited

__all__ = ["Restarts", "cause_of", "exit_at_start", "quoted"]

SAME_START_FAILURES = 2


class Restarts:
    def __init__(self, tables: Tables, limits: Limits) -> None:
        self._tables, self._limits = tables, limits

    def died_without_a_job(
        self, pool: PoolRecord, worker: WorkerRecord, event: WorkerExited, now: float
    ) -> None:
        if worker.start_error is not None:
            worker.start_error.log_tail = worker.start_error.log_tail or event.log_tail
            self._start_was_refused(pool, worker, worker.start_error, now)
            return
        pool.deaths += 1
        if pool.deaths <= self._limits.restart_budget:
            self._back_off(pool, now)
            return
        error = StartupError(
            f"workers of this spec died {pool.deaths} times in a row (restart_budget = "
            f"{self._limits.restart_budget}); the last, {worker.id}: {cause_of(worker, event)}"
            f"{quoted(event.log_tail)}",
            worker_id=worker.id,
            exit_code=event.exit_code,
            log_tail=event.log_tail,
        )
        self.give_up(pool, error, now)

    def _back_off(self, pool: PoolRecord, now: float) -> None:
        backoff_s = self._limits.restart_backoff_s * 2.0 ** (pool.deaths - 1)
        pool.not_before_s = now + min(backoff_s, self._limits.restart_backoff_max_s)

    def _start_was_refused(
        self, pool: PoolRecord, worker: WorkerRecord, error: StartupError, now: float
    ) -> None:
        """The worker itself said why: it would say the same again, so nobody waits for a second try."""
        signature = f"{type(error).__name__}: {error.traceback or error}".replace(worker.id, "worker")
        pool.same_start_failures = pool.same_start_failures + 1 if signature == pool.last_start_failure else 1
        pool.last_start_failure = signature
        if pool.same_start_failures >= SAME_START_FAILURES:
            self.give_up(pool, error, now)
            return
        pool.target = len(self._tables.alive(pool))
        if not self._tables.alive(pool):
            self.fail_queue(pool, error)
            return
        pool.deaths += 1  # another worker may still serve the queue; more are tried ever more rarely
        if pool.deaths > self._limits.restart_budget:
            self.give_up(pool, error, now)
        else:
            self._back_off(pool, now)

    def give_up(self, pool: PoolRecord, error: StartupError, now: float) -> None:
        pool.given_up = error
        pool.given_up_until_s = now + self._limits.restart_reset_s
        pool.deaths = 0
        pool.same_start_failures = 0
        pool.target = len(self._tables.alive(pool))
        if not self._tables.alive(pool):
            self.fail_queue(pool, error)

    def forgive(self, pool: PoolRecord) -> None:
        """Somebody who asks for workers, or ends them, has reason to think that they will start now."""
        pool.given_up = None
        pool.deaths = 0
        pool.last_start_failure = ""
        pool.same_start_failures = 0

    def remembered(self, error: StartupError, left_s: float) -> StartupError:
        again = copy.copy(error)
        note = f"this spec was given up, and is tried again in {left_s:.0f} s (restart_reset_s)"
        again.args = (
            f"{error}\nNo worker was started: {note}, or at once after stop_workers() or warm_up()",
        )
        return again

    def fail_queue(self, pool: PoolRecord, error: StartupError) -> None:
        pool.pinned = 0
        while pool.queue:
            self._tables.resolve(self._tables.jobs[pool.queue.popleft()], "failed", copy.copy(error))


def cause_of(worker: WorkerRecord, event: WorkerExited) -> str:
    """Why a worker ended: our own reason where we ended it, else what its process says."""
    return worker.reason if worker.reason and worker.stage != "none" else event.cause


def exit_at_start(worker: str, event: WorkerExited) -> StartupError | None:
    """A process that ended by itself before it was ready would do so again; one that was killed may not."""
    if event.exit_code is None or event.exit_code < 0:
        return None
    hint = ""
    if any("ModuleNotFoundError" in line for line in event.log_tail):
        hint = " (its python_executable needs legion_shm installed, with what it depends on)"
    return StartupError(
        f"worker {worker} {event.cause} before it was ready{hint}{quoted(event.log_tail)}",
        worker_id=worker,
        exit_code=event.exit_code,
        log_tail=event.log_tail,
    )


def quoted(log_tail: tuple[str, ...]) -> str:
    if not log_tail:
        return ""
    return ". Its last lines:\n  " + "\n  ".join(_telling(log_tail))


def _telling(lines: tuple[str, ...]) -> tuple[str, ...]:
    """The last lines; of Python's report of a crash what broke, and where, without the other threads."""
    crash = next((at for at, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
    if crash is not None:
        for at in range(crash, len(lines)):
            if lines[at].startswith("Current thread"):
                return (*lines[max(crash - 5, 0) : crash + 1], *lines[at : at + 14])
    return lines[-20:]
