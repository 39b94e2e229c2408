"""The control messages between supervisor and worker: frozen classes.

Their form on the wire is frames.py's, sockets are channel.py's, meaning is the supervisor's.

A worker has two sockets. On its *job* socket its main thread speaks (RunJob, JobDone, segments), so
that a short job crosses no thread; on its *control* socket a second thread does (heartbeat, cancel,
ended leases, log records), so that these go on while a node runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from legion_shm.transport.handles import BlockHandle

__all__ = [
    "HANDLES_MAX",
    "BlocksFreed",
    "BlocksResident",
    "Cancel",
    "Flags",
    "Free",
    "Freed",
    "GpuSegmentIntroduced",
    "GpuSegmentRequest",
    "GpuSegmentsClosed",
    "Handles",
    "Heartbeat",
    "Hello",
    "HostCopies",
    "HostCopyRequest",
    "JobCancelledReply",
    "JobDone",
    "JobFailedReply",
    "LogRecord",
    "Message",
    "ModelsForgotten",
    "Names",
    "NodeNotes",
    "NodeRows",
    "Pairs",
    "PreviewNote",
    "ProgressNote",
    "Ready",
    "Released",
    "RemotesDropped",
    "ResultAccepted",
    "RunJob",
    "SegmentAnnounced",
    "SegmentGranted",
    "SegmentRefused",
    "SegmentRequest",
    "SegmentRetired",
    "SegmentsDropped",
    "StartFailed",
    "Stop",
    "ValueNote",
    "Values",
    "in_batches",
]

Handles = tuple[BlockHandle, ...]
Flags = tuple[bool, ...]
Names = tuple[str, ...]
Pairs = tuple[tuple[str, str], ...]


class ValueNote(NamedTuple):
    """One named value: the codec's tree of it, the blocks that this refers to, and which of them are new.

    ``owned``: new, and of the sender's own arena. ``identity`` is for caches: None for what can never be
    given again, empty where tree and blocks say it all (`identity_of`). ``stats`` are its `TransferStats` as
    numbers.
    """

    name: str
    tree: bytes
    blocks: Handles
    owned: Flags
    identity: bytes | None
    stats: tuple[int, ...]

    def handles(self) -> Iterator[tuple[BlockHandle, bool]]:
        """Each block with whether it is new."""
        return zip(self.blocks, self.owned, strict=True)


Values = tuple[ValueNote, ...]
NodeRows = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Message:
    """Base of all messages. ``code`` is its number on the wire."""

    code: ClassVar[int] = 0


# --- worker to supervisor -------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello(Message):
    """First message on each socket. ``channel``: ``job`` or ``control``; the token proves who spawned us."""

    code = 1
    worker: str
    token: str
    channel: str
    pid: int


@dataclass(frozen=True)
class Ready(Message):
    """The engine runs; jobs may come."""

    code = 2
    engine: str
    versions: Pairs
    node_classes: int


@dataclass(frozen=True)
class StartFailed(Message):
    """The engine could not start; the process ends by itself."""

    code = 3
    error: str
    traceback: str


@dataclass(frozen=True)
class NodeNotes(Message):
    """What nodes did, in order: (node id, class, ``started``, ``finished`` or ``cached``) each."""

    code = 4
    job: str
    attempt: int
    rows: NodeRows


@dataclass(frozen=True)
class ProgressNote(Message):
    code = 5
    job: str
    attempt: int
    node_id: str | None
    value: float
    total: float


@dataclass(frozen=True)
class PreviewNote(Message):
    code = 6
    job: str
    attempt: int
    node_id: str | None
    format: str
    data: bytes


@dataclass(frozen=True)
class JobDone(Message):
    """The job's outputs and, as the last value where there is one, what its output nodes reported.

    ``rows``: what nodes did, as in `NodeNotes`, since the last of these. ``released``: deliveries that ended
    with the job. Times are monotonic microseconds: message received,
    inputs decoded, nodes run, outputs encoded. ``remotes``: the numbers of the objects that stay in the
    worker, once for each time that the values name them.
    """

    code = 7
    job: str
    attempt: int
    values: Values
    released: Handles
    received_us: int
    decoded_us: int
    executed_us: int
    encoded_us: int
    nodes_executed: int
    nodes_cached: int
    rows: NodeRows = ()
    remotes: tuple[int, ...] = ()


@dataclass(frozen=True)
class JobFailedReply(Message):
    """The job ended in an error. ``kind`` is the name of one of our error classes."""

    code = 8
    job: str
    attempt: int
    kind: str
    message: str
    node_id: str | None
    class_type: str | None
    exception_type: str
    exception_message: str
    traceback: str
    inputs_summary: str
    problems: Names
    path: str


@dataclass(frozen=True)
class JobCancelledReply(Message):
    code = 9
    job: str
    attempt: int


@dataclass(frozen=True)
class SegmentRequest(Message):
    """The worker's arena needs a segment of this many bytes."""

    code = 10
    nbytes: int


