"""The lease table: who may be looking at which published block. The supervisor's, pure, no I/O.

A block is published once, by the message that first carries its handle, and freed when its last lease
ends. A holder is a name: a job (its inputs, until it ends), a worker (what was delivered to it, until it
says so or dies), or the supervisor's own process (results, resident tensors).

    publish ─▶ lease, lease, ... ─▶ release, ... ─▶ freed ─▶ drain_freed ─▶ the owner's arena

The table also is what a handle is checked against: a handle that no live block matches to the letter is
`InvalidHandle` (no such segment, or another size) or `StaleHandle` (no such block, or not any more).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from legion_shm.errors import InvalidHandle, StaleHandle
from legion_shm.transport.handles import BlockHandle

__all__ = ["LeaseTable"]

_Key = tuple[int, int, int]  # arena, segment, offset


@dataclass
class _Block:
    handle: BlockHandle
    holders: dict[str, int] = field(default_factory=dict[str, int])


@dataclass
class _ArenaEntry:
    segments: dict[int, int] = field(default_factory=dict[int, int])
    starts: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    blocks: int = 0
    condemned: bool = False


class LeaseTable:
    """Not thread-safe: the supervisor's loop owns it."""

    def __init__(self) -> None:
        self._arenas: dict[int, _ArenaEntry] = {}
        self._blocks: dict[_Key, _Block] = {}
        self._held: dict[str, dict[_Key, None]] = {}
        self._freed: dict[int, list[BlockHandle]] = {}
        self._empty: list[int] = []
        self.over_released = 0

    # --- arenas -----------------------------------------------------------------------------------

    def add_segment(self, arena: int, segment: int, nbytes: int) -> None:
        """Blocks may be published in this segment from now on."""
        entry = self._arenas.setdefault(arena, _ArenaEntry())
        entry.segments[segment] = nbytes
        entry.starts[segment] = []

    def remove_segment(self, arena: int, segment: int) -> bool:
        """Forget a segment that its owner gave up. False, and nothing done, while a block in it lives."""
        entry = self._arenas.get(arena)
        if entry is None or entry.starts.get(segment):
            return False
        entry.segments.pop(segment, None)
        entry.starts.pop(segment, None)
        return True

    def condemn(self, arena: int) -> None:
        """The owner is dead: no more blocks. `drain_empty` names the arena when its last one is freed."""
        entry = self._arenas.setdefault(arena, _ArenaEntry())
        entry.condemned = True
        self._forget_if_done(arena, entry)

    def arena_bytes(self, arena: int) -> int:
        entry = self._arenas.get(arena)
        return sum(entry.segments.values()) if entry else 0

    # --- blocks -----------------------------------------------------------------------------------

    def publish(self, handle: BlockHandle, holder: str) -> None:
        """A new block and its first lease. InvalidHandle when it lies outside of what was granted."""
        entry = self._arenas.get(handle.arena)
        if entry is None or entry.condemned or handle.segment not in entry.segments:
            raise InvalidHandle(f"{handle}: no such segment was granted")
        handle.check_within(entry.segments[handle.segment])
        starts = entry.starts[handle.segment]
        at = bisect_left(starts, handle.offset)
        if at < len(starts) and starts[at] < handle.offset + handle.nbytes:
            raise InvalidHandle(f"{handle}: overlaps a block that is in use")
        if at:
            before = self._blocks[handle.arena, handle.segment, starts[at - 1]].handle
            if before.offset + before.nbytes > handle.offset:
                raise InvalidHandle(f"{handle}: overlaps a block that is in use")
        key = (handle.arena, handle.segment, handle.offset)
        insort(starts, handle.offset)
        entry.blocks += 1
        self._blocks[key] = _Block(handle)
        self._add(key, holder)

    def check(self, handle: BlockHandle) -> None:
        """StaleHandle or InvalidHandle unless this very block is live."""
        self._live(handle)

    def _live(self, handle: BlockHandle) -> _Block:
        entry = self._arenas.get(handle.arena)
        if entry is None or handle.segment not in entry.segments:
            raise InvalidHandle(f"{handle}: no such segment")
        block = self._blocks.get((handle.arena, handle.segment, handle.offset))
        if block is not None and block.handle == handle:
            return block
        if block is not None and block.handle.generation == handle.generation:
            raise InvalidHandle(f"{handle}: the block has another size")
        raise StaleHandle(f"{handle}: the block was freed or used again")

    def lease(self, handle: BlockHandle, holder: str) -> None:
        """One more delivery of a live block to this holder."""
        self._live(handle)
        self._add((handle.arena, handle.segment, handle.offset), holder)

    def is_live(self, handle: BlockHandle) -> bool:
        """Whether this very block is published and somebody has a lease on it."""
        block = self._blocks.get((handle.arena, handle.segment, handle.offset))
        return block is not None and block.handle == handle

    def holds(self, handle: BlockHandle, holder: str) -> bool:
        """Whether this holder has a lease on this very block."""
        block = self._blocks.get((handle.arena, handle.segment, handle.offset))
        return block is not None and block.handle == handle and holder in block.holders

    def _add(self, key: _Key, holder: str) -> None:
        holders = self._blocks[key].holders
        holders[holder] = holders.get(holder, 0) + 1
        self._held.setdefault(holder, {})[key] = None

    def release(self, handle: BlockHandle, holder: str) -> None:
        """One delivery ended. More ends than deliveries are counted and change nothing."""
        key = (handle.arena, handle.segment, handle.offset)
        block = self._blocks.get(key)
        if block is None or block.handle != handle or holder not in block.holders:
            self.over_released += 1
            return
        block.holders[holder] -= 1
        if not block.holders[holder]:
            self._end(key, block, holder)

    def release_all(self, handles: Iterable[BlockHandle], holder: str) -> None:
        for handle in handles:
            self.release(handle, holder)

    def drop_holder(self, holder: str) -> None:
        """The holder is gone, and all its leases with it."""
        for key in list(self._held.get(holder, ())):
            self._end(key, self._blocks[key], holder)

    def _end(self, key: _Key, block: _Block, holder: str) -> None:
        del block.holders[holder]
        keys = self._held[holder]
        del keys[key]
        if not keys:
            del self._held[holder]
        if block.holders:
            return
        handle = block.handle
        del self._blocks[key]
        entry = self._arenas[handle.arena]
        starts = entry.starts[handle.segment]
        starts.pop(bisect_left(starts, handle.offset))
        entry.blocks -= 1
        if not entry.condemned:
            self._freed.setdefault(handle.arena, []).append(handle)
        self._forget_if_done(handle.arena, entry)

    def _forget_if_done(self, arena: int, entry: _ArenaEntry) -> None:
        if entry.condemned and not entry.blocks:
            del self._arenas[arena]
            self._freed.pop(arena, None)
            self._empty.append(arena)

    # --- what follows -----------------------------------------------------------------------------

    @property
    def has_freed(self) -> bool:
        return bool(self._freed)

    def drain_freed(self, arena: int | None = None) -> dict[int, list[BlockHandle]]:
        """Blocks whose last lease ended since the last call, by arena (or of one arena)."""
        if arena is not None:
            handles = self._freed.pop(arena, None)
            return {arena: handles} if handles else {}
        freed, self._freed = self._freed, {}
        return freed

    def drain_empty(self) -> list[int]:
        """Condemned arenas that nobody looks at any more."""
        empty, self._empty = self._empty, []
        return empty

    def live_blocks(self, arena: int | None = None) -> int:
        if arena is None:
            return len(self._blocks)
        entry = self._arenas.get(arena)
        return entry.blocks if entry else 0
