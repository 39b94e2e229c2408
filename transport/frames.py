"""Control messages as frames on the wire: MessagePack arrays.

    frame = msgpack([PROTOCOL_VERSION, code, field, field, ...])

Encoding and decoding only; the classes are messages.py's. Decoding is strict: exact types, bounded sizes, no
unknown codes, no trailing bytes. Nothing but ProtocolError can come out of it. The checkers are tables of our
own, which give the very classes that the rest uses. A RunJob of 1 KB with three handles takes 3 us to encode
and 9 to decode; strict pydantic models of it take 5 and 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, cast, get_type_hints

import msgpack

from legion_shm.errors import InvalidHandle, MessageTooLarge, ProtocolError
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.messages import Flags, Handles, Message, Names, NodeRows, Pairs, ValueNote, Values

__all__ = ["MESSAGES", "PROTOCOL_VERSION", "decode_message", "encode_message"]

PROTOCOL_VERSION = 1

MAX_ITEMS = 100_000
_HEAD = 2  # version and code, before the fields

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


def _sequence(value: object) -> tuple[object, ...]:
    if type(value) is not tuple:
        raise ProtocolError(f"expected an array, got {type(value).__name__}")
    return cast("tuple[object, ...]", value)


def _many(inner: _Check) -> _Check:
    return lambda value: tuple(map(inner, _sequence(value)))


def _many_exact(kind: type, text: str) -> _Check:
    """As `_many`, without a call per item."""
    only = {kind}

    def check(value: object) -> object:
        items = _sequence(value)
        if items and set(map(type, items)) != only:
            wrong = next(item for item in items if type(item) is not kind)
            raise ProtocolError(f"expected {text}, got {type(wrong).__name__}")
        return items

    return check


def _row(*inner: _Check) -> _Check:
    def check(value: object) -> object:
        items = _sequence(value)
        if len(items) != len(inner):
            raise ProtocolError(f"expected {len(inner)} items, got {len(items)}")
        return tuple(one(item) for one, item in zip(inner, items, strict=True))

    return check


_INT, _STR, _BYTES = _exact(int, "an integer"), _exact(str, "text"), _exact(bytes, "bytes")
_BOOL = _exact(bool, "a boolean")
_HANDLES = _many(BlockHandle.from_wire)
_FLAGS, _INTS = _many_exact(bool, "a boolean"), _many_exact(int, "an integer")
_TUPLES, _THREES, _TEXTS = {tuple}, {3}, {str}
_VALUE_KINDS = {
    (str, bytes, tuple, tuple, bytes, tuple),
    (str, bytes, tuple, tuple, type(None), tuple),
}


def _node_rows(value: object) -> object:
    """Triples of text; on every reply, so without a call per item."""
    rows = cast("tuple[tuple[object, ...], ...]", _sequence(value))
    if rows and (set(map(type, rows)) != _TUPLES or set(map(len, rows)) != _THREES):
        raise ProtocolError("expected arrays of 3 texts")
    if rows and set(map(type, chain.from_iterable(rows))) != _TEXTS:
        raise ProtocolError("expected 3 texts")
    return rows


def _value(value: object) -> object:
    items = _sequence(value)
    kinds = tuple(map(type, items))
    if kinds not in _VALUE_KINDS:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ProtocolError(f"a value is (text, bytes, array, array, bytes or nil, array), got ({names})")
    name, tree, blocks, owned, identity, stats = cast("Any", items)
    handles: Any = _HANDLES(blocks) if blocks else ()
    flags: Any = _FLAGS(owned) if owned else ()
    return ValueNote(name, tree, handles, flags, identity, cast("Any", _INTS(stats)))


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
    NodeRows: _node_rows,
    Values: _many(_value),
}


def _pack_handles(value: Handles) -> object:
    return [handle.to_wire() for handle in value]


def _pack_values(value: Values) -> object:
    return [
        (name, tree, _pack_handles(blocks) if blocks else (), owned, identity, stats)
        for name, tree, blocks, owned, identity, stats in value
    ]


_PACKERS: dict[Any, Callable[[Any], object]] = {Handles: _pack_handles, Values: _pack_values}
_EXACT: dict[Any, type] = {
    int: int,
    str: str,
    bytes: bytes,
    bool: bool,
    Handles: tuple,
    Flags: tuple,
    Names: tuple,
    tuple[int, ...]: tuple,
    Pairs: tuple,
    NodeRows: tuple,
    Values: tuple,
}
"""What a field's value is in a frame, for those that are of one type. Only arrays are looked into."""


