from __future__ import annotations

import math
import operator
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from legion_shm.errors import InvalidWorkflow, JobFailed, LegionError
from legion_shm.job_context import JobContext, running
from legion_shm.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from legion_shm.nodes.any_type import ANY
from legion_shm.nodes.exporter import LegionExporter
from legion_shm.nodes.importer import LegionImporter
from legion_shm.nodes.input import LegionInput
from legion_shm.nodes.output import LegionOutput
from tests.engine.graph_harness import Harness, engine_with, node, node_class


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    many = node_class(lambda: ([1, 2],), OUTPUT_IS_LIST=(True,))
    names = node_class(lambda: (["a", "b"],), returns=("STRING",), OUTPUT_IS_LIST=(True,))
    with engine_with({"Many": many, "Names": names}) as made:
        yield made


def test_the_tables_name_the_nodes_as_legionpower_did() -> None:
    assert NODE_DISPLAY_NAME_MAPPINGS["LegionImporter"] == "Legion: Importer"
    assert NODE_DISPLAY_NAME_MAPPINGS["LegionExporter"] == "Legion: Exporter"
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)


def test_the_nodes_import_without_torch_numpy_and_comfyui() -> None:
    code = "import sys, legion_shm.nodes; assert not {'torch', 'numpy', 'comfy', 'nodes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_wildcard_differs_from_nothing_and_is_still_a_star() -> None:
    for other in ("IMAGE", "INT", ["a", "b"], "*", 5):
        assert not operator.ne(ANY, other)
        assert not operator.ne(other, ANY)
    assert ANY == "*"
    assert ANY not in {"INT", "STRING"}
    assert isinstance(ANY, str)


def test_the_importer_has_twelve_slots_of_any_type_and_the_old_one() -> None:
    assert len(LegionImporter.RETURN_TYPES) == len(LegionImporter.RETURN_NAMES) == 13
    assert all(kind is ANY for kind in LegionImporter.RETURN_TYPES[:12])
    assert LegionImporter.RETURN_NAMES[0] == "output_1"
    assert LegionImporter.RETURN_NAMES[11:] == ("output_12", "data_exchange_root")


def test_inputs_arrive_at_their_slots_and_the_rest_is_none(harness: Harness) -> None:
    tensor = torch.zeros(1, 2, 2, 3)
    outcome = harness.run(
        {
            "1": node("LegionImporter"),
            "2": node("LegionExporter", input_1=["1", 1], input_3=["1", 11], input_12=["1", 0]),
        },
        {"input_1": "first", "input_2": tensor, "other": 5},
    )
    assert outcome.outputs == {"output_1": tensor, "output_3": None, "output_12": "first"}
    assert outcome.outputs["output_1"] is tensor


def test_a_workflow_wired_for_legionpower_runs(harness: Harness) -> None:
    outcome = harness.run(
        {
            "12": node("LegionImporter", data_exchange_root="/somewhere/temp/run_1"),
            "13": node("LegionExporter", data_exchange_root=["12", 5], input_1=["12", 0]),
        },
        {"input_1": 7},
    )
    assert outcome.outputs == {"output_1": 7}
    outcome = harness.run(
        {
            "12": node("LegionImporter", data_exchange_root="/somewhere"),
            "13": node("LegionExporter", data_exchange_root=["12", 12], input_1=["12", 12]),
        }
    )
    assert outcome.outputs == {"output_1": "/somewhere"}


def test_several_importers_see_the_same_and_several_exporters_add_up(harness: Harness) -> None:
    outcome = harness.run(
        {
            "1": node("LegionImporter"),
            "2": node("LegionImporter"),
            "3": node("LegionExporter", input_1=["1", 0]),
            "4": node("LegionExporter", input_2=["2", 0]),
            "5": node("LegionOutput", name="mask", value=["1", 0]),
        },
        {"input_1": 7},
    )
    assert outcome.outputs == {"output_1": 7, "output_2": 7, "mask": 7}


