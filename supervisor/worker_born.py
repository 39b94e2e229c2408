"""A worker's tensors that are born in its arena: publishing them without a copy, making room for them.

Owns the regions that the allocator shim serves from, and the handles of blocks in them. A block is held from
the message that publishes it until its last lease ends; what the worker itself keeps of it is
copy-on-write from then on (`seal`), so that nobody sees its writes. The main thread alone calls it.

    tensor made by a node ── adopt ──▶ handle ── seal ──▶ message ── last lease ends ──▶ free
"""

from __future__ import annotations

from collections.abc import Callable

from legion_shm.errors import ArenaFull, StaleHandle
from legion_shm.transport.born import Shim
from legion_shm.transport.dirty import may_be_written
from legion_shm.transport.handles import BlockHandle, round_up
from legion_shm.transport.segment import Segment

__all__ = ["BORN_MIN_BYTES", "QUOTA_DIVISOR", "RESERVED_BYTES", "WHOLE_DIVISOR", "BornBlocks"]

BORN_MIN_BYTES = 1 << 20
"""Smaller tensors are copied within 0.1 ms, and there are many of them."""

_SEGMENT_STEP_BYTES = 2 << 20
RESERVED_BYTES = 1 << 40  # addresses only: regions come and go, and leave gaps
QUOTA_DIVISOR = 4  # of the arena's quota, so that there is always room for copies
_BESIDE = 4  # a node's own tensors that live beside the one that is sent
WHOLE_DIVISOR = 4  # a view of less than a quarter of its block is copied, and does not keep the whole of it


class BornBlocks:
    """``publish(segment, offset, nbytes)`` makes a handle, ``grow(nbytes)`` a segment or raises ArenaFull."""

    def __init__(
        self,
        shim: Shim,
        *,
        quota_bytes: int,
        publish: Callable[[int, int, int], BlockHandle],
        grow: Callable[[int], tuple[int, Segment]],
    ) -> None:
        self._shim, self._publish, self._grow = shim, publish, grow
        self._quota_bytes = quota_bytes // QUOTA_DIVISOR
        self._segments: dict[int, int] = {}
        self._published: dict[int, BlockHandle] = {}  # by the block's address
        self._starts: dict[int, int] = {}  # generation to address
        self._unsent: set[int] = set()
        self._active = shim.reserve(RESERVED_BYTES)
        self._may_grow = True
        self._copied_bytes = self._copied_largest = 0

    @property
    def total_bytes(self) -> int:
        return sum(self._segments.values())

    @property
    def published(self) -> int:
        return len(self._published)

    def begin(self) -> None:
        """From now on tensors may be born here: the engine has been loaded."""
        if self._active:
            self._shim.numbers()
            self._shim.serve(BORN_MIN_BYTES)

    def adopt(self, address: int, nbytes: int) -> tuple[BlockHandle, int, bool] | None:
        """Publish the block that holds this memory: handle, offset in it, whether the handle is new.

        None where it was not born here, is published and may be on its way back, or is no longer what others
        would see.
        """
        block = self._shim.find(address) if self._segments else None
        if block is None and nbytes >= BORN_MIN_BYTES:
            self._copied_bytes += nbytes
            self._copied_largest = max(self._copied_largest, nbytes)
        if block is None or address + nbytes > block.start + block.nbytes:
            return None
        if block.held:
            known = self._published.get(block.start)
            if known is None or block.start not in self._unsent:
                return None
            return known, address - block.start, False
        if nbytes * WHOLE_DIVISOR < block.nbytes:
            return None
        if block.isolated and may_be_written(block.start, block.nbytes):
            return None
        if not self._shim.hold(block.start):
            return None
        handle = self._publish(block.segment, block.offset, block.nbytes)
        self._published[block.start] = handle
        self._starts[handle.generation] = block.start
        self._unsent.add(block.start)
        return handle, address - block.start, True

    def locate(self, address: int, nbytes: int) -> tuple[int, int] | None:
        """The segment and the offset of memory that was born here, if a view of them shows what is in it."""
        block = self._shim.find(address) if self._segments else None
        if block is None or address + nbytes > block.start + block.nbytes:
            return None
        if block.isolated and may_be_written(block.start, block.nbytes):
            return None
        return block.segment, block.offset + address - block.start

    def seal(self) -> None:
        """Before the message goes: what the worker still has of the new blocks becomes its own.

        Raises ArenaFull where it can't be made so.
        """
        unsent, self._unsent = self._unsent, set()
        try:
            for start in unsent:
                self._shim.isolate(start)
        except OSError as error:
            raise ArenaFull(
                f"{error}; raise vm.max_map_count, or start the worker with born_in_arena: off"
            ) from error

    def free(self, handle: BlockHandle) -> bool:
        """The last lease on a block has ended, or it was not sent. False for a handle that is not of here."""
        if handle.segment not in self._segments:
            return False
        start = self._starts.get(handle.generation)
        if start is None or self._published[start] != handle:
            raise StaleHandle(f"{handle} is not published: its lease has ended already")
        del self._starts[handle.generation], self._published[start]
        self._unsent.discard(start)
        self._shim.release(start)
        return True

    def make_room(self) -> bool:
        """Between jobs: a region for what was copied lately for want of room. Whether one was added.

        What found no room and was not sent needs none: a node's intermediate tensors, a model's weights. But
        where there is a region and it was not enough, those have taken it: then a few of them get room.
        """
        if not self._active or not self._copied_bytes or not self._may_grow:
            return False
        self._copied_bytes = 0
        largest, self._copied_largest = self._copied_largest, 0
        numbers = self._shim.numbers()
        total = self.total_bytes
        wanted = min(total + _BESIDE * largest if total else largest, numbers.missed_bytes)
        if not wanted or numbers.missed_largest < largest:
            return False
        size = round_up(wanted, _SEGMENT_STEP_BYTES)
        if total + size > self._quota_bytes:
            return False
        try:
            segment_id, segment = self._grow(size)
        except ArenaFull:
            self._may_grow = False  # until something has been given back
            return False
        self._segments[segment_id] = segment.nbytes
        return self._shim.add(segment_id, segment)

    def retire(self) -> list[int]:
        """Unmap the regions in which nothing lives; their segments' ids."""
        retired = [segment_id for segment_id in self._segments if self._shim.remove(segment_id)]
        for segment_id in retired:
            del self._segments[segment_id]
        self._may_grow = self._may_grow or bool(retired)
        return retired
