"""Lending of GPU memory: who has which segment open, whose workers can read none, and copies for these.

Owns the order of things around a segment of a GPU: it is freed only when every worker that had it open has
closed it or is gone, for the driver promises nothing otherwise. A worker that can't read a block is given a
copy of it in main memory, made on a helper's thread, and its pool is sent no more of that device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

from legion_shm.errors import ArenaFull, LegionError, ProtocolError
from legion_shm.supervisor.master_memory import MasterMemory
from legion_shm.supervisor.processes import Post, Processes
from legion_shm.supervisor.worker_io import WorkerIO
from legion_shm.transport.gpu_segment import GpuSegment
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.leases import LeaseTable
from legion_shm.transport.messages import (
    HANDLES_MAX,
    GpuSegmentIntroduced,
    GpuSegmentRequest,
    HostCopies,
    SegmentRefused,
)

__all__ = ["GpuLending"]

_DEVICE_MAX = 80
"""Characters of a device's UUID: torch writes 36, some tools 40."""


class GpuLending:
    """Used by the loop's thread alone; segments and copies are made on a helper's."""

    def __init__(
        self,
        memory: MasterMemory,
        processes: Processes,
        table: LeaseTable,
        helpers: Executor,
        post: Post,
        *,
        introduce: Callable[[WorkerIO, BlockHandle], None],
        dropped: Callable[[int, tuple[int, ...]], None],
        idle_trim_s: float,
    ) -> None:
        self._memory, self._processes, self._table = memory, processes, table
        self._helpers, self._post, self._introduce = helpers, post, introduce
        self._tell_dropped, self._idle_trim_s = dropped, idle_trim_s
        self._orphans: set[tuple[int, int]] = set()
        self._open: dict[tuple[int, int], set[str]] = {}  # segments that go, and who has each open still

    # --- segments -------------------------------------------------------------------------------------

    def introduce(self, worker: WorkerIO, arena: int, segment_id: int, segment: GpuSegment) -> None:
        """Describe a segment to a worker, which may open it from now on."""
        worker.gpu_segments.add((arena, segment_id))
        self._processes.send(
            worker,
            GpuSegmentIntroduced(
                arena, segment_id, segment.nbytes, segment.device, segment.handle, segment.pattern
            ),
        )

    def request(
        self, worker: WorkerIO, message: GpuSegmentRequest, granted: Callable[[int, int], None]
    ) -> None:
        """A worker's arena wants to grow on a device; ``granted(id, nbytes)`` is called before it is told."""
        if message.nbytes <= 0 or not 0 < len(message.device) <= _DEVICE_MAX or worker.awaits_segment:
            raise ProtocolError(
                f"a segment of {message.nbytes} bytes on device {message.device!r:.50} was asked for, or one "
                "more before the first came"
            )
        worker.awaits_segment = True

        def make() -> None:
            try:
                segment_id, _ = self._memory.gpu.create(worker.arena, message.device, message.nbytes)
            except BaseException as error:
                reason = str(error) if isinstance(error, ArenaFull) else repr(error)
                self._post(partial(self._refused, worker, reason))
            else:
                self._post(partial(self._made, worker, segment_id, granted))

        self._help(make, lambda: self._refused(worker, "the supervisor is closing", 0.0))

    def _refused(self, worker: WorkerIO, reason: str, now: float) -> None:
        worker.awaits_segment = False
        if self._processes.get(worker.id) is worker:
            self._processes.send(worker, SegmentRefused(reason))

    def _made(
        self, worker: WorkerIO, segment_id: int, granted: Callable[[int, int], None], now: float
    ) -> None:
        worker.awaits_segment = False
        segment = self._memory.gpu.segment(worker.arena, segment_id)
        if segment is None:
            return
        if self._processes.get(worker.id) is not worker:
            self._memory.gpu.drop(worker.arena, (segment_id,))
            self._free(worker.arena, segment_id)
            return
        granted(segment_id, segment.nbytes)
        self.introduce(worker, worker.arena, segment_id, segment)

    def going(self, arena: int, segment_ids: tuple[int, ...]) -> None:
        """Segments were dropped, and workers that know them are told: free each when nobody has it open."""
        for segment_id in segment_ids:
            if self._memory.gpu.is_going(arena, segment_id):
                key = (arena, segment_id)
                holders = {worker.id for worker in self._processes if key in worker.gpu_segments}
                if holders:
                    self._open[key] = holders
                else:
                    self._free(arena, segment_id)

    def closed(self, worker: WorkerIO, arena: int, segment_ids: tuple[int, ...]) -> None:
        """A worker has these open no more. What it never had, or was not told to close, is no matter."""
        for segment_id in segment_ids:
            worker.gpu_segments.discard((arena, segment_id))
            self._let_go(worker, (arena, segment_id))

    def worker_gone(self, worker: WorkerIO) -> None:
        """Its process has ended, and with it all that it had open."""
        worker.gpu_segments.clear()
        for key in tuple(self._open):
            self._let_go(worker, key)
        if worker.blind_to:
            self._note_blind()

    def orphaned(self, arena: int) -> None:
        """An arena's owner is gone: its segments on devices need not wait for what lies in its others."""
        self._orphans.update((arena, segment_id) for segment_id in self._memory.gpu.ids(arena))

    def tend(self, now: float) -> None:
        """Drop the segments of dead workers in which nobody has a block any more, and our own idle ones."""
        gpu = self._memory.gpu
        if gpu.idle_since_s is not None and now >= gpu.idle_since_s + self._idle_trim_s:
            gpu.idle_since_s = None
            self._help(gpu.trim, gpu.trim)
        for key in tuple(self._orphans):
            arena, segment_id = key
            if self._memory.gpu.segment(*key) is None:
                self._orphans.discard(key)
            elif self._table.remove_segment(*key):
                self._orphans.discard(key)
                self._tell_dropped(arena, self._memory.gpu.drop(arena, (segment_id,)))

    def _let_go(self, worker: WorkerIO, key: tuple[int, int]) -> None:
        holders = self._open.get(key)
        if holders is not None:
            holders.discard(worker.id)
            if not holders:
                del self._open[key]
                self._free(*key)

    def _free(self, arena: int, segment_id: int) -> None:
        self._memory.gpu.release(arena, segment_id)
        self._help(self._memory.gpu.free_released, self._memory.gpu.free_released)

    def _help(self, work: Callable[[], None], otherwise: Callable[[], None]) -> None:
        try:
            self._helpers.submit(work)
        except RuntimeError:  # the interpreter is shutting down
            otherwise()

    # --- who can't read -------------------------------------------------------------------------------

    def copy_for(self, worker: WorkerIO, handles: tuple[BlockHandle, ...]) -> None:
        """A worker can't read these blocks: copy them to main memory for it."""
        devices: set[str] = set()
        if not 0 < len(handles) <= HANDLES_MAX or worker.awaits_copies:
            raise ProtocolError("HostCopyRequest: none or too many, or before the last was answered")
        for handle in handles:
            segment = self._memory.gpu.segment(handle.arena, handle.segment)
            if segment is None or not self._table.holds(handle, worker.id):
                raise ProtocolError("HostCopyRequest: a block that was never delivered to this worker")
            devices.add(segment.device)
        if not devices <= worker.blind_to:
            worker.blind_to |= devices
            self._note_blind()
        worker.awaits_copies = True

        def copy() -> None:
            copies: list[BlockHandle] = []
            try:
                for handle in handles:
                    block = self._memory.reserve(handle.nbytes)
                    copies.append(block.handle)
                    self._memory.gpu.copy_to_host(handle, block.address)
            except BaseException as error:
                for handle in copies:
                    with contextlib.suppress(LegionError):
                        self._memory.discard(handle)
                self._post(partial(self._copied, worker, (), str(error) or repr(error)))
            else:
                self._post(partial(self._copied, worker, tuple(copies), ""))

        self._help(copy, lambda: self._copied(worker, (), "the supervisor is closing", 0.0))

    def _copied(self, worker: WorkerIO, copies: tuple[BlockHandle, ...], reason: str, now: float) -> None:
        worker.awaits_copies = False
        if self._processes.get(worker.id) is not worker:
            for handle in copies:
                self._memory.discard(handle)
            return
        for handle in copies:
            self._table.publish(handle, worker.id)
            self._introduce(worker, handle)
        self._processes.send(worker, HostCopies(copies, reason))

    def _note_blind(self) -> None:
        avoided: dict[str, frozenset[str]] = {}
        for worker in self._processes:
            if worker.blind_to:
                pool = worker.spec.key
                avoided[pool] = avoided.get(pool, frozenset()) | worker.blind_to
        self._memory.gpu.avoided = avoided
