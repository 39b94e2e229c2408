"""The nodes of a master, called as ComfyUI calls them, with workers of the graph engine."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from legion_shm.errors import (
    ConfigError,
    InvalidWorkflow,
    JobFailed,
    StartupError,
    UnsupportedValue,
    WorkerLost,
)
from legion_shm.nodes.shared_supervisor import current_supervisor
from tests import needs
from tests.nodes.support import (
    ASYNC_YAML,
    GRAPH_YAML,
    call,
    config,
    flow,
    image,
    invert,
    master,
    put_workflow,
    text,
)

# --- waiting ------------------------------------------------------------------------------------------


def test_the_outputs_are_what_one_process_would_give_to_the_bit() -> None:
    picture = image()
    campaign, *outputs = master(invert(), picture, 0.1)
    assert len(outputs) == 12
    assert torch.equal(outputs[0], 1.0 - picture)
    assert outputs[1] == 0.1
    assert outputs[2:] == [None] * 10
    assert campaign.status == "done"


@pytest.mark.parametrize(("class_type", "channels"), [("LegionMaster3", 3), ("LegionMaster6", 6)])
def test_a_smaller_master_has_as_many_outputs_as_its_name_says(class_type: str, channels: int) -> None:
    result = call(class_type, legion_config=config(), workflow_text=text(flow()), input_1="a", input_2="b")
    assert result[1:] == ("a", "b", *[None] * (channels - 2))


def test_all_twelve_channels_go_through_lossless() -> None:
    prompt = flow()
    prompt["out"]["inputs"] = {f"input_{n}": ["in", n - 1] for n in range(1, 13)}
    values: list[Any] = [1, 2.5, "x", True, None, (1, "t"), {"a": [1]}, b"b", -0.0, "", [], {1: 2}]
    _, *outputs = master(prompt, *values)
    assert outputs == values
    assert [type(value) for value in outputs] == [type(value) for value in values]


def test_outputs_for_which_a_master_has_no_slot_are_told_of_and_join_gives_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompt = flow()
    prompt["out"]["inputs"] = {"input_1": ["in", 0], "input_7": ["in", 1]}
    with caplog.at_level(logging.WARNING, "legion_shm"):
        campaign, *_ = call(
            "LegionMaster3", legion_config=config(), workflow_text=text(prompt), input_1=1, input_2=7
        )
    assert "output_7" in caplog.text
    assert call("LegionJoin", legion_campaign=campaign)[6] == 7


def test_a_campaign_gives_its_configuration_to_the_next_master() -> None:
    first, *_ = master(flow(), 1)
    second, output, *_ = call("LegionMaster3", legion_campaign=first, workflow_text=text(flow()), input_1=2)
    assert output == 2
    assert second is not first
    assert call("LegionJoin", legion_campaign=first)[0] == 1


def test_either_a_configuration_or_a_campaign_must_be_connected() -> None:
    with pytest.raises(ConfigError, match="none is connected"):
        call("LegionMaster")
    campaign, *_ = master(flow(), 1)
    with pytest.raises(ConfigError, match="both are connected"):
        call("LegionMaster", legion_config=config(), legion_campaign=campaign)


# --- where the workflow comes from --------------------------------------------------------------------


def test_the_workflow_is_the_configurations_file_unless_the_node_says_another(home: Path) -> None:
    put_workflow(home, "one.json", flow())
    put_workflow(home, "two.json", invert())
    yaml = GRAPH_YAML + "workflow: one.json\n"
    ones = torch.ones(1, 2, 2, 3)
    assert torch.equal(master(None, ones, yaml=yaml)[1], ones)
    assert torch.equal(master(None, ones, yaml=yaml, workflow="as in the configuration")[1], ones)
    assert torch.equal(master(None, ones, yaml=yaml, workflow="two.json")[1], ones - 1)
    assert torch.equal(master(invert(), ones, yaml=yaml, workflow="one.json")[1], ones - 1)


def test_legion_powers_own_example_runs_in_both_wiring_styles(home: Path) -> None:
    """A text beside the nodes, and the importer's sixth slot wired to the exporter, which carries nothing."""
    example: dict[str, Any] = {
        "_comment": "nodes and a remark",
        "12": {"inputs": {}, "class_type": "LegionImporter", "_meta": {"title": "Legion: Importer"}},
        "13": {
            "inputs": {"data_exchange_root": ["12", 5], "input_1": ["12", 0]},
            "class_type": "LegionExporter",
        },
    }
    put_workflow(home, "simple.json", example)
    picture = image()
    assert torch.equal(master(None, picture, yaml=GRAPH_YAML + "workflow: simple.json")[1], picture)
    example["12"]["inputs"]["data_exchange_root"] = "/patched/by/hand"
    example["13"]["inputs"]["data_exchange_root"] = ["12", 12]
    assert torch.equal(master(example, picture)[1], picture)


