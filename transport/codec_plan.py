"""The first half of encoding: walk a whole value, refuse what can't travel, and write its tokens.

    value ── Planner.node() ──▶ tokens (buffers still open) + regions of memory

Nothing is reserved or copied here, so a refusal costs nothing but the walk. Classes are matched
exactly: a subclass of a builtin would arrive as something else and is refused by name. Owns Python's
own types; numpy's are codec_arrays.py's, torch's tensors.py's.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from legion_shm.errors import LegionError
from legion_shm.transport import codec_wire as wire
from legion_shm.transport.codec_layout import Region
from legion_shm.transport.codec_registry import ValueType, ValueTypes, class_name
from legion_shm.transport.codec_types import DecodeLimits, DevicePolicy
from legion_shm.transport.codec_wire import Refusal, Token

__all__ = ["Handler", "Planner", "library_handler", "load_handlers"]

Handler = Callable[["Planner", Any, int, bool], None]

_UNFINISHED = -1
_BASES = (str, bytes, bytearray, int, float, complex, tuple, list, OrderedDict, dict, set, frozenset)


class Planner:
    """One walk over one value.

    A handler is called with the planner, the value, how deep the value lies, and whether it is part of
    a dict's key or a set's element. There, containers are written out each time: a reference
    to a hashable container could make the receiver hash exponentially often.
    """

    __slots__ = (
        "_alive",
        "_max_depth",
        "_seen",
        "devices",
        "elsewhere",
        "finished",
        "inline_max_bytes",
        "limits",
        "noted",
        "regions",
        "tensors",
        "tokens",
        "transfers",
        "types",
        "uses",
    )

    def __init__(
        self,
        *,
        inline_max_bytes: int,
        max_depth: int,
        limits: DecodeLimits,
        devices: DevicePolicy,
        types: ValueTypes,
    ) -> None:
        self.tokens: list[Any] = []
        self.regions: list[Region] = []
        self.tensors = 0
        self.transfers = 0
        self.inline_max_bytes = inline_max_bytes
        self.limits = limits
        self.devices = devices
        self.types = types
        self._max_depth = max_depth
        self._seen: dict[int, int] = {}
        self._alive: list[object] = []
        self.finished = 0
        self.noted: list[object] = []
        self.elsewhere: Mapping[int, tuple[int, int]] = {}
        self.uses: set[int] = set()

    def node(self, value: object, depth: int, hashed: bool = False) -> None:
        kind = type(value)
        if value is None or kind is bool or kind is float:
            self.tokens.append(value)
            return
        handler = _HANDLERS.get(kind)
        if handler is None:
            handler = self.foreign(kind)
        handler(self, value, depth, hashed)

    def child(self, value: object, depth: int, step: str, hashed: bool = False) -> None:
        """A part of a value that ``step`` leads to."""
        try:
            self.node(value, depth + 1, hashed)
        except Refusal as refusal:
            refusal.add_step(step)
            raise

    def begin(self, value: object, depth: int, *, by_identity: bool = True) -> bool:
        """Start on a container; False when it is done, by reference to an earlier one."""
        self.check_depth(depth)
        self.finish()
        return not by_identity or self.begin_leaf(value)

    def check_depth(self, depth: int) -> None:
        if depth >= self._max_depth:
            raise Refusal(f"nested more than {self._max_depth} levels deep; send a flatter value")

    def begin_leaf(self, value: object) -> bool:
        """The same for what has an identity and holds no items."""
        index = self._seen.get(id(value))
        if index is None:
            elsewhere = self.elsewhere.get(id(value)) if self.elsewhere else None
            if elsewhere is not None:
                self.uses.add(elsewhere[0])
                self.tokens.append([wire.ELSEWHERE, *elsewhere])
                return False
            self._seen[id(value)] = _UNFINISHED
            self._alive.append(value)
            return True
        if index == _UNFINISHED:
            raise Refusal(f"this {type(value).__name__} contains itself; a cycle can't be sent")
        self.tokens.append([wire.REFERENCE, index])
        return False

    def end(self, value: object) -> None:
        """What `begin` or `begin_leaf` started by identity is complete."""
        self._seen[id(value)] = self.finished
        self.finished += 1

    def objects(self) -> tuple[Mapping[int, int], object]:
        """The numbers of the value's objects by their identities, and what keeps those alive."""
        return self._seen, self._alive

    def hold(self, value: object) -> None:
        """Keep a temporary alive, so that its identity is its own."""
        self._alive.append(value)

    def add_region(self, region: Region) -> None:
        self.regions.append(region)

    def count_transfer(self) -> None:
        self.transfers += 1
        if self.transfers > self.limits.max_tensors:
            raise Refusal(f"more than {self.limits.max_tensors} tensors in one value; stack some of them")

    def finish(self) -> None:
        """Refuse a value with more items than a receiver takes."""
        if len(self.tokens) > self.limits.max_items:
            raise Refusal(f"more than {self.limits.max_items} items in one value; send an array or a tensor")

    def foreign(self, kind: type) -> Handler:
        """How to plan a value of a class that is none of Python's plain ones, or a refusal."""
        if self.types.exact(kind) is not None:
            return _plan_extension
        handler = library_handler(kind)
        if handler is None:
            try:
                known = self.types.by_class(kind)
            except LookupError as error:
                raise Refusal(str(error)) from None
            if known is None:
                raise Refusal(_reason(kind))
            handler = _plan_extension
        return handler


