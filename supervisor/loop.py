"""The supervisor's one I/O thread: it waits, turns what happens into stimuli, and carries out the actions.

Owns the thread and the accepted jobs. It decides nothing (machine.py does) and leaves the details to others:
commands.py, orders.py, processes.py, lending.py, inbox.py.

    callers ──── commands ────▶ ┌────────┐ ──── stimuli ────▶ machine
    workers ──── messages ────▶ │  loop  │ ◀──── actions ────
    kernel ─ exits, output, time ▶└────────┘ ──── events, resolutions ────▶ jobs

What takes long, starting a process or making a segment, runs on two helper threads, and comes back as a
command. Ended leases are read before the commands and applied after them, so that a lease that a command
takes is never missed because the value it came from was dropped right after the call.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import weakref
from functools import partial

from legion_shm import faults
from legion_shm.clock import monotonic_s
from legion_shm.config import SupervisorSettings, WorkerSpec
from legion_shm.errors import JobCancelled, StartupError, WorkerLost
from legion_shm.events import LogEvent
from legion_shm.helper_threads import HelperThreads
from legion_shm.supervisor.commands import Command, Commands
from legion_shm.supervisor.freeing import FreedMemory, Freeing
from legion_shm.supervisor.inbox import Inbox
from legion_shm.supervisor.lending import Lending
from legion_shm.supervisor.machine import Limits, Machine
from legion_shm.supervisor.master_memory import MasterMemory
from legion_shm.supervisor.orders import Orders
from legion_shm.supervisor.processes import Processes
from legion_shm.supervisor.spawned import SpawnedWorker
from legion_shm.supervisor.state import WorkerInfo
from legion_shm.supervisor.stimuli import (
    CloseRequested,
    JobSubmitted,
    PoolDefined,
    RemotesChanged,
    Stalled,
    StartFailed,
    Stimulus,
    Tick,
    WorkerExited,
)
from legion_shm.supervisor.submission import Submission
from legion_shm.supervisor.worker_io import WorkerIO, describe_exit
from legion_shm.transport.channel import ServerChannel
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.messages import Free, RemotesDropped
from legion_shm.transport.runtime_dir import RuntimeDir
from legion_shm.transport.segment import SegmentKind

__all__ = ["Loop"]

_log = logging.getLogger("legion_shm.supervisor")

_MAX_WAIT_S = 10.0  # the loop looks around this often even when nothing is due
_PUT_OFF_S = 0.001  # once a job has ended its caller needs the interpreter more than the loop does
_LAST_WORDS_S = 0.03  # frames that a dead worker had sent may still be in ZeroMQ's hands
_LAST_WORDS_MAX_S = 0.5  # however many frames it left
_HELPERS = 2
_SLICE_S = 0.1  # a caller that waits for the loop's answer looks this often whether the loop has ended


class Loop:
    """Runs in a thread of its own from `start` until `request_close` has ended every worker."""

    def __init__(
        self,
        settings: SupervisorSettings,
        channel: ServerChannel,
        directory: RuntimeDir,
        *,
        segments: SegmentKind,
    ) -> None:
        self._settings, self._channel, self._directory = settings, channel, directory
        self._commands = Commands(_too_late)
        channel.watch(self._commands.wake_fd)
        self._helpers = HelperThreads(_HELPERS, thread_name_prefix="legion-helper")
        self._machine = Machine(_limits(settings))
        self._specs: dict[str, WorkerSpec] = {}
        self._submissions: dict[str, Submission] = {}
        self._processes = Processes(settings, channel, self._helpers, self.post, self._adopted)
        self.memory = MasterMemory(
            kind=segments,
            name_prefix=directory.segment_prefix,
            inline_max_bytes=settings.inline_max_bytes,
            quota_bytes=settings.arena_quota_bytes,
            gpu_quota_bytes=settings.gpu_arena_quota_bytes,
            full_wait_s=settings.arena_wait_s,
            segment_added=self._own_segment_added,
            segments_retired=self._own_segments_retired,
            resident=self._resident,
            remotes_dropped=self._remotes_dropped,
        )
        self._lending = Lending(settings, self.memory, self._processes, self._helpers, self.post)
        self._inbox = Inbox(
            max_bytes=settings.max_message_bytes,
            channel=channel,
            processes=self._processes,
            lending=self._lending,
            memory=self.memory,
            machine=self._machine,
            submissions=self._submissions,
            handle=self._handle,
            freed=self._freed,
        )
        self._orders = Orders(
            kind=segments,
            processes=self._processes,
            lending=self._lending,
            specs=self._specs,
            submissions=self._submissions,
            handle=self._handle,
            spawn_failed=self._spawn_failed,
            spawn_withdrawn=self._spawn_withdrawn,
        )
        self._freeings: weakref.WeakSet[Freeing] = weakref.WeakSet()
        self._closing = self._put_off = False
        self._tick_s: float | None = None  # when the machine wanted its next tick, a turn ago at most
        self._ended = threading.Event()
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="legion-loop", daemon=True)

    # --- for other threads ------------------------------------------------------------------------

    def start(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:
            raise StartupError(
                f"the supervisor's thread could not be started: {error}; this process is at a limit of "
                "threads or memory (ulimit -u, ulimit -v)"
            ) from error

    def abandon(self) -> None:
        """Give back what a loop that was never started holds; the channel is its maker's."""
        self._helpers.shutdown()
        self._channel.unwatch(self._commands.wake_fd)
        self._commands.end()
        self._commands.close()
        self.memory.close()

    def post(self, command: Command) -> None:
        """Have the loop call ``command(now)`` soon, after everything posted before. Never blocks."""
        self._commands.post(command)

    @property
    def fault(self) -> BaseException | None:
        """What broke the loop itself, if anything ever does."""
        return self._fault

    def on_loop(self) -> bool:
        return threading.current_thread() is self._thread

    def join(self, timeout_s: float) -> bool:
        """Whether the loop has ended within that time."""
        self._thread.join(min(timeout_s, threading.TIMEOUT_MAX))
        return not self._thread.is_alive()

    def define(self, pool: str, spec: WorkerSpec) -> None:
        self.post(partial(self._define, pool, spec))

    def submit(self, submission: Submission) -> None:
        self.post(partial(self._accept, submission))

    def stimulate(self, stimulus: Stimulus) -> None:
        self.post(lambda now: self._handle(stimulus, now))

    def free(self, pool: str | None) -> Freeing:
        """Have every worker that is ready (of one pool) drop what it keeps."""
        freeing = Freeing()
        self.post(lambda now: self._free(freeing, pool))
        return freeing

    def request_close(self) -> None:
        """Cancel what is there, end the workers by the stop ladder, then end the loop."""
        self.post(self._close)

    def snapshot(self, timeout_s: float) -> tuple[WorkerInfo, ...]:
        """The workers as the loop knows them now. Raises TimeoutError if it does not answer."""
        done = threading.Event()
        box: list[tuple[WorkerInfo, ...]] = []

        def look(now: float) -> None:
            box.append(self._worker_infos())
            done.set()

        self.post(look)
        deadline_s = monotonic_s() + timeout_s
        while not done.wait(_SLICE_S) and not self._ended.is_set():
            if monotonic_s() >= deadline_s:
                raise TimeoutError(f"the supervisor's loop did not answer within {timeout_s:g} s")
        return box[0] if box else ()

    def _own_segment_added(self, arena: int, segment: int, nbytes: int) -> None:
        self.post(lambda now: self._lending.own_segment_added(segment, nbytes))

    def _own_segments_retired(self, arena: int, segments: tuple[int, ...]) -> None:
        self.post(lambda now: self._lending.own_segments_retired(segments))

    def _resident(self, handle: BlockHandle) -> None:
        self._commands.leave(lambda now: self._lending.resident(handle))  # a job that needs it comes after

    def _remotes_dropped(self, worker: str, numbers: tuple[int, ...]) -> None:
        self.post(partial(self._drop_remotes, worker, numbers))

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not (self._closing and not len(self._processes) and not self._submissions):
                self._turn()
        except BaseException as error:
            self._fault = error
            _log.exception("the supervisor's loop failed; its workers are ended and its jobs are lost")
            self._abandon(error)
        finally:
            self._end()

    def _turn(self) -> None:
        now = monotonic_s()
        due_s = now + _PUT_OFF_S if self._put_off else self._due_s(now)
        resolved = self._orders.resolved
        frames, fds = self._channel.wait(max(0.0, due_s - now))
        if monotonic_s() - max(now, due_s) > self._settings.heartbeat_interval_s:
            # We did not run for a while; whoever was silent meanwhile may be well.
            self._handle(Stalled(), monotonic_s())
        ended_views = self.memory.drain_released()
        self._commands.carry_out(monotonic_s, woken=self._commands.wake_fd in fds)
        if ended_views:
            self._lending.own_views_ended(ended_views)
        if frames:
            self._inbox.drain(waits=True)
        for fd in fds:
            self._descriptor_ready(fd)
        self._put_off = not self._put_off and self._orders.resolved != resolved
        if not self._put_off:
            self._look_around()

    def _look_around(self) -> None:
        """What is due, but nobody waits for. Put off by a turn where a caller is to have the interpreter."""
        self._reap()
        if self._tick_s is not None and monotonic_s() >= self._tick_s:
            self._inbox.drain()
            self._handle(Tick(), monotonic_s())
        now = monotonic_s()
        self._lending.pass_descriptors(now)
        self._lending.return_leases(now)

    def _due_s(self, now: float) -> float:
        self._tick_s = self._machine.next_deadline_s()
        due_s = now + _MAX_WAIT_S
        for time_s in (self._tick_s, self._processes.next_due_s(), self._lending.next_due_s(now)):
            if time_s is not None and time_s < due_s:
                due_s = time_s
        return due_s

    # --- commands ---------------------------------------------------------------------------------

    def _define(self, pool: str, spec: WorkerSpec, now: float) -> None:
        if pool not in self._specs:
            self._specs[pool] = spec
            limits = (spec.max_workers, spec.startup_timeout_s, spec.idle_timeout_s, spec.max_jobs_per_life)
            self._handle(PoolDefined(pool, *limits, spec.warm_spares), now)

    def _accept(self, submission: Submission, now: float) -> None:
        feed, options = submission.feed, submission.options
        self._submissions[submission.job] = submission
        self._lending.accept(submission.job, submission.packed)
        if submission.warnings:
            feed.emit_rows(_warning, [(text,) for text in submission.warnings], now)
        deadline_s = None if options.deadline_s is None else submission.times.submitted_s + options.deadline_s
        self._handle(
            JobSubmitted(
                submission.job,
                submission.pool,
                deadline_s,
                options.retries,
                submission.worker,
                options.deadline_s,
            ),
            now,
        )

    def _drop_remotes(self, worker: str, numbers: tuple[int, ...], now: float) -> None:
        holder = self._processes.get(worker)
        if holder is not None:
            self._processes.send(holder, RemotesDropped(numbers))
            self._handle(RemotesChanged(worker, -len(numbers)), now)

    def _close(self, now: float) -> None:
        self._closing = True
        self._handle(CloseRequested(), now)

    def _free(self, freeing: Freeing, pool: str | None) -> None:
        sent: dict[str, int] = {}
        for worker in self._processes:
            record = self._machine.workers.get(worker.id)
            if worker.ready and record is not None and pool in (None, record.pool):
                self._processes.send(worker, Free())
                worker.frees_sent += 1
                sent[worker.id] = worker.frees_sent
        freeing.sent_to(sent)
        self._freeings.add(freeing)

    def _freed(self, freed: FreedMemory) -> None:
        worker = self._processes[freed.worker_id]
        worker.frees_answered += 1
        for freeing in self._freeings:
            freeing.answered(freed, worker.frees_answered)

    # --- the machine's orders -----------------------------------------------------------------------

    def _handle(self, stimulus: Stimulus, now: float) -> None:
        for action in self._machine.handle(stimulus, now):
            self._orders.carry_out(action, now)

    def _spawn_failed(self, worker: WorkerIO, error: StartupError, now: float) -> None:
        self._handle(StartFailed(worker.id, error), now)
        self._worker_gone(worker, None, now)

    def _spawn_withdrawn(self, worker: WorkerIO, now: float) -> None:
        self._worker_gone(worker, None, now)

    def _adopted(self, worker: WorkerIO, now: float) -> None:
        self._directory.watch()
        self._inbox.announce(worker, now)  # a fork may be ready before we have heard of it

    # --- processes ------------------------------------------------------------------------------------

    def _descriptor_ready(self, fd: int) -> None:
        found = self._processes.readable(fd)
        if found is None:
            return
        worker, ended = found
        now = monotonic_s()
        if ended:
            record = self._machine.workers.get(worker.id)
            speaks = record is not None and (record.job is not None or not worker.ready)
            worker.gone_at_s = now + (_LAST_WORDS_S if speaks else 0.0)
        else:
            self._inbox.output(worker, now)

    def _reap(self) -> None:
        now = monotonic_s()
        exited = self._processes.exited(now)
        heard = self._inbox.drain() if exited else None
        for worker, exit_code in exited:
            last_words_s = (worker.gone_at_s or now) + _LAST_WORDS_MAX_S
            if heard is None or worker.id not in heard or now >= last_words_s:
                self._worker_gone(worker, exit_code, now)
        self._processes.tend(now)

    def _worker_gone(self, worker: WorkerIO, exit_code: int | None, now: float) -> None:
        self._inbox.output(worker, now)
        record = self._machine.workers.get(worker.id)
        job = self._machine.jobs.get(record.job) if record is not None and record.job is not None else None
        begun = job is not None and worker.has_begun(job.id, job.attempt)
        self._processes.remove(worker)
        self._lending.worker_gone(worker)
        cause = describe_exit(exit_code)
        if worker.violation:
            cause = f"broke the protocol ({worker.violation}) and was ended"
        self._handle(WorkerExited(worker.id, exit_code, cause, tuple(worker.tail), begun), now)

    def _worker_infos(self) -> tuple[WorkerInfo, ...]:
        host = socket.gethostname()
        infos: list[WorkerInfo] = []
        for worker in self._processes:
            record = self._machine.workers.get(worker.id)
            if record is not None:
                infos.append(
                    WorkerInfo(
                        id=worker.id,
                        pid=worker.spawned.pid if worker.spawned is not None else None,
                        state=record.state,
                        engine=worker.engine,
                        host=host,
                        jobs_done=record.jobs_done,
                        rss_bytes=worker.rss_bytes,
                        arena_bytes=self.memory.segment_bytes(worker.arena),
                        gpu_arena_bytes=self.memory.gpu.segment_bytes(worker.arena),
                        job_id=record.job,
                        spec_key=record.pool,
                    )
                )
        return tuple(infos)

    # --- the end ----------------------------------------------------------------------------------------

    def _abandon(self, error: BaseException) -> None:
        """The loop itself broke: nobody may wait for it for ever, and no worker may outlive it."""
        self._processes.kill_all()
        for submission in self._submissions.values():
            if not submission.feed.done():
                text = f"job {submission.job}: the supervisor failed: {error!r}; this is a bug in Legion"
                lost = WorkerLost(text, job_id=submission.job)
                submission.feed.resolve("lost", lost, None, monotonic_s())
        self._submissions.clear()

    def _end(self) -> None:
        if faults.hit is not None:
            faults.hit("loop.before_end")
        with contextlib.ExitStack() as last:  # each of these, whatever becomes of the others
            last.callback(self._directory.close)
            last.callback(self.memory.close)
            last.callback(self._channel.close)
            last.callback(self._commands.close)
            last.callback(self._channel.unwatch, self._commands.wake_fd)
            last.callback(self._ended.set)
            last.callback(self._processes.close)
            last.callback(self._commands.end)
            self._helpers.shutdown(wait=True, cancel_futures=True)


def _too_late(command: Command) -> None:
    """A command that the loop will not get to: a job must not wait for ever, a process not be left."""
    arguments: tuple[object, ...] = command.args if isinstance(command, partial) else ()
    for argument in arguments:
        if isinstance(argument, Submission) and not argument.feed.done():
            text = f"job {argument.job} was cancelled: the supervisor closed"
            error = JobCancelled(text, job_id=argument.job)
            argument.feed.resolve("cancelled", error, None, monotonic_s())
        elif isinstance(argument, SpawnedWorker):
            argument.close()


def _limits(settings: SupervisorSettings) -> Limits:
    return Limits(
        max_workers=settings.max_workers,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        cancel_grace_s=settings.cancel_grace_s,
        stop_grace_s=settings.stop_grace_s,
        term_grace_s=settings.term_grace_s,
        restart_budget=settings.restart_budget,
        restart_backoff_s=settings.restart_backoff_s,
        restart_backoff_max_s=settings.restart_backoff_max_s,
        restart_reset_s=settings.restart_reset_s,
    )


def _warning(text: str, job: str, seq: int, time_s: float) -> LogEvent:
    return LogEvent(job, seq, time_s, "log", text, "WARNING", "legion_shm")
