"""Nodes that write into what they share: no other node sees it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from legion_shm.supervisor.graph_writes import Watch, private_copy
from tests.engine.graph_harness import Harness, engine_with, node, node_class

EXPORT = "LegionExporter"
BLANK = node_class(lambda: (torch.zeros(3),))


def write(image: torch.Tensor) -> tuple[torch.Tensor]:
    image.fill_(9.0)
    return (image,)


WRITE = node_class(write, required={"image": ("*",)})


def prompt(**exported: list[Any]) -> dict[str, Any]:
    return {
        "blank": node("Blank"),
        "write": node("Write", image=["blank", 0]),
        "out": node(EXPORT, **exported),
    }


def blank_after_a_writer(harness: Harness) -> list[float]:
    """What the node before the writer gives in a second job, in which the writer does not run."""
    harness.run(prompt(input_1=["write", 0]))
    again = {"blank": node("Blank"), "out": node(EXPORT, input_1=["blank", 0])}
    value = harness.run(again).outputs["output_1"]
    assert isinstance(value, torch.Tensor)
    return value.tolist()


def test_a_later_job_does_not_see_what_a_node_wrote_into_a_kept_output() -> None:
    with engine_with({"Blank": BLANK, "Write": WRITE}) as harness:
        assert blank_after_a_writer(harness) == [0.0, 0.0, 0.0]


def test_an_output_that_its_node_keeps_and_writes_later_is_made_again() -> None:
    kept: list[torch.Tensor] = []

    def keep() -> tuple[torch.Tensor]:
        kept.append(torch.ones(2))
        return (kept[-1],)

    graph = {"1": node("Keep"), "out": node(EXPORT, input_1=["1", 0])}
    with engine_with({"Keep": node_class(keep)}) as harness:
        harness.run(graph)
        kept[0].zero_()
        outcome = harness.run(graph)
        value = outcome.outputs["output_1"]
        assert isinstance(value, torch.Tensor)
        assert value.tolist() == [1.0, 1.0]
        assert len(kept) == 2
        harness.run(graph)
        assert len(kept) == 2, "what nobody wrote into is kept"


def test_a_class_that_writes_is_named_once_and_given_copies_from_then_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[int] = []

    def later(image: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(1)
        return write(image) if len(calls) > 1 else (image,)

    both = prompt(input_1=["write", 0], input_2=["blank", 0])
    late = node_class(later, required={"image": ("*",)}, IS_CHANGED=lambda **_: float("nan"))
    with engine_with({"Blank": BLANK, "Write": late}) as harness, caplog.at_level(logging.WARNING):
        harness.run(both)
        harness.run(both)
        outcome = harness.run(both)
        for name, expected in (("output_1", 9.0), ("output_2", 0.0)):
            value = outcome.outputs[name]
            assert isinstance(value, torch.Tensor)
            assert value.tolist() == [expected] * 3
    assert [record.message.count("(Write)") for record in caplog.records] == [1]


@pytest.mark.parametrize("how", ["torch", "numpy"])
def test_no_other_node_of_the_job_sees_what_a_node_wrote_not_even_the_first_time(how: str) -> None:
    def scribble(image: torch.Tensor) -> tuple[torch.Tensor]:
        if how == "torch":
            return write(image)
        image.numpy()[...] = 9.0
        return (image,)

    scribbler = node_class(scribble, required={"image": ("*",)})
    read = node_class(lambda image, after: (image + 0,), required={"image": ("*",), "after": ("*",)})
    graph = {
        "in": node("LegionImporter"),
        "blank": node("Blank"),
        "w1": node("Write", image=["blank", 0]),
        "w2": node("Write", image=["in", 0]),
        "r1": node("Read", image=["blank", 0], after=["w1", 0]),
        "r2": node("Read", image=["in", 0], after=["w2", 0]),
        "out": node(EXPORT, input_1=["r1", 0], input_2=["r2", 0], input_3=["w1", 0], input_4=["w2", 0]),
    }
    given = torch.ones(3)
    with engine_with({"Blank": BLANK, "Write": scribbler, "Read": read}) as harness:
        for _ in range(2):
            outputs = harness.run(graph, {"input_1": given}).outputs
            values = [outputs[f"output_{n}"] for n in (1, 2, 3, 4)]
            assert [float(value[0]) for value in values if isinstance(value, torch.Tensor)] == [0, 1, 9, 9]
    assert given.tolist() == [1.0, 1.0, 1.0]


def test_a_node_that_passes_its_input_on_gives_the_very_same_tensor_the_first_time_too() -> None:
    passing = node_class(lambda image: (image,), required={"image": ("*",)})
    graph = {
        "in": node("LegionImporter"),
        "1": node("Pass", image=["in", 0]),
        "out": node(EXPORT, input_1=["1", 0]),
    }
    given = torch.rand(3)
    with engine_with({"Pass": passing}) as harness:
        for _ in range(2):
            assert harness.run(graph, {"input_1": given}).outputs["output_1"] is given


def test_tensors_are_found_and_copied_inside_the_values_that_nodes_exchange() -> None:
    tensor = torch.zeros(2)
    conditioning = [[tensor, {"pooled_output": torch.ones(1), "area": (1, 2)}], [tensor, {}]]
    watch = Watch(conditioning)
    assert not watch.changed()
    copied = private_copy(conditioning)
    copied[0][0].add_(1)
    assert not watch.changed()
    assert copied[0][0] is copied[1][0]
    assert copied[0][1]["area"] == (1, 2)
    conditioning[0][1]["pooled_output"].mul_(2)  # type: ignore[index]
    assert watch.changed()


def test_tensors_without_a_counter_do_no_harm() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(2)
    watch = Watch([tensor])
    assert not watch.changed()
