"""What the codec's tests compare with and generate: exact equality, sharing, and values of every kind."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from legion_shm.transport.codec import EncodedValue, decode, encode
from tests.transport.fake_store import FakeStore

__all__ = [
    "TENSOR_DTYPES",
    "Sample",
    "assert_same",
    "assert_same_sharing",
    "round_trip",
    "round_trip_both",
    "touched",
    "values",
]

TENSOR_DTYPES = sorted(
    {d for d in vars(torch).values() if isinstance(d, torch.dtype) and not str(d).startswith("torch.q")},
    key=str,
)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def round_trip(value: object, store: FakeStore | None = None, **options: Any) -> Any:
    return round_trip_both(value, store, **options)[0]


def round_trip_both(
    value: object, store: FakeStore | None = None, **options: Any
) -> tuple[Any, EncodedValue]:
    store = store or FakeStore()
    encoded = encode(value, store, **options)
    return decode(encoded.tree, encoded.blocks, store), encoded


def bits(tensor: torch.Tensor) -> bytes:
    """The elements' bytes, in order: NaNs and signs of zero count."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.numel() == 0:
        return b""
    elements = plain.view(_BITS[plain.dtype.itemsize]).reshape(-1)
    dense = torch.empty(elements.shape, dtype=elements.dtype, device="cpu").copy_(elements)
    return dense.view(torch.uint8).numpy().tobytes()


def assert_same(sent: Any, got: Any) -> None:
    """Equal in class, value, dtype, shape and everything else that the codec keeps, all the way down."""
    assert type(got) is type(sent)
    if isinstance(sent, torch.Tensor):
        assert (got.dtype, got.shape, got.layout) == (sent.dtype, sent.shape, sent.layout)
        assert got.requires_grad == sent.requires_grad
        assert not got.is_inference()
        if sent.layout is torch.strided:
            assert bits(got) == bits(sent)
        elif sent.layout is torch.sparse_coo:
            assert got.is_coalesced() == sent.is_coalesced()
            assert_same(sent.detach()._indices(), got.detach()._indices())
            assert_same(sent.detach()._values(), got.detach()._values())
        else:
            assert torch.equal(got.detach().to_dense(), sent.detach().to_dense())
        assert_same(dict(vars(sent)), dict(vars(got)))
    elif isinstance(sent, np.ndarray):
        assert (got.dtype, got.dtype.type, got.shape) == (sent.dtype, sent.dtype.type, sent.shape)
        assert got.flags.writeable == sent.flags.writeable
        assert_same_elements(sent, got)
    elif isinstance(sent, np.generic):
        assert got.dtype == sent.dtype
        assert got.tobytes() == sent.tobytes()
        if isinstance(sent, (str, bytes)):
            assert list(got) == list(sent)
    elif isinstance(sent, float):
        assert math.copysign(1.0, got) == math.copysign(1.0, sent)
        assert got == sent or (math.isnan(got) and math.isnan(sent))
    elif isinstance(sent, complex):
        assert_same(sent.real, got.real)
        assert_same(sent.imag, got.imag)
    elif isinstance(sent, (dict, OrderedDict)):
        assert len(got) == len(sent)
        for (sent_key, sent_item), (got_key, got_item) in zip(sent.items(), got.items(), strict=True):
            assert_same(sent_key, got_key)
            assert_same(sent_item, got_item)
    elif isinstance(sent, (list, tuple)):
        assert len(got) == len(sent)
        for one, other in zip(sent, got, strict=True):
            assert_same(one, other)
    elif isinstance(sent, (set, frozenset)):
        assert got == sent
        assert canonical(got) == canonical(sent)
    elif isinstance(sent, slice):
        assert_same([sent.start, sent.stop, sent.step], [got.start, got.stop, got.step])
    else:
        assert got == sent


def assert_same_elements(sent: Any, got: Any) -> None:
    """Of two arrays; the padding between a structure's fields holds nothing."""
    if sent.dtype.names is None:
        assert got.tobytes() == sent.tobytes()
    else:
        for name in sent.dtype.names:
            assert_same_elements(sent[name], got[name])


