"""ComfyUI's models between a master that has ComfyUI and its workers: see models_driver.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from legion_shm import Supervisor, WorkerSpec
from legion_shm.supervisor.comfy_source import ModelReference
from tests.comfy.conftest import REPOSITORY, RealComfyUI

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(900)]

_HERE = Path(__file__).parent
_WAIT_S = 240
_PATCHES = ("ModelSamplingContinuousEDM", "ModelSamplingDiscrete", "PatchModelAddDownscale", "RescaleCFG")


@pytest.fixture(scope="module")
def base(comfyui: RealComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("input", "models/diffusion_models", "output", "temp", "custom_nodes/legion_models"):
        (folder / name).mkdir(parents=True)
    shutil.copy(_HERE / "models_pack.py", folder / "custom_nodes/legion_models/__init__.py")
    return folder


@pytest.fixture(scope="module")
def told(comfyui: RealComfyUI, base: Path) -> dict[str, Any]:
    """What every scenario of the driver told."""
    results = base / "results.json"
    done = subprocess.run(
        [comfyui.python, _HERE / "models_driver.py", results, comfyui.path, base],
        cwd=base,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    told: dict[str, Any] = json.loads(results.read_text())
    crashed = [value["crashed"] for value in told.values() if isinstance(value, dict) and "crashed" in value]
    assert not crashed, "\n".join(crashed)
    return told


@pytest.mark.parametrize(
    "kind",
    [
        "MODEL",
        "MODEL of transformers",
        "CLIP",
        "VAE",
        "VAE, tiny",
        "CONTROL_NET",
        "CLIP_VISION",
        "STYLE_MODEL",
        "UPSCALE_MODEL",
    ],
)
def test_each_kind_of_model_arrives_as_what_it_was_and_comes_back(told: dict[str, Any], kind: str) -> None:
    found = told["kinds"][kind]
    assert found["process"]
    assert found["there"] == found["here"]
    assert found["back"] == found["here"]


def test_what_comes_back_is_the_very_module_that_was_sent(told: dict[str, Any]) -> None:
    assert told["kinds"]["MODEL"]["own"]
    assert told["kinds"]["CLIP"]["own"]


def test_each_kind_of_model_computes_the_same_to_the_bit(told: dict[str, Any]) -> None:
    assert [name for name, equal in told["use"].items() if not equal] == []
    assert "CONDITIONING with a control hint" in told["use"]
    assert told["transformers"]


def test_a_workflow_over_two_workers_gives_the_image_of_one_process(told: dict[str, Any]) -> None:
    assert told["two_workers"] == {"workers": 2, "equal": True, "varied": True}


def test_what_core_nodes_patch_into_a_model_goes_with_it(told: dict[str, Any]) -> None:
    assert [name for name, (equal, _) in told["patches"].items() if not equal] == []
    assert [name for name in _PATCHES if not told["patches"][name][1]] == [], "patches that change nothing"


def test_a_lora_goes_with_its_model(told: dict[str, Any]) -> None:
    found = told["lora"]
    assert found["patches"] > 0
    assert found["equal"]
    assert found["differs"]


def test_a_model_that_is_loaded_with_a_lora_is_sent_without_what_was_patched_in(told: dict[str, Any]) -> None:
    assert told["lora"]["loaded"]
    assert told["lora"]["plain"]


def test_hooks_of_a_conditioning_go_with_it(told: dict[str, Any]) -> None:
    assert told["hooks"] == {"equal": True, "differs": True}


def test_a_worker_with_dynamic_vram_makes_plain_patchers_of_models_that_it_did_not_load(
    told: dict[str, Any],
) -> None:
    found = told["dynamic_vram"]
    if not found:
        pytest.skip("this ComfyUI has no dynamic VRAM")
    for seen in found["patchers"].values():
        assert seen == ["ModelPatcherDynamic", "ModelPatcher", True, True]
    assert found["clip"] == ["ModelPatcherDynamic", "ModelPatcher", True]
    assert all(all(equal) for equal in found["hooks"].values()), found["hooks"]
    assert all(found["plain"].values()), "the hooks change nothing"
    assert found["unhooked"], "what hooks wrote stayed in the weights"
    assert all(all(right) for right in found["back"].values()), found["back"]


def test_a_model_that_can_not_be_built_again_for_dynamic_vram_is_refused_with_what_to_do(
    told: dict[str, Any],
) -> None:
    if not told["dynamic_vram"]:
        pytest.skip("this ComfyUI has no dynamic VRAM")
    assert told["dynamic_vram"]["gone"].startswith("UnsupportedValue: ComfyUI wants this model a second time")
    assert told["dynamic_vram"]["gone"].endswith("start this ComfyUI with --disable-dynamic-vram")


def test_the_second_transfer_sends_handles_only(told: dict[str, Any]) -> None:
    found = told["second_transfer"]
    assert found["weights"] <= found["first"] < 1.01 * found["weights"]
    assert found["first copied"] > 0.99 * found["weights"]
    assert (found["second"], found["copied"]) == (0, 0)
    assert found["inline"] < 10_000


def test_a_model_and_its_patched_clone_share_one_module(told: dict[str, Any]) -> None:
    assert told["shared_weights"] == [True, False]


def test_what_a_node_writes_into_weights_is_seen_by_nobody_else(told: dict[str, Any]) -> None:
    assert all(told["writes"].values()), told["writes"]


def test_weights_that_changed_in_the_master_arrive_changed(told: dict[str, Any]) -> None:
    assert told["changed_here"] == [True, True, True, True]


def test_two_workers_share_the_memory_of_a_model(told: dict[str, Any]) -> None:
    found = told["memory"]
    assert found["one"] > 0.9 * found["weights"]
    assert found["both"] < 1.3 * found["one"]


def test_a_model_that_the_master_lets_go_gives_its_memory_back(told: dict[str, Any]) -> None:
    assert told["freed"] > 100_000_000


def test_a_worker_that_dies_with_a_model_leaves_nothing_leased(told: dict[str, Any]) -> None:
    assert told["worker_killed"]


def test_what_is_not_allowed_is_named_with_its_path(told: dict[str, Any]) -> None:
    assert told["refused"].startswith("input_1.model_options['sampler_post_cfg_function'][0]: __main__.")
    assert told["pack_refused"].startswith("output_1.model_options['sampler_post_cfg_function'][0]: ")


def test_a_node_packs_patch_goes_where_both_sides_allow_the_pack(told: dict[str, Any]) -> None:
    assert told["pack_allowed"] == {"function": True, "equal": True}


def test_a_model_that_a_worker_loaded_goes_to_the_master_and_on(told: dict[str, Any]) -> None:
    found = told["from_a_worker"]
    assert found["kind"] == "ModelPatcher"
    assert found["here"]
    assert found["there"]
    assert found["one"]
    assert found["copied here"] < 1_000_000


def test_a_master_without_comfyui_hands_a_model_from_worker_to_worker(
    told: dict[str, Any], comfyui: RealComfyUI, base: Path
) -> None:
    assert told["from_a_worker"], "it left the checkpoint that this test loads"
    spec = WorkerSpec(
        engine="comfy",
        comfyui_path=str(comfyui.path),
        python_executable=str(comfyui.python),
        extra_args=(
            f"--base-directory={base}",
            "--disable-all-custom-nodes",
            "--whitelist-custom-nodes",
            "legion_models",
            "--disable-api-nodes",
        ),
    )
    load = {
        "1": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "small.safetensors", "weight_dtype": "default"},
        },
        "2": {"class_type": "ModelsLook", "inputs": {"value": ["1", 0]}},
        "3": {"class_type": "LegionExporter", "inputs": {"input_1": ["1", 0], "input_2": ["2", 0]}},
    }
    look = {
        "1": {"class_type": "LegionImporter", "inputs": {}},
        "2": {"class_type": "ModelsLook", "inputs": {"value": ["1", 0]}},
        "3": {"class_type": "LegionExporter", "inputs": {"input_1": ["2", 0]}},
    }
    other = spec.model_copy(update={"env": {"LEGION_TEST_POOL": "2"}})
    with Supervisor() as legion:
        legion.warm_up(other)
        loaded = legion.submit(load, spec=spec).result(timeout=_WAIT_S)
        model = loaded["output_1"]
        assert type(model) is ModelReference
        seen = legion.submit(look, inputs=[model], spec=other).result(timeout=_WAIT_S)
        assert seen["output_1"][:3] == loaded["output_2"][:3]
        assert seen["output_1"][3] != loaded["output_2"][3], "the same process"
        assert sum(transfer.copied_bytes for transfer in seen.stats.transfers) == 0


_SAMPLED = ("UNETLoader", "UNETLoader, fp8", "CheckpointLoaderSimple")
_LOADERS = (
    *_SAMPLED,
    "CheckpointLoaderSimple, VAE",
    "VAELoader",
    "ControlNetLoader",
    "StyleModelLoader",
    "load_clip",
)


@pytest.mark.parametrize("loader", _LOADERS)
def test_what_a_loader_loaded_can_be_loaded_by_the_worker_itself(told: dict[str, Any], loader: str) -> None:
    equal, own, placed = told["recipes"]["kinds"][loader]
    assert equal
    assert own, "another module came back than was sent"
    assert placed < 3_000_000, "the weights went through the arena"


def test_a_model_by_recipe_samples_the_same_to_the_bit(told: dict[str, Any]) -> None:
    assert set(told["recipes"]["sampled"]) == set(_SAMPLED)
    assert all(told["recipes"]["sampled"].values())


def test_patches_go_with_a_model_by_recipe(told: dict[str, Any]) -> None:
    assert told["recipes"]["lora"] == [True, True]
    assert told["recipes"]["loaded here"], "it was sent as the LoRA in its weights had made it"
    assert told["recipes"]["one module"], "a clone was loaded a second time"


def test_weights_by_recipe_that_a_node_wrote_into_are_read_anew(
    told: dict[str, Any],
) -> None:
    assert told["recipes"]["written there"] == [True, True]


def test_a_recipe_that_would_not_be_exact_is_refused_with_its_reason(told: dict[str, Any]) -> None:
    found = told["recipes"]
    assert "made by none of ComfyUI's loaders" in found["no loader"]
    assert "diffusion_model.out.2.weight was changed since" in found["changed"]
    assert "vae/recipe.safetensors has changed since the model was loaded" in found["file"]
    for text in (found["no loader"], found["changed"], found["file"]):
        assert text.startswith("input_1.")
        assert text.endswith("use models: auto or reference")


def test_auto_sends_by_reference_and_by_recipe_only_where_the_arena_has_no_room(told: dict[str, Any]) -> None:
    assert told["recipes"]["no room"]
    assert told["recipes"]["room"] > 100_000_000
    assert told["recipes"]["changed, auto"]


def test_quantized_weights_which_can_not_go_by_reference_go_by_recipe(told: dict[str, Any]) -> None:
    if not told["quantized"]:
        pytest.skip("this ComfyUI has no tensors of such a kind")
    assert told["quantized"] == [True, True, True, True]


_OF_NODES = (
    "DualCLIPLoader",
    "DualCLIPLoader, sd3",
    "TripleCLIPLoader",
    "QuadrupleCLIPLoader",
    "CLIPVisionLoader",
    "unCLIPCheckpointLoader, MODEL",
    "unCLIPCheckpointLoader, VAE",
    "unCLIPCheckpointLoader, CLIP_VISION",
    "load_checkpoint_guess_config, CLIP",
    "UpscaleModelLoader",
    "GLIGENLoader",
)
_WAYS = ("reference", "recipe")


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("loader", _OF_NODES)
def test_what_a_node_loaded_crosses_the_way_that_the_user_says(
    told: dict[str, Any], loader: str, way: str
) -> None:
    equal, own, placed = told["loaders"]["kinds"][f"{loader}, {way}"]
    assert equal
    assert own, "another module came back than was sent"
    assert placed >= 1 if way == "reference" else placed < 0.01, "bytes in the arena, to those of the weights"


@pytest.mark.parametrize("way", _WAYS)
def test_what_a_node_loaded_computes_the_same_to_the_bit_either_way(told: dict[str, Any], way: str) -> None:
    computed = {name: told for name, told in told["loaders"]["computed"].items() if name.endswith(way)}
    assert {name.rpartition(",")[0] for name in computed} - {"LoraLoaderBypassModelOnly"} == {
        *(name for name in _OF_NODES if not name.endswith((", MODEL", ", VAE")) and name != "GLIGENLoader"),
        *("GLIGEN", "LoraLoader", "LoraLoaderModelOnly", "unCLIP"),
    }
    assert [name for name, (equal, _) in computed.items() if not equal] == []
    assert [name for name, (_, varied) in computed.items() if not varied] == [], "the same for any model"
