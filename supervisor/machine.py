"""The supervisor's decisions: one pure state machine, ``handle(stimulus, now) -> actions``.

Owns which worker runs which job, when workers are started, stopped, replaced or given up, and how each
job ends. No I/O, no clock, no threads: time comes in as an argument, orders go out as actions.

The rules, each held by tests/supervisor/test_machine.py:

1. Each accepted job is resolved exactly once: done, failed, cancelled or lost.
2. A worker runs one job at a time; a reply that does not match its running attempt is counted, ignored.
3. A job whose worker dies is lost, unless it asked for retries, or the worker had not begun it yet; three
   deaths poison it all the same.
4. Workers that die without a job count against the restart budget, with a doubling backoff; a
   completed job renews it. A pool over its budget is given up for a while and says so to its jobs.
5. A start that failed with a reason (a broken node module) fails the waiting jobs with that reason at
   once; the same reason twice gives the pool up.
6. Cancellation asks first; a worker that has not answered when the grace is over is ended by the ladder:
   ask, SIGTERM, SIGKILL.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from legion_shm.errors import (
    DeadlineExceeded,
    JobCancelled,
    LegionError,
    StartupError,
    StartupTimeout,
    WorkerLost,
)
from legion_shm.events import TerminalState
from legion_shm.ids import new_worker_id
from legion_shm.supervisor.state import JobRecord, PoolRecord, WorkerRecord
from legion_shm.supervisor.stimuli import (
    Action,
    AskStop,
    CancelRequested,
    CloseRequested,
    HeartbeatSeen,
    Interrupt,
    JobReplied,
    JobSubmitted,
    PoolDefined,
    ResolveJob,
    RetryNoted,
    SendJob,
    SignalWorker,
    SpawnWorker,
    Stalled,
    StartFailed,
    Stimulus,
    StopRequested,
    Tick,
    WarmUpRequested,
    WorkerExited,
    WorkerReady,
)

__all__ = ["Limits", "Machine"]

POISON_DEATHS = 3
SAME_START_FAILURES = 2


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


class Machine:
    """The state of all jobs and workers. Not thread-safe: one thread handles everything."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.jobs: dict[str, JobRecord] = {}
        self.workers: dict[str, WorkerRecord] = {}
        self.pools: dict[str, PoolRecord] = {}
        self.ignored_replies = 0
        self.closing = False
        self._timed: dict[str, JobRecord] = {}  # those with a deadline: a long queue must not cost time
        self._numbers = 0
        self._actions: list[Action] = []
        self._handlers: dict[type, Callable[[Stimulus, float], None]] = {}
        for kind, handler in self._table():
            self._handlers[kind] = handler

    def _table(self) -> Iterable[tuple[type, Callable[..., None]]]:
        return (
            (PoolDefined, self._pool_defined),
            (JobSubmitted, self._job_submitted),
            (CancelRequested, self._cancel_requested),
            (WarmUpRequested, self._warm_up_requested),
            (StopRequested, self._stop_requested),
            (CloseRequested, self._close_requested),
            (WorkerReady, self._worker_ready),
            (StartFailed, self._start_failed),
            (HeartbeatSeen, self._heartbeat_seen),
            (JobReplied, self._job_replied),
            (WorkerExited, self._worker_exited),
            (Stalled, self._stalled),
            (Tick, self._tick),
        )

    def handle(self, stimulus: Stimulus, now: float) -> list[Action]:
        """Take note of what happened and say what is to be done, in order."""
        self._handlers[type(stimulus)](stimulus, now)
        actions, self._actions = self._actions, []
        return actions

    def next_deadline_s(self) -> float | None:
        """When `Tick` is due next, monotonic; None when nothing waits for time."""
        return min(self._deadlines(), default=None)

    def _deadlines(self) -> Iterable[float]:
        for worker in self.workers.values():
            yield from self._worker_deadlines(worker)
        for job in self._timed.values():
            if job.deadline_s is not None and job.end_error is None:
                yield job.deadline_s
        for pool in self.pools.values():
            if pool.not_before_s and (pool.queue or len(self._alive(pool)) < pool.target):
                yield pool.not_before_s

    def _worker_deadlines(self, worker: WorkerRecord) -> Iterable[float]:
        pool = self.pools[worker.pool]
        if worker.stage_until_s is not None:
            yield worker.stage_until_s
        if worker.interrupt_until_s is not None and worker.stage == "none":
            yield worker.interrupt_until_s  # a worker on the ladder is past this
        if worker.state == "starting":
            yield worker.since_s + pool.startup_timeout_s
        elif worker.stage == "none":
            yield worker.last_seen_s + self._limits.heartbeat_timeout_s
        if worker.state == "idle" and pool.idle_timeout_s is not None:
            yield worker.since_s + pool.idle_timeout_s

    # --- what callers ask for ---------------------------------------------------------------------

    def _pool_defined(self, event: PoolDefined, now: float) -> None:
        self.pools.setdefault(
            event.pool,
            PoolRecord(
                key=event.pool,
                max_workers=event.max_workers,
                startup_timeout_s=event.startup_timeout_s,
                idle_timeout_s=event.idle_timeout_s,
                max_jobs_per_life=event.max_jobs_per_life,
            ),
        )

    def _job_submitted(self, event: JobSubmitted, now: float) -> None:
        job = JobRecord(event.job, event.pool, now, event.deadline_s, event.retries)
        self.jobs[job.id] = job
        if job.deadline_s is not None:
            self._timed[job.id] = job
        pool = self.pools[event.pool]
        if self.closing:
            self._resolve(
                job, "cancelled", JobCancelled(f"job {job.id}: the supervisor is closing", job_id=job.id)
            )
            return
        if pool.given_up is not None and now < pool.given_up_until_s and not self._alive(pool):
            self._resolve(job, "failed", self._remembered(pool.given_up, pool.given_up_until_s - now))
            return
        pool.queue.append(job.id)
        self._schedule(pool, now)

    def _cancel_requested(self, event: CancelRequested, now: float) -> None:
        job = self.jobs.get(event.job)
        if job is not None:
            self._end_job(job, JobCancelled(f"job {job.id} was cancelled", job_id=job.id), now)

    def _end_job(self, job: JobRecord, error: LegionError, now: float) -> None:
        """Bring a job to its end before it is done: at once while queued, by interruption while it runs."""
        if job.state == "queued":
            self.pools[job.pool].queue.remove(job.id)
            self._resolve(job, _ended_state(error), error)
        elif job.state == "running" and job.worker is not None:
            job.to("ending")
            job.end_error = error
            self.workers[job.worker].interrupt_until_s = now + self._limits.cancel_grace_s
            self._actions.append(Interrupt(job.worker, job.id))

    def _warm_up_requested(self, event: WarmUpRequested, now: float) -> None:
        pool = self.pools[event.pool]
        self._forgive(pool)
        pool.target = max(pool.target, min(event.workers, pool.max_workers))
        self._schedule(pool, now)

    def _stop_requested(self, event: StopRequested, now: float) -> None:
        for pool in self.pools.values():
            if event.pool not in (None, pool.key):
                continue
            pool.target = 0
            self._forgive(pool)
            for worker in self._alive(pool):
                worker.expected = True
                if worker.state != "busy":
                    worker.reason = "it was asked to stop"
                    self._ask_stop(worker, now)

    def _close_requested(self, event: CloseRequested, now: float) -> None:
        self.closing = True
        for pool in self.pools.values():
            pool.target = 0
        for job in list(self.jobs.values()):
            error = JobCancelled(f"job {job.id} was cancelled: the supervisor closed", job_id=job.id)
            self._end_job(job, error, now)
        for worker in self.workers.values():
            worker.expected = True
            worker.reason = worker.reason or "the supervisor closed"
            self._ask_stop(worker, now)

    # --- what workers do --------------------------------------------------------------------------

    def _worker_ready(self, event: WorkerReady, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None or worker.state != "starting":
            return
        self._to_idle(worker, now)
        pool = self.pools[worker.pool]
        pool.same_start_failures = 0
        self._schedule_all(pool, now)

    def _start_failed(self, event: StartFailed, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None:
            worker.start_error = event.error
            if worker.stage == "none":
                self._ask_stop(worker, now)

    def _heartbeat_seen(self, event: HeartbeatSeen, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None:
            worker.last_seen_s = now

    def _stalled(self, event: Stalled, now: float) -> None:
        for worker in self.workers.values():
            worker.last_seen_s = now

    def _job_replied(self, event: JobReplied, now: float) -> None:
        worker = self.workers.get(event.worker)
        job = self.jobs.get(event.job)
        if worker is None or job is None or worker.job != job.id or job.attempt != event.attempt:
            self.ignored_replies += 1
            return
        pool = self.pools[job.pool]
        worker.job = None
        worker.interrupt_until_s = None
        worker.last_seen_s = now
        worker.jobs_done += 1
        if job.end_error is not None:
            self._resolve(job, _ended_state(job.end_error), job.end_error)
        else:
            self._resolve(job, event.outcome, event.error)
            if event.outcome == "done":
                pool.deaths = 0
        if worker.state == "busy":
            self._to_idle(worker, now)
            used_up = pool.max_jobs_per_life is not None and worker.jobs_done >= pool.max_jobs_per_life
            if worker.expected or used_up:
                worker.expected = True
                self._ask_stop(worker, now)
        self._schedule_all(pool, now)

    def _to_idle(self, worker: WorkerRecord, now: float) -> None:
        worker.to("idle")
        worker.since_s = now
        worker.last_seen_s = now

    def _worker_exited(self, event: WorkerExited, now: float) -> None:
        worker = self.workers.pop(event.worker, None)
        if worker is None:
            return
        if worker.state == "starting" and worker.start_error is None:
            worker.start_error = _exit_at_start(worker.id, event)
        worker.to("dead")
        pool = self.pools[worker.pool]
        pool.workers.remove(worker.id)
        job = self.jobs.get(worker.job) if worker.job is not None else None
        if job is not None:
            self._job_lost_its_worker(job, worker, event, now)
        elif not worker.expected or worker.start_error is not None:
            self._died_without_a_job(pool, worker, event, now)
        if pool.given_up is not None and now < pool.given_up_until_s and not self._alive(pool):
            self._fail_queue(pool, pool.given_up)
        self._schedule_all(None, now)

    def _job_lost_its_worker(
        self, job: JobRecord, worker: WorkerRecord, event: WorkerExited, now: float
    ) -> None:
        if job.end_error is not None:
            self._resolve(job, _ended_state(job.end_error), job.end_error)
            return
        job.deaths += 1
        job.not_begun += not event.begun
        reason = _cause(worker, event)
        text = f"job {job.id}: worker {worker.id} was lost in attempt {job.attempt}: {reason}"
        if job.attempt - job.not_begun <= job.retries and job.deaths < POISON_DEATHS:
            job.to("queued")
            job.worker = None
            self.pools[job.pool].queue.appendleft(job.id)
            self._actions.append(RetryNoted(job.id, job.attempt, reason))
            return
        if job.deaths >= POISON_DEATHS:
            text += f"; it has cost {job.deaths} workers and is not tried again"
        self._resolve(
            job,
            "lost",
            WorkerLost(
                text + _quoted(event.log_tail),
                job_id=job.id,
                worker_id=worker.id,
                exit_code=event.exit_code,
                log_tail=event.log_tail,
            ),
        )

    def _died_without_a_job(
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
            f"{self._limits.restart_budget}); the last, {worker.id}: {_cause(worker, event)}"
            f"{_quoted(event.log_tail)}",
            worker_id=worker.id,
            exit_code=event.exit_code,
            log_tail=event.log_tail,
        )
        self._give_up(pool, error, now)

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
            self._give_up(pool, error, now)
            return
        pool.target = len(self._alive(pool))
        if not self._alive(pool):
            self._fail_queue(pool, error)
            return
        pool.deaths += 1  # another worker may still serve the queue; more are tried ever more rarely
        if pool.deaths > self._limits.restart_budget:
            self._give_up(pool, error, now)
        else:
            self._back_off(pool, now)

    def _give_up(self, pool: PoolRecord, error: StartupError, now: float) -> None:
        pool.given_up = error
        pool.given_up_until_s = now + self._limits.restart_reset_s
        pool.deaths = 0
        pool.same_start_failures = 0
        pool.target = len(self._alive(pool))
        if not self._alive(pool):
            self._fail_queue(pool, error)

    def _forgive(self, pool: PoolRecord) -> None:
        """Somebody who asks for workers, or ends them, has reason to think that they will start now."""
        pool.given_up = None
        pool.deaths = 0
        pool.last_start_failure = ""
        pool.same_start_failures = 0

    def _remembered(self, error: StartupError, left_s: float) -> StartupError:
        again = copy.copy(error)
        note = f"this spec was given up, and is tried again in {left_s:.0f} s (restart_reset_s)"
        again.args = (
            f"{error}\nNo worker was started: {note}, or at once after stop_workers() or warm_up()",
        )
        return again

    def _fail_queue(self, pool: PoolRecord, error: StartupError) -> None:
        while pool.queue:
            self._resolve(self.jobs[pool.queue.popleft()], "failed", copy.copy(error))

    # --- time -------------------------------------------------------------------------------------

    def _tick(self, event: Tick, now: float) -> None:
        for job in list(self._timed.values()):
            if job.deadline_s is not None and now >= job.deadline_s and job.end_error is None:
                where = "while it waited" if job.state == "queued" else "while it ran"
                error = DeadlineExceeded(
                    f"job {job.id}: its deadline_s = {job.deadline_s - job.submitted_s:.3g} passed {where}",
                    job_id=job.id,
                )
                self._end_job(job, error, now)
        for worker in list(self.workers.values()):
            self._judge(worker, now)
        for pool in self.pools.values():
            if pool.not_before_s and now >= pool.not_before_s:
                pool.not_before_s = 0.0
                self._schedule(pool, now)

    def _judge(self, worker: WorkerRecord, now: float) -> None:
        pool = self.pools[worker.pool]
        if worker.stage_until_s is not None and now >= worker.stage_until_s:
            self._climb(worker, now)
            return
        if worker.stage != "none":
            return
        if worker.interrupt_until_s is not None and now >= worker.interrupt_until_s:
            worker.interrupt_until_s = None
            worker.expected = True
            worker.reason = "its job did not end within cancel_grace_s of being cancelled"
            worker.to("stopping")
            self._signal(worker, "SIGTERM", now)
        elif worker.state == "starting" and now >= worker.since_s + pool.startup_timeout_s:
            worker.start_error = StartupTimeout(
                f"worker {worker.id} was not ready within startup_timeout_s = {pool.startup_timeout_s:g}; "
                "raise that setting of its WorkerSpec if it only needs longer",
                worker_id=worker.id,
            )
            worker.to("stopping")
            self._signal(worker, "SIGTERM", now)
        elif (
            worker.state in ("idle", "busy") and now >= worker.last_seen_s + self._limits.heartbeat_timeout_s
        ):
            timeout_s = self._limits.heartbeat_timeout_s
            worker.reason = f"it hung: no heartbeat for heartbeat_timeout_s = {timeout_s:g}, and was ended"
            worker.to("stopping")
            self._signal(worker, "SIGKILL", now)  # a stopped process does not take SIGTERM
        elif (
            worker.state == "idle"
            and pool.idle_timeout_s is not None
            and now >= worker.since_s + pool.idle_timeout_s
        ):
            worker.expected = True
            worker.reason = "it was idle for idle_timeout_s"
            pool.target = max(0, pool.target - 1)
            self._ask_stop(worker, now)

    # --- the ladder -------------------------------------------------------------------------------

    def _ask_stop(self, worker: WorkerRecord, now: float) -> None:
        if worker.stage != "none":
            return
        if worker.state != "stopping":
            worker.to("stopping")
        worker.stage = "asked"
        worker.stage_until_s = now + self._limits.stop_grace_s
        self._actions.append(AskStop(worker.id))

    def _climb(self, worker: WorkerRecord, now: float) -> None:
        self._signal(worker, "SIGKILL" if worker.stage in ("terminated", "killed") else "SIGTERM", now)

    def _signal(self, worker: WorkerRecord, signal: str, now: float) -> None:
        if signal == "SIGTERM":
            worker.stage = "terminated"
            worker.stage_until_s = now + self._limits.term_grace_s
            self._actions.append(SignalWorker(worker.id, "SIGTERM"))
        else:
            worker.stage = "killed"
            worker.stage_until_s = now + 1.0  # again, should the first have met a process about to exec
            self._actions.append(SignalWorker(worker.id, "SIGKILL"))

    # --- scheduling -------------------------------------------------------------------------------

    def _alive(self, pool: PoolRecord) -> list[WorkerRecord]:
        workers = (self.workers[worker] for worker in pool.workers)
        return [worker for worker in workers if worker.state != "stopping"]

    def _schedule_all(self, first: PoolRecord | None, now: float) -> None:
        """After a worker became free, for its own pool first, or went: for whoever has waited longest."""
        if first is not None:
            self._schedule(first, now)
        waiting = [pool for pool in self.pools.values() if pool.queue]
        for pool in sorted(waiting, key=lambda pool: self.jobs[pool.queue[0]].submitted_s):
            self._schedule(pool, now)
        for pool in self.pools.values():
            if not pool.queue and len(self._alive(pool)) < pool.target:
                self._schedule(pool, now)

    def _schedule(self, pool: PoolRecord, now: float) -> None:
        if self.closing:
            return
        alive = self._alive(pool)
        for worker in alive:
            if not pool.queue:
                break
            if worker.state == "idle":
                self._send(worker, self.jobs[pool.queue.popleft()])
        starting = sum(1 for worker in alive if worker.state == "starting")
        wanted = min(pool.max_workers, max(pool.target, len(alive) + max(0, len(pool.queue) - starting)))
        if pool.given_up is not None:
            if now < pool.given_up_until_s:
                return
            pool.given_up = None
        while len(alive) < wanted and now >= pool.not_before_s:
            if len(self.workers) >= self._limits.max_workers and not self._evict_for(pool, now):
                break
            if len(self.workers) >= self._limits.max_workers:
                break
            self._numbers += 1
            worker = WorkerRecord(new_worker_id(self._numbers), pool.key, since_s=now, last_seen_s=now)
            self.workers[worker.id] = worker
            pool.workers.append(worker.id)
            alive.append(worker)
            self._actions.append(SpawnWorker(worker.id, pool.key))
        pool.target = max(pool.target, sum(1 for worker in alive if not worker.expected))

    def _evict_for(self, pool: PoolRecord, now: float) -> bool:
        """Make room by stopping the longest idle worker of a pool that has no work."""
        if any(w.state == "stopping" for w in self.workers.values()):
            return True
        idle = [
            w
            for w in self.workers.values()
            if w.state == "idle" and w.pool != pool.key and not self.pools[w.pool].queue
        ]
        if not idle or not pool.queue:
            return False
        victim = min(idle, key=lambda w: w.since_s)
        victim.expected = True
        victim.reason = "it made room for a worker of another spec"
        other = self.pools[victim.pool]
        other.target = max(0, other.target - 1)
        self._ask_stop(victim, now)
        return True

    def _send(self, worker: WorkerRecord, job: JobRecord) -> None:
        worker.to("busy")
        worker.job = job.id
        job.to("running")
        job.worker = worker.id
        job.attempt += 1
        self._actions.append(SendJob(worker.id, job.id, job.attempt))

    def _resolve(self, job: JobRecord, state: TerminalState, error: LegionError | None) -> None:
        job.to(state)
        del self.jobs[job.id]
        self._timed.pop(job.id, None)
        self._actions.append(ResolveJob(job.id, state, error))


def _ended_state(error: LegionError) -> TerminalState:
    return "cancelled" if isinstance(error, JobCancelled) else "failed"


def _cause(worker: WorkerRecord, event: WorkerExited) -> str:
    """Why a worker ended: our own reason where we ended it, else what its process says."""
    return worker.reason if worker.reason and worker.stage != "none" else event.cause


def _exit_at_start(worker: str, event: WorkerExited) -> StartupError | None:
    """A process that ended by itself before it was ready would do so again; one that was killed may not."""
    if event.exit_code is None or event.exit_code < 0:
        return None
    hint = ""
    if any("ModuleNotFoundError" in line for line in event.log_tail):
        hint = " (its python_executable needs legion_shm installed, with what it depends on)"
    return StartupError(
        f"worker {worker} {event.cause} before it was ready{hint}{_quoted(event.log_tail)}",
        worker_id=worker,
        exit_code=event.exit_code,
        log_tail=event.log_tail,
    )


def _quoted(log_tail: tuple[str, ...]) -> str:
    if not log_tail:
        return ""
    return ". Its last lines:\n  " + "\n  ".join(log_tail[-20:])