_library: dict[type, Handler] = {}


def library_handler(kind: type) -> Handler | None:
    """How torch's or numpy's own classes are planned. One exists only where its library is loaded."""
    handler = _library.get(kind)
    if handler is None and "torch" in sys.modules:
        from legion_shm.transport import tensors

        handler = tensors.plan_handler(kind)
    if handler is None and "numpy" in sys.modules:
        from legion_shm.transport import codec_arrays

        handler = codec_arrays.plan_handler(kind)
    if handler is not None:
        _library[kind] = handler
    return handler


def load_handlers() -> None:
    """Load now what the first tensor or array would load (3 ms), of libraries that are there already."""
    if "torch" in sys.modules:
        importlib.import_module("legion_shm.transport.tensors")
    if "numpy" in sys.modules:
        importlib.import_module("legion_shm.transport.codec_arrays")


_PLAINER = {
    "MaskedArray": "pass its .data and its .mask",
    "Tensor": "pass .as_subclass(torch.Tensor) or its parts",
    "ndarray": "pass numpy.asarray(...)",
}


def _reason(kind: type) -> str:
    name = class_name(kind)
    advice = "register a codec for it in both processes (legion_shm.register_codec)"
    if type in kind.__mro__:
        return f"{name} has no codec: a class can't be sent; send its name, or an instance of it"
    if kind is memoryview:
        return f"{name} has no codec; send bytes(...) or numpy.asarray(...) of it"
    for base in kind.__mro__[1:]:
        if base in _BASES or base.__name__ in _PLAINER:
            own = _PLAINER.get(kind.__name__, _PLAINER.get(base.__name__))
            plainer = own or f"pass {base.__name__}(...)"
            return (
                f"{name} is a subclass of {class_name(base)} and would arrive as a plain one; "
                f"{plainer}, or {advice}"
            )
    return (
        f"{name} has no codec; send plain data (numbers, texts, lists, dicts, arrays, tensors, dataclasses), "
        f"or {advice}"
    )


def _short(key: object) -> str:
    kind = type(key)
    if kind in (str, bytes, int, float, bool, tuple) or key is None:
        try:
            text = repr(key)
        except ValueError:  # an int with more digits than Python converts
            return f"<{kind.__name__}>"
        return text if len(text) <= 60 else text[:57] + "..."
    return f"<{kind.__name__}>"


def _plan_int(planner: Planner, value: int, _depth: int, _hashed: bool) -> None:
    if wire.INT_MIN <= value <= wire.INT_MAX:
        planner.tokens.append(value)
    else:
        nbytes = value.bit_length() // 8 + 1
        planner.tokens.append([wire.INT, value.to_bytes(nbytes, "little", signed=True)])


def _plan_complex(planner: Planner, value: complex, _depth: int, _hashed: bool) -> None:
    planner.tokens.append([wire.COMPLEX, value.real, value.imag])


def _plan_str(planner: Planner, value: str, _depth: int, _hashed: bool) -> None:
    if len(value) * 4 > planner.inline_max_bytes:
        payload = value.encode("utf-8", "surrogatepass")
        if len(payload) > planner.inline_max_bytes:
            if planner.begin_leaf(value):
                _add_bytes(planner, [wire.STR, None], payload)
                planner.end(value)
            return
    planner.tokens.append(value)


def _plan_bytes(planner: Planner, value: bytes, _depth: int, _hashed: bool) -> None:
    if len(value) > planner.inline_max_bytes:
        if planner.begin_leaf(value):
            _add_bytes(planner, [wire.BYTES, None], value)
            planner.end(value)
    else:
        planner.tokens.append(value)


def _plan_bytearray(planner: Planner, value: bytearray, _depth: int, _hashed: bool) -> None:
    if not planner.begin_leaf(value):
        return
    if len(value) > planner.inline_max_bytes:
        _add_bytes(planner, [wire.BYTEARRAY, None], value)
    else:
        planner.tokens.append([wire.BYTEARRAY, bytes(value)])
    planner.end(value)


class _BytesRegion(Region):
    """The payload of a long byte string or text. ``source`` keeps it alive and where it is."""

    __slots__ = ()

    def place(self, buffer: int, offset: int) -> None:
        del offset
        self.token[1] = buffer


def _add_bytes(planner: Planner, token: Token, payload: bytes | bytearray) -> None:
    planner.count_transfer()
    source: object = payload
    if isinstance(payload, bytearray):
        # The export keeps a bytearray from being resized, and so moved, until the value is encoded.
        source = ctypes.c_char.from_buffer(payload)
        address = ctypes.addressof(source)
    else:
        address = cast("int", ctypes.cast(ctypes.c_char_p(payload), ctypes.c_void_p).value)
    nbytes = len(payload)
    planner.tokens.append(token)
    planner.add_region(
        _BytesRegion(
            source,
            token,
            address=address,
            shape=(nbytes,),
            strides=(1,),
            itemsize=1,
            isolated=True,
        )
    )


