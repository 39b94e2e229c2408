"""Whatever bytes a decoder is given, it raises ProtocolError (or its kinds) or returns a value. Nothing else.

The one exception is UnsupportedValue for a device or a class that is not here.
"""

from __future__ import annotations

import ctypes
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from legion_shm.errors import InvalidHandle, ProtocolError, UnsupportedValue
from legion_shm.transport import codec_wire as wire
from legion_shm.transport.codec import DecodeLimits, decode, encode
from legion_shm.transport.codec_dtypes import rebuild_dtype
from legion_shm.transport.handles import BlockHandle
from tests.transport.codec_values import Sample, values
from tests.transport.fake_store import FakeStore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

BLOCK_NBYTES = 256
GUARD = b"\xa5" * 64

quietly = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def tree(*tokens: object, buffers: tuple[object, ...] = ()) -> bytes:
    packed = msgpack.packb([wire.VERSION, len(buffers), *buffers, *tokens], use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


def one_block() -> tuple[FakeStore, tuple[BlockHandle, ...]]:
    store = FakeStore()
    block = store.reserve(BLOCK_NBYTES)
    ctypes.memset(block.address, 1, BLOCK_NBYTES)
    return store, (block.handle,)


def decode_garbage(data: bytes, *, with_block: bool) -> Any:
    """Decode, then read all of what came out: a value that got through must be safe to use."""
    store, blocks = one_block() if with_block else (FakeStore(), ())
    limits = DecodeLimits(max_items=10_000, max_tensors=100, max_inline_bytes=10_000)
    try:
        value = decode(data, blocks, store, limits=limits)
    except ProtocolError:
        return None
    except UnsupportedValue as error:
        if "which this process hasn't" not in str(error) and "was sent, but" not in str(error):
            raise
        return None
    read_all(value)
    return value


def read_all(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided and 0 < value.numel() < 10**6:
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
            value.detach().view(bits[value.dtype.itemsize]).clone()
        elif value.layout is not torch.strided and value.numel() < 10**6:
            value.detach().to_dense()
    elif isinstance(value, np.ndarray):
        if value.nbytes < 10**6:
            value.tobytes()
    elif isinstance(value, (list, tuple)) and len(value) < 100:
        for item in value:
            read_all(item)
    elif isinstance(value, dict):
        for item in value.values():
            read_all(item)


# --- random and mutated trees --------------------------------------------------------------------------


@quietly
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused(data: bytes, with_block: bool) -> None:
    decode_garbage(data, with_block=with_block)


_NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.integers(-3, 300)
_LEAVES = (
    st.none()
    | st.booleans()
    | _NUMBERS
    | st.floats()
    | st.sampled_from(
        ["float32", "uint8", "complex64", "int4", "qint8", "<f4", "|V3", "O", "coo", "csr", "cuda", "a"]
    )
    | st.text(max_size=5)
    | st.binary(max_size=40)
)
_FIELDS = st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=9), max_leaves=20)
_SMALL = st.lists(st.integers(0, 5), max_size=4)
_PLACES = st.integers(0, 3) | st.integers(-20, 400)


def token(tag: int, *parts: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.tuples(*parts).map(lambda fields: [tag, *fields])


_LIKELY = st.one_of(
    token(
        wire.TENSOR,
        st.sampled_from(["float32", "uint8", "complex64", "bool", "int4", "float8_e5m2"]),
        _SMALL,
        _SMALL,
        _PLACES,
        _PLACES,
        st.integers(0, 16),
    ),
    token(
        wire.ARRAY,
        st.sampled_from(
            [
                "<f4",
                "|u1",
                "|V3",
                "<U2",
                "|S0",
                ["a", "<f4", [2]],
                ["s", ["x"], None, ["<i4"], [2], 6, False, False],
            ]
        ),
        _SMALL,
        st.lists(st.integers(-9, 9), max_size=4),
        _PLACES,
        _PLACES,
        st.integers(0, 2),
    ),
    token(wire.SPARSE, st.sampled_from(["coo", "csr", "csc", "bsr", "bsc"]), _SMALL, st.integers(0, 31)),
    st.tuples(st.integers(wire.LIST, wire.REFERENCE), st.integers(0, 4)).map(list),
    st.tuples(st.integers(wire.BYTES, wire.STR), st.integers(0, 3)).map(list),
    st.sampled_from([[wire.RANGE], [wire.SLICE], [wire.INT, b"\1"], [wire.SIZE, 2], [wire.DTYPE, "int8"]]),
)
_BUFFERS = st.binary(max_size=64) | st.tuples(st.just(0), st.integers(0, 64), st.integers(1, 192)).map(list)
_TREES = st.tuples(
    st.lists(_BUFFERS, max_size=4),
    st.lists(_LIKELY | st.tuples(st.integers(0, 40), _FIELDS).map(list) | _FIELDS, min_size=1, max_size=25),
)


@settings(quietly, max_examples=1000)
@given(_TREES, st.booleans())
def test_well_formed_tokens_that_mean_nothing_are_refused(parts: tuple[Any, Any], with_block: bool) -> None:
    buffers, tokens = parts
    decode_garbage(tree(*tokens, buffers=tuple(buffers)), with_block=with_block)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[Sample, bytes]:
    sample = draw(values())
    data = bytearray(encode(sample.value, FakeStore(inline_max_bytes=10**6)).tree)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["set", "flip", "delete", "insert", "cut"]))
        if kind == "set":
            data[at] = draw(st.integers(0, 255))
        elif kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "delete" and len(data) > 1:
            del data[at]
        elif kind == "insert":
            data.insert(at, draw(st.integers(0, 255)))
        elif kind == "cut" and at:
            del data[at:]
    return sample, bytes(data)


