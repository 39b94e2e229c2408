"""How a plan becomes a live object again: the receiving side of `comfy_models_plan`.

    tokens + tensors + packages ── PlanReader ──▶ object

A plan comes from a peer, which may be broken. So classes and functions come from the allow-list only, nothing
of them is called but what makes blank instances (`object.__new__`, `torch.nn.Module.__init__`), and what is
malformed is a ValueError. What arrives is data of installed classes, as trustworthy as the peer that sent it.
"""

# ComfyUI's and torch's objects have no types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgpack
import numpy as np
import torch

from legion_shm.supervisor.comfy_models_format import Tag
from legion_shm.supervisor.comfy_models_names import Names

__all__ = ["PlanReader"]


class _Missing:
    """In place of an object that is not complete yet."""


_MISSING: Any = _Missing()


class PlanReader:
    """One reading. ``special(name, state)`` rebuilds what has a way of its own, ``package(key)`` gives one.

    Raises ValueError for a malformed plan, LookupError for what this process doesn't have.
    """

    def __init__(
        self,
        names: Names,
        tensors: Sequence[torch.Tensor],
        *,
        package: Callable[[str], object],
        special: Callable[[str, Any], object],
    ) -> None:
        self.names = names
        self.tensors = tensors
        self.package = package
        self.special = special
        self.objects: list[Any] = []
        self._waiting: dict[int, list[types.CellType]] = {}

    def read(self, plan: bytes) -> Any:
        try:
            token = msgpack.unpackb(plan, unicode_errors="surrogatepass", strict_map_key=True)
        except Exception as error:
            raise ValueError(f"not a plan: {error}") from error
        try:
            return self.node(token)
        except (TypeError, IndexError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"a malformed plan: {error!r}") from error

    def node(self, token: Any) -> Any:
        if type(token) is not list:
            return token
        return _READERS[token[0]](self, token)

    def new(self, value: Any = _MISSING) -> int:
        """Number an object, as the writer did when it began to write it."""
        self.objects.append(value)
        return len(self.objects) - 1

    def done(self, number: int, value: Any) -> Any:
        self.objects[number] = value
        for cell in self._waiting.pop(number, ()):
            cell.cell_contents = value
        return value

    def items(self, tokens: Sequence[Any]) -> list[Any]:
        return [token if type(token) is not list else self.node(token) for token in tokens]

    def fill(self, target: dict[Any, Any], tokens: Sequence[Any]) -> None:
        """Pairs of keys and values."""
        node = self.node
        pairs = iter(tokens)
        for key, value in zip(pairs, pairs, strict=True):
            found = key if type(key) is not list else node(key)
            target[found] = value if type(value) is not list else node(value)

    def attributes(self, tokens: Sequence[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.fill(found, tokens)
        if not all(type(name) is str for name in found):
            raise ValueError("an attribute's name is not a text")
        return found

    def kind(self, token: Any) -> type:
        found = self.node(token)
        if not isinstance(found, type):
            raise ValueError(f"{found!r:.60} is not a class")
        return found

    def set_attributes(self, value: object, attributes: dict[str, Any]) -> None:
        space = cast("dict[str, Any] | None", getattr(value, "__dict__", None))
        for name, item in attributes.items():
            slot = next((vars(base)[name] for base in type(value).__mro__ if name in vars(base)), None)
            if type(slot) is types.MemberDescriptorType:
                slot.__set__(value, item)
            elif space is not None:
                space[name] = item
            else:
                raise ValueError(f"{type(value).__name__} has no attribute {name!r:.60}")

    def wait_for(self, number: int, cell: types.CellType) -> None:
        self._waiting.setdefault(number, []).append(cell)


Reading = Callable[[PlanReader, list[Any]], Any]


def _ref(reader: PlanReader, token: list[Any]) -> Any:
    found = reader.objects[token[1]]
    if found is _MISSING:
        raise ValueError("a reference to an object that is not complete")
    return found


def _list(reader: PlanReader, token: list[Any]) -> Any:
    value: list[Any] = []
    reader.new(value)
    value.extend(reader.items(token[1:]))
    return value


def _tuple(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    return reader.done(number, tuple(reader.items(token[1:])))


def _dict(reader: PlanReader, token: list[Any]) -> Any:
    value: dict[Any, Any] = {} if token[0] == Tag.DICT else collections.OrderedDict()
    reader.new(value)
    reader.fill(value, token[1:])
    return value


def _default_dict(reader: PlanReader, token: list[Any]) -> Any:
    value: Any = collections.defaultdict()
    reader.new(value)
    value.default_factory = reader.node(token[1])
    reader.fill(value, token[2:])
    return value


def _deque(reader: PlanReader, token: list[Any]) -> Any:
    value: Any = collections.deque(maxlen=token[1])
    reader.new(value)
    value.extend(reader.items(token[2:]))
    return value


def _set(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    return reader.done(number, set(reader.items(token[1:])))


def _frozenset(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    return reader.done(number, frozenset(reader.items(token[1:])))


def _slice(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    return reader.done(number, slice(*reader.items(token[1:])))


def _bytearray(reader: PlanReader, token: list[Any]) -> Any:
    value = bytearray(token[1])
    reader.new(value)
    return value


def _named(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    _, module, qualname = token
    return reader.done(number, reader.names.find(module, qualname))


def _code(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    _, module, digest, name, qualname, defaults, keywords, cells, state = token
    code, namespace = reader.names.code(module, digest)
    fixed = reader.node(defaults)
    named = reader.node(keywords)
    closure = tuple(reader.items(cells))
    if len(closure) != len(code.co_freevars) or not all(type(cell) is types.CellType for cell in closure):
        raise ValueError(f"{name!r:.60} lacks what its closure held")
    function = types.FunctionType(code, namespace, name, fixed, closure or None)
    function.__kwdefaults__ = named
    function.__qualname__ = qualname
    reader.done(number, function)
    vars(function).update(reader.attributes(state))
    return function


def _cell(reader: PlanReader, token: list[Any]) -> Any:
    cell = types.CellType()
    reader.new(cell)
    if len(token) > 1:
        content = token[1]
        if type(content) is list and content[0] == Tag.REF and reader.objects[content[1]] is _MISSING:
            reader.wait_for(content[1], cell)
        else:
            cell.cell_contents = reader.node(content)
    return cell


def _class(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    _, module, name, qualname, bases, space = token
    loaded = reader.names.module(module)
    found = tuple(reader.kind(base) for base in bases)
    namespace = reader.attributes(space)
    if type(name) is not str or any(type(base) is not type for base in found):
        raise ValueError("a class of another kind than type")
    made = type(name, found, {**namespace, "__module__": loaded.__name__, "__qualname__": qualname})
    return reader.done(number, made)


def _method(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    function = reader.node(token[1])
    if not isinstance(function, types.FunctionType):
        raise ValueError("a method of something else than a function")
    return reader.done(number, types.MethodType(function, reader.node(token[2])))


def _partial(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    function, arguments, keywords = reader.items(token[1:])
    return reader.done(number, functools.partial(function, *arguments, **keywords))


def _module(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    return reader.done(number, reader.names.module(token[1]))


def _tensor(reader: PlanReader, token: list[Any]) -> Any:
    value = reader.tensors[token[1]]
    reader.new(value)
    vars(value).update(reader.attributes(token[2]))
    return value


def _torch_name(kind: type | tuple[type, ...]) -> Reading:
    def read(_reader: PlanReader, token: list[Any]) -> Any:
        found = vars(torch).get(token[1])
        if not isinstance(found, kind):
            raise LookupError(f"this torch has no torch.{token[1]:.40}")
        return found

    return read


def _array(reader: PlanReader, token: list[Any]) -> Any:
    _, dtype, shape, payload = token
    kind: Any = np.dtype(dtype)
    if kind.hasobject:
        raise ValueError("an array of Python objects")
    value: Any = np.frombuffer(bytearray(payload), dtype=kind).reshape(shape)
    reader.new(value)
    return value


def _enum(reader: PlanReader, token: list[Any]) -> Any:
    import enum

    number = reader.new()
    kind = reader.kind(token[1])
    if not issubclass(kind, enum.Enum) or token[2] not in kind.__members__:
        raise LookupError(f"{kind.__name__} has no member {token[2]!r:.60}")
    return reader.done(number, kind.__members__[token[2]])


def _object(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    kind = reader.kind(token[1])
    value: Any = object.__new__(kind)
    reader.done(number, value)
    reader.set_attributes(value, reader.attributes(token[2]))
    return value


def _torch_module(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    _, head, training, attributes, parameters, buffers, not_saved, modules = token
    kind = reader.kind(head)
    if not issubclass(kind, torch.nn.Module):
        raise ValueError(f"{kind.__name__} is no torch module")
    value: Any = object.__new__(kind)
    torch.nn.Module.__init__(value)
    reader.done(number, value)
    space: dict[str, Any] = vars(value)
    space["training"] = training
    space.update(reader.attributes(attributes))
    space["_parameters"].update(reader.attributes(parameters))
    space["_buffers"].update(reader.attributes(buffers))
    space["_non_persistent_buffers_set"].update(not_saved)
    space["_modules"].update(reader.attributes(modules))
    return value


def _container(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    _, head, items, attributes = token
    kind: Any = reader.kind(head)
    if issubclass(kind, tuple):
        make: Any = tuple.__new__
        return reader.done(number, make(kind, reader.items(items)))
    base: Any = next((base for base in (collections.OrderedDict, dict, list) if issubclass(kind, base)), None)
    if base is None:
        raise ValueError(f"{kind.__name__} is no container")
    value: Any = base.__new__(kind)
    reader.done(number, value)
    if base is list:
        base.extend(value, reader.items(items))
    else:
        found: dict[Any, Any] = {}
        reader.fill(found, items)
        for key, item in found.items():
            base.__setitem__(value, key, item)
    reader.set_attributes(value, reader.attributes(attributes))
    return value


def _wrapped(kind: Callable[[Any], Any]) -> Reading:
    def read(reader: PlanReader, token: list[Any]) -> Any:
        number = reader.new()
        return reader.done(number, kind(reader.node(token[1])))

    return read


def _property(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    return reader.done(number, property(*reader.items(token[1:])))


def _package(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    return reader.done(number, reader.package(token[1]))


def _special(reader: PlanReader, token: list[Any]) -> Any:
    number = reader.new()
    return reader.done(number, reader.special(token[1], reader.node(token[2])))


_READERS: dict[int, Reading] = {
    Tag.REF: _ref,
    Tag.LIST: _list,
    Tag.TUPLE: _tuple,
    Tag.DICT: _dict,
    Tag.ORDERED_DICT: _dict,
    Tag.DEFAULT_DICT: _default_dict,
    Tag.DEQUE: _deque,
    Tag.SET: _set,
    Tag.FROZENSET: _frozenset,
    Tag.SLICE: _slice,
    Tag.BYTEARRAY: _bytearray,
    Tag.INT: lambda _reader, token: int.from_bytes(token[1], "little", signed=True),
    Tag.COMPLEX: lambda _reader, token: complex(token[1], token[2]),
    Tag.RANGE: lambda _reader, token: range(*token[1:]),
    Tag.ELLIPSIS: lambda _reader, _token: Ellipsis,
    Tag.NAMED: _named,
    Tag.CODE: _code,
    Tag.CELL: _cell,
    Tag.CLASS: _class,
    Tag.METHOD: _method,
    Tag.PARTIAL: _partial,
    Tag.MODULE: _module,
    Tag.TENSOR: _tensor,
    Tag.DTYPE: _torch_name(torch.dtype),
    Tag.LAYOUT: _torch_name((torch.layout, torch.memory_format)),
    Tag.SIZE: lambda _reader, token: torch.Size(token[1:]),
    Tag.NDARRAY: _array,
    Tag.ENUM: _enum,
    Tag.OBJECT: _object,
    Tag.TORCH_MODULE: _torch_module,
    Tag.CONTAINER: _container,
    Tag.STATIC: _wrapped(staticmethod),
    Tag.CLASSMETHOD: _wrapped(classmethod),
    Tag.PROPERTY: _property,
    Tag.PACKAGE: _package,
    Tag.SPECIAL: _special,
}