def canonical(value: Any) -> str:
    """A hashable value's text with the class of each part, whatever order its sets iterate in."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}{sorted(canonical(item) for item in value)}"
    if type(value) is tuple:
        return f"tuple{[canonical(item) for item in value]}"
    return f"{type(value).__name__} {value!r}"


def touched(memory: Any) -> list[int]:
    """The address of each byte of each element of a tensor or array, in order."""
    if isinstance(memory, torch.Tensor):
        if memory.layout is not torch.strided or memory.numel() == 0:
            return []
        address, itemsize, shape = memory.data_ptr(), memory.dtype.itemsize, tuple(memory.shape)
        strides: Sequence[int] = [step * itemsize for step in memory.stride()]
    else:
        if memory.nbytes == 0:
            return []
        address, itemsize, shape = memory.ctypes.data, memory.itemsize, memory.shape
        strides = memory.strides
    starts = [
        address + sum(i * step for i, step in zip(index, strides, strict=True))
        for index in np.ndindex(*shape)
    ]
    return [start + i for start in starts for i in range(itemsize)]


def leaves(value: Any) -> list[Any]:
    """All tensors and arrays of a value, in the order of its tree, each as often as it is there."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [value]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return []


def assert_same_sharing(sent: Any, got: Any) -> None:
    """Bytes that are one on this side are one on the other, and no others; so are objects."""
    sent_leaves, got_leaves = leaves(sent), leaves(got)
    assert pattern([id(leaf) for leaf in sent_leaves]) == pattern([id(leaf) for leaf in got_leaves])
    ours = [touched(leaf) for leaf in sent_leaves if not is_resolved(leaf)]
    theirs = [
        touched(leaf) for leaf, other in zip(got_leaves, sent_leaves, strict=True) if not is_resolved(other)
    ]
    assert pattern(list(chain(*ours))) == pattern(list(chain(*theirs)))


def is_resolved(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_conj() or leaf.is_neg())


def pattern(items: list[int]) -> list[int]:
    """Each item replaced by where it first occurs."""
    first: dict[int, int] = {}
    return [first.setdefault(item, i) for i, item in enumerate(items)]


@dataclass(frozen=True)
class Sample:
    """A generated value, printable whatever its dtypes."""

    value: Any

    def __repr__(self) -> str:
        return described(self.value)


def described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"<{value.dtype} {tuple(value.shape)} {value.stride()} at {value.data_ptr():#x}>"
    if isinstance(value, np.ndarray):
        return f"<{value.dtype} {value.shape} {value.strides} at {value.ctypes.data:#x}>"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}[{', '.join(map(described, value))}]"
    if isinstance(value, dict):
        return f"{type(value).__name__}[{', '.join(f'{k!r}: {described(v)}' for k, v in value.items())}]"
    return repr(value)


_TEXTS = st.text(st.characters(exclude_categories=()), max_size=30)
_KEYS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | _TEXTS
    | st.binary(max_size=90)
    | st.sampled_from([torch.float16, torch.device("cpu"), torch.Size([2, 3]), np.int8(3), range(3)]),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
_SCALARS = (
    _KEYS
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.complex_numbers()
    | st.binary(max_size=200).map(bytearray)
    | st.text(max_size=100)
    | st.builds(slice, st.none() | st.integers(), st.integers(), st.none() | _TEXTS)
    | st.builds(range, st.integers(), st.integers(), st.integers(1, 9))
    | st.sampled_from(
        [np.float32(1.5), np.datetime64("NaT", "s"), np.str_("a\0"), np.bytes_(b"a\0"), np.bool_(True)]
    )
)

_NUMPY_DTYPES = st.sampled_from(
    [
        "?",
        "<i1",
        ">i2",
        "<u8",
        "<f2",
        ">f8",
        "<c16",
        "g",
        "S3",
        "<U2",
        ">U2",
        "M8[25s]",
        "<m8",
        "V5",
        "q",
        "S0",
        [("a", "<i4"), ("b", ">f8", (2, 2))],
        [("x", [("y", "M8[ns]"), ("z", "S0")]), ("w", "?")],
        {"names": ["late", "early"], "formats": ["<i2", "u1"], "offsets": [4, 1], "itemsize": 9},
    ]
)