@quietly
@given(mutated(), st.booleans())
def test_damaged_trees_are_refused_or_mean_something_else(
    case: tuple[Sample, bytes], with_block: bool
) -> None:
    decode_garbage(case[1], with_block=with_block)


@quietly
@given(_FIELDS)
def test_a_dtype_is_rebuilt_or_refused(description: Any) -> None:
    try:
        dtype = rebuild_dtype(description)
    except ProtocolError:
        return
    assert not dtype.hasobject


# --- particular attacks --------------------------------------------------------------------------------

WHOLE = [0, 0, BLOCK_NBYTES]
F32 = "float32"


def tensor(
    dtype: object = F32,
    shape: object = (4,),
    strides: object = (1,),
    buffer: object = 0,
    offset: object = 0,
    flags: object = 0,
    *rest: object,
) -> list[object]:
    return [wire.TENSOR, dtype, shape, strides, buffer, offset, flags, *rest]


def array(
    dtype: object = "<f4",
    shape: object = (4,),
    strides: object = (4,),
    buffer: object = 0,
    offset: object = 0,
    flags: object = 0,
) -> list[object]:
    return [wire.ARRAY, dtype, shape, strides, buffer, offset, flags]


def refuse(token: object, error: type[ProtocolError] = ProtocolError, buffer: object = WHOLE) -> None:
    store, blocks = one_block()
    with pytest.raises(error):
        decode(tree(token, buffers=(buffer,)), blocks, store)


def test_the_tokens_that_the_attacks_start_from_are_good() -> None:
    for good in (tensor(), array()):
        store, blocks = one_block()
        value: Any = decode(tree(good, buffers=(WHOLE,)), blocks, store)
        assert value.shape == (4,)


@pytest.mark.parametrize(
    "token",
    [
        tensor(shape=(65,)),
        tensor(shape=(64,), offset=4),
        tensor(offset=256),
        tensor(offset=-4),
        tensor(offset=2**63),
        tensor(offset=True),
        tensor(offset=0.0),
        tensor(strides=(22,)),
        tensor(shape=(2, 2), strides=(63, 1)),
        tensor(shape=(2,), strides=(2**62,)),
        tensor(buffer=1),
        tensor(buffer=-1),
        tensor(buffer=None),
        tensor(buffer=False),
        array(shape=(65,)),
        array(strides=(85,)),
        array(strides=(-4,)),
        array(strides=(-4,), offset=8),
        array(strides=(2**63 - 1,)),
        array(dtype="|V9", offset=236),
        array(buffer=7),
    ],
    ids=str,
)
def test_what_reaches_outside_of_its_block_is_an_invalid_handle(token: object) -> None:
    refuse(token, InvalidHandle)


