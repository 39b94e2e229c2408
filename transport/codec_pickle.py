"""Pickle for classes that a worker's spec names, and for nothing else.

Tensors and arrays inside of an instance do not go through pickle: they cross beside it, in shared memory.
An instance is pickled by its own class's rules, which may call whatever the spec names: naming a class says
that it is trusted with what either side sends. No other global is ever looked up.
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Collection
from typing import Any, cast

from legion_shm.errors import UnsupportedValue
from legion_shm.transport.codec_plan import library_handler
from legion_shm.transport.codec_registry import ValueType, class_name

__all__ = ["Pickled"]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, parts: list[object]) -> None:
        super().__init__(file, protocol=5)
        self._parts = parts
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: object) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if library_handler(type(obj)) is None:
            return None
        number = self._numbers.get(id(obj))
        if number is None:
            number = self._numbers[id(obj)] = len(self._parts)
            self._parts.append(obj)
        return number


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, parts: list[object], names: Collection[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._parts, self._names = parts, names

    def persistent_load(self, pid: Any) -> object:
        if type(pid) is not int or not 0 <= pid < len(self._parts):
            raise ValueError(f"there is no part {pid!r:.40}")
        return self._parts[pid]

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in self._names:
            raise UnsupportedValue(
                f"the pickled object refers to {name:.200}, which WorkerSpec.pickle_classes does not name"
            )
        found: Any = importlib.import_module(module_name)
        for part in global_name.split("."):
            found = getattr(found, part)
        return found


class Pickled:
    """A `CodecSource` for exactly the classes of these full names (``module.Class``)."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)

    def for_class(self, cls: type) -> ValueType | None:
        name = class_name(cls)
        return self._type(name, cls) if name in self._names else None

    def for_name(self, name: str) -> ValueType | None:
        prefix, _, rest = name.partition(":")
        if prefix != "pickle":
            return None
        if rest not in self._names:
            raise LookupError(f"WorkerSpec.pickle_classes does not name {rest}")
        return self._type(rest, object)

    def _type(self, name: str, cls: type) -> ValueType:
        return ValueType(f"pickle:{name}", cls, self._reduce, self._rebuild, hashable=False)

    def _reduce(self, value: object) -> object:
        file, parts = io.BytesIO(), list[object]()
        _Pickler(file, parts).dump(value)
        return (file.getvalue(), parts)

    def _rebuild(self, state: object) -> object:
        data, parts = cast("tuple[Any, ...]", state)
        if type(data) is not bytes or type(parts) is not list:
            raise ValueError("its state is not a pickle and its parts")
        return _Unpickler(data, cast("list[object]", parts), self._names).load()
