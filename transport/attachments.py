"""The receiver's side of shared memory: every block that this process views, and what becomes of it.

Owns the table of segments, the live views and the list of deliveries that have ended. It never frees a
block: it tells which leases can be returned.

    view(handle) ─▶ ctypes array ─▶ torch, numpy ... ─▶ last reference gone ─▶ finalizer: deque.append
                                                                                     │
    drain_released() ◀── pages written here are dropped, the address forgotten ◀─────┘

A finalizer runs inside whatever thread collects the array, perhaps while that thread holds a lock of
ours; so it takes none, and everything else happens at the next call of any method here.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

from legion_shm.errors import ForkedError, InvalidHandle
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.segment import BlockMapping, Segment

__all__ = ["Attachments", "array_over"]

_QUICK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """What is behind one live array: a copy-on-write view, or (``segment``) the owner's own block."""

    handle: BlockHandle
    address: int
    mapping: BlockMapping | None = None
    segment: Segment | None = None
    memory: object = None
    on_gone: Callable[[BlockHandle], None] | None = None

    def clean(self, start: int, nbytes: int) -> bool:
        if self.mapping is not None:
            return not self.mapping.dirty(start, nbytes)
        return self.segment is not None and self.segment.isolated_clean(self.handle.offset + start, nbytes)


