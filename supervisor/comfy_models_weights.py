"""Where a model's tensors lie in shared memory: packed into few blocks, once, and found again.

    tensors ── Weights.place ──▶ blobs (bytes in shared memory) + a table ── views ──▶ tensors

Owns the memory of which tensor was placed where, for as long as the tensor lives and is unchanged; with the
last of them the block is given back. A tensor that came from a block is found in that block, and not placed
again.
"""

# ComfyUI's and torch's objects have no types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from legion_shm.transport.copying import copy_memory
from legion_shm.transport.residence import Residence, note_placed

__all__ = ["Placed", "Weights", "imprint", "views"]

_ALIGN = 64  # a cache line: what torch aligns its own memory to
_INLINE_MAX = 2048
_SPOT = 64
_PARAMETER, _REQUIRES_GRAD, _META = 1, 2, 4

_DTYPES: dict[str, torch.dtype] = {
    str(item).removeprefix("torch."): item for item in vars(torch).values() if isinstance(item, torch.dtype)
}


@dataclass(frozen=True)
class Placed:
    """Tensors in their order: ``table`` has a row for each, ``blobs`` the bytes that the rows point into."""

    table: list[list[Any]]
    blobs: list[torch.Tensor]
    copied_bytes: int


@dataclass(frozen=True, slots=True)
class _Place:
    tensor: weakref.ref[torch.Tensor]
    imprint: object
    blob: torch.Tensor
    offset: int
    strides: tuple[int, ...]


def imprint(tensor: torch.Tensor) -> object:
    """What changes where a tensor is written or moved, cheap to ask: address, version, and some of its bytes.

    Tensors made in inference mode have no version, and writes by way of ``.data`` count for none; ComfyUI,
    where it writes a weight in place, writes all of it. So 64 bytes of start, middle and end count.
    """
    try:
        version: int | None = tensor._version
    except RuntimeError:  # made in inference mode
        version = None
    # A subclass, as quantized weights are, may have no memory of its own.
    if tensor.is_meta or not tensor.numel() or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return version, tuple(tensor.shape)
    address = tensor.data_ptr()
    if not tensor.is_cpu:
        return version, address
    nbytes = tensor.numel() * tensor.itemsize
    at = ctypes.string_at
    if not tensor.is_contiguous():
        return version, address, at(address, tensor.itemsize)
    if nbytes <= 3 * _SPOT:
        return version, address, at(address, nbytes)
    middle = address + nbytes // 2
    last = address + nbytes - _SPOT
    return version, address, at(address, _SPOT), at(middle, _SPOT), at(last, _SPOT)