@pytest.mark.parametrize(
    "token",
    [
        tensor(dtype="float31"),
        tensor(dtype="qint8"),
        tensor(dtype="Tensor"),
        tensor(dtype=["float32"]),
        tensor(shape=(-1,)),
        tensor(shape=(True,)),
        tensor(shape=(4.0,)),
        tensor(shape=4),
        tensor(shape=(2**64 - 1,), strides=(0,)),
        tensor(shape=(2**32, 2**32), strides=(0, 0)),
        tensor(shape=(1,) * 100, strides=(1,) * 100),
        tensor(strides=(-1,)),
        tensor(strides=()),
        tensor(strides=None),
        tensor(shape=(0,)),
        tensor(shape=(0, 2**63 - 1, 2**63 - 1), strides=(1, 1, 1), buffer=None),
        tensor(flags=64),
        tensor(flags=-1),
        tensor(flags=None),
        tensor(dtype="int32", flags=wire.REQUIRES_GRAD),
        tensor(flags=wire.ATTRIBUTES),
        [*tensor(), "cuda"],
        [*tensor(), "cuda", 7],
        [*tensor(), "cuda", "x", "y"],
        array(dtype="O"),
        array(dtype="|O8"),
        array(dtype="<f3"),
        array(dtype="i4,i4"),
        array(dtype=["a", "O", [2]]),
        array(dtype=["s", ["x"], None, ["<i4"], [-4], 4, False, False]),
        array(dtype=["s", ["x"], None, ["<i4"], [2], 4, False, False]),
        array(dtype=["s", ["x", "x"], None, ["|i1", "|i1"], [0, 1], 4, False, False]),
        array(shape=(2**62, 2**62), strides=(0, 0)),
        array(shape=(1,) * 100, strides=(0,) * 100),
        array(flags=2),
        array(shape=(0,)),
        [wire.SPARSE, "coo", [2, 2], 0],
        [wire.SPARSE, "strided", [2, 2], 0],
        [wire.SCALAR, "<f4", b"123"],
        [wire.SCALAR, "<U1", b"1234"],
        [wire.NUMPY_STR, b"x"],
        [wire.DTYPE, "Tensor"],
        [wire.DEVICE, "nowhere"],
        [wire.DEVICE, 0],
        [wire.SIZE, 1],
        [wire.EXTENSION, b"lib:uuid.UUID"],
        [wire.EXTENSION, "lib:uuid.UUID"],
        [wire.REFERENCE, 0],
        [wire.REFERENCE, -1],
        [wire.LIST, -1],
        [wire.LIST, 2**63],
        [wire.LIST, True],
        [wire.LIST, 1],
        [wire.LIST, 0, 0],
        [wire.INT, 5],
        [wire.COMPLEX, 1, 2],
        [wire.RANGE],
        [wire.BYTES, 3],
        [wire.STR, None],
        [99],
        [0],
        [-1],
        ["list"],
        [True],
        [],
        {},
        msgpack.Timestamp(1),
        msgpack.ExtType(5, b""),
    ],
    ids=lambda token: f"{token!r:.60}",
)
def test_a_malformed_token_is_refused(token: object) -> None:
    refuse(token)
    refuse(token, buffer=b"\0" * BLOCK_NBYTES)


@pytest.mark.parametrize(
    "buffer",
    [
        [0, 0, 257],
        [0, 256, 1],
        [0, -1, 4],
        [0, 0, 0],
        [1, 0, 4],
        [-1, 0, 4],
        [0, 2**63, 2**63],
        [0, 0],
        "x",
        None,
    ],
    ids=str,
)
def test_a_buffer_outside_of_the_blocks_is_refused(buffer: object) -> None:
    refuse(tensor(shape=(1,)), buffer=buffer)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x90",
        b"\x91\x01",
        tree(),
        tree(1, 2),
        tree(None, None),
        tree(1) + b"\xc0",
        tree(1)[:-1],
        tree("text")[:-1],
        msgpack.packb([wire.VERSION + 1, 0, 1]),
        msgpack.packb([True, 0, 1]),
        msgpack.packb([wire.VERSION, -1, 1]),
        msgpack.packb([wire.VERSION, 2**60, 1]),
        msgpack.packb([wire.VERSION, None, 1]),
        msgpack.packb([wire.VERSION, 1]),
        msgpack.packb({1: 2}),
        b"\xdd\xff\xff\xff\xff\x01\x00",
        b"\x93\x01\x00\xdd\xff\xff\xff\xff",
        b"\x93\x01\x00\xc6\xff\xff\xff\xff",
        b"\x93\x01\x00\xa2\xff\xff",
        b"\x93\x01\x00" + b"\x91" * 5000 + b"\xc0",
    ],
    ids=lambda data: f"{data!r:.40}",
)
def test_a_malformed_tree_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data, (), FakeStore())


def test_a_block_that_the_tree_does_not_use_is_refused() -> None:
    store, blocks = one_block()
    with pytest.raises(ProtocolError, match="doesn't use"):
        decode(tree(1), blocks, store)
    assert store.released == list(blocks)


def test_a_block_named_twice_is_refused() -> None:
    store, blocks = one_block()
    with pytest.raises(ProtocolError, match="twice"):
        decode(tree(tensor(), buffers=(WHOLE,)), blocks * 2, store)


