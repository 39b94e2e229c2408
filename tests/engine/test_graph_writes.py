"""Nodes that write into what they share, in whatever way and from whichever run on: nobody else sees it."""

from __future__ import annotations

import ctypes
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from legion_shm.errors import ConfigError, JobCancelled, JobFailed
from legion_shm.job_context import current_job
from tests.engine.graph_harness import engine_with, node, node_class
from tests.engine.writers import (
    LARGE,
    NEVER_CACHED,
    SMALL,
    WRITES,
    content,
    maker,
    reader,
    sparse,
    write_by_c,
    write_by_numpy,
    write_by_torch,
    writer,
)

EXPORT = "LegionExporter"


class Pair(NamedTuple):
    first: Any
    second: Any


ways = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
sizes = pytest.mark.parametrize("elements", [SMALL, LARGE], ids=["small", "large"])


BEFORE_AND_AFTER = {
    "made": node("Make"),
    "before": node("Read", value=["made", 0]),
    "writer": node("Write", value=["made", 0], after=["before", 0]),
    "after": node("Read", value=["made", 0], after=["writer", 0]),
    "out": node(EXPORT, input_1=["made", 0], input_2=["writer", 0], input_3=["after", 0]),
}
"""A value that is read, written by a node, read again and delivered."""

WRITER_FIRST = {
    "made": node("Make"),
    "writer": node("Write", value=["made", 0]),
    "after": node("Read", value=["made", 0], after=["writer", 0]),
    "out": node(EXPORT, input_1=["made", 0], input_2=["writer", 0], input_3=["after", 0]),
}


@pytest.mark.parametrize("prompt", [BEFORE_AND_AFTER, WRITER_FIRST], ids=["reader first", "writer first"])
@pytest.mark.parametrize("from_run", [0, 1, 2])
@sizes
@ways
def test_nobody_sees_what_a_node_writes_into_its_input_whenever_its_class_begins(
    write: Callable[[Any], None], elements: int, from_run: int, prompt: dict[str, Any]
) -> None:
    seen: list[Any] = []
    made = content(torch.ones(elements))
    classes = {
        "Make": maker(lambda: torch.ones(elements)),
        "Read": reader(seen),
        "Write": writer(write, from_run=from_run),
    }
    with engine_with(classes) as harness:
        for run in range(4):
            outputs = harness.run(prompt).outputs
            assert content(outputs["output_1"]) == made
            assert (content(outputs["output_2"]) != made) == (run >= from_run), "the node's own output has it"
    assert all(value == made for value in seen)


@sizes
@ways
def test_a_callers_tensor_is_as_it_was_after_a_node_wrote_into_it(
    write: Callable[[Any], None], elements: int
) -> None:
    seen: list[Any] = []
    value = torch.ones(elements)
    graph = {
        "in": node("LegionImporter"),
        "writer": node("Write", value=["in", 0]),
        "after": node("Read", value=["in", 0], after=["writer", 0]),
        "out": node(EXPORT, input_1=["after", 0], input_2=["in", 0]),
    }
    with engine_with({"Read": reader(seen), "Write": writer(write, from_run=1)}) as harness:
        for _ in range(3):
            delivered = harness.run(graph, {"input_1": value}).outputs["output_2"]
            assert content(delivered) == content(value) == content(torch.ones(elements))
    assert set(seen) == {content(value)}


def overlapping(whole: torch.Tensor) -> list[torch.Tensor]:
    return [whole[: SMALL * 2], whole[SMALL:]]


SHAPES: dict[str, Callable[[], Any]] = {
    "transposed": lambda: torch.arange(float(LARGE)).reshape(4, -1).t(),
    "every second": lambda: torch.arange(float(LARGE))[::2],
    "a part of a larger one": lambda: torch.arange(float(LARGE * 2))[7 : LARGE + 7],
    "expanded": lambda: torch.arange(8.0).reshape(8, 1).expand(8, 100),
    "one number": lambda: torch.tensor(5.0),
    "empty": lambda: torch.zeros(0, 3),
    "bfloat16 NaN": lambda: torch.full((SMALL,), float("nan")).to(torch.bfloat16).to(torch.float32),
    "in a list": lambda: [torch.ones(SMALL), torch.zeros(LARGE)],
    "in a dict in a list": lambda: [
        [torch.ones(SMALL), {"pooled_output": torch.ones(LARGE), "area": (1, 2)}]
    ],
    "in a named tuple": lambda: Pair(torch.ones(SMALL), (torch.ones(LARGE),)),
    "in an ordered dict": lambda: OrderedDict(b=torch.ones(SMALL), a=[torch.ones(LARGE)]),
    "in a deque": lambda: deque([torch.ones(SMALL)]),
    "twice": lambda: [torch.ones(LARGE)] * 2,
    "overlapping": lambda: overlapping(torch.arange(float(LARGE))),
}


