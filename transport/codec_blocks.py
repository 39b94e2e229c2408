"""Where the bytes of a value's groups go: into the tree, to a block that has them already, or a new block.

    groups ── write_groups() ──▶ buffers of the tree, blocks, statistics

Owns the one copy that a private byte costs. On any failure it discards what it reserved. It never
walks a value.
"""

from __future__ import annotations

import contextlib
import ctypes
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from legion_shm import faults
from legion_shm.errors import LegionError
from legion_shm.transport.codec_layout import Group, Region
from legion_shm.transport.codec_types import BlockStore, DeviceBlock, DeviceBytes, TransferStats
from legion_shm.transport.codec_wire import Token
from legion_shm.transport.handles import BlockHandle

__all__ = ["Fresh", "Written", "discard_all", "write_groups"]

_BLOCK_ALIGN = 64  # a cache line: what torch aligns its own memory to
_INLINE_ALIGN = 16  # what malloc gives the decoder's bytearray


@dataclass(slots=True)
class Written:
    """The outcome: ``buffers`` as the tree has them, ``blocks`` that they refer to by index."""

    buffers: list[bytes | bytearray | Token] = field(default_factory=list["bytes | bytearray | Token"])
    blocks: list[BlockHandle] = field(default_factory=list[BlockHandle])
    owned: list[bool] = field(default_factory=list[bool])
    referenced: list[object] = field(default_factory=list[object])
    copied: list[object] = field(default_factory=list[object])
    inline_bytes: int = 0
    copied_bytes: int = 0
    copies: int = 0
    referenced_bytes: int = 0

    def stats(self, tensors: int) -> TransferStats:
        return TransferStats(
            tensors=tensors,
            payload_bytes=self.inline_bytes + self.copied_bytes + self.referenced_bytes,
            inline_bytes=self.inline_bytes,
            copied_bytes=self.copied_bytes,
            copies=self.copies,
            referenced_bytes=self.referenced_bytes,
        )


def discard_all(written: Written, store: BlockStore) -> None:
    """Give back every block that was reserved; one that can't be does not keep the others."""
    for handle, owned in zip(written.blocks, written.owned, strict=True):
        if owned:
            with contextlib.suppress(LegionError):
                store.discard(handle)


class Fresh:
    """What values of one message have copied so far, and which objects were in them: the next refers to it.

    ``objects`` has, by identity, the number of the value that an object came in, and its number there.
    """

    def __init__(self) -> None:
        # None of them within another: so ends go up as starts do, and one look finds what holds some bytes.
        self._starts: list[int] = []
        self._spans: list[tuple[int, BlockHandle, int, object]] = []
        self.handles: set[BlockHandle] = set()
        self.objects: dict[int, tuple[int, int]] = {}
        self._alive: list[object] = []
        self._values = 0

    def note_objects(self, numbers: Mapping[int, int], alive: object) -> None:
        """One more value is encoded: the numbers of its objects, which ``alive`` keeps from being others."""
        self.objects.update((known, (self._values, number)) for known, number in numbers.items())
        self._alive.append(alive)
        self._values += 1

    def note(self, low: int, nbytes: int, handle: BlockHandle, offset: int, source: object) -> None:
        """These bytes, which ``source`` keeps where they are, were copied to ``offset`` of the block."""
        self.handles.add(handle)
        high = low + nbytes
        first = bisect_left(self._starts, low)
        last = first
        if self.find(low, nbytes) is not None:
            return
        while last < len(self._spans) and self._spans[last][0] <= high:
            last += 1
        self._starts[first:last] = [low]
        self._spans[first:last] = [(high, handle, offset, source)]

    def find(self, low: int, nbytes: int) -> tuple[BlockHandle, int] | None:
        """The block that holds a copy of these bytes, and the offset in it."""
        index = bisect_right(self._starts, low) - 1
        if index < 0:
            return None
        end, handle, offset, _ = self._spans[index]
        return (handle, offset + low - self._starts[index]) if low + nbytes <= end else None


