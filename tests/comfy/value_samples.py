"""A real value of each type of ComfyUI, made by a core node or by the class that core's nodes make.

Imported in a process where ComfyUI is loaded. ``samples()`` gives (type, what it is, who makes it, function);
a sample whose node or class this version of ComfyUI lacks raises `Missing`.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch

__all__ = ["MODELS", "Missing", "known_types", "samples"]

Row = tuple[str, str, str, Callable[[], Any]]


class Missing(Exception):
    """This version of ComfyUI has no such node or class."""


def run(name: str, **inputs: Any) -> tuple[Any, ...]:
    """The outputs of a core node, of either of ComfyUI's two interfaces."""
    cls = importlib.import_module("nodes").NODE_CLASS_MAPPINGS.get(name)
    if cls is None:
        raise Missing(name)
    if hasattr(cls, "define_schema"):
        result = cls.execute(**inputs)
        return tuple(getattr(result, "args", result))
    return tuple(getattr(cls(), cls.FUNCTION)(**inputs))


def find(*names: str) -> Any:
    """The first of these classes or functions (``module:name``) that there is."""
    for name in names:
        module, _, attribute = name.partition(":")
        # ComfyUI loads its extra nodes by their paths; another import would make the classes a second time.
        path = module.replace(".", "/")
        loaded = next((item for key, item in sys.modules.items() if key.endswith(f"/{path}")), None)
        try:
            return getattr(loaded or importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
    raise Missing(names[0])


def known_types() -> dict[str, int]:
    """Every type name that this ComfyUI has, and how many outputs of its core nodes are of it."""
    found: dict[str, int] = {member.value: 0 for member in find("comfy.comfy_types:IO")}
    for item in vars(importlib.import_module("comfy_api.latest._io")).values():
        if isinstance(item, type) and isinstance(getattr(item, "io_type", None), str):
            found.setdefault(item.io_type, 0)  # type: ignore[attr-defined]
    for name, cls in importlib.import_module("nodes").NODE_CLASS_MAPPINGS.items():
        if not name.startswith("Legion"):
            for item in cls.RETURN_TYPES or ():
                kind = str(getattr(item, "value", item)) if isinstance(item, str) else "COMBO"
                found[kind] = found.get(kind, 0) + 1
    return found


def plain(kind: str, what: str, value: Any) -> Row:
    return (kind, what, "Python", lambda: value)


def node(kind: str, what: str, name: str, slot: int = 0, /, **inputs: Any) -> Row:
    def make() -> Any:
        given = {key: item() if callable(item) else item for key, item in inputs.items()}
        return run(name, **given)[slot]

    return (kind, what, name, make)


def image(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 16, 24, 3)


def cond(**more: Any) -> list[Any]:
    return [[torch.rand(1, 77, 32), {"pooled_output": torch.rand(1, 32), **more}]]


def audio() -> dict[str, Any]:
    return {"waveform": torch.rand(1, 2, 4410) * 2 - 1, "sample_rate": 44100}


def nested() -> Any:
    return find("comfy.nested_tensor:NestedTensor")([torch.rand(1, 4, 8, 8), torch.rand(1, 8, 16)])


def video() -> Any:
    return run("CreateVideo", images=image(), fps=24.0, audio=audio())[0]


def hooks() -> Any:
    lora = {"lora_unet_x.lora_up.weight": torch.rand(4, 2), "lora_unet_x.lora_down.weight": torch.rand(2, 4)}
    group = find("comfy.hooks:create_hook_lora")(lora, 0.5, 0.25)
    return run("SetHookKeyframes", hooks=group, hook_kf=keyframes())[0]


def keyframes() -> Any:
    first = run("CreateHookKeyframe", strength_mult=0.5, start_percent=0.0)[0]
    return run("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=first)[0]


def clip_vision_output() -> Any:
    output = find("comfy.clip_vision:Output")()
    output["last_hidden_state"], output["image_embeds"] = torch.rand(1, 257, 8), torch.rand(1, 8)
    output["penultimate_hidden_states"], output["mm_projected"] = torch.rand(1, 257, 8), None
    return output


def mesh() -> Any:
    faces = torch.tensor([[[0, 1, 2], [0, 2, 3]]])
    return find("comfy_api.latest._util.geometry_types:MESH", "comfy_extras.nodes_hunyuan3d:MESH")(
        torch.rand(1, 4, 3), faces
    )


def voxel() -> Any:
    return find("comfy_api.latest._util.geometry_types:VOXEL", "comfy_extras.nodes_hunyuan3d:VOXEL")(
        torch.rand(1, 8, 8, 8)
    )


def file_3d(kind: str) -> Row:
    def make() -> Any:
        return find("comfy_api.latest._util.geometry_types:File3D")(io.BytesIO(b"solid x"), kind)

    return (f"FILE_3D_{kind.upper()}", "in memory", "File3D", make)


def bare(kind: str, *names: str) -> Row:
    """An instance that was never initialized: enough to see what becomes of its class."""
    return (kind, names[0].rpartition(":")[2], "the class", lambda: object.__new__(find(*names)))


def _module(kind: str, *names: str) -> Row:
    def make() -> Any:
        value = object.__new__(find(*names))
        torch.nn.Module.__init__(value)
        return value

    return (kind, names[0].rpartition(":")[2], "the class", make)


def _patcher() -> Any:
    """A model as patchers hold it: its own kind does not matter to how it crosses (test_comfy_models.py)."""
    cpu = torch.device("cpu")
    return find("comfy.model_patcher:ModelPatcher")(torch.nn.Linear(2, 2), cpu, cpu)


def patcher(kind: str) -> Row:
    return (kind, "ModelPatcher", "the class", _patcher)


def _control() -> Any:
    return find("comfy.controlnet:ControlNet")(torch.nn.Linear(2, 2), load_device=torch.device("cpu"))


def _guider() -> Any:
    return run("CFGGuider", model=_patcher(), positive=cond(), negative=cond(), cfg=3.0)[0]


MODELS = [
    patcher("MODEL"),
    bare("CLIP", "comfy.sd:CLIP"),
    bare("VAE", "comfy.sd:VAE"),
    ("CONTROL_NET", "ControlNet", "the class", _control),
    bare("CLIP_VISION", "comfy.clip_vision:ClipVisionModel"),
    bare("STYLE_MODEL", "comfy.sd:StyleModel"),
    patcher("GLIGEN"),
    bare("UPSCALE_MODEL", "spandrel:ImageModelDescriptor"),
    bare("LATENT_UPSCALE_MODEL", "comfy.ldm.hunyuan_video.upsampler:HunyuanVideo15SRModel"),
    bare("BACKGROUND_REMOVAL", "comfy.bg_removal_model:BackgroundRemovalModel"),
    patcher("MODEL_PATCH"),
    bare("AUDIO_ENCODER", "comfy.audio_encoders.audio_encoders:AudioEncoderModel"),
    _module("PHOTOMAKER", "comfy_extras.nodes_photomaker:PhotoMakerIDEncoder"),
    patcher("DA3_MODEL"),
    patcher("MOGE_MODEL"),
    patcher("INTERP_MODEL"),
    patcher("FACE_DETECTION_MODEL"),
    _module("OPTICAL_FLOW", "torch.nn:Linear"),
]


def samples() -> list[Row]:
    latent = {"samples": torch.rand(2, 4, 8, 8)}
    tensors: list[Row] = [
        node("IMAGE", "a batch of colours", "EmptyImage", width=16, height=8, batch_size=2, color=0x336699),
        node("IMAGE", "a view of a batch", "ImageFromBatch", image=image, batch_index=1, length=1),
        node("IMAGE", "flipped", "ImageInvert", image=image),
        *(
            ("IMAGE", str(kind).removeprefix("torch."), "Tensor.to", lambda kind=kind: image().to(kind))
            for kind in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.uint8)
        ),
        ("IMAGE", "of no pictures", "Tensor[:0]", lambda: image()[:0]),
        ("IMAGE", "an inference tensor", "torch.inference_mode", _inference),
        ("IMAGE", "on the meta device", "torch", lambda: torch.empty(1, 2, 2, 3, device="meta")),
        ("IMAGE", "quantized", "torch", lambda: torch.quantize_per_tensor(image(), 0.1, 0, torch.quint8)),
        node("MASK", "solid", "SolidMask", value=0.3, width=16, height=8),
        node("MASK", "of an image", "ImageToMask", image=image, channel="red"),
    ]
    latents: list[Row] = [
        node("LATENT", "empty", "EmptyLatentImage", width=64, height=64, batch_size=2),
        node("LATENT", "with noise_mask", "SetLatentNoiseMask", samples=latent, mask=torch.rand(1, 64, 64)),
        node("LATENT", "with batch_index", "LatentFromBatch", samples=latent, batch_index=1, length=1),
        node(
            "LATENT",
            "of a video, rank 5",
            "EmptyHunyuanLatentVideo",
            width=64,
            height=64,
            length=5,
            batch_size=1,
        ),
        node("LATENT", "of audio, with type", "EmptyLatentAudio", seconds=2.0, batch_size=1),
        ("LATENT", "nested", "NestedTensor", lambda: {"samples": nested(), "noise_mask": nested()}),
        plain(
            "LATENT", "downscale_ratio_spacial, type", {**latent, "downscale_ratio_spacial": 16, "type": "x"}
        ),
        *(plain("LATENT", f"rank {rank}", {"samples": torch.rand([2] * rank)}) for rank in (0, 1, 2, 3, 6)),
    ]
    conds: list[Row] = [
        plain("CONDITIONING", "pooled_output, several entries", cond() + cond()),
        node(
            "CONDITIONING",
            "area",
            "ConditioningSetArea",
            conditioning=cond,
            width=64,
            height=64,
            x=8,
            y=8,
            strength=0.5,
        ),
        node(
            "CONDITIONING",
            "mask",
            "ConditioningSetMask",
            conditioning=cond,
            mask=torch.rand(1, 8, 8),
            set_cond_area="default",
            strength=1.0,
        ),
        node(
            "CONDITIONING", "timesteps", "ConditioningSetTimestepRange", conditioning=cond, start=0.1, end=0.9
        ),
        node("CONDITIONING", "guidance", "FluxGuidance", conditioning=cond, guidance=3.5),
        node("CONDITIONING", "reference_latents", "ReferenceLatent", conditioning=cond, latent=latent),
        ("CONDITIONING", "hooks", "set_hooks_for_conditioning", _hooked),
        (
            "CONDITIONING",
            "unclip, clip_vision_output",
            "unCLIPConditioning",
            lambda: run(
                "unCLIPConditioning",
                conditioning=cond(),
                clip_vision_output=clip_vision_output(),
                strength=1.0,
                noise_augmentation=0.1,
            )[0],
        ),
        plain("CONDITIONING", "without pooled_output", [[torch.rand(1, 7, 4), {"pooled_output": None}]]),
        (
            "CONDITIONING",
            "control",
            "ControlNet",
            lambda: cond(control=_control()),
        ),
        (
            "CONDITIONING",
            "gligen",
            "ModelPatcher",
            lambda: cond(gligen=("position", _patcher(), [])),
        ),
    ]
    sampling: list[Row] = [
        node("SIGMAS", "Karras", "KarrasScheduler", steps=8, sigma_max=14.6, sigma_min=0.03, rho=7.0),
        node("NOISE", "random", "RandomNoise", noise_seed=2**64 - 1),
        node("NOISE", "none", "DisableNoise"),
        *(
            node("SAMPLER", name, "KSamplerSelect", sampler_name=name)
            for name in ("euler", "dpmpp_2m_sde", "uni_pc", "ddim", "lcm", "dpm_fast", "dpm_adaptive")
        ),
        node("SAMPLER", "with options", "SamplerEulerAncestral", eta=0.9, s_noise=1.1),
        ("GUIDER", "CFG, with its model", "CFGGuider", _guider),
        ("HOOKS", "LoRA with keyframes", "CreateHookLora", hooks),
        ("HOOK_KEYFRAMES", "two", "CreateHookKeyframe", keyframes),
        node(
            "TIMESTEPS_RANGE",
            "the first part",
            "ConditioningTimestepsRange",
            start_percent=0.2,
            end_percent=0.8,
        ),
        node("LATENT_OPERATION", "a closure", "LatentOperationTonemapReinhard", multiplier=1.5),
        node("LATENT_OPERATION", "sharpen", "LatentOperationSharpen", sharpen_radius=3, sigma=1.0, alpha=0.1),
        plain("LORA_MODEL", "a state dict", {"diffusion_model.a.lora_up.weight": torch.rand(4, 2).half()}),
        plain("LOSS_MAP", "losses", {"loss": [0.5, 0.25]}),
    ]
    media: list[Row] = [
        node("AUDIO", "silence", "EmptyAudio", duration=0.1, sample_rate=44100, channels=2),
        ("AUDIO", "stereo", "dict", audio),
        ("VIDEO", "in memory", "CreateVideo", video),
        ("VIDEO", "a file's bytes", "VideoFromFile", lambda: _video_file()(io.BytesIO(b"\0mp4" * 999))),
        ("VIDEO", "by file", "VideoFromFile", lambda: _video_file()("/a/file.mp4")),
        ("CLIP_VISION_OUTPUT", "as CLIPVisionEncode gives", "Output", clip_vision_output),
        ("MESH", "two triangles", "MESH", mesh),
        node("MESH", "of a voxel", "VoxelToMeshBasic", voxel=voxel, threshold=0.6),
        ("VOXEL", "8 x 8 x 8", "VOXEL", voxel),
        (
            "SPLAT",
            "three",
            "SPLAT",
            lambda: find("comfy_api.latest._util.geometry_types:SPLAT")(
                *(torch.rand(1, 3, n) for n in (3, 3, 4, 1)), torch.rand(1, 3, 1, 3)
            ),
        ),
        (
            "SVG",
            "one",
            "SVG",
            lambda: find("comfy_api.latest._util.image_types:SVG", "comfy_extras.nodes_images:SVG")(
                [io.BytesIO(b"<svg/>")]
            ),
        ),
        (
            "FILE_3D",
            "by file",
            "File3D",
            lambda: find("comfy_api.latest._util.geometry_types:File3D")("/a/b.glb"),
        ),
        *map(
            file_3d,
            (
                "glb",
                "gltf",
                "fbx",
                "obj",
                "stl",
                "usdz",
                "ply",
                "splat",
                "spz",
                "ksplat",
                "splat_any",
                "point_cloud_any",
            ),
        ),
        (
            "CURVE",
            "monotone",
            "MonotoneCubicCurve",
            lambda: find("comfy_api.latest._input.curve_types:MonotoneCubicCurve")(
                [(0.0, 0.0), (0.5, 0.2), (1.0, 1.0)]
            ),
        ),
        (
            "RANGE",
            "levels",
            "RangeInput",
            lambda: find("comfy_api.latest._input.range_types:RangeInput")(0.1, 0.9, 0.5),
        ),
        plain("WEBCAM", "a file's name", "webcam/1.png [temp]"),
        node(
            "WAN_CAMERA_EMBEDDING",
            "zoom",
            "WanCameraEmbedding",
            camera_pose="Zoom In",
            width=64,
            height=64,
            length=5,
            speed=1.0,
            fx=0.5,
            fy=0.5,
            cx=0.5,
            cy=0.5,
        ),
        plain(
            "LOAD3D_CAMERA",
            "camera",
            {"position": {"x": 1.0, "y": 2.0, "z": 3.0}, "zoom": 1, "cameraType": "perspective"},
        ),
        plain("LOAD3D_MODEL_INFO", "transforms", [{"position": {"x": 0.0}}]),
        plain("LOAD_3D", "files", {"image": "a.png", "mask": "b.png", "recording": ""}),
        plain("LOAD_3D_ANIMATION", "files", {"image": "a.png", "recording": "c.mp4"}),
        plain("LAYERS", "a document", {"width": 8, "layers": [{"image": image(1), "opacity": 0.5}]}),
        plain("COMPOSITOR", "state", {"layers": [], "version": 1}),
        plain(
            "AUDIO_ENCODER_OUTPUT",
            "layers",
            {
                "encoded_audio": torch.rand(1, 9, 8),
                "encoded_audio_all_layers": (torch.rand(1, 9, 8),),
                "audio_samples": 16000,
            },
        ),
        plain(
            "TRACKS",
            "path and visibility",
            {"track_path": torch.rand(5, 2, 2), "track_visibility": torch.ones(5, 2, dtype=torch.bool)},
        ),
        plain("DA3_GEOMETRY", "maps", {"depth": torch.rand(1, 8, 8), "mode": "mono"}),
        plain("MOGE_GEOMETRY", "maps", {"points": torch.rand(1, 8, 8, 3), "mask": torch.ones(1, 8, 8) > 0}),
        plain(
            "SAM3_TRACK_DATA",
            "masks",
            {"packed_masks": torch.ones(2, 1, 4, dtype=torch.uint8), "orig_size": (8, 8)},
        ),
        plain("SHAPE_SUBDIVIDES", "tensors", [torch.ones(3, 3) > 0]),
        plain(
            "POSE_KEYPOINT",
            "people",
            [{"people": [{"pose_keypoints_2d": [0.5, 0.5, 1.0]}], "canvas_width": 8}],
        ),
        plain(
            "FACE_LANDMARKS",
            "faces",
            {"frames": [[{"landmarks_xy": torch.rand(4, 2).numpy()}]], "image_size": (8, 8)},
        ),
    ]
    numbers: list[Row] = [
        *(
            plain("INT", text, value)
            for text, value in (("0xffffffffffffffff", 2**64 - 1), ("-2**63", -(2**63)), ("2**200", 2**200))
        ),
        *(plain("FLOAT", repr(value), value) for value in (0.1, -0.0, float("nan"), float("inf"), 5e-324)),
        *(
            plain("STRING", text, value)
            for text, value in (
                ("words", "a photo"),
                ("lone surrogate", "\ud800"),
                ("NUL", "a\0b"),
                ("1 MB", "x" * 2**20),
            )
        ),
        plain("BOOLEAN", "True", True),
        plain("COMBO", "a choice", "euler"),
        plain("COMBO", "several choices", ["a", "b"]),
        plain("COLOR", "text", "#336699"),
        plain("COLORS", "several", ["#336699", "#000000"]),
        plain("BOUNDING_BOX", "one", {"x": 1, "y": 2, "width": 3, "height": 4}),
        plain("BOUNDING_BOXES", "one", [{"x": 1, "y": 2, "width": 3, "height": 4, "metadata": {}}]),
        plain("HISTOGRAM", "bins", list(range(256))),
        plain("DICT", "JSON", {"a": [1, {"b": None}]}),
        plain("ARRAY", "JSON", [1, "a", [True]]),
        plain("IMAGECOMPARE", "names", {"a_images": [], "b_images": []}),
        plain("IC_LORA_PARAMETERS", "numbers", {"reference_downscale_factor": 2}),
        plain("FLOW_CONTROL", "open", ("open", 3)),
        plain("ACCUMULATION", "items", {"accum": [1, image(1)]}),
        plain("FLOAT,INT", "either", 3),
        plain("STRING,FLOAT,INT,BOOLEAN", "any of them", "x"),
        plain("*", "None", None),
        plain("*", "a list of pictures (INPUT_IS_LIST, OUTPUT_IS_LIST)", [image(1), image(3)]),
        plain("*", "Fraction, set, tuple keys", {("a", 1): {1, 2}, 2: Fraction(1, 3)}),
        ("*", "an enum of ComfyUI's", "EnumHookScope", lambda: find("comfy.hooks:EnumHookScope").HookedOnly),
        ("*", "an object of no known class", "object", object),
    ]
    return [*tensors, *latents, *conds, *sampling, *media, *numbers, *MODELS]


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return image() * 0.5


def _hooked() -> Any:
    return find("comfy.hooks:set_hooks_for_conditioning")(cond(), hooks())


def _video_file() -> Any:
    return find(
        "comfy_api.latest._input_impl.video_types:VideoFromFile", "comfy_api.input_impl:VideoFromFile"
    )
