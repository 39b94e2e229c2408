from __future__ import annotations

import enum
import subprocess
import sys
import textwrap
import warnings
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from legion_shm.errors import ArenaFull, ProtocolError, UnsupportedValue
from legion_shm.transport.codec import (
    DecodeLimits,
    TransferStats,
    ValueType,
    ValueTypes,
    decode,
    encode,
    value_identity,
)
from tests.transport.codec_values import assert_same, round_trip, round_trip_both
from tests.transport.fake_store import FakeStore

ROOT = Path(__file__).parents[2]


class Color(enum.Enum):
    RED = 1


class Text(str):
    __slots__ = ()


@dataclass(frozen=True)
class Size:
    width: int
    height: int


SIZE_TYPE = ValueType("test.Size", Size, lambda size: (size.width, size.height), lambda state: Size(*state))


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


# --- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        1,
        -1,
        2**63,
        2**64 - 1,
        2**64,
        -(2**63),
        -(2**63) - 1,
        2**5000,
        0.0,
        -0.0,
        1e-320,
        float("inf"),
        float("-inf"),
        float("nan"),
        complex(-0.0, float("nan")),
        "",
        "nul \0 inside",
        "lone \ud800 surrogate",
        "two lone \ud83d\ude00 surrogates, not one emoji 😀",
        "x" * 1000,
        "\udfff" * 1000,
        b"",
        b"\0\xff",
        b"long" * 1000,
        bytearray(),
        bytearray(b"short"),
        bytearray(b"long" * 1000),
        [],
        (),
        {},
        set(),
        frozenset(),
        OrderedDict(),
        [1, [2, (3, [4])]],
        {1: "int", "1": "str", (1, None): "tuple", None: "none", 2.5: "float", b"1": "bytes", False: "bool"},
        OrderedDict([("z", 1), ("a", 2)]),
        {1, "a", (2, frozenset({3}))},
        range(3, 2**70, 7),
        slice(None, -1, [2]),
    ],
    ids=lambda value: f"{value!r:.30}" if sys.getsizeof(value) < 500 else type(value).__name__,
)
def test_a_builtin_value_comes_back_as_it_was(value: object) -> None:
    assert_same(value, round_trip(value))
    assert_same({"key": [value, (value,)]}, round_trip({"key": [value, (value,)]}))


def test_bool_and_int_are_told_apart() -> None:
    assert [type(item) for item in round_trip([True, 1, 1.0])] == [bool, int, float]


def test_the_order_of_a_dict_is_kept() -> None:
    assert list(round_trip(dict.fromkeys("zyxabc"))) == list("zyxabc")


def test_a_container_met_twice_is_one_object_on_the_other_side() -> None:
    shared: list[Any] = [1]
    got = round_trip({"a": shared, "b": (shared, bytearray(b"x")), "c": [shared]})
    assert got["a"] is got["b"][0] is got["c"][0]


def test_a_value_that_doubles_at_each_level_stays_small() -> None:
    value: Any = ()
    for _ in range(60):
        value = (value, value)
    encoded = encode(value, FakeStore())
    assert len(encoded.tree) < 1000
    got = decode(encoded.tree, encoded.blocks, FakeStore())
    assert isinstance(got, tuple)
    assert got[0] is got[1]


def test_a_tuple_met_again_inside_a_key_is_written_out() -> None:
    pair = (1, 2)
    value = [pair, {pair: pair, (pair, pair): {pair}}, frozenset({pair})]
    assert_same(value, round_trip(value))


def test_long_bytes_and_texts_cross_in_blocks_once_each(store: FakeStore) -> None:
    payload = bytes(range(256)) * 4
    text = "\u00e9" * 500
    got, encoded = round_trip_both([payload, bytearray(payload), text, payload], store)
    assert got == [payload, bytearray(payload), text, payload]
    assert [store.payload(handle) for handle in encoded.blocks] == [payload, payload, text.encode()]
    assert encoded.owned == (True, True, True)


def test_a_bytearray_can_be_resized_again_after_encoding(store: FakeStore) -> None:
    payload = bytearray(1000)
    encode(payload, store)
    payload.extend(b"more")


