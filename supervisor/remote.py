"""Objects that stay in the worker that made them: the worker's table of them, and the master's handles.

    worker   object ── RemoteObjects.export ──▶ number ──▶ JobDone ──▶ RemoteHandle   master
    master   RemoteHandle ──▶ RunJob, to that worker alone ──▶ RemoteObjects ──▶ the live object
    master   handle dropped ──▶ RemotesDropped ──▶ the object is let go

Each time an object is sent it is counted, and each handle that is dropped gives one count back. Numbers are
never used again. Owns both ends of that; the routing of jobs is the machine's.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, cast

from legion_shm.errors import UnsupportedValue
from legion_shm.transport.codec import VALUE_TYPES, ValueType, ValueTypes
from legion_shm.transport.codec_registry import class_name

__all__ = ["RemoteHandle", "RemoteObjects", "delivered_types", "sending_types"]

_NAME = "legion:remote"
_TEXT_MAX = 200


class RemoteHandle:
    """An object that lives in a worker: in another job of the same spec, nodes get the object itself.

    ``class_name`` and ``text`` (its repr) describe it. It lives as long as a handle of it does; dropping the
    last one frees it once its worker is idle. If the worker ends, jobs that are given the handle raise
    WorkerLost. A worker whose objects are held is not ended for being idle.
    """

    __slots__ = ("__weakref__", "_number", "_owner", "class_name", "text", "worker_id")

    def __init__(self, worker_id: str, number: int, class_name: str, text: str, owner: object) -> None:
        self.worker_id, self._number = worker_id, number
        self.class_name, self.text, self._owner = class_name, text, owner

    def __repr__(self) -> str:
        return f"<RemoteHandle of {self.class_name} in worker {self.worker_id}>"

    def __copy__(self) -> RemoteHandle:
        return self

    def __deepcopy__(self, memo: object) -> RemoteHandle:
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{self.class_name} lives in worker {self.worker_id}; this is a handle of it, without {name!r}: "
            "pass it to a job of the same worker"
        )


# --- in the master ---------------------------------------------------------------------------------------


def sending_types(owner: object, parent: ValueTypes = VALUE_TYPES) -> ValueTypes:
    """A registry that also takes handles, of ``owner``'s own workers."""

    def reduce(handle: RemoteHandle) -> object:
        if handle._owner is not owner:  # pyright: ignore[reportPrivateUsage]
            raise UnsupportedValue(f"{handle!r} belongs to another Supervisor; only its own can use it")
        return (handle.worker_id, handle._number)  # pyright: ignore[reportPrivateUsage]

    return ValueTypes(ValueType(_NAME, RemoteHandle, reduce, _no_object, noted=True), parent=parent)


def _no_object(_state: object) -> object:
    raise ValueError("no object of this process was sent")


def delivered_types(
    owner: object,
    worker_id: str,
    left: Counter[int],
    dropped: Callable[[str, tuple[int, ...]], None],
    parent: ValueTypes = VALUE_TYPES,
) -> ValueTypes:
    """A registry that makes handles of the numbers in ``left``, and takes them out there.

    ``dropped`` hears of each handle that is gone, from its finalizer.
    """

    def rebuild(state: object) -> object:
        worker, number, name, text = cast("tuple[Any, ...]", state)
        if worker != worker_id or left[number] < 1 or type(name) is not str or type(text) is not str:
            raise ValueError("no such object was announced")
        left[number] -= 1
        handle = RemoteHandle(worker_id, number, name, text, owner)
        weakref.finalize(handle, dropped, worker_id, (number,)).atexit = False
        return handle

    return ValueTypes(ValueType(_NAME, RemoteHandle, _no_object, rebuild), parent=parent)


# --- in the worker ---------------------------------------------------------------------------------------


class RemoteObjects:
    """What this worker holds for handles elsewhere. The main thread's alone."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._objects: dict[int, object] = {}
        self._numbers: dict[int, int] = {}
        self._counts: Counter[int] = Counter()
        self._next = 1
        self._exported: list[int] = []
        self.receiving = ValueTypes(ValueType(_NAME, object, _no_object, self._find), parent=VALUE_TYPES)
        self.sending = ValueTypes(parent=VALUE_TYPES)
        self.sending.add_source(_AnyObject(self))

    def __len__(self) -> int:
        return len(self._objects)

    def export(self, value: object) -> object:
        """The state that stands for an object, which is held from now on."""
        number = self._numbers.get(id(value))
        if number is None:
            number, self._next = self._next, self._next + 1
            self._objects[number] = value
            self._numbers[id(value)] = number
        self._counts[number] += 1
        self._exported.append(number)
        try:
            text = repr(value)[:_TEXT_MAX]
        except Exception:  # a broken repr is no reason to lose the object
            text = object.__repr__(value)
        return (self._worker_id, number, class_name(type(value)), text)

    def take_exported(self) -> tuple[int, ...]:
        """What has been exported since the last call, once for each time."""
        exported, self._exported = tuple(self._exported), []
        return exported

    def drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._counts[number] -= 1
            if self._counts[number] <= 0:
                del self._counts[number]
                value = self._objects.pop(number, self)
                if value is not self:
                    del self._numbers[id(value)]

    def _find(self, state: object) -> object:
        worker, number = cast("tuple[Any, ...]", state)
        if worker != self._worker_id or number not in self._objects:
            raise UnsupportedValue(
                f"worker {self._worker_id} holds no object {number!r:.40} of {worker!r:.40}"
            )
        return self._objects[number]


class _AnyObject:
    """The `CodecSource` that comes last: whatever nobody else can send stays here, and its number goes."""

    def __init__(self, objects: RemoteObjects) -> None:
        self._objects = objects

    def for_class(self, cls: type) -> ValueType | None:
        return ValueType(_NAME, cls, self._objects.export, _no_object, hashable=False)

    def for_name(self, name: str) -> ValueType | None:
        return None