class Attachments:
    """All segments that this process can view, whoever owns them. Thread-safe; `ForkedError` after a fork.

    ``on_missing(handle, deadline)`` is called, with no lock held, for a handle into an unknown segment: it
    may `add` it before ``deadline`` (`time.monotonic`), ``missing_wait_s`` from the call.
    """

    def __init__(
        self,
        *,
        on_missing: Callable[[BlockHandle, float], None] | None = None,
        missing_wait_s: float = 10.0,
    ) -> None:
        self._on_missing = on_missing
        self._missing_wait_s = missing_wait_s
        self._pid = os.getpid()
        self._lock = Lock()
        self._segments: dict[tuple[int, int], Segment] = {}
        self._addresses: list[int] = []
        self._views: dict[int, _View] = {}
        self._dead: deque[_View] = deque()
        self._ended: deque[_View] = deque()
        self._closed = False

    def add(self, arena: int, segment_id: int, segment: Segment) -> None:
        """Make a segment known; it is closed by `drop`. `InvalidHandle` where the id is taken."""
        self._check_process()
        with self._lock:
            if (arena, segment_id) in self._segments:
                raise InvalidHandle(f"segment {segment_id} of arena {arena} is attached already")
            self._segments[arena, segment_id] = segment

    def knows(self, arena: int, segment_id: int) -> bool:
        return (arena, segment_id) in self._segments

    def drop(self, arena: int, segment_id: int | None = None) -> None:
        """Close one segment of an arena, or all of them; live views stay readable."""
        self._check_process()
        with self._lock:
            keys = [key for key in self._segments if key[0] == arena and segment_id in (None, key[1])]
            dropped = [self._segments.pop(key) for key in keys]
        for segment in dropped:
            segment.close()

    def close(self) -> None:
        """Drop every segment. Live views stay readable and free their memory when they end, untold."""
        for arena in {key[0] for key in list(self._segments)}:
            self.drop(arena)
        with self._lock:
            self._closed = True
            self._views.clear()
            self._addresses.clear()
        self._dead.clear()
        self._ended.clear()

    def view(self, handle: BlockHandle) -> Any:
        """A writable ctypes array of ``handle.nbytes`` bytes; writes stay private to it.

        Each call is one delivery, which ends when the last buffer on the array is collected. Raises
        `InvalidHandle`, before any memory is touched, for a segment that is not known in time or for bounds
        outside of it.
        """
        segment = self._segment(handle)
        handle.check_within(segment.nbytes)
        self._reap()
        mapping = segment.map_block(handle.offset, handle.nbytes)
        return self._track(_View(handle, mapping.address, mapping=mapping))

    def adopt_owned(self, handle: BlockHandle, address: int, on_gone: Callable[[BlockHandle], None]) -> Any:
        """A ctypes array over a block of this process's own arena, in its shared mapping.

        `find` knows it like a view, as long as it is unwritten since `Arena.isolate`. When its last buffer
        has been collected, the next `drain_released` calls ``on_gone(handle)``.
        """
        segment = self._segment(handle)
        handle.check_within(segment.nbytes)
        memory = segment.shared_memory()
        if address != segment.shared_address() + handle.offset:
            raise InvalidHandle(f"{handle} is not at address {address:#x} of this process")
        self._reap()
        return self._track(_View(handle, address, segment=segment, memory=memory, on_gone=on_gone))

    def find(self, address: int, nbytes: int) -> tuple[BlockHandle, int] | None:
        """The block whose live array holds this range, and the range's offset in it.

        None where there is none, or where its pages there have been written since it was delivered: then
        the bytes are no longer the block's.
        """
        self._check_process()
        if nbytes <= 0 or not self._addresses:
            return None
        with self._lock:
            index = bisect_right(self._addresses, address) - 1
            view = self._views[self._addresses[index]] if index >= 0 else None
        if view is None or address + nbytes > view.address + view.handle.nbytes:
            return None
        if view in tuple(self._dead):  # and its pages have not been looked through yet
            return None
        start = address - view.address
        return (view.handle, start) if view.clean(start, nbytes) else None

    def locate(self, address: int, nbytes: int) -> tuple[Segment, int] | None:
        """The segment that a delivered range lies in, and where. It may have been written meanwhile."""
        with self._lock:
            index = bisect_right(self._addresses, address) - 1
            view = self._views[self._addresses[index]] if index >= 0 else None
        if view is None or view.mapping is None or address + nbytes > view.address + view.handle.nbytes:
            return None
        segment = self._segments.get((view.handle.arena, view.handle.segment))
        return None if segment is None else (segment, view.handle.offset + address - view.address)

    def drain_released(self, *, quick: bool = False) -> list[BlockHandle]:
        """The deliveries that have ended since the last call, one entry each.

        Their written pages have been dropped already, so the blocks may be used again. ``quick`` leaves those
        whose pages take long to look through (25 MB: 0.1 to 0.4 ms) for a later call, or for `live_views`.
        """
        if not self._dead and not self._ended:
            return []
        self._check_process()
        self._reap(_QUICK_BYTES if quick else None)
        handles: list[BlockHandle] = []
        while self._ended:
            try:
                view = self._ended.popleft()
            except IndexError:  # another thread was faster
                break
            if view.on_gone is None:
                handles.append(view.handle)
            else:
                view.on_gone(view.handle)
        return handles

    def live_views(self) -> int:
        """How many arrays, delivered or adopted, still have a buffer on them."""
        self._check_process()
        self._reap()
        return len(self._addresses)

    def undrained(self) -> int:
        """How many deliveries have ended and were not told by `drain_released` yet."""
        return len(self._dead) + len(self._ended)

    def _segment(self, handle: BlockHandle) -> Segment:
        self._check_process()
        key = (handle.arena, handle.segment)
        segment = self._segments.get(key)
        if segment is None and self._on_missing is not None:
            self._on_missing(handle, time.monotonic() + self._missing_wait_s)
            segment = self._segments.get(key)
        if segment is None:
            raise InvalidHandle(f"{handle}: that segment is not attached in this process")
        return segment

    def _track(self, view: _View) -> Any:
        array = array_over(view.address, view.handle.nbytes)
        with self._lock:
            if view.address in self._views:
                raise InvalidHandle(f"{view.handle} is in use at {view.address:#x} already")
            insort(self._addresses, view.address)
            self._views[view.address] = view
        # The registry of finalizers keeps `view`, and so the memory, alive until the array is gone.
        weakref.finalize(array, self._gone, view).atexit = False
        return array

    def _gone(self, view: _View) -> None:
        """What a finalizer calls: no lock, for it may run in the middle of anything."""
        if not self._closed:
            self._dead.append(view)

    def _reap(self, most_bytes: int | None = None) -> None:
        while self._dead:
            try:
                if most_bytes is not None and self._dead[0].handle.nbytes > most_bytes:
                    return
                view = self._dead.popleft()
            except IndexError:  # another thread was faster
                return
            with self._lock:
                if self._views.pop(view.address, None) is None:
                    continue  # closed meanwhile
                del self._addresses[bisect_right(self._addresses, view.address) - 1]
            if view.mapping is not None:
                view.mapping.release()
            self._ended.append(view)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(f"process {self._pid} attached this memory; a forked child must attach its own")


def array_over(address: int, nbytes: int) -> Any:
    """A ctypes array over that memory, which it does not keep."""
    return _array_type(nbytes).from_address(address)


@lru_cache(maxsize=256)
def _array_type(nbytes: int) -> Any:
    """Cached: making a ctypes array type costs more than the view, and leaves a reference cycle behind."""
    return ctypes.c_ubyte * nbytes
