"""Which bytes of which memory a value's tensors and arrays need, and which of them share bytes.

    regions (one per tensor, array, long bytes) ── cluster() ──▶ groups (one per buffer of the tree)

Pure but for `host_memory`: addresses are numbers here, no byte behind them is read. Rules:

- A region whose span (lowest to highest byte it touches) is at most `SPAN_FACTOR` times its dense size
  keeps its strides. Those whose spans overlap form one group: their bytes cross once, shared.
- A region with a wider span joins a group that covers it, or regions with which it really shares bytes;
  else it is packed densely: a group of its own, together with others of the very same layout.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

from legion_shm.transport.codec_wire import (
    AT_BUFFER,
    AT_OFFSET,
    AT_STRIDES,
    SIZE_MAX,
    Token,
)
from legion_shm.transport.copying import copy_memory

__all__ = ["SPAN_FACTOR", "Group", "Region", "cluster", "dense_strides", "host_memory"]

SPAN_FACTOR = 2

_OVERLAP_TESTS = 2048
"""Of a few microseconds each. Beyond, regions count as sharing: more bytes may cross, none is torn."""

_memory_view = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_view.restype = ctypes.py_object
_memory_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_PYBUF_WRITE = 0x200


def host_memory(address: int, nbytes: int) -> memoryview:
    """A writable view of memory that the caller keeps alive (a ctypes array type per size is slow)."""
    return cast("memoryview", _memory_view(address, nbytes, _PYBUF_WRITE))


def dense_strides(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Strides in elements without gaps, with the dimensions in the order that ``strides`` has them in.

    A dimension that is expanded (stride 0) stays so.
    """
    order = sorted(range(len(shape)), key=lambda i: abs(strides[i]), reverse=True)
    dense = [0] * len(shape)
    step = 1
    for i in reversed(order):
        if strides[i]:
            dense[i] = step
            step *= shape[i]
    return dense


class Region:
    """The memory of one tensor or array. ``strides`` are in bytes; ``low`` to ``high`` is its span.

    ``shape`` has size 1 where it is expanded (stride 0), so ``dense_nbytes`` counts no byte twice.
    ``space`` names the memory that addresses count in: None is the host's. An ``isolated`` region shares
    with none and is never looked up; a ``packed`` one can't be sent as its bytes lie.
    """

    __slots__ = (
        "address",
        "dense_nbytes",
        "high",
        "isolated",
        "itemsize",
        "low",
        "packed",
        "shape",
        "source",
        "space",
        "strides",
        "token",
    )

    def __init__(
        self,
        source: Any,
        token: Token,
        *,
        address: int,
        shape: Sequence[int],
        strides: Sequence[int],
        itemsize: int,
        space: Hashable = None,
        isolated: bool = False,
        packed: bool = False,
    ) -> None:
        self.source = source
        self.token = token
        self.address = address
        self.strides = strides
        self.itemsize = itemsize
        self.space = space
        self.isolated = isolated
        self.packed = packed
        low = address
        high = address + itemsize
        dense_nbytes = itemsize
        distinct = list(shape)
        for i, stride in enumerate(strides):
            if not stride:
                distinct[i] = 1
                continue
            size = distinct[i]
            dense_nbytes *= size
            if stride > 0:
                high += (size - 1) * stride
            else:
                low += (size - 1) * stride
        self.shape = distinct
        self.dense_nbytes = dense_nbytes
        self.low = low
        self.high = high

    @property
    def has_gaps(self) -> bool:
        """Its span holds bytes that it doesn't touch, and starts with its first element."""
        return self.high - self.low > self.dense_nbytes and self.low == self.address

    def place(self, buffer: int, offset: int) -> None:
        """Note in the token where its first element is."""
        self.token[AT_BUFFER] = buffer
        self.token[AT_OFFSET] = offset

    def place_packed(self, buffer: int) -> None:
        self.place(buffer, 0)
        self.token[AT_STRIDES] = self.packed_strides()

    def token_strides(self) -> list[int]:
        strides: list[int] = self.token[AT_STRIDES]
        return strides

    def packed_strides(self) -> list[int]:
        """Without gaps, as the token will have them."""
        raise NotImplementedError

    def pack_into(self, address: int, nbytes: int, strides: Sequence[int]) -> None:
        """Copy its distinct elements to host memory, laid out with ``strides`` (as the token has them)."""
        raise NotImplementedError

    def copy_span(self, address: int, low: int, nbytes: int) -> None:
        """Copy ``nbytes`` from ``low`` in its memory, as they lie, to host memory at ``address``."""
        copy_memory(address, low, nbytes)

    def pack_into_bytes(self, target: Any, strides: Sequence[int]) -> None:
        """`pack_into` for memory of the region's own device: a torch.uint8 tensor of just the size."""
        raise NotImplementedError

    def copy_span_into(self, target: Any, low: int) -> None:
        """`copy_span` for memory of the region's own device: a torch.uint8 tensor of just the size."""
        raise NotImplementedError

    def mark_shared(self) -> None:
        """Note in the token that its buffer serves others too."""