def test_a_decoded_bytearray_is_the_receivers_own(store: FakeStore) -> None:
    encoded = encode(bytearray(1000), store)
    first, second = (decode(encoded.tree, encoded.blocks, store) for _ in range(2))
    assert isinstance(first, bytearray)
    first[0] = 1
    assert isinstance(second, bytearray)
    assert second[0] == 0


# --- numpy ---------------------------------------------------------------------------------------------


with warnings.catch_warnings():  # numpy 2.5 deprecates the lack of a unit; there are such values
    warnings.simplefilter("ignore", DeprecationWarning)
    NO_UNIT = np.array(["NaT"], "M8")
    NO_TIME = np.timedelta64("NaT")

ARRAYS: dict[str, Any] = {
    "0-d": np.array(7, "<i2"),
    "empty": np.empty((0, 3), ">f8"),
    "empty shape inside": np.empty((2, 0, 4)),
    "big endian": np.arange(50, dtype=">i4"),
    "fortran": np.asfortranarray(np.arange(60.0).reshape(6, 10)),
    "transposed": np.arange(60).reshape(3, 4, 5).transpose(2, 0, 1),
    "backwards": np.arange(100)[::-1],
    "every other": np.arange(100)[::2],
    "one column": np.arange(1000).reshape(100, 10)[:, 3],
    "columns backwards": np.arange(1000).reshape(100, 10)[::-3, 7:2:-2],
    "broadcast": np.broadcast_to(np.arange(3), (40, 3)),
    "long double": np.array([1.5, np.nan], "g"),
    "complex": np.array([1 + 2j], ">c16"),
    "bool": np.array([True, False]),
    "half": np.array([1.5], np.float16),
    "texts": np.array(["a", "bcd\u20ac"]),
    "big endian texts": np.array(["a", "bcd"], ">U5"),
    "byte strings": np.array([b"a", b"bcd"]),
    "texts of no length": np.ndarray((3,), "U0", buffer=bytearray(1)),
    "void": np.array([b"abc"], "V3"),
    "datetime": np.array(["2020-01-01", "NaT"], "M8[25s]"),
    "datetime without unit": NO_UNIT,
    "timedelta": np.array([1, -1], ">m8[ns]"),
    "long long": np.arange(3, dtype=np.longlong),
    "structure": np.array([(1, 2.5, "x")], [("a", "<i4"), ("b", ">f8"), ("c", "U3")]),
    "nested structure": np.zeros(20, [("p", [("q", "i4", (2, 3)), ("r", "S0")]), ("t", "M8[ms]")]),
    "aligned structure": np.zeros(3, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    "titles": np.zeros(3, [(("A title", "a"), "i4"), ("b", "i2")]),
    "overlapping fields": np.zeros(
        3, np.dtype({"names": ["lo", "all"], "formats": ["u1", "<u4"], "offsets": [0, 0], "itemsize": 7})
    ),
    "records": np.zeros(3, np.dtype((np.record, [("a", "i4")]))),
    "no fields": np.zeros(3, np.dtype([])),
}


@pytest.mark.parametrize("inline_max_bytes", [0, 10_000], ids=["block", "inline"])
@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_comes_back_as_it_was(name: str, inline_max_bytes: int) -> None:
    array = ARRAYS[name]
    got = round_trip(array, FakeStore(inline_max_bytes=inline_max_bytes))
    assert_same(array, got)
    assert got.dtype.isalignedstruct == array.dtype.isalignedstruct
    assert got.dtype.fields == array.dtype.fields
    assert got.dtype.char == array.dtype.char


@pytest.mark.parametrize("name", ["fortran", "transposed", "backwards", "every other", "broadcast"])
def test_an_array_keeps_strides_that_waste_less_than_half(name: str) -> None:
    assert round_trip(ARRAYS[name]).strides == ARRAYS[name].strides


def test_an_array_that_would_drag_along_more_is_packed(store: FakeStore) -> None:
    column = np.arange(10_000).reshape(100, 100)[:, 3]
    got, encoded = round_trip_both(column, store)
    assert_same(column, got)
    assert encoded.stats.copied_bytes == column.nbytes


def test_arrays_that_share_memory_share_it_on_the_other_side(store: FakeStore) -> None:
    array = np.arange(1000.0)
    got, encoded = round_trip_both([array, array[100:200], array[::-1], array], store)
    assert got[0] is got[3]
    got[0][150] = -1
    assert got[1][50] == -1
    assert got[2][-151] == -1
    assert encoded.stats.copied_bytes == array.nbytes
    assert encoded.stats.copies == 1


def test_a_received_array_is_a_writable_view_and_ends_its_lease_with_its_last_view(store: FakeStore) -> None:
    array = round_trip(np.arange(1000), store)
    array[0] = 5
    part = array[10:].view(np.uint8)
    del array
    assert store.released == []
    del part
    assert store.released == store.viewed


def test_a_read_only_array_stays_read_only() -> None:
    array = np.arange(100)
    array.flags.writeable = False
    assert not round_trip(array).flags.writeable


@pytest.mark.parametrize(
    "scalar",
    [
        np.float32(1.5),
        np.float64(-0.0),
        np.longdouble(1) / 3,
        np.int8(-3),
        np.uint64(2**64 - 1),
        np.longlong(5),
        np.bool_(True),
        np.complex64(1 - 2j),
        np.datetime64("2020-01-01T00:00", ("s", 25)),
        NO_TIME,
        np.str_("nul at the end\0"),
        np.bytes_(b"nul at the end\0"),
        np.void(b"abc"),
        np.zeros(1, [("a", "i4"), ("b", "U3")])[0],
        np.zeros(1, np.dtype((np.record, [("a", "i4")])))[0],
    ],
    ids=lambda scalar: type(scalar).__name__,
)
def test_a_numpy_scalar_keeps_its_class(scalar: Any) -> None:
    assert_same(scalar, round_trip(scalar))


class Array(np.ndarray[Any, Any]):
    pass


class Double(np.float64):
    pass


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.array([None]), "Python objects"),
        (np.zeros(2, [("a", "i4"), ("b", "O")]), "Python objects"),
        (np.zeros(2).view(Array), "subclass of numpy.ndarray"),
        (np.ma.masked_array([1, 2]), "subclass of numpy.ndarray"),
        (np.zeros(2, [("a", "i4")]).view(np.recarray), "subclass of numpy.ndarray"),
        (Double(1), "subclass"),
        (np.zeros(2, np.dtype("i4", metadata={"unit": "m"})), "metadata"),
        (np.zeros(2, [(((1, 2), "a"), "i4")]), "titles"),
        (np.dtype("i4"), "no codec"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_numpy_values_that_would_arrive_changed_are_refused(value: object, says: str) -> None:
    with pytest.raises(UnsupportedValue, match=says) as caught:
        round_trip({"k": [value]})
    assert caught.value.path == "value['k'][0]"


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Text("x"), r"Text is a subclass of str .* pass str\(...\), or register a codec"),
        (defaultdict(lambda: 1), "default_factory is <function"),
        (object(), "object has no codec"),
        (len, "builtin_function_or_method has no codec"),
        (iter([]), "list_iterator has no codec"),
        (memoryview(b"x"), r"memoryview has no codec; send bytes\(...\)"),
        (int, "type has no codec: a class can't be sent"),
        (
            np.ma.masked_array([1, 2], [False, True]),
            r"MaskedArray is a subclass .* pass its \.data and its \.mask",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_would_arrive_as_something_else_is_refused_by_name(value: object, says: str) -> None:
    with pytest.raises(UnsupportedValue, match=says):
        round_trip(value)


class Odd:
    def __hash__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (Odd(), "input_2"),
        ([0, [1, {"control": Odd()}]], "input_2[1][1]['control']"),
        ({(1, "a"): (Odd(),)}, "input_2[(1, 'a')][0]"),
        ({Odd(): 1}, "input_2[<Odd>]<key>"),
        ({(1, Odd()): 1}, "input_2[<tuple>]<key>[1]"),
        ([{Odd()}], "input_2[0]<element <Odd>>"),
        (slice(None, Odd()), "input_2.stop"),
        ({"k" * 100: Odd()}, f"input_2['{'k' * 56}...]"),
        ({2**20_000: Odd()}, "input_2[<int>]"),
    ],
)
def test_the_error_gives_the_path_in_python_notation(value: object, path: str) -> None:
    with pytest.raises(UnsupportedValue) as caught:
        encode(value, FakeStore(), path="input_2")
    if "<tuple>" in path:  # its text holds an address
        assert caught.value.path.startswith("input_2[(1, <")
        assert caught.value.path.endswith("<key>[1]")
    else:
        assert caught.value.path == path
        assert str(caught.value).startswith(f"{path}: ")


