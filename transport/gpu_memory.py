"""What one process has of shared GPU memory: its own arena on each device, and the segments that it can read.

Owns the arenas, the table of segments and the list of deliveries that have ended. A copy goes in and a copy
comes out, both within the device; nothing is viewed for longer than a decoding takes. It never decides what
is done instead where there is no such memory: `block` gives None, and `view` raises.

    block(device, nbytes) ─▶ DeviceBlock ── filled, synchronized ──▶ published under its handle ─▶ ... ─▶ free
    view(handle) ─▶ DeviceBytes ── cloned, synchronized, let go ──▶ drain_released()
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from legion_shm.clock import monotonic_s
from legion_shm.errors import ArenaFull, CudaError, InvalidHandle
from legion_shm.transport.arena import Arena
from legion_shm.transport.codec_types import DeviceBlock, DeviceBytes, Devices
from legion_shm.transport.cuda_driver import ipc_problem
from legion_shm.transport.gpu_segment import GpuSegment
from legion_shm.transport.handles import BlockHandle

__all__ = ["ALL_DEVICES", "GpuMemory", "devices_in_use", "without_gpu"]

_log = logging.getLogger("legion_shm.gpu")

_ASK_AGAIN_S = 1.0
"""After a refusal: the supervisor may have come to use the device, or blocks may have been freed."""

ALL_DEVICES = frozenset({""})
"""For `without_gpu`: whatever device it is."""

_avoided: ContextVar[frozenset[str]] = ContextVar("legion_avoided_devices", default=frozenset())


class without_gpu:  # noqa: N801 - used as a function, as is `residing`
    """Let what is encoded inside put nothing into shared memory of these devices, by UUID."""

    __slots__ = ("_devices", "_token")

    def __init__(self, devices: frozenset[str]) -> None:
        self._devices = devices

    def __enter__(self) -> None:
        self._token = _avoided.set(self._devices)

    def __exit__(self, *exception: object) -> None:
        _avoided.reset(self._token)


def devices_in_use() -> Devices | None:
    """torch's devices, where this process uses such already; loads nothing."""
    if "torch" not in sys.modules:
        return None
    from legion_shm.transport.torch_devices import current_devices

    devices = current_devices()
    return devices if devices.initialized() else None


