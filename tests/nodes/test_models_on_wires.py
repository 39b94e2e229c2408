"""Models on a Master's wires: loaded in the real server, sampled in its worker, over HTTP, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.nodes.comfy_server import COMFYUI, PROBE_PACK, PYTHON, REPO, ComfyServer

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(COMFYUI is None, reason="COMFYUI_PATH says no ComfyUI"),
    pytest.mark.timeout(300),
]

_WAIT_S = 200.0

SMALL_MODELS = REPO / "tests" / "comfy" / "small_models.py"

# Small models of ComfyUI's own classes, in place of a checkpoint's; only the server ever makes them.
PACK = f"""{PROBE_PACK}
import importlib.util


class ProbeModels:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"seed": ("INT", {{}})}}}}

    def run(self, seed):
        import multiprocessing

        assert multiprocessing.parent_process() is None, "the worker makes models of its own"
        spec = importlib.util.spec_from_file_location("small_models", {str(SMALL_MODELS)!r})
        small_models = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(small_models)
        return small_models.sd15(seed), small_models.clip(seed + 1), small_models.vae(seed + 2)


NODE_CLASS_MAPPINGS["ProbeModels"] = ProbeModels
"""


@pytest.fixture(scope="module")
def comfy(
    tmp_path_factory: pytest.TempPathFactory, nothing_left_by_the_module: None
) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    server = ComfyServer(Path(COMFYUI or "."), PYTHON, base, probe_pack=PACK)
    yield server
    server.stop()


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def picture(model: list[Any], clip: list[Any], vae: list[Any]) -> dict[str, Any]:
    """From the models to an image, with core nodes alone; its last node is "image"."""
    settings = {"seed": 7, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}
    return {
        "yes": node("CLIPTextEncode", text="a coffee cup", clip=clip),
        "no": node("CLIPTextEncode", text="", clip=clip),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampled": node(
            "KSampler",
            model=model,
            positive=["yes", 0],
            negative=["no", 0],
            latent_image=["latent", 0],
            denoise=1.0,
            **settings,
        ),
        "image": node("VAEDecode", samples=["sampled", 0], vae=vae),
    }


def test_what_a_worker_makes_with_the_servers_models_equals_what_the_server_makes(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    flow = {
        "in": node("LegionImporter"),
        **picture(["in", 0], ["in", 1], ["in", 2]),
        "out": node("LegionExporter", input_1=["image", 0], input_2=["in", 0]),
    }
    models = {f"input_{slot + 1}": ["models", slot] for slot in range(3)}
    prompt = {
        "models": node("ProbeModels", seed=1),
        **picture(["models", 0], ["models", 1], ["models", 2]),
        "expected": node("ProbeWrite", value=["image", 0], path=str(tmp_path / "expected.npy")),
        "config": node("LegionConfig", config_yaml="execution: {extra_args: --cpu}\n"),
        "master": node("LegionMaster", legion_config=["config", 0], workflow_text=json.dumps(flow), **models),
        "write": node("ProbeWrite", value=["master", 1], path=str(tmp_path / "worker.npy")),
        # The model that came back from the worker goes on working in the server.
        **{
            f"back_{name}": back
            for name, back in picture(["master", 2], ["models", 1], ["models", 2]).items()
        },
        "again": node("ProbeWrite", value=["back_image", 0], path=str(tmp_path / "again.npy")),
    }
    for name in ("sampled", "image"):
        for slot, value in prompt[f"back_{name}"]["inputs"].items():
            if isinstance(value, list) and value[0] in ("yes", "no", "latent", "sampled"):
                prompt[f"back_{name}"]["inputs"][slot] = [f"back_{value[0]}", value[1]]
    entry = comfy.wait(comfy.queue(prompt), _WAIT_S)
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"], indent=1)[:6000]
    expected, worker, again = (np.load(tmp_path / f"{name}.npy") for name in ("expected", "worker", "again"))
    assert expected.shape == (1, 64, 64, 3)
    assert float(expected.std()) > 0, "a picture, and not one colour"
    assert worker.tobytes() == expected.tobytes()
    assert again.tobytes() == expected.tobytes()
