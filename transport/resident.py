"""Tensors that live in an arena from the start, so that sending them copies nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["resident_tensor"]


def resident_tensor(
    buffer_of: Callable[[int], Any], shape: Sequence[int], dtype: torch.dtype | None
) -> torch.Tensor:
    """An uninitialized, contiguous CPU tensor over ``buffer_of(nbytes)``, a writable buffer.

    ``dtype`` defaults to torch's default dtype. A tensor without elements needs no buffer.
    """
    sizes = tuple(int(size) for size in shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"a shape has no negative sizes, got {sizes}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    nbytes = math.prod(sizes) * dtype.itemsize
    if not nbytes:
        return torch.empty(sizes, dtype=dtype)
    return torch.frombuffer(buffer_of(nbytes), dtype=dtype).view(sizes)