@pytest.mark.parametrize(
    "tokens",
    [
        ([wire.DICT, 2], 1, "a", 1, "b"),
        ([wire.DICT, 2], 1, "a", True, "b"),
        ([wire.DICT, 1], [wire.LIST, 0], "a"),
        ([wire.SET, 2], 1, 1.0),
        ([wire.SET, 1], [wire.DICT, 0]),
        ([wire.DICT, 1], [wire.ARRAY, "<f4", [0], None, None, 0, 0], 1),
    ],
)
def test_keys_that_are_equal_or_can_not_be_hashed_are_refused(tokens: tuple[object, ...]) -> None:
    with pytest.raises(ProtocolError):
        decode(tree(*tokens), (), FakeStore())


def test_a_key_can_not_be_made_of_references_that_double_its_hash_time() -> None:
    tokens: list[object] = [[wire.LIST, 62], [wire.TUPLE, 0]]
    for level in range(60):
        tokens += [[wire.TUPLE, 2], [wire.REFERENCE, level], [wire.REFERENCE, level]]
    with pytest.raises(ProtocolError, match="inside of a key"):
        decode(tree(*tokens, [wire.SET, 1], [wire.REFERENCE, 60]), (), FakeStore())


@pytest.mark.parametrize(
    "tag", [wire.TUPLE, wire.LIST, wire.FROZENSET, wire.SLICE, wire.SPARSE, wire.SIZE, wire.RANGE]
)
def test_deep_nesting_is_refused_before_the_stack_ends(tag: int) -> None:
    headers: dict[int, list[Any]] = {wire.SLICE: [], wire.RANGE: [], wire.SPARSE: ["coo", [1], 0]}
    header = [tag, *headers.get(tag, [1])]
    with pytest.raises(ProtocolError):
        decode(tree(*[header] * 5000), (), FakeStore())


def test_bytes_of_a_block_are_copied_out_once_only() -> None:
    store, blocks = one_block()
    tokens = [[wire.LIST, 1000], *[[wire.BYTES, 0]] * 1000]
    with pytest.raises(ProtocolError, match="more than once"):
        decode(tree(*tokens, buffers=(WHOLE,)), blocks, store, limits=DecodeLimits(max_inline_bytes=0))


def test_lengths_that_a_tree_only_claims_cost_no_memory() -> None:
    # Each nested array header claims as much as a decoder allows; unchecked, that is gigabytes.
    data = b"\x93\x01\x00" + b"\xdd\x00\x0f\xff\xff" * 1_000
    tracemalloc.start()
    try:
        for attack in (data, b"\xdd\x00\x3f\xff\xff\x01\x00" + b"\xdc\x04\x00" * 1000):
            with pytest.raises(ProtocolError):
                decode(attack, (), FakeStore())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20


def sparse(layout: str, shape: list[int], *parts: torch.Tensor) -> Callable[[], bytes]:
    def make() -> bytes:
        tokens: list[object] = [[wire.SPARSE, layout, shape, 0]]
        buffers: list[object] = []
        for part in parts:
            name = str(part.dtype).removeprefix("torch.")
            tokens.append(tensor(name, list(part.shape), list(part.stride()), len(buffers)))
            buffers.append(part.numpy().tobytes())
        return tree(*tokens, buffers=tuple(buffers))

    return make


@pytest.mark.parametrize(
    "make",
    [
        sparse("coo", [2, 2], torch.tensor([[0, 5], [0, 1]]), torch.ones(2)),
        sparse("coo", [2, 2], torch.tensor([[0, -1], [0, 1]]), torch.ones(2)),
        sparse("coo", [2, 2], torch.tensor([[0, 1], [0, 1]]), torch.ones(3)),
        sparse("csr", [2, 2], torch.tensor([0, 1, 2]), torch.tensor([0, 900]), torch.ones(2)),
        sparse("csr", [2, 2], torch.tensor([0, 1, 200]), torch.tensor([0, 1]), torch.ones(2)),
        sparse("bsr", [2, 2], torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.ones(2)),
    ],
)
def test_sparse_indices_outside_of_the_shape_are_refused(make: Callable[[], bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode(make(), (), FakeStore())


def test_sparse_indices_inside_of_the_shape_are_taken() -> None:
    made = sparse("coo", [2, 2], torch.tensor([[0, 1], [0, 1]]), torch.ones(2))()
    value: Any = decode(made, (), FakeStore())
    assert torch.equal(value.to_dense(), torch.eye(2))
