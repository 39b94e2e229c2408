"""A master that has ComfyUI: makes models, sends them to workers, and writes what came of each scenario.

    python models_driver.py RESULTS.json COMFYUI_PATH BASE_DIRECTORY

Every function named ``scenario_...`` gives a JSON value. ComfyUI and two workers start once.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

WAIT_S = 120.0


def start_comfyui(root: Path, base: Path) -> None:
    """As a program that embeds ComfyUI does it: arguments first, then the nodes, no server."""
    sys.path.insert(0, str(root))
    sys.argv = ["main.py", "--cpu", f"--base-directory={base}"]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("comfy.cli_args")
    importlib.import_module("utils.extra_config")
    nodes = importlib.import_module("nodes")
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def run_node(class_type: str, **inputs: Any) -> Any:
    """A core node in this process, as ComfyUI's executor would call it."""
    import torch

    kind = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[class_type]
    with torch.inference_mode():
        if hasattr(kind, "GET_SCHEMA"):
            output = kind.execute(**inputs)
            result = getattr(output, "result", None) or getattr(output, "args", output)
        else:
            result = getattr(kind(), kind.FUNCTION)(**inputs)
    return result[0]


class World:
    """Two pools of one worker each, and the models that most scenarios use."""

    def __init__(self, root: Path, base: Path) -> None:
        import torch

        from legion_shm import Supervisor, WorkerSpec

        self.torch: Any = torch
        self.models: Any = importlib.import_module("small_models")
        self.pack: Any = importlib.import_module("models_pack")
        self.base = base
        arguments = (
            f"--base-directory={base}",
            "--disable-all-custom-nodes",
            "--whitelist-custom-nodes",
            "legion_models",
            "--disable-api-nodes",
        )
        self.spec = WorkerSpec(
            engine="comfy", comfyui_path=str(root), python_executable=sys.executable, extra_args=arguments
        )
        self.other = self.spec.model_copy(update={"env": {"LEGION_TEST_POOL": "2"}})
        self.legion = Supervisor(arena_quota_bytes=4 << 30)
        self.legion.warm_up(self.spec)
        self.legion.warm_up(self.other)
        self.model = self.models.sd15()
        generator = torch.Generator().manual_seed(0)
        self.cond = [[torch.randn(1, 77, 768, generator=generator), {}]]
        self.uncond = [[torch.randn(1, 77, 768, generator=generator), {}]]
        self.latent = {"samples": torch.zeros(1, 4, 8, 8)}

    def job(self, prompt: dict[str, Any], *inputs: Any, spec: Any = None) -> Any:
        return self.legion.submit(prompt, inputs=list(inputs), spec=spec or self.spec).result(timeout=WAIT_S)

    def apply(self, class_type: str, value: Any, spec: Any = None, name: str = "value", **more: Any) -> Any:
        """One node in a worker, on one value of ours."""
        prompt = {
            "0": node("LegionImporter"),
            "1": node(class_type, **{name: ["0", 0]}, **more),
            "2": node("LegionExporter", input_1=["1", 0]),
        }
        return self.job(prompt, value, spec=spec)["output_1"]

    def sampled(self, model: Any, cond: Any = None, latent: Any = None, steps: int = 2, seed: int = 5) -> Any:
        """The latent that this process samples."""
        return run_node("KSampler", model=model, **self._settings(steps, seed), positive=cond or self.cond,
                        negative=self.uncond, latent_image=latent or self.latent)["samples"]  # fmt: skip

    def sampled_there(
        self,
        model: Any,
        cond: Any = None,
        latent: Any = None,
        steps: int = 2,
        seed: int = 5,
        spec: Any = None,
    ) -> Any:
        """The latent that a worker samples."""
        links = {"model": ["0", 0], "positive": ["0", 1], "negative": ["0", 2], "latent_image": ["0", 3]}
        prompt = {
            "0": node("LegionImporter"),
            "1": node("KSampler", **self._settings(steps, seed), **links),
            "2": node("LegionExporter", input_1=["1", 0]),
        }
        values = (model, cond or self.cond, self.uncond, latent or self.latent)
        return self.job(prompt, *values, spec=spec)["output_1"]["samples"]

    def same(self, here: Any, there: Any) -> bool:
        """To the bit; a random model may well give NaN, which equals nothing."""
        view = self.torch.int32
        return here.dtype == there.dtype and bool(self.torch.equal(here.view(view), there.view(view)))

    def equal(self, model: Any, **more: Any) -> bool:
        return self.same(self.sampled(model, **more), self.sampled_there(model, **more))

    @staticmethod
    def _settings(steps: int, seed: int) -> dict[str, Any]:
        return {
            "seed": seed,
            "steps": steps,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        }

    def blocks(self) -> tuple[int, int]:
        """Bytes and blocks of the master's arena in use."""
        stats = self.legion._memory.stats()
        return stats.live_bytes, stats.blocks

    def wait(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            gc.collect()
            if time.monotonic() > deadline:
                raise TimeoutError(what)
            time.sleep(0.02)


def look(world: World, value: Any) -> list[Any]:
    module = world.pack.torch_module(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return [kind, type(module).__name__, world.pack.digest(module.state_dict().values())]


# --- scenarios ------------------------------------------------------------------------------------------


def shared_pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Shmem:"):
            return int(line.split()[1]) * 1024
    raise LookupError("no Pss_Shmem")


def scenario_memory(world: World) -> Any:
    """First, while the workers map nothing: what two of them with one model take together, of its weights."""
    empty = {"0": node("LegionImporter"), "1": node("LegionExporter", input_1=["0", 0])}
    for spec in (world.spec, world.other):
        world.job(empty, 1, spec=spec)
    pids = [worker.pid for worker in world.legion.workers() if worker.pid]
    before = sum(map(shared_pss, pids))
    world.sampled_there(world.model, steps=1)
    one = sum(map(shared_pss, pids)) - before
    world.sampled_there(world.model, steps=1, spec=world.other)
    weights = sum(p.numel() * p.itemsize for p in world.model.model.parameters())
    return {"weights": weights, "one": one, "both": sum(map(shared_pss, pids)) - before}


def scenario_kinds(world: World) -> Any:
    """Each kind of object there and back: its class and its weights in the worker, and what came back."""
    models = world.models
    made = {
        "MODEL": world.model,
        "MODEL of transformers": models.wan(),
        "CLIP": models.clip(),
        "VAE": models.vae(),
        "VAE, tiny": models.tiny_vae(),
        "CONTROL_NET": models.control_net(),
        "CLIP_VISION": models.clip_vision(world.base),
        "STYLE_MODEL": models.style_model(),
        "UPSCALE_MODEL": models.upscale_model(),
    }
    prompt = {
        "0": node("LegionImporter"),
        "1": node("ModelsLook", value=["0", 0]),
        "2": node("LegionExporter", input_1=["1", 0], input_2=["0", 0]),
    }
    found = {}
    for name, value in made.items():
        result = world.job(prompt, value)
        there = result["output_1"]
        back = result["output_2"]
        found[name] = {
            "here": look(world, value),
            "there": there[:3],
            "process": there[3] != os.getpid(),
            "back": look(world, back),
            "own": world.pack.torch_module(back) is world.pack.torch_module(value),
        }
    return found


def scenario_use(world: World) -> Any:
    """What each kind computes, here and there."""
    torch, models = world.torch, world.models
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    clip, vae, control = models.clip(), models.vae(), models.control_net()
    vision, style, upscale = models.clip_vision(world.base), models.style_model(), models.upscale_model()
    found = {}

    def same(name: str, here: Any, there: Any) -> None:
        found[name] = bool(torch.equal(here, there))

    here = run_node("CLIPTextEncode", clip=clip, text="a (red:1.2) cat")
    there = world.apply("CLIPTextEncode", clip, name="clip", text="a (red:1.2) cat")
    same("CLIP", here[0][0], there[0][0])
    same("CLIP pooled", here[0][1]["pooled_output"], there[0][1]["pooled_output"])
    skipped = run_node("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)
    here = run_node("CLIPTextEncode", clip=skipped, text="a cat")
    same(
        "CLIP, last layer",
        here[0][0],
        world.apply("CLIPTextEncode", skipped, name="clip", text="a cat")[0][0],
    )
    prompt = {
        "0": node("LegionImporter"),
        "1": node("VAEEncode", pixels=["0", 1], vae=["0", 0]),
        "2": node("VAEDecode", samples=["1", 0], vae=["0", 0]),
        "3": node("LegionExporter", input_1=["2", 0]),
    }
    for name, one in (("VAE", vae), ("VAE, tiny", models.tiny_vae())):
        encoded = run_node("VAEEncode", pixels=image, vae=one)
        same(name, run_node("VAEDecode", samples=encoded, vae=one), world.job(prompt, one, image)["output_1"])
    cond = _controlled(world, control, vae, image)
    found["CONDITIONING with a control hint"] = world.equal(world.model, cond=cond)
    prompt = {
        "0": node("LegionImporter"),
        "1": node("CLIPVisionEncode", clip_vision=["0", 0], image=["0", 1], crop="center"),
        "2": node("LegionExporter", input_1=["1", 0]),
    }
    here = run_node("CLIPVisionEncode", clip_vision=vision, image=image, crop="center")
    there = world.job(prompt, vision, image)["output_1"]
    same("CLIP_VISION", here["last_hidden_state"], there["last_hidden_state"])
    same("STYLE_MODEL", world.pack.ModelsStyle().run(style)[0], world.apply("ModelsStyle", style))
    prompt = {
        "0": node("LegionImporter"),
        "1": node("ImageUpscaleWithModel", upscale_model=["0", 0], image=["0", 1]),
        "2": node("LegionExporter", input_1=["1", 0]),
    }
    here = run_node("ImageUpscaleWithModel", upscale_model=upscale, image=image)
    same("UPSCALE_MODEL", here, world.job(prompt, upscale, image)["output_1"])
    return found


def _controlled(world: World, control: Any, vae: Any, image: Any) -> Any:
    control_inputs: dict[str, Any] = {
        "positive": world.cond,
        "negative": world.uncond,
        "control_net": control,
        "image": image,
        "strength": 0.7,
        "start_percent": 0.0,
        "end_percent": 0.8,
    }
    kind = importlib.import_module("nodes").NODE_CLASS_MAPPINGS["ControlNetApplyAdvanced"]
    if "vae" in inspect.signature(getattr(kind, kind.FUNCTION)).parameters:
        control_inputs["vae"] = None
    return run_node("ControlNetApplyAdvanced", **control_inputs)


def scenario_two_workers(world: World) -> Any:
    """Loaded here, sampled in one worker, decoded in another: the image of one process."""
    torch = world.torch
    clip, vae = world.models.clip(), world.models.vae()
    positive = run_node("CLIPTextEncode", clip=clip, text="a cat")
    negative = run_node("CLIPTextEncode", clip=clip, text="")
    latent = run_node("KSampler", model=world.model, **world._settings(2, 3), positive=positive,
                      negative=negative, latent_image=world.latent)  # fmt: skip
    image = run_node("VAEDecode", samples=latent, vae=vae)
    prompt = {
        "0": node("LegionImporter"),
        "1": node("CLIPTextEncode", clip=["0", 1], text="a cat"),
        "2": node("CLIPTextEncode", clip=["0", 1], text=""),
        "3": node("KSampler", model=["0", 0], **world._settings(2, 3), positive=["1", 0], negative=["2", 0],
                  latent_image=["0", 2]),
        "4": node("LegionExporter", input_1=["3", 0]),
    }  # fmt: skip
    first = world.legion.submit(prompt, inputs=[world.model, clip, world.latent], spec=world.spec)
    sampled = first.result(timeout=WAIT_S)
    prompt = {
        "0": node("LegionImporter"),
        "1": node("VAEDecode", samples=["0", 0], vae=["0", 1]),
        "2": node("LegionExporter", input_1=["1", 0]),
    }
    second = world.legion.submit(prompt, inputs=[sampled["output_1"], vae], spec=world.other)
    decoded = second.result(timeout=WAIT_S)
    return {
        "workers": len({sampled.stats.worker_id, decoded.stats.worker_id}),
        "equal": bool(torch.equal(decoded["output_1"], image)),
        "varied": float(image.std()) > 0,
    }


def scenario_transformers(world: World) -> Any:
    model, world_uncond = world.models.wan(), world.uncond
    generator = world.torch.Generator().manual_seed(2)
    cond = [[world.torch.randn(1, 8, 4096, generator=generator), {}]]
    latent = {"samples": world.torch.zeros(1, 16, 2, 8, 8)}
    world.uncond = cond
    try:
        return world.equal(model, cond=cond, latent=latent)
    finally:
        world.uncond = world_uncond


def scenario_patches(world: World) -> Any:
    """Patches that core nodes put into a model: importable, closures, classes made in functions."""
    model = world.model
    recipes: dict[str, dict[str, Any]] = {
        "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
        "HyperTile": {"tile_size": 64, "swap_size": 2, "max_depth": 0, "scale_depth": False},
        "ModelSamplingContinuousEDM": {"sampling": "eps", "sigma_max": 80.0, "sigma_min": 0.002},
        "ModelSamplingDiscrete": {"sampling": "v_prediction", "zsnr": True},
        "PatchModelAddDownscale": {
            "block_number": 1,
            "downscale_factor": 2.0,
            "start_percent": 0.0,
            "end_percent": 0.35,
            "downscale_after_skip": True,
            "downscale_method": "bicubic",
            "upscale_method": "bicubic",
        },
        "PerturbedAttentionGuidance": {"scale": 3.0},
        "RescaleCFG": {"multiplier": 0.7},
        "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
        "TomePatchModel": {"ratio": 0.3},
    }
    plain = world.sampled(model, steps=1)
    found = {}
    for class_type, inputs in recipes.items():
        patched = run_node(class_type, model=model, **inputs)
        here = world.sampled(patched, steps=1)
        there = world.sampled_there(patched, steps=1)
        found[class_type] = [world.same(here, there), not world.same(here, plain)]
    return found


def scenario_lora(world: World) -> Any:
    """A LoRA: sent before the master has loaded it, after, and beside the plain model."""
    torch, model = world.torch, world.model
    loader = importlib.import_module("comfy.sd").load_lora_for_models
    patched, _ = loader(model, None, world.models.lora_of(model), 0.8, 0.0)
    there = world.sampled_there(patched)
    here = world.sampled(patched)
    again = world.sampled_there(patched, seed=6)
    plain = world.sampled_there(model)
    return {
        "equal": bool(torch.equal(here, there)),
        "loaded": bool(torch.equal(world.sampled(patched, seed=6), again)),
        "plain": bool(torch.equal(world.sampled(model), plain)),
        "differs": not torch.equal(here, plain),
        "patches": len(patched.patches),
    }


def scenario_hooks(world: World) -> Any:
    """CONDITIONING whose hooks carry a LoRA."""
    hooks_module = importlib.import_module("comfy.hooks")
    hooks = hooks_module.create_hook_lora(world.models.lora_of(world.model, seed=20), 1.0, 1.0)
    cond = hooks_module.set_hooks_for_conditioning(world.cond, hooks)
    plain = world.sampled(world.model)
    here = world.sampled(world.model, cond=cond)
    return {
        "equal": bool(world.torch.equal(here, world.sampled_there(world.model, cond=cond))),
        "differs": not world.torch.equal(here, plain),
    }


def scenario_dynamic_vram(world: World) -> Any:
    """A worker whose models have the patchers of dynamic VRAM. {} where ComfyUI has none.

    No loader made the first model, so ComfyUI couldn't make a plain patcher of it again.
    """
    if not hasattr(importlib.import_module("comfy.model_patcher"), "ModelPatcherDynamic"):
        return {}
    from safetensors.torch import save_file

    torch, hooks_module = world.torch, importlib.import_module("comfy.hooks")
    spec = world.spec.model_copy(update={"env": {"LEGION_TEST_DYNAMIC_VRAM": "1"}})
    recipe = spec.model_copy(update={"models": "recipe"})
    folder = world.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(world.models.unet_weights(seed=41), folder / "dynamic.safetensors")
    loaded = run_node("UNETLoader", unet_name="dynamic.safetensors", weight_dtype="default")
    hooks = hooks_module.create_hook_lora(world.models.lora_of(world.model, seed=20), 1.0, 1.0)
    cond = hooks_module.set_hooks_for_conditioning(world.cond, hooks)
    found: dict[str, Any] = {"patchers": {}, "hooks": {}, "plain": {}, "back": {}}
    ways = {
        "by reference": (world.model, spec),
        "by reference, loaded": (loaded, spec),
        "by recipe": (loaded, recipe),
    }
    for name, (model, way) in ways.items():
        there = world.apply("ModelsPatchers", model, spec=way)
        found["patchers"][name] = [*there[:3], there[3] == look(world, model)[2]]
        here = world.sampled(model, cond=cond)
        hooked = [world.sampled_there(model, cond=cond, seed=seed, spec=way) for seed in (5, 6, 5)]
        found["hooks"][name] = [world.same(here, hooked[0]), world.same(here, hooked[2])]
        found["plain"][name] = not torch.equal(here, world.sampled(model))
        back = world.apply("ModelsBack", model, spec=way)
        found["back"][name] = [
            back.cached_patcher_init == model.cached_patcher_init,
            world.apply("ModelsPatchers", back, spec=way)[:3] == there[:3],
        ]
    found["unhooked"] = world.apply("ModelsLook", world.model, spec=spec)[2] == look(world, world.model)[2]
    clip = world.models.clip()
    found["clip"] = world.apply("ModelsPatchers", clip, spec=spec)[:3]
    found["gone"] = world.apply("ModelsForget", world.models.sd15(seed=42), spec=spec)
    return found


def scenario_second_transfer(world: World) -> Any:
    """What the second transfer of one model costs."""
    model = world.models.sd15(seed=30)
    before = world.blocks()
    prompt = {
        "0": node("LegionImporter"),
        "1": node("ModelsLook", value=["0", 0]),
        "2": node("LegionExporter", input_1=["1", 0]),
    }
    stats = world.job(prompt, model).stats
    copied = next(item for item in stats.transfers if item.name == "input_1").copied_bytes
    first = world.blocks()
    found = world.job(prompt, model, spec=world.other)
    second = world.blocks()
    sent = next(item for item in found.stats.transfers if item.name == "input_1")
    return {
        "first": first[0] - before[0],
        "first copied": copied,
        "second": second[0] - first[0],
        "copied": sent.copied_bytes,
        "inline": sent.inline_bytes,
        "weights": sum(p.numel() * p.itemsize for p in model.model.parameters()),
    }


def scenario_shared_weights(world: World) -> Any:
    """MODEL and a patched clone of it have one torch module in the worker; so do a VAE and itself."""
    prompt = {
        "0": node("LegionImporter"),
        "1": node("ModelsSame", value=["0", 0], other=["0", 1]),
        "2": node("LegionExporter", input_1=["1", 0]),
    }
    clone = run_node("RescaleCFG", model=world.model, multiplier=0.5)
    other = world.models.sd15(seed=31)
    return [
        world.job(prompt, world.model, clone)["output_1"],
        world.job(prompt, world.model, other)["output_1"],
    ]


def scenario_writes(world: World) -> Any:
    """A node writes into the weights that it got."""
    model = world.models.sd15(seed=32)
    mine = look(world, model)[2]
    before = world.apply("ModelsLook", model, spec=world.other)[2]
    written = world.apply("ModelsWrite", model)
    return {
        "before": before == mine,
        "written": written != mine,
        "other": world.apply("ModelsLook", model, spec=world.other)[2] == mine,
        "master": look(world, model)[2] == mine,
        "same worker, next job": world.apply("ModelsLook", model)[2] == mine,
    }


def scenario_changed_here(world: World) -> Any:
    """Weights that change here, in place or replaced, arrive changed."""
    torch = world.torch
    model = world.models.sd15(seed=33)
    unet = model.model.diffusion_model
    found = []
    world.apply("ModelsLook", model)
    with torch.inference_mode():
        unet.out[2].weight.data.mul_(2)
    found.append(world.apply("ModelsLook", model)[2] == look(world, model)[2])
    unet.out[2].bias = torch.nn.Parameter(torch.ones_like(unet.out[2].bias), requires_grad=False)
    found.append(world.apply("ModelsLook", model)[2] == look(world, model)[2])
    with torch.inference_mode():
        unet.out[2].weight.data.view(-1)[1000] += 1  # neither start, middle nor end
    comfy_models = importlib.import_module("legion_shm.supervisor.comfy_models")
    before = world.blocks()[0]
    comfy_models.models_changed(model)
    found.append(world.apply("ModelsLook", model)[2] == look(world, model)[2])
    world.wait(lambda: world.blocks()[0] <= before, "what was sent before it changed is still there")
    clip = world.models.clip()
    before = run_node("CLIPTextEncode", clip=clip, text="a cat")[0][0]
    world.apply("CLIPTextEncode", clip, name="clip", text="a cat")
    clip.tokenizer.clip_l.start_token = 320  # a part of a part
    here = run_node("CLIPTextEncode", clip=clip, text="a cat")[0][0]
    there = world.apply("CLIPTextEncode", clip, name="clip", text="a cat")[0][0]
    found.append(bool(torch.equal(here, there)) and not torch.equal(here, before))
    return found


def scenario_freed(world: World) -> Any:
    """The master lets go of a model: its bytes go back, though two workers had kept it."""
    gc.collect()
    model = world.models.sd15(seed=35)
    before = world.blocks()[0]
    world.apply("ModelsLook", model)
    world.apply("ModelsLook", model, spec=world.other)
    held = world.blocks()[0] - before
    del model
    world.wait(lambda: world.blocks()[0] <= before, "the model's blocks were not freed")
    return held


def scenario_refused(world: World) -> Any:
    """What can't be sent is named, before anything crosses."""
    from legion_shm import UnsupportedValue

    def own(args: Any) -> Any:
        return args["denoised"]

    model = world.model.clone()
    model.set_model_sampler_post_cfg_function(own)
    try:
        world.apply("ModelsLook", model)
    except UnsupportedValue as error:
        return str(error)
    return ""


def scenario_pack_refused(world: World) -> Any:
    """A patch of a node pack that models may not use can't come back."""
    from legion_shm import UnsupportedValue

    try:
        world.apply("ModelsPatch", world.model)
    except UnsupportedValue as error:
        return str(error)
    return ""


def scenario_pack_allowed(world: World) -> Any:
    """The same, where both sides have the pack and allow it."""
    from legion_shm.supervisor.comfy_models import allow_models_of

    path = str(world.base / "custom_nodes" / "legion_models")
    module_spec = importlib.util.spec_from_file_location(path, path + "/__init__.py")
    assert module_spec is not None
    assert module_spec.loader is not None
    sys.modules[path] = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(sys.modules[path])
    allow_models_of("custom_nodes/legion_models")
    (world.base / "legion_allows.py").write_text(
        "from legion_shm.supervisor.comfy_models import allow_models_of\n"
        "allow_models_of('custom_nodes/legion_models')\n"
    )
    changes = {"codec_modules": ("legion_allows",), "python_path": (str(world.base),)}
    patched = world.apply("ModelsPatch", world.model, spec=world.spec.model_copy(update=changes))
    function = patched.model_options["sampler_post_cfg_function"][0]
    here = world.sampled(patched, steps=1)
    there = world.sampled_there(patched, steps=1, spec=world.spec.model_copy(update=changes))
    return {"function": function is sys.modules[path].half, "equal": world.same(here, there)}


def scenario_from_a_worker(world: World) -> Any:
    """A model that a worker loaded: to the master, and on to the other worker, its weights copied once."""
    torch = world.torch
    from safetensors.torch import save_file

    folder = world.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(world.models.unet_weights(seed=40), folder / "small.safetensors")
    prompt = {
        "1": node("UNETLoader", unet_name="small.safetensors", weight_dtype="default"),
        "2": node("LegionExporter", input_1=["1", 0]),
    }
    first = world.job(prompt)
    model = first["output_1"]
    second = world.job(prompt)["output_1"]
    loader = importlib.import_module("comfy.sd").load_diffusion_model
    own = loader(str(folder / "small.safetensors"))
    before = world.blocks()
    there = world.sampled_there(model, spec=world.other)
    found = {
        "kind": type(model).__name__,
        "here": bool(torch.equal(world.sampled(own), world.sampled(model))),
        "there": bool(torch.equal(world.sampled(own), there)),
        "one": second.model is model.model,
        "copied here": world.blocks()[0] - before[0],
    }
    del model, second, first
    return found


def _loaded_models(world: World) -> dict[str, Any]:
    """Models that ComfyUI's loaders load here from files; by the kind of loader."""
    from safetensors.torch import save_file

    models = world.models
    for name in ("checkpoints", "diffusion_models", "vae", "controlnet", "style_models", "text_encoders"):
        (world.base / "models" / name).mkdir(parents=True, exist_ok=True)
    unet = models.unet_weights(seed=50)
    tiny = models.tiny_vae_weights()
    folder = world.base / "models"
    save_file(unet, folder / "diffusion_models" / "recipe.safetensors")
    save_file(tiny, folder / "vae" / "recipe.safetensors")
    unet = models.unet_weights(seed=51)
    checkpoint = {f"model.diffusion_model.{name}": item for name, item in unet.items()}
    checkpoint |= {f"first_stage_model.{name}": item for name, item in tiny.items()}
    save_file(checkpoint, folder / "checkpoints" / "recipe.safetensors")
    save_file(models.control_net_weights(), folder / "controlnet" / "recipe.safetensors")
    save_file(models.style_model_weights(), folder / "style_models" / "recipe.safetensors")
    text, config = models.clip_weights()
    save_file(text, folder / "text_encoders" / "recipe.safetensors")
    name = "recipe.safetensors"
    classes = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    of_checkpoint = classes["CheckpointLoaderSimple"]().load_checkpoint(name)
    sd = importlib.import_module("comfy.sd")
    return {
        "UNETLoader": run_node("UNETLoader", unet_name=name, weight_dtype="default"),
        "UNETLoader, fp8": run_node("UNETLoader", unet_name=name, weight_dtype="fp8_e4m3fn"),
        "CheckpointLoaderSimple": of_checkpoint[0],
        "CheckpointLoaderSimple, VAE": of_checkpoint[2],
        "VAELoader": run_node("VAELoader", vae_name=name),
        "ControlNetLoader": run_node("ControlNetLoader", control_net_name=name),
        "StyleModelLoader": run_node("StyleModelLoader", style_model_name=name),
        "load_clip": sd.load_clip(
            [str(folder / "text_encoders" / name)],
            clip_type=sd.CLIPType.STABLE_DIFFUSION,
            model_options={"model_config": dict(config), "clip_l_model_config": dict(config)},
        ),
    }


def scenario_recipes(world: World) -> Any:
    """Models that loaders loaded go as the loader's call; the worker reads the file."""
    from legion_shm import Supervisor, UnsupportedValue

    torch = world.torch
    spec = world.spec.model_copy(update={"models": "recipe"})
    auto = world.spec.model_copy(update={"models": "auto"})
    loaded = _loaded_models(world)
    found: dict[str, Any] = {"kinds": {}, "sampled": {}}
    for kind, value in loaded.items():
        before = world.blocks()[0]
        there = world.apply("ModelsLook", value, spec=spec)
        back = world.pack.torch_module(world.apply("ModelsBack", value, spec=spec))
        own = back is world.pack.torch_module(value)
        found["kinds"][kind] = [look(world, value) == there[:3], own, world.blocks()[0] - before]
    for kind in ("UNETLoader", "UNETLoader, fp8", "CheckpointLoaderSimple"):
        here, there = world.sampled(loaded[kind]), world.sampled_there(loaded[kind], spec=spec)
        found["sampled"][kind] = world.same(here, there)
    model = loaded["UNETLoader"]
    loader = importlib.import_module("comfy.sd").load_lora_for_models
    patched, _ = loader(model, None, world.models.lora_of(model), 0.8, 0.0)
    there = world.sampled_there(patched, spec=spec)
    here = world.sampled(patched)
    found["lora"] = [world.same(here, there), not world.same(here, world.sampled_there(model, spec=spec))]
    world.sampled(patched)  # and it stays loaded here with the LoRA in its weights
    found["loaded here"] = world.same(here, world.sampled_there(patched, spec=spec))
    clone = run_node("RescaleCFG", model=model, multiplier=0.5)
    prompt = {
        "0": node("LegionImporter"),
        "1": node("ModelsSame", value=["0", 0], other=["0", 1]),
        "2": node("LegionExporter", input_1=["1", 0]),
    }
    found["one module"] = world.job(prompt, model, clone, spec=spec)["output_1"]
    importlib.import_module("comfy.model_management").unload_all_models()
    mine = look(world, model)[2]
    written = world.apply("ModelsWrite", loaded["VAELoader"], spec=spec)
    vae = look(world, loaded["VAELoader"])[2]
    after = world.apply("ModelsLook", loaded["VAELoader"], spec=spec)[2]
    found["written there"] = [written != vae, after == vae]

    def refusal(value: Any) -> str:
        try:
            world.apply("ModelsLook", value, spec=spec)
        except UnsupportedValue as error:
            return str(error)
        return ""

    found["no loader"] = refusal(world.model)
    with Supervisor(arena_quota_bytes=64 << 20) as small:
        prompt = {
            "0": node("LegionImporter"),
            "1": node("ModelsLook", value=["0", 0]),
            "2": node("LegionExporter", input_1=["1", 0]),
        }
        job = small.submit(prompt, inputs=[model], spec=auto)
        found["no room"] = job.result(timeout=WAIT_S)["output_1"][2] == mine
    before = world.blocks()[0]
    world.apply("ModelsLook", model, spec=auto)
    found["room"] = world.blocks()[0] - before
    with torch.inference_mode():
        model.model.diffusion_model.out[2].weight.mul_(2)
    found["changed"] = refusal(model)
    found["changed, auto"] = world.apply("ModelsLook", model, spec=auto)[2] == look(world, model)[2]
    path = world.base / "models" / "vae" / "recipe.safetensors"
    path.write_bytes(path.read_bytes())
    found["file"] = refusal(loaded["VAELoader"])
    return found


def scenario_loaders(world: World) -> Any:
    """What each loader node loads, both ways."""
    return importlib.import_module("loader_scenario").loaders(world, sys.modules[__name__])


def scenario_quantized(world: World) -> Any:
    """Weights of a kind that can't go by reference go by recipe. [] where there is no such kind."""
    from safetensors.torch import save_file

    from legion_shm import UnsupportedValue

    torch = world.torch
    weights: dict[str, Any] = {"scaled_fp8": torch.tensor([], dtype=torch.float8_e4m3fn)}
    for name, tensor in world.models.unet_weights(seed=60).items():
        weights[name] = tensor
        if tensor.dim() == 2 and "attn" in name and name.endswith(".weight"):
            scale = tensor.abs().max() / 448
            weights[name] = (tensor / scale).to(torch.float8_e4m3fn)
            weights[name.removesuffix("weight") + "scale_weight"] = scale.reshape(())
    folder = world.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "quantized.safetensors")
    model = run_node("UNETLoader", unet_name="quantized.safetensors", weight_dtype="default")
    if all(type(item) is torch.nn.Parameter for item in model.model.parameters()):
        return []
    found: list[Any] = []
    for way in ("auto", "recipe", "auto"):
        there = world.sampled_there(model, spec=world.spec.model_copy(update={"models": way}))
        found.append(world.same(world.sampled(model), there))
    try:
        world.sampled_there(model, spec=world.spec.model_copy(update={"models": "reference"}))
    except UnsupportedValue as error:
        found.append(str(error).startswith("input_1.model."))
    return found


def scenario_worker_killed(world: World) -> Any:
    """Last: a worker that holds a model dies; the master lets go of the model; nothing stays."""
    gc.collect()
    model = world.models.sd15(seed=36)
    before = world.blocks()[0]
    world.apply("ModelsLook", model)
    pid = world.apply("ModelsLook", model)[3]
    os.kill(pid, signal.SIGKILL)
    world.wait(lambda: all(worker.pid != pid for worker in world.legion.workers()), "the worker lived on")
    after = world.apply("ModelsLook", model)[2] == look(world, model)[2]
    del model
    world.wait(lambda: world.blocks()[0] <= before, "the model's blocks were not freed")
    return after


def main() -> None:
    results, root, base = (Path(argument) for argument in sys.argv[1:4])
    chosen = sys.argv[4:]
    start_comfyui(root, base)
    sys.path.append(str(Path(__file__).parent))
    world = World(root, base)
    told: dict[str, Any] = {}
    try:
        for name, scenario in list(globals().items()):
            if name.startswith("scenario_") and (not chosen or name.removeprefix("scenario_") in chosen):
                started = time.monotonic()
                try:
                    value = scenario(world)
                except Exception:
                    value = {"crashed": traceback.format_exc()}
                told[name.removeprefix("scenario_")] = value
                print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    finally:
        world.legion.close()
    results.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
