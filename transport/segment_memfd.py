"""Shared memory without a name: a sealed memfd, mapped through libc. Linux only.

Owns the file descriptor, the mappings and who views which part of them. A memfd is freed when its last
descriptor and mapping are gone, however its processes end, and is not limited by the size of /dev/shm.

A receiver maps the whole segment copy-on-write once and hands out views of it, because mapping 25 MB
anew for each message costs a fault per page. Two live views must never share a page (one's write would
show in the other), so a block that is delivered again while an earlier view of it lives is taken from
the next whole-segment mapping, called a lane.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import weakref
from bisect import bisect_left, insort
from threading import Lock

from legion_shm.errors import InvalidHandle
from legion_shm.transport.dirty import may_be_written
from legion_shm.transport.handles import BLOCK_ALIGN, round_up
from legion_shm.transport.huge_pages import condense, fill_with_huge_pages
from legion_shm.transport.mappings import (
    MADV_DONTNEED,
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    MAP_NORESERVE,
    advise,
    map_file,
    map_over,
    unmap,
)
from legion_shm.transport.segment import BlockMapping, Segment, SegmentKind
from legion_shm.transport.spans import Spans

__all__ = ["MemfdSegment"]

# <linux/memfd.h> and <linux/fcntl.h>; the os and fcntl modules of Python 3.10 to 3.12 lack these.
_MFD_NOEXEC_SEAL = 0x8
_F_ADD_SEALS = 1033
_F_GET_SEALS = 1034
_SEALS = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW: nobody can resize it under a reader

_MAX_LANES = 4
"""Whole-segment mappings kept for reuse; a fifth simultaneous view of one block gets a mapping of its own."""

_CONDENSE_STEP_BYTES = 64 * 1024 * 1024  # at a time, with nothing locked: 20 to 150 ms
_WARM_STEP_BYTES = 8 * 1024 * 1024  # at a time, with the lock held: 0.3 ms
_POPULATE_MAX_BYTES = 256 * 1024 * 1024
"""Larger blocks are mapped page by page as they are read: a model's weights may be delivered often and read
the first time only."""


class _Memory:
    """One mapping, unmapped when the last reference to this object goes."""

    def __init__(self, nbytes: int, flags: int, fd: int, offset: int = 0) -> None:
        self.nbytes = nbytes
        self.address = map_file(nbytes, flags, fd, offset)
        # Only a system call: this may run inside a garbage collection, in any thread.
        weakref.finalize(self, unmap, self.address, nbytes).atexit = False
        self._populated = Spans()

    def populate(self, offset: int, nbytes: int, advice: int) -> None:
        """Map these pages now, unless this was done. A hint: older kernels refuse it, then faults do it."""
        if not self._populated.covers(offset, offset + nbytes):
            advise(self.address + offset, nbytes, advice)
            self._populated.add(offset, offset + nbytes)

    def forget_populated(self, offset: int, nbytes: int) -> None:
        self._populated.remove(offset, offset + nbytes)


class _Lane(_Memory):
    """A whole segment mapped copy-on-write, and the spans of it that are viewed now."""

    def __init__(self, nbytes: int, fd: int) -> None:
        super().__init__(nbytes, mmap.MAP_PRIVATE | MAP_NORESERVE, fd)
        self._viewed: list[tuple[int, int]] = []

    def claim(self, offset: int, end: int) -> bool:
        index = bisect_left(self._viewed, (offset, end))
        if index < len(self._viewed) and self._viewed[index][0] < end:
            return False
        if index and self._viewed[index - 1][1] > offset:
            return False
        insort(self._viewed, (offset, end))
        return True

    def give_back(self, offset: int, end: int) -> None:
        del self._viewed[bisect_left(self._viewed, (offset, end))]


class _LaneMapping(BlockMapping):
    def __init__(self, segment: MemfdSegment, lane: _Lane, offset: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = lane.address + offset
        self._lock = segment.lock
        self._lane = lane
        self._offset = offset
        self._released = False

    def dirty(self, start: int, nbytes: int) -> bool:
        return may_be_written(self.address + start, nbytes)

    def release(self) -> None:
        with self._lock:
            if self._released:
                return
            self._released = True
        if self.dirty(0, self.nbytes):
            dropped = advise(self.address, self.nbytes, MADV_DONTNEED) == 0
            with self._lock:
                self._lane.forget_populated(self._offset, self.nbytes)
            if not dropped:
                # Locked memory (mlockall) refuses. The span stays claimed: no later block is read there.
                return
        with self._lock:
            self._lane.give_back(self._offset, self._offset + self.nbytes)


class _OwnMapping(BlockMapping):
    """One block mapped for one delivery, unmapped with it."""

    def __init__(self, fd: int, offset: int, nbytes: int) -> None:
        self._memory: _Memory | None = _Memory(nbytes, mmap.MAP_PRIVATE | MAP_NORESERVE, fd, offset)
        if nbytes <= _POPULATE_MAX_BYTES:
            self._memory.populate(0, nbytes, MADV_POPULATE_READ)
        self.address = self._memory.address
        self.nbytes = nbytes

    def dirty(self, start: int, nbytes: int) -> bool:
        return may_be_written(self.address + start, nbytes)

    def release(self) -> None:
        self._memory = None


class MemfdSegment(Segment):
    """A sealed memfd. Made by `create` or `attach`; owns the descriptor that it is given."""

    kind: SegmentKind = "memfd"

    def __init__(self, fd: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.lock = Lock()
        self._fd = fd
        self._shared: _Memory | None = None
        self._isolated = Spans()  # copy-on-write for their owner
        self._cold = Spans()  # shared again, and not mapped yet
        self._ordinary = Spans()  # pages that were not huge when it was made
        self._lanes: list[_Lane] = []

    @classmethod
    def create(cls, nbytes: int, *, name_prefix: str) -> MemfdSegment:
        fd = _memfd_create(f"{name_prefix}segment")
        try:
            os.ftruncate(fd, nbytes)
            later = fill_with_huge_pages(fd, nbytes)
            # Without it, a shortage of memory would show as SIGBUS at the first touch of a page.
            os.posix_fallocate(fd, 0, nbytes)
            fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        segment = cls(fd, nbytes)
        segment._ordinary.add(*later)
        return segment

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> MemfdSegment:
        try:
            real = os.fstat(fd).st_size
            seals = fcntl.fcntl(fd, _F_GET_SEALS)
        except OSError as error:
            _close_quietly(fd)
            raise InvalidHandle(f"descriptor {fd} is not a memfd: {error}") from error
        if seals & _SEALS != _SEALS:
            os.close(fd)
            raise InvalidHandle(f"the segment's memfd lacks the seals against resizing (it has {seals:#x})")
        if real != nbytes or nbytes <= 0 or nbytes % BLOCK_ALIGN:
            os.close(fd)
            raise InvalidHandle(f"the segment is said to have {nbytes} bytes, and its memfd has {real}")
        os.set_inheritable(fd, False)
        return cls(fd, nbytes)

    @property
    def descriptor(self) -> int:
        if self._fd < 0:
            raise InvalidHandle("the segment is closed and has no descriptor any more")
        return self._fd

    def shared_address(self) -> int:
        return self._shared_memory().address

    def shared_memory(self) -> object:
        return self._shared_memory()

    def _shared_memory(self) -> _Memory:
        with self.lock:
            if self._shared is None:
                self._shared = _Memory(self.nbytes, mmap.MAP_SHARED, self.descriptor)
            return self._shared

    def prefault(self, offset: int, nbytes: int) -> None:
        # First copy of 25 MB into allocated pages: 4.5 ms by faults, 1.0 + 0.9 ms with this; warm 0.9.
        memory = self._shared_memory()
        with self.lock:
            memory.populate(offset, round_up(nbytes), MADV_POPULATE_WRITE)
            self._cold.remove(offset, offset + round_up(nbytes))

    def map_block(self, offset: int, nbytes: int) -> BlockMapping:
        span = round_up(nbytes)
        if nbytes <= 0 or offset < 0 or offset % BLOCK_ALIGN or offset + span > self.nbytes:
            raise InvalidHandle(f"{nbytes} bytes at {offset} are no block of a segment of {self.nbytes}")
        with self.lock:
            fd = self.descriptor
            lane = next((lane for lane in self._lanes if lane.claim(offset, offset + span)), None)
            if lane is None and len(self._lanes) < _MAX_LANES:
                lane = _Lane(self.nbytes, fd)
                lane.claim(offset, offset + span)
                self._lanes.append(lane)
            if lane is None:
                return _OwnMapping(fd, offset, span)
            # First read of 25 MB: 0.7 ms by faults, 0.4 ms with this.
            if span <= _POPULATE_MAX_BYTES:
                lane.populate(offset, span, MADV_POPULATE_READ)
        return _LaneMapping(self, lane, offset, span)

    def isolate(self, offset: int, nbytes: int) -> bool:
        try:
            return self._remap(offset, round_up(nbytes), isolated=True)
        except OSError as error:
            if error.errno in (errno.ENOMEM, errno.EAGAIN):  # out of address ranges: vm.max_map_count
                return False
            raise

    def rejoin(self, offset: int, nbytes: int) -> None:
        self._remap(offset, round_up(nbytes), isolated=False)

    @property
    def cold(self) -> bool:
        return bool(self._cold)

    def warm(self) -> None:
        while True:
            with self.lock:
                span = self._cold.take()
                if span is None or self._shared is None or self._fd < 0:
                    return
                start, end = span
                if end - start > _WARM_STEP_BYTES:
                    end = start + _WARM_STEP_BYTES
                    self._cold.add(end, span[1])
                self._shared.populate(start, end - start, MADV_POPULATE_WRITE)

    @property
    def ordinary(self) -> bool:
        return bool(self._ordinary)

    def condense(self) -> bool:
        with self.lock:
            span = self._ordinary.take()
            if span is None or self._fd < 0:
                return True
            start, end = span
            if end - start > _CONDENSE_STEP_BYTES:
                end = start + _CONDENSE_STEP_BYTES
                self._ordinary.add(end, span[1])
            fd = os.dup(self._fd)
        try:
            left = condense(fd, start, end)
        finally:
            os.close(fd)
        with self.lock:
            self._ordinary.add(left, end)
        return left == end

    def isolated_clean(self, offset: int, nbytes: int) -> bool:
        if self._fd < 0:
            return False
        with self.lock:
            isolated = self._isolated.touches(offset, offset + nbytes)
        if not isolated:
            return True  # the owner still writes where everybody looks: there is no page to be looked through
        return not may_be_written(self.shared_address() + offset, nbytes)

    def _remap(self, offset: int, span: int, *, isolated: bool) -> bool:
        if span <= 0 or offset < 0 or offset % BLOCK_ALIGN or offset + span > self.nbytes:
            raise ValueError(f"{span} bytes at {offset} are not pages of this segment")
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE if isolated else mmap.MAP_SHARED
        with self.lock:
            memory = self._shared
            if memory is None or self._fd < 0:
                return False
            map_over(memory.address + offset, span, flags, self._fd, offset)
            memory.forget_populated(offset, span)
            # Cold pages are never isolated ones: to populate those for writing would copy them.
            gains, loses = (self._isolated, self._cold) if isolated else (self._cold, self._isolated)
            gains.add(offset, offset + span)
            loses.remove(offset, offset + span)
            return True

    def close(self) -> None:
        with self.lock:
            fd, self._fd = self._fd, -1
            self._shared = None
            self._lanes.clear()
        if fd >= 0:
            os.close(fd)


def _memfd_create(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 6.3 does not know the flag
            raise
        return os.memfd_create(name, flags)


def _close_quietly(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