class GpuMemory:
    """Thread-safe but for `drop` and `close`, after which nothing may be asked for what they dropped.

    ``grow(device, nbytes)`` makes a segment on that device and gives its id and the segment, or raises
    ArenaFull; ``retired(segment_id)`` hears of each that an arena gave up to make room for a larger one. A
    ``quota_bytes`` of 0 turns the arenas off; others' segments can be read all the same.
    """

    def __init__(
        self,
        *,
        arena_id: int,
        quota_bytes: int,
        generations: Iterator[int] | None = None,
        grow: Callable[[str, int], tuple[int, GpuSegment]],
        retired: Callable[[int], None],
    ) -> None:
        self._arena_id, self._quota_bytes = arena_id, quota_bytes
        self._generations = itertools.count(1) if generations is None else generations
        self._grow, self._retired = grow, retired
        self._lock = threading.Lock()
        self._arenas: dict[str, Arena] = {}
        self._owners: dict[int, Arena] = {}
        self._segments: dict[tuple[int, int], GpuSegment] = {}
        self._refused_s: dict[str, float] = {}  # during one reservation, which asks for less and less
        self._asked_in_vain_s: dict[str, float] = {}
        self._located: dict[str, Any] = {}
        self._ended: deque[BlockHandle] = deque()
        self._warned = False
        self.idle_since_s: float | None = None
        """Since when the own arenas have segments and no block, whatever is in use of main memory."""

    # --- the own arenas -----------------------------------------------------------------------------

    def block(self, kind: str, device: str, nbytes: int) -> DeviceBlock | None:
        """A block on that device to be filled; None where there is no room for it, or no sharing at all."""
        if kind != "cuda" or not self._quota_bytes or ipc_problem():
            return None
        avoided = _avoided.get()
        if avoided and not avoided.isdisjoint(("", device)):
            return None
        arena = self._arena(device)
        self.idle_since_s = None
        try:
            block = arena.reserve(nbytes)
        except ArenaFull as error:
            _log.debug("%s", error)
            self._note_idle()
            refused_s = self._refused_s.pop(device, None)
            if refused_s is not None:
                self._asked_in_vain_s[device] = refused_s
            return None
        try:
            segment = self._segments[self._arena_id, block.handle.segment]
            return DeviceBlock(block.handle, self._bytes(segment, block.handle))
        except Exception as error:
            self.free(block.handle)
            self.warn(f"torch takes no shared memory of GPU {device}: {error}")
            self._quota_bytes = 0
            return None

    def _arena(self, device: str) -> Arena:
        with self._lock:
            arena = self._arenas.get(device)
            if arena is None:
                arena = self._arenas[device] = Arena(
                    arena_id=self._arena_id,
                    grow=lambda nbytes: self._grow_on(device, nbytes),
                    quota_bytes=self._quota_bytes,
                    full_wait_s=0.0,  # main memory is there at once
                    shrink=self._given_up,
                    generations=self._generations,
                )
            return arena

    def _grow_on(self, device: str, nbytes: int) -> tuple[int, GpuSegment]:
        asked_s = self._asked_in_vain_s.get(device)
        if asked_s is not None and monotonic_s() < asked_s + _ASK_AGAIN_S:
            raise ArenaFull(f"memory of GPU {device} was refused a moment ago")
        try:
            segment_id, segment = self._grow(device, nbytes)
        except ArenaFull:
            self._refused_s[device] = monotonic_s()
            raise
        with self._lock:
            self._owners[segment_id] = self._arenas[device]
        self.add(self._arena_id, segment_id, segment)
        return segment_id, segment.again()

    def _given_up(self, segment_id: int) -> None:
        self.drop(self._arena_id, segment_id)
        self._retired(segment_id)

    def free(self, handle: BlockHandle) -> bool:
        """Take back a block of an own arena. False where that handle is of none of these."""
        arena = self._owners.get(handle.segment) if handle.arena == self._arena_id else None
        if arena is None:
            return False
        arena.free(handle)
        self._note_idle()
        return True

    def _note_idle(self) -> None:
        if not self.blocks() and self.total_bytes():
            self.idle_since_s = monotonic_s()

    def trim(self) -> list[int]:
        """Give up the wholly free segments of the own arenas: their ids."""
        self.idle_since_s = None
        ids = [segment_id for arena in tuple(self._arenas.values()) for segment_id in arena.trim()]
        for segment_id in ids:
            self.drop(self._arena_id, segment_id)
        return ids

    def blocks(self) -> int:
        """Blocks of the own arenas that somebody may be looking at."""
        return sum(arena.stats().blocks for arena in tuple(self._arenas.values()))

    def total_bytes(self) -> int:
        """What the own arenas' segments hold."""
        return sum(arena.stats().total_bytes for arena in tuple(self._arenas.values()))

    # --- all segments -------------------------------------------------------------------------------

    def add(self, arena: int, segment_id: int, segment: GpuSegment) -> None:
        with self._lock:
            if (arena, segment_id) in self._segments:
                raise InvalidHandle(f"segment {segment_id} of arena {arena} is attached already")
            self._segments[arena, segment_id] = segment

    def knows(self, arena: int, segment_id: int) -> bool:
        return (arena, segment_id) in self._segments

    def drop(self, arena: int, segment_id: int) -> bool:
        """Let go of a segment; whether it was there."""
        with self._lock:
            if arena == self._arena_id:
                self._owners.pop(segment_id, None)
            segment = self._segments.pop((arena, segment_id), None)
        if segment is None:
            return False
        segment.close()
        return True

    def view(self, handle: BlockHandle) -> DeviceBytes:
        """The bytes of a block, one delivery, which ends when they are let go of.

        Raises `InvalidHandle` for a segment that is none of a GPU's, or bounds outside of it.
        """
        segment = self._segments.get((handle.arena, handle.segment))
        if segment is None:
            raise InvalidHandle(f"{handle}: no such segment of a GPU's memory is open in this process")
        handle.check_within(segment.nbytes)
        view = self._bytes(segment, handle)
        weakref.finalize(view, self._ended.append, handle).atexit = False
        return view

    def _bytes(self, segment: GpuSegment, handle: BlockHandle) -> DeviceBytes:
        from legion_shm.transport.torch_devices import current_devices

        devices = current_devices()
        device = self._located.get(segment.device)
        if device is None:
            device = self._located[segment.device] = devices.locate("cuda", segment.device)
            if device is None:
                raise CudaError(f"torch has no device {segment.device} in this process")
        whole = segment.tensor(devices, device)
        part = whole[handle.offset : handle.offset + handle.nbytes]
        return DeviceBytes(("cuda", segment.device), part, devices.synchronize, segment.shared_memory())

    def drain_released(self) -> list[BlockHandle]:
        """Deliveries that have ended since the last call, one entry each."""
        handles: list[BlockHandle] = []
        while self._ended:
            try:
                handles.append(self._ended.popleft())
            except IndexError:  # another thread was faster
                break
        return handles

    def undrained(self) -> int:
        return len(self._ended)

    def warn(self, what: str) -> None:
        """Say once why tensors of a GPU go through main memory."""
        if not self._warned:
            self._warned = True
            _log.warning("tensors of a GPU cross through main memory: %s", what)

    def close(self) -> None:
        """Close the own arenas and every segment; what is being copied keeps its memory for so long."""
        for arena in tuple(self._arenas.values()):
            arena.close()
        for key in list(self._segments):
            self.drop(*key)
