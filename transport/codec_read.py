"""Decoding: tokens back into the value, every claim checked before memory is touched.

    tokens + blocks' views ── Reader.read() ──▶ value

Strict and bounded: whatever the tokens hold, nothing but `ProtocolError` (or its subclasses) comes out,
and `Refusal` for a device or a class that this process hasn't. Owns Python's own types; numpy's are
codec_arrays.py's, torch's tensors.py's, loaded when their first token is met.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

from legion_shm.errors import InvalidHandle, ProtocolError, UnsupportedValue
from legion_shm.transport import codec_wire as wire
from legion_shm.transport.codec_registry import ValueType, ValueTypes
from legion_shm.transport.codec_types import DecodeLimits, DeviceBytes, DevicePolicy
from legion_shm.transport.codec_wire import Refusal, Token, is_list, is_list_of
from legion_shm.transport.handles import BlockHandle

__all__ = ["ReadHandler", "Reader", "fields", "length"]

ReadHandler = Callable[["Reader", Token, int, bool], Any]

_HASH_UNSAFE = (tuple, frozenset, slice)


class Reader:
    """One reading of one tree. Objects get the numbers that references use in the order they complete."""

    __slots__ = (
        "_blocks",
        "_buffers",
        "_copyable",
        "_extensions",
        "_in_use",
        "_next",
        "_objects",
        "_remaining",
        "_used",
        "_views",
        "cache",
        "devices",
        "earlier",
        "limits",
        "types",
    )

    def __init__(
        self,
        tokens: list[Any],
        blocks: Sequence[BlockHandle],
        views: Sequence[Any],
        *,
        limits: DecodeLimits,
        devices: DevicePolicy,
        types: ValueTypes,
    ) -> None:
        self.limits = limits
        self.devices = devices
        self.types = types
        self.cache: dict[Any, Any] = {}
        self.earlier: Sequence[Reader] = ()
        self._blocks = blocks
        self._views = views
        self._used = [False] * len(blocks)
        self._objects: list[Any] = []
        self._extensions: set[int] = set()
        self._in_use: dict[tuple[str, str], DeviceBytes] = {}
        self._remaining = limits.max_tensors
        self._next = iter(tokens).__next__
        count = self._next()
        if type(count) is not int or not 0 <= count <= min(len(tokens) - 1, limits.max_tensors):
            raise ProtocolError(f"a value can't have {count!r:.40} buffers")
        inline = limits.max_inline_bytes
        self._copyable = inline + sum(block.nbytes for block in blocks)
        self._buffers: list[tuple[Any, int, int]] = []
        for _ in range(count):
            buffer = self._read_buffer(self._next())
            self._buffers.append(buffer)
            if type(buffer[0]) is bytearray:
                inline -= buffer[2]
                if inline < 0:
                    raise ProtocolError(f"a value has more than {limits.max_inline_bytes} bytes inline")

    def read(self) -> Any:
        """The value: all tokens, and no others, and each block used; nothing is being copied any more."""
        try:
            return self._read()
        finally:
            for memory in self._in_use.values():
                memory.synchronize()

    def _read(self) -> Any:
        try:
            value = self.node(0)
        except StopIteration:
            raise ProtocolError("a value's tree ends in the middle of the value") from None
        try:
            self._next()
        except StopIteration:
            pass
        else:
            raise ProtocolError("a value's tree goes on behind the value")
        if not all(self._used):
            raise ProtocolError(f"block {self._used.index(False)} was sent with a value that doesn't use it")
        return value

    def node(self, depth: int, hashed: bool = False) -> Any:
        token = self._next()
        kind = type(cast("object", token))
        if kind is list:
            if not token or type(token[0]) is not int:
                raise ProtocolError("a token without a tag")
            handler = _HANDLERS.get(token[0])
            if handler is None:
                handler = _foreign(token[0])
            return handler(self, token, depth, hashed)
        if token is None or kind in (str, int, float, bool, bytes):
            return token
        raise ProtocolError(f"a token of type {kind.__name__}")

    def child(self, depth: int, step: str, hashed: bool = False) -> Any:
        """A part of a value; ``step`` leads to it."""
        try:
            return self.node(depth + 1, hashed)
        except Refusal as refusal:
            refusal.add_step(step)
            raise

    def integer(self) -> int:
        """The next token, which must be an int."""
        token = self._next()
        if type(token) is int:
            return token
        if not is_list(token) or token[:1] != [wire.INT]:
            raise ProtocolError("something else where an int belongs")
        return _read_int(self, token, 0, False)

    def enter(self, depth: int) -> None:
        """A container lies at this depth."""
        if depth >= self.limits.max_depth:
            raise ProtocolError(f"a value nested more than {self.limits.max_depth} levels deep")

    def finish(self, value: Any, hashed: bool = False) -> Any:
        """Number a complete object, unless it is a hashable container inside of a key."""
        if not hashed:
            self._objects.append(value)
        return value

    def count_transfer(self) -> None:
        self._remaining -= 1
        if self._remaining < 0:
            raise ProtocolError(f"a value with more than {self.limits.max_tensors} tensors")

    def buffer(self, index: object, device: tuple[str, str] | None = None) -> tuple[Any, int, int]:
        """A buffer of the tree: a writable object, where in it the buffer starts, and its size in bytes.

        For a tensor of a ``device`` that is here it may be `DeviceBytes` of that device; for nothing else.
        """
        if type(index) is not int or not 0 <= index < len(self._buffers):
            raise InvalidHandle(f"a value has no buffer {index!r:.40}")
        found = self._buffers[index]
        memory = found[0]
        if type(memory) is DeviceBytes:
            if memory.device != device:
                raise InvalidHandle(f"buffer {index} is memory of {memory.device}, and not of {device}")
            self._in_use[memory.device] = memory
        return found

    def copy_out(self, index: object) -> memoryview:
        """A buffer's bytes, to be copied. Honest trees copy none twice, so that none can grow on arrival."""
        memory, start, nbytes = self.buffer(index)
        self._copyable -= nbytes
        if self._copyable < 0:
            raise ProtocolError("a value copies the same bytes more than once")
        return memoryview(memory)[start : start + nbytes]

    def window(
        self, index: object, offset: object, low: int, high: int, device: tuple[str, str] | None = None
    ) -> tuple[Any, int]:
        """The object that holds a buffer, and where in it ``offset`` is.

        Raises `InvalidHandle` unless the bytes from ``low`` to ``high`` from there lie in the buffer.
        """
        memory, start, nbytes = self.buffer(index, device)
        if type(offset) is not int or offset + low < 0 or offset + high > nbytes:
            raise InvalidHandle(f"{low} to {high} from {offset!r:.40} is not inside of {nbytes} bytes")
        return memory, start + offset

    def _read_buffer(self, token: Any) -> tuple[Any, int, int]:
        if type(token) is bytes:
            return bytearray(token), 0, len(token)
        if not is_list_of(int, token) or len(token) != 3:
            raise ProtocolError("a buffer is neither bytes nor a part of a block")
        block, offset, nbytes = cast("list[int]", token)
        if not 0 <= block < len(self._blocks):
            raise InvalidHandle(f"a value has no block {block}")
        if offset < 0 or nbytes <= 0 or offset + nbytes > self._blocks[block].nbytes:
            raise InvalidHandle(f"{nbytes} bytes at {offset} are not inside of {self._blocks[block]}")
        self._used[block] = True
        return self._views[block], offset, nbytes

    def reference(self, index: Any, hashed: bool) -> Any:
        if type(index) is not int or not 0 <= index < len(self._objects):
            raise ProtocolError(f"a reference to object {index!r:.40}, which is none")
        value = self._objects[index]
        if hashed and (type(value) in _HASH_UNSAFE or index in self._extensions):
            raise ProtocolError("a reference to a container inside of a key")
        return value

    def note_extension(self) -> None:
        self._extensions.add(len(self._objects))


