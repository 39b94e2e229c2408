"""Tensors that live in an arena from the start, so that sending them copies nothing."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch

__all__ = ["resident_tensor"]


def resident_tensor(
    buffer_of: Callable[[int], Any], shape: Sequence[int], dtype: torch.dtype | None
) -> torch.Tensor:
    """An uninitialized, contiguous CPU tensor over ``buffer_of(nbytes)``, a writable buffer.

    ``dtype`` defaults to torch's default dtype. A tensor without elements needs no buffer. TypeError for
    what is no shape or no dtype, and for a quantized one.
    """
    if not isinstance(cast("object", shape), Iterable):
        raise TypeError(f"shape: expected a sequence of sizes, such as ({shape!r},), got {shape!r}")
    sizes = tuple(operator.index(size) for size in shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"a shape has no negative sizes, got {sizes}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(cast("object", dtype), torch.dtype):
        raise TypeError(f"dtype: expected one of torch's, such as torch.float32, got {dtype!r}")
    if str(dtype).startswith("torch.q"):  # torch.frombuffer with one ends the process
        raise TypeError(f"dtype: {dtype} is quantized, and has scales beside its memory; use torch.int8")
    nbytes = math.prod(sizes) * dtype.itemsize
    if not nbytes:
        return torch.empty(sizes, dtype=dtype, device="cpu")
    return torch.frombuffer(buffer_of(nbytes), dtype=dtype).view(sizes)
