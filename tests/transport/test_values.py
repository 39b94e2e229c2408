"""Named values of one message: all or none, and what two of them share is copied once."""

from __future__ import annotations

import weakref
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from legion_shm.errors import ProtocolError, UnsupportedValue
from legion_shm.transport.codec import VALUE_TYPES, ValueType, ValueTypes, value_identity
from legion_shm.transport.values import Identities, identity_of, pack, unpack
from tests.transport.fake_store import FakeStore


def test_a_tensor_on_two_channels_is_copied_once() -> None:
    store, image = FakeStore(), torch.rand(10, 50)
    packed = pack({"input_1": image, "input_2": [image, image[3:5]], "input_3": torch.rand(500)}, store)
    assert len(store.reserved) == 2
    assert [new for note in packed.values for new in note.owned] == [True, False, True]
    got: Any = unpack(packed.values, store, give_back=lambda _: None, allow_cpu=False)
    first, (second, part) = got["input_1"], got["input_2"]
    assert torch.equal(first, image)
    assert torch.equal(second, image)
    assert torch.equal(part, image[3:5])


def test_what_was_copied_for_this_message_has_no_identity_on_either_channel() -> None:
    image = torch.rand(500)
    packed = pack({"a": image, "b": image, "c": 5}, FakeStore())
    assert [note.identity is None for note in packed.values] == [True, True, False]


def test_what_caches_know_a_value_by_is_worked_out_when_somebody_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = pack({"a": torch.arange(3), "b": "text", "c": torch.rand(500)}, FakeStore()).values
    assert [note.identity for note in values] == [b"", b"", None]
    asked: list[bytes] = []

    def counted(tree: bytes, blocks: Any, owned: Any) -> bytes | None:
        asked.append(tree)
        return value_identity(tree, blocks, owned)

    monkeypatch.setattr("legion_shm.transport.values.value_identity", counted)
    identities = Identities(values)
    assert list(identities) == ["a", "b", "c"]
    assert asked == []
    (again,) = pack({"other": torch.arange(3)}, FakeStore()).values
    assert identities["a"] == identities["a"] == identity_of(again)
    assert identities["a"] != identities["b"]
    assert identities["c"] is None
    assert asked == [values[0].tree, again.tree, values[1].tree], "once for each value"
    assert identities.get("d") is None


def test_a_value_that_can_not_travel_leaves_no_block_of_the_others() -> None:
    store, image = FakeStore(), torch.rand(500)
    with pytest.raises(UnsupportedValue, match="c: "):
        pack({"a": image, "b": image, "c": object()}, store)
    assert store.live_blocks == 0


@pytest.mark.parametrize("hold_copied", [True, False])
def test_what_was_copied_lives_as_long_as_the_packed_values_only_where_that_is_asked_for(
    hold_copied: bool,
) -> None:
    image = np.ones(500)
    alive = weakref.ref(image)
    packed = pack({"a": image}, FakeStore(), hold_copied=hold_copied)
    del image
    assert (alive() is not None) == hold_copied
    del packed
    assert alive() is None


def round_trip(**values: object) -> dict[str, Any]:
    store = FakeStore()
    return unpack(pack(values, store).values, store, give_back=lambda _: None, allow_cpu=False)


class _Shared:
    def __init__(self) -> None:
        self.weights = torch.rand(200)
        self.tags = ["a"]


def _made(state: Any) -> _Shared:
    made = _Shared.__new__(_Shared)
    vars(made).update(state)
    return made


@pytest.mark.parametrize(
    "make",
    [lambda: torch.rand(500), lambda: torch.rand(2), lambda: np.ones(500), lambda: ["a"], lambda: {"a": [1]}],
    ids=["tensor", "small tensor", "array", "list", "dict"],
)
def test_the_same_object_on_two_channels_is_one_object_there(make: Any) -> None:
    value = make()
    got = round_trip(a=value, b=[value, {"in": value}], c=make())
    assert got["b"][0] is got["a"]
    assert got["b"][1]["in"] is got["a"]
    assert got["c"] is not got["a"]


