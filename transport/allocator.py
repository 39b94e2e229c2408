"""Which bytes of an arena are taken: a pure allocator over a growing list of segments.

Owns the live blocks, the free extents and the generation counter, where it is given none. It never touches
memory and never waits. Best fit with coalescing: the smallest free extent that holds the request, and of
equal ones that of the lowest segment and offset. That leaves the large untouched tails for last, so steady
traffic returns to the same pages, which are already mapped in every process that saw them.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator

from legion_shm.errors import StaleHandle
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle, round_up

__all__ = ["BlockAllocator"]


class BlockAllocator:
    """Hands out blocks of whole pages. Not thread-safe: its arena locks around it.

    ``live_bytes``, ``peak_bytes`` and ``total_bytes`` count whole pages, as memory is really used.
    """

    def __init__(self, arena: int, generations: Iterator[int] | None = None) -> None:
        self._arena = arena
        self._generations = itertools.count(1) if generations is None else generations
        self._segments: dict[int, int] = {}
        self._live: dict[int, BlockHandle] = {}
        self._live_in: dict[int, int] = {}
        # The same extents three ways: by size for the search, by either end for coalescing.
        self._by_size: list[tuple[int, int, int]] = []
        self._by_start: dict[tuple[int, int], int] = {}
        self._by_end: dict[tuple[int, int], int] = {}
        self.live_bytes = 0
        self.peak_bytes = 0
        self.total_bytes = 0

    @property
    def blocks(self) -> int:
        return len(self._live)

    @property
    def segments(self) -> int:
        return len(self._segments)

    @property
    def largest_free(self) -> int:
        """Bytes of the largest block that can be reserved now."""
        return self._by_size[-1][0] if self._by_size else 0

    def add_segment(self, segment: int, nbytes: int) -> None:
        """Add a segment, wholly free; a rest smaller than one block's alignment is not used."""
        if segment in self._segments:
            raise ValueError(f"segment {segment} is in the arena already")
        usable = nbytes - nbytes % BLOCK_ALIGN
        if usable <= 0:
            raise ValueError(f"segment {segment} of {nbytes} bytes holds no block")
        self._segments[segment] = usable
        self._live_in[segment] = 0
        self.total_bytes += usable
        self._insert(segment, 0, usable)

    def remove_segment(self, segment: int) -> None:
        """Take a wholly free segment out of the arena."""
        if self._live_in[segment]:
            raise ValueError(f"segment {segment} still holds {self._live_in[segment]} blocks")
        nbytes = self._segments.pop(segment)
        del self._live_in[segment]
        self._remove(segment, 0)
        self.total_bytes -= nbytes

    def reserve(self, nbytes: int) -> BlockHandle | None:
        """A new block, or None where no free extent holds it."""
        if nbytes <= 0:
            raise ValueError(f"a block has at least one byte, not {nbytes}")
        span = round_up(nbytes)
        index = bisect_left(self._by_size, (span, -1, -1))
        if index == len(self._by_size):
            return None
        size, segment, offset = self._by_size[index]
        self._remove(segment, offset)
        if size > span:
            self._insert(segment, offset + span, size - span)
        handle = BlockHandle(self._arena, segment, offset, nbytes, self.next_generation())
        self._live[handle.generation] = handle
        self._live_in[segment] += 1
        self.live_bytes += span
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return handle

    def next_generation(self) -> int:
        """A number that no block of this arena has had."""
        return next(self._generations)

    def check_live(self, handle: BlockHandle) -> None:
        """Raise `StaleHandle` unless this very block is live."""
        if self._live.get(handle.generation) != handle:
            raise StaleHandle(f"{handle} is not live: it was freed, or never made, in arena {self._arena}")

    def free(self, handle: BlockHandle) -> None:
        """Return a live block; `StaleHandle`, and no change, for any other."""
        self.check_live(handle)
        del self._live[handle.generation]
        segment, offset, span = handle.segment, handle.offset, handle.span
        self._live_in[segment] -= 1
        self.live_bytes -= span
        before = self._by_end.get((segment, offset))
        if before is not None:
            self._remove(segment, before)
            offset, span = before, span + offset - before
        after = self._by_start.get((segment, offset + span))
        if after is not None:
            self._remove(segment, offset + span)
            span += after
        self._insert(segment, offset, span)

    def live(self) -> tuple[BlockHandle, ...]:
        return tuple(self._live.values())

    def idle_segments(self) -> list[int]:
        """The wholly free segments, the largest first."""
        idle = [segment for segment, count in self._live_in.items() if count == 0]
        return sorted(idle, key=lambda segment: (-self._segments[segment], segment))

    def segment_nbytes(self, segment: int) -> int:
        return self._segments[segment]

    def _insert(self, segment: int, offset: int, size: int) -> None:
        insort(self._by_size, (size, segment, offset))
        self._by_start[segment, offset] = size
        self._by_end[segment, offset + size] = offset

    def _remove(self, segment: int, offset: int) -> None:
        size = self._by_start.pop((segment, offset))
        del self._by_end[segment, offset + size]
        del self._by_size[bisect_left(self._by_size, (size, segment, offset))]