def fields(token: Token, count: int) -> list[Any]:
    """The fields behind a token's tag; there must be that many."""
    if len(token) != count + 1:
        raise ProtocolError(f"a token with tag {token[0]} has {count} fields, not {len(token) - 1}")
    return token[1:]


def length(token: Token) -> int:
    (count,) = fields(token, 1)
    if type(count) is not int or count < 0:
        raise ProtocolError(f"a container can't have {count!r:.40} items")
    return count


def _foreign(tag: int) -> ReadHandler:
    handler = None
    if wire.TENSOR <= tag < wire.ARRAY:
        from legion_shm.transport import tensors

        handler = tensors.read_handler(tag)
    elif tag >= wire.ARRAY:
        from legion_shm.transport import codec_arrays

        handler = codec_arrays.read_handler(tag)
    if handler is None:
        raise ProtocolError(f"unknown tag {tag}")
    return handler


def _items(reader: Reader, count: int, depth: int, hashed: bool) -> list[Any]:
    items: list[Any] = []
    node = reader.node
    depth += 1
    try:
        for _ in range(count):
            items.append(node(depth, hashed))  # noqa: PERF401  (the path needs to know how far it came)
    except Refusal as refusal:
        refusal.add_step(f"[{len(items)}]")
        raise
    return items


