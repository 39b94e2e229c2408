"""Values between nodes: whatever a node writes into, in whatever way, nobody else sees it.

Owns what a node is lent and what is taken from it. It runs no node and keeps nothing between nodes.

Writes can't be seen in time: numpy and C move no version counter, and a class may begin to write at any run.
So, each time, nothing that somebody else can see is writable for a node:

    kept values ── Loan ──▶ the node's own ──▶ node ──▶ what it returned ── Loan.settle ──▶ kept values

A tensor is lent as it is where nobody else holds it (`graph_holders`), as a copy-on-write view of the same
pages where it lies in shared memory, and as a copy otherwise. What comes back is the original where it was
passed on unwritten, is taken as it is where the node has let go of it, and is copied where it is still held.
Containers are always made anew (`graph_slots`). What lies inside of an object of another class is shared as
that object is.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol, cast

from legion_shm.supervisor.graph_arrays import duplicate_array, is_array, same_array
from legion_shm.supervisor.graph_holders import alone, array_alone, storage_key
from legion_shm.supervisor.graph_slots import Slot, Slots
from legion_shm.transport.dirty import may_be_written

__all__ = ["VIEW_MIN_BYTES", "Loan", "PrivateViews", "Watch", "detached", "private_copy"]

VIEW_MIN_BYTES = 128 * 1024
"""Below this a copy takes less time than to ask who else holds a tensor, and to map it."""

_ALIGN = 64
"""What torch aligns its memory to; dividable by the size of every item."""


@functools.cache
def _memcmp() -> Any:
    compare = (ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)).memcmp
    compare.argtypes, compare.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return compare


class PrivateViews(Protocol):
    """Where copy-on-write views of this process's shared memory come from."""

    def __call__(self, address: int, nbytes: int, keep: object) -> Any:
        """A ctypes array over pages of its own that hold these bytes; None where they can't be had.

        It keeps ``keep`` alive, whose memory must not be written while the array lives.
        """
        ...


class Loan:
    """What one run of a node is lent.

    ``held`` has the values by input name, and is emptied: with ``move`` a tensor that is in nobody else's
    hands goes to the node as it is.
    """

    def __init__(self, held: dict[str, Any], views: PrivateViews | None = None, *, move: bool = True) -> None:
        self._lent: dict[int, _Lent] = {}
        self._pairs: dict[int, tuple[Any, Any]] = {}
        slots = Slots()
        values = slots.taken(held)
        held.clear()
        large = [slot for slot in slots.tensors if _nbytes(slot.value) >= VIEW_MIN_BYTES] if move else []
        moved = alone(large) if large else set[Slot]()
        self._moved = {storage_key(slot.value) for slot in moved}
        here, elsewhere = _by_place(slot for slot in slots.tensors if slot not in moved)
        for lent in _copied(here, views):
            self._lent[lent.key] = lent
        for slot in (*elsewhere, *slots.others):
            original, slot.value = slot.value, duplicate(slot.value)
            self._pairs[id(slot.value)] = (original, slot.value)
        self.values: dict[str, Any] = slots.filled(values)

    def settle(self, returned: list[Any]) -> list[Any]:
        """What is kept of what the node returned. Empties ``returned``: only the node can hold it then."""
        self.values = {}
        slots = Slots()
        values = slots.taken(returned)
        returned.clear()
        mine = [slot for slot in slots.tensors if not self._restored(slot)]
        others = [slot for slot in slots.others if not self._returned(slot)]
        known = self._moved.union(self._lent)
        self._lent, self._pairs = {}, {}
        free = alone(mine, known) if mine else ()
        here, elsewhere = _by_place(slot for slot in mine if slot not in free)
        for _ in _copied(here, None):
            pass
        for slot in (*elsewhere, *(slot for slot in others if not array_alone(slot))):
            slot.value = duplicate(slot.value)
        return cast("list[Any]", slots.filled(values))

    def _restored(self, slot: Slot) -> bool:
        """Put the original back, where a slot has memory that was lent and that the node has not written."""
        lent = self._lent.get(storage_key(slot.value))
        if lent is not None:
            original = lent.original_of(slot.value)
            if original is not None:
                slot.value = original
                return True
            return False
        return self._returned(slot)

    def _returned(self, slot: Slot) -> bool:
        pair = self._pairs.get(id(slot.value))
        if pair is None or not _same(*pair):
            return False
        slot.value = pair[0]
        return True


