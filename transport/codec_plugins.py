"""Codecs of installed packages: the entry points of the group ``legion_shm.codecs``.

    [project.entry-points."legion_shm.codecs"]
    "my_pack.shapes.Curve" = "my_pack.codecs:CURVE"        a ValueType, several of them, or a module

An entry point is named by the class that it is for, or by the package whose classes it is for. It is loaded
when such a class is met, on either side; so a peer can make nothing be imported but what is installed for
just this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from types import ModuleType
from typing import Any, cast

from legion_shm.transport.codec_registry import ValueType, ValueTypes, class_name

__all__ = ["GROUP", "Plugins"]

GROUP = "legion_shm.codecs"


def _installed() -> Mapping[str, Callable[[], Any]]:
    return {entry.name: entry.load for entry in metadata.entry_points(group=GROUP)}


class Plugins:
    """A `CodecSource` that loads each entry point at most once, when one of its classes is first met."""

    def __init__(
        self,
        registry: ValueTypes,
        installed: Callable[[], Mapping[str, Callable[[], Any]]] = _installed,
    ) -> None:
        self._registry, self._installed = registry, installed
        self._entries: dict[str, Callable[[], Any]] | None = None
        self._lock = threading.RLock()

    def for_class(self, cls: type) -> ValueType | None:
        self._load(class_name(cls))
        return self._registry.exact(cls)

    def for_name(self, name: str) -> ValueType | None:
        return self._registry.registered(name) if self._load(name) else None

    def _load(self, name: str) -> bool:
        with self._lock:
            if self._entries is None:
                self._entries = dict(self._installed())
            parts = name.split(".")
            for count in range(len(parts), 0, -1):
                entry = ".".join(parts[:count])
                load = self._entries.pop(entry, None)
                if load is not None:
                    self._take(entry, load)
                    return True
        return False

    def _take(self, entry: str, load: Callable[[], Any]) -> None:
        try:
            given = load()
        except Exception as error:
            raise LookupError(f"the entry point {entry!r} of {GROUP} can't be loaded: {error!r}") from error
        if isinstance(given, ModuleType):
            return  # it registered what it has when it was imported
        if isinstance(given, ValueType):
            given = (given,)
        items = tuple(cast("Iterable[object]", given)) if isinstance(given, Iterable) else (given,)
        for item in items:
            if not isinstance(item, ValueType):
                raise LookupError(
                    f"the entry point {entry!r} of {GROUP} is a {type(item).__name__}; it must be a "
                    "ValueType, several of them, or a module that calls register_codec"
                )
            self._registry.register(item)
