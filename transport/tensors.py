"""torch in the codec: tensors, sparse tensors, sizes, dtypes and devices, both ways.

Imports torch; the codec imports it when a value or a tree holds
something of torch's. Tensors arrive as zero-copy views: the buffer that `torch.frombuffer` holds ends
its lease when the last tensor, storage or numpy view of it is gone.

    host tensor    ── one copy (or none: by reference) ──▶ block ── view ──▶ tensor
    device tensor  ── one copy on the device ──▶ its block there ── one copy on the device ──▶ tensor
    device tensor  ── one copy to the host ──▶ block ── view ── one copy to the device ──▶ tensor (otherwise)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch

from legion_shm.errors import ProtocolError
from legion_shm.transport import codec_wire as wire
from legion_shm.transport.codec_layout import Region, dense_strides, host_memory
from legion_shm.transport.codec_plan import Handler, Planner
from legion_shm.transport.codec_read import Reader, ReadHandler, fields, length
from legion_shm.transport.codec_types import DeviceBytes
from legion_shm.transport.codec_wire import Refusal, Token, are_sizes, is_list_of
from legion_shm.transport.torch_devices import current_devices, stand_in

__all__ = ["plan_handler", "read_handler"]

_ALL_DTYPES: dict[str, torch.dtype] = {
    str(item).removeprefix("torch."): item for item in vars(torch).values() if isinstance(item, torch.dtype)
}
# Quantized dtypes need scales beside their bytes: torch.frombuffer with one ends the process.
_DTYPES = {name: dtype for name, dtype in _ALL_DTYPES.items() if not name.startswith("q")}
_DTYPE_NAMES = {dtype: name for name, dtype in _ALL_DTYPES.items()}
_ITEMSIZES = {name: int(dtype.itemsize) for name, dtype in _DTYPES.items()}

# Copies go by size, so that they work for dtypes that torch has no arithmetic for, and keep all NaNs.
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

_SPARSE: dict[Any, tuple[str, tuple[str, ...]]] = {
    torch.sparse_coo: ("coo", ("_indices", "_values")),
    torch.sparse_csr: ("csr", ("crow_indices", "col_indices", "values")),
    torch.sparse_csc: ("csc", ("ccol_indices", "row_indices", "values")),
    torch.sparse_bsr: ("bsr", ("crow_indices", "col_indices", "values")),
    torch.sparse_bsc: ("bsc", ("ccol_indices", "row_indices", "values")),
}
_SPARSE_LAYOUTS = {name: (layout, parts) for layout, (name, parts) in _SPARSE.items()}

_TENSOR_FLAGS = wire.REQUIRES_GRAD | wire.PARAMETER | wire.ATTRIBUTES | wire.SHARED
_SPARSE_FLAGS = wire.REQUIRES_GRAD | wire.PARAMETER | wire.ATTRIBUTES | wire.COALESCED


def plan_handler(kind: type) -> Handler | None:
    """How to plan a value of that class; None when it is not torch's, also for a subclass of Tensor."""
    return _PLANNERS.get(kind)


def read_handler(tag: int) -> ReadHandler | None:
    return _READERS.get(tag)


class _TensorRegion(Region):
    __slots__ = ()

    def packed_strides(self) -> list[int]:
        return dense_strides(self.shape, self.strides)

    def mark_shared(self) -> None:
        self.token[wire.AT_FLAGS] |= wire.SHARED

    def pack_into(self, address: int, nbytes: int, strides: Sequence[int]) -> None:
        self.pack_into_bytes(_host_bytes(address, nbytes), strides)

    def pack_into_bytes(self, target: Any, strides: Sequence[int]) -> None:
        source: Any = self.source.detach()
        for dim, size in enumerate(self.shape):
            source = source.narrow(dim, 0, size)
        if not (source.is_conj() or source.is_neg()):
            source = source.view(_SAME_SIZE[self.itemsize])
        with torch.no_grad():
            target.view(source.dtype).as_strided(tuple(self.shape), tuple(strides)).copy_(source)

    def copy_span(self, address: int, low: int, nbytes: int) -> None:
        if self.space is None:
            super().copy_span(address, low, nbytes)
        else:
            self.copy_span_into(_host_bytes(address, nbytes), low)

    def copy_span_into(self, target: Any, low: int) -> None:
        storage = self.source.untyped_storage()
        span = torch.empty(0, dtype=torch.uint8, device=self.source.device)
        span.set_(storage, low - storage.data_ptr(), (target.numel(),), (1,))
        target.copy_(span)


