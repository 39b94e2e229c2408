"""A worker's memory: its own arena, what it views of others', and the questions it asks about both.

Owns the worker's half of the memory protocol: asking for segments, taking descriptors, giving leases
back, holding on to results until their leases are taken. The main thread alone calls it, but for
`drain_released` and `arena_bytes`, which the control thread calls too.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from legion_shm import faults
from legion_shm.clock import monotonic_s
from legion_shm.errors import ArenaFull, ProtocolError
from legion_shm.supervisor.comfy_source import install_comfy_models
from legion_shm.supervisor.comfy_values import install_comfy_values
from legion_shm.supervisor.remote import RemoteObjects
from legion_shm.supervisor.spawn import HostConfig
from legion_shm.supervisor.worker_born import BornBlocks
from legion_shm.supervisor.worker_gpu import WorkerGpu
from legion_shm.supervisor.worker_views import NodeViews
from legion_shm.transport.arena import Arena, Block
from legion_shm.transport.attachments import Attachments
from legion_shm.transport.born import Shim
from legion_shm.transport.codec import VALUE_TYPES
from legion_shm.transport.codec_types import DeviceBlock
from legion_shm.transport.fdpass import SegmentReceiver
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.messages import (
    BlocksFreed,
    BlocksResident,
    GpuSegmentIntroduced,
    HostCopies,
    Message,
    ModelsForgotten,
    RemotesDropped,
    ResultAccepted,
    SegmentAnnounced,
    SegmentGranted,
    SegmentRefused,
    SegmentRequest,
    SegmentRetired,
    SegmentsDropped,
    Values,
)
from legion_shm.transport.segment import Segment, attach_segment
from legion_shm.transport.values import REPORT, Identities, PackedValues, discard, pack, unpack

__all__ = ["WorkerMemory"]

_GRANT_WAIT_S = 30.0  # the supervisor's own work on a segment: 0.4 s for 1 GiB
_COPY_WAIT_S = 60.0  # for main memory it waits as long as anybody does
_DESCRIPTOR_WAIT_S = 10.0

Answer = SegmentGranted | SegmentRefused | GpuSegmentIntroduced | HostCopies


class WorkerMemory:
    """The BlockStore of a worker."""

    def __init__(
        self,
        config: HostConfig,
        send: Callable[[Message], None],
        receive: Callable[[float | None], Message | None],
    ) -> None:
        install_comfy_values()
        install_comfy_models()
        self.inline_max_bytes = config.inline_max_bytes
        self._config, self._send, self._receive = config, send, receive
        self._kind = config.segments
        self._descriptors: SegmentReceiver | None = None
        self._socket: socket.socket | None = None
        if config.descriptor_fd >= 0:
            self._socket = socket.socket(fileno=config.descriptor_fd)
            self._socket.setblocking(False)
            self._descriptors = SegmentReceiver(self._socket)
        self._attachments = Attachments(on_missing=self._await_segment, missing_wait_s=_DESCRIPTOR_WAIT_S)
        self._returned: deque[BlockHandle] = deque()
        generations = itertools.count(1)
        self._arena = Arena(
            arena_id=config.arena,
            grow=self._grow,
            quota_bytes=config.arena_quota_bytes,
            wait=self._wait_for_room,
            full_wait_s=config.arena_wait_s,
            shrink=self._shrunk,
            generations=generations,
        )
        self._gpu = WorkerGpu(
            arena_id=config.arena,
            quota_bytes=config.gpu_arena_quota_bytes,
            generations=generations,
            ask=self._ask,
            send=send,
            returned=self._returned.append,
        )
        self._own: dict[int, Segment] = {}
        self._answers: deque[Answer] = deque()
        self._asking = False
        self._kept: dict[str, PackedValues] = {}
        self.forgotten: deque[str] = deque(maxlen=0)  # others learn it from the supervisor's process alone
        self._forgotten: deque[str] = deque()
        self._residents: set[BlockHandle] = set()
        self._idle_since_s: float | None = None
        self.remotes = RemoteObjects(config.worker)
        shim = Shim.here() if config.preloaded else None
        self._born = (
            None
            if shim is None
            else BornBlocks(
                shim,
                quota_bytes=config.arena_quota_bytes,
                publish=self._arena.handle_for,
                grow=self._grow_born,
            )
        )

        self._views = NodeViews(self._attachments.locate, self._locate_born)

    # --- the BlockStore that the codec sees ---------------------------------------------------------

    def find(self, address: int, nbytes: int) -> tuple[BlockHandle, int] | None:
        found = self._attachments.find(address, nbytes)
        if found is not None and found[0] in self._residents and not self._arena.isolate(found[0]):
            return None  # its owner's later writes could be seen, so a copy goes
        return found

    def resident_buffer(self, nbytes: int) -> Any:
        """A writable ctypes array of ``nbytes`` in the own arena; its block lives as long as it does."""
        block = self.reserve(nbytes)
        try:
            array = self._attachments.adopt_owned(block.handle, block.address, self._resident_ended)
        except BaseException:
            self._arena.free(block.handle)
            raise
        self._residents.add(block.handle)
        self._send(BlocksResident((block.handle,)))
        return array

    def _resident_ended(self, handle: BlockHandle) -> None:
        self._residents.discard(handle)
        self._returned.append(handle)

    def adopt(self, address: int, nbytes: int) -> tuple[BlockHandle, int, bool] | None:
        return None if self._born is None else self._born.adopt(address, nbytes)

    def reserve(self, nbytes: int) -> Block:
        self._idle_since_s = None
        self._yield_quota(nbytes)
        return self._arena.reserve(nbytes)

    def device_block(self, kind: str, uuid: str, nbytes: int) -> DeviceBlock | None:
        return self._gpu.block(kind, uuid, nbytes)

    def discard(self, handle: BlockHandle) -> None:
        if self._gpu.free(handle):
            return
        if self._born is None or not self._born.free(handle):
            self._arena.free(handle)

    def view(self, handle: BlockHandle) -> Any:
        if self._gpu.knows(handle):
            there = self._gpu.view(handle)
            if there is not None:
                return there
            handle = self._gpu.host_copy(handle)
        return self._attachments.view(handle)

    def private_view(self, address: int, nbytes: int, keep: object) -> Any:
        """`PrivateViews` of tensors that were received or born here."""
        return self._views.take(address, nbytes, keep)

    def _locate_born(self, address: int, nbytes: int) -> tuple[Segment, int] | None:
        found = None if self._born is None else self._born.locate(address, nbytes)
        segment = None if found is None else self._own.get(found[0])
        return None if found is None or segment is None else (segment, found[1])

    # --- values -------------------------------------------------------------------------------------

    def decode_inputs(self, values: Values, *, allow_cpu: bool) -> tuple[dict[str, object], Identities]:
        """Inputs by name, as views, and what a cache may know each by."""
        inputs = unpack(
            values,
            self,
            give_back=self._returned.append,
            allow_cpu=allow_cpu,
            types=self.remotes.receiving,
        )
        return inputs, Identities(values)

    def encode_outputs(
        self,
        job: str,
        outputs: Mapping[str, object],
        ui: Mapping[str, Mapping[str, object]],
        *,
        remote: bool = False,
    ) -> Values:
        """All outputs, then what nodes reported, if any, as a value named `REPORT`; kept until accepted.

        With ``remote``, what can't travel is kept for good, and ``remotes.take_exported`` tells of it.
        What was copied is held too: to unmap it takes as long as a copy, and the caller waits for the reply.
        """
        try:
            types = self.remotes.sending if remote else VALUE_TYPES
            packed = pack(outputs, self, types=types, hold_copied=True)
        except BaseException:
            self.remotes.drop(self.remotes.take_exported())
            raise
        if not ui:
            self._kept[job] = packed
            return packed.values
        try:
            report = pack({REPORT: {node: dict(entry) for node, entry in ui.items()}}, self)
        except BaseException:
            self.remotes.drop(self.remotes.take_exported())
            discard(packed.values, self)
            raise
        values = packed.values + report.values
        self._kept[job] = PackedValues(values, packed.stats, packed.keepalive + report.keepalive)
        return values

    def seal(self, job: str) -> None:
        """The worker has let go of a job's outputs: what it still has of them becomes its own. ArenaFull."""
        if self._born is not None:
            try:
                self._born.seal()
            except ArenaFull:
                self.discard_result(job)
                raise

    def engine_started(self) -> None:
        """Nodes will run now: what they make may be born in the arena."""
        if self._born is not None:
            self._born.begin()

    def make_room(self) -> None:
        """Between jobs: looks through what has ended; makes more room for tensors to be born in."""
        self._views.tidy()
        self._returned.extend(self._attachments.drain_released())
        if self._born is not None and self._born.make_room():
            self._share_quota()
        if self._idle_since_s is None:
            self._note_idle()

    def copied_bytes(self, job: str) -> int:
        """What was copied of a result that is kept still: its memory is to be given back after the reply."""
        kept = self._kept.get(job)
        return 0 if kept is None else sum([stats.copied_bytes for stats in kept.stats.values()])

    def result_sent(self, job: str) -> None:
        """The result is on its way. What it refers to is kept until the supervisor has its leases."""
        kept = self._kept.get(job)
        if kept is not None and all(new for note in kept.values for new in note.owned):
            del self._kept[job]

    def discard_result(self, job: str) -> None:
        """The result could not be sent; its blocks are free again."""
        kept = self._kept.pop(job, None)
        if kept is not None:
            discard(kept.values, self)

    # --- the protocol ---------------------------------------------------------------------------------

    def take(self, message: Message) -> None:
        """A message about memory. Raises ProtocolError for any other."""
        if isinstance(message, BlocksFreed):
            self.freed(message.handles)
        elif isinstance(message, RemotesDropped):
            self.remotes.drop(message.numbers)
        elif isinstance(message, ModelsForgotten):
            self._forgotten.extend(message.keys)
        elif isinstance(message, ResultAccepted):
            self._kept.pop(message.job, None)
        elif isinstance(message, (SegmentGranted, SegmentRefused)):
            self._answers.append(message)
        elif isinstance(message, HostCopies):
            if self._asking:
                self._answers.append(message)
            else:
                self._returned.extend(message.handles)  # it came too late
        elif isinstance(message, GpuSegmentIntroduced):
            self._introduced(message)
        elif isinstance(message, SegmentAnnounced):
            self._add(
                message.arena, message.segment, attach_segment("portable", message.name, message.nbytes)
            )
        elif isinstance(message, SegmentsDropped):
            for segment_id in message.segments:
                if not self._attachments.knows(message.arena, segment_id):
                    # Nobody looked for it yet: its descriptor would be taken later, and kept for good.
                    with contextlib.suppress(ProtocolError):  # whoever needs the next one is told
                        self._take_descriptors()
                self._attachments.drop(message.arena, segment_id)
            self._gpu.drop(message.arena, message.segments)
        else:
            raise ProtocolError(f"{type(message).__name__} does not belong on a worker's job socket")

    def freed(self, handles: tuple[BlockHandle, ...]) -> None:
        for handle in handles:
            self.discard(handle)
        if handles:
            self._note_idle()

    def _note_idle(self) -> None:
        stats = self._arena.stats()
        if not stats.blocks and (self._born is None or not self._born.published) and self.arena_bytes():
            self._idle_since_s = monotonic_s()

    def drain_released(self, most: int | None = None, *, quick: bool = False) -> tuple[BlockHandle, ...]:
        """Deliveries that have ended; at most so many, with the others left for the next call.

        ``quick`` leaves large ones too, for the time after the reply.
        """
        self._returned.extend(self._attachments.drain_released(quick=quick))
        self._returned.extend(self._gpu.drain_released())
        released: list[BlockHandle] = []
        while self._returned and len(released) != most:
            try:
                released.append(self._returned.popleft())
            except IndexError:  # the other thread was faster
                break
        return tuple(released)

    def take_forgotten(self) -> tuple[str, ...]:
        """Keys of models that are gone in the supervisor's process, since the last call."""
        keys = tuple(self._forgotten)
        self._forgotten.clear()
        return keys

    def live_views(self) -> int:
        return self._attachments.live_views() + self._attachments.undrained() + self._gpu.undrained()

    def room_bytes(self) -> int:
        arena = self._arena
        return arena.quota_bytes - arena.elsewhere_bytes - arena.stats().live_bytes

    def arena_bytes(self) -> int:
        return self._arena.stats().total_bytes + (0 if self._born is None else self._born.total_bytes)

    # --- segments -------------------------------------------------------------------------------------

    def _add(self, arena: int, segment_id: int, segment: Segment) -> None:
        self._attachments.add(arena, segment_id, segment)
        if arena == self._config.arena:
            self._own[segment_id] = segment

    def _take_descriptors(self) -> None:
        if self._descriptors is None:
            return
        for arena, segment_id, nbytes, fd in self._descriptors.receive_pending():
            self._add(arena, segment_id, attach_segment("memfd", fd, nbytes))

    def _await_segment(self, handle: BlockHandle, deadline_s: float) -> None:
        self._await_descriptor(handle.arena, handle.segment, deadline_s)

    def _await_descriptor(self, arena: int, segment_id: int, deadline_s: float) -> bool:
        """Descriptors and messages are not ordered to each other: give this one a bounded time to come."""
        while True:
            self._take_descriptors()
            if self._attachments.knows(arena, segment_id):
                return True
            remaining = deadline_s - monotonic_s()
            if remaining <= 0 or self._socket is None:
                return False
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            poll.poll(remaining * 1000)

    def _ask(self, message: Message, wait_s: float = _COPY_WAIT_S) -> Answer:
        """Send a question, and wait for its answer. Raises ArenaFull where none comes in time."""
        deadline_s = monotonic_s() + wait_s
        self._asking = True
        try:
            self._send(message)
            while not self._answers:
                remaining = deadline_s - monotonic_s()
                if remaining <= 0:
                    raise ArenaFull(
                        f"the supervisor did not answer {type(message).__name__} within {wait_s:g} s"
                    )
                self._receive(remaining)
            return self._answers.popleft()
        finally:
            self._asking = False

    def _introduced(self, message: GpuSegmentIntroduced) -> None:
        if message.arena != self._config.arena:
            self._gpu.introduce(message)
        elif self._asking:
            self._answers.append(message)
        else:
            self._send(SegmentRetired((message.segment,)))  # it came too late

    def _grow(self, nbytes: int) -> tuple[int, Segment]:
        deadline_s = monotonic_s() + _GRANT_WAIT_S
        answer = self._ask(SegmentRequest(nbytes), _GRANT_WAIT_S)
        if faults.hit is not None:
            faults.hit("worker.segment_granted")
        if isinstance(answer, SegmentRefused):
            raise ArenaFull(answer.reason)
        if not isinstance(answer, SegmentGranted) or answer.arena != self._config.arena:
            raise ProtocolError("the supervisor granted a segment of another arena")
        if answer.name:
            self._add(answer.arena, answer.segment, attach_segment("portable", answer.name, answer.nbytes))
        elif not self._await_descriptor(answer.arena, answer.segment, deadline_s):
            raise ArenaFull(
                f"the descriptor of segment {answer.segment} did not arrive in {_GRANT_WAIT_S:g} s"
            )
        return answer.segment, self._own[answer.segment]

    def _wait_for_room(self, timeout_s: float) -> bool:
        received = self._receive(timeout_s) is not None
        if self._born is not None and self._born.total_bytes:
            self._retire_born()
        return received

    def _yield_quota(self, nbytes: int) -> None:
        """Copies need more than the quota has left: regions in which nothing lives make way."""
        if self._born is not None and self._born.total_bytes:
            stats = self._arena.stats()
            unused = stats.total_bytes - stats.live_bytes
            room = self._arena.quota_bytes - self._arena.elsewhere_bytes - stats.total_bytes
            if unused < nbytes and room < nbytes:
                self._retire_born()

    def _shrunk(self, segment_id: int) -> None:
        self._own.pop(segment_id, None)
        self._attachments.drop(self._config.arena, segment_id)
        self._send(SegmentRetired((segment_id,)))

    def trim_in_s(self) -> float | None:
        """Seconds until an unused arena is given back; None when there is nothing to wait for."""
        since_s = [s for s in (self._idle_since_s, self._gpu.idle_since_s) if s is not None]
        return max(0.0, min(since_s) + self._config.idle_trim_s - monotonic_s()) if since_s else None

    def trim(self) -> tuple[int, ...]:
        """Give wholly free segments back to the system, if the arena was unused for long enough."""
        before_s = monotonic_s() - self._config.idle_trim_s
        since_s = self._gpu.idle_since_s
        on_gpus = self._gpu.trim() if since_s is not None and since_s <= before_s else ()
        if self._idle_since_s is None or self._idle_since_s > before_s:
            return on_gpus
        self._idle_since_s = None
        retired = (*self._arena.trim(), *(() if self._born is None else self._born.retire()))
        for segment_id in retired:
            self._own.pop(segment_id, None)
            self._attachments.drop(self._config.arena, segment_id)
        self._share_quota()
        return (*retired, *on_gpus)

    def _grow_born(self, nbytes: int) -> tuple[int, Segment]:
        for segment_id in self._arena.trim():  # what was copied there before is to be born from now on
            self._shrunk(segment_id)
        return self._grow(nbytes)

    def give_up_unused(self) -> None:
        """Give back the regions in which nothing lives any more, now."""
        self._retire_born()
        retired = self._gpu.trim()
        if retired:
            self._send(SegmentRetired(retired))

    def _retire_born(self) -> None:
        self._views.tidy()
        for segment_id in () if self._born is None else self._born.retire():
            self._shrunk(segment_id)
        self._share_quota()

    def _share_quota(self) -> None:
        """Copies and born blocks live in segments of one arena, and of one quota."""
        if self._born is not None:
            self._arena.elsewhere_bytes = self._born.total_bytes
