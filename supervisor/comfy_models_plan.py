"""How a live object is written as a plan: plain data that says how to make its equal in another process.

    object ── PlanWriter ──▶ tokens (MessagePack) + tensors, in order + the packages that it builds upon

Owns the walk on the sending side, and how objects and classes are written; how values of known kinds are is
`comfy_models_kinds`', and `comfy_models_build` reads it all. An object is its class, by name, and its
attributes, as values; nothing is pickled and no `__reduce__` is asked. The same object twice is one object on
the other side. What can't be written raises `UnsupportedValue` with its path.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgpack
import torch

from legion_shm.errors import UnsupportedValue
from legion_shm.supervisor.comfy_models_format import Tag
from legion_shm.supervisor.comfy_models_kinds import LEAVES, WRITERS, kind_of
from legion_shm.supervisor.comfy_models_names import Names

__all__ = ["Adapter", "PlanWriter", "members_of"]


_SKIPPED = frozenset(
    {"__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__annotations__", "__firstlineno__"}
    | {"__static_attributes__", "__annotate__", "__annotate_func__", "__annotations_cache__"}
)
_TORCH_OWN = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})
_TORCH_NEW = vars(torch.nn.Module())
"""What every torch module has; attributes that are still as empty as at its start are not written."""


class Adapter:
    """What the writer asks about an object before it writes it in its own way. This one has no opinion."""

    def package(self, value: Any) -> str | None:
        """The key of the package that the object is, for one that is sent apart from what refers to it."""
        del value
        return None

    def special(self, value: Any) -> tuple[str, object] | None:
        """A name and a state for an object that has a way of its own."""
        del value
        return None

    def attributes(self, value: Any, attributes: Mapping[str, object]) -> Mapping[str, object]:
        """The attributes to send of an object."""
        del value
        return attributes

    def parameter(self, module: Any, name: str, value: Any) -> Any:
        """The tensor to send for a module's parameter or buffer."""
        del module, name
        return value