@pytest.mark.parametrize(
    "second",
    [node("LegionExporter", input_1=["1", 0]), node("LegionOutput", name="output_1", value=["1", 0])],
)
def test_a_name_delivered_twice_is_an_invalid_workflow(harness: Harness, second: dict[str, Any]) -> None:
    with pytest.raises(InvalidWorkflow, match=r"'output_1' of job .* is delivered twice") as caught:
        harness.run({"1": node("LegionImporter"), "2": node("LegionExporter", input_1=["1", 0]), "3": second})
    assert caught.value.node_id == "3"


def test_without_any_exporter_there_are_no_outputs(harness: Harness) -> None:
    prompt = {"1": node("LegionImporter"), "2": node("PreviewImage", images=["1", 0])}
    outcome = harness.run(prompt, {"input_1": torch.zeros(1, 2, 2, 3)})
    assert outcome.outputs == {}


def test_exporters_deliver_in_every_job_also_when_all_else_is_cached(harness: Harness) -> None:
    prompt = {
        "1": node("LegionImporter"),
        "2": node("EmptyImage", width=4, height=4, batch_size=1, color=0),
        "3": node("LegionExporter", input_1=["1", 0], input_2=["2", 0]),
        "4": node("LegionOutput", name="named", value=["1", 0]),
    }
    cached: list[int] = []
    for _ in range(3):
        outcome = harness.run(prompt, {"input_1": 5}, {"input_1": b"5"})
        assert set(outcome.outputs) == {"output_1", "output_2", "named"}
        cached.append(outcome.cached)
    assert cached == [0, 1, 1]


def test_inputs_are_read_anew_in_every_job(harness: Harness) -> None:
    prompt = {
        "1": node("LegionImporter"),
        "2": node("LegionInput", name="seed"),
        "3": node("LegionExporter", input_1=["1", 0], input_2=["2", 0]),
    }
    for value in (1, 2):
        identities = {"input_1": b"%d" % value, "seed": b"s%d" % value}
        outcome = harness.run(prompt, {"input_1": value, "seed": value * 10}, identities)
        assert outcome.outputs == {"output_1": value, "output_2": value * 10}


def test_an_input_by_name_falls_back_on_its_default(harness: Harness) -> None:
    prompt = {
        "0": node("PrimitiveInt", value=3),
        "1": node("LegionInput", name="seed", default=["0", 0]),
        "2": node("LegionInput", name="steps", default=20),
        "3": node("LegionExporter", input_1=["1", 0], input_2=["2", 0]),
    }
    assert harness.run(prompt).outputs == {"output_1": 3, "output_2": 20}
    outcome = harness.run(prompt, {"seed": None, "steps": 4}, {"seed": b"none", "steps": b"4"})
    assert outcome.outputs == {"output_1": None, "output_2": 4}
    assert harness.run(prompt).outputs == {"output_1": 3, "output_2": 20}


def test_a_missing_input_is_named_with_those_that_are_there(harness: Harness) -> None:
    prompt = {"1": node("LegionInput", name="seed"), "2": node("LegionExporter", input_1=["1", 0])}
    with pytest.raises(InvalidWorkflow) as caught:
        harness.run(prompt, {"b": 1, "a": 2})
    assert "'seed'" in str(caught.value)
    assert "(given: a, b)" in str(caught.value)
    assert (caught.value.node_id, caught.value.input_name) == ("1", "seed")
    with pytest.raises(InvalidWorkflow, match=r"\(given: none\)"):
        harness.run(prompt)


def test_what_depends_on_an_input_by_name_is_kept_by_its_identity(harness: Harness) -> None:
    prompt = {
        "1": node("LegionInput", name="seed"),
        "2": node("EmptyImage", width=["1", 0], height=4, batch_size=1, color=0),
        "3": node("LegionExporter", input_1=["2", 0]),
    }
    executed = [
        harness.run(prompt, {"seed": seed}, {"seed": identity}).executed
        for seed, identity in ((4, b"4"), (4, b"4"), (5, b"5"), (5, None), (5, None))
    ]
    assert executed == [3, 1, 3, 3, 3]


def test_a_name_may_be_linked(harness: Harness) -> None:
    prompt = {
        "0": node("PrimitiveString", value="seed"),
        "1": node("LegionInput", name=["0", 0]),
        "2": node("LegionOutput", name=["0", 0], value=["1", 0]),
    }
    for seed in (4, 5):
        assert harness.run(prompt, {"seed": seed}, {"seed": b"%d" % seed}).outputs == {"seed": seed}


