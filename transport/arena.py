"""The owner's side of shared memory: the one process that allocates from these segments.

Owns the allocator, the segments' shared mappings and the growth up to a quota. It keeps no leases and
sends nothing: whoever runs it tells it when a block may be freed.

    reserve ─▶ Block(.handle, .address) ── the owner writes ──▶ published under .handle ─▶ ... ─▶ free
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Condition

from legion_shm import faults
from legion_shm.errors import ArenaFull, ForkedError
from legion_shm.transport.allocator import BlockAllocator
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle, round_up
from legion_shm.transport.segment import Segment

__all__ = ["SEGMENT_STEP_BYTES", "Arena", "ArenaStats", "Block"]

SEGMENT_STEP_BYTES = 2 * 1024 * 1024
"""Segments are a multiple of this: a huge page, and not a descriptor for each small block."""

_GROWTH_DIVISOR = 4
"""An arena grows by a quarter at least: few segments, and never much more memory than was asked for."""

_SHORTAGE_RETRY_S = 1.0
"""Where the machine, not the quota, is short of memory, nobody tells when it has some again."""


@dataclass(frozen=True, slots=True)
class Block:
    """A reserved block: write ``handle.nbytes`` bytes at ``address``. Keeps the memory mapped."""

    handle: BlockHandle
    address: int
    memory: object = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """Bytes count whole pages. ``total_bytes`` is what the segments hold, used or not."""

    live_bytes: int
    total_bytes: int
    peak_live_bytes: int
    blocks: int
    segments: int


class Arena:
    """Blocks of shared memory that this process fills. Thread-safe; `ForkedError` in a forked child.

    ``grow(nbytes)`` makes a segment of at least that size and returns its id and the segment, or raises
    `ArenaFull`; it is called by one thread at a time, with no lock held. ``wait(timeout_s)`` blocks until a
    block may have been freed (by default until another thread calls `free`). ``shrink(segment_id)`` hears of
    each idle segment that `reserve` gave up to make room for a larger one; without it, such ids are returned
    by the next `trim`. ``generations`` counts for several arenas of one id, each with its own segments.
    """

    def __init__(
        self,
        *,
        arena_id: int,
        grow: Callable[[int], tuple[int, Segment]],
        quota_bytes: int,
        wait: Callable[[float], bool] | None = None,
        full_wait_s: float = 30.0,
        shrink: Callable[[int], None] | None = None,
        generations: Iterator[int] | None = None,
    ) -> None:
        self.arena_id = arena_id
        self.quota_bytes = quota_bytes - quota_bytes % BLOCK_ALIGN
        self.elsewhere_bytes = 0  # of the quota, in segments that are not for blocks of ours
        self._grow = grow
        self._wait = wait
        self._shrink = shrink
        self._full_wait_s = full_wait_s
        self._pid = os.getpid()
        self._changed = Condition()
        self._allocator = BlockAllocator(arena_id, generations)
        self._segments: dict[int, Segment] = {}
        self._isolated: set[BlockHandle] = set()
        self._given_up: list[int] = []
        self._changes = 0
        self._growing = False
        self._condemned = False

    def reserve(self, nbytes: int) -> Block:
        """A block of ``nbytes`` (> 0) that nobody else views.

        Waits up to ``full_wait_s`` for blocks to be freed where the quota is used up, then raises
        `ArenaFull`; at once where the block can never fit, or the arena is condemned.
        """
        self._check_process()
        span = round_up(nbytes)
        if span > self.quota_bytes:
            raise ArenaFull(
                f"a block of {nbytes} bytes can never fit into an arena with a quota of "
                f"{self.quota_bytes} bytes; raise arena_quota_bytes"
            )
        deadline = time.monotonic() + self._full_wait_s
        shortage: ArenaFull | None = None
        while True:
            given_up: list[int] = []
            with self._changed:
                if self._condemned:
                    raise ArenaFull(f"arena {self.arena_id} is closed to new blocks")
                handle = self._allocator.reserve(nbytes)
                if handle is not None:
                    segment = self._segments[handle.segment]
                    break
                seen = self._changes
                others = self._growing
                size = 0 if others else self._growth(span, given_up)
                self._growing = others or size > 0
            if size:
                shortage = self._grow_by(size, span, given_up)
                if shortage is None:
                    continue
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise self._full(nbytes, shortage) from shortage
            if shortage is not None:
                remaining = min(remaining, _SHORTAGE_RETRY_S)
            if others or self._wait is None:
                with self._changed:
                    self._changed.wait_for(lambda seen=seen: self._changes != seen, remaining)  # type: ignore[misc]
            else:
                self._wait(remaining)
        try:
            if faults.hit is not None:
                faults.hit("arena.after_reserve")
            segment.prefault(handle.offset, nbytes)
            return Block(handle, segment.shared_address() + handle.offset, segment.shared_memory())
        except BaseException:
            self.free(handle)
            raise

    def free(self, handle: BlockHandle) -> None:
        """Take back a block that nobody views any more. `StaleHandle` where it is not live."""
        self._check_process()
        with self._changed:
            self._allocator.check_live(handle)
            if handle in self._isolated:
                self._rejoin(handle)
            self._allocator.free(handle)
            self._note_change()

    def handle_for(self, segment_id: int, offset: int, nbytes: int) -> BlockHandle:
        """A handle, of a generation never used before, for a block that somebody else keeps in this arena."""
        self._check_process()
        with self._changed:
            return BlockHandle(self.arena_id, segment_id, offset, nbytes, self._allocator.next_generation())

    def condemn(self) -> None:
        """Refuse new blocks from now on; live ones stay until they are freed."""
        self._check_process()
        with self._changed:
            self._condemned = True
            self._note_change()

    def isolate(self, handle: BlockHandle) -> bool:
        """Make the owner's own mapping of a published block copy-on-write, so that no reader sees its writes.

        False where the segment's kind can't: the owner must then publish a copy instead.
        """
        self._check_process()
        with self._changed:
            self._allocator.check_live(handle)
            if handle not in self._isolated:
                if not self._segments[handle.segment].isolate(handle.offset, handle.nbytes):
                    return False
                self._isolated.add(handle)
            return True

    def rejoin(self, handle: BlockHandle) -> None:
        """Undo `isolate`, dropping what the owner wrote since. `free` does it too."""
        self._check_process()
        with self._changed:
            self._allocator.check_live(handle)
            if handle in self._isolated:
                self._rejoin(handle)

    @property
    def cold(self) -> bool:
        """Whether blocks that were isolated and freed have pages to be mapped before they are used again."""
        return any(segment.cold for segment in tuple(self._segments.values()))

    def warm(self) -> None:
        """Map those pages now (25 MB: 1 ms), from a thread that has nothing better to do."""
        self._check_process()
        for segment in tuple(self._segments.values()):
            segment.warm()

    def trim(self) -> list[int]:
        """Close the wholly free segments and return their ids, the largest first."""
        self._check_process()
        with self._changed:
            ids, self._given_up = self._given_up, []
            for segment_id in self._allocator.idle_segments():
                self._drop(segment_id)
                ids.append(segment_id)
            return ids

    def stats(self) -> ArenaStats:
        self._check_process()
        with self._changed:
            allocator = self._allocator
            return ArenaStats(
                live_bytes=allocator.live_bytes,
                total_bytes=allocator.total_bytes,
                peak_live_bytes=allocator.peak_bytes,
                blocks=allocator.blocks,
                segments=allocator.segments,
            )

    def close(self) -> None:
        """Condemn the arena and close its segments. Blocks and views that live keep their memory."""
        self._check_process()
        with self._changed:
            self._condemned = True
            for segment in self._segments.values():
                segment.close()
            self._note_change()

    def _growth(self, span: int, given_up: list[int]) -> int:
        """The next segment's size, 0 where the quota leaves no room; gives idle segments up to make some."""
        allocator = self._allocator
        idle = allocator.idle_segments()
        room = self.quota_bytes - self.elsewhere_bytes - allocator.total_bytes
        room -= room % BLOCK_ALIGN
        if room < span <= room + sum(map(allocator.segment_nbytes, idle)):
            while room < span:
                segment_id = idle.pop(0)
                room += allocator.segment_nbytes(segment_id)
                self._drop(segment_id)
                given_up.append(segment_id)
        if room < span:
            return 0
        return min(round_up(max(span, allocator.total_bytes // _GROWTH_DIVISOR), SEGMENT_STEP_BYTES), room)

    def _grow_by(self, size: int, span: int, given_up: list[int]) -> ArenaFull | None:
        """Add one segment, a smaller one where memory is short; the shortage where there is none at all."""
        made: tuple[int, Segment] | None = None
        shortage: ArenaFull | None = None
        try:
            for attempt in (size, span, span):
                while self._shrink is not None and given_up:
                    self._shrink(given_up.pop(0))
                try:
                    made = self._grow(attempt)
                    return None
                except ArenaFull as error:
                    shortage = error
                with self._changed:
                    # The machine is short, not the quota: the next attempt may use what lies idle here.
                    for segment_id in self._allocator.idle_segments() if attempt == span else ():
                        self._drop(segment_id)
                        given_up.append(segment_id)
            return shortage
        finally:
            with self._changed:
                self._given_up.extend(given_up)
                self._growing = False
                if made is not None:
                    self._segments[made[0]] = made[1]
                    self._allocator.add_segment(made[0], made[1].nbytes)
                self._note_change()

    def _full(self, nbytes: int, shortage: ArenaFull | None) -> ArenaFull:
        if shortage is not None:
            return ArenaFull(
                f"no room for a block of {nbytes} bytes within {self._full_wait_s:g} s: {shortage}"
            )
        stats = self.stats()
        return ArenaFull(
            f"no room for a block of {nbytes} bytes within {self._full_wait_s:g} s: {stats.blocks} blocks "
            f"use {stats.live_bytes} bytes of a quota of {self.quota_bytes}; let go of results that are no "
            "longer needed, or raise arena_quota_bytes"
        )

    def _drop(self, segment_id: int) -> None:
        self._allocator.remove_segment(segment_id)
        self._segments.pop(segment_id).close()

    def _rejoin(self, handle: BlockHandle) -> None:
        self._segments[handle.segment].rejoin(handle.offset, handle.nbytes)
        self._isolated.discard(handle)

    def _note_change(self) -> None:
        self._changes += 1
        self._changed.notify_all()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"arena {self.arena_id} belongs to process {self._pid}; a forked child must make its own"
            )
