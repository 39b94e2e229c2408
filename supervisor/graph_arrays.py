"""Copies of numpy arrays that lie in memory as the originals do, and whether they are still the same.

Owns neither the choice of what is copied nor any array that it is given: it writes into none.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from typing import Any

__all__ = ["duplicate_array", "is_array", "same_array"]


def is_array(value: object) -> bool:
    """Whether it is one of numpy's, without loading numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def duplicate_array(value: Any) -> Any:
    """An array with memory of its own: of the same strides, unless it would drag along more than it shows."""
    import numpy as np

    span = _span(value)
    if span is None:
        return copy.deepcopy(value)
    backwards = ((size - 1) * -stride for size, stride in zip(value.shape, value.strides, strict=True))
    first = sum(step for step in backwards if step > 0)
    made: Any = np.ndarray(value.shape, value.dtype, span.copy(), first, value.strides)
    made.flags.writeable = value.flags.writeable
    return made


def same_array(one: Any, other: Any) -> bool:
    """Whether they are the same to the last bit; False where that can't be told."""
    import numpy as np

    if (
        type(one) is not type(other)
        or (one.shape, one.strides) != (other.shape, other.strides)
        or one.dtype != other.dtype
        or one.dtype.hasobject
    ):
        return False
    here, there = _span(one), _span(other)
    if here is not None and there is not None:
        return bool(np.array_equal(here, there))
    return bool(one.tobytes("A") == other.tobytes("A"))


def _span(value: Any) -> Any:
    """All bytes from an array's first to its last, as they lie; None where a dense copy is the better one.

    A broadcast array is much smaller in memory than its shape says, and strides below zero are to be kept.
    """
    import numpy as np

    if type(value) is not np.ndarray or value.dtype.hasobject or not value.size:
        return None
    low = high = value.ctypes.data
    for size, stride in zip(value.shape, value.strides, strict=True):
        if stride < 0:
            low += (size - 1) * stride
        else:
            high += (size - 1) * stride
    nbytes = high + value.itemsize - low
    if nbytes > value.nbytes:
        return None
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(low)
    memory.array = value  # which must live as long
    return np.frombuffer(memory, np.uint8)