class _Lent:
    """Memory that a node has for its own: ``own``, which held the bytes of ``source`` from ``low`` on."""

    def __init__(self, source: Any, low: int, own: Any, *, viewed: bool) -> None:
        self._source, self._low, self.own, self._viewed = source, low, own, viewed
        self._nbytes = int(own.nbytes())
        self._originals: dict[int, tuple[Any, Any]] = {}
        self._written: bool | None = None

    @property
    def key(self) -> int:
        return int(self.own._cdata)

    def give(self, slot: Slot, given: Any) -> None:
        self._originals[id(given)] = (slot.value, given)
        slot.value = given

    def original_of(self, tensor: Any) -> Any:
        """The tensor over the source that this one, over ours, stands for; None where ours was written."""
        if self._written is None:
            self._written = self.own.nbytes() != self._nbytes or self._look()
        if self._written or self._low % tensor.element_size():
            return None
        offset = tensor.storage_offset() + self._low // tensor.element_size()
        original, given = self._originals.get(id(tensor), (None, None))
        if given is tensor and _layout(original) == (tensor.dtype, tensor.size(), tensor.stride(), offset):
            return original
        return _over(self._source, tensor.dtype, offset, tensor.size(), tensor.stride())

    def _look(self) -> bool:
        if self._viewed:
            return may_be_written(self.own.data_ptr(), self._nbytes)
        if self._source.nbytes() < self._low + self._nbytes:
            return True
        return bool(_memcmp()(self._source.data_ptr() + self._low, self.own.data_ptr(), self._nbytes))


def _layout(tensor: Any) -> tuple[object, ...]:
    return tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()


def _over(storage: Any, dtype: Any, offset: int, size: Any, stride: Any) -> Any:
    import torch

    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, size, stride)


