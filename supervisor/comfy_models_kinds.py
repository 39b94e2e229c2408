"""How values of known kinds stand in a plan: leaves, containers, functions, tensors, arrays.

Owns the tables in which `comfy_models_plan` looks up a value's exact class; it never walks by itself, and
objects of other classes are the plan's own. A further kind is an entry here, a number in
`comfy_models_format` and a reader in `comfy_models_build`.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from legion_shm.errors import UnsupportedValue
from legion_shm.supervisor.comfy_models_format import Tag

if TYPE_CHECKING:
    from legion_shm.supervisor.comfy_models_plan import PlanWriter

__all__ = ["LEAVES", "WRITERS", "Fields", "Writer", "kind_of"]

Writer = Callable[["PlanWriter", Any], Any]


class Fields(dict[str, Any]):
    """A dict that stands for an object's attributes, and is so named in errors."""


def kind_of(value: object) -> type[Any]:
    return type(value)


def _int(value: int) -> Any:
    if -(2**63) <= value < 2**64:
        return value
    return [Tag.INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)]


def _text_of(tag: Tag) -> Callable[[Any], Any]:
    return lambda value: [tag, str(value).removeprefix("torch.")]


LEAVES: dict[type, Callable[[Any], Any]] = {
    int: _int,
    complex: lambda value: [Tag.COMPLEX, value.real, value.imag],
    range: lambda value: [Tag.RANGE, value.start, value.stop, value.step],
    type(Ellipsis): lambda _value: [Tag.ELLIPSIS],
    torch.dtype: _text_of(Tag.DTYPE),
    torch.layout: _text_of(Tag.LAYOUT),
    torch.memory_format: _text_of(Tag.LAYOUT),
    torch.Size: lambda value: [Tag.SIZE, *value],
}
"""What has no identity worth keeping."""


def _list(writer: PlanWriter, value: list[Any]) -> Any:
    return [Tag.LIST, *writer.items(value)]


def _tuple(writer: PlanWriter, value: tuple[Any, ...]) -> Any:
    return writer.closed(value, lambda: [Tag.TUPLE, *writer.items(value)])


def _dict(writer: PlanWriter, value: dict[Any, Any]) -> Any:
    return [Tag.DICT, *writer.pairs(value)]


def _ordered_dict(writer: PlanWriter, value: dict[Any, Any]) -> Any:
    return [Tag.ORDERED_DICT, *writer.pairs(value)]


def _set(writer: PlanWriter, value: set[Any]) -> Any:
    return writer.closed(value, lambda: [Tag.SET, *writer.items(value)])


def _frozenset(writer: PlanWriter, value: frozenset[Any]) -> Any:
    return writer.closed(value, lambda: [Tag.FROZENSET, *writer.items(value)])


def _slice(writer: PlanWriter, value: Any) -> Any:
    return writer.closed(value, lambda: [Tag.SLICE, *writer.items((value.start, value.stop, value.step))])


def _bytearray(_writer: PlanWriter, value: bytearray) -> Any:
    return [Tag.BYTEARRAY, bytes(value)]


def _function(writer: PlanWriter, value: Any) -> Any:
    named = writer.names.named(value)
    if named is not None:
        return [Tag.NAMED, *named]
    if not isinstance(value, types.FunctionType):
        raise UnsupportedValue(f"the native function {value!r:.100} is not found by its name", path="")
    code = writer.names.code_of(value)
    function = value

    def write() -> Any:
        path = f".{function.__name__}"
        fixed = writer.part(function.__defaults__, path), writer.part(function.__kwdefaults__, path)
        cells = [
            writer.part(cell, f"{path}.{name}")
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        ]
        state = writer.named_parts(vars(function))
        return [Tag.CODE, *code, function.__name__, function.__qualname__, *fixed, cells, state]

    return writer.closed(function, write)


def _cell(writer: PlanWriter, value: types.CellType) -> Any:
    try:
        content = value.cell_contents
    except ValueError:  # empty
        return [Tag.CELL]
    return [Tag.CELL, writer.cell(content)]


def _method(writer: PlanWriter, value: types.MethodType) -> Any:
    return writer.closed(
        value, lambda: [Tag.METHOD, writer.part(value.__func__, ""), writer.part(value.__self__, ".__self__")]
    )


def _partial(writer: PlanWriter, value: Any) -> Any:
    return writer.closed(
        value,
        lambda: [Tag.PARTIAL, writer.part(value.func, ".func"), *writer.items((value.args, value.keywords))],
    )


def _module(writer: PlanWriter, value: types.ModuleType) -> Any:
    name = writer.names.module_name(value.__name__)
    if not writer.names.allows(name):
        raise UnsupportedValue(
            f"the module {value.__name__} is not of a package that models may use", path=""
        )
    return [Tag.MODULE, name]


def _tensor(writer: PlanWriter, value: torch.Tensor) -> Any:
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise UnsupportedValue("this tensor is sparse, quantized or nested", path="")
    if value.requires_grad and not value.is_leaf:
        raise UnsupportedValue("this tensor is part of a graph of gradients; detach() it", path="")
    writer.tensors.append(value)
    number = len(writer.tensors) - 1
    return [Tag.TENSOR, number, writer.named_parts(writer.adapter.attributes(value, vars(value)))]


def _array(_writer: PlanWriter, value: Any) -> Any:
    if value.dtype.hasobject:
        raise UnsupportedValue("this array holds Python objects", path="")
    return [Tag.NDARRAY, value.dtype.str, list(value.shape), value.tobytes()]


def _wrapped(tag: Tag) -> Writer:
    return lambda writer, value: writer.closed(value, lambda: [tag, writer.part(value.__func__, "")])


def _property(writer: PlanWriter, value: property) -> Any:
    return writer.closed(value, lambda: [Tag.PROPERTY, *writer.items((value.fget, value.fset, value.fdel))])


def _default_dict(writer: PlanWriter, value: Any) -> Any:
    return [Tag.DEFAULT_DICT, writer.part(value.default_factory, ".default_factory"), *writer.pairs(value)]


def _deque(writer: PlanWriter, value: Any) -> Any:
    return [Tag.DEQUE, value.maxlen, *writer.items(value)]


WRITERS: dict[type, Writer] = {
    list: _list,
    tuple: _tuple,
    dict: _dict,
    collections.OrderedDict: _ordered_dict,
    collections.defaultdict: _default_dict,
    Fields: lambda writer, value: [Tag.DICT, *writer.named_parts(value)],
    collections.deque: _deque,
    set: _set,
    frozenset: _frozenset,
    slice: _slice,
    bytearray: _bytearray,
    types.FunctionType: _function,
    types.BuiltinFunctionType: _function,
    types.CellType: _cell,
    types.MethodType: _method,
    functools.partial: _partial,
    types.ModuleType: _module,
    torch.Tensor: _tensor,
    torch.nn.Parameter: _tensor,
    np.ndarray: _array,
    staticmethod: _wrapped(Tag.STATIC),
    classmethod: _wrapped(Tag.CLASSMETHOD),
    property: _property,
}
"""What is one object on the other side however often it comes: by its exact class."""