def test_a_cycle_is_refused_where_it_closes() -> None:
    inner: dict[str, Any] = {}
    inner["back"] = [inner]
    with pytest.raises(UnsupportedValue, match="this dict contains itself") as caught:
        round_trip([inner])
    assert caught.value.path == "value[0]['back'][0]"


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_nesting_is_bounded_on_both_sides(store: FakeStore) -> None:
    assert round_trip(nested(64)) == nested(64)
    with pytest.raises(UnsupportedValue, match="more than 64 levels"):
        round_trip(nested(65))
    with pytest.raises(UnsupportedValue, match="more than 10 levels"):
        encode(nested(11), store, max_depth=10)
    encoded = encode(nested(11), store)
    with pytest.raises(ProtocolError, match="more than 10 levels"):
        decode(encoded.tree, (), store, limits=DecodeLimits(max_depth=10))


def test_the_deepest_nesting_allowed_fits_the_stack(store: FakeStore) -> None:
    limits = DecodeLimits(max_depth=1000)
    encoded = encode(nested(200), store, max_depth=1000, limits=limits)
    assert decode(encoded.tree, (), store, limits=limits) == nested(200)
    with pytest.raises(UnsupportedValue, match="more than 200 levels"):
        encode(nested(201), store, max_depth=1000, limits=limits)