def _tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(
        0, 256, (max(count, 1),), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    if dtype is torch.bool:
        raw = raw % 2
    return raw[:count].clone().view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def _array(dtype: Any, shape: list[int], seed: int) -> Any:
    dtype = np.dtype(dtype)
    raw = np.random.default_rng(seed).integers(
        0, 128, max(1, math.prod(shape) * dtype.itemsize), dtype=np.uint8
    )
    if dtype.char in "?U" or dtype.names:
        raw[:] = 0
    return np.ndarray(tuple(shape), dtype, buffer=raw)


@dataclass(frozen=True)
class _Slot:
    number: int


def _filled(value: Any, pieces: list[Any]) -> Any:
    if isinstance(value, _Slot):
        return pieces[value.number]
    if type(value) in (list, tuple):
        return type(value)(_filled(item, pieces) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _filled(item, pieces)) for key, item in value.items())
    return value


_SHAPES = st.lists(st.integers(0, 4), max_size=3) | st.lists(st.integers(1, 7), min_size=1, max_size=3)
_STEPS = ["row", "column", "stride", "narrow", "transpose", "expand", "conj", "neg", "unsqueeze"]


@st.composite
def _views(draw: st.DrawFn, bases: list[Any], number: int) -> Any:
    """A view of a tensor or array: slices, transposes, expansions, conjugates, one on top of another."""
    view = bases[number]
    for step in draw(st.lists(st.sampled_from(_STEPS), max_size=3)):
        ndim = view.ndim
        if step == "row" and ndim and view.shape[0]:
            # Selecting with an index that is a slice keeps an array an array.
            view = view[draw(st.integers(0, view.shape[0] - 1)), ...]
        elif step == "column" and ndim and view.shape[-1]:
            view = view[..., draw(st.integers(0, view.shape[-1] - 1))] if ndim > 1 else view
        elif step == "stride" and ndim:
            view = view[:: draw(st.integers(1, 4))]
        elif step == "narrow" and ndim:
            view = view[..., draw(st.integers(0, 2)) :]
        elif step == "transpose" and ndim > 1:
            view = view.swapaxes(0, -1)
        elif step == "unsqueeze" and ndim < 4:
            view = view[None]
        elif step == "expand" and ndim and view.shape[0] == 1:
            shape = (3, *view.shape[1:])
            view = view.expand(shape) if isinstance(view, torch.Tensor) else np.broadcast_to(view, shape)
        elif step == "conj" and isinstance(view, torch.Tensor) and view.is_complex():
            view = view.conj()
        elif step == "neg":
            if isinstance(view, np.ndarray):
                view = view[::-1] if ndim else view
            elif view.dtype in (torch.complex64, torch.complex128):
                view = view.conj().imag
    return view


@st.composite
def values(draw: st.DrawFn) -> Sample:
    """Any nesting of everything, over a few pieces of memory that its tensors and arrays share."""
    seeds = st.integers(0, 2**16)
    bases: list[Any] = [
        draw(st.builds(_tensor, st.sampled_from(TENSOR_DTYPES), _SHAPES, seeds))
        for _ in range(draw(st.integers(1, 3)))
    ]
    bases += [draw(st.builds(_array, _NUMPY_DTYPES, _SHAPES, seeds)) for _ in range(draw(st.integers(0, 2)))]
    bases += [
        base.numpy() for base in bases if isinstance(base, torch.Tensor) and base.dtype is torch.float32
    ]
    # By number: hypothesis prints what it draws from, and torch can't print each dtype.
    numbers = st.integers(0, len(bases) - 1)
    pieces = [draw(_views(bases, draw(numbers))) for _ in range(draw(st.integers(0, 6)))]
    if draw(st.booleans()):
        pieces.append(torch.nn.Parameter(torch.ones(draw(st.integers(0, 20)))))
    if draw(st.booleans()):
        pieces.append(torch.eye(draw(st.integers(1, 5))).to_sparse())
    leaf = _SCALARS if not pieces else _SCALARS | st.builds(_Slot, st.integers(0, len(pieces) - 1))
    value = draw(
        st.recursive(
            leaf,
            lambda inner: (
                st.lists(inner, max_size=5)
                | st.lists(inner, max_size=4).map(tuple)
                | st.dictionaries(_KEYS, inner, max_size=4)
                | st.dictionaries(_KEYS, inner, max_size=3).map(OrderedDict)
                | st.sets(_KEYS, max_size=4)
            ),
            max_leaves=12,
        )
    )
    return Sample(_filled(value, pieces))
