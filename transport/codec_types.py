"""What the value codec asks of its surroundings, what it gives back, and the bounds it keeps.

Owns the types that pass between the codec and its callers. It holds no codec logic, and never touches
memory, torch or numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from legion_shm.transport.handles import BlockHandle

__all__ = [
    "BlockStore",
    "DecodeLimits",
    "DeviceBlock",
    "DeviceBytes",
    "DevicePolicy",
    "DeviceResolver",
    "Devices",
    "EncodedValue",
    "ReservedBlock",
    "TransferStats",
]


class ReservedBlock(Protocol):
    """A block that was reserved and not yet published: writable at ``address``."""

    @property
    def handle(self) -> BlockHandle: ...

    @property
    def address(self) -> int: ...


class DeviceBytes:
    """Bytes in a device's memory, as a view of a block or a block to be filled.

    ``tensor`` is a one-dimensional torch.uint8 tensor over them, which does not keep them: this object does.
    ``device`` is the device's type and UUID. ``synchronize`` waits until what this thread has queued there is
    done; until then nobody else may read or write them.
    """

    __slots__ = ("__weakref__", "_keep", "_synchronize", "device", "tensor")

    def __init__(
        self, device: tuple[str, str], tensor: Any, synchronize: Callable[[Any], None], keep: object
    ) -> None:
        self.device = device
        self.tensor = tensor
        self._synchronize = synchronize
        self._keep = keep

    def synchronize(self) -> None:
        self._synchronize(self.tensor)


@dataclass(frozen=True, slots=True)
class DeviceBlock:
    """A reserved block in a device's memory, to be filled through ``bytes``."""

    handle: BlockHandle
    bytes: DeviceBytes


class BlockStore(Protocol):
    """What the codec needs of this process's shared memory."""

    @property
    def inline_max_bytes(self) -> int:
        """Payloads up to this size travel inside the tree."""
        ...

    def find(self, address: int, nbytes: int) -> tuple[BlockHandle, int] | None:
        """The unchanged published block that covers this memory and the offset in it, or None."""
        ...

    def adopt(self, address: int, nbytes: int) -> tuple[BlockHandle, int, bool] | None:
        """Publish the block of our own that this memory was born in, without a copy.

        Gives its handle, the offset in it, and whether the handle is new; None where there is no such block.
        """
        ...

    def reserve(self, nbytes: int) -> ReservedBlock:
        """A new block of our own. Raises `ArenaFull`."""
        ...

    def discard(self, handle: BlockHandle) -> None:
        """Give back a reserved block that will not be published."""
        ...

    def device_block(self, kind: str, uuid: str, nbytes: int) -> DeviceBlock | None:
        """A new block of our own in that device's memory; None where main memory has to do."""
        ...

    def view(self, handle: BlockHandle) -> Any:
        """A writable buffer of ``handle.nbytes`` bytes, or `DeviceBytes` where they are in a device's memory.

        Raises `InvalidHandle` or `StaleHandle`.
        """
        ...


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What one encode moved. ``payload_bytes`` is the sum of the inline, copied and referenced bytes.

    ``tensors`` counts tensors and arrays with their own place in the tree; ``copies`` the copies made
    into blocks, whose bytes are ``copied_bytes``.
    """

    tensors: int = 0
    payload_bytes: int = 0
    inline_bytes: int = 0
    copied_bytes: int = 0
    copies: int = 0
    referenced_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EncodedValue:
    """A value on its way: ``tree`` refers to ``blocks`` by index.

    ``owned[i]`` is True where this encode reserved the block, False where it exists already and is
    only referred to. ``keepalive`` is to be held until the leases on the blocks are registered. ``noted``
    are the instances in it of classes whose `ValueType` is ``noted``. ``uses`` are the numbers of earlier
    values of the same message with which it shares objects: it can be decoded only after them.
    """

    tree: bytes
    blocks: tuple[BlockHandle, ...]
    owned: tuple[bool, ...]
    stats: TransferStats
    keepalive: tuple[object, ...] = field(default=(), repr=False, compare=False)
    noted: tuple[object, ...] = field(default=(), repr=False, compare=False)
    uses: tuple[int, ...] = ()

    def discard(self, store: BlockStore) -> None:
        """Give back the blocks that were reserved for this value, when it won't be sent after all."""
        for handle, owned in zip(self.blocks, self.owned, strict=True):
            if owned:
                store.discard(handle)


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Bounds on one value. Encode keeps them too, so that no honest value ends its sender.

    ``max_depth``: containers inside one another, at most 200. ``max_items``: leaves, keys and
    containers in all. ``max_tensors``: tensors, arrays, and byte strings and texts that travel in blocks.
    ``max_inline_bytes``: their bytes inside the tree; what is more goes into blocks.
    """

    max_depth: int = 64
    max_items: int = 4_000_000
    max_tensors: int = 65_536
    max_inline_bytes: int = 64 * 1024 * 1024


class DeviceResolver(Protocol):
    """How devices are named across processes. Tests give a fake one."""

    def identify(self, device: Any) -> tuple[str, str] | None:
        """The type and unique id of a torch.device, or None for host memory.

        Raises `LookupError` with a reason for a device whose tensors can't travel.
        """
        ...

    def locate(self, kind: str, uuid: str) -> Any | None:
        """The torch.device of this process that has this type and id, or None."""
        ...


class Devices(DeviceResolver, Protocol):
    """What is done with devices' memory that is not torch's own. torch's devices do it, or an emulation."""

    def initialized(self) -> bool:
        """Whether this process uses such devices already. Never starts to."""
        ...

    def bytes_at(self, device: Any, address: int, nbytes: int) -> Any:
        """A torch.uint8 tensor over memory of that torch.device; it does not keep the memory."""
        ...

    def synchronize(self, tensor: Any) -> None:
        """Wait until all is done that this thread has queued on the tensor's device."""
        ...


@dataclass(frozen=True, slots=True)
class DevicePolicy:
    """Where tensors of other devices than the CPU go.

    With ``allow_cpu``, a tensor whose device this process hasn't stays in host memory instead of
    raising `UnsupportedValue`. ``resolver`` None stands for torch's own devices.
    """

    allow_cpu: bool = False
    resolver: DeviceResolver | None = None