class PlanWriter:
    """One walk. ``tensors`` are those met, ``packages`` the keys of those that the plan builds upon.

    ``root`` is written out even where the adapter takes it for a package: it is the package.
    """

    def __init__(self, names: Names, adapter: Adapter, *, root: object = None) -> None:
        self.tensors: list[torch.Tensor] = []
        self.packages: dict[str, None] = {}
        self.names = names
        self.adapter = adapter
        self._root = root
        self._numbers: dict[int, int] = {}
        self._open: set[int] = set()
        self._alive: list[object] = []
        self._kinds: dict[type, Callable[[Any], Any]] = {}

    def write(self, value: object) -> bytes:
        """The plan of ``value``. Raises UnsupportedValue; its ``path`` leads to what can't be sent."""
        try:
            plan: bytes = msgpack.packb(self.node(value), unicode_errors="surrogatepass")
        except RecursionError as error:
            raise UnsupportedValue("it is nested too deep", path="") from error
        return plan

    def node(self, value: Any) -> Any:
        kind = kind_of(value)
        if value is None or kind is bool or kind is float or kind is str or kind is bytes:
            return value
        leaf = LEAVES.get(kind)
        if leaf is not None:
            return leaf(value)
        number = self._numbers.get(id(value))
        if number is not None:
            if id(value) in self._open:
                raise UnsupportedValue(f"this {kind.__name__} contains itself", path="")
            return [Tag.REF, number]
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        writer = WRITERS.get(kind)
        if writer is not None:
            return writer(self, value)
        if value is not self._root:
            key = self.adapter.package(value)
            if key is not None:
                self.packages[key] = None
                return [Tag.PACKAGE, key]
        special = self.adapter.special(value)
        if special is not None:
            return [Tag.SPECIAL, special[0], self.part(special[1], "")]
        write = self._kinds.get(kind)
        if write is None:
            write = self._kinds[kind] = self._writer_of(kind)
        return write(value)

    def part(self, value: object, step: str) -> Any:
        """A part of a value that ``step`` leads to."""
        try:
            return self.node(value)
        except UnsupportedValue as error:
            raise UnsupportedValue(str(error), path=step + error.path) from error.__cause__

    def closed(self, value: object, write: Callable[[], Any]) -> Any:
        """Write what must be complete on the other side before anything but a cell can refer to it."""
        self._open.add(id(value))
        try:
            return write()
        finally:
            self._open.discard(id(value))

    def cell(self, content: object) -> Any:
        """What a closure's cell holds, which may be the very class or function that is being written."""
        if id(content) in self._open:
            return [Tag.REF, self._numbers[id(content)]]
        return self.part(content, "")

    # --- containers ---------------------------------------------------------------------------------

    def items(self, values: Iterable[object]) -> list[Any]:
        return [self.part(value, f"[{index}]") for index, value in enumerate(values)]

    def pairs(self, values: Mapping[Any, object]) -> list[Any]:
        tokens: list[Any] = []
        for key, value in values.items():
            tokens.append(key if type(key) is str else self.part(key, ".<key>"))
            tokens.append(self.part(value, f"[{key!r:.60}]" if type(key) in (str, int) else "[<key>]"))
        return tokens

    def named_parts(self, values: Mapping[str, object]) -> list[Any]:
        tokens: list[Any] = []
        for name, value in values.items():
            tokens.append(name)
            tokens.append(self.part(value, f".{name}"))
        return tokens

    # --- everything else ----------------------------------------------------------------------------

    def _writer_of(self, kind: type) -> Callable[[Any], Any]:
        if issubclass(kind, torch.nn.Module):
            return self._torch_module
        if issubclass(kind, type):
            return lambda value: self.closed(value, lambda: self._class(value))
        if issubclass(kind, enum.Enum):
            return self._enum
        if issubclass(kind, torch.Tensor):
            return self._tensor_subclass
        if issubclass(kind, (dict, list, tuple)):
            return self._container
        return self._object

    def _class(self, kind: type) -> Any:
        named = self.names.named(kind)
        if named is not None:
            return [Tag.NAMED, *named]
        if type(kind) is not type:
            raise UnsupportedValue(f"the class {_name(kind)} is not found by its name", path="")
        wire = self.names.module_name(kind.__module__)
        bases = [self.part(base, "") for base in kind.__bases__]
        space: dict[str, object] = {}
        for name, item in vars(kind).items():
            if name not in _SKIPPED:
                if isinstance(item, (types.MemberDescriptorType, types.GetSetDescriptorType)):
                    raise UnsupportedValue(f"the class {_name(kind)} has slots", path=f".{name}")
                space[name] = item
        return [Tag.CLASS, wire, kind.__name__, kind.__qualname__, bases, self.named_parts(space)]

    def _enum(self, value: enum.Enum) -> Any:
        name = value.name
        if type(value).__members__.get(name) is not value:
            raise UnsupportedValue(f"{value!r} has no name", path="")
        return [Tag.ENUM, self.part(type(value), ""), name]

    def _torch_module(self, value: torch.nn.Module) -> Any:
        head = self.part(type(value), "")
        own = vars(value)
        adapter = self.adapter
        others = {
            name: item
            for name, item in adapter.attributes(value, own).items()
            if name not in _TORCH_OWN and not (name in _TORCH_NEW and _as_new(name, item))
        }
        attributes = self.named_parts(others)
        tensors: list[Any] = []
        for group in ("_parameters", "_buffers"):
            part: list[Any] = []
            for name, item in own[group].items():
                part.append(name)
                part.append(self.part(adapter.parameter(value, name, item), f".{name}"))
            tensors.append(part)
        modules = self.named_parts(adapter.attributes(value, own["_modules"]))
        kept = sorted(own["_non_persistent_buffers_set"])
        return [Tag.TORCH_MODULE, head, own["training"], attributes, *tensors, kept, modules]

    def _tensor_subclass(self, value: torch.Tensor) -> Any:
        raise UnsupportedValue(f"{_name(type(value))}, a subclass of torch.Tensor, can't be sent", path="")

    def _container(self, value: Any) -> Any:
        kind = kind_of(value)
        head = self.part(kind, "")
        if issubclass(kind, tuple):
            return [Tag.CONTAINER, head, self.closed(value, lambda: self.items(value)), []]
        items = self.pairs(value) if issubclass(kind, dict) else self.items(value)
        state = members_of(value)
        return [Tag.CONTAINER, head, items, self.named_parts(self.adapter.attributes(value, state))]

    def _object(self, value: Any) -> Any:
        kind = kind_of(value)
        if kind.__flags__ & (1 << 9) == 0 or _is_native(kind):  # not a class written in Python
            text = (
                f"{_name(kind)} holds what Python can't see; keep it out of the model, or send it by itself"
            )
            raise UnsupportedValue(f"{text} with a codec (legion_shm.register_codec)", path="")
        head = self.part(kind, "")
        attributes = self.adapter.attributes(value, members_of(value))
        return [Tag.OBJECT, head, self.named_parts(attributes)]


def members_of(value: object) -> dict[str, object]:
    """An object's attributes: its slots that are set, then its `__dict__`."""
    found: dict[str, object] = {}
    for base in reversed(type(value).__mro__[:-1]):
        for name, item in vars(base).items():
            if type(item) is types.MemberDescriptorType and name not in ("__dict__", "__weakref__"):
                try:
                    found[name] = item.__get__(value)
                except AttributeError:  # not set
                    continue
    found.update(getattr(value, "__dict__", ()))
    return found


def _is_native(kind: type) -> bool:
    """Whether blank instances can't be made by `object.__new__`: there is state that Python doesn't see."""
    try:
        object.__new__(kind)
    except TypeError:
        return True
    return False


def _as_new(name: str, item: object) -> bool:
    new = _TORCH_NEW[name]
    return type(item) is type(new) and (item == new if not isinstance(new, dict) else not item)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
