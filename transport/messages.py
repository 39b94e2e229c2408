"""The control messages between supervisor and worker: frozen classes, encoded as MessagePack arrays.

    frame = msgpack([PROTOCOL_VERSION, code, field, field, ...])

Encoding and decoding only: sockets are channel.py's, meaning is the supervisor's. Decoding is strict:
exact types, bounded sizes, no unknown codes, no trailing bytes. Nothing but ProtocolError can come out
of it. The checkers are tables of our own, which give the very classes that the rest uses. A RunJob of 1 KB
with three handles takes 3 us to encode and 9 to decode; strict pydantic models of it take 5 and 7.

A worker has two sockets. On its *job* socket its main thread speaks (RunJob, JobDone, segments), so
that a short job crosses no thread; on its *control* socket a second thread does (heartbeat, cancel,
ended leases, log records), so that these go on while a node runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast, get_type_hints

import msgpack

from legion_shm.errors import InvalidHandle, MessageTooLarge, ProtocolError
from legion_shm.transport.handles import BlockHandle

__all__ = [
    "MESSAGES",
    "PROTOCOL_VERSION",
    "BlocksFreed",
    "Cancel",
    "Free",
    "Heartbeat",
    "Hello",
    "JobCancelledReply",
    "JobDone",
    "JobFailedReply",
    "LogRecord",
    "Message",
    "NodeNotes",
    "PreviewNote",
    "ProgressNote",
    "Ready",
    "Released",
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
    "decode_message",
    "encode_message",
    "in_batches",
]

PROTOCOL_VERSION = 1

MAX_ITEMS = 100_000

Handles = tuple[BlockHandle, ...]
Flags = tuple[bool, ...]
Names = tuple[str, ...]
Pairs = tuple[tuple[str, str], ...]
ValueNote = tuple[str, bytes, Handles, Flags, bytes | None, tuple[int, ...]]
"""One named value: name, codec tree, the blocks it refers to, which of these are new (of the sender's own
arena), its identity for caches, and its `TransferStats` as numbers."""
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
    """The job's outputs and, as the last value, what its output nodes reported.

    ``released``: deliveries that ended with the job. Times are monotonic microseconds: message received,
    inputs decoded, nodes run, outputs encoded.
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


# --- supervisor to worker -------------------------------------------------------------------------


@dataclass(frozen=True)
class RunJob(Message):
    """``workflow`` is JSON in API format. ``freed``: blocks of the worker's own arena without leases."""

    code = 32
    job: str
    attempt: int
    workflow: bytes
    digest: bytes
    values: Values
    freed: Handles
    allow_cpu: bool


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


HANDLES_MAX = 10_000
"""Handles that one message gives back; whoever has more sends more messages."""


def in_batches(handles: Sequence[BlockHandle]) -> Iterator[Handles]:
    """The same handles in tuples that fit into a message each; none for none."""
    for start in range(0, len(handles), HANDLES_MAX):
        yield tuple(handles[start : start + HANDLES_MAX])


_Check = Callable[[object], object]


def _exact(kind: type, text: str) -> _Check:
    def check(value: object) -> object:
        if type(value) is not kind:
            raise ProtocolError(f"expected {text}, got {type(value).__name__}")
        return value

    return check


def _float(value: object) -> object:
    if type(value) is int or type(value) is float:
        try:
            return float(value)
        except OverflowError:
            raise ProtocolError("a number is out of range") from None
    raise ProtocolError(f"expected a number, got {type(value).__name__}")


def _optional(inner: _Check) -> _Check:
    return lambda value: None if value is None else inner(value)


def _sequence(value: object) -> Sequence[object]:
    if type(value) is not list:
        raise ProtocolError(f"expected an array, got {type(value).__name__}")
    return cast("list[object]", value)


def _many(inner: _Check) -> _Check:
    return lambda value: tuple(map(inner, _sequence(value)))


def _row(*inner: _Check) -> _Check:
    def check(value: object) -> object:
        items = _sequence(value)
        if len(items) != len(inner):
            raise ProtocolError(f"expected {len(inner)} items, got {len(items)}")
        return tuple(one(item) for one, item in zip(inner, items, strict=True))

    return check


_INT, _STR, _BYTES = _exact(int, "an integer"), _exact(str, "text"), _exact(bytes, "bytes")
_BOOL = _exact(bool, "a boolean")
_HANDLES, _FLAGS, _INTS = _many(BlockHandle.from_wire), _many(_BOOL), _many(_INT)


