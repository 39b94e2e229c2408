"""The supervisor process's memory: its own arena, its views of the workers', and every segment there is.

Owns the segments: each one, of whichever arena, is made and described here, and outlives the worker it was
made for. Callers' threads encode inputs and decode results here; the loop's thread registers leases
elsewhere and learns from `drain_released` which have ended.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

from legion_shm.clock import monotonic_s
from legion_shm.errors import ArenaFull
from legion_shm.ids import new_arena_id
from legion_shm.supervisor.comfy_loaders import watch_loaders
from legion_shm.supervisor.comfy_source import install_comfy_models
from legion_shm.supervisor.comfy_values import install_comfy_values
from legion_shm.supervisor.master_born import MasterBorn
from legion_shm.supervisor.master_gpu import MasterGpu
from legion_shm.supervisor.remote import delivered_types, sending_types
from legion_shm.supervisor.result import Delivery
from legion_shm.transport.arena import Arena, ArenaStats, Block
from legion_shm.transport.attachments import Attachments
from legion_shm.transport.codec import VALUE_TYPES, Pickled, ValueTypes
from legion_shm.transport.codec_types import DeviceBlock
from legion_shm.transport.gpu_memory import ALL_DEVICES, without_gpu
from legion_shm.transport.handles import BlockHandle, round_up
from legion_shm.transport.messages import Values
from legion_shm.transport.residence import WeightsWay, weights_go
from legion_shm.transport.segment import Segment, SegmentKind, create_segment
from legion_shm.transport.values import PackedValues, discard, pack, unpack

__all__ = ["MasterMemory"]

_CONDENSE_AGAIN_S = (0.1, 1.0, 10.0, 60.0, 300.0)
"""Pages are in use for a moment; a machine has no huge pages left for longer."""

_log = logging.getLogger("legion_shm.supervisor")


class MasterMemory:
    """The BlockStore of the supervisor's process, and the registry of all segments. Thread-safe.

    ``segment_added(arena, segment, nbytes)`` and ``segments_retired(arena, ids)`` hear, in order, what the
    own arena does; ``resident(handle)`` hears of a block that a tensor of the caller lives in from now on;
    ``remotes_dropped(worker, numbers)`` hears, from finalizers too, of handles that are gone.
    ``forgotten`` takes keys of models that were placed here and are gone, from whatever thread collects them.
    """

    def __init__(
        self,
        *,
        kind: SegmentKind,
        name_prefix: str,
        inline_max_bytes: int,
        quota_bytes: int,
        full_wait_s: float,
        segment_added: Callable[[int, int, int], None],
        segments_retired: Callable[[int, tuple[int, ...]], None],
        resident: Callable[[BlockHandle], None],
        remotes_dropped: Callable[[str, tuple[int, ...]], None],
        gpu_quota_bytes: int = 0,
    ) -> None:
        install_comfy_values()
        install_comfy_models()
        watch_loaders()
        self.inline_max_bytes = inline_max_bytes
        self.kind: SegmentKind = kind
        self.arena_id = new_arena_id()
        self._name_prefix = name_prefix
        self._quota_bytes = quota_bytes
        self._segment_added, self._segments_retired = segment_added, segments_retired
        self._resident = resident
        self.remotes_dropped = remotes_dropped
        self._sending: dict[tuple[str, ...], ValueTypes] = {}
        self._receiving: dict[tuple[str, ...], ValueTypes] = {(): VALUE_TYPES}
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._segments: dict[int, dict[int, Segment]] = {}
        self._attachments = Attachments()
        self._returned: deque[BlockHandle] = deque()
        self._deliveries: weakref.WeakSet[Delivery] = weakref.WeakSet()
        self.forgotten: deque[str] = deque()
        self._ordinary: deque[tuple[float, int, Segment]] = deque()  # when to condense it, for which time
        self._closed = False
        generations = itertools.count(1)
        self.gpu = MasterGpu(
            arena_id=self.arena_id,
            quota_bytes=gpu_quota_bytes,
            generations=generations,
            next_id=lambda: next(self._ids),
            segment_added=segment_added,
            retired=lambda ids: self._segments_retired(self.arena_id, ids),
        )
        self._arena = Arena(
            arena_id=self.arena_id,
            grow=self._grow,
            quota_bytes=quota_bytes,
            full_wait_s=full_wait_s,
            shrink=lambda segment_id: self._retire((segment_id,)),
            generations=generations,
        )
        self._born = (
            MasterBorn.claim(
                quota_bytes=quota_bytes,
                handle_for=self._arena.handle_for,
                grow=self._grow_born,
                resident=resident,
            )
            if kind == "memfd"
            else None
        )

    # --- the BlockStore that the codec sees ---------------------------------------------------------

    def find(self, address: int, nbytes: int) -> tuple[BlockHandle, int] | None:
        found = self._attachments.find(address, nbytes)
        if found is not None and found[0].arena == self.arena_id and not self._arena.isolate(found[0]):
            return None  # its owner's later writes could be seen, so a copy goes
        if found is None and self._born is not None:
            return self._born.find(address, nbytes)
        return found

    def adopt(self, address: int, nbytes: int) -> None:
        return None

    def reserve(self, nbytes: int) -> Block:
        if self._born is not None and self._born.total_bytes:
            stats = self._arena.stats()
            room = self._arena.quota_bytes - self._arena.elsewhere_bytes - stats.live_bytes
            if room < nbytes:
                self._retire_born()  # copies need it
        return self._arena.reserve(nbytes)

    def device_block(self, kind: str, uuid: str, nbytes: int) -> DeviceBlock | None:
        return self.gpu.block(kind, uuid, nbytes)

    def discard(self, handle: BlockHandle) -> None:
        if not self.gpu.free(handle):
            self._arena.free(handle)

    def view(self, handle: BlockHandle) -> Any:
        return self.gpu.view(handle) if self.gpu.knows(handle) else self._attachments.view(handle)

    # --- values -------------------------------------------------------------------------------------

    def pack(
        self,
        values: Mapping[str, object],
        pickled: tuple[str, ...] = (),
        models: WeightsWay = "reference",
        *,
        pool: str = "",
        gpu: bool = True,
    ) -> PackedValues:
        """``pickled``: the classes whose instances may be pickled; ``models``: how their weights go.

        ``pool``: whose workers will read them; without ``gpu`` none in a GPU's memory.
        """
        types = self._sending.get(pickled)
        if types is None:
            types = self._sending[pickled] = sending_types(self, self._types(pickled))
        avoided = self.gpu.avoided.get(pool, frozenset()) if gpu else ALL_DEVICES
        with weights_go(models), without_gpu(avoided):
            return pack(values, self, types=types)

    def _types(self, pickled: tuple[str, ...]) -> ValueTypes:
        types = self._receiving.get(pickled)
        if types is None:
            types = ValueTypes(parent=VALUE_TYPES)
            types.add_source(Pickled(pickled))
            types = self._receiving.setdefault(pickled, types)
        return types

    def discard_values(self, values: Values) -> None:
        discard(values, self)

    def unpack(
        self,
        values: Values,
        allow_cpu: bool,
        worker: str,
        remotes: tuple[int, ...],
        pickled: tuple[str, ...] = (),
    ) -> dict[str, object]:
        give_back = self._returned.append
        types = self._types(pickled)
        if not remotes:
            return unpack(values, self, give_back=give_back, allow_cpu=allow_cpu, types=types)
        left = Counter(remotes)
        types = delivered_types(self, worker, left, self.remotes_dropped, types)
        try:
            return unpack(values, self, give_back=give_back, allow_cpu=allow_cpu, types=types)
        finally:
            unused = tuple(left.elements())
            if unused:
                self.remotes_dropped(worker, unused)

    def give_back(
        self, handles: tuple[BlockHandle, ...], worker: str = "", remotes: tuple[int, ...] = ()
    ) -> None:
        """Deliveries that nobody will decode. Called by finalizers: takes no lock."""
        self._returned.extend(handles)
        if remotes:
            self.remotes_dropped(worker, remotes)

    def expect(self, delivery: Delivery) -> None:
        """A result that somebody may read late, after `close` even."""
        self._deliveries.add(delivery)

    def resident_buffer(self, nbytes: int) -> Any:
        """A writable ctypes array of ``nbytes`` in the arena; its block lives as long as it does."""
        block = self._arena.reserve(nbytes)
        try:
            array = self._attachments.adopt_owned(block.handle, block.address, self._returned.append)
        except BaseException:
            self._arena.free(block.handle)
            raise
        self._resident(block.handle)
        return array

    def room_bytes(self) -> int:
        return self._quota_bytes - self._arena.stats().live_bytes

    def drain_released(self) -> list[BlockHandle]:
        """The supervisor's own deliveries that have ended, one entry each; large ones a turn later."""
        released = self._attachments.drain_released(quick=True)
        released.extend(self.gpu.drain_released())
        if self._born is not None:
            released.extend(self._born.ended())
        while self._returned:
            released.append(self._returned.popleft())
        return released

    def live_views(self) -> int:
        views = self._attachments.live_views() + self._attachments.undrained() + len(self._returned)
        views += self.gpu.undrained()
        return views if self._born is None else views + self._born.owned

    def free(self, handle: BlockHandle) -> None:
        """A block of the own arena whose last lease has ended."""
        if self.gpu.free(handle):
            return
        if self._born is None or not self._born.free(handle):
            self._arena.free(handle)

    @property
    def cold(self) -> bool:
        return self._arena.cold

    def warm(self) -> None:
        """Map what was made copy-on-write and is free again, so that the next copy finds it ready."""
        self._arena.warm()

    def in_use(self) -> bool:
        """Whether any block of the own arena may be looked at by somebody."""
        return bool(self._arena.stats().blocks or (self._born is not None and self._born.published))

    def stats(self) -> ArenaStats:
        return self._arena.stats()

    # --- segments -------------------------------------------------------------------------------------

    def _grow(self, nbytes: int) -> tuple[int, Segment]:
        segment_id, segment = self.create(self.arena_id, nbytes)
        self._segment_added(self.arena_id, segment_id, segment.nbytes)
        return segment_id, segment

    def create(self, arena: int, nbytes: int) -> tuple[int, Segment]:
        """Make a segment of any arena and attach it here. Raises ArenaFull; takes 0.3 s per GiB."""
        nbytes = round_up(nbytes)
        if nbytes > self._quota_bytes:
            raise ArenaFull(f"a segment of {nbytes} bytes exceeds arena_quota_bytes = {self._quota_bytes}")
        try:
            segment = create_segment(self.kind, nbytes, name_prefix=self._name_prefix)
        except OSError as error:
            raise ArenaFull(f"no segment of {nbytes} bytes could be made: {error}") from error
        segment_id = next(self._ids)
        with self._lock:
            if self._closed:
                segment.close()
                raise ArenaFull("the supervisor is closed")
            self._segments.setdefault(arena, {})[segment_id] = segment
        self._attachments.add(arena, segment_id, segment)
        if segment.ordinary:
            self._ordinary.append((0.0, 0, segment))
        return segment_id, segment

    @property
    def ordinary(self) -> bool:
        """Whether segments, of any arena, are of ordinary pages and it is time to make huge ones of them."""
        return bool(self._ordinary) and any(due_s <= monotonic_s() for due_s, *_ in tuple(self._ordinary))

    def condense(self) -> None:
        """Make huge pages of some, for whoever maps them next. Takes 0.2 s for each at most."""
        for _ in range(len(self._ordinary)):
            try:
                due_s, attempt, segment = self._ordinary.popleft()
            except IndexError:  # another thread was faster
                return
            if due_s > monotonic_s():
                self._ordinary.append((due_s, attempt, segment))
                continue
            try:
                done = segment.condense()
            except OSError as error:  # short of descriptors or addresses: they stay as they are
                _log.debug("a segment stays in ordinary pages: %s", error)
                continue
            if segment.ordinary and done:
                self._ordinary.append((0.0, attempt, segment))  # the next part after the next job
            elif segment.ordinary and attempt < len(_CONDENSE_AGAIN_S):
                due_s = monotonic_s() + _CONDENSE_AGAIN_S[attempt]
                self._ordinary.append((due_s, attempt + 1, segment))

    def segment(self, arena: int, segment_id: int) -> Segment | None:
        return self._segments.get(arena, {}).get(segment_id)

    def segment_bytes(self, arena: int) -> int:
        with self._lock:
            return sum(segment.nbytes for segment in self._segments.get(arena, {}).values())

    def drop(self, arena: int, segment_ids: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Close segments (all of an arena by default): their ids. Live views stay readable.

        Those of a GPU's memory are freed by `MasterGpu.release`, once nobody has them open.
        """
        with self._lock:
            entry = self._segments.get(arena, {})
            ids = tuple(entry) if segment_ids is None else tuple(i for i in segment_ids if i in entry)
            for segment_id in ids:
                del entry[segment_id]
            if not entry:
                self._segments.pop(arena, None)
        for segment_id in ids:
            self._attachments.drop(arena, segment_id)
        return (*ids, *self.gpu.drop(arena, segment_ids))

    def _retire(self, segment_ids: tuple[int, ...]) -> None:
        self.drop(self.arena_id, segment_ids)
        self._segments_retired(self.arena_id, segment_ids)

    def trim(self) -> bool:
        """Give the own arena's wholly free segments back to the system. Whether it should be tried again."""
        retired = tuple(self._arena.trim())
        if retired:
            self._retire(retired)
        self._retire_born()
        return self._born is not None and self._born.total_bytes > 0

    @property
    def wants_room(self) -> bool:
        """Whether tensors of this program were copied that could have been born in the arena."""
        return self._born is not None and self._born.wants_room

    def make_room(self) -> None:
        """Make room for tensors to be born in. Takes as long as a segment takes to make."""
        if self._born is not None and self._born.make_room():
            self._arena.elsewhere_bytes = self._born.total_bytes

    def _grow_born(self, nbytes: int) -> tuple[int, Segment]:
        retired = tuple(self._arena.trim())  # what was copied there before is to be born from now on
        if retired:
            self._retire(retired)
        return self._grow(nbytes)

    def _retire_born(self) -> None:
        if self._born is not None:
            retired = self._born.retire()
            if retired:
                self._retire(retired)
            self._arena.elsewhere_bytes = self._born.total_bytes

    def close(self) -> None:
        """Close every descriptor. Delivered values stay valid for as long as they are referred to."""
        for delivery in tuple(self._deliveries):
            try:
                delivery.settle()
            except Exception:  # it is that result's own end, and its reader is told
                _log.exception("a result could not be decoded while the supervisor closed")
        if self._born is not None:
            self._born.close()
        with self._lock:
            self._closed = True
            self._segments.clear()
        self._arena.close()
        self._attachments.close()
        self.gpu.close()
