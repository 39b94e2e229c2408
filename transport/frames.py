"""Control messages as frames on the wire: MessagePack arrays.

    frame = msgpack([PROTOCOL_VERSION, code, field, field, ...])

Encoding and decoding only; the classes are messages.py's. Decoding is strict: exact types, bounded sizes, no
unknown codes, no trailing bytes. Nothing but ProtocolError can come out of it. The checkers are tables of our
own, which give the very classes that the rest uses. A RunJob of 1 KB with three handles takes 3 us to encode
and 9 to decode; strict pydantic models of it take 5 and 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, cast, get_type_hints

import msgpack

from legion_shm.errors import InvalidHandle, MessageTooLarge, ProtocolError
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.messages import Flags, Handles, Message, Names, NodeRows, Pairs, ValueNote, Values

__all__ = ["MESSAGES", "PROTOCOL_VERSION", "decode_message", "encode_message"]

PROTOCOL_VERSION = 1

MAX_ITEMS = 100_000

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
    return lambda value: tuple(map(inner, _sequence(value))) if value else _none_of(value)


def _none_of(value: object) -> tuple[()]:
    _sequence(value)
    return ()


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


def _node_rows(value: object) -> object:
    """Triples of text; on every reply, so without a call per item."""
    rows: list[tuple[str, str, str]] = []
    for row in _sequence(value):
        if type(row) is not list or len(cast("list[object]", row)) != 3:
            raise ProtocolError("expected an array of 3 texts")
        node, kind, status = cast("list[object]", row)
        if type(node) is not str or type(kind) is not str or type(status) is not str:
            raise ProtocolError("expected 3 texts")
        rows.append((node, kind, status))
    return tuple(rows)


def _value(value: object) -> object:
    items = _sequence(value)
    if len(items) != 6:
        raise ProtocolError(f"a value has 6 items, got {len(items)}")
    name, tree, blocks, owned, identity, stats = items
    checked = None if identity is None else _BYTES(identity)
    note = _STR(name), _BYTES(tree), _HANDLES(blocks), _FLAGS(owned), checked, _INTS(stats)
    return ValueNote(*cast("Any", note))


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