class Weights:
    """Which tensors of this process one memory's blocks hold. Not for two threads at a time."""

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}

    def place(self, tensors: Sequence[torch.Tensor], residence: Residence | None) -> Placed:
        """Copy into one new block those that lie in none. Raises what the block's reservation raises."""
        rows: list[list[Any]] = []
        fresh: list[tuple[int, torch.Tensor, torch.Tensor, int, int, object]] = []
        numbers: dict[int, int] = {}
        order: list[torch.Tensor] = []
        total = 0

        def blob_number(blob: torch.Tensor) -> int:
            number = numbers.setdefault(id(blob), len(order))
            if number == len(order):
                order.append(blob)
            return number

        for tensor in tensors:
            row = _row(tensor)
            rows.append(row)
            if tensor.is_meta or not tensor.numel():
                continue
            now = imprint(tensor)
            place = self._places.get(id(tensor))
            if place is not None and place.tensor() is tensor and place.imprint == now:
                row[0], row[1], row[4] = blob_number(place.blob), place.offset, list(place.strides)
                continue
            source, span = _span(tensor)
            row[4] = list(source.stride())
            nbytes = span * source.itemsize
            if nbytes <= _INLINE_MAX:
                row[1] = ctypes.string_at(source.data_ptr(), nbytes)
                continue
            fresh.append((len(rows) - 1, tensor, source, total, nbytes, now))
            total += -(-nbytes // _ALIGN) * _ALIGN
        if fresh:
            blob = _blob(total, residence)
            number = blob_number(blob)
            base = blob.data_ptr()
            note_placed(total)
            for index, tensor, source, offset, nbytes, now in fresh:
                copy_memory(base + offset, source.data_ptr(), nbytes)
                rows[index][0], rows[index][1] = number, offset
                self.remember(tensor, blob, offset, tuple(source.stride()), now)
        return Placed(rows, order, sum(item[4] for item in fresh))

    def remember(
        self, tensor: torch.Tensor, blob: torch.Tensor, offset: int, strides: Iterable[int], now: object
    ) -> None:
        """These bytes of the blob are this tensor's, while it has that imprint."""
        known = id(tensor)
        places = self._places

        def forget(gone: weakref.ref[torch.Tensor]) -> None:
            place = places.get(known)
            if place is not None and place.tensor is gone:
                del places[known]

        places[known] = _Place(weakref.ref(tensor, forget), now, blob, offset, tuple(strides))

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Place these anew next time."""
        for tensor in tensors:
            place = self._places.get(id(tensor))
            if place is not None and place.tensor() is tensor:
                del self._places[id(tensor)]

    def __len__(self) -> int:
        return len(self._places)


def _blob(nbytes: int, residence: Residence | None) -> torch.Tensor:
    with torch.inference_mode(mode=False):
        if residence is None:
            return torch.empty(nbytes, dtype=torch.uint8)
        return torch.frombuffer(residence.resident_buffer(nbytes), dtype=torch.uint8)


def _row(tensor: torch.Tensor) -> list[Any]:
    """Blob or None, offset or bytes, dtype, shape, strides in elements, flags."""
    flags = _PARAMETER if isinstance(tensor, torch.nn.Parameter) else 0
    flags |= _REQUIRES_GRAD if tensor.requires_grad else 0
    flags |= _META if tensor.is_meta else 0
    name = str(tensor.dtype).removeprefix("torch.")
    return [None, b"", name, list(tensor.shape), list(tensor.stride()), flags]


def _span(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The tensor in host memory, dense enough to be copied as it lies, and how many elements that covers."""
    source = tensor.detach()
    if not source.is_cpu:
        source = source.cpu()
    source = source.resolve_conj().resolve_neg()
    count = 1 + sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True))
    if count > 2 * source.numel():
        source = source.contiguous()
        count = source.numel()
    return source, count


def views(
    table: Sequence[Sequence[Any]], blobs: Sequence[torch.Tensor], weights: Weights | None = None
) -> list[torch.Tensor]:
    """The tensors of a table, each with a storage of its own. Raises ValueError for what is malformed.

    ``weights`` remembers where they lie, so that they go on by handle.
    """
    memories: list[Any] = [blob.numpy() for blob in blobs]
    found: list[torch.Tensor] = []
    with torch.inference_mode(mode=False):
        for row in table:
            number, where, name, shape, strides, flags = row
            dtype = _DTYPES.get(name)
            if dtype is None or len(shape) != len(strides):
                raise ValueError(f"no tensor of dtype {name!r:.40}")
            if flags & _META:
                tensor = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            elif not math.prod(shape):
                tensor = torch.empty_strided(shape, strides, dtype=dtype)
            else:
                memory: Any = bytearray(where) if number is None else memories[number]
                start = 0 if number is None else where
                count = 1 + sum((s - 1) * t for s, t in zip(shape, strides, strict=True))
                if start < 0 or min(shape, default=0) < 0 or min(strides, default=0) < 0:
                    raise ValueError("a tensor outside of its block")
                if start + count * dtype.itemsize > len(memory):
                    raise ValueError("a tensor outside of its block")
                flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=start)
                tensor = cast("torch.Tensor", cast(Any, flat).as_strided_(shape, strides))
            if flags & _PARAMETER:
                tensor = torch.nn.Parameter(tensor, requires_grad=bool(flags & _REQUIRES_GRAD))
            elif flags & _REQUIRES_GRAD:
                tensor.requires_grad_()
            if weights is not None and number is not None:
                weights.remember(tensor, blobs[number], where, strides, imprint(tensor))
            found.append(tensor)
    return found
