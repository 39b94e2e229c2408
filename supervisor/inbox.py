"""What workers say: each frame checked, decoded and turned into a job's event or a stimulus.

Owns the dispatch of incoming messages and their meaning. A worker that breaks the protocol is dropped
here; a message about a job that its sender does not run (late, doubled, of an earlier attempt) is counted
and changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from legion_shm import faults
from legion_shm.clock import monotonic_s
from legion_shm.errors import ProtocolError, StartupError
from legion_shm.events import Event, LogEvent, NodeEvent, PreviewEvent, ProgressEvent, TerminalState
from legion_shm.supervisor.freeing import FreedMemory
from legion_shm.supervisor.lending import Lending
from legion_shm.supervisor.machine import Machine
from legion_shm.supervisor.master_memory import MasterMemory
from legion_shm.supervisor.processes import Processes
from legion_shm.supervisor.replies import Figures, error_from, readable, stats_from
from legion_shm.supervisor.result import Delivery
from legion_shm.supervisor.stimuli import (
    HeartbeatSeen,
    JobReplied,
    RemotesChanged,
    StartFailed,
    Stimulus,
    WorkerReady,
)
from legion_shm.supervisor.submission import Submission
from legion_shm.supervisor.worker_io import WorkerIO
from legion_shm.transport.channel import ServerChannel
from legion_shm.transport.frames import decode_message
from legion_shm.transport.messages import (
    BlocksResident,
    Freed,
    GpuSegmentRequest,
    GpuSegmentsClosed,
    Heartbeat,
    Hello,
    HostCopyRequest,
    JobCancelledReply,
    JobDone,
    JobFailedReply,
    LogRecord,
    Message,
    NodeNotes,
    PreviewNote,
    ProgressNote,
    Ready,
    Released,
    RemotesDropped,
    SegmentRequest,
    SegmentRetired,
)
from legion_shm.transport.messages import StartFailed as StartFailedNote

__all__ = ["Inbox"]

_log = logging.getLogger("legion_shm.supervisor")

_SOCKETS = 2  # a worker's, each greeted on its own
_FRAMES_A_TURN = 500
_TURN_S = 0.02  # a flood of frames may keep callers' commands and other workers' exits waiting for this long
_PREVIEW_MAX_BYTES = 4 << 20  # a worker's own are JPEGs of 512 pixels
_LOG_NAME_MAX = 256
_BEGUN_READ_EVERY = 64  # jobs; the pipe has room for thousands

_STATUSES = frozenset(("started", "finished", "cached"))
_Handler = Callable[[WorkerIO, Any, float], None]


class Inbox:
    """Used by the loop's thread alone. ``protocol_errors`` and ``ignored`` count what was not heeded."""

    def __init__(
        self,
        *,
        max_bytes: int,
        channel: ServerChannel,
        processes: Processes,
        lending: Lending,
        memory: MasterMemory,
        machine: Machine,
        submissions: Mapping[str, Submission],
        handle: Callable[[Stimulus, float], None],
        freed: Callable[[FreedMemory], None],
    ) -> None:
        self._max_bytes, self._channel = max_bytes, channel
        self._processes, self._lending, self._memory = processes, lending, memory
        self._machine, self._submissions, self._handle = machine, submissions, handle
        self._tell_freed = freed
        self.protocol_errors = 0
        self.ignored = 0
        self._handlers: dict[type[Message], _Handler] = {
            Ready: self._ready,
            StartFailedNote: self._start_failed,
            Heartbeat: self._heartbeat,
            NodeNotes: self._node,
            ProgressNote: self._progress,
            PreviewNote: self._preview,
            LogRecord: self._log_record,
            Released: self._released,
            JobDone: self._done,
            JobFailedReply: self._ended,
            JobCancelledReply: self._ended,
            SegmentRequest: self._segment_request,
            BlocksResident: self._blocks_resident,
            SegmentRetired: self._segments_retired,
            GpuSegmentRequest: self._gpu_segment_request,
            GpuSegmentsClosed: self._gpu_segments_closed,
            HostCopyRequest: self._host_copies,
            Freed: self._freed,
        }

    def drain(self, *, waits: bool = False) -> set[str] | None:
        """Handle what has arrived, bounded in number and time. ``waits``: something is known to have.

        Gives None when nothing more waits, else the ids of the workers that were heard. ZeroMQ takes frames
        from one socket after the other, so of a worker that is not among them nothing is left.
        """
        until_s = monotonic_s() + _TURN_S
        heard: set[str] = set()
        for _ in range(_FRAMES_A_TURN):
            received = self._channel.receive(waits=waits)
            waits = False
            if received is None:
                return None
            identity, frame = received
            worker = self._processes.of_identity(identity)
            if worker is not None:
                heard.add(worker.id)
                self._read(worker, identity, frame)
            if monotonic_s() >= until_s:
                break
        return heard

    def _read(self, worker: WorkerIO, identity: bytes, frame: bytes) -> None:
        if worker.violation:
            return
        try:
            message = decode_message(frame, max_bytes=self._max_bytes)
            self._take(worker, identity, message, monotonic_s())
        except ProtocolError as error:
            self._violated(worker, error)

    def output(self, worker: WorkerIO, now: float) -> None:
        """Turn what a worker wrote into events of the job that it runs."""
        for stream, line in self._processes.read_output(worker):
            self._log(worker, stream, line, None, None, now)

    def _take(self, worker: WorkerIO, identity: bytes, message: Message, now: float) -> None:
        channel = "job" if identity == worker.job_identity else "control"
        if isinstance(message, Hello):
            if message.token != worker.token or message.worker != worker.id or message.channel != channel:
                raise ProtocolError("a greeting with another worker's name or token")
            worker.greeted.add(channel)
            self.announce(worker, now)
            return
        if channel not in worker.greeted:
            raise ProtocolError(f"{type(message).__name__} before any greeting")
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"a worker does not send {type(message).__name__}")
        handler(worker, message, now)

    def _violated(self, worker: WorkerIO, error: ProtocolError) -> None:
        """A worker that breaks the protocol is ended; its exit resolves its job."""
        self.protocol_errors += 1
        worker.break_off(readable(f"{type(error).__name__}: {error}"))
        _log.error("worker %s broke the protocol and is ended: %s", worker.id, worker.violation)

    # --- about the worker ---------------------------------------------------------------------------

    def _ready(self, worker: WorkerIO, message: Ready, now: float) -> None:
        worker.engine = readable(message.engine, _LOG_NAME_MAX)
        worker.versions, worker.ready = dict(message.versions), True
        self.announce(worker, now)

    def announce(self, worker: WorkerIO, now: float) -> None:
        """Jobs may come once the worker is ready, can hear a Cancel and can be sent descriptors."""
        if worker.ready and len(worker.greeted) == _SOCKETS and worker.spawned is not None:
            self._handle(WorkerReady(worker.id), now)

    def _start_failed(self, worker: WorkerIO, message: StartFailedNote, now: float) -> None:
        self.output(worker, now)
        told, traceback = readable(message.error), readable(message.traceback)
        if told.startswith(("ConfigError: ", "StartupError: ")):  # these say it all
            told = told.partition(": ")[2]
        else:
            told += f"\n{traceback.rstrip()}"
        error = StartupError(
            f"worker {worker.id} could not start: {told}",
            worker_id=worker.id,
            traceback=traceback,
            log_tail=tuple(worker.tail),
        )
        self._handle(StartFailed(worker.id, error), now)

    def _heartbeat(self, worker: WorkerIO, message: Heartbeat, now: float) -> None:
        worker.rss_bytes = message.rss_bytes
        self.announce(worker, now)
        self._handle(HeartbeatSeen(worker.id), now)

    def _log_record(self, worker: WorkerIO, message: LogRecord, now: float) -> None:
        level, logger = readable(message.level, _LOG_NAME_MAX), readable(message.logger, _LOG_NAME_MAX)
        text = readable(message.text)
        worker.tail.extend(f"{level} {logger}: {line}" for line in text.splitlines())
        self._log(worker, "log", text, level, logger, now)

    def _log(
        self, worker: WorkerIO, stream: str, text: str, level: str | None, logger: str | None, now: float
    ) -> None:
        record = self._machine.workers.get(worker.id)
        submission = self._submissions.get(record.job) if record is not None and record.job else None
        if submission is not None:
            submission.feed.emit(partial(_log_event, stream, text, level, logger), now=now)

    # --- about memory -------------------------------------------------------------------------------

    def _released(self, worker: WorkerIO, message: Released, now: float) -> None:
        self._lending.released(worker, message.handles)

    def _segment_request(self, worker: WorkerIO, message: SegmentRequest, now: float) -> None:
        self._lending.request_segment(worker, message.nbytes)

    def _blocks_resident(self, worker: WorkerIO, message: BlocksResident, now: float) -> None:
        self._lending.worker_resident(worker, message.handles)

    def _segments_retired(self, worker: WorkerIO, message: SegmentRetired, now: float) -> None:
        self._lending.retire(worker, message.segments)

    def _gpu_segment_request(self, worker: WorkerIO, message: GpuSegmentRequest, now: float) -> None:
        self._lending.request_gpu_segment(worker, message)

    def _gpu_segments_closed(self, worker: WorkerIO, message: GpuSegmentsClosed, now: float) -> None:
        self._lending.gpu.closed(worker, message.arena, message.segments)

    def _host_copies(self, worker: WorkerIO, message: HostCopyRequest, now: float) -> None:
        self._lending.gpu.copy_for(worker, message.handles)

    def _freed(self, worker: WorkerIO, message: Freed, now: float) -> None:
        self._tell_freed(FreedMemory(worker.id, message.host_bytes, message.gpu_bytes))

    # --- about a job --------------------------------------------------------------------------------

    def _running(self, worker: WorkerIO, job: str, attempt: int) -> Submission | None:
        """The submission that this worker runs in this attempt; anything else is late and counted."""
        record = self._machine.jobs.get(job)
        if record is None or record.worker != worker.id or record.attempt != attempt:
            self.ignored += 1
            return None
        return self._submissions[job]

    def _emit(
        self, worker: WorkerIO, message: Any, make: Callable[[str, int, float], Event], now: float
    ) -> None:
        submission = self._running(worker, message.job, message.attempt)
        if submission is not None:
            submission.feed.emit(make, now=now)

    def _node(self, worker: WorkerIO, message: NodeNotes, now: float) -> None:
        _check_rows(message)
        submission = self._running(worker, message.job, message.attempt)
        if submission is not None:
            _emit_rows(submission, message, now)

    def _progress(self, worker: WorkerIO, message: ProgressNote, now: float) -> None:
        self._emit(
            worker,
            message,
            lambda job, seq, at: ProgressEvent(job, seq, at, message.node_id, message.value, message.total),
            now,
        )

    def _preview(self, worker: WorkerIO, message: PreviewNote, now: float) -> None:
        if len(message.data) > _PREVIEW_MAX_BYTES:
            self.ignored += 1
            return
        self._emit(
            worker,
            message,
            lambda job, seq, at: PreviewEvent(job, seq, at, message.node_id, message.format, message.data),
            now,
        )

    def _done(self, worker: WorkerIO, message: JobDone, now: float) -> None:
        _check_rows(message)
        self.output(worker, now)
        submission = self._running(worker, message.job, message.attempt)
        if submission is None:
            self._lending.refuse_result(worker, message)
            if message.remotes:
                self._processes.send(worker, RemotesDropped(message.remotes))
            return
        self._lending.take_result(worker, message)
        if message.remotes:
            self._handle(RemotesChanged(worker.id, len(message.remotes)), now)
        _emit_rows(submission, message, now)
        if faults.hit is not None:
            faults.hit("inbox.after_leases")
        submission.delivery = Delivery(
            message.values,
            partial(
                stats_from,
                Figures.of(message),
                submission.times,
                submission.packed.stats,
                engine=worker.engine,
                worker=worker.id,
                now=now,
            ),
            self._memory,
            worker=worker.id,
            allow_cpu=submission.options.allow_cpu,
            remotes=message.remotes,
            pickled=tuple(submission.options.spec.pickle_classes),
        )
        self._handle(JobReplied(worker.id, message.job, message.attempt, "done", None), now)
        worker.replies += 1
        if not worker.replies % _BEGUN_READ_EVERY:
            worker.has_begun(message.job, message.attempt)  # reads what it wrote: its pipe must not fill up

    def _ended(self, worker: WorkerIO, message: JobFailedReply | JobCancelledReply, now: float) -> None:
        self.output(worker, now)
        submission = self._running(worker, message.job, message.attempt)
        if submission is None:
            return
        outcome: TerminalState = "failed" if isinstance(message, JobFailedReply) else "cancelled"
        error = error_from(message, worker.id, submission.warnings)
        self._handle(JobReplied(worker.id, message.job, message.attempt, outcome, error), now)
        worker.has_begun(message.job, message.attempt)


def _check_rows(message: NodeNotes | JobDone) -> None:
    unknown = {status for _, _, status in message.rows} - _STATUSES
    if unknown:
        raise ProtocolError(f"a node's status is {unknown.pop()!r}")


def _emit_rows(submission: Submission, message: NodeNotes | JobDone, now: float) -> None:
    if message.rows:
        submission.feed.emit_rows(_node_event, message.rows, now)


def _node_event(node_id: str, class_type: str, status: Any, job: str, seq: int, time_s: float) -> NodeEvent:
    return NodeEvent(job, seq, time_s, node_id, class_type, status)


def _log_event(
    stream: Any, text: str, level: str | None, logger: str | None, job: str, seq: int, time_s: float
) -> LogEvent:
    return LogEvent(job, seq, time_s, stream, text, level, logger)