@dataclass(frozen=True)
class Heartbeat(Message):
    """``busy_job`` is empty while idle."""

    code = 11
    seq: int
    rss_bytes: int
    arena_bytes: int
    busy_job: str


@dataclass(frozen=True)
class Released(Message):
    """Deliveries whose last view is gone, one entry each."""

    code = 12
    handles: Handles


@dataclass(frozen=True)
class LogRecord(Message):
    code = 13
    level: str
    logger: str
    text: str


@dataclass(frozen=True)
class SegmentRetired(Message):
    """The worker's arena gave up these wholly free segments."""

    code = 14
    segments: tuple[int, ...]


@dataclass(frozen=True)
class Freed(Message):
    """The answer to Free, once it was done: bytes that came back."""

    code = 15
    host_bytes: int
    gpu_bytes: int


@dataclass(frozen=True)
class BlocksResident(Message):
    """Blocks of the worker's own arena in which something lives that may be sent many times.

    Its lease on each of them ends as one on a delivery does.
    """

    code = 16
    handles: Handles


@dataclass(frozen=True)
class GpuSegmentRequest(Message):
    """The worker's arena needs a segment of this many bytes on that device (by UUID)."""

    code = 17
    device: str
    nbytes: int


@dataclass(frozen=True)
class HostCopyRequest(Message):
    """Blocks of a GPU's memory that were delivered and can't be read: copies in main memory are wanted."""

    code = 18
    handles: Handles


@dataclass(frozen=True)
class GpuSegmentsClosed(Message):
    """The answer to SegmentsDropped for segments of a GPU's memory: the worker has them open no more."""

    code = 19
    arena: int
    segments: tuple[int, ...]


# --- supervisor to worker -------------------------------------------------------------------------


@dataclass(frozen=True)
class RunJob(Message):
    """``workflow`` is JSON in API format. ``freed``: blocks of the worker's own arena without leases.

    ``remote``: outputs that can't travel stay in the worker, and their handles go.
    """

    code = 32
    job: str
    attempt: int
    workflow: bytes
    digest: bytes
    values: Values
    freed: Handles
    allow_cpu: bool
    remote: bool = False


@dataclass(frozen=True)
class Cancel(Message):
    code = 33
    job: str


@dataclass(frozen=True)
class Stop(Message):
    code = 34


@dataclass(frozen=True)
class Free(Message):
    code = 35


@dataclass(frozen=True)
class SegmentGranted(Message):
    """The worker's own new segment; its descriptor comes over the socketpair, or ``name`` says it."""

    code = 36
    arena: int
    segment: int
    nbytes: int
    name: str


@dataclass(frozen=True)
class SegmentRefused(Message):
    code = 37
    reason: str


@dataclass(frozen=True)
class SegmentAnnounced(Message):
    """Another process's segment, by name (portable segments only), before the first handle into it."""

    code = 38
    arena: int
    segment: int
    nbytes: int
    name: str


@dataclass(frozen=True)
class SegmentsDropped(Message):
    """Another process's segments that are gone; no handle into them will come any more."""

    code = 41
    arena: int
    segments: tuple[int, ...]


@dataclass(frozen=True)
class BlocksFreed(Message):
    """Blocks of the worker's own arena whose last lease has ended."""

    code = 39
    handles: Handles


@dataclass(frozen=True)
class ResultAccepted(Message):
    """The leases on what JobDone referred to are taken; the worker may let go of it."""

    code = 40
    job: str


@dataclass(frozen=True)
class RemotesDropped(Message):
    """Handles of the worker's objects that are gone, one entry each."""

    code = 42
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class ModelsForgotten(Message):
    """Models that are gone in the supervisor's process: what the worker keeps of them is of no use now."""

    code = 43
    keys: Names


@dataclass(frozen=True)
class GpuSegmentIntroduced(Message):
    """A segment in a GPU's memory: the worker's own new one, or another's before the first handle into it.

    ``device`` is the GPU's UUID, ``handle`` what the CUDA driver opens it by; behind its ``nbytes`` for
    blocks lies ``pattern``.
    """

    code = 44
    arena: int
    segment: int
    nbytes: int
    device: str
    handle: bytes
    pattern: bytes


@dataclass(frozen=True)
class HostCopies(Message):
    """The answer to HostCopyRequest: a block in main memory for each, in that order; or none, and why."""

    code = 45
    handles: Handles
    reason: str


HANDLES_MAX = 10_000
"""Handles that one message gives back; whoever has more sends more messages."""


def in_batches(handles: Sequence[BlockHandle]) -> Iterator[Handles]:
    """The same handles in tuples that fit into a message each; none for none."""
    for start in range(0, len(handles), HANDLES_MAX):
        yield tuple(handles[start : start + HANDLES_MAX])