def test_items_are_bounded_on_both_sides(store: FakeStore) -> None:
    limits = DecodeLimits(max_items=50, max_tensors=1)
    with pytest.raises(UnsupportedValue, match="more than 50 items"):
        encode([0] * 60, store, limits=limits)
    encoded = encode([0] * 60, store)
    with pytest.raises(ProtocolError, match="tokens"):
        decode(encoded.tree, (), store, limits=limits)


def test_arrays_are_counted_on_both_sides(store: FakeStore) -> None:
    arrays = [np.zeros(1) for _ in range(4)]
    limits = DecodeLimits(max_tensors=3)
    with pytest.raises(UnsupportedValue, match="more than 3 tensors"):
        encode(arrays, store, limits=limits)
    encoded = encode(arrays, store)
    with pytest.raises(ProtocolError):
        decode(encoded.tree, encoded.blocks, store, limits=limits)


def test_what_is_too_much_for_the_tree_goes_into_blocks(store: FakeStore) -> None:
    limits = DecodeLimits(max_inline_bytes=100)
    arrays = [np.full(6, i) for i in range(5)]
    encoded = encode(arrays, store, limits=limits)
    assert encoded.stats.inline_bytes == 96
    assert len(encoded.blocks) == 3
    assert_same(arrays, decode(encoded.tree, encoded.blocks, store, limits=limits))
    with pytest.raises(ProtocolError, match="bytes inline"):
        decode(encode(arrays, store).tree, (), store, limits=limits)


# --- blocks --------------------------------------------------------------------------------------------


def test_nothing_is_reserved_for_a_value_that_is_refused(store: FakeStore) -> None:
    with pytest.raises(UnsupportedValue):
        encode([np.zeros(1000), object()], store)
    assert store.reserved == []


def test_all_blocks_are_discarded_when_one_is_not_to_be_had() -> None:
    store = FakeStore(max_blocks=2)
    with pytest.raises(ArenaFull):
        encode([np.zeros(1000) for _ in range(3)], store)
    assert len(store.discarded) == 2
    assert store.live_blocks == 0