class MessageForm(NamedTuple):
    """How one class of messages is written and read.

    ``values`` gives the fields, ``checks`` are theirs in order; ``packers`` are for those that are packed in
    another form, by place in the frame. ``kinds``: the types of all items of a frame, None where a field may
    be of several; where they are right, ``deep`` is what else has to be checked, by place.
    """

    message: type[Message]
    checks: tuple[_Check, ...]
    values: Callable[[Message], tuple[object, ...]]
    packers: tuple[tuple[int, Callable[[Any], object]], ...]
    kinds: tuple[type, ...] | None
    deep: tuple[tuple[int, _Check], ...]


def _form(kind: type[Message]) -> MessageForm:
    hints = get_type_hints(kind)
    types = [hints[field.name] for field in fields(kind)]
    names = tuple(field.name for field in fields(kind))
    exact = [_EXACT.get(each) for each in types]
    places = list(enumerate(types, _HEAD))
    return MessageForm(
        message=kind,
        checks=tuple(_CHECKS[each] for each in types),
        values=_getter(names),
        packers=tuple((place, _PACKERS[each]) for place, each in places if each in _PACKERS),
        kinds=None if None in exact else (int, int, *cast("list[type]", exact)),
        deep=tuple((place, _CHECKS[each]) for place, each in places if _EXACT.get(each) is tuple),
    )


def _getter(names: tuple[str, ...]) -> Callable[[Message], tuple[object, ...]]:
    if len(names) > 1:
        return attrgetter(*names)
    return lambda message: tuple(getattr(message, name) for name in names)


def _table() -> dict[int, MessageForm]:
    table: dict[int, MessageForm] = {}
    for kind in Message.__subclasses__():
        if kind.code in table:
            raise AssertionError(f"message code {kind.code} is used twice")
        table[kind.code] = _form(kind)
    return table


MESSAGES = _table()
"""Code to form."""


def encode_message(message: Message, *, max_bytes: int) -> bytes:
    """One frame. Raises MessageTooLarge: ZeroMQ itself would drop the frame without a word."""
    form = MESSAGES[message.code]
    row: list[Any] = [PROTOCOL_VERSION, message.code, *form.values(message)]
    for place, pack in form.packers:
        if row[place]:
            row[place] = pack(row[place])
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
            use_list=False,
            unicode_errors="surrogatepass",
            max_array_len=min(MAX_ITEMS, len(frame)),  # room is made before items are seen
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a frame is not MessagePack: {type(error).__name__}") from None
    items = list(_sequence(row))
    if len(items) < _HEAD or type(items[0]) is not int or type(items[1]) is not int:
        raise ProtocolError("a frame has no version and code")
    if items[0] != PROTOCOL_VERSION:
        raise ProtocolError(f"the peer speaks protocol version {items[0]}, we speak {PROTOCOL_VERSION}")
    form = MESSAGES.get(items[1])
    if form is None:
        raise ProtocolError(f"unknown message code {items[1]}")
    if len(items) != len(form.checks) + _HEAD:
        name, count = form.message.__name__, len(form.checks)
        raise ProtocolError(f"{name} has {count} fields, got {len(items) - _HEAD}")
    try:
        return form.message(*_checked(items, form))
    except InvalidHandle as error:
        raise InvalidHandle(f"{form.message.__name__}: {error}") from None
    except ProtocolError as error:
        raise ProtocolError(f"{form.message.__name__}: {error}") from None


def _checked(items: list[object], form: MessageForm) -> list[object]:
    """The fields of a frame. Where its types are right at a glance, only what lies in arrays is looked at."""
    if tuple(map(type, items)) == form.kinds:
        for place, check in form.deep:
            items[place] = check(items[place]) if items[place] else ()
        return items[_HEAD:]
    return [check(item) for check, item in zip(form.checks, items[_HEAD:], strict=True)]
