"""Tensors of the supervisor's own program that are born in its arena, if `legion launch` started it.

Owns the regions that the allocator shim serves from in this process, and the handles of blocks in them. The
first submit of a tensor publishes its block, and makes it copy-on-write for this program, which goes on using
it: nobody sees its later writes. It is held until the program has freed it and every lease on it has ended.
Thread-safe.

    tensor ── find ──▶ handle, a lease of our own ── freed by the program ──▶ ended ── last lease ──▶ free

A process has one shim, and one supervisor at a time has the use of it; the others copy.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable

from legion_shm.errors import ArenaFull
from legion_shm.supervisor.worker_born import BORN_MIN_BYTES, QUOTA_DIVISOR, RESERVED_BYTES, WHOLE_DIVISOR
from legion_shm.supervisor.worker_env import LAUNCHED
from legion_shm.transport.born import Shim
from legion_shm.transport.dirty import may_be_written
from legion_shm.transport.handles import BlockHandle, round_up
from legion_shm.transport.segment import Segment

__all__ = ["MasterBorn"]

_log = logging.getLogger("legion_shm.supervisor")

_SEGMENT_STEP_BYTES = 2 << 20
_GROWTH_DIVISOR = 4


class _Process:
    """What all supervisors of this process share: whose turn it is, and what the last ones left behind."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.taken = False
        self.reserved = False
        self.keys = itertools.count(1)  # the shim's names for regions: segments' ids start anew each time
        self.left: set[int] = set()


_process = _Process()


