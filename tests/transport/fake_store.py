"""A BlockStore in plain memory for the codec's tests: counts what is asked of it, and can run full."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

from legion_shm.errors import ArenaFull, InvalidHandle, StaleHandle
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle

__all__ = ["FakeBlock", "FakeStore"]

_ALIGN = 64


@dataclass(frozen=True)
class FakeBlock:
    handle: BlockHandle
    address: int


class FakeStore:
    """Both ends in one: what is reserved here can be viewed here. Views share the block's bytes."""

    def __init__(self, *, inline_max_bytes: int = 64, max_blocks: int | None = None) -> None:
        self.inline_max_bytes = inline_max_bytes
        self.max_blocks = max_blocks
        self.reserved: list[BlockHandle] = []
        self.discarded: list[BlockHandle] = []
        self.viewed: list[BlockHandle] = []
        self.released: list[BlockHandle] = []
        self.dirty: set[BlockHandle] = set()
        self._memory: dict[BlockHandle, Any] = {}
        self._views: list[tuple[weakref.ref[Any], BlockHandle]] = []

    @property
    def live_blocks(self) -> int:
        return len(self._memory)

    def payload(self, handle: BlockHandle) -> bytes:
        return bytes(memoryview(self._memory[handle]))

    def reserve(self, nbytes: int) -> FakeBlock:
        if self.max_blocks is not None and len(self._memory) >= self.max_blocks:
            raise ArenaFull(f"the test's store holds {self.max_blocks} blocks already")
        # Aligned as real blocks are: torch's copy of complex128 faults on Windows where it is not.
        room = (ctypes.c_ubyte * (nbytes + _ALIGN))()
        memory = (ctypes.c_ubyte * nbytes).from_buffer(room, -ctypes.addressof(room) % _ALIGN)
        number = len(self.reserved)
        handle = BlockHandle(7, 0, number * BLOCK_ALIGN, nbytes, number)
        self.reserved.append(handle)
        self._memory[handle] = memory
        return FakeBlock(handle, ctypes.addressof(memory))

    def device_block(self, kind: str, uuid: str, nbytes: int) -> None:
        return None

    def discard(self, handle: BlockHandle) -> None:
        if handle not in self._memory:
            raise StaleHandle(f"{handle} is not reserved")
        del self._memory[handle]
        self.discarded.append(handle)

    def view(self, handle: BlockHandle) -> Any:
        memory = self._memory.get(handle)
        if memory is None:
            raise InvalidHandle(f"{handle} is no block of the test's store")
        self.viewed.append(handle)
        view = (ctypes.c_ubyte * handle.nbytes).from_buffer(memory)
        weakref.finalize(view, self.released.append, handle).atexit = False
        self._views.append((weakref.ref(view), handle))
        return view

    def adopt(self, address: int, nbytes: int) -> None:
        return None

    def find(self, address: int, nbytes: int) -> tuple[BlockHandle, int] | None:
        for reference, handle in self._views:
            view = reference()
            start = 0 if view is None else ctypes.addressof(view)
            inside = start <= address and address + nbytes <= start + handle.nbytes
            if view is not None and inside and handle not in self.dirty:
                return handle, address - start
        return None