def test_equal_objects_on_two_channels_stay_two() -> None:
    got = round_trip(a=[1, 2], b=[1, 2])
    assert got["a"] == got["b"]
    assert got["a"] is not got["b"]


def test_objects_are_one_however_deep_they_lie_and_in_whichever_earlier_value() -> None:
    inner, tensor = ["x"], torch.rand(3)
    got = round_trip(a=[inner], b=(tensor, [inner]), c={"both": [inner, tensor]}, d=inner)
    assert got["b"][1][0] is got["a"][0]
    assert got["c"]["both"][0] is got["a"][0]
    assert got["c"]["both"][1] is got["b"][0]
    assert got["d"] is got["a"][0]


def test_an_object_of_a_registered_class_on_two_channels_is_one_object_there() -> None:
    types = ValueTypes(
        ValueType("shared", _Shared, vars, _made),
        parent=VALUE_TYPES,
    )
    shared, store = _Shared(), FakeStore()
    values = pack({"a": shared, "b": [shared, shared.tags]}, store, types=types).values
    got: Any = unpack(values, store, give_back=lambda _: None, allow_cpu=False, types=types)
    assert got["b"][0] is got["a"]
    assert got["b"][1] is got["a"].tags


def test_an_identity_counts_the_values_whose_objects_it_holds() -> None:
    def identities(first: list[Any], then: Any) -> list[bytes | None]:
        return [identity_of(note) for note in pack({"a": first, "b": then(first)}, FakeStore()).values]

    one, same, other = (identities(first, lambda it: [it]) for first in ([1], [1], [2]))
    assert one == same
    assert one[1] != other[1]
    assert None not in one
    copied = identities([torch.rand(500)], lambda it: [it])
    assert copied == [None, None]


@pytest.mark.parametrize("token", [[16, 1, 0], [16, 0, 5], [16, -1, 0], [16, 0, -1], [16, "a", 0], [16, 0]])
def test_a_reference_to_no_object_of_an_earlier_value_is_refused(token: list[Any]) -> None:
    store = FakeStore()
    values = pack({"a": ["x"], "b": 5}, store).values
    forged = values[1]._replace(tree=msgpack.packb([1, 0, token]))
    with pytest.raises(ProtocolError):
        unpack((values[0], forged), store, give_back=lambda _: None, allow_cpu=False)


def test_a_container_of_an_earlier_value_can_not_be_a_key() -> None:
    store = FakeStore()
    values = pack({"a": (1, 2), "b": 5}, store).values
    forged = values[1]._replace(tree=msgpack.packb([1, 0, [3, 1], [16, 0, 0], 5]))
    with pytest.raises(ProtocolError, match="inside of a key"):
        unpack((values[0], forged), store, give_back=lambda _: None, allow_cpu=False)


def test_a_value_alone_refers_to_no_other() -> None:
    store = FakeStore()
    (value,) = pack({"a": 5}, store).values
    forged = value._replace(tree=msgpack.packb([1, 0, [16, 0, 0]]))
    with pytest.raises(ProtocolError):
        unpack((forged,), store, give_back=lambda _: None, allow_cpu=False)


class _Numbered:
    def __init__(self, number: int) -> None:
        self.number = number


def test_what_a_codec_made_for_one_value_is_not_taken_for_what_it_made_for_the_next() -> None:
    made = ValueType("numbered", _Numbered, lambda value: [value.number], lambda state: _Numbered(state[0]))
    types, store = ValueTypes(made, parent=VALUE_TYPES), FakeStore()
    values = pack({f"v{number}": _Numbered(number) for number in range(50)}, store, types=types).values
    got: Any = unpack(values, store, give_back=lambda _: None, allow_cpu=False, types=types)
    assert [value.number for value in got.values()] == list(range(50))