def write_bytes(tensor: Any) -> None:
    """All bytes from the tensor's first to its last element, whatever its strides."""
    if tensor.numel():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        ctypes.memset(tensor.data_ptr(), 0x41, (last + 1) * tensor.element_size())


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_it_holds_for_a_value_of_any_shape(make: Callable[[], Any]) -> None:
    seen: list[Any] = []
    made = content(make())
    classes = {"Make": maker(make), "Read": reader(seen), "Write": writer(write_bytes, from_run=1)}
    with engine_with(classes) as harness:
        for _ in range(3):
            outputs = harness.run(BEFORE_AND_AFTER).outputs
            assert content(outputs["output_1"]) == made
            assert type(outputs["output_2"]) is type(outputs["output_1"])
    assert len(seen) == 6
    assert all(value == made for value in seen)


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "sparse values": (sparse, lambda value: value.values().numpy().fill(9.0)),
    "a parameter": (
        lambda: torch.nn.Parameter(torch.ones(SMALL), requires_grad=False),
        lambda value: value.data.fill_(9.0),
    ),
    "a conjugate": (
        lambda: torch.ones(SMALL, dtype=torch.complex64).conj(),
        lambda value: value.fill_(9.0),
    ),
    "an inference tensor": (
        torch.inference_mode()(lambda: torch.ones(SMALL)),
        lambda value: ctypes.memset(value.data_ptr(), 0x41, 8),
    ),
    "an array": (lambda: np.ones(LARGE), lambda value: value.fill(9.0)),
    "a view of an array": (lambda: np.ones((SMALL, 4))[1:, ::2], lambda value: value.fill(9.0)),
    "bytes that can be changed": (lambda: bytearray(b"abc"), lambda value: value.__setitem__(0, 120)),
    "a list": (lambda: [1, 2], lambda value: value.append(3)),
    "a dict": (lambda: {"samples": [1]}, lambda value: value["samples"].clear()),
    "a set": (lambda: {1, 2}, lambda value: value.clear()),
}


@pytest.mark.parametrize(("make", "write"), OTHERS.values(), ids=OTHERS)
def test_it_holds_for_whatever_else_can_be_written_into(
    make: Callable[[], Any], write: Callable[[Any], None]
) -> None:
    seen: list[Any] = []
    made = content(make())

    def scribble(value: Any, after: object = None) -> tuple[Any]:
        write(value)
        return (value,)

    scribbler = node_class(scribble, required={"value": ("*",)}, optional={"after": ("*",)}, **NEVER_CACHED)
    classes = {"Make": maker(make), "Read": reader(seen), "Write": scribbler}
    with engine_with(classes) as harness:
        for _ in range(2):
            outputs = harness.run(BEFORE_AND_AFTER).outputs
            assert content(outputs["output_1"]) == made
            assert content(outputs["output_2"]) != made
    assert seen == [made] * 4


def test_pictures_are_each_nodes_own() -> None:
    image_module = pytest.importorskip("PIL.Image")
    seen: list[int] = []

    def scribble(value: Any, after: object = None) -> tuple[Any]:
        value.putpixel((0, 0), 200)
        return (value,)

    def read(value: Any, after: object = None) -> tuple[int]:
        seen.append(value.getpixel((0, 0)))
        return (0,)

    inputs: Any = {"required": {"value": ("*",)}, "optional": {"after": ("*",)}}
    classes = {
        "Make": maker(lambda: image_module.new("L", (2, 2), 5)),
        "Read": node_class(read, **inputs),
        "Write": node_class(scribble, **inputs, **NEVER_CACHED),
    }
    with engine_with(classes) as harness:
        harness.run(BEFORE_AND_AFTER)
        harness.run(BEFORE_AND_AFTER)
    assert seen == [5, 5, 5] or seen == [5] * 4