def _read_list(reader: Reader, token: Token, depth: int, _hashed: bool) -> Any:
    reader.enter(depth)
    return reader.finish(_items(reader, length(token), depth, hashed=False))


def _read_tuple(reader: Reader, token: Token, depth: int, hashed: bool) -> Any:
    reader.enter(depth)
    return reader.finish(tuple(_items(reader, length(token), depth, hashed)), hashed)


def _read_dict(reader: Reader, token: Token, depth: int, _hashed: bool) -> Any:
    reader.enter(depth)
    value: dict[Any, Any] = {} if token[0] == wire.DICT else OrderedDict()
    count = length(token)
    node = reader.node
    for _ in range(count):
        key = node(depth + 1, True)
        try:
            item = node(depth + 1)
        except Refusal as refusal:
            refusal.add_step(f"[{key!r:.60}]" if type(key) in (str, int) else f"[<{type(key).__name__}>]")
            raise
        try:
            value[key] = item
        except Exception as error:  # whatever hashing and comparing keys may raise
            raise ProtocolError(f"a dict's key can't be one: {error!r}") from error
    if len(value) != count:
        raise ProtocolError("a dict has the same key twice")
    return reader.finish(value)


def _read_set(reader: Reader, token: Token, depth: int, hashed: bool) -> Any:
    reader.enter(depth)
    items = _items(reader, length(token), depth, hashed=True)
    try:
        value: Any = set(items) if token[0] == wire.SET else frozenset(items)
    except Exception as error:  # whatever hashing and comparing elements may raise
        raise ProtocolError(f"a set's element can't be one: {error!r}") from error
    if len(value) != len(items):
        raise ProtocolError("a set has the same element twice")
    return reader.finish(value, hashed)


def _read_reference(reader: Reader, token: Token, _depth: int, hashed: bool) -> Any:
    (index,) = fields(token, 1)
    return reader.reference(index, hashed)


def _read_elsewhere(reader: Reader, token: Token, _depth: int, hashed: bool) -> Any:
    number, index = fields(token, 2)
    if type(number) is not int or not 0 <= number < len(reader.earlier):
        raise ProtocolError(f"a reference to value {number!r:.40} of a message, which is none")
    return reader.earlier[number].reference(index, hashed)


def _read_int(_reader: Reader, token: Token, _depth: int, _hashed: bool) -> int:
    (payload,) = fields(token, 1)
    if type(payload) is not bytes:
        raise ProtocolError("a long int without its bytes")
    return int.from_bytes(payload, "little", signed=True)


