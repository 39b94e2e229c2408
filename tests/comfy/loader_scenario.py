"""What ComfyUI's loader nodes load, sent by reference and by recipe: a scenario of models_driver.py."""

from __future__ import annotations

import importlib
from typing import Any


def loaders(world: Any, driver: Any) -> Any:
    """What each loader node loads, both ways: its weights there, and what is computed with it."""
    torch, node, run_node, look = world.torch, driver.node, driver.run_node, driver.look
    files = importlib.import_module("loader_files").LoaderFiles(
        world.models, world.pack, world.base, run_node
    )
    small = world.spec.model_copy(update={"env": {"LEGION_TEST_CONFIGURATIONS": str(world.base)}})
    specs = {way: small.model_copy(update={"models": way}) for way in ("reference", "recipe")}
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    clips = files.clips()
    model, vae, vision = files.unclip_checkpoint()
    made = {
        **clips,
        "CLIPVisionLoader": files.clip_vision(),
        "unCLIPCheckpointLoader, MODEL": model,
        "unCLIPCheckpointLoader, VAE": vae,
        "unCLIPCheckpointLoader, CLIP_VISION": vision,
        "load_checkpoint_guess_config, CLIP": files.checkpoint_clip(),
        "UpscaleModelLoader": files.upscale_model(),
        "GLIGENLoader": files.gligen_model(),
    }
    found: dict[str, Any] = {"kinds": {}, "computed": {}}
    for way, spec in specs.items():
        for name, value in made.items():
            before = world.blocks()[0]
            there = world.apply("ModelsLook", value, spec=spec)
            back = world.apply("ModelsBack", value, spec=spec)
            own = world.pack.torch_module(back) is world.pack.torch_module(value)
            weights = sum(item.nbytes for item in world.pack.torch_module(value).state_dict().values())
            placed = (world.blocks()[0] - before) / weights
            # SD1.5's file says nothing about one weight, which each loading leaves as it finds the memory.
            part = slice(2) if name == "load_checkpoint_guess_config, CLIP" and way == "recipe" else slice(3)
            found["kinds"][f"{name}, {way}"] = [
                look(world, value)[part] == there[part],
                own,
                round(placed, 2),
            ]

    def same(name: str, here: Any, there: Any) -> None:
        varied = float(here.float().std()) > 0
        found["computed"][name] = [world.same(here.float(), there.float()), varied]

    for name, value in made.items():
        for way, spec in specs.items():
            if "CLIPLoader" in name or name.endswith(", CLIP"):
                here = run_node("CLIPTextEncode", clip=value, text="a")
                there = world.apply("CLIPTextEncode", value, name="clip", text="a", spec=spec)
                same(f"{name}, {way}", here[0][0], there[0][0])
            elif "VISION" in name or "Vision" in name:
                prompt = {
                    "0": node("LegionImporter"),
                    "1": node("CLIPVisionEncode", clip_vision=["0", 0], image=["0", 1], crop="center"),
                    "2": node("LegionExporter", input_1=["1", 0]),
                }
                here = run_node("CLIPVisionEncode", clip_vision=value, image=image, crop="center")
                there = world.job(prompt, value, image, spec=spec)["output_1"]
                same(f"{name}, {way}", here["image_embeds"], there["image_embeds"])
            elif name == "UpscaleModelLoader":
                prompt = {
                    "0": node("LegionImporter"),
                    "1": node("ImageUpscaleWithModel", upscale_model=["0", 0], image=["0", 1]),
                    "2": node("LegionExporter", input_1=["1", 0]),
                }
                here = run_node("ImageUpscaleWithModel", upscale_model=value, image=image)
                same(f"{name}, {way}", here, world.job(prompt, value, image, spec=spec)["output_1"])
    _sample_with_loaders(world, run_node, files, made, specs, same)
    return found


def _sample_with_loaders(
    world: Any, run_node: Any, files: Any, made: dict[str, Any], specs: dict[str, Any], same: Any
) -> None:
    """What goes into a sampler beside a MODEL of UNETLoader: unCLIP, GLIGEN and LoRA."""
    torch = world.torch
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    files.save("diffusion_models", world.models.unet_weights(seed=82))
    plain = run_node("UNETLoader", unet_name=files.name, weight_dtype="default")
    clip = world.models.clip()
    lora = files.lora(plain)
    seen = run_node(
        "CLIPVisionEncode",
        clip_vision=made["unCLIPCheckpointLoader, CLIP_VISION"],
        image=image,
        crop="center",
    )
    wide = [[torch.randn(1, 77, 1024, generator=torch.Generator().manual_seed(3)), {}]]
    unclip = run_node(
        "unCLIPConditioning",
        conditioning=wide,
        clip_vision_output=seen,
        strength=1.0,
        noise_augmentation=0.0,
    )
    boxes = run_node(
        "GLIGENTextBoxApply",
        conditioning_to=world.cond,
        clip=clip,
        gligen_textbox_model=made["GLIGENLoader"],
        text="a cat",
        width=32,
        height=32,
        x=8,
        y=8,
    )
    loras = {
        "LoraLoader": {"clip": clip, "strength_model": 0.8, "strength_clip": 0.5},
        "LoraLoaderModelOnly": {"strength_model": 0.8},
        "LoraLoaderBypassModelOnly": {"strength_model": 0.8},
    }
    known = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    cases: dict[str, tuple[Any, Any, Any]] = {
        "unCLIP": (made["unCLIPCheckpointLoader, MODEL"], unclip, wide),
        "GLIGEN": (plain, boxes, world.uncond),
    }
    for name, inputs in loras.items():
        if name in known:
            cases[name] = (
                run_node(name, model=plain, lora_name=lora, **inputs),
                world.cond,
                world.uncond,
            )
    usual, without = world.uncond, world.sampled(plain)
    for name, (model, cond, uncond) in cases.items():
        world.uncond = uncond
        try:
            here = world.sampled(model, cond=cond)
            for way, spec in specs.items():
                same(f"{name}, {way}", here, world.sampled_there(model, cond=cond, spec=spec))
        finally:
            world.uncond = usual
        assert name == "unCLIP" or not torch.equal(here, without), f"{name} changes nothing"
