"""Carrying out what the machine orders: a job sent, resolved or tried again, a worker started, asked, ended.

Owns nothing but the translation of actions into messages, signals, processes and events. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from legion_shm import faults
from legion_shm.config import WorkerSpec
from legion_shm.errors import MessageTooLarge, StartupError
from legion_shm.events import JobRetrying, JobStarted
from legion_shm.supervisor.lending import Lending
from legion_shm.supervisor.processes import Processes
from legion_shm.supervisor.stimuli import (
    Action,
    AskStop,
    Interrupt,
    JobReplied,
    ResolveJob,
    RetryNoted,
    SendJob,
    SignalWorker,
    SpawnWorker,
    Stimulus,
)
from legion_shm.supervisor.submission import Submission
from legion_shm.supervisor.worker_io import WorkerIO
from legion_shm.transport.messages import BlocksFreed, Cancel, RunJob, Stop
from legion_shm.transport.segment import SegmentKind

__all__ = ["Orders"]


def _job_started(worker: str, engine: str, attempt: int, job: str, seq: int, time_s: float) -> JobStarted:
    return JobStarted(job, seq, time_s, worker, engine, attempt)


class Orders:
    """Used by the loop's thread alone. ``specs`` and ``submissions`` are the loop's own tables.

    ``resolved`` counts the jobs that have ended.
    """

    def __init__(
        self,
        *,
        kind: SegmentKind,
        processes: Processes,
        lending: Lending,
        specs: dict[str, WorkerSpec],
        submissions: dict[str, Submission],
        handle: Callable[[Stimulus, float], None],
        spawn_failed: Callable[[WorkerIO, StartupError, float], None],
        spawn_withdrawn: Callable[[WorkerIO, float], None],
    ) -> None:
        self._kind: SegmentKind = kind
        self._processes, self._lending = processes, lending
        self._specs, self._submissions = specs, submissions
        self._handle = handle
        self._spawn_failed, self._spawn_withdrawn = spawn_failed, spawn_withdrawn
        self.resolved = 0

    def carry_out(self, action: Action, now: float) -> None:
        if isinstance(action, SendJob):
            self._send_job(action, now)
        elif isinstance(action, ResolveJob):
            self._resolve(action, now)
        elif isinstance(action, SpawnWorker):
            spec = self._specs[action.pool]
            self._processes.spawn(action.worker, spec, self._kind, self._spawn_failed, self._spawn_withdrawn)
        elif isinstance(action, Interrupt):
            self._processes.send(self._processes[action.worker], Cancel(action.job), control=True)
        elif isinstance(action, AskStop):
            self._ask_stop(self._processes[action.worker])
        elif isinstance(action, SignalWorker):
            self._processes[action.worker].signal(action.signal)
        else:
            self._note_retry(action, now)

    def _send_job(self, action: SendJob, now: float) -> None:
        submission = self._submissions[action.job]
        worker = self._processes[action.worker]
        submission.times.sent_s = now
        freed = self._lending.lend(worker, submission.packed)
        message = RunJob(
            action.job,
            action.attempt,
            submission.workflow,
            submission.digest,
            submission.packed.values,
            freed,
            submission.options.allow_cpu,
            submission.options.remote,
        )
        error: MessageTooLarge | None = None
        try:
            self._processes.send(worker, message)
            if faults.hit is not None:
                faults.hit("orders.after_send_job")
        except MessageTooLarge as too_large:
            error = too_large
        # Told when it is on its way: its answer is read by this thread, later.
        submission.feed.begin(_job_started, (worker.id, worker.engine, action.attempt), now)
        if error is not None:
            self._processes.send(worker, BlocksFreed(freed))
            self._lending.not_lent(worker, submission.packed)
            self._handle(JobReplied(worker.id, action.job, action.attempt, "failed", error), now)

    def _resolve(self, action: ResolveJob, now: float) -> None:
        self.resolved += 1
        submission = self._submissions.pop(action.job)
        # A delivery that is not handed out is dropped here, and its finalizer gives the leases back.
        delivery = submission.delivery if action.state == "done" else None
        submission.delivery = None
        self._lending.end_job(action.job)
        submission.feed.resolve(action.state, action.error, delivery, now)

    def _note_retry(self, action: RetryNoted, now: float) -> None:
        feed = self._submissions[action.job].feed
        feed.set_running(False)
        feed.emit(lambda j, seq, at: JobRetrying(j, seq, at, action.attempt, action.reason), now=now)

    def _ask_stop(self, worker: WorkerIO) -> None:
        if worker.ready:
            self._processes.send(worker, Stop())
        else:
            worker.signal("SIGTERM")  # it reads no message before it is ready