def _read_complex(_reader: Reader, token: Token, _depth: int, _hashed: bool) -> Any:
    real, imag = fields(token, 2)
    if type(real) is not float or type(imag) is not float:
        raise ProtocolError("a complex number of something else than two floats")
    return complex(real, imag)


def _read_range(reader: Reader, token: Token, _depth: int, _hashed: bool) -> Any:
    fields(token, 0)
    start, stop, step = [reader.integer() for _ in range(3)]
    if not step:
        raise ProtocolError("a range with steps of 0")
    return range(start, stop, step)


def _read_slice(reader: Reader, token: Token, depth: int, hashed: bool) -> Any:
    reader.enter(depth)
    fields(token, 0)
    start, stop, step = [reader.child(depth, f".{name}", hashed) for name in ("start", "stop", "step")]
    return reader.finish(slice(start, stop, step), hashed)


def _read_payload(reader: Reader, token: Token, _depth: int, _hashed: bool) -> Any:
    (index,) = fields(token, 1)
    if token[0] == wire.BYTEARRAY and type(index) is bytes:
        return reader.finish(bytearray(index))
    reader.count_transfer()
    payload = reader.copy_out(index)
    if token[0] == wire.BYTEARRAY:
        return reader.finish(bytearray(payload))
    text = bytes(payload)
    if token[0] == wire.BYTES:
        return reader.finish(text)
    try:
        return reader.finish(text.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as error:
        raise ProtocolError(f"a text is not UTF-8: {error}") from error


def _read_extension(reader: Reader, token: Token, depth: int, hashed: bool) -> Any:
    reader.enter(depth)
    (name,) = fields(token, 1)
    if type(name) is not str:
        raise ProtocolError("a class without a name")
    value_type = _known(reader, name)
    if hashed and not value_type.hashable:
        raise ProtocolError(f"{name:.100}: what has a hash of its own can't be in a key or a set")
    try:
        state = reader.node(depth + 1, hashed)
    except Refusal as refusal:
        refusal.rename_step(value_type.step)
        raise
    try:
        value = value_type.rebuild(state)
    except UnsupportedValue as error:
        raise Refusal(str(error)) from error
    except Exception as error:
        raise ProtocolError(f"{name}: what was sent makes no {value_type.cls.__name__}: {error!r}") from error
    if type(value) is not value_type.cls and value_type.cls is not object:
        raise ProtocolError(f"{name}: rebuilding gave a {type(value).__name__}")
    if not hashed:
        reader.note_extension()
    return reader.finish(value, hashed)


def _known(reader: Reader, name: str) -> ValueType:
    types = reader.types
    try:
        found = types.by_name(name)
        reason = f"no codec of that name is registered in {types.place}"
    except LookupError as error:
        found, reason = None, f"{types.place} can't rebuild it: {error}"
    if found is None:
        raise Refusal(
            f"{name!r:.200} was sent, but {reason}; install the package (or load the module) that has this "
            "class and its codec there too, e.g. by WorkerSpec.codec_modules"
        )
    return found


_HANDLERS: dict[int, ReadHandler] = {
    wire.LIST: _read_list,
    wire.TUPLE: _read_tuple,
    wire.DICT: _read_dict,
    wire.ORDERED_DICT: _read_dict,
    wire.SET: _read_set,
    wire.FROZENSET: _read_set,
    wire.REFERENCE: _read_reference,
    wire.INT: _read_int,
    wire.COMPLEX: _read_complex,
    wire.RANGE: _read_range,
    wire.SLICE: _read_slice,
    wire.BYTES: _read_payload,
    wire.BYTEARRAY: _read_payload,
    wire.STR: _read_payload,
    wire.EXTENSION: _read_extension,
    wire.ELSEWHERE: _read_elsewhere,
}
