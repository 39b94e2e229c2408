"""The nodes in a real ComfyUI, driven over HTTP: COMFYUI_PATH says which, COMFYUI_PYTHON what runs it."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import psutil
import pytest
from PIL import Image

from legion_shm.nodes.saved_format import convert_saved_workflow
from tests.nodes.comfy_server import COMFYUI, PYTHON, REPO, ComfyServer
from tests.nodes.support import text
from tests.packaging.test_wheel import checkout

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(COMFYUI is None, reason="COMFYUI_PATH says no ComfyUI"),
    pytest.mark.timeout(300),
]

EXAMPLES = REPO / "example_workflows"

# What LegionPower's template says, key for key; the workflow's name is the test's.
LEGION_POWERS_YAML = """\
comfyui:
  type: local_process
  port: auto
  paths:
    comfyui_path:
    python_executable:
    custom_nodes_template: "OnlyCPU"
execution:
  startup_timeout:
  dry_run: false
  asynch: {asynch}
  extra_args:
  env_vars:
workflow: {workflow}
"""


@pytest.fixture(scope="module")
def comfy(
    tmp_path_factory: pytest.TempPathFactory, nothing_left_by_the_module: None
) -> Iterator[ComfyServer]:
    server = ComfyServer.from_environment(tmp_path_factory.mktemp("comfyui"))
    yield server
    server.stop()


def yaml(workflow: str = "", asynch: bool = False) -> str:
    return LEGION_POWERS_YAML.format(workflow=workflow, asynch=str(asynch).lower())


def put(comfy: ComfyServer, name: str, prompt: dict[str, Any], folder: str = "Legion-SHM") -> Path:
    path = comfy.base / "user" / "default" / folder / "workflows" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(prompt), encoding="utf-8")
    return path


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def worker_flow(*nodes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """An importer, one-image nodes one after the other, an exporter, in LegionPower's wiring."""
    prompt = {"0": node("LegionImporter")}
    for number, (class_type, inputs) in enumerate(nodes, 1):
        prompt[str(number)] = node(class_type, image=[str(number - 1), 0], **inputs)
    prompt["99"] = node("LegionExporter", data_exchange_root=["0", 5], input_1=[str(len(nodes)), 0])
    return prompt


STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ImageInvert", {}),
    ("ImageScaleBy", {"upscale_method": "bicubic", "scale_by": 1.5}),
    ("ImageBlur", {"blur_radius": 3, "sigma": 1.25}),
)


def master_flow(tmp: Path, seed: int, **master: Any) -> dict[str, Any]:
    """A source through a Master, and its output written down."""
    return {
        "config": node("LegionConfig", config_yaml=yaml()),
        "source": node("ProbeSource", seed=seed, height=128),
        "master": node("LegionMaster", legion_config=["config", 0], input_1=["source", 0], **master),
        "write": node("ProbeWrite", value=["master", 1], path=str(tmp / "out.npy")),
    }


def test_outputs_equal_the_same_graph_in_one_process_to_the_bit(comfy: ComfyServer, tmp_path: Path) -> None:
    put(comfy, "steps.json", worker_flow(*STEPS))
    prompt = master_flow(tmp_path, seed=1)
    prompt["config"]["inputs"]["config_yaml"] = yaml("steps.json")
    previous = "source"
    for number, (class_type, inputs) in enumerate(STEPS):
        prompt[f"here{number}"] = node(class_type, image=[previous, 0], **inputs)
        previous = f"here{number}"
    prompt["expected"] = node("ProbeWrite", value=[previous, 0], path=str(tmp_path / "expected.npy"))
    comfy.run(prompt)
    out, expected = np.load(tmp_path / "out.npy"), np.load(tmp_path / "expected.npy")
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype == np.float32
    assert out.tobytes() == expected.tobytes()
    assert len(comfy.workers()) == 1


