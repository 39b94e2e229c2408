"""A worker's GPU memory: its own arenas there, others' segments, and what is done where it has none.

Owns the worker's half of that protocol: asking for segments, opening and checking each, closing those that
are gone, and having blocks that can't be read here copied to main memory by the supervisor. The main thread
alone calls it, but for `drain_released`. It starts the use of no device: a worker that receives or makes a
tensor of one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from legion_shm import faults
from legion_shm.errors import ArenaFull, CudaError, ProtocolError
from legion_shm.transport.codec_types import DeviceBlock
from legion_shm.transport.cuda_driver import HANDLE_BYTES
from legion_shm.transport.gpu_memory import GpuMemory
from legion_shm.transport.gpu_segment import PATTERN_BYTES, GpuSegment
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.messages import (
    GpuSegmentIntroduced,
    GpuSegmentRequest,
    GpuSegmentsClosed,
    HostCopies,
    HostCopyRequest,
    Message,
    SegmentRefused,
    SegmentRetired,
)

__all__ = ["WorkerGpu"]

_DEVICE_MAX = 80

Ask = Callable[[Message], Message]


class WorkerGpu:
    """``ask`` sends a message and waits for its answer, or raises ArenaFull. A quota of 0 turns it off."""

    def __init__(
        self,
        *,
        arena_id: int,
        quota_bytes: int,
        generations: Iterator[int],
        ask: Ask,
        send: Callable[[Message], None],
        returned: Callable[[BlockHandle], None],
    ) -> None:
        self._arena_id, self._works = arena_id, quota_bytes > 0
        self._ask, self._send, self._returned = ask, send, returned
        self._introduced: dict[tuple[int, int], GpuSegmentIntroduced] = {}
        self._absent: set[str] = set()
        self._memory = GpuMemory(
            arena_id=arena_id,
            quota_bytes=quota_bytes,
            generations=generations,
            grow=self._grow,
            retired=self._retire,
        )

    # --- the own arenas -----------------------------------------------------------------------------

    def block(self, kind: str, device: str, nbytes: int) -> DeviceBlock | None:
        return self._memory.block(kind, device, nbytes) if self._works else None

    def free(self, handle: BlockHandle) -> bool:
        return self._memory.free(handle)

    @property
    def idle_since_s(self) -> float | None:
        return self._memory.idle_since_s

    def trim(self) -> tuple[int, ...]:
        """Close the own arenas' wholly free segments: their ids, for the supervisor to free."""
        return tuple(self._memory.trim())

    def _grow(self, device: str, nbytes: int) -> tuple[int, GpuSegment]:
        answer = self._ask(GpuSegmentRequest(device, nbytes))
        if isinstance(answer, SegmentRefused):
            raise ArenaFull(answer.reason)
        if not isinstance(answer, GpuSegmentIntroduced) or answer.device != device:
            raise ProtocolError("the supervisor granted another segment than was asked for")
        if faults.hit is not None:
            faults.hit("gpu.granted")
        try:
            return answer.segment, self._opened(answer)
        except CudaError as error:
            self._retire(answer.segment)
            raise ArenaFull(str(error)) from error

    def _retire(self, segment_id: int) -> None:
        self._send(SegmentRetired((segment_id,)))

    # --- segments -------------------------------------------------------------------------------------

    def introduce(self, message: GpuSegmentIntroduced) -> None:
        """Another's segment, to be opened when a block in it is delivered."""
        check_introduced(message)
        self._introduced[message.arena, message.segment] = message

    def _opened(self, message: GpuSegmentIntroduced) -> GpuSegment:
        """Raises CudaError, and uses none from then on, where what is opened is not what was shared."""
        try:
            return GpuSegment.open(message.device, message.nbytes, message.handle, message.pattern)
        except OSError as error:
            self._works = False
            self._memory.warn(f"a segment of GPU {message.device} could not be opened: {error}")
            raise CudaError(str(error)) from error

    def drop(self, arena: int, segment_ids: tuple[int, ...]) -> None:
        """Close others' segments that are gone, and say so."""
        known = tuple(i for i in segment_ids if self._introduced.pop((arena, i), None) is not None)
        for segment_id in known:
            self._memory.drop(arena, segment_id)
        if known:
            self._send(GpuSegmentsClosed(arena, known))

    # --- deliveries -------------------------------------------------------------------------------------

    def knows(self, handle: BlockHandle) -> bool:
        """Whether that is a block of a GPU's memory."""
        key = (handle.arena, handle.segment)
        return key in self._introduced or self._memory.knows(*key)

    def view(self, handle: BlockHandle) -> Any:
        """The block's bytes there; or None, where they can't be read there: ask for a `host_copy`."""
        key = (handle.arena, handle.segment)
        if not self._memory.knows(*key):
            message = self._introduced[key]
            if not self._works or message.device in self._absent:
                return None
            from legion_shm.transport.torch_devices import current_devices

            if current_devices().locate("cuda", message.device) is None:
                self._absent.add(message.device)
                return None
            try:
                self._memory.add(*key, self._opened(message))
            except CudaError:
                return None
        try:
            return self._memory.view(handle)
        except RuntimeError as error:  # torch's own
            self._works = False
            self._memory.warn(f"torch takes no shared memory of a GPU: {error}")
            return None

    def host_copy(self, handle: BlockHandle) -> BlockHandle:
        """A block in main memory with the same bytes, delivered in its place. Raises ArenaFull."""
        answer = self._ask(HostCopyRequest((handle,)))
        if not isinstance(answer, HostCopies) or len(answer.handles) > 1:
            raise ProtocolError("the supervisor answered something else than was asked for")
        if not answer.handles:
            raise ArenaFull(
                f"a tensor lies in a GPU's memory, and could not be copied from there: {answer.reason}"
            )
        self._returned(handle)
        return answer.handles[0]

    def drain_released(self) -> list[BlockHandle]:
        return self._memory.drain_released()

    def undrained(self) -> int:
        return self._memory.undrained()


def check_introduced(message: GpuSegmentIntroduced) -> None:
    """Raise ProtocolError for what describes no segment."""
    if (
        message.nbytes <= 0
        or not 0 < len(message.device) <= _DEVICE_MAX
        or len(message.handle) != HANDLE_BYTES
        or len(message.pattern) != PATTERN_BYTES
    ):
        raise ProtocolError("GpuSegmentIntroduced: its size, device, handle or pattern can't be one")