def _copied(slots: Collection[Slot], views: PrivateViews | None) -> Iterator[_Lent]:
    """Give the slots, of this process's memory, memory of their own; what shared bytes shares them still."""
    groups: dict[int, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(storage_key(slot.value), []).append(slot)
    for group in groups.values():
        first = group[0].value
        small = len(group) == 1 and _nbytes(first) < VIEW_MIN_BYTES and first.is_contiguous()
        if small and (given := _cloned(first)) is not None:
            low = first.storage_offset() * first.element_size()
            lent = _Lent(first.untyped_storage(), low, given.untyped_storage(), viewed=False)
            lent.give(group[0], given)
            yield lent
            continue
        for low, high, members in _pieces(group):
            lent = _piece(first.untyped_storage(), low, high, views)
            for slot in members:
                tensor = slot.value
                offset = tensor.storage_offset() - low // tensor.element_size()
                lent.give(slot, _over(lent.own, tensor.dtype, offset, tensor.size(), tensor.stride()))
            yield lent


def _cloned(tensor: Any) -> Any:
    try:
        return tensor.clone()
    except RuntimeError as error:  # a dtype that torch can hold and not copy, such as int4
        if not isinstance(error, NotImplementedError) and "not implemented" not in str(
            error
        ):  # torch 2.4's words
            raise
        return None


def _pieces(group: list[Slot]) -> list[tuple[int, int, list[Slot]]]:
    """The byte ranges of one storage that tensors use, with those tensors; ranges that overlap are one."""
    pieces: list[tuple[int, int, list[Slot]]] = []
    for low, high, slot in sorted(((*_span(slot.value), slot) for slot in group), key=lambda span: span[:2]):
        if pieces and low < pieces[-1][1]:
            start, end, members = pieces.pop()
            pieces.append((start, max(end, high), [*members, slot]))
        else:
            pieces.append((low - low % _ALIGN, high, [slot]))
    return pieces


def _span(tensor: Any) -> tuple[int, int]:
    itemsize = tensor.element_size()
    low = tensor.storage_offset() * itemsize
    if not tensor.numel():
        return low, low
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return low, low + (last + 1) * itemsize


def _piece(source: Any, low: int, high: int, views: PrivateViews | None) -> _Lent:
    import torch

    nbytes = high - low
    if views is not None and nbytes >= VIEW_MIN_BYTES:
        array = views(source.data_ptr() + low, nbytes, source)
        if array is not None:
            own = torch.frombuffer(array, dtype=torch.uint8).untyped_storage()
            return _Lent(source, low, own, viewed=True)
    copied = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    copied.copy_(_over(source, torch.uint8, low, (nbytes,), (1,)))
    return _Lent(source, low, copied.untyped_storage(), viewed=False)


def _by_place(slots: Iterator[Slot]) -> tuple[list[Slot], list[Slot]]:
    """Those in this process's memory, and those on devices."""
    here: list[Slot] = []
    elsewhere: list[Slot] = []
    for slot in slots:
        (here if slot.value.device.type == "cpu" else elsewhere).append(slot)
    return here, elsewhere


def _nbytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def duplicate(value: Any) -> Any:
    """A copy of what can be written into: a tensor of any kind, an array, a picture, a bytearray."""
    import torch

    if not isinstance(value, torch.Tensor):
        return duplicate_array(value) if is_array(value) else copy.deepcopy(value)
    if value.requires_grad and not value.is_leaf:
        with torch.enable_grad():  # what trains goes on doing so
            return value.clone()
    if type(value) is not torch.Tensor:
        return copy.deepcopy(value)
    own: Any = value.detach().clone().requires_grad_(value.requires_grad)
    attributes: dict[str, Any] = private_copy(dict(vars(value)))
    own.__dict__.update(attributes)
    return own


def _same(one: Any, other: Any) -> bool:
    """Whether a copy is still the same to the last bit; False where that can't be told."""
    import torch

    try:
        if type(one) is bytearray:
            return bool(one == other)
        if not isinstance(one, torch.Tensor):
            return same_array(one, other)
        if (
            type(one) is not torch.Tensor
            or vars(one)
            or vars(other)
            or one.requires_grad
            or other.requires_grad
        ):
            return False
        return _same_tensor(one, other)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return False


_SPARSE_PARTS = {
    "torch.sparse_coo": ("_indices", "_values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}


def _same_tensor(one: Any, other: Any) -> bool:
    import torch

    if one.layout != other.layout or one.size() != other.size() or one.dtype != other.dtype:
        return False
    if one.layout is not torch.strided:
        parts = _SPARSE_PARTS[str(one.layout)]
        return all(_same_tensor(getattr(one, part)(), getattr(other, part)()) for part in parts)
    if one.stride() != other.stride() or one.is_conj() != other.is_conj() or one.is_neg() != other.is_neg():
        return False
    return torch.equal(_as_bits(one), _as_bits(other))


def _as_bits(tensor: Any) -> Any:
    """As whole numbers, for NaN is not equal to itself."""
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj().resolve_neg())
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.resolve_neg().view(sizes[tensor.element_size()])


def private_copy(value: Any) -> Any:
    """The same value, sharing nothing with it that can be written into; what was one object is one copy."""
    return Loan({"value": value}, move=False).values["value"]


def detached(value: Any) -> Any:
    """The value with its containers made anew, and copies of what its maker may still hold."""
    return Loan({}).settle([value])[0]


class Watch:
    """Remembers which state the tensors inside some values are in, as torch's version counters tell."""

    __slots__ = ("_seen",)

    def __init__(self, values: object) -> None:
        self._seen: list[tuple[Any, int]] = []
        for tensor in _tensors(values, 8):  # CONDITIONING is a list of pairs of tensor and dict
            version = _version(tensor)
            if version is not None:
                self._seen.append((tensor, version))

    def changed(self) -> bool:
        """Whether torch has written into any of them since."""
        return any(_version(tensor) != version for tensor, version in self._seen)


def _version(tensor: Any) -> int | None:
    try:
        return int(tensor._version)
    except RuntimeError:  # made in inference mode: it has no counter
        return None


_NO_TENSORS = frozenset((type(None), bool, int, float, str, bytes))


def _tensors(value: object, depth: int) -> Iterator[Any]:
    if type(value) in _NO_TENSORS:
        return
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in cast("Mapping[object, object]", value).values():
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for item in cast("list[object]", value):
            yield from _tensors(item, depth - 1)