class MasterBorn:
    """Made by `claim`. ``handle_for(segment, offset, nbytes)`` makes a handle, ``grow(nbytes)`` a segment or
    raises ArenaFull; ``resident(handle)`` hears of each block that is published, with a lease of our own.
    """

    def __init__(
        self,
        shim: Shim,
        *,
        quota_bytes: int,
        handle_for: Callable[[int, int, int], BlockHandle],
        grow: Callable[[int], tuple[int, Segment]],
        resident: Callable[[BlockHandle], None],
    ) -> None:
        self._shim, self._handle_for, self._grow, self._resident = shim, handle_for, grow, resident
        self._quota_bytes = quota_bytes // QUOTA_DIVISOR
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._segments: dict[int, int] = {}  # the shim's key to the arena's id
        self._nbytes: dict[int, int] = {}  # by key
        self._published: dict[int, BlockHandle] = {}  # by the block's address
        self._starts: dict[int, int] = {}  # generation to address
        self._owned: set[int] = set()  # those that the program has not freed
        self._copied_bytes = self._copied_largest = 0
        self._may_grow = True
        self._growing = False
        shim.numbers()
        shim.serve(BORN_MIN_BYTES)

    @classmethod
    def claim(
        cls,
        *,
        quota_bytes: int,
        handle_for: Callable[[int, int, int], BlockHandle],
        grow: Callable[[int], tuple[int, Segment]],
        resident: Callable[[BlockHandle], None],
    ) -> MasterBorn | None:
        """The use of this process's shim; None where it has none, or another supervisor uses it."""
        shim = Shim.here()
        if shim is None:
            if LAUNCHED in os.environ:
                _log.warning(
                    "legion launch started this program, but its allocator is not here (another version of "
                    "legion_shm, or a program in between that does not pass it on): tensors are copied once"
                )
            return None
        with _process.lock:
            if _process.taken:
                return None
            if not _process.reserved:
                _process.reserved = shim.reserve(RESERVED_BYTES)
            if not _process.reserved:  # a worker's own, or a forked child's
                return None
            _process.taken = True
            _process.left = {key for key in _process.left if not shim.remove(key)}
        return cls(shim, quota_bytes=quota_bytes, handle_for=handle_for, grow=grow, resident=resident)

    @property
    def total_bytes(self) -> int:
        return sum(self._nbytes.copy().values())

    @property
    def published(self) -> int:
        return len(self._published)

    @property
    def owned(self) -> int:
        """How many published blocks the program still has: `ended` will tell of each."""
        return len(self._owned)

    @property
    def wants_room(self) -> bool:
        return self._copied_bytes > 0 and self._may_grow and not self._growing

    def find(self, address: int, nbytes: int) -> tuple[BlockHandle, int] | None:
        """The block that holds this memory, published now or before, and the offset in it.

        None where it was not born here, or is no longer what others would see: then a copy goes.
        """
        block = self._shim.find(address)
        if block is None or block.segment not in self._segments:
            if nbytes >= BORN_MIN_BYTES and block is None:
                self._copied_bytes += nbytes
                self._copied_largest = max(self._copied_largest, nbytes)
            return None
        if address + nbytes > block.start + block.nbytes:
            return None
        if not block.held and nbytes * WHOLE_DIVISOR < block.nbytes:
            return None
        with self._lock:
            handle = self._published.get(block.start)
            if handle is not None:
                return None if may_be_written(address, nbytes) else (handle, address - block.start)
            if block.isolated and may_be_written(block.start, block.nbytes):
                return None  # the segment's pages are as a fork found them
            segment = self._segments.get(block.segment)
            if segment is None or not self._shim.hold(block.start):
                return None
            try:
                self._shim.isolate(block.start)
            except OSError as error:  # out of address ranges: vm.max_map_count
                self._shim.release(block.start)
                _log.debug("a tensor is copied, for its block can't be shared: %s", error)
                return None
            handle = self._handle_for(segment, block.offset, block.nbytes)
            self._published[block.start] = handle
            self._starts[handle.generation] = block.start
            self._owned.add(block.start)
            self._resident(handle)  # before others find it: their job must come after it
        return handle, address - block.start

    def ended(self) -> list[BlockHandle]:
        """Published blocks that the program has freed since the last call: our own leases on them end."""
        if not self._owned:
            return []
        starts = self._shim.orphans()
        if not starts:
            return []
        with self._lock:
            ended = [self._published[start] for start in starts if start in self._owned]
            self._owned.difference_update(starts)
        return ended

    def free(self, handle: BlockHandle) -> bool:
        """The last lease on a block has ended. False for a handle that is not of here."""
        with self._lock:
            start = self._starts.get(handle.generation)
            if start is None or self._published[start] != handle:
                return False
            del self._starts[handle.generation], self._published[start]
            self._owned.discard(start)
            self._shim.release(start)
        return True

    def make_room(self) -> bool:
        """Add a region for what was copied lately and could have been born. Whether one was added."""
        with self._lock:
            if self._growing:
                return False
            copied, self._copied_bytes = self._copied_bytes, 0
            largest, self._copied_largest = self._copied_largest, 0
            missed = self._shim.numbers()
            total = self.total_bytes
            # What was copied but never missed has memory that no allocator of ours is asked for, as numpy's.
            wanted = min(max(largest, min(copied, total // _GROWTH_DIVISOR)), missed.missed_bytes)
            size = round_up(wanted, _SEGMENT_STEP_BYTES)
            if missed.missed_largest < largest or not wanted or total + size > self._quota_bytes:
                return False
            self._growing = True
        try:
            segment_id, segment = self._grow(size)
        except ArenaFull:
            self._may_grow = False  # until something has been given back
            return False
        finally:
            self._growing = False
        key = next(_process.keys)
        with self._lock:
            self._segments[key] = segment_id
            self._nbytes[key] = segment.nbytes
        return self._shim.add(key, segment)

    def retire(self) -> tuple[int, ...]:
        """Unmap the regions in which nothing lives; their segments' ids."""
        with self._lock:
            gone = [key for key in self._segments if self._shim.remove(key)]
            ids = tuple(self._segments.pop(key) for key in gone)
            for key in gone:
                del self._nbytes[key]
            self._may_grow = self._may_grow or bool(gone)
        return ids

    def close(self) -> None:
        """Let nothing more be born here, and the next supervisor have the shim. What lives lives on."""
        if os.getpid() != self._pid:
            return
        with _process.lock:
            self._shim.serve(None)
            with self._lock:
                for key in self._segments:
                    self._shim.shut(key)
                for start in self._published:
                    self._shim.release(start)
                self._published.clear()
                self._starts.clear()
                self._owned.clear()
                _process.left.update(key for key in self._segments if not self._shim.remove(key))
                self._segments.clear()
                self._nbytes.clear()
            _process.taken = False