def write_groups(
    groups: list[Group], store: BlockStore, *, max_inline_bytes: int, fresh: Fresh | None = None
) -> Written:
    """Give each group its bytes and each region its place. Raises what the store raises (`ArenaFull`)."""
    written = Written()
    known: dict[BlockHandle, int] = {}
    inline_max = store.inline_max_bytes
    busy: dict[tuple[str, str], DeviceBytes] = {}
    try:
        for group in groups:
            first = group.members[0]
            shared = len(group.members) > 1
            if group.packed:
                nbytes = first.dense_nbytes
                pad_block = pad_inline = 0
            else:
                # Several regions may be aligned among each other in ways that their lowest is not.
                pad_block = group.low % _BLOCK_ALIGN if shared else 0
                pad_inline = group.low % _INLINE_ALIGN if shared else 0
                nbytes = group.high - group.low
            if nbytes + pad_inline <= min(inline_max, max_inline_bytes - written.inline_bytes):
                _place(group, len(written.buffers), pad_inline)
                written.buffers.append(_inline_bytes(group, nbytes, pad_inline))
                written.inline_bytes += nbytes + pad_inline
                continue
            span = group.high - group.low
            searchable = not first.isolated and first.space is None
            found = store.find(group.low, span) if searchable else None
            born = store.adopt(group.low, span) if searchable and found is None else None
            if found is None and born is None and searchable and fresh is not None:
                found = fresh.find(group.low, span)
            if found is not None or born is not None:
                handle, offset, new = (
                    born if born is not None else (*cast("tuple[BlockHandle, int]", found), False)
                )
                block = known.get(handle)
                if block is None:
                    block = known[handle] = len(written.blocks)
                    written.blocks.append(handle)
                    written.owned.append(new)
                if born is None:  # a born block stays until it is freed, whatever becomes of its tensor
                    written.referenced.extend(region.source for region in group.members)
                written.referenced_bytes += span
                group.packed = False
                _place(group, len(written.buffers), 0)
                written.buffers.append([block, offset, span])
                continue
            there = _device_block(store, first, pad_block + nbytes)
            if there is not None:
                written.blocks.append(there.handle)
                written.owned.append(True)
                busy[there.bytes.device] = there.bytes
                handle = there.handle
                _fill_there(group, first, there.bytes.tensor[pad_block:])
            else:
                reserved = store.reserve(pad_block + nbytes)
                handle = reserved.handle
                written.blocks.append(handle)
                written.owned.append(True)
                _fill(group, first, reserved.address + pad_block, nbytes)
            if fresh is not None and searchable and not group.packed:
                fresh.note(group.low, nbytes, handle, pad_block, first.source)
            written.copied.extend(region.source for region in group.members)
            written.copied_bytes += nbytes
            written.copies += 1
            _place(group, len(written.buffers), pad_block)
            written.buffers.append([len(written.blocks) - 1, 0, pad_block + nbytes])
        if busy:
            _await_copies(busy.values())
    except BaseException:
        with contextlib.suppress(Exception):  # whose copies failed before, and the first failure is told
            for memory in busy.values():
                memory.synchronize()
        discard_all(written, store)
        raise
    return written


def _await_copies(memories: Iterable[DeviceBytes]) -> None:
    """Others may read them as soon as they hear of them."""
    if faults.hit is not None:
        faults.hit("gpu.copying")
    for memory in memories:
        memory.synchronize()


def _device_block(store: BlockStore, first: Region, nbytes: int) -> DeviceBlock | None:
    """Room in the memory that a device's tensors lie in, where there is some."""
    if first.space is None:
        return None
    (kind, uuid), _ = cast("tuple[tuple[str, str], object]", first.space)
    return store.device_block(kind, uuid, nbytes)


def _place(group: Group, buffer: int, pad: int) -> None:
    shared = len(group.members) > 1
    for region in group.members:
        if group.packed:
            region.place_packed(buffer)
        else:
            region.place(buffer, pad + region.address - group.low)
        if shared:
            region.mark_shared()


def _fill(group: Group, first: Region, address: int, nbytes: int) -> None:
    if group.packed:
        first.pack_into(address, nbytes, first.packed_strides())
    else:
        first.copy_span(address, group.low, nbytes)


def _fill_there(group: Group, first: Region, target: Any) -> None:
    if group.packed:
        first.pack_into_bytes(target, first.packed_strides())
    else:
        first.copy_span_into(target, group.low)


def _inline_bytes(group: Group, nbytes: int, pad: int) -> bytes | bytearray:
    first = group.members[0]
    if not (group.packed or pad or first.has_gaps) and first.space is None:
        return ctypes.string_at(group.low, nbytes)
    payload = bytearray(pad + nbytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(payload)) + pad
    if not group.packed and len(group.members) == 1 and first.has_gaps:
        # What lies in the gaps is nobody's, and would make equal values differ.
        first.pack_into(address, nbytes, first.token_strides())
    else:
        _fill(group, first, address, nbytes)
    return payload