def _host_bytes(address: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(host_memory(address, nbytes), dtype=torch.uint8)


def _plan_tensor(planner: Planner, value: torch.Tensor, depth: int, _hashed: bool) -> None:
    if not planner.begin_leaf(value):
        return
    planner.count_transfer()
    planner.tensors += 1
    flags = _flags(value)
    try:
        if value.layout is torch.strided:
            _plan_strided(planner, value, flags)
        else:
            _plan_sparse(planner, value, flags, depth)
    except RuntimeError as error:  # what torch says of wrapped, traced and other unusual tensors
        raise Refusal(f"this tensor's memory can't be reached: {error}") from error
    if flags & wire.ATTRIBUTES:
        planner.child(dict(vars(value)), depth, ".__dict__")
    planner.end(value)


def _flags(value: torch.Tensor) -> int:
    flags = 0
    if value.requires_grad:
        if not value.is_leaf:
            raise Refusal("this tensor is part of a graph of gradients, which can't be sent; detach() it")
        if value.grad is not None:
            raise Refusal(
                "this tensor has a .grad, which would be lost; detach() it, or send .grad beside it"
            )
        flags = wire.REQUIRES_GRAD
    if cast(Any, value)._backward_hooks:
        raise Refusal("this tensor has hooks, which can't be sent; detach() it")
    if type(value) is torch.nn.Parameter:
        flags |= wire.PARAMETER
    if vars(value):
        flags |= wire.ATTRIBUTES
    return flags


def _plan_strided(planner: Planner, value: torch.Tensor, flags: int) -> None:
    if value.is_quantized:
        raise Refusal("this tensor is quantized; send .dequantize(), or .int_repr() with its scales")
    if value.is_nested:
        raise Refusal("this tensor is nested; send the list of its parts: list(tensor.unbind())")
    if value.is_meta:
        raise Refusal("this tensor is on the meta device and has no data; send its shape and dtype")
    resolver = planner.devices.resolver or stand_in()
    device = None
    if resolver is not None or not value.is_cpu:
        try:
            device = (resolver or current_devices()).identify(value.device)
        except LookupError as error:
            raise Refusal(str(error.args[0])) from error
    shape = list(value.shape)
    strides = list(value.stride())
    if len(shape) > wire.MAX_DIMS:
        raise Refusal(f"this tensor has more than {wire.MAX_DIMS} dimensions; reshape() it")
    name = _DTYPE_NAMES[value.dtype]
    token: Token = [wire.TENSOR, name, shape, strides, None, 0, flags]
    if device is not None:
        token.extend(device)
    planner.tokens.append(token)
    if not value.numel():
        if _extent(shape) * _ITEMSIZES[name] > wire.SIZE_MAX:
            raise Refusal(f"this tensor is empty, but its shape {tuple(shape)} has sizes beyond all memory")
        return
    itemsize = _ITEMSIZES[name]
    address = value.data_ptr()
    storage = value.untyped_storage()
    start = storage.data_ptr()
    resolved = value.is_conj() or value.is_neg()
    region = _TensorRegion(
        value,
        token,
        address=address,
        shape=shape,
        strides=[stride * itemsize for stride in strides],
        itemsize=itemsize,
        # A device's addresses mean nothing outside of one of its storages.
        space=None if device is None else (device, start),
        isolated=resolved,
        packed=resolved,
    )
    if not address or region.low < start or region.high > start + storage.nbytes():
        raise Refusal("this tensor has no memory, or its storage has been freed or resized; clone() it")
    planner.add_region(region)


def _extent(shape: list[int]) -> int:
    """The product of the sizes that are not 0: torch multiplies them, in 63 bits, also for empty tensors."""
    return math.prod(size for size in shape if size)


def _plan_sparse(planner: Planner, value: torch.Tensor, flags: int, depth: int) -> None:
    layout = _SPARSE.get(value.layout)
    if layout is None:
        raise Refusal(f"tensors of layout {value.layout} can't be sent; pass .to_dense()")
    name, parts = layout
    if name == "coo" and value.is_coalesced():
        flags |= wire.COALESCED
    planner.check_depth(depth)
    planner.tokens.append([wire.SPARSE, name, list(value.shape), flags])
    value = value.detach()
    planner.hold(value)
    for part in parts:
        component = getattr(value, part)()
        planner.hold(component)
        planner.child(component, depth, f".{part.lstrip('_')}()")


def _plan_size(planner: Planner, value: torch.Size, _depth: int, _hashed: bool) -> None:
    items = tuple(value)
    if any(type(item) is not int for item in items):
        raise Refusal("this torch.Size is symbolic; send the sizes as ints")
    planner.tokens.append([wire.SIZE, len(items)])
    planner.tokens.extend(items)


def _plan_dtype(planner: Planner, value: torch.dtype, _depth: int, _hashed: bool) -> None:
    planner.tokens.append([wire.DTYPE, _DTYPE_NAMES[value]])


def _plan_device(planner: Planner, value: torch.device, _depth: int, _hashed: bool) -> None:
    planner.tokens.append([wire.DEVICE, str(value)])


_PLANNERS: dict[type, Handler] = {
    torch.Tensor: _plan_tensor,
    torch.nn.Parameter: _plan_tensor,
    torch.Size: _plan_size,
    torch.dtype: _plan_dtype,
    torch.device: _plan_device,
}


def _guard() -> AbstractContextManager[Any]:
    # An inference tensor can't be written to outside of inference mode: what arrives is an ordinary one.
    return torch.inference_mode(mode=False) if torch.is_inference_mode_enabled() else nullcontext()


def _build(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What torch makes of checked but foreign numbers; it judges them with errors of many classes."""
    try:
        with _guard():
            try:
                return make()
            except Warning:  # one that torch gives once, and that this program's filters make an error of
                return make()
    except Exception as error:
        raise ProtocolError(f"not a tensor: {error}") from error


def _read_tensor(reader: Reader, token: Token, depth: int, _hashed: bool) -> Any:
    device_id: tuple[Any, Any] | None = None
    if len(token) == 9:
        device_id = token[7], token[8]
        token = token[:7]
    name, shape, strides, buffer, offset, flags = fields(token, 6)
    reader.count_transfer()
    itemsize = _ITEMSIZES.get(name) if type(name) is str else None
    if itemsize is None:
        raise ProtocolError(f"no dtype {name!r:.40} in this torch")
    if type(flags) is not int or flags & ~_TENSOR_FLAGS:
        raise ProtocolError(f"a tensor with flags {flags!r:.40}")
    if not are_sizes(shape) or not are_sizes(strides) or len(shape) != len(strides):
        raise ProtocolError("a tensor whose strides don't fit its shape")
    numel = 1
    last = 0
    for size, stride in zip(shape, strides, strict=True):
        numel *= size
        last += (size - 1) * stride
    if (numel or _extent(shape)) * itemsize > wire.SIZE_MAX:
        raise ProtocolError(f"a tensor of {numel} elements")
    device = None if device_id is None else _locate(reader, *device_id)
    dtype = _DTYPES[name]
    if not numel:
        if buffer is not None or offset != 0:
            raise ProtocolError("an empty tensor with memory")
        value = _build(lambda: torch.empty_strided(shape, strides, dtype=dtype, device=device or "cpu"))
    else:
        there = None if device is None else cast("tuple[str, str]", device_id)
        memory, start = reader.window(buffer, offset, 0, (last + 1) * itemsize, there)
        if (flags & wire.SHARED or device is not None) and offset % itemsize == 0:
            storage = _storage(reader, buffer, device, there)
            value = _build(lambda: _on_storage(storage, dtype, offset // itemsize, shape, strides))
        else:
            value = _build(lambda: _on_buffer(memory, dtype, start, last + 1, shape, strides, device))
    return _complete(reader, value, flags, depth)


def _on_buffer(
    memory: Any,
    dtype: torch.dtype,
    start: int,
    count: int,
    shape: list[int],
    strides: list[int],
    device: torch.device | None,
) -> torch.Tensor:
    if isinstance(memory, DeviceBytes):
        value = memory.tensor[start : start + count * dtype.itemsize].clone().view(dtype)
    else:
        value = torch.frombuffer(memory, dtype=dtype, count=count, offset=start)
        if device is not None:
            value = value.to(device)
    return cast("torch.Tensor", cast(Any, value).as_strided_(shape, strides))


def _on_storage(
    storage: Any, dtype: torch.dtype, start: int, shape: list[int], strides: list[int]
) -> torch.Tensor:
    value = torch.empty(0, dtype=dtype, device=storage.device)
    return value.set_(storage, start, tuple(shape), tuple(strides))


def _storage(reader: Reader, index: int, device: torch.device | None, there: tuple[str, str] | None) -> Any:
    """The storage that all tensors of one buffer share, on the device they belong to.

    What lies in the device's memory already is cloned: the block is its sender's again as soon as it was
    read.
    """
    storage = reader.cache.get((index, device))
    if storage is None:
        memory, start, nbytes = reader.buffer(index, there)

        def make() -> torch.Tensor:
            if isinstance(memory, DeviceBytes):
                return cast("torch.Tensor", memory.tensor[start : start + nbytes].clone())
            base = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start)
            return base if device is None else base.to(device)

        storage = reader.cache[index, device] = _build(make).untyped_storage()
    return storage


def _locate(reader: Reader, kind: Any, uuid: Any) -> torch.device | None:
    """The device of this process, or None for host memory where the policy allows that."""
    if type(kind) is not str or type(uuid) is not str:
        raise ProtocolError("a tensor's device is not a type and an id")
    key = ("device", kind, uuid)
    if key not in reader.cache:
        device = (reader.devices.resolver or current_devices()).locate(kind, uuid)
        if device is None and not reader.devices.allow_cpu:
            raise Refusal(
                f"this tensor is on {kind:.20} device {uuid:.60}, which this process hasn't; "
                f"give the worker that device, or pass allow_cpu=True"
            )
        reader.cache[key] = device
    return cast("torch.device | None", reader.cache[key])


def _complete(reader: Reader, value: torch.Tensor, flags: int, depth: int) -> torch.Tensor:
    requires_grad = bool(flags & wire.REQUIRES_GRAD)
    if flags & wire.PARAMETER:
        tensor = value
        value = _build(lambda: torch.nn.Parameter(tensor, requires_grad=requires_grad))
    elif requires_grad:
        value = _build(value.requires_grad_)
    if flags & wire.ATTRIBUTES:
        attributes = reader.child(depth, ".__dict__")
        if type(attributes) is not dict or not is_list_of(
            str, list(cast("dict[object, object]", attributes))
        ):
            raise ProtocolError("a tensor's attributes are not named")
        vars(value).update(cast("dict[str, object]", attributes))
    reader.finish(value)
    return value


def _read_sparse(reader: Reader, token: Token, depth: int, _hashed: bool) -> Any:
    reader.enter(depth)
    name, shape, flags = fields(token, 3)
    reader.count_transfer()
    known = _SPARSE_LAYOUTS.get(name) if type(name) is str else None
    if known is None or type(flags) is not int or flags & ~_SPARSE_FLAGS or not are_sizes(shape):
        raise ProtocolError("not a sparse tensor")
    layout, parts = known
    components = [reader.child(depth, f".{part.lstrip('_')}()") for part in parts]
    if any(type(part) is not torch.Tensor or part.layout is not torch.strided for part in components):
        raise ProtocolError("a sparse tensor of something else than tensors")
    value = _build(lambda: _sparse(layout, shape, components, bool(flags & wire.COALESCED)))
    return _complete(reader, value, flags, depth)


def _sparse(layout: Any, shape: list[int], components: list[torch.Tensor], coalesced: bool) -> torch.Tensor:
    make: Any = torch  # whose stubs of these are unknown in part
    if layout is torch.sparse_coo:
        value = make.sparse_coo_tensor(*components, shape, check_invariants=True, is_coalesced=coalesced)
    else:
        value = make.sparse_compressed_tensor(*components, shape, layout=layout, check_invariants=True)
    return cast("torch.Tensor", value)


def _read_size(reader: Reader, token: Token, _depth: int, _hashed: bool) -> Any:
    items = [reader.integer() for _ in range(length(token))]
    try:
        return torch.Size(items)
    except Exception as error:
        raise ProtocolError(f"not a torch.Size: {error}") from error


def _read_dtype(_reader: Reader, token: Token, _depth: int, _hashed: bool) -> Any:
    (name,) = fields(token, 1)
    if type(name) is not str or name not in _ALL_DTYPES:
        raise ProtocolError(f"no dtype {name!r:.40} in this torch")
    return _ALL_DTYPES[name]


def _read_device(_reader: Reader, token: Token, _depth: int, _hashed: bool) -> Any:
    (text,) = fields(token, 1)
    if type(text) is not str:
        raise ProtocolError("a torch.device without its text")
    try:
        return torch.device(text)
    except Exception as error:
        raise ProtocolError(f"not a torch.device: {text!r:.40}") from error


_READERS: dict[int, ReadHandler] = {
    wire.TENSOR: _read_tensor,
    wire.SPARSE: _read_sparse,
    wire.SIZE: _read_size,
    wire.DTYPE: _read_dtype,
    wire.DEVICE: _read_device,
}