def test_tensors_that_share_bytes_share_them_in_the_node_too() -> None:
    def run(value: list[Any], again: Any) -> tuple[Any]:
        value[0].fill_(3.0)
        return ([float(value[1][0]), float(again[SMALL]), value[0] is value[2], again is value[3]],)

    whole = torch.zeros(LARGE)
    shares = [whole[: SMALL * 2], whole[SMALL:], whole[: SMALL * 2], whole]
    shares[2] = shares[0]
    both = node_class(run, required={"value": ("*",), "again": ("*",)})
    classes = {"Make": node_class(lambda: (shares, whole), returns=("*", "*")), "Both": both}
    graph = {
        "made": node("Make"),
        "both": node("Both", value=["made", 0], again=["made", 1]),
        "out": node(EXPORT, input_1=["both", 0], input_2=["made", 1]),
    }
    with engine_with(classes) as harness:
        outputs = harness.run(graph).outputs
    assert outputs["output_1"] == [3.0, 3.0, True, True]
    assert not outputs["output_2"].any()  # type: ignore[attr-defined]
    assert not whole.any()


@pytest.mark.parametrize("ending", ["fails", "is cancelled"])
@ways
def test_a_node_that_wrote_before_it_ended_in_failure_has_changed_nothing(
    write: Callable[[Any], None], ending: str
) -> None:
    seen: list[Any] = []
    value = torch.ones(LARGE)

    def scribble(value: Any, given: Any) -> tuple[Any]:
        write(value)
        write(given)
        if ending == "fails":
            raise ValueError("after the write")
        job = current_job()
        job.cancel()
        job.check_cancelled()
        raise AssertionError("it was cancelled")

    scribbler = node_class(scribble, required={"value": ("*",), "given": ("*",)})
    graph = {
        "in": node("LegionImporter"),
        "made": node("Make"),
        "writer": node("Write", value=["made", 0], given=["in", 0]),
        "out": node(EXPORT, input_1=["writer", 0]),
    }
    reading = {
        "made": node("Make"),
        "read": node("Read", value=["made", 0]),
        "out": node(EXPORT, input_1=["read", 0]),
    }
    classes = {"Make": maker(lambda: torch.ones(LARGE)), "Read": reader(seen), "Write": scribbler}
    with engine_with(classes) as harness:
        for _ in range(2):
            with pytest.raises(JobFailed if ending == "fails" else JobCancelled):
                harness.run(graph, {"input_1": value})
            harness.run(reading)
            assert "made" in harness.events.with_status("cached")
    assert seen == [content(value)] * 2 == [content(torch.ones(LARGE))] * 2


def test_what_a_node_asks_its_job_for_and_delivers_itself_is_its_own_too() -> None:
    kept: list[Any] = []

    def run() -> tuple[Any]:
        job = current_job()
        mine = job.inputs["input_1"]
        write_by_numpy(mine)
        fresh = torch.ones(SMALL)
        job.deliver("own", fresh)
        fresh.zero_()
        write_by_numpy(job.outputs["own"])
        kept.append(sorted(job.inputs))
        return (0,)

    value = torch.ones(SMALL)
    graph = {
        "asks": node("Asks"),
        "in": node("LegionImporter"),
        "read": node("Read", value=["in", 0], after=["asks", 0]),
        "out": node(EXPORT, input_1=["read", 0]),
    }
    seen: list[Any] = []
    with engine_with({"Asks": node_class(run), "Read": reader(seen)}) as harness:
        outputs = harness.run(graph, {"input_1": value}).outputs
    assert seen == [content(torch.ones(SMALL))] == [content(outputs["own"])]
    assert kept == [["input_1"]]


def test_what_an_output_node_reports_is_not_what_it_writes_into_later() -> None:
    entries: list[Any] = [{"name": "first"}]

    def save() -> dict[str, Any]:
        return {"ui": {"images": list(entries)}}

    saver = node_class(save, returns=(), output=True)
    with engine_with({"Save": saver}) as harness:
        harness.run({"save": node("Save")})
        entries[0]["name"] = "changed"
        assert harness.run({"save": node("Save")}).ui["save"]["images"] == [{"name": "first"}]


