"""Lending: which process has which block and which segment, and giving both back.

Owns the lease table and the order of things around it: a segment is introduced to a worker before the
first handle into it, a block is freed at its owner when its last lease has ended, a dead worker's arena
is condemned and closed once nobody looks at it. It never touches payload bytes.

    submit ─▶ accept: job's leases      RunJob ─▶ lend: worker's leases      JobDone ─▶ take_result: ours
    view gone, worker gone, job ended ─▶ lease ended ─▶ return_leases ─▶ the owner frees the block
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterable
from concurrent.futures import Executor

from legion_shm import faults
from legion_shm.clock import monotonic_s
from legion_shm.config import SupervisorSettings
from legion_shm.errors import ArenaFull, ProtocolError
from legion_shm.supervisor.gpu_lending import GpuLending
from legion_shm.supervisor.master_memory import MasterMemory
from legion_shm.supervisor.processes import Post, Processes
from legion_shm.supervisor.worker_io import WorkerIO
from legion_shm.transport.fdpass import send_segment_fd
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.leases import LeaseTable
from legion_shm.transport.messages import (
    BlocksFreed,
    GpuSegmentRequest,
    JobDone,
    ModelsForgotten,
    ResultAccepted,
    SegmentAnnounced,
    SegmentGranted,
    SegmentRefused,
    SegmentsDropped,
    in_batches,
)
from legion_shm.transport.values import PackedValues

__all__ = ["Lending"]

_log = logging.getLogger("legion_shm.supervisor")

MASTER = "master"  # the holder of what the supervisor's own process looks at
_STATS = 6  # figures that come with each value
_DESCRIPTOR_WAIT_S = 10.0  # as long as a worker waits for one
_UNSENT_MAX = 10_000
_RETRY_S = 0.01
_SOCKET_FULL = (errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)


class Lending:
    """Used by the loop's thread alone; segments are made on a helper's."""

    def __init__(
        self,
        settings: SupervisorSettings,
        memory: MasterMemory,
        processes: Processes,
        helpers: Executor,
        post: Post,
    ) -> None:
        self._settings, self._memory, self._processes = settings, memory, processes
        self._helpers, self._post = helpers, post
        self.table = LeaseTable()
        self.gpu = GpuLending(
            memory,
            processes,
            self.table,
            helpers,
            post,
            introduce=self._introduce,
            dropped=self._tell_dropped,
            idle_trim_s=settings.idle_trim_s,
        )
        self._owners: dict[int, str] = {}
        self._waiting: dict[str, WorkerIO] = {}  # those whose sockets have no room for a descriptor
        self._flush_at_s: float | None = None
        self._idle_since_s: float | None = None

    # --- the supervisor's own arena -------------------------------------------------------------------

    def own_segment_added(self, segment: int, nbytes: int) -> None:
        self.table.add_segment(self._memory.arena_id, segment, nbytes)

    def own_segments_retired(self, segments: tuple[int, ...]) -> None:
        for segment_id in segments:
            self.table.remove_segment(self._memory.arena_id, segment_id)
        self._tell_dropped(self._memory.arena_id, segments)

    def resident(self, handle: BlockHandle) -> None:
        """A tensor of the caller lives in this block from now on."""
        self.table.publish(handle, MASTER)

    def worker_resident(self, worker: WorkerIO, handles: tuple[BlockHandle, ...]) -> None:
        """A worker's own blocks that it may send many times; it has a lease on each meanwhile."""
        for handle in handles:
            if handle.arena != worker.arena:
                raise ProtocolError("BlocksResident: a block in another process's arena")
            self.table.publish(handle, worker.id)

    def own_views_ended(self, handles: Iterable[BlockHandle]) -> None:
        self.table.release_all(handles, MASTER)

    # --- jobs -----------------------------------------------------------------------------------------

    def accept(self, job: str, packed: PackedValues) -> None:
        """The job's own leases on its inputs, until it ends: it may have to be sent again."""
        for handle, new in packed.handles():
            if new:
                self.table.publish(handle, _holder(job))
            else:
                self.table.lease(handle, _holder(job))

    def end_job(self, job: str) -> None:
        self.table.drop_holder(_holder(job))
        if self._memory.ordinary:  # this job did not wait for them, and the next ones gain
            with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
                self._helpers.submit(self._memory.condense)

    def lend(self, worker: WorkerIO, packed: PackedValues) -> tuple[BlockHandle, ...]:
        """Leases for a worker that is about to be sent these values; gives its blocks that are free."""
        self._owners[worker.arena] = worker.id
        for handle, _ in packed.handles():
            self.table.lease(handle, worker.id)
            self._introduce(worker, handle)
        freed = self.table.drain_freed(worker.arena).get(worker.arena, ())
        first, *others = in_batches(freed) if freed else ((),)
        for some in others:
            self._processes.send(worker, BlocksFreed(some))
        return first

    def not_lent(self, worker: WorkerIO, packed: PackedValues) -> None:
        """The message of these values was not sent after all."""
        self.table.release_all((handle for handle, _ in packed.handles()), worker.id)

    def take_result(self, worker: WorkerIO, message: JobDone) -> None:
        """Our leases on a result. Raises ProtocolError, StaleHandle, InvalidHandle for what can't be."""
        taken: list[BlockHandle] = []
        try:
            referred = self._take(worker, message, taken)
        except ProtocolError:
            self.table.release_all(taken, MASTER)
            raise
        worker.delivered = f"{message.job} {message.attempt}"
        self.table.release_all(message.released, worker.id)
        if referred:
            self._processes.send(worker, ResultAccepted(message.job))

    def _take(self, worker: WorkerIO, message: JobDone, taken: list[BlockHandle]) -> bool:
        """Notes in ``taken`` each lease; whether one is on a block that was there before."""
        referred = False
        for _, _, blocks, owned, _, numbers in message.values:
            if len(blocks) != len(owned) or len(numbers) != _STATS or min(numbers) < 0:
                raise ProtocolError("JobDone: a value's blocks, marks and figures do not fit together")
            for handle, new in zip(blocks, owned, strict=True):
                if new:
                    if handle.arena != worker.arena:
                        raise ProtocolError("JobDone: a new block in another process's arena")
                    self.table.publish(handle, MASTER)
                    taken.append(handle)
                    continue
                self.table.check(handle)
                if handle.arena != worker.arena and not self.table.holds(handle, worker.id):
                    raise ProtocolError("JobDone: a block that was never delivered to this worker")
                self.table.lease(handle, MASTER)
                taken.append(handle)
                referred = True
        return referred

    def refuse_result(self, worker: WorkerIO, message: JobDone) -> None:
        """A result that nobody waits for: the worker may free what it made for it."""
        if worker.delivered == f"{message.job} {message.attempt}":
            return  # the same once more: its blocks are ours, or were
        unwanted = tuple(
            handle
            for note in message.values
            for handle, new in zip(note.blocks, note.owned, strict=False)
            if new and handle.arena == worker.arena and not self.table.is_live(handle)
        )
        self.table.release_all(message.released, worker.id)
        self._processes.send(worker, ResultAccepted(message.job))
        self._processes.send(worker, BlocksFreed(unwanted))

    def released(self, worker: WorkerIO, handles: tuple[BlockHandle, ...]) -> None:
        self.table.release_all(handles, worker.id)

    def worker_gone(self, worker: WorkerIO) -> None:
        """Its leases end with it; its arena lives on for as long as somebody looks at a block of it."""
        self._owners.pop(worker.arena, None)
        self._waiting.pop(worker.id, None)
        self.gpu.worker_gone(worker)
        self.table.drop_holder(worker.id)
        self.table.condemn(worker.arena)
        self.gpu.orphaned(worker.arena)

    # --- segments -------------------------------------------------------------------------------------

    def _introduce(self, worker: WorkerIO, handle: BlockHandle) -> None:
        """Let a worker have the segment that a handle points into, once."""
        key = (handle.arena, handle.segment)
        if key in worker.segments:
            return
        on_gpu = self._memory.gpu.segment(*key)
        if on_gpu is not None:
            worker.segments.add(key)
            self.gpu.introduce(worker, *key, on_gpu)
            return
        segment = self._memory.segment(*key)
        if segment is None:
            raise AssertionError(f"{handle} is leased, so its segment is there")
        worker.segments.add(key)
        if isinstance(segment.descriptor, str):
            self._processes.send(worker, SegmentAnnounced(*key, segment.nbytes, segment.descriptor))
        else:
            self._send_descriptor(worker, *key)

    def _send_descriptor(self, worker: WorkerIO, arena: int, segment: int) -> None:
        """Now, or as soon as its socket has room again; nobody waits for that here."""
        if not worker.unsent and self._offer(worker, arena, segment):
            return
        if not worker.unsent:
            worker.unsent_since_s = monotonic_s()
        worker.unsent.append((arena, segment))
        self._waiting[worker.id] = worker
        if len(worker.unsent) > _UNSENT_MAX:
            self._takes_none(worker)

    def _offer(self, worker: WorkerIO, arena: int, segment_id: int) -> bool:
        """Whether the descriptor is on its way, or needed no more; False where the socket is full."""
        segment = self._memory.segment(arena, segment_id)
        if segment is None or not isinstance(segment.descriptor, int):
            return True
        if worker.spawned is None or worker.spawned.descriptors is None:
            return True
        sock, fd = worker.spawned.descriptors, segment.descriptor
        if faults.hit is not None:
            faults.hit("lending.before_descriptor")
        try:
            send_segment_fd(sock, arena, segment_id, segment.nbytes, fd, timeout_s=0.0)
        except OSError as error:
            if isinstance(error, TimeoutError) or error.errno in _SOCKET_FULL:
                return False
            _log.debug("worker %s took no descriptor: %s", worker.id, error)  # its end will be seen
        if faults.hit is not None:
            faults.hit("lending.after_descriptor")
        return True

    def pass_descriptors(self, now: float) -> None:
        """Send those that had no room before; a worker that takes none for long is ended."""
        for worker in tuple(self._waiting.values()):
            while worker.unsent and self._offer(worker, *worker.unsent[0]):
                worker.unsent.popleft()
                worker.unsent_since_s = now
            if not worker.unsent or worker.violation:
                del self._waiting[worker.id]
            elif now >= worker.unsent_since_s + _DESCRIPTOR_WAIT_S:
                self._takes_none(worker)

    def _takes_none(self, worker: WorkerIO) -> None:
        worker.break_off(f"it took no segment's descriptor, and {len(worker.unsent)} wait")
        _log.error("worker %s is ended: %s", worker.id, worker.violation)

    def request_segment(self, worker: WorkerIO, nbytes: int) -> None:
        """A worker's arena wants to grow: make the segment in the background, within the quota."""
        quota = self._settings.arena_quota_bytes
        if nbytes <= 0 or worker.awaits_segment:
            raise ProtocolError(
                f"a segment of {nbytes} bytes was asked for, or one more before the first came"
            )
        if self._memory.segment_bytes(worker.arena) + nbytes > quota:
            self._processes.send(worker, SegmentRefused(f"arena_quota_bytes = {quota} would be exceeded"))
            return

        worker.awaits_segment = True

        def make() -> None:
            try:
                segment_id, segment = self._memory.create(worker.arena, nbytes)
            except BaseException as error:
                reason = str(error) if isinstance(error, ArenaFull) else repr(error)
                self._post(lambda now: self._refuse(worker, reason))
            else:
                size = segment.nbytes
                self._post(lambda now: self._grant(worker, segment_id, size))

        try:
            self._helpers.submit(make)
        except RuntimeError as error:  # the interpreter is shutting down
            self._processes.send(worker, SegmentRefused(str(error)))

    def request_gpu_segment(self, worker: WorkerIO, message: GpuSegmentRequest) -> None:
        """The same for its arena on a device."""

        def granted(segment_id: int, nbytes: int) -> None:
            self._owners[worker.arena] = worker.id
            self.table.add_segment(worker.arena, segment_id, nbytes)
            worker.segments.add((worker.arena, segment_id))

        self.gpu.request(worker, message, granted)

    def _refuse(self, worker: WorkerIO, reason: str) -> None:
        worker.awaits_segment = False
        if self._processes.get(worker.id) is worker:
            self._processes.send(worker, SegmentRefused(reason))

    def _grant(self, worker: WorkerIO, segment_id: int, nbytes: int) -> None:
        worker.awaits_segment = False
        segment = self._memory.segment(worker.arena, segment_id)
        if self._processes.get(worker.id) is not worker or segment is None:
            self._memory.drop(worker.arena, (segment_id,))
            return
        self._owners[worker.arena] = worker.id
        self.table.add_segment(worker.arena, segment_id, nbytes)
        worker.segments.add((worker.arena, segment_id))
        name = segment.descriptor if isinstance(segment.descriptor, str) else ""
        if isinstance(segment.descriptor, int):
            self._send_descriptor(worker, worker.arena, segment_id)
        self._processes.send(worker, SegmentGranted(worker.arena, segment_id, nbytes, name))

    def retire(self, worker: WorkerIO, segments: tuple[int, ...]) -> None:
        """A worker gave wholly free segments up."""
        for segment_id in segments:
            if not self.table.remove_segment(worker.arena, segment_id):
                raise ProtocolError(f"segment {segment_id} was given up while a block in it is in use")
        self._memory.drop(worker.arena, segments)
        worker.segments.difference_update((worker.arena, segment_id) for segment_id in segments)
        worker.gpu_segments.difference_update((worker.arena, segment_id) for segment_id in segments)
        self._tell_dropped(worker.arena, segments)

    def _tell_dropped(self, arena: int, segments: tuple[int, ...]) -> None:
        for worker in self._processes:
            known = tuple(segment for segment in segments if (arena, segment) in worker.segments)
            if known:
                worker.segments.difference_update((arena, segment) for segment in known)
                self._processes.send(worker, SegmentsDropped(arena, known))
        self.gpu.going(arena, segments)

    def _tell_forgotten(self) -> None:
        keys: list[str] = []
        while self._memory.forgotten:
            keys.append(self._memory.forgotten.popleft())
        for worker in self._processes:
            if worker.ready:
                self._processes.send(worker, ModelsForgotten(tuple(keys)))

    # --- giving back ----------------------------------------------------------------------------------

    def next_due_s(self, now: float) -> float | None:
        """When `return_leases` should be called next."""
        times: list[float] = []
        if self._flush_at_s is not None:
            times.append(self._flush_at_s)
        if self._idle_since_s is not None:
            times.append(self._idle_since_s + self._settings.idle_trim_s)
        if self._memory.gpu.idle_since_s is not None:
            times.append(self._memory.gpu.idle_since_s + self._settings.idle_trim_s)
        if self._waiting:
            times.append(now + _RETRY_S)
        if self._memory.live_views() or self._memory.forgotten:
            times.append(now + self._settings.lease_flush_s)
        return min(times, default=None)

    def return_leases(self, now: float) -> None:
        """Hand freed blocks back to their owners: ours at once, workers' after a moment, in company."""
        memory = self._memory
        if memory.forgotten:
            self._tell_forgotten()
        own = self.table.drain_freed(memory.arena_id).get(memory.arena_id, ())
        for handle in own:
            memory.free(handle)
        if own:
            self._idle_since_s = None if memory.in_use() else now
            if memory.cold:
                with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
                    self._helpers.submit(memory.warm)
        if memory.wants_room:
            with contextlib.suppress(RuntimeError):
                self._helpers.submit(memory.make_room)
        if self.table.has_freed and self._flush_at_s is None:
            self._flush_at_s = now + self._settings.lease_flush_s
        if self._flush_at_s is not None and now >= self._flush_at_s:
            self._flush_at_s = None
            for arena, handles in self.table.drain_freed().items():
                owner = self._processes.get(self._owners.get(arena, ""))
                if owner is not None:
                    for some in in_batches(handles):
                        self._processes.send(owner, BlocksFreed(some))
        self.gpu.tend(now)
        for arena in self.table.drain_empty():
            self._tell_dropped(arena, memory.drop(arena))
        if self._idle_since_s is not None and now >= self._idle_since_s + self._settings.idle_trim_s:
            self._idle_since_s = None
            with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
                self._helpers.submit(self._trim)

    def _trim(self) -> None:
        if self._memory.trim():
            self._post(self._look_again)

    def _look_again(self, now: float) -> None:
        if self._idle_since_s is None and not self._memory.in_use():
            self._idle_since_s = now


def _holder(job: str) -> str:
    return f"job:{job}"
