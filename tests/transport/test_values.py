"""Named values of one message: all or none, and what two of them share is copied once."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch

from legion_shm.errors import UnsupportedValue
from legion_shm.transport.values import pack, unpack
from tests.transport.fake_store import FakeStore


def test_a_tensor_on_two_channels_is_copied_once() -> None:
    store, image = FakeStore(), torch.rand(10, 50)
    packed = pack({"input_1": image, "input_2": [image, image[3:5]], "input_3": torch.rand(500)}, store)
    assert len(store.reserved) == 2
    assert [new for value in packed.values for new in value[3]] == [True, False, True]
    got: Any = unpack(packed.values, store, give_back=lambda _: None, allow_cpu=False)
    first, (second, part) = got["input_1"], got["input_2"]
    assert torch.equal(first, image)
    assert torch.equal(second, image)
    assert torch.equal(part, image[3:5])


def test_what_was_copied_for_this_message_has_no_identity_on_either_channel() -> None:
    image = torch.rand(500)
    packed = pack({"a": image, "b": image, "c": 5}, FakeStore())
    assert [value[4] is None for value in packed.values] == [True, True, False]


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