def test_a_workflow_as_text_and_in_the_saved_format_is_run(comfy: ComfyServer, tmp_path: Path) -> None:
    saved = {
        "nodes": [
            {"id": 1, "type": "LegionImporter", "inputs": []},
            {
                "id": 2,
                "type": "ImageScale",
                "inputs": [{"name": "image", "type": "IMAGE", "link": 1}],
                "widgets_values": ["nearest-exact", 20, 10, "disabled"],
            },
            {"id": 3, "type": "LegionExporter", "inputs": [{"name": "input_1", "type": "*", "link": 2}]},
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]],
        "version": 0.4,
    }
    comfy.run(master_flow(tmp_path, seed=2, workflow_text=json.dumps(saved)))
    assert np.load(tmp_path / "out.npy").shape == (1, 10, 20, 3)


def test_an_edited_workflow_file_runs_again_and_an_unchanged_one_comes_from_the_cache(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    put(comfy, "edited.json", worker_flow())
    prompt = master_flow(tmp_path, seed=3)
    prompt["config"]["inputs"]["config_yaml"] = yaml("edited.json")
    comfy.run(prompt)
    first = np.load(tmp_path / "out.npy")
    assert "master" not in comfy.executed(comfy.run(prompt), prompt)
    put(comfy, "edited.json", worker_flow(("ImageInvert", {})))
    assert "master" in comfy.executed(comfy.run(prompt), prompt)
    assert np.array_equal(np.load(tmp_path / "out.npy"), 1.0 - first)


def live_flow(tmp: Path, number: int) -> dict[str, Any]:
    """An object that one Master's worker made and nothing can carry, over a wire into another Master."""
    use = {
        "0": node("LegionImporter"),
        "1": node("ProbeUse", session=["0", 0], number=number),
        "2": node("LegionExporter", input_1=["1", 0]),
    }
    make = {"1": node("ProbeLive", name="one"), "2": node("LegionExporter", input_1=["1", 0])}
    return {
        "config": node("LegionConfig", config_yaml=yaml()),
        "make": node("LegionMaster", legion_config=["config", 0], workflow_text=text(make)),
        "use": node(
            "LegionMaster3", legion_config=["config", 0], input_1=["make", 1], workflow_text=text(use)
        ),
        "write": node("ProbeWrite", value=["use", 1], path=str(tmp / "out.npy")),
    }


def test_what_only_lives_in_a_worker_is_a_wire_to_the_next_master_which_gets_the_object_itself(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    comfy.run(live_flow(tmp_path, number=1))
    runs, process = np.load(tmp_path / "out.npy")
    assert runs == 1
    assert process in [worker.pid for worker in comfy.workers()]
    entry = comfy.run(prompt := live_flow(tmp_path, number=2))  # the first Master comes from the cache
    assert "make" not in comfy.executed(entry, prompt)
    assert np.load(tmp_path / "out.npy").tolist() == [2, process]


def test_an_object_whose_worker_was_killed_is_made_again_when_the_prompt_is_queued_again(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    prompt = live_flow(tmp_path, number=5)
    prompt["config"]["inputs"]["config_yaml"] = yaml() + "execution.env_vars.WHO: killed\n"
    comfy.run(prompt)
    _, process = np.load(tmp_path / "out.npy")
    worker = psutil.Process(int(process))
    worker.kill()
    psutil.wait_procs([worker], timeout=10)
    again = live_flow(tmp_path, number=6)
    again["config"] = prompt["config"]
    entries = (comfy.wait(comfy.queue(again)) for _ in range(3))  # the supervisor may not have seen it yet
    entry = next(entry for entry in entries if entry["status"]["status_str"] == "success")
    assert {"make", "use"} <= comfy.executed(entry, again)
    runs, other = np.load(tmp_path / "out.npy")
    assert runs == 1
    assert other != process


def test_a_node_that_can_not_use_what_lives_in_a_worker_fails_and_is_told_where_that_is(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    prompt = live_flow(tmp_path, number=3)
    prompt["use"] = node("ProbeUse", session=["make", 1], number=3)
    prompt["write"]["inputs"]["value"] = ["use", 0]
    error = comfy.fail(prompt)
    assert error["node_id"] == "use"
    assert "Session lives in worker" in error["exception_message"]
    assert "pass it to a job of the same worker" in error["exception_message"]


def test_what_only_lives_in_the_master_is_refused_with_its_input_and_what_to_register(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    prompt = live_flow(tmp_path, number=4)
    prompt["make"] = node("ProbeLive", name="two")
    prompt["use"]["inputs"]["input_1"] = ["make", 0]
    error = comfy.fail(prompt)
    assert error["node_id"] == "use"
    assert "UnsupportedValue" in error["exception_type"]
    assert "input_1" in error["exception_message"]
    assert "Session has no codec" in error["exception_message"]
    assert "legion_shm.register_codec" in error["exception_message"]


def test_a_broken_workers_workflow_is_an_error_on_the_master_and_the_next_run_works(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    failing = text(worker_flow(("ProbeFail", {"how": "raise"})))
    error = comfy.fail(master_flow(tmp_path, seed=4, workflow_text=failing))
    assert (error["node_id"], error["node_type"]) == ("master", "LegionMaster")
    assert "the probe failed on purpose" in error["exception_message"]
    assert "The worker's traceback:" in error["exception_message"]
    assert "in run" in error["exception_message"]
    cases = {
        text(worker_flow(("ProbeFail", {"how": "kill"}))): "SIGKILL",
        text(worker_flow(("NoSuchNode", {}))): "NoSuchNode",
        text({"0": node("LegionImporter")}): "LegionExporter",
        text({"0": node("LegionExporter")}): "LegionImporter",
        text(worker_flow(("ImageInvert", {})) | {"1": node("ImageInvert", image=["77", 0])}): "77",
        "{": "line 1",
    }
    for number, (workflow, says) in enumerate(cases.items()):
        error = comfy.fail(master_flow(tmp_path, seed=40 + number, workflow_text=workflow))
        assert error["node_id"] == "master", workflow
        assert says in error["exception_message"]
    comfy.run(master_flow(tmp_path, seed=4, workflow_text=text(worker_flow())))


def test_invalid_yaml_and_a_wrong_path_are_errors_that_say_where(comfy: ComfyServer, tmp_path: Path) -> None:
    prompt = master_flow(tmp_path, seed=5, workflow_text=text(worker_flow()))
    prompt["config"]["inputs"]["config_yaml"] = "execution:\n  asynch: ["
    error = comfy.fail(prompt)
    assert error["node_id"] == "config"
    assert "line 2" in error["exception_message"]
    prompt["config"]["inputs"]["config_yaml"] = "comfyui.paths.comfyui_path: /nowhere"
    error = comfy.fail(prompt)
    assert error["node_id"] == "master"
    assert "/nowhere is not a ComfyUI" in error["exception_message"]


def test_a_worker_that_never_gets_ready_is_one_clear_error_and_the_next_run_works(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    prompt = master_flow(tmp_path, seed=17, workflow_text=text(worker_flow()))
    prompt["config"]["inputs"]["config_yaml"] = yaml() + "execution.env_vars.WHO: late\n"
    prompt["config"]["inputs"]["startup_timeout"] = 1
    error = comfy.fail(prompt)
    assert error["node_id"] == "master"
    assert "StartupTimeout" in error["exception_type"]
    assert "startup_timeout_s = 1" in error["exception_message"]
    comfy.run(master_flow(tmp_path, seed=18, workflow_text=text(worker_flow())))


def test_a_custom_node_that_is_broken_in_the_worker_is_named_and_the_next_run_works(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    pack = comfy.base / "custom_nodes" / "broken_pack"
    pack.mkdir()
    (pack / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")
    broken = yaml() + "execution.env_vars.WHO: broken\n"
    try:
        prompt = master_flow(tmp_path, seed=19, workflow_text=text(worker_flow(("FromBrokenPack", {}))))
        prompt["config"]["inputs"]["config_yaml"] = broken
        error = comfy.fail(prompt)
        assert error["node_id"] == "master"
        assert "FromBrokenPack" in error["exception_message"]
        assert "did not load in the worker: broken_pack: " in error["exception_message"]
        assert "broken on purpose" in error["exception_message"]
        prompt["master"]["inputs"]["workflow_text"] = text(worker_flow())
        comfy.run(prompt)
    finally:
        shutil.rmtree(pack)


def test_two_background_campaigns_overlap_and_join_all_gets_both(comfy: ComfyServer, tmp_path: Path) -> None:
    prompt: dict[str, Any] = {"source": node("ProbeSource", seed=6, height=64)}
    for name in ("a", "b"):
        slow = worker_flow(
            ("ProbeSlow", {"steps": 50, "log": str(tmp_path / f"{name}.log")}), ("ImageInvert", {})
        )
        settings = yaml(asynch=True) + f"execution.env_vars.WHO: {name}\n"
        prompt[f"config_{name}"] = node("LegionConfig", config_yaml=settings)
        prompt[f"warm_{name}"] = node("LegionWarmup", legion_config=[f"config_{name}", 0])
        prompt[f"master_{name}"] = node(
            "LegionMaster3",
            legion_campaign=[f"warm_{name}", 0],
            input_1=["source", 0],
            workflow_text=text(slow),
        )
    prompt["all"] = node("LegionJoinAll", campaign_1=["master_a", 0], campaign_2=["master_b", 0])
    for slot, name in enumerate(("a", "b")):
        prompt[f"join_{name}"] = node("LegionJoin", legion_campaign=["all", slot])
        prompt[f"write_{name}"] = node(
            "ProbeWrite", value=[f"join_{name}", 0], path=str(tmp_path / f"{name}.npy")
        )
    prompt["write_source"] = node("ProbeWrite", value=["source", 0], path=str(tmp_path / "source.npy"))
    comfy.run(prompt)  # starts the workers, one after the other
    for name in ("a", "b"):
        (tmp_path / f"{name}.log").unlink()
    prompt["source"]["inputs"]["seed"] += 1
    comfy.run(prompt)
    expected = 1.0 - np.load(tmp_path / "source.npy")
    times = {}
    for name in ("a", "b"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected)
        lines = (tmp_path / f"{name}.log").read_text().split()
        times[name] = (float(lines[1]), float(lines[3]))
    assert max(begin for begin, _ in times.values()) < min(end for _, end in times.values())


def test_an_output_of_a_background_master_says_that_join_gives_it(comfy: ComfyServer, tmp_path: Path) -> None:
    prompt = master_flow(tmp_path, seed=7, workflow_text=text(worker_flow()))
    prompt["config"]["inputs"]["config_yaml"] = yaml(asynch=True)
    said, _ = watch(comfy, prompt)
    (error,) = [message["data"] for message in said if message["type"] == "execution_error"]
    assert error["node_id"] == "write"
    assert "Join Campaign" in error["exception_message"]
    assert not (tmp_path / "out.npy").exists()


def test_a_background_run_that_failed_runs_again_when_queued_again(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    flag = tmp_path / "there"
    prompt = master_flow(
        tmp_path, seed=8, workflow_text=text(worker_flow(("ProbeSlow", {"steps": 2, "log": str(flag / "x")})))
    )
    prompt["config"]["inputs"]["config_yaml"] = yaml(asynch=True)
    prompt["join"] = node("LegionJoin", legion_campaign=["master", 0])
    prompt["write"]["inputs"]["value"] = ["join", 0]
    error = comfy.fail(prompt)  # the log's folder is not there
    assert error["node_id"] == "join"
    assert "FileNotFoundError" in error["exception_message"]
    flag.mkdir()
    comfy.run(prompt)


def test_a_background_run_for_each_item_of_a_list_runs_again_when_the_first_failed(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    log = tmp_path / "began"
    prompt = master_flow(
        tmp_path, seed=20, workflow_text=text(worker_flow(("ProbeFirst", {"log": str(log)})))
    )
    prompt["config"]["inputs"]["config_yaml"] = yaml(asynch=True)
    prompt["source"] = node("ProbeItems", count=3)
    prompt["join"] = node("LegionJoin", legion_campaign=["master", 0])
    prompt["write"]["inputs"]["value"] = ["join", 0]
    assert comfy.fail(prompt)["node_id"] == "join"
    entry = comfy.run(prompt)
    assert "master" in comfy.executed(entry, prompt)
    assert len(entry["outputs"]["write"]["written"]) == 3


def test_a_file_that_is_named_over_a_link_runs_again_when_it_was_edited(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    put(comfy, "linked.json", worker_flow())
    for number, (of, name) in enumerate({"master": "workflow", "config": "workflow"}.items()):
        prompt = master_flow(tmp_path, seed=21 + number)
        prompt["name"] = node("ProbeName", name="linked.json")
        prompt[of]["inputs"][name] = ["name", 0]
        comfy.run(prompt)
        first = np.load(tmp_path / "out.npy")
        assert "master" not in comfy.executed(comfy.run(prompt), prompt)
        put(comfy, "linked.json", worker_flow(*[("ImageInvert", {})] * (1 + number)))
        comfy.run(prompt)
        assert np.abs(np.load(tmp_path / "out.npy") - (1.0 - first)).max() < 1e-6


@pytest.mark.parametrize("of", ["text", "file"])
def test_a_picture_that_the_worker_loads_is_loaded_again_when_it_was_replaced(
    comfy: ComfyServer, tmp_path: Path, of: str
) -> None:
    picture = comfy.base / "input" / f"replaced-{of}.png"
    loads = {
        "0": node("LegionImporter"),
        "1": node("LoadImage", image=picture.name),
        "2": node("LegionExporter", input_1=["1", 0], input_2=["0", 0]),
    }
    prompt = master_flow(tmp_path, seed=40, **({"workflow_text": text(loads)} if of == "text" else {}))
    if of == "file":
        put(comfy, "loads.json", loads)
        prompt["config"]["inputs"]["config_yaml"] = yaml("loads.json")
    for colour, expected in (("white", 1.0), ("black", 0.0)):
        Image.new("RGB", (8, 8), colour).save(picture)
        comfy.run(prompt)
        assert np.load(tmp_path / "out.npy").max() == expected
        assert "master" not in comfy.executed(comfy.run(prompt), prompt)


@pytest.mark.parametrize("asynch", [False, True])
def test_interrupting_the_prompt_interrupts_the_worker_within_a_second(
    comfy: ComfyServer, tmp_path: Path, asynch: bool
) -> None:
    log = tmp_path / "slow.log"
    slow = text(worker_flow(("ProbeSlow", {"steps": 3000, "log": str(log)})))
    prompt = master_flow(tmp_path, seed=9 + asynch, workflow_text=slow)
    prompt["config"]["inputs"]["config_yaml"] = yaml(asynch=asynch)
    if asynch:
        prompt["join"] = node("LegionJoin", legion_campaign=["master", 0])
        prompt["write"]["inputs"]["value"] = ["join", 0]
    prompt_id = comfy.queue(prompt)
    wait_for_file(log)
    begun = time.monotonic()
    comfy.post("/interrupt", {})
    entry = comfy.wait(prompt_id, within_s=10)
    assert time.monotonic() - begun < 1.0
    assert "execution_interrupted" in [event for event, _ in entry["status"]["messages"]]
    # The worker is free again at once: its node looked for the interruption.
    begun = time.monotonic()
    comfy.run(master_flow(tmp_path, seed=100 + asynch, workflow_text=text(worker_flow())))
    assert time.monotonic() - begun < 2.0


def test_a_background_job_that_nobody_waits_for_is_interrupted_too(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    log, here = tmp_path / "slow.log", tmp_path / "here.log"
    slow = text(worker_flow(("ProbeSlow", {"steps": 3000, "log": str(log)})))
    prompt = master_flow(tmp_path, seed=12, workflow_text=slow)
    prompt["config"]["inputs"]["config_yaml"] = yaml(asynch=True)
    # The master's own slow node runs, and is the one that sees ComfyUI's flag and clears it.
    prompt["own"] = node("ProbeSlow", image=["source", 0], steps=3000, log=str(here), after=["master", 0])
    prompt["write"]["inputs"]["value"] = ["own", 0]
    prompt_id = comfy.queue(prompt)
    wait_for_file(log)
    wait_for_file(here)
    comfy.post("/interrupt", {})
    entry = comfy.wait(prompt_id, within_s=10)
    assert "execution_interrupted" in [event for event, _ in entry["status"]["messages"]]
    begun = time.monotonic()
    comfy.run(master_flow(tmp_path, seed=101, workflow_text=text(worker_flow())))
    assert time.monotonic() - begun < 3.0


def test_progress_and_previews_of_the_worker_appear_on_the_master(comfy: ComfyServer, tmp_path: Path) -> None:
    slow = text(worker_flow(("ProbeSlow", {"steps": 40, "log": str(tmp_path / "slow.log")})))
    said, pictures = watch(comfy, master_flow(tmp_path, seed=13, workflow_text=slow))
    progress = [message["data"] for message in said if message["type"] == "progress"]
    values = [data["value"] / data["max"] for data in progress if data["node"] == "master"]
    assert len(values) >= 5, said
    assert values == sorted(values)
    assert any(b"\xff\xd8\xff" in picture or b"PNG" in picture for picture in pictures)


def login_flow(tmp: Path, seed: int, fail: bool = False) -> dict[str, Any]:
    asked = {
        "0": node("LegionImporter"),
        "1": node("ProbeLogin", image=["0", 0], fail=fail),
        "2": node("LegionExporter", input_1=["1", 0]),
    }
    return master_flow(tmp, seed, workflow_text=text(asked))


LOGIN = {"auth_token_comfy_org": "SECRET-TOKEN", "api_key_comfy_org": "SECRET-KEY"}


def test_a_workers_nodes_have_the_users_login_and_way_to_preview(comfy: ComfyServer, tmp_path: Path) -> None:
    def told(seed: int, **extra_data: str) -> str:
        body = {"prompt": login_flow(tmp_path, seed), "extra_data": extra_data}
        entry = comfy.wait(comfy.post("/prompt", body)["prompt_id"])
        assert entry["status"]["status_str"] == "success", entry["status"]
        return str(np.load(tmp_path / "out.npy"))

    takes_method = "preview_method" in (Path(COMFYUI or ".") / "execution.py").read_text(encoding="utf-8")
    method = "latent2rgb" if takes_method else "none"
    assert told(30, **LOGIN, preview_method="latent2rgb") == f"SECRET-TOKEN SECRET-KEY {method}"
    assert told(31) == "None None none", "the next prompt has none of it"


def test_the_users_login_is_in_no_error_and_no_log(comfy: ComfyServer, tmp_path: Path) -> None:
    body = {"prompt": login_flow(tmp_path, 32, fail=True), "extra_data": LOGIN}
    entry = comfy.wait(comfy.post("/prompt", body)["prompt_id"])
    (error,) = [data for event, data in entry["status"]["messages"] if event == "execution_error"]
    assert "token: (not shown)" in error["exception_message"]
    assert "SECRET" not in json.dumps(entry["status"])
    assert "SECRET" not in comfy.log()


def test_the_release_node_ends_a_worker_and_says_what_came_back(comfy: ComfyServer, tmp_path: Path) -> None:
    prompt = master_flow(tmp_path, seed=14, workflow_text=text(worker_flow()))
    comfy.run(prompt)
    before = {worker.pid for worker in comfy.workers()}
    prompt["release"] = node("LegionRelease", legion_config=["config", 0], after=["master", 1])
    entry = comfy.run(prompt)
    (report,) = entry["outputs"]["release"]["text"]
    assert report.startswith("1 worker ended")
    assert len(before - {worker.pid for worker in comfy.workers()}) == 1


@pytest.mark.parametrize("wish", ["unload_models", "free_memory"])
def test_comfyuis_buttons_for_memory_reach_the_worker(comfy: ComfyServer, tmp_path: Path, wish: str) -> None:
    log = tmp_path / "slow.log"
    kept = {
        "0": node("LegionImporter"),
        "1": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
        "2": node("ProbeSlow", image=["1", 0], steps=1, log=str(log)),
        "3": node("LegionExporter", input_1=["2", 0], input_2=["0", 0]),
    }
    seeds = iter(range(1000, 1100))

    def runs_of_the_workers_node() -> int:
        comfy.run(master_flow(tmp_path, seed=next(seeds), workflow_text=text(kept)))
        return log.read_text().count("begin")

    assert [runs_of_the_workers_node() for _ in range(3)] == [1, 1, 1], "it comes from the worker's cache"
    comfy.post("/free", {wish: True})
    assert any(runs_of_the_workers_node() == 2 for _ in range(50)), "its caches were not dropped"


def test_the_page_finds_the_nodes_their_templates_and_their_help(comfy: ComfyServer) -> None:
    info = comfy.get("/object_info/LegionMaster")["LegionMaster"]
    assert info["display_name"] == "Legion: Master (12 channels)"
    assert info["output_name"][:2] == ["legion_campaign", "output_1"]
    templates = comfy.get("/workflow_templates")["legion-shm"]
    assert {"Run a workflow in a worker", "Two workers at once"} <= set(templates)
    page = comfy.get("/extensions/legion-shm/docs/LegionMaster.md")
    assert "Legion: Importer" in page


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.json")))
def test_an_example_runs_as_it_is(comfy: ComfyServer, name: str) -> None:
    picture = Image.new("RGB", (64, 48), "orange")
    picture.save(comfy.base / "input" / "example.png")
    saved = comfy.get(f"/api/workflow_templates/legion-shm/{quote(name)}.json")
    assert not [node for node in saved["nodes"] if node["mode"] != 0]
    info = comfy.get("/object_info")
    prompt = convert_saved_workflow(saved, info.get)
    if name == "Workflow for a worker":
        prompt = {
            "source": node("LoadImage", image="example.png"),
            "config": node("LegionConfig", config_yaml=""),
        }
        prompt["master"] = node(
            "LegionMaster",
            legion_config=["config", 0],
            input_1=["source", 0],
            workflow_text=json.dumps(saved),
        )
        prompt["preview"] = node("PreviewImage", images=["master", 1])
    assert any(shown.get("images") for shown in comfy.run(prompt)["outputs"].values())


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_workers_are_gone_when_the_server_ends(tmp_path: Path, how: str) -> None:
    server = ComfyServer.from_environment(tmp_path / "base")
    try:
        server.run(master_flow(tmp_path, seed=15, workflow_text=text(worker_flow())))
        workers = server.processes()
        assert workers
        getattr(server.process, how)()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
    finally:
        server.stop()


def test_an_archive_of_the_registry_which_has_no_symlinks_runs_without_an_install(tmp_path: Path) -> None:
    unpacked = checkout(tmp_path / "unpacked", links="empty folders")
    server = ComfyServer(Path(COMFYUI or "."), PYTHON, tmp_path / "base", legion=unpacked)
    try:
        server.run(master_flow(tmp_path, seed=16, workflow_text=text(worker_flow(*STEPS))))
        assert np.load(tmp_path / "out.npy").shape == (1, 192, 144, 3)
    finally:
        server.stop()


def wait_for_file(path: Path, within_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not path.exists():
        assert time.monotonic() < deadline_s, f"{path} was not written"
        time.sleep(0.01)


def watch(comfy: ComfyServer, prompt: dict[str, Any]) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Run a prompt as a page does: the messages that it gets, and the pictures."""
    aiohttp = pytest.importorskip("aiohttp")
    said, pictures = list[dict[str, Any]](), list[bytes]()

    async def listen() -> None:
        url = f"ws://127.0.0.1:{comfy.port}/ws?clientId=watcher"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            prompt_id = await asyncio.to_thread(comfy.queue, prompt, "watcher")
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    pictures.append(message.data)
                    continue
                said.append(json.loads(message.data))
                data = said[-1].get("data", {})
                if said[-1]["type"] == "executing" and data.get("node") is None:
                    assert data.get("prompt_id") in (None, prompt_id)
                    return
        raise AssertionError("the server closed the connection")

    asyncio.run(asyncio.wait_for(listen(), 60))
    return said, pictures
