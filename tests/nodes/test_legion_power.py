"""LegionPower's own files, unchanged, in a real ComfyUI over HTTP; LEGIONPOWER_PATH is its checkout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.nodes.comfy_server import COMFYUI, ComfyServer
from tests.nodes.test_in_comfyui import STEPS, node, put, worker_flow

LEGION_POWER = Path(os.environ.get("LEGIONPOWER_PATH", ""))
FOLDER = "ComfyUI-LegionPower"
CONFIGURATIONS = {
    "runtime/default_legion_config.yaml": "plain_face_restore_api.json",
    "examples/config_with_env_vars.yaml": "face_restore_optimized.json",
}

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(COMFYUI is None, reason="COMFYUI_PATH says no ComfyUI"),
    pytest.mark.skipif("LEGIONPOWER_PATH" not in os.environ, reason="LEGIONPOWER_PATH says no LegionPower"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def comfy(
    tmp_path_factory: pytest.TempPathFactory, nothing_left_by_the_module: None
) -> Iterator[ComfyServer]:
    """With LegionPower's folder as it left it; its configurations name workflows of core nodes."""
    base = tmp_path_factory.mktemp("comfyui")
    folder = base / "user" / "default" / FOLDER
    (folder / "workflows").mkdir(parents=True)
    for name in ("config.yaml", "default_legion_config.yaml"):
        shutil.copy(LEGION_POWER / "runtime" / name, folder)
    shutil.copy(LEGION_POWER / "examples" / "simple_passthrough.json", folder / "workflows")
    server = ComfyServer.from_environment(base)
    for workflow in CONFIGURATIONS.values():
        put(server, workflow, worker_flow(*STEPS), FOLDER)
    yield server
    server.stop()


def flow(tmp: Path, settings: str, *, join: bool = False) -> dict[str, Any]:
    """A source through a Master, and through the same steps here; both written down."""
    prompt = {
        "source": node("ProbeSource", seed=1, height=128),
        "config": node("LegionConfig", config_yaml=settings),
        "master": node("LegionMaster", legion_config=["config", 0], input_1=["source", 0]),
        "write": node("ProbeWrite", value=["master", 1], path=str(tmp / "out.npy")),
    }
    if join:
        prompt["all"] = node("LegionJoinAll", campaign_1=["master", 0])
        prompt["join"] = node("LegionJoin", legion_campaign=["all", 0])
        prompt["write"]["inputs"]["value"] = ["join", 0]
    previous = "source"
    for number, (class_type, inputs) in enumerate(STEPS):
        prompt[f"here{number}"] = node(class_type, image=[previous, 0], **inputs)
        previous = f"here{number}"
    prompt["expected"] = node("ProbeWrite", value=[previous, 0], path=str(tmp / "expected.npy"))
    prompt["sent"] = node("ProbeWrite", value=["source", 0], path=str(tmp / "sent.npy"))
    return prompt


def same_bits(one: Path, other: Path) -> bool:
    first, second = np.load(one), np.load(other)
    same: bool = first.shape == second.shape and first.tobytes() == second.tobytes()
    return same


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_its_configurations_run_unchanged_and_the_outputs_are_equal_to_the_bit(
    comfy: ComfyServer, tmp_path: Path, name: str
) -> None:
    comfy.run(flow(tmp_path, (LEGION_POWER / name).read_text(encoding="utf-8")))
    assert same_bits(tmp_path / "out.npy", tmp_path / "expected.npy")


def test_a_new_configuration_node_shows_its_template(comfy: ComfyServer) -> None:
    shown = comfy.get("/object_info/LegionConfig")["LegionConfig"]["input"]["required"]["config_yaml"][1]
    template = (LEGION_POWER / "runtime" / "default_legion_config.yaml").read_text(encoding="utf-8")
    assert shown["default"].strip() == template.strip()


def test_its_example_workflow_runs_unchanged(comfy: ComfyServer, tmp_path: Path) -> None:
    template = (LEGION_POWER / "runtime" / "default_legion_config.yaml").read_text(encoding="utf-8")
    comfy.run(flow(tmp_path, template.replace("plain_face_restore_api.json", "simple_passthrough.json")))
    assert same_bits(tmp_path / "out.npy", tmp_path / "sent.npy")


def test_asynch_with_join_all_and_join_gives_the_same(comfy: ComfyServer, tmp_path: Path) -> None:
    template = (LEGION_POWER / "runtime" / "default_legion_config.yaml").read_text(encoding="utf-8")
    assert "  asynch: false" in template
    comfy.run(flow(tmp_path, template.replace("  asynch: false", "  asynch: true"), join=True))
    assert same_bits(tmp_path / "out.npy", tmp_path / "expected.npy")


def test_its_workflow_without_an_importer_is_one_clear_error(comfy: ComfyServer, tmp_path: Path) -> None:
    target = comfy.base / "user" / "default" / FOLDER / "workflows" / "shipped.json"
    shutil.copy(LEGION_POWER / "runtime" / "workflows" / "plain_face_restore_api.json", target)
    template = (LEGION_POWER / "runtime" / "default_legion_config.yaml").read_text(encoding="utf-8")
    error = comfy.fail(flow(tmp_path, template.replace("plain_face_restore_api.json", "shipped.json")))
    assert error["node_id"] == "master"
    assert "no LegionImporter" in error["exception_message"]