@dataclass(slots=True)
class Group:
    """Regions that share one buffer: the bytes from ``low`` to ``high``, or, packed, one's elements."""

    members: list[Region]
    low: int
    high: int
    packed: bool


def cluster(regions: list[Region]) -> list[Group]:
    """Divide regions into groups, each region into one; groups in the order of their first regions.

    Addresses decide on no order: equal values get equal trees.
    """
    groups: list[Group] = []
    spaces: dict[Hashable, list[Region]] = {}
    for region in regions:
        if region.isolated:
            groups.append(Group([region], region.low, region.high, region.packed))
        else:
            spaces.setdefault(region.space, []).append(region)
    for members in spaces.values():
        if len(members) == 1:
            region = members[0]
            groups.append(Group(members, region.low, region.high, not _is_compact(region)))
        else:
            groups.extend(_cluster_space(members))
    if len(groups) > 1:
        order = {id(region): number for number, region in enumerate(regions)}
        groups.sort(key=lambda group: min(order[id(region)] for region in group.members))
    return groups


def _is_compact(region: Region) -> bool:
    return region.high - region.low <= SPAN_FACTOR * region.dense_nbytes


def _cluster_space(regions: list[Region]) -> list[Group]:
    native = [region for region in regions if _is_compact(region)]
    groups: list[Group] = []
    if len(native) < len(regions):
        native, packed = _settle_wide(regions, native)
        layouts: dict[Hashable, Group] = {}
        for region in packed:
            group = layouts.setdefault(_layout(region), Group([], region.low, region.high, packed=True))
            group.members.append(region)
        groups.extend(layouts.values())
    return groups + _merge(native)


def _layout(region: Region) -> Hashable:
    return (region.address, region.itemsize, tuple(region.shape), tuple(region.strides))


def _merge(regions: list[Region]) -> list[Group]:
    """One group for each set of regions whose spans overlap, in the order of their addresses."""
    groups: list[Group] = []
    high = -1
    for region in sorted(regions, key=attrgetter("low")):
        if region.low < high:
            group = groups[-1]
            group.members.append(region)
            group.high = high = max(high, region.high)
        else:
            high = region.high
            groups.append(Group([region], region.low, high, packed=False))
    return groups


def _settle_wide(regions: list[Region], native: list[Region]) -> tuple[list[Region], list[Region]]:
    """Divide all regions into those that keep their strides and those that are packed."""
    native = list(native)
    covers = _merge(native)
    lows = [group.low for group in covers]
    wide: list[Region] = []
    for region in regions:
        if _is_compact(region):
            continue
        at = bisect_right(lows, region.low) - 1
        if at >= 0 and region.high <= covers[at].high:
            native.append(region)
        else:
            wide.append(region)
    packed: list[Region] = []
    tests = _OVERLAP_TESTS
    ordered = sorted(regions, key=attrgetter("low"))
    for region in wide:
        layout = _layout(region)
        keep = False
        for other in ordered:
            if other.low >= region.high:
                break
            if other.high <= region.low or _layout(other) == layout:
                continue
            tests -= 1
            if tests < 0 or _share_bytes(region, other):
                keep = True
                break
        (native if keep else packed).append(region)
    return native, packed


def _share_bytes(one: Region, other: Region) -> bool:
    from legion_shm.transport.codec_arrays import share_bytes

    if one.high - one.low > SIZE_MAX:
        return True
    return share_bytes(one, other)
