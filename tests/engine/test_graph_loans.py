"""What nodes are lent and what is taken from them, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from legion_shm.supervisor.graph_holders import alone
from legion_shm.supervisor.graph_slots import Slot, Slots
from legion_shm.supervisor.graph_writes import Loan, Watch, detached, private_copy
from tests.engine.writers import LARGE


def test_values_are_taken_apart_and_put_together_again_with_what_they_share() -> None:
    tensor = torch.zeros(2)
    cyclic: list[Any] = [tensor]
    cyclic.append(cyclic)
    value = {"a": [tensor, {"b": (tensor, 1, "x")}], "c": torch.Size((1, 2)), "d": cyclic, "e": {1, 2}}
    slots = Slots()
    taken = slots.taken(value)
    assert [slot.value is tensor for slot in slots.tensors] == [True]
    slots.tensors[0].value = "filled"
    filled = slots.filled(taken)
    assert filled["a"] == ["filled", {"b": ("filled", 1, "x")}]
    assert filled["c"] == torch.Size((1, 2))
    assert type(filled["c"]) is torch.Size
    assert filled["d"][1] is filled["d"]
    assert value["a"][0] is tensor  # type: ignore[index]


def test_a_lent_value_of_another_class_is_that_object() -> None:
    thing = object()
    held = {"value": [thing, 1]}
    assert Loan(held).values["value"][0] is thing
    assert held == {}


def test_a_private_copy_keeps_what_is_the_same_object_the_same() -> None:
    tensor = torch.zeros(2)
    conditioning: Any = [[tensor, {"pooled_output": torch.ones(1), "area": (1, 2)}], [tensor, {}]]
    copied = private_copy(conditioning)
    assert copied[0][0] is copied[1][0]
    assert copied[0][0] is not tensor
    assert copied[0][1]["area"] == (1, 2)


def test_what_is_detached_is_copied_where_somebody_holds_it() -> None:
    kept = torch.ones(LARGE)
    value = detached([kept])
    kept.zero_()
    assert float(value[0].min()) == 1.0
    address = kept.data_ptr()
    values = [kept]
    del kept
    assert Loan({}).settle(values)[0].data_ptr() == address


def test_a_tensor_that_trains_goes_on_doing_so() -> None:
    with torch.enable_grad():
        weight = torch.ones(3, requires_grad=True)
        loss = (weight * 2).sum()
        detached([loss])[0].backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0] * 3


def test_attributes_of_a_tensor_go_with_its_copy() -> None:
    tensor: Any = torch.ones(2)
    tensor.note = [1]
    copied = private_copy(tensor)
    assert copied.note == [1]
    assert copied.note is not tensor.note


def test_torchs_writes_are_seen_in_nested_values_and_tensors_without_a_counter_do_no_harm() -> None:
    with torch.inference_mode():
        uncounted = torch.zeros(2)
    conditioning: Any = [[torch.zeros(2), {"pooled_output": torch.ones(1), "more": uncounted}]]
    watch = Watch(conditioning)
    assert not watch.changed()
    conditioning[0][1]["pooled_output"].mul_(2)
    assert watch.changed()


def test_who_else_holds_a_tensor_is_counted_alike_however_it_was_made() -> None:
    def views() -> Any:
        image = torch.rand(1, 8, 8, 4)
        return image[..., :3]

    makers: list[Callable[[], Any]] = [
        lambda: torch.ones(5),
        lambda: torch.ones(5)[1:],
        lambda: torch.ones(5).view(5, 1),
        views,
        lambda: torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), size=(4, 4)).permute(0, 2, 3, 1),
        lambda: torch.split(torch.rand(6), 3)[0],
        lambda: torch.rand(4, 4).t().contiguous(),
        lambda: torch.cat([torch.rand(2), torch.rand(2)]),
    ]
    with torch.no_grad():
        for make in makers:
            slot = Slot(make())
            assert alone([slot]) == {slot}
            holder = slot.value
            assert alone([slot]) == set()
            del holder
            assert alone([slot]) == {slot}


def test_a_write_into_the_very_last_byte_is_seen_and_a_return_without_one_gives_the_original() -> None:
    for offset, length in ((0, 13), (8, 21), (3, 16), (0, 3)):
        whole = torch.zeros(64, dtype=torch.uint8)
        original = whole[offset : offset + length]
        for write in (False, True):
            loan = Loan({"value": [original]})
            given = loan.values["value"][0]
            if write:
                given.numpy()[-1] = 1
            kept = loan.settle([given])[0]
            assert (kept is original) == (not write)
            assert int(kept.sum()) == int(write)
        assert not whole.any()
