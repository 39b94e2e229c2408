"""numpy in the codec: arrays, scalars and the scalars that are texts, both ways.

Imported by the codec only when a value (or a tree) holds one. Arrays are zero-copy views of blocks on
the receiver's side. Never unpickles: dtypes that hold objects are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from legion_shm.errors import ProtocolError
from legion_shm.transport import codec_wire as wire
from legion_shm.transport.codec_dtypes import describe_dtype, rebuild_dtype
from legion_shm.transport.codec_layout import Region, dense_strides, host_memory
from legion_shm.transport.codec_plan import Handler, Planner
from legion_shm.transport.codec_read import Reader, ReadHandler, fields
from legion_shm.transport.codec_wire import Refusal, Token, are_sizes, is_list_of

__all__ = ["plan_handler", "read_handler", "share_bytes"]

AnyArray = npt.NDArray[Any]

_shares_memory: Any = np.shares_memory  # whose stub knows no bounds but two
_SHARE_WORK = 100_000  # of numpy's exact solver, some milliseconds at most


def plan_handler(kind: type) -> Handler | None:
    """How to plan a value of that class; None when it is not numpy's, also for a subclass of an array."""
    if kind is np.ndarray:
        return _plan_array
    if kind is np.str_:
        return _plan_str
    if kind is np.bytes_:
        return _plan_bytes
    if issubclass(kind, np.generic):
        return _plan_scalar
    return None


def read_handler(tag: int) -> ReadHandler | None:
    return _READERS.get(tag)


class _ArrayRegion(Region):
    __slots__ = ()

    def packed_strides(self) -> list[int]:
        return [step * self.itemsize for step in dense_strides(self.shape, self.strides)]

    def pack_into(self, address: int, nbytes: int, strides: Sequence[int]) -> None:
        source = cast("AnyArray", self.source)
        target: AnyArray = np.ndarray(
            tuple(self.shape), source.dtype, buffer=host_memory(address, nbytes), strides=tuple(strides)
        )
        target[...] = source[tuple(slice(size) for size in self.shape)]


def _plan_array(planner: Planner, value: AnyArray, _depth: int, _hashed: bool) -> None:
    if not planner.begin_leaf(value):
        return
    planner.count_transfer()
    planner.tensors += 1
    dtype = value.dtype
    flags = 0 if value.flags.writeable else wire.READ_ONLY
    token: Token = [wire.ARRAY, describe_dtype(dtype), list(value.shape), None, None, 0, flags]
    planner.tokens.append(token)
    if value.nbytes:
        strides = list(value.strides)
        token[wire.AT_STRIDES] = strides
        planner.add_region(
            _ArrayRegion(
                value,
                token,
                address=value.__array_interface__["data"][0],
                shape=value.shape,
                strides=strides,
                itemsize=dtype.itemsize,
            )
        )
    planner.end(value)


def _plan_scalar(planner: Planner, value: Any, _depth: int, _hashed: bool) -> None:
    kind = type(cast("object", value))
    dtype = value.dtype
    if dtype.type is not kind:
        raise Refusal(
            f"{kind.__module__}.{kind.__qualname__} is a subclass of a numpy scalar; "
            f"pass .item(), or register a codec for it (legion_shm.register_codec)"
        )
    planner.tokens.append([wire.SCALAR, describe_dtype(dtype), value.tobytes()])


def _plan_str(planner: Planner, value: Any, _depth: int, _hashed: bool) -> None:
    # Neither through its dtype nor by str(value): both drop trailing NULs.
    planner.tokens.append([wire.NUMPY_STR, str.__str__(value)])


def _plan_bytes(planner: Planner, value: Any, _depth: int, _hashed: bool) -> None:
    planner.tokens.append([wire.NUMPY_BYTES, bytes(value)])


def share_bytes(one: Region, other: Region) -> bool:
    """Whether two regions have a byte in common; True also where finding out would take too long."""
    try:
        return bool(_shares_memory(_shadow(one), _shadow(other), max_work=_SHARE_WORK))
    except np.exceptions.TooHardError:
        return True


class _Layout:
    """A region as numpy's array interface describes it. numpy reads no byte of it here."""

    def __init__(self, region: Region) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (region.address, False),
            "shape": tuple(region.shape),
            "strides": tuple(region.strides),
            "typestr": f"|V{region.itemsize}",
        }


def _shadow(region: Region) -> AnyArray:
    return np.asarray(cast("npt.ArrayLike", _Layout(region)))


def _read_array(reader: Reader, token: Token, _depth: int, _hashed: bool) -> Any:
    description, shape, strides, buffer, offset, flags = fields(token, 6)
    reader.count_transfer()
    dtype = rebuild_dtype(description)
    if type(flags) is not int or flags & ~wire.READ_ONLY:
        raise ProtocolError(f"an array with flags {flags!r:.40}")
    if not are_sizes(shape):
        raise ProtocolError("an array without a shape")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > wire.SIZE_MAX:
        raise ProtocolError(f"an array of {nbytes} bytes")
    steps: tuple[int, ...] | None = None
    if nbytes:
        if not is_list_of(int, strides) or len(strides) != len(shape):
            raise ProtocolError("an array whose strides don't fit its shape")
        steps = tuple(strides)
        low, high = 0, dtype.itemsize
        for size, step in zip(shape, steps, strict=True):
            if step > 0:
                high += (size - 1) * step
            else:
                low += (size - 1) * step
        memory, start = reader.window(buffer, offset, low, high)
    elif strides is not None or buffer is not None or offset != 0:
        raise ProtocolError("an empty array with memory")
    else:
        memory, start = bytearray(1), 0
    try:
        value: AnyArray = np.ndarray(tuple(shape), dtype, buffer=memory, offset=start, strides=steps)
        if flags & wire.READ_ONLY:
            value.flags.writeable = False
    except Exception as error:  # numpy judges what it is given with errors of several classes
        raise ProtocolError(f"not an array: {error!r}") from error
    return reader.finish(value)


def _read_scalar(_reader: Reader, token: Token, _depth: int, _hashed: bool) -> Any:
    description, payload = fields(token, 2)
    dtype = rebuild_dtype(description)
    if type(payload) is not bytes or len(payload) != dtype.itemsize or dtype.type in (np.str_, np.bytes_):
        raise ProtocolError(f"not the bytes of a {dtype} scalar")
    value = np.ndarray((), dtype, buffer=bytearray(payload or b"\0"))[()]
    if type(value) is not dtype.type:
        raise ProtocolError(f"{dtype} has no scalars")
    return value


def _read_text(_reader: Reader, token: Token, _depth: int, _hashed: bool) -> Any:
    (text,) = fields(token, 1)
    if token[0] == wire.NUMPY_STR and type(text) is str:
        return np.str_(text)
    if token[0] == wire.NUMPY_BYTES and type(text) is bytes:
        return np.bytes_(text)
    raise ProtocolError("a numpy text without its characters")


_READERS: dict[int, ReadHandler] = {
    wire.ARRAY: _read_array,
    wire.SCALAR: _read_scalar,
    wire.NUMPY_STR: _read_text,
    wire.NUMPY_BYTES: _read_text,
}