@sizes
def test_a_node_that_passes_its_input_on_gives_the_very_same_tensor(elements: int) -> None:
    passing = node_class(lambda value: (value, [value]), required={"value": ("*",)}, returns=("*", "*"))
    graph = {
        "in": node("LegionImporter"),
        "1": node("Pass", value=["in", 0]),
        "2": node("Pass", value=["1", 1]),
        "out": node(EXPORT, input_1=["1", 0], input_2=["2", 0]),
    }
    value = torch.rand(elements)
    with engine_with({"Pass": passing}) as harness:
        for _ in range(2):
            outputs = harness.run(graph, {"input_1": value}).outputs
            assert outputs["output_1"] is value
            assert outputs["output_2"][0] is value  # type: ignore[index]


@pytest.mark.parametrize(
    "part",
    [
        lambda value: value[3:],
        lambda value: value.view(4, -1).t(),
        lambda value: value.view(torch.int32),
        lambda value: value.unsqueeze_(0),
        lambda value: value.reshape(2, -1)[1],
    ],
    ids=["slice", "transposed", "other dtype", "changed shape", "row"],
)
@sizes
def test_a_view_of_an_unwritten_input_lies_in_the_inputs_memory(
    part: Callable[[Any], Any], elements: int
) -> None:
    viewing = node_class(lambda value: (part(value),), required={"value": ("*",)})
    graph = {
        "in": node("LegionImporter"),
        "1": node("View", value=["in", 0]),
        "out": node(EXPORT, input_1=["1", 0]),
    }
    value = torch.rand(elements)
    with engine_with({"View": viewing}) as harness:
        got: Any = harness.run(graph, {"input_1": value}).outputs["output_1"]
        expected = part(value.clone())
        assert got.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert torch.equal(got, expected)
    assert value.shape == (elements,)


def test_a_large_tensor_that_nobody_else_has_is_not_copied() -> None:
    addresses: list[int] = []

    def note(value: Any = None) -> tuple[Any]:
        value = torch.ones(LARGE) if value is None else value
        addresses.append(value.data_ptr())
        return (value,)

    noting = node_class(note, optional={"value": ("*",)}, KEEP_OUTPUTS=False)
    graph = {
        "1": node("Note"),
        "2": node("Note", value=["1", 0]),
        "3": node("Note", value=["2", 0]),
        "out": node(EXPORT, input_1=["3", 0]),
    }
    with engine_with({"Note": noting}) as harness:
        harness.run(graph)
        assert len(addresses) == 3
        assert len(set(addresses)) == 1


class _Promising:
    RETURN_TYPES = ("*",)
    FUNCTION = "run"
    WRITES_SHARED = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"value": ("*",)}}

    def run(self, value: Any) -> tuple[Any]:
        return (value.data_ptr(),)


class _Derived(_Promising):
    def run(self, value: Any) -> tuple[Any]:
        write_by_c(value)
        return (value.data_ptr(),)


def test_a_class_that_promises_gets_the_tensors_themselves_and_one_derived_from_it_does_not() -> None:
    value = torch.ones(LARGE)
    for name, same in (("Promising", True), ("Derived", False)):
        graph = {
            "in": node("LegionImporter"),
            "1": node(name, value=["in", 0]),
            "out": node(EXPORT, input_1=["1", 0]),
        }
        with engine_with({"Promising": _Promising, "Derived": _Derived}) as harness:
            address = harness.run(graph, {"input_1": value}).outputs["output_1"]
        assert (address == value.data_ptr()) == same
    assert float(value.min()) == 1.0


def test_a_promise_that_is_not_true_or_false_is_refused() -> None:
    broken = node_class(lambda: (0,), WRITES_SHARED="no")
    with pytest.raises(ConfigError, match=r"WRITES_SHARED is 'no'"), engine_with({"Broken": broken}):
        pass


def test_what_a_class_wrote_by_torch_against_its_promise_is_not_used_again() -> None:
    calls: list[int] = []

    def make() -> torch.Tensor:
        calls.append(1)
        return torch.ones(SMALL)

    liar = writer(write_by_torch, WRITES_SHARED=False)
    graph = {
        "made": node("Make"),
        "write": node("Write", value=["made", 0]),
        "out": node(EXPORT, input_1=["write", 0]),
    }
    with engine_with({"Make": maker(make), "Write": liar}) as harness:
        harness.run(graph)
        harness.run(graph)
    assert len(calls) == 2