def test_a_saved_workflow_is_converted(home: Path) -> None:
    put_workflow(
        home,
        "saved.json",
        {
            "nodes": [
                {"id": 1, "type": "LegionImporter", "outputs": [{"name": "output_1", "links": [1]}]},
                {
                    "id": 2,
                    "type": "ImageScaleBy",
                    "inputs": [{"name": "image", "type": "IMAGE", "link": 1}],
                    "widgets_values": ["nearest-exact", 0.5],
                },
                {"id": 3, "type": "LegionExporter", "inputs": [{"name": "input_1", "type": "*", "link": 2}]},
                {"id": 4, "type": "Note", "widgets_values": ["remember"]},
            ],
            "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 1, "IMAGE"]],
            "version": 0.4,
        },
    )
    _, output, *_ = master(None, image(64, 48), yaml=GRAPH_YAML + "workflow: saved.json")
    assert output.shape == (1, 32, 24, 3)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"out": {"class_type": "LegionExporter", "inputs": {}}}, "no LegionImporter"),
        ({"in": {"class_type": "LegionImporter", "inputs": {}}}, "no LegionExporter"),
        (flow("NoSuchNode"), "NoSuchNode"),
        ({**flow(), "x": {"class_type": "ImageInvert", "inputs": {"image": ["9", 0]}}}, "'9'"),
        (flow("TestSleep", seconds=["in", 99]), "99"),
        ({**flow(), "x": {"class_type": "ImageInvert", "inputs": {"image": ["x", 0]}}}, "cycle"),
        ({**flow(), "x": 5}, "node x"),
        ({}, "no nodes"),
    ],
)
def test_a_workflow_that_cannot_run_is_one_clear_error_and_the_next_run_works(
    prompt: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidWorkflow, match=says):
        master(prompt, 1)
    assert master(flow(), 1)[1] == 1


def test_no_workflow_and_a_broken_file_are_clear_errors(home: Path) -> None:
    with pytest.raises(ConfigError, match="no workflow was given"):
        master(None, 1)
    with pytest.raises(ConfigError, match=r"there is no 'w\.json'"):
        master(None, 1, workflow="w.json")
    put_workflow(home, "w.json", '{"a":\n oops')
    with pytest.raises(InvalidWorkflow, match=r"w\.json is not valid JSON: line 2"):
        master(None, 1, workflow="w.json")
    with pytest.raises(InvalidWorkflow, match="expected an object"):
        master(None, 1, workflow_text="[1]")


# --- caching ------------------------------------------------------------------------------------------


def fingerprint(class_type: str, **inputs: Any) -> Any:
    from legion_shm.nodes import NODE_CLASS_MAPPINGS

    node: Any = NODE_CLASS_MAPPINGS[class_type]
    return node.IS_CHANGED(**inputs)


def test_an_edited_workflow_file_changes_its_master_and_its_configuration(home: Path) -> None:
    path = put_workflow(home, "w.json", flow())

    def fingerprints() -> list[Any]:
        return [
            fingerprint("LegionMaster", workflow="w.json", workflow_text="", unique_id="1"),
            fingerprint("LegionConfig", config_yaml="workflow: w.json"),
            fingerprint("LegionConfig", config_yaml="", workflow="w.json"),
        ]

    first = fingerprints()
    assert fingerprints() == first
    path.write_text(text(invert()))
    edited = fingerprints()
    assert all(one != other for one, other in zip(first, edited, strict=True))
    path.unlink()
    assert all(one != other for one, other in zip(edited, fingerprints(), strict=True))


def test_a_configuration_whose_text_comes_over_a_link_is_always_made_anew() -> None:
    assert math.isnan(fingerprint("LegionConfig", config_yaml=None))
    assert "line 1" in fingerprint("LegionConfig", config_yaml="a: [")


def test_a_background_run_that_went_wrong_is_run_again(home: Path) -> None:
    def changed() -> Any:
        return fingerprint("LegionMaster", unique_id="77")

    before = changed()
    good, *_ = master(flow(), 1, yaml=ASYNC_YAML, unique_id="77")
    call("LegionJoin", legion_campaign=good)
    assert changed() == before
    bad, *_ = master(flow("TestRaise"), 1, yaml=ASYNC_YAML, unique_id="77")
    with pytest.raises(JobFailed):
        call("LegionJoin", legion_campaign=bad)
    again = changed()
    assert again != before
    assert changed() == again, "one failure is one change"
    assert fingerprint("LegionMaster", unique_id="78") == before