def test_all_blocks_are_discarded_when_a_copy_fails(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []

    def fail_second(_dst: int, _src: int, nbytes: int) -> None:
        copied.append(nbytes)
        if len(copied) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("legion_shm.transport.codec_layout.copy_memory", fail_second)
    with pytest.raises(KeyboardInterrupt):
        encode([np.zeros(1000), np.zeros(1000), np.zeros(1000)], store)
    assert store.live_blocks == 0


def test_an_encoded_value_that_is_not_sent_gives_its_own_blocks_back(store: FakeStore) -> None:
    received = round_trip(np.arange(1000), store)
    encoded = encode([received, np.arange(500)], store)
    assert sorted(encoded.owned) == [False, True]
    encoded.discard(store)
    assert len(store.discarded) == 1
    assert store.live_blocks == 1


def test_what_lies_in_a_block_already_goes_by_reference(store: FakeStore) -> None:
    received = round_trip(np.arange(1000), store)
    got, encoded = round_trip_both([received, received[500:], received.reshape(10, 100)[:, 1]], store)
    assert_same([received, received[500:], received.reshape(10, 100)[:, 1]], got)
    assert encoded.owned == (False,)
    assert encoded.blocks == tuple(store.reserved)
    assert encoded.stats == TransferStats(tensors=3, payload_bytes=8000, referenced_bytes=8000)
    assert any(item is received for item in encoded.keepalive)


def test_two_parts_of_one_block_refer_to_it_once(store: FakeStore) -> None:
    received = round_trip(np.arange(1000), store)
    got, encoded = round_trip_both([received[:300], received[600:]], store)
    assert_same([received[:300], received[600:]], got)
    assert encoded.blocks == tuple(store.reserved)
    assert store.viewed.count(encoded.blocks[0]) == 2


def test_what_was_written_since_it_was_received_is_copied(store: FakeStore) -> None:
    received = round_trip(np.arange(1000), store)
    received[0] = 77
    store.dirty.add(store.reserved[0])
    got, encoded = round_trip_both(received, store)
    assert got[0] == 77
    assert encoded.owned == (True,)


def test_each_block_is_viewed_once_per_decode(store: FakeStore) -> None:
    array = np.arange(1000)
    encoded = encode([array, array[10:], np.zeros(500), b"x" * 500], store)
    decode(encoded.tree, encoded.blocks, store)
    assert sorted(store.viewed, key=lambda handle: handle.offset) == list(encoded.blocks)


def test_every_lease_ends_when_a_tree_is_garbage(store: FakeStore) -> None:
    encoded = encode([np.zeros(1000), np.zeros(1000)], store)
    with pytest.raises(ProtocolError):
        decode(encoded.tree[:-1], encoded.blocks, store)
    assert sorted(map(str, store.released)) == sorted(map(str, encoded.blocks))


def test_stats_count_what_moved(store: FakeStore) -> None:
    value = [
        np.zeros(1000, np.uint8),
        np.zeros(5000, np.uint8)[::4],
        np.zeros(10, np.uint8),
        b"x" * 300,
        "short",
    ]
    assert encode(value, store).stats == TransferStats(
        tensors=3, payload_bytes=2560, inline_bytes=10, copied_bytes=2550, copies=3, referenced_bytes=0
    )


# --- identity ------------------------------------------------------------------------------------------


def identity(value: object, store: FakeStore) -> bytes | None:
    encoded = encode(value, store)
    return value_identity(encoded.tree, encoded.blocks, encoded.owned)


def test_equal_small_values_have_equal_identities(store: FakeStore) -> None:
    assert list({0, 8}) != list({8, 0})  # equal sets that iterate differently
    one = identity({"a": [1, np.arange(3)], "b": {0, 8}, "c": np.arange(9)[1:4]}, store)
    other = identity({"a": [1, np.arange(3)], "b": {8, 0}, "c": np.arange(1, 4)}, store)
    assert one is not None
    assert one == other


def test_where_arrays_lie_in_memory_is_not_part_of_the_identity(store: FakeStore) -> None:
    memory = np.zeros(8)
    low, high, apart = memory[:2], memory[4:6], np.zeros(2)
    assert identity([low, high], store) == identity([high, low], store) == identity([high, apart], store)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ([], ()),
        ({1: 2, 3: 4}, {3: 4, 1: 2}),
        ("a", b"a"),
        ({}, OrderedDict()),
    ],
)
def test_different_values_have_different_identities(one: object, other: object, store: FakeStore) -> None:
    assert identity(one, store) != identity(other, store)


