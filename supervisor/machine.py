"""The supervisor's decisions: one pure state machine, ``handle(stimulus, now) -> actions``.

Owns how each job ends, and what each stimulus means; its parts own which worker runs which job
(machine_schedule.py), how workers are ended (machine_ladder.py), when they are replaced or given up
(machine_restarts.py), over one set of tables (machine_tables.py). No I/O, no clock, no threads: time comes
in as an argument, orders go out as actions.

The rules, each held by tests/supervisor/test_machine.py:

1. Each accepted job is resolved exactly once: done, failed, cancelled or lost.
2. A worker runs one job at a time; a reply that does not match its running attempt is counted, ignored.
3. A job whose worker dies is lost, unless it asked for retries, or the worker had not begun it yet; three
   deaths poison it all the same.
4. Workers that die without a job count against the restart budget, with a doubling backoff; a
   completed job renews it. A pool over its budget is given up for a while and says so to its jobs.
5. A start that failed with a reason (a broken node module) fails the waiting jobs with that reason at
   once; the same reason twice gives the pool up.
6. At max_workers, a pool whose queue never runs dry hands a worker's place on, between two jobs, to a pool
   that has waited its turn without any.
7. A pool that is in use has its warm spares beyond the busy workers, or beyond one that waits for work, in
   the room that nobody needs for a job: they take jobs where others have gone, and never more run at a time
   than its max_workers.
8. Cancellation asks first; a worker that has not answered when the grace is over is ended by the ladder:
   ask, SIGTERM, SIGKILL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from legion_shm.errors import (
    DeadlineExceeded,
    JobCancelled,
    LegionError,
    UnsupportedValue,
    WorkerLost,
)
from legion_shm.events import TerminalState
from legion_shm.supervisor.machine_ladder import Ladder
from legion_shm.supervisor.machine_restarts import Restarts, cause_of, exit_at_start, quoted
from legion_shm.supervisor.machine_schedule import Schedule
from legion_shm.supervisor.machine_tables import Limits, Tables
from legion_shm.supervisor.state import JobRecord, PoolRecord, WorkerRecord
from legion_shm.supervisor.stimuli import (
    Action,
    CancelRequested,
    CloseRequested,
    HeartbeatSeen,
    Interrupt,
    JobReplied,
    JobSubmitted,
    PoolDefined,
    RemotesChanged,
    RetryNoted,
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


class Machine:
    """The state of all jobs and workers. Not thread-safe: one thread handles everything."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tables = tables = Tables()
        self.jobs, self.workers, self.pools = tables.jobs, tables.workers, tables.pools
        self.ignored_replies = 0
        self._ladder = Ladder(tables, limits)
        self._restarts = Restarts(tables, limits)
        self._schedule = Schedule(tables, limits, self._ladder)
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
            (RemotesChanged, self._remotes_changed),
            (Stalled, self._stalled),
            (Tick, self._tick),
        )

    def handle(self, stimulus: Stimulus, now: float) -> list[Action]:
        """Take note of what happened and say what is to be done, in order."""
        self._handlers[type(stimulus)](stimulus, now)
        return self._tables.take_orders()

    def next_deadline_s(self) -> float | None:
        """When `Tick` is due next, monotonic; None when nothing waits for time."""
        return min(self._deadlines(), default=None)

    def _deadlines(self) -> Iterable[float]:
        for worker in self.workers.values():
            yield from self._ladder.deadlines(worker)
        for job in self._tables.timed.values():
            if job.deadline_s is not None and job.end_error is None:
                yield job.deadline_s
        for pool in self.pools.values():
            if pool.not_before_s and (pool.queue or self._schedule.lacks_workers(pool)):
                yield pool.not_before_s

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
                warm_spares=event.warm_spares,
            ),
        )

    def _job_submitted(self, event: JobSubmitted, now: float) -> None:
        job = JobRecord(
            event.job, event.pool, now, event.deadline_s, event.retries, event.worker, event.limit_s
        )
        self.jobs[job.id] = job
        if job.deadline_s is not None:
            self._tables.timed[job.id] = job
        pool = self.pools[event.pool]
        if self._tables.closing:
            self._tables.resolve(
                job, "cancelled", JobCancelled(f"job {job.id}: the supervisor is closing", job_id=job.id)
            )
            return
        if pool.given_up is not None and now < pool.given_up_until_s and not self._tables.alive(pool):
            self._tables.resolve(
                job, "failed", self._restarts.remembered(pool.given_up, pool.given_up_until_s - now)
            )
            return
        if job.only_worker is not None and not self._has_worker(job):
            return
        pool.spares = pool.warm_spares
        pool.queue.append(job.id)
        pool.pinned += job.only_worker is not None
        self._schedule.pool(pool, now)

    def _has_worker(self, job: JobRecord) -> bool:
        """Whether the worker that a job must run in is there; else the job has ended."""
        worker = self.workers.get(job.only_worker or "")
        if worker is None or worker.state in ("stopping", "dead"):
            self._tables.resolve(job, "lost", _holder_lost(job))
            return False
        if worker.pool != job.pool:
            text = f"job {job.id}: an input is an object in worker {worker.id}, which is of another spec"
            error = UnsupportedValue(f"{text}; submit it with the spec of the job that gave the handle")
            self._tables.resolve(job, "failed", error)
            return False
        return True

    def _remotes_changed(self, event: RemotesChanged, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None:
            worker.remotes += event.change
            if not worker.remotes and worker.state == "idle":
                worker.since_s = now
                self._schedule.all_pools(None, now)  # it may be in somebody's place

    def _cancel_requested(self, event: CancelRequested, now: float) -> None:
        job = self.jobs.get(event.job)
        if job is not None:
            self._end_job(job, JobCancelled(f"job {job.id} was cancelled", job_id=job.id), now)

    def _end_job(self, job: JobRecord, error: LegionError, now: float) -> None:
        """Bring a job to its end before it is done: at once while queued, by interruption while it runs."""
        if job.state == "queued":
            pool = self.pools[job.pool]
            pool.queue.remove(job.id)
            pool.pinned -= job.only_worker is not None
            if not pool.queue:
                pool.starved_since_s = None
            self._tables.resolve(job, _ended_state(error), error)
        elif job.state == "running" and job.worker is not None:
            job.to("ending")
            job.end_error = error
            self.workers[job.worker].interrupt_until_s = now + self._limits.cancel_grace_s
            self._tables.order(Interrupt(job.worker, job.id))

    def _warm_up_requested(self, event: WarmUpRequested, now: float) -> None:
        pool = self.pools[event.pool]
        self._restarts.forgive(pool)
        pool.target = max(pool.target, min(event.workers, pool.max_workers))
        self._schedule.pool(pool, now)

    def _stop_requested(self, event: StopRequested, now: float) -> None:
        for pool in self.pools.values():
            if event.pool not in (None, pool.key):
                continue
            pool.target = pool.spares = 0
            self._restarts.forgive(pool)
            for worker in self._tables.alive(pool):
                worker.expected = True
                if worker.state != "busy":
                    worker.reason = "it was asked to stop"
                    self._ladder.ask_stop(worker, now)

    def _close_requested(self, event: CloseRequested, now: float) -> None:
        self._tables.closing = True
        for pool in self.pools.values():
            pool.target = pool.spares = 0
        for job in list(self.jobs.values()):
            error = JobCancelled(f"job {job.id} was cancelled: the supervisor closed", job_id=job.id)
            self._end_job(job, error, now)
        for worker in self.workers.values():
            worker.expected = True
            worker.reason = worker.reason or "the supervisor closed"
            self._ladder.ask_stop(worker, now)

    # --- what workers do --------------------------------------------------------------------------

    def _worker_ready(self, event: WorkerReady, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None or worker.state != "starting":
            return
        pool = self.pools[worker.pool]
        pool.start_took_s = now - worker.since_s
        self._to_idle(worker, now)
        pool.same_start_failures = 0
        self._schedule.all_pools(pool, now)

    def _start_failed(self, event: StartFailed, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None:
            worker.start_error = event.error
            if worker.stage == "none":
                self._ladder.ask_stop(worker, now)

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
        pool.worked_s = now
        worker.job = None
        worker.interrupt_until_s = None
        worker.last_seen_s = now
        worker.jobs_done += 1
        if job.end_error is not None:
            self._tables.resolve(job, _ended_state(job.end_error), job.end_error)
        else:
            self._tables.resolve(job, event.outcome, event.error)
            if event.outcome == "done":
                pool.deaths = 0
        if worker.state == "busy":
            self._to_idle(worker, now)
            used_up = pool.max_jobs_per_life is not None and worker.jobs_done >= pool.max_jobs_per_life
            if worker.expected or used_up:
                worker.expected = True
                self._ladder.ask_stop(worker, now)
        self._schedule.all_pools(pool, now)

    def _to_idle(self, worker: WorkerRecord, now: float) -> None:
        worker.to("idle")
        worker.since_s = now
        worker.last_seen_s = now

    def _worker_exited(self, event: WorkerExited, now: float) -> None:
        worker = self.workers.pop(event.worker, None)
        if worker is None:
            return
        if worker.state == "starting" and worker.start_error is None:
            worker.start_error = exit_at_start(worker.id, event)
        worker.to("dead")
        pool = self.pools[worker.pool]
        pool.workers.remove(worker.id)
        job = self.jobs.get(worker.job) if worker.job is not None else None
        if job is not None:
            pool.worked_s = now
            self._job_lost_its_worker(job, worker, event, now)
        elif not worker.expected or worker.start_error is not None:
            self._restarts.died_without_a_job(pool, worker, event, now)
        for waiting in [self.jobs[name] for name in pool.queue if pool.pinned]:
            if waiting.only_worker == worker.id:
                pool.queue.remove(waiting.id)
                pool.pinned -= 1
                self._tables.resolve(waiting, "lost", _holder_lost(waiting))
        if pool.given_up is not None and now < pool.given_up_until_s and not self._tables.alive(pool):
            self._restarts.fail_queue(pool, pool.given_up)
        self._schedule.all_pools(None, now)

    def _job_lost_its_worker(
        self, job: JobRecord, worker: WorkerRecord, event: WorkerExited, now: float
    ) -> None:
        if job.end_error is not None:
            self._tables.resolve(job, _ended_state(job.end_error), job.end_error)
            return
        job.deaths += 1
        job.not_begun += not event.begun
        reason = cause_of(worker, event)
        text = f"job {job.id}: worker {worker.id} was lost in attempt {job.attempt}: {reason}"
        again = job.attempt - job.not_begun <= job.retries and job.only_worker is None
        if again and job.deaths < POISON_DEATHS:
            job.to("queued")
            job.worker = None
            self.pools[job.pool].queue.appendleft(job.id)
            self._tables.order(RetryNoted(job.id, job.attempt, reason))
            return
        if job.deaths >= POISON_DEATHS:
            text += f"; it has cost {job.deaths} workers and is not tried again"
        self._tables.resolve(
            job,
            "lost",
            WorkerLost(
                text + quoted(event.log_tail),
                job_id=job.id,
                worker_id=worker.id,
                exit_code=event.exit_code,
                log_tail=event.log_tail,
            ),
        )

    # --- time -------------------------------------------------------------------------------------

    def _tick(self, event: Tick, now: float) -> None:
        for job in list(self._tables.timed.values()):
            if job.deadline_s is not None and now >= job.deadline_s and job.end_error is None:
                where = "while it waited" if job.state == "queued" else "while it ran"
                limit_s = job.deadline_s - job.submitted_s if job.limit_s is None else job.limit_s
                error = DeadlineExceeded(
                    f"job {job.id}: its deadline_s = {limit_s:.12g} passed {where}",
                    job_id=job.id,
                )
                self._end_job(job, error, now)
        for worker in list(self.workers.values()):
            self._ladder.judge(worker, now)
        for pool in self.pools.values():
            if pool.queue and pool.warm_spares and not self._tables.closing:
                self._schedule.hand_out(pool, self._tables.alive(pool))  # one may have made room for a spare
            if pool.not_before_s and now >= pool.not_before_s:
                pool.not_before_s = 0.0
                self._schedule.pool(pool, now)


def _holder_lost(job: JobRecord) -> WorkerLost:
    return WorkerLost(
        f"job {job.id}: worker {job.only_worker} has ended, and with it the object of a handle among the "
        "inputs; run the job that made it again",
        job_id=job.id,
        worker_id=job.only_worker,
    )


def _ended_state(error: LegionError) -> TerminalState:
    return "cancelled" if isinstance(error, JobCancelled) else "failed"
