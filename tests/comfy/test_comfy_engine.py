"""The comfy engine against a real ComfyUI, which runs in a process of its own: see driver.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.comfy.conftest import REPOSITORY, RealComfyUI

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(300)]

_DRIVER = Path(__file__).with_name("driver.py")


@pytest.fixture(scope="module")
def told(comfyui: RealComfyUI, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every scenario of the driver told."""
    folder = tmp_path_factory.mktemp("driver")
    done = subprocess.run(
        [comfyui.python, _DRIVER, folder / "results.json", comfyui.path, *comfyui.arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    told: dict[str, Any] = json.loads((folder / "results.json").read_text())
    told["driver"] = {"left": sorted(path.name for path in folder.iterdir())}
    crashed = {name: value["crashed"] for name, value in told.items() if "crashed" in value}
    assert not crashed, "\n".join(crashed.values())
    return told


def test_it_says_what_it_is_when_it_has_started(told: dict[str, Any], comfyui: RealComfyUI) -> None:
    start = told["start"]
    assert start["name"] == "comfy"
    assert start["versions"]["comfyui"] in (comfyui.path / "comfyui_version.py").read_text()
    assert start["node_classes"] > 300


def test_values_pass_through_unchanged(told: dict[str, Any]) -> None:
    found = told["passthrough"]
    assert found["tensor"]
    assert found["latent"]
    assert found["list"]
    assert found["number"] == 2.5
    assert found["absent"] is None
    assert found["names"] == ["output_1", "output_12", "output_2", "output_3", "output_4"]


def test_channels_have_names_too(told: dict[str, Any]) -> None:
    found = told["named_channels"]
    assert found["outputs"] == {"a": 7, "b": 7}
    assert found["missing"]["kind"] == "InvalidWorkflow"
    assert "node 1 (LegionInput)" in found["missing"]["text"]
    assert "'nobody'" in found["missing"]["text"]
    assert found["twice"]["kind"] == "InvalidWorkflow"
    assert "'x'" in found["twice"]["text"]


def test_core_nodes_compute(told: dict[str, Any]) -> None:
    found = told["core_nodes"]
    assert found["image"] == [2, 8, 8, 3]
    assert found["colour"] == [0.0, 1.0, 1.0]
    assert found["latent"] == [0.75]
    assert found["inference"]


def test_an_equal_input_is_found_cached_and_the_exporter_delivers_all_the_same(told: dict[str, Any]) -> None:
    first, second, other, other_again, never, never_again = told["cache"]
    assert (first["executed"], first["cached"], first["runs"]) == (4, 0, 1)
    assert (second["executed"], second["cached"], second["runs"]) == (1, 3, 1)
    assert second["middle"] == ["cached"]
    assert second["exporter"] == ["started", "finished"]
    assert other["runs"] == 2
    assert other_again["runs"] == 2
    assert never["runs"] == 3
    assert never_again["runs"] == 4
    assert all(run["right"] for run in told["cache"])


def test_a_new_input_leaves_what_is_made_of_the_others_cached(told: dict[str, Any]) -> None:
    runs = told["each_input_on_its_own"]
    assert [run["runs"] for run in runs] == [1, 1, 1, 1]
    assert [run["side"] for run in runs] == [32, 48, 48, 48]
    assert [run["absent"] for run in runs] == [None] * 4
    assert [run["counts"] for run in runs] == [[4, 0], [3, 1], [3, 1], [2, 2]]
    for run in runs:
        assert {node_id for node_id, _, _ in run["nodes"]} == {"0", "1", "2", "out"}
        assert len({tuple(event) for event in run["nodes"]}) == len(run["nodes"])


def test_caches_keep_no_received_memory_and_nothing_that_cannot_be_found(told: dict[str, Any]) -> None:
    found = told["inputs_are_not_kept"]
    assert found["alive"] == {"known": [False, False], "never again": [False, False]}
    assert found["grown"] <= 0


def test_validation_tells_every_problem_in_comfyuis_words(told: dict[str, Any]) -> None:
    found = told["validation"]["several"]
    assert len(found["problems"]) == 3
    small, listed, missing = found["problems"]
    assert small.startswith("node 1 (ImageScale), input 'width'")
    assert "Value -4 smaller than min of 0" in small
    assert "Value not in list: upscale_method: 'magic' not in" in listed
    assert missing.startswith("node 3 (ImageScale), input 'height'")
    assert "Required input is missing" in missing
    assert (found["node_id"], found["input_name"]) == ("1", "width")
    assert found["events"] == []


@pytest.mark.parametrize(
    ("case", "node_id", "words"),
    [
        ("unknown class", "7", "NoSuchNode"),
        ("no output", None, "Prompt has no outputs"),
        ("wrong type", "2", "received_type(LATENT) mismatch input_type(IMAGE)"),
        ("wrong slot", "2", "node 1 (EmptyImage) has no output 3"),
        ("link to nowhere", "2", "'1'"),
        ("cycle", "1", "cycle"),
    ],
)
def test_a_workflow_that_cannot_run_is_refused(
    told: dict[str, Any], case: str, node_id: str | None, words: str
) -> None:
    found = told["validation"][case]
    assert len(found["problems"]) == 1
    assert words in found["problems"][0]
    assert found["node_id"] == node_id


def test_a_refused_workflow_leaves_the_engine_usable(told: dict[str, Any]) -> None:
    assert told["validation"]["works"]


def test_a_failing_node_is_told_with_its_traceback_and_inputs(told: dict[str, Any]) -> None:
    failed = told["failures"]["node"]
    assert failed["kind"] == "JobFailed"
    assert (failed["node_id"], failed["class_type"]) == ("2", "ProbeFail")
    assert failed["exception_type"] == "ValueError"
    assert failed["exception_message"] == "no image of 1 suits me"
    assert "legion_probe" in failed["traceback"]
    assert failed["traceback"].rstrip().endswith("ValueError: no image of 1 suits me")
    assert failed["inputs"] == "image: Tensor[1,16,16,3] float32 cpu"


def test_a_node_that_exits_fails_its_job_alone(told: dict[str, Any]) -> None:
    failed = told["failures"]["exit"]
    assert (failed["kind"], failed["node_id"]) == ("JobFailed", "1")
    assert failed["exception_type"] == "SystemExit"
    assert told["failures"]["works"]


def test_a_blocked_execution_is_a_failure(told: dict[str, Any]) -> None:
    failed = told["failures"]["blocked"]
    assert failed["kind"] == "JobFailed"
    assert failed["node_id"] == "2"
    assert "blocked by the probe" in failed["text"]


def test_a_node_that_interrupts_by_itself_cancels_the_job(told: dict[str, Any]) -> None:
    stopped = told["failures"]["stopped"]
    assert stopped["kind"] == "JobCancelled"
    assert "node 1 (ProbeStop)" in stopped["text"]


@pytest.mark.parametrize("case", ["early", "at the start"])
def test_an_interruption_that_comes_early_is_not_lost(told: dict[str, Any], case: str) -> None:
    assert told["interrupt"][case] == {"kind": "JobCancelled", "events": []}


@pytest.mark.parametrize("case", ["running", "swallowed", "async"])
def test_a_running_job_is_interrupted_at_once(told: dict[str, Any], case: str) -> None:
    found = told["interrupt"][case]
    assert found["kind"] == "JobCancelled"
    assert found["took_s"] < 1.0
    assert found["out"] == []


def test_no_node_starts_after_one_that_swallowed_the_interruption(told: dict[str, Any]) -> None:
    assert told["interrupt"]["swallowed"]["last"] == []
    assert told["interrupt"]["works"]


def test_progress_and_previews_name_their_node(told: dict[str, Any]) -> None:
    found = told["progress"]
    assert found["steps"] == [["1", 1, 3], ["1", 2, 3], ["1", 3, 3], ["2", 1, 2]]
    assert found["previews"] == [["1", [8, 4]]] * 3
    assert [status for _, _, status in found["nodes"]] == ["started", "finished"] * 4


def test_nodes_within_an_expanded_node_are_that_node(told: dict[str, Any]) -> None:
    found = told["expanded"]
    assert {node_id for node_id, _, _ in found["nodes"]} == {"0", "1", "2", "out"}
    assert found["executed"] == 4
    assert found["close"]


def test_output_nodes_show_what_they_saved_also_when_cached(told: dict[str, Any]) -> None:
    found = told["ui"]
    assert found["outputs"] == {}
    assert found["first"]["2"]["images"][0]["type"] == "temp"
    assert found["first"]["3"]["images"][0]["filename"].startswith("probe_")
    assert found["second"] == found["first"]
    assert found["second_cached"] == 3


def test_temp_is_the_workers_own_and_goes_with_it(told: dict[str, Any], comfyui: RealComfyUI) -> None:
    assert told["ui"]["in_temp"]
    assert not Path(told["ui"]["temp"]).is_relative_to(comfyui.base)
    assert not told["closed"]["temp_left"]
    assert (comfyui.base / "temp" / "of_the_master.png").exists()


def test_custom_nodes_load_as_the_arguments_say_and_may_register_routes(told: dict[str, Any]) -> None:
    assert told["routes"] == {"registered": True, "loop_runs": True, "left_out": False}


def test_it_listens_nowhere_and_leaves_no_files(told: dict[str, Any], comfyui: RealComfyUI) -> None:
    assert told["listeners"] == []
    assert told["driver"]["left"] == ["results.json"]
    assert not list(comfyui.base.rglob("*.db"))


def test_free_empties_the_caches(told: dict[str, Any]) -> None:
    assert told["free"] == {"before": 2, "after": 0, "works": True}


def test_a_small_job_costs_little(told: dict[str, Any]) -> None:
    assert told["speed"]["median_ms"] < 15