def test_the_gaps_between_elements_are_not_part_of_the_identity(store: FakeStore) -> None:
    one, other = np.arange(8), np.arange(8)
    other[1::2] = -1
    assert identity(one[::2], store) == identity(other[::2], store) is not None


def test_a_value_by_reference_has_the_identity_of_its_block(store: FakeStore) -> None:
    first, second = (round_trip(np.arange(1000), store) for _ in range(2))
    assert identity(first, store) == identity(first, store) is not None
    assert identity(first, store) != identity(second, store)


def test_a_value_that_was_copied_has_no_identity(store: FakeStore) -> None:
    assert identity(np.arange(1000), store) is None


# --- registered classes --------------------------------------------------------------------------------


def test_a_registered_class_crosses_as_its_state() -> None:
    types = ValueTypes(SIZE_TYPE)
    size = Size(3, 4)
    value = {"sizes": [size, size, Size(3, 4)], "by": {size: "key"}}
    got = round_trip_with(types, value)
    assert got == value
    assert got["sizes"][0] is got["sizes"][1]


def round_trip_with(types: ValueTypes, value: object) -> Any:
    encoded = encode(value, FakeStore(), types=types)
    return decode(encoded.tree, encoded.blocks, FakeStore(), types=types)


def test_a_registered_enum_crosses_and_stays_the_member() -> None:
    types = ValueTypes(ValueType("Color", Color, lambda member: member.name, lambda name: Color[name]))
    assert round_trip_with(types, [Color.RED])[0] is Color.RED


def test_a_subclass_of_a_registered_class_is_refused() -> None:
    class Larger(Text):
        __slots__ = ()

    with pytest.raises(UnsupportedValue, match="Larger is a subclass of"):
        round_trip_with(ValueTypes(ValueType("Text", Text, str, Text)), Larger("x"))


def test_what_can_not_travel_inside_of_a_state_is_named() -> None:
    types = ValueTypes(ValueType("Size", Size, vars, lambda state: Size(**state)))
    with pytest.raises(UnsupportedValue) as caught:
        encode([Size(1, object())], FakeStore(), types=types)  # type: ignore[arg-type]
    assert caught.value.path == "value[0].<Size>['height']"


def test_a_class_that_only_the_sender_registered_is_named_with_the_place_that_lacks_it() -> None:
    encoded = encode([Size(1, 2)], FakeStore(), types=ValueTypes(SIZE_TYPE))
    with pytest.raises(
        UnsupportedValue, match=r"test\.Size.*registered in worker 7.*codec_modules"
    ) as caught:
        decode(encoded.tree, (), FakeStore(), types=ValueTypes(place="worker 7"))
    assert caught.value.path == "value[0]"


def test_a_state_that_rebuilds_nothing_is_a_protocol_error() -> None:
    encoded = encode(Size(1, 2), FakeStore(), types=ValueTypes(SIZE_TYPE))
    broken = ValueTypes(ValueType("test.Size", Size, vars, lambda state: Size(**state)))
    other = ValueTypes(ValueType("test.Size", Size, vars, lambda state: state))
    for types in (broken, other):
        with pytest.raises(ProtocolError, match=r"test\.Size"):
            decode(encoded.tree, (), FakeStore(), types=types)


def test_a_name_or_class_is_registered_once() -> None:
    types = ValueTypes(SIZE_TYPE, SIZE_TYPE)
    with pytest.raises(ValueError, match="already registered"):
        types.register(ValueType("test.Size", Color, vars, vars))
    with pytest.raises(ValueError, match="already registered"):
        types.register(ValueType("other", Size, vars, vars))


# --- imports -------------------------------------------------------------------------------------------


def test_plain_values_load_neither_torch_nor_numpy() -> None:
    script = """
        import sys
        from legion_shm.transport.codec import decode, encode
        class Store:
            inline_max_bytes = 4096
        encoded = encode({"a": [1, (2.5, None)]}, Store())
        assert decode(encoded.tree, (), Store()) == {"a": [1, (2.5, None)]}
        loaded = {"torch", "numpy"} & set(sys.modules)
        assert not loaded, loaded
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=True, timeout=60)
