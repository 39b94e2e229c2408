"""A value of each type of ComfyUI: tensors, latents, conditioning, what samplers take, numbers and texts.

Imported in a process where ComfyUI is loaded, beside its driver. ``samples()`` gives the rows of the whole
table; `value_media` and `value_models` have the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.comfy import value_media as media
    from tests.comfy import value_models as models
    from tests.comfy.value_making import BEYOND, CoreNode, Given, Row, find, made, prepared, python
else:
    media = importlib.import_module("value_media")
    models = importlib.import_module("value_models")
    from value_making import BEYOND, CoreNode, Given, Row, find, made, prepared, python

__all__ = ["NO_VALUES", "samples"]

_FORM = "a form of inputs: its values are those of the types in it"
_NAME = "core has the name alone: neither a class nor a node"

NO_VALUES = {
    "POINT": _NAME,
    "FACE_ANALYSIS": _NAME,
    "BBOX": _NAME,
    "SEGS": _NAME,
    "COMFY_AUTOGROW_V3": _FORM,
    "COMFY_COMBODYNAMIC_V3": _FORM,
    "COMFY_DYNAMICCOMBO_V3": _FORM,
    "COMFY_DYNAMICSLOT_V3": _FORM,
    "COMFY_MATCHTYPE_V3": _FORM,
    "COMFY_MULTITYPED_V3": _FORM,
}
"""Types that have no values of their own, and why; where a core node gives one, its row has it."""

_WIDE = 2**64 - 1


def image(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 16, 24, 3)


def latent(batch: int = 2) -> dict[str, Any]:
    return {"samples": torch.rand(batch, 4, 8, 8)}


def samples() -> list[Row]:
    """All rows, in no particular order."""
    return [
        *_images(),
        *_latents(),
        *_conditioning(),
        *_sampling(),
        *_numbers(),
        *_texts(),
        *_anything(),
        *media.samples(),
        *models.samples(),
    ]


def _of_dtype(dtype: torch.dtype) -> Callable[[Any], bool]:
    return lambda value: value.dtype == dtype


def _of_rank(rank: int) -> Callable[[Any], bool]:
    return lambda value: value["samples"].dim() == rank


def _images() -> list[Row]:
    kinds = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.uint8)
    picture = CoreNode("EmptyImage", width=16, height=8, batch_size=3, color=0x336699)
    return [
        made("IMAGE", "a batch of colours", "EmptyImage", width=16, height=8, batch_size=2, color=0x336699),
        made("IMAGE", "one of a batch", "ImageFromBatch", image=picture, batch_index=1, length=1),
        made("IMAGE", "inverted", "ImageInvert", image=Given(image())),
        *(
            made("IMAGE", f"{str(kind)[6:]}, from a {str(kind)[6:]} batch", "ImageFromBatch",
                 image=Given(image().to(kind)), batch_index=0, length=1)
            .having(_of_dtype(kind))
            for kind in kinds
        ),
        made("IMAGE", "a list of pictures (OUTPUT_IS_LIST)", "RebatchImages", images=picture, batch_size=1)
        .having(lambda value: type(value) is list and len(value) == 3),
        made("IMAGE", "of no pictures", "ImageInvert", image=Given(image()[:0]))
        .having(lambda value: value.numel() == 0),
        made("IMAGE", "an inference tensor", "ImageInvert", image=Given(_inference))
        .having(lambda value: value.is_inference()),
        python("IMAGE", "on the meta device", torch.empty(1, 2, 2, 3, device="meta"), BEYOND),
        python("IMAGE", "quantized", torch.quantize_per_tensor(image(), 0.1, 0, torch.quint8), BEYOND),
        python("IMAGE", "torch's own nested tensor",
               torch.nested.nested_tensor([torch.rand(8, 8, 3), torch.rand(4, 8, 3)]), BEYOND),
        made("MASK", "solid", "SolidMask", value=0.3, width=16, height=8),
        made("MASK", "of an image", "ImageToMask", image=picture, channel="red"),
    ]  # fmt: skip


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return image() * 0.5


def _stored(rank: int) -> CoreNode:
    """A latent of that rank, read from a file as ComfyUI writes them."""
    save = importlib.import_module("safetensors.torch").save_file
    name = f"rank{rank}.latent"
    tensors = {"latent_tensor": torch.rand([2] * rank), "latent_format_version_0": torch.tensor([])}
    save(tensors, f"{find('folder_paths:get_input_directory')()}/{name}")
    return CoreNode("LoadLatent", latent=name)


def _latents() -> list[Row]:
    masked = CoreNode("SetLatentNoiseMask", samples=Given(latent()), mask=CoreNode("SolidMask", width=64))
    video = CoreNode("EmptyLTXVLatentVideo", width=64, height=64, length=9)
    sound = CoreNode("EmptyLatentAudio", seconds=2.0)
    both = {"video_latent": video, "audio_latent": sound}
    masks = {
        "video_latent": CoreNode("SetLatentNoiseMask", samples=video, mask=CoreNode("SolidMask", width=64)),
        "audio_latent": sound,
    }
    return [
        made("LATENT", "empty", "EmptyLatentImage", width=64, height=64, batch_size=2),
        made("LATENT", "with noise_mask", "SetLatentNoiseMask", samples=Given(latent()),
             mask=CoreNode("SolidMask", width=64, height=64)).having(lambda value: "noise_mask" in value),
        made("LATENT", "with batch_index and noise_mask", "LatentFromBatch", samples=masked, batch_index=1,
             length=1).having(lambda value: value["batch_index"] == [1] and "noise_mask" in value),
        made("LATENT", "with batch_index of two", "LatentBatch",
             samples1=CoreNode("LatentFromBatch", samples=Given(latent())), samples2=Given(latent(3)))
        .having(lambda value: len(value["batch_index"]) == 4),
        made("LATENT", "a list of batches (OUTPUT_IS_LIST)", "RebatchLatents", latents=Given(latent()),
             batch_size=1).having(lambda value: type(value) is list and len(value) == 2),
        made("LATENT", "of a video, rank 5", "EmptyHunyuanLatentVideo", width=64, height=64, length=5)
        .having(_of_rank(5)),
        made("LATENT", "of audio, rank 3, with type", "EmptyLatentAudio", seconds=2.0)
        .having(lambda value: value["samples"].dim() == 3 and value["type"] == "audio"),
        made("LATENT", "nested: picture and sound", "LTXVConcatAVLatent", **both)
        .having(lambda value: type(value["samples"]).__name__ == "NestedTensor"),
        made("LATENT", "nested, with nested noise_mask", "LTXVConcatAVLatent", **masks)
        .having(lambda value: type(value["noise_mask"]).__name__ == "NestedTensor"),
        made("LATENT", "with downscale_ratio_spacial", "EmptySD3LatentImage", width=64)
        .having(lambda value: "downscale_ratio_spacial" in value),
        made("LATENT", "with downscale_ratio_temporal and type", "EmptyLatentAudio", seconds=1.0)
        .having(lambda value: "downscale_ratio_temporal" in value and "type" in value),
        python("LATENT", "every tag at once",
               {**latent(), "downscale_ratio_spacial": 16, "downscale_ratio_temporal": 4, "type": "audio"},
               BEYOND),
        *(
            prepared("LATENT", f"rank {rank}", "LoadLatent", partial(_stored, rank))
            .having(_of_rank(rank))
            for rank in (0, 1, 2, 6)
        ),
    ]  # fmt: skip


def _encoded(text: str = "a photo") -> CoreNode:
    return CoreNode("CLIPTextEncode", text=text, clip=Given(models.clip))


def _conditioning() -> list[Row]:
    cond = _encoded()
    mask = CoreNode("SolidMask", width=64, height=64, value=0.5)
    hooked = {
        "cond_NEW": cond,
        "hooks": _hooks(),
        "mask": mask,
        "timesteps": CoreNode("ConditioningTimestepsRange"),
    }
    shown = CoreNode("CLIPVisionEncode", clip_vision=Given(models.clip_vision), image=Given(image()))
    control = {
        "positive": cond,
        "negative": _encoded(""),
        "control_net": models.control_net,
        "image": Given(image()),
        "strength": 0.7,
        "start_percent": 0.1,
        "end_percent": 0.9,
    }
    return [
        made("CONDITIONING", "a prompt, with pooled_output", "CLIPTextEncode", text="a photo",
             clip=Given(models.clip)).having(_with("pooled_output")),
        made("CONDITIONING", "several entries", "ConditioningCombine", conditioning_1=cond,
             conditioning_2=_encoded("b")).having(lambda value: len(value) == 2),
        made("CONDITIONING", "area", "ConditioningSetArea", conditioning=cond, width=64, height=64, x=8, y=8)
        .having(_with("area")),
        made("CONDITIONING", "area in percent", "ConditioningSetAreaPercentage", conditioning=cond)
        .having(lambda value: value[0][1]["area"][0] == "percentage"),
        made("CONDITIONING", "mask", "ConditioningSetMask", conditioning=cond,
             mask=mask).having(_with("mask")),
        made("CONDITIONING", "timesteps", "ConditioningSetTimestepRange", conditioning=cond, start=0.1,
             end=0.9)
        .having(_with("start_percent", "end_percent")),
        made("CONDITIONING", "guidance", "FluxGuidance", conditioning=cond, guidance=3.5)
        .having(_with("guidance")),
        made("CONDITIONING", "reference_latents", "ReferenceLatent", conditioning=cond,
             latent=Given(latent()))
        .having(_with("reference_latents")),
        made("CONDITIONING", "hooks, mask and timesteps", "ConditioningSetProperties", **hooked)
        .having(_with("hooks", "mask", "start_percent")),
        made("CONDITIONING", "unclip, clip_vision_output", "unCLIPConditioning", conditioning=cond,
             clip_vision_output=shown).having(_with("unclip_conditioning")),
        made("CONDITIONING", "control: a ControlNet with its hint", "ControlNetApplyAdvanced", **control)
        .having(lambda value: value[0][1]["control"].cond_hint_original is not None),
        made("CONDITIONING", "control, of the negative", "ControlNetApplyAdvanced", 1, **control),
        made("CONDITIONING", "gligen", "GLIGENTextBoxApply", conditioning_to=cond, clip=Given(models.clip),
             gligen_textbox_model=models.gligen, text="a cat", width=64, height=64)
        .having(_with("gligen")),
        made("CONDITIONING", "zeroed", "ConditioningZeroOut", conditioning=cond),
        python("CONDITIONING", "pooled_output is None", [[torch.rand(1, 7, 4), {"pooled_output": None}]],
               BEYOND),
        made("CLIP_VISION_OUTPUT", "of pictures", "CLIPVisionEncode", clip_vision=Given(models.clip_vision),
             image=Given(image())),
    ]  # fmt: skip


def _with(*keys: str) -> Callable[[Any], bool]:
    return lambda value: all(key in value[0][1] for key in keys)


def _keyframes() -> CoreNode:
    first = CoreNode("CreateHookKeyframe", strength_mult=0.5, start_percent=0.0)
    return CoreNode("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=first)


def _hooks() -> CoreNode:
    lora = CoreNode("CreateHookLora", lora_name=models.lora, strength_model=0.5, strength_clip=0.25)
    return CoreNode("SetHookKeyframes", hooks=lora, hook_kf=_keyframes())


def _sampling() -> list[Row]:
    names = ("euler", "dpmpp_2m_sde", "uni_pc", "ddim", "lcm", "dpm_fast", "dpm_adaptive")
    guided = {"model": models.unet, "positive": _encoded(), "negative": _encoded("")}
    return [
        made("SIGMAS", "Karras", "KarrasScheduler", steps=8),
        made("SIGMAS", "of a model", "BasicScheduler", model=models.unet, steps=4),
        made("SIGMAS", "flipped", "FlipSigmas", sigmas=CoreNode("KarrasScheduler", steps=8)),
        made("SIGMAS", "the low ones, a view", "SplitSigmas", 1, step=3,
             sigmas=CoreNode("KarrasScheduler", steps=8))
        .having(lambda value: value.storage_offset() > 0),
        made("NOISE", "random", "RandomNoise", noise_seed=_WIDE),
        made("NOISE", "none", "DisableNoise"),
        *(made("SAMPLER", name, "KSamplerSelect", sampler_name=name) for name in names),
        made("SAMPLER", "with options", "SamplerEulerAncestral", eta=0.9, s_noise=1.1),
        made("GUIDER", "CFG, with its model", "CFGGuider", cfg=3.0, **guided),
        made("GUIDER", "basic", "BasicGuider", model=models.unet, conditioning=_encoded()),
        made("GUIDER", "dual CFG", "DualCFGGuider", model=models.unet, cond1=_encoded("a"),
             cond2=_encoded("b"),
             negative=_encoded("")),
        made("GUIDER", "perp-neg", "PerpNegGuider", empty_conditioning=_encoded(""), **guided),
        made("HOOKS", "LoRA with keyframes", "SetHookKeyframes", hooks=_hooks(), hook_kf=_keyframes()),
        made("HOOKS", "two", "CombineHooks2", hooks_A=_hooks(), hooks_B=_hooks()),
        made("HOOK_KEYFRAMES", "two", "CreateHookKeyframe", prev_hook_kf=_keyframes()),
        made("HOOK_KEYFRAMES", "interpolated", "CreateHookKeyframesInterpolated"),
        python("FLOATS", "strengths", [0.25, 0.5]),
        made("TIMESTEPS_RANGE", "the first part", "ConditioningTimestepsRange", start_percent=0.2,
             end_percent=0.8),
        made("LATENT_OPERATION", "a closure", "LatentOperationTonemapReinhard", multiplier=1.5),
        made("LATENT_OPERATION", "sharpen", "LatentOperationSharpen", sharpen_radius=3, sigma=1.0, alpha=0.1),
    ]  # fmt: skip


def _numbers() -> list[Row]:
    most = 2**63 - 1
    return [
        made("INT", "2**63 - 1, the widget's most", "PrimitiveInt", value=most),
        made("INT", "1 - 2**63, the widget's least", "PrimitiveInt", value=-most),
        *(
            made("INT", f"{text}, by a link", "PrimitiveInt", value=Given(value))
            for text, value in (("2**64 - 1", _WIDE), ("-2**63", -most - 1), ("2**200", 2**200))
        ),
        *(
            made("FLOAT", repr(value), "PrimitiveFloat", value=value)
            for value in (0.1, -0.0, float("nan"), 5e-324, 2.0**63 - 1024)
        ),
        made("FLOAT", "inf, by a link", "PrimitiveFloat", value=Given(float("inf"))),
        made("FLOAT", "-inf, by a link", "PrimitiveFloat", value=Given(float("-inf"))),
        made("BOOLEAN", "True", "PrimitiveBoolean", value=True),
        made("BOOLEAN", "False, of a comparison", "StringCompare", string_a="a", string_b="b"),
        python("FLOAT,INT", "either", 3),
        python("STRING,FLOAT,INT,BOOLEAN", "any of them", "x"),
    ]  # fmt: skip


def _texts() -> list[Row]:
    return [
        *(
            made("STRING", text, "PrimitiveString", value=value)
            for text, value in (
                ("words", "a photo"), ("empty", ""), ("lone surrogate", "\ud800"), ("NUL", "a\0b"),
                ("1 MB", "x" * 2**20),
            )
        ),
        made("STRING", "of two", "StringConcatenate", string_a="a", string_b="b", delimiter="\n"),
        python("COMBO", "a choice", "euler"),
        python("COMBO", "several choices", ["a", "b"], BEYOND),
    ]  # fmt: skip


def _anything() -> list[Row]:
    def switch(chosen: bool) -> dict[str, Any]:
        return {
            "switch": chosen,
            "on_true": Given(image()),
            "on_false": CoreNode("PrimitiveString", value="x"),
        }

    return [
        made("COMFY_MATCHTYPE_V3", "a picture", "ComfySwitchNode", **switch(True)),
        made("COMFY_MATCHTYPE_V3", "a list of texts (INPUT_IS_LIST, OUTPUT_IS_LIST)", "CreateList",
             inputs__input0=CoreNode("PrimitiveString", value="a"),
             inputs__input1=CoreNode("PrimitiveString", value="b")),
        python("*", "None", None),
        python("*", "a list of pictures", [image(1), image(3)]),
        python("*", "Fraction, set, tuple keys", {("a", 1): {1, 2}, 2: Fraction(1, 3)}),
        python("*", "an enum of ComfyUI's", lambda: find("comfy.hooks:EnumHookScope").HookedOnly),
        python("*", "one tensor three times", _shared),
        python("*", "a list that is in itself", _cycle),
        python("*", "an object of no known class", object),
        python("FLOW_CONTROL", "open", ("open", 3)),
        python("ACCUMULATION", "items", {"accum": [1, image(1)]}),
    ]  # fmt: skip


def _shared() -> dict[str, Any]:
    one = image(1)
    return {"a": one, "b": [one, (one,)]}


def _cycle() -> list[Any]:
    items: list[Any] = [1]
    items.append(items)
    return items