def test_a_background_run_for_a_list_is_run_again_when_any_of_its_items_went_wrong() -> None:
    def changed() -> Any:
        return fingerprint("LegionMaster", unique_id="80")

    before = changed()
    bad, *_ = master(flow("TestRaise"), 1, yaml=ASYNC_YAML, unique_id="80")
    good, *_ = master(flow(), 2, yaml=ASYNC_YAML, unique_id="80")
    with pytest.raises(JobFailed):
        call("LegionJoin", legion_campaign=bad)
    call("LegionJoin", legion_campaign=good)
    assert changed() != before


def test_a_run_whose_object_lived_in_a_worker_that_has_ended_is_run_again() -> None:
    def changed() -> Any:
        return fingerprint("LegionMaster", unique_id="81")

    before = changed()
    campaign, made, *_ = master(flow("TestObject"), 1, unique_id="81")
    assert type(made[1]["lock"]).__name__ == "RemoteHandle"
    assert changed() == before
    call("LegionRelease", legion_campaign=campaign)
    again = changed()
    assert again != before
    assert changed() == again, "one loss is one change"


def test_a_workflow_whose_name_comes_over_a_link_counts_as_changed_when_any_file_was(home: Path) -> None:
    path = put_workflow(home, "w.json", flow())

    def fingerprints() -> list[Any]:
        return [
            fingerprint("LegionMaster", workflow=None, workflow_text="", unique_id="1"),
            fingerprint("LegionConfig", config_yaml="", workflow=None),
        ]

    first = fingerprints()
    assert fingerprints() == first
    path.write_text(text(invert()))
    assert all(one != other for one, other in zip(first, fingerprints(), strict=True))


def test_a_workflow_that_is_gone_is_told_of_by_the_run_and_not_by_validation() -> None:
    from legion_shm.nodes import NODE_CLASS_MAPPINGS

    for class_type in ("LegionMaster", "LegionConfig"):
        node: Any = NODE_CLASS_MAPPINGS[class_type]
        assert node.VALIDATE_INPUTS(workflow="gone.json") is True


# --- errors of the worker -----------------------------------------------------------------------------


def test_a_failed_node_is_the_masters_error_with_the_workers_traceback() -> None:
    with pytest.raises(JobFailed, match=r"node node \(TestRaise\).*KeyError.*the key") as caught:
        master(flow("TestRaise", kind="KeyError", text="the key"), 1)
    assert "The worker's traceback:\nTraceback" in str(caught.value)
    assert str(caught.value).count("kind: 'KeyError'") == 1, "the inputs are told once"
    assert (caught.value.node_id, caught.value.class_type) == ("node", "TestRaise")


def test_a_worker_that_is_killed_is_the_masters_error_and_the_next_run_works() -> None:
    with pytest.raises(WorkerLost, match=needs.KILLED):
        master(flow("TestSignal"), 1)
    assert master(flow(), 1)[1] == 1


def test_a_worker_that_cannot_start_is_the_masters_error() -> None:
    with pytest.raises(StartupError, match=r"no\.such\.module"):
        master(flow(), 1, yaml="comfyui.type: graph\nexecution.node_modules: no.such.module")
    with pytest.raises(ConfigError, match="not a ComfyUI"):
        master(flow(), 1, yaml="comfyui.paths.comfyui_path: /nowhere")
    with pytest.raises(ConfigError, match="not a program"):
        master(flow(), 1, yaml="comfyui: {type: graph, paths: {python_executable: /nowhere/python}}")


def test_an_input_that_cannot_travel_raises_and_names_itself() -> None:
    with pytest.raises(UnsupportedValue, match=r"input_2\['model'\]"):
        master(flow(), 1, {"model": object()})


# --- dry run ------------------------------------------------------------------------------------------


def test_a_dry_run_gives_the_inputs_as_outputs_says_so_and_starts_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = current_supervisor()
    marker = object()
    with caplog.at_level(logging.INFO, "legion_shm"):
        campaign, *outputs = master(None, marker, 2, yaml="execution.dry_run: true")
    assert outputs == [marker, 2, *[None] * 10]
    assert "dry run" in caplog.text
    assert campaign.status == "dry run"
    assert call("LegionJoin", legion_campaign=campaign) == (marker, 2, *[None] * 10)
    assert call("LegionJoinAll", campaign_1=campaign)[0] is campaign
    assert call("LegionWarmup", legion_config=config("execution.dry_run: true"))
    assert current_supervisor() is before