def _value(value: object) -> object:
    items = _sequence(value)
    if len(items) != 6:
        raise ProtocolError(f"a value has 6 items, got {len(items)}")
    name, tree, blocks, owned, identity, stats = items
    checked = None if identity is None else _BYTES(identity)
    return _STR(name), _BYTES(tree), _HANDLES(blocks), _FLAGS(owned), checked, _INTS(stats)


_CHECKS: dict[Any, _Check] = {
    int: _INT,
    str: _STR,
    bytes: _BYTES,
    bool: _BOOL,
    float: _float,
    str | None: _optional(_STR),
    Handles: _HANDLES,
    Flags: _FLAGS,
    Names: _many(_STR),
    tuple[int, ...]: _INTS,
    Pairs: _many(_row(_STR, _STR)),
    NodeRows: _many(_row(_STR, _STR, _STR)),
    Values: _many(_value),
}


def _pack_handles(value: Any) -> object:
    return [handle.to_wire() for handle in cast("Handles", value)]


def _pack_values(value: Any) -> object:
    return [
        (name, tree, _pack_handles(blocks), owned, identity, stats)
        for name, tree, blocks, owned, identity, stats in cast("Values", value)
    ]


_PACKERS: dict[Any, Callable[[Any], object]] = {Handles: _pack_handles, Values: _pack_values}
_Row = tuple[str, _Check, Callable[[Any], object] | None]


def _table() -> dict[int, tuple[type[Message], tuple[_Row, ...]]]:
    table: dict[int, tuple[type[Message], tuple[_Row, ...]]] = {}
    for kind in Message.__subclasses__():
        hints = get_type_hints(kind)
        rows = tuple(
            (field.name, _CHECKS[hints[field.name]], _PACKERS.get(hints[field.name]))
            for field in fields(kind)
        )
        if kind.code in table:
            raise AssertionError(f"message code {kind.code} is used twice")
        table[kind.code] = (kind, rows)
    return table


MESSAGES = _table()
"""Code to (class, ((field name, check, packer or None), ...))."""


def encode_message(message: Message, *, max_bytes: int) -> bytes:
    """One frame. Raises MessageTooLarge: ZeroMQ itself would drop the frame without a word."""
    _, rows = MESSAGES[message.code]
    row: list[object] = [PROTOCOL_VERSION, message.code]
    for name, _check, pack in rows:
        value = getattr(message, name)
        row.append(value if pack is None else pack(value))
    frame: bytes = msgpack.packb(row, use_bin_type=True, unicode_errors="surrogatepass")
    if len(frame) > max_bytes:
        raise MessageTooLarge(
            f"a {type(message).__name__} message of {len(frame)} bytes exceeds "
            f"max_message_bytes = {max_bytes}; raise that setting, or pass large values as tensors, arrays "
            "or bytes through `inputs`"
        )
    return frame


def decode_message(frame: bytes, *, max_bytes: int) -> Message:
    """The message in a frame. Raises ProtocolError for whatever is not exactly one valid message."""
    if len(frame) > max_bytes:
        raise ProtocolError(f"a frame of {len(frame)} bytes exceeds max_message_bytes = {max_bytes}")
    try:
        row: object = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            use_list=True,
            unicode_errors="surrogatepass",
            max_array_len=min(MAX_ITEMS, len(frame)),  # room is made before items are seen
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a frame is not MessagePack: {type(error).__name__}") from None
    items = _sequence(row)
    if len(items) < 2 or type(items[0]) is not int or type(items[1]) is not int:
        raise ProtocolError("a frame has no version and code")
    if items[0] != PROTOCOL_VERSION:
        raise ProtocolError(f"the peer speaks protocol version {items[0]}, we speak {PROTOCOL_VERSION}")
    entry = MESSAGES.get(items[1])
    if entry is None:
        raise ProtocolError(f"unknown message code {items[1]}")
    kind, rows = entry
    if len(items) != len(rows) + 2:
        raise ProtocolError(f"{kind.__name__} has {len(rows)} fields, got {len(items) - 2}")
    try:
        values = [check(item) for (_, check, _), item in zip(rows, items[2:], strict=True)]
    except InvalidHandle as error:
        raise InvalidHandle(f"{kind.__name__}: {error}") from None
    except ProtocolError as error:
        raise ProtocolError(f"{kind.__name__}: {error}") from None
    return kind(*values)
