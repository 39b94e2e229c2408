"""The GPU memory of the supervisor's process: every segment that processes share, its own arenas, copies for
others.

Owns the making and the freeing of segments: each, of whichever arena, is allocated by this process, so that a
killed worker takes none with it, and is freed here once nobody has it open. It opens no context: where this
process does not use a device, there is no shared memory on it, and tensors cross through main memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from legion_shm.errors import ArenaFull, CudaError, InvalidHandle
from legion_shm.transport.codec_types import DeviceBlock, DeviceBytes
from legion_shm.transport.gpu_memory import GpuMemory, devices_in_use
from legion_shm.transport.gpu_segment import GpuSegment
from legion_shm.transport.handles import BlockHandle

__all__ = ["MasterGpu"]

_Key = tuple[int, int]


class MasterGpu:
    """Thread-safe. ``next_id`` numbers segments; ``segment_added`` and ``retired`` hear of own ones."""

    def __init__(
        self,
        *,
        arena_id: int,
        quota_bytes: int,
        generations: Iterator[int],
        next_id: Callable[[], int],
        segment_added: Callable[[int, int, int], None],
        retired: Callable[[tuple[int, ...]], None],
    ) -> None:
        self._arena_id, self._quota_bytes = arena_id, quota_bytes
        self._next_id, self._segment_added, self._retired = next_id, segment_added, retired
        self._lock = threading.Lock()
        self._segments: dict[_Key, GpuSegment] = {}
        self._going: dict[_Key, GpuSegment] = {}
        self._ready: deque[GpuSegment] = deque()
        self._closed = False
        self._memory = GpuMemory(
            arena_id=arena_id,
            quota_bytes=quota_bytes,
            generations=generations,
            grow=self._grow,
            retired=self._retire,
        )
        self.avoided: dict[str, frozenset[str]] = {}
        """By pool, the devices whose memory a worker of it can't read. Replaced as a whole by the loop."""

    # --- for the codec --------------------------------------------------------------------------------

    def block(self, kind: str, device: str, nbytes: int) -> DeviceBlock | None:
        return self._memory.block(kind, device, nbytes)

    def free(self, handle: BlockHandle) -> bool:
        return self._memory.free(handle)

    def knows(self, handle: BlockHandle) -> bool:
        return self._memory.knows(handle.arena, handle.segment)

    def view(self, handle: BlockHandle) -> DeviceBytes:
        return self._memory.view(handle)

    def drain_released(self) -> list[BlockHandle]:
        return self._memory.drain_released()

    def undrained(self) -> int:
        return self._memory.undrained()

    @property
    def idle_since_s(self) -> float | None:
        """Since when the own arenas have segments and no block in use."""
        return self._memory.idle_since_s

    @idle_since_s.setter
    def idle_since_s(self, since_s: float | None) -> None:
        self._memory.idle_since_s = since_s

    def trim(self) -> None:
        """Give the own arenas' wholly free segments up."""
        ids = self._memory.trim()
        if ids:
            self._leave(self._arena_id, tuple(ids))
            self._retired(tuple(ids))

    # --- segments -------------------------------------------------------------------------------------

    def create(self, arena: int, device: str, nbytes: int) -> tuple[int, GpuSegment]:
        """Make a segment of any arena on a device that this process uses. Raises ArenaFull with the reason.

        Takes about a millisecond.
        """
        if not self._quota_bytes:
            raise ArenaFull("gpu_arena_quota_bytes is 0")
        if devices_in_use() is None:
            raise ArenaFull("the supervisor's process does not use a GPU yet")
        if self.segment_bytes(arena) + GpuSegment.whole_bytes(nbytes) > self._quota_bytes:
            raise ArenaFull(f"gpu_arena_quota_bytes = {self._quota_bytes} would be exceeded")
        try:
            segment = GpuSegment.create(device, nbytes)
        except ArenaFull as error:
            if isinstance(error.__cause__, CudaError) and "OUT_OF_MEMORY" not in str(error):
                self._memory.warn(str(error))
            raise
        segment_id = self._next_id()
        with self._lock:
            if self._closed:
                segment.close()
                raise ArenaFull("the supervisor is closed")
            self._segments[arena, segment_id] = segment
        if arena != self._arena_id:
            self._memory.add(arena, segment_id, segment.again())
        return segment_id, segment

    def segment(self, arena: int, segment_id: int) -> GpuSegment | None:
        return self._segments.get((arena, segment_id))

    def ids(self, arena: int) -> tuple[int, ...]:
        with self._lock:
            return tuple(key[1] for key in self._segments if key[0] == arena)

    def segment_bytes(self, arena: int) -> int:
        """What an arena's segments take of all devices."""
        with self._lock:
            sizes = [segment.nbytes for key, segment in self._segments.items() if key[0] == arena]
        return sum(map(GpuSegment.whole_bytes, sizes))

    def _grow(self, device: str, nbytes: int) -> tuple[int, GpuSegment]:
        segment_id, segment = self.create(self._arena_id, device, nbytes)
        self._segment_added(self._arena_id, segment_id, segment.nbytes)
        return segment_id, segment.again()

    def _retire(self, segment_id: int) -> None:
        self._leave(self._arena_id, (segment_id,))
        self._retired((segment_id,))

    def drop(self, arena: int, segment_ids: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Forget segments (all of an arena by default): their ids. `release` frees each."""
        known = self.ids(arena)
        ids = known if segment_ids is None else tuple(i for i in segment_ids if i in known)
        for segment_id in ids:
            self._memory.drop(arena, segment_id)
        self._leave(arena, ids)
        return ids

    def _leave(self, arena: int, ids: tuple[int, ...]) -> None:
        with self._lock:
            for segment_id in ids:
                self._going[arena, segment_id] = self._segments.pop((arena, segment_id))

    def is_going(self, arena: int, segment_id: int) -> bool:
        """Whether that segment is to be freed once nobody has it open."""
        return (arena, segment_id) in self._going

    def release(self, arena: int, segment_id: int) -> None:
        """Nobody has that segment open any more: the next `free_released` frees it."""
        segment = self._going.pop((arena, segment_id), None)
        if segment is not None:
            self._ready.append(segment)

    def free_released(self) -> None:
        """From a helper's thread: the driver may wait for work on the device."""
        while self._ready:
            try:
                self._ready.popleft().close()
            except IndexError:  # another thread was faster
                return

    def copy_to_host(self, handle: BlockHandle, address: int) -> None:
        """Copy a block's bytes to main memory. Raises CudaError, InvalidHandle."""
        segment = self._segments.get((handle.arena, handle.segment))
        if segment is None:
            raise InvalidHandle(f"{handle}: no such segment of a GPU's memory")
        segment.read_into(address, handle.offset, handle.nbytes)

    def close(self) -> None:
        """Free every segment; the workers, and what they had open, are gone."""
        with self._lock:
            self._closed = True
            segments = [*self._segments.values(), *self._going.values()]
            self._segments.clear()
            self._going.clear()
        self._memory.close()
        for segment in segments:
            segment.close()
        self.free_released()