def test_a_list_of_items_is_delivered_as_a_list(harness: Harness) -> None:
    outcome = harness.run(
        {
            "1": node("Many"),
            "2": node("LegionExporter", input_1=["1", 0]),
            "3": node("LegionOutput", name="x", value=["1", 0]),
        }
    )
    assert outcome.outputs == {"output_1": [1, 2], "x": [1, 2]}


def test_an_output_with_several_names_is_an_invalid_workflow(harness: Harness) -> None:
    with pytest.raises(InvalidWorkflow, match="takes one name"):
        harness.run({"1": node("Names"), "2": node("LegionOutput", name=["1", 0], value=5)})


@pytest.mark.parametrize("linked", [None, 3, "", {"a": 1}, [1]])
@pytest.mark.parametrize("kind", ["LegionInput", "LegionOutput"])
def test_a_linked_name_that_is_no_text_is_an_invalid_workflow_that_names_the_node(
    harness: Harness, kind: str, linked: object
) -> None:
    prompt = {"0": node("LegionImporter"), "1": node(kind, name=["0", 0], value=5)}
    if kind == "LegionInput":
        prompt["2"] = node("LegionOutput", name="x", value=["1", 0])
    with pytest.raises(InvalidWorkflow, match="name is non-empty text") as caught:
        harness.run(prompt, {"input_1": linked})
    assert (caught.value.node_id, caught.value.input_name) == ("1", "name")


def test_outside_of_a_worker_the_nodes_say_where_they_belong() -> None:
    with pytest.raises(LegionError, match="inside a workflow that a Legion worker runs"):
        LegionImporter().import_data()
    with pytest.raises(LegionError, match="inside a workflow that a Legion worker runs"):
        LegionExporter().export_data(input_1=[1])
    with pytest.raises(LegionError, match="inside a workflow that a Legion worker runs"):
        LegionInput().read("a")
    with pytest.raises(LegionError, match="inside a workflow that a Legion worker runs"):
        LegionOutput().write(["a"], [1])
    for changed in (
        LegionImporter.IS_CHANGED(),
        LegionExporter.IS_CHANGED(input_1=[1]),
        LegionInput.IS_CHANGED("a"),
        LegionOutput.IS_CHANGED(name=["a"]),
    ):
        assert isinstance(changed, float)
        assert math.isnan(changed)


def changed_with(inputs: dict[str, object], identities: dict[str, bytes | None]) -> str | float:
    with running(JobContext("j", inputs, identities=identities)):
        return LegionImporter.IS_CHANGED()


def test_for_comfyui_the_importer_is_unchanged_while_all_its_inputs_are() -> None:
    same = changed_with({"input_1": 1, "input_2": 2}, {"input_1": b"1", "input_2": b"2"})
    assert same == changed_with({"input_1": 1, "input_2": 2}, {"input_1": b"1", "input_2": b"2"})
    assert same != changed_with({"input_1": 1, "input_2": 3}, {"input_1": b"1", "input_2": b"3"})
    assert same != changed_with({"input_1": 1, "input_3": 2}, {"input_1": b"1", "input_3": b"2"})
    assert same != changed_with({"input_1": 1}, {"input_1": b"1"})
    assert same == changed_with(
        {"input_1": 1, "input_2": 2, "x": 9}, {"input_1": b"1", "input_2": b"2", "x": None}
    )
    unknown = changed_with({"input_1": 1, "input_2": 2}, {"input_1": b"1", "input_2": None})
    assert isinstance(unknown, float)
    assert math.isnan(unknown)


def test_a_failing_job_delivers_nothing_to_the_next(harness: Harness) -> None:
    prompt = {"1": node("LegionExporter", input_1=5), "2": node("ImageInvert", image=["3", 0]),
              "3": node("LegionImporter"), "4": node("LegionExporter", input_2=["2", 0])}  # fmt: skip
    with pytest.raises(JobFailed):
        harness.run(prompt, {"input_1": "no image"})
    assert harness.run({"1": node("LegionExporter", input_2=6)}).outputs == {"output_2": 6}
