"""Which classes the value codec carries beyond those that it knows by itself, and how each of them crosses.

    class ── ValueTypes.by_class ──▶ ValueType ◀── ValueTypes.by_name ── name on the wire
                 │                                      │
                 └── registered here, else the first source that knows it ──┘

A `ValueType` reduces an instance to a state, which is any value that the codec carries, and rebuilds one from
it. Owns the registry alone: it walks no value and reads no wire. A source decides by its own allow-list, and
nothing that a peer names is imported or called unless a source says so. docs/values.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["VALUE_TYPES", "CodecSource", "ValueType", "ValueTypes", "class_name", "register_codec"]


@dataclass(frozen=True, slots=True)
class ValueType:
    """How instances of exactly ``cls`` cross: as the state that ``reduce`` makes of one.

    The state is any value that the codec carries; ``rebuild`` makes an equal instance of it. ``name``
    stands for the class on the wire and is known on both sides. Either may raise `UnsupportedValue` to say
    why this instance can't cross. ``hashable`` is False where hashing an instance runs code of its class:
    such a value is refused in a dict's key and in a set. A ``cls`` of ``object`` lets ``rebuild`` give
    anything. ``by_fields``: the state is a dict of the instance's attributes, and error paths name them so.
    ``noted``: what was met while encoding is listed, for whoever must act on it. ``step_to`` gives the step
    of an error's path from the instance to what the state has at a step, such as ``['key']`` or ``[1]``.
    """

    name: str
    cls: type
    reduce: Callable[[Any], object]
    rebuild: Callable[[Any], object]
    hashable: bool = True
    by_fields: bool = False
    noted: bool = False
    step_to: Callable[[str], str] | None = None

    def step(self, key_step: str) -> str:
        """The path of an item of the state, as the instance's user would write it."""
        if self.step_to is not None:
            return self.step_to(key_step)
        if not self.by_fields:
            return f".<{self.name}>{key_step}"
        return f".{key_step[2:-2]}" if key_step.startswith("['") else key_step


class CodecSource(Protocol):
    """Finds value types on demand: for a class that is met, or for a name that a peer sent."""

    def for_class(self, cls: type) -> ValueType | None:
        """None where this source doesn't know the class. Raises `LookupError` with a reason to refuse it."""
        ...

    def for_name(self, name: str) -> ValueType | None:
        """None where the name is not of this source. `LookupError` with a reason: it can't be had here."""
        ...


class ValueTypes:
    """The classes that a process, or one of its workers' specs, can send and receive.

    ``parent`` is asked first; ``place`` says in errors where something is missing.
    """

    def __init__(self, *value_types: ValueType, parent: ValueTypes | None = None, place: str = "") -> None:
        self._place = place
        self._parent = parent
        self._by_class: dict[type, ValueType] = {}
        self._by_name: dict[str, ValueType] = {}
        self._sources: list[CodecSource] = []
        self._found_classes: dict[type, ValueType] = {}
        self._found_names: dict[str, ValueType] = {}
        for value_type in value_types:
            self.register(value_type)

    @property
    def place(self) -> str:
        return self._place or ("this process" if self._parent is None else self._parent.place)

    @place.setter
    def place(self, place: str) -> None:
        self._place = place

    def register(self, value_type: ValueType) -> None:
        """Add one. The same one twice is fine; another for its class or its name raises ValueError."""
        for known in (self._by_class.get(value_type.cls), self._by_name.get(value_type.name)):
            if known is not None and known != value_type:
                raise ValueError(
                    f"{value_type.name!r} for {value_type.cls.__qualname__}: "
                    f"already registered as {known.name!r} for {known.cls.__qualname__}"
                )
        self._by_class[value_type.cls] = value_type
        self._by_name[value_type.name] = value_type
        self._found_classes.pop(value_type.cls, None)

    def add_source(self, source: CodecSource) -> None:
        """Ask this source too, after those that were added before."""
        self._sources.append(source)

    def exact(self, cls: type) -> ValueType | None:
        """What was registered for the class itself; sources are not asked."""
        found = self._by_class.get(cls)
        if found is None and self._parent is not None:
            return self._parent.exact(cls)
        return found

    def registered(self, name: str) -> ValueType | None:
        """What was registered by that name; sources are not asked."""
        found = self._by_name.get(name)
        if found is None and self._parent is not None:
            return self._parent.registered(name)
        return found

    def by_class(self, cls: type) -> ValueType | None:
        """Raises `LookupError` with a reason where a source refuses the class."""
        found = self.exact(cls) or self._found_classes.get(cls)
        if found is None:
            found = self._first(lambda source: source.for_class(cls))
            if found is not None:
                self._found_classes[cls] = found
        return found

    def by_name(self, name: str) -> ValueType | None:
        """Raises `LookupError` with a reason where a source knows the name, and can't have its class here."""
        found = self._by_name.get(name) or self._found_names.get(name)
        if found is None:
            found = self._first(lambda source: source.for_name(name), name)
            if found is not None:
                self._found_names[name] = found
        return found

    def _first(
        self, ask: Callable[[CodecSource], ValueType | None], name: str | None = None
    ) -> ValueType | None:
        reason: LookupError | None = None
        if self._parent is not None and name is not None:
            registered = self._parent.registered(name)
            if registered is not None:
                return registered
        for source in self._all_sources():
            try:
                found = ask(source)
            except LookupError as error:  # a later source may know better
                reason = reason or error
                continue
            if found is not None:
                return found
        if reason is not None:
            raise reason
        return None

    def _all_sources(self) -> list[CodecSource]:
        parent = self._parent
        return self._sources if parent is None else [*parent._all_sources(), *self._sources]


def class_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


VALUE_TYPES = ValueTypes()
"""The registry of this process; what `encode` and `decode` use unless told otherwise."""


def register_codec(
    cls: type,
    *,
    reduce: Callable[[Any], object],
    rebuild: Callable[[Any], object],
    name: str | None = None,
) -> None:
    """Let instances of exactly ``cls`` cross between processes.

    ``reduce(value)`` gives a state of plain data, tensors, arrays and other values that can cross;
    ``rebuild(state)`` makes an equal instance. Both sides must have registered the same ``name``, by default
    the class's full name: call this in a module that both import (a node pack, `WorkerSpec.codec_modules`),
    or name it as an entry point of the group ``legion_shm.codecs``. The same call twice is fine; another
    codec for the class or the name raises ValueError.
    """
    VALUE_TYPES.register(ValueType(name or class_name(cls), cls, reduce, rebuild))