def _plan_items(planner: Planner, items: Sequence[object], depth: int, hashed: bool) -> None:
    # Most items of long values are leaves: one call less for each takes a tenth off the whole walk.
    append = planner.tokens.append
    index = 0
    try:
        for index, item in enumerate(items):  # noqa: B007
            kind = type(item)
            if item is None or kind is float or kind is bool:
                append(item)
            else:
                handler = _HANDLERS.get(kind) or planner.foreign(kind)
                handler(planner, item, depth + 1, hashed)
    except Refusal as refusal:
        refusal.add_step(f"[{index}]")
        raise


def _plan_list(planner: Planner, value: list[object], depth: int, _hashed: bool) -> None:
    if planner.begin(value, depth):
        items = tuple(value)
        planner.tokens.append([wire.LIST, len(items)])
        _plan_items(planner, items, depth, hashed=False)
        planner.end(value)


def _plan_tuple(planner: Planner, value: tuple[object, ...], depth: int, hashed: bool) -> None:
    if planner.begin(value, depth, by_identity=not hashed):
        planner.tokens.append([wire.TUPLE, len(value)])
        _plan_items(planner, value, depth, hashed)
        if not hashed:
            planner.end(value)


def _plan_dict(planner: Planner, value: dict[object, object], depth: int, _hashed: bool) -> None:
    if not planner.begin(value, depth):
        return
    items = tuple(value.items())
    append = planner.tokens.append
    append([wire.DICT if type(value) is dict else wire.ORDERED_DICT, len(items)])
    key: object = None
    try:
        for key, item in items:
            if type(key) is str:
                _plan_str(planner, key, depth, True)
            else:
                planner.child(key, depth, "<key>", hashed=True)
            kind = type(item)
            if item is None or kind is float or kind is bool:
                append(item)
            else:
                handler = _HANDLERS.get(kind) or planner.foreign(kind)
                handler(planner, item, depth + 1, False)
    except Refusal as refusal:
        refusal.add_step(f"[{_short(key)}]")
        raise
    planner.end(value)


def _plan_set(planner: Planner, value: set[object] | frozenset[object], depth: int, hashed: bool) -> None:
    if not planner.begin(value, depth, by_identity=not hashed):
        return
    tokens = planner.tokens
    finished = planner.finished
    parts: list[list[Any]] = []
    for item in value:
        planner.tokens = []
        planner.child(item, depth, f"<element {_short(item)}>", hashed=True)
        parts.append(planner.tokens)
    planner.tokens = tokens
    if planner.finished == finished and len(parts) > 1:
        # Equal sets may iterate differently; the order of their tokens is made the same.
        parts.sort(key=wire.pack_token)
    tokens.append([wire.SET if type(value) is set else wire.FROZENSET, len(parts)])
    for part in parts:
        tokens.extend(part)
    if not hashed:
        planner.end(value)


def _plan_range(planner: Planner, value: range, depth: int, _hashed: bool) -> None:
    planner.tokens.append([wire.RANGE])
    for part in (value.start, value.stop, value.step):
        _plan_int(planner, part, depth, True)


def _plan_slice(planner: Planner, value: Any, depth: int, hashed: bool) -> None:
    if planner.begin(value, depth, by_identity=not hashed):
        planner.tokens.append([wire.SLICE])
        for name in ("start", "stop", "step"):
            planner.child(getattr(value, name), depth, f".{name}", hashed)
        if not hashed:
            planner.end(value)


def _plan_extension(planner: Planner, value: object, depth: int, hashed: bool) -> None:
    if not planner.begin(value, depth, by_identity=not hashed):
        return
    value_type = planner.types.by_class(type(value))
    assert value_type is not None
    if hashed and not value_type.hashable:
        raise Refusal(f"{class_name(type(value))} has a hash of its own, and can't be in a key or in a set")
    if value_type.noted:
        planner.noted.append(value)
    planner.tokens.append([wire.EXTENSION, value_type.name])
    state = _reduced(value_type, value)
    planner.hold(state)
    try:
        planner.node(state, depth + 1, hashed)
    except Refusal as refusal:
        refusal.rename_step(value_type.step)
        raise
    if not hashed:
        planner.end(value)


def _reduced(value_type: ValueType, value: object) -> object:
    try:
        return value_type.reduce(value)
    except Refusal:
        raise
    except LegionError as error:
        raise Refusal(str(error)) from error
    except Exception as error:
        raise Refusal(f"this {class_name(type(value))} can't be sent: {error}") from error


_HANDLERS: dict[type, Handler] = {
    int: _plan_int,
    complex: _plan_complex,
    str: _plan_str,
    bytes: _plan_bytes,
    bytearray: _plan_bytearray,
    list: _plan_list,
    tuple: _plan_tuple,
    dict: _plan_dict,
    OrderedDict: _plan_dict,
    set: _plan_set,
    frozenset: _plan_set,
    range: _plan_range,
    slice: _plan_slice,
}
