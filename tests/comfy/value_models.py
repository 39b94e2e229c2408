"""Models of ComfyUI's types, and values that only models make, for the table of types.

All weights are random, of the smallest models that ComfyUI's own loaders take; files are written into this
ComfyUI's folders when they are needed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.comfy import small_models, value_weights
    from tests.comfy.value_making import (
        CoreNode,
        Given,
        Row,
        find,
        folder,
        made,
        of_class,
        prepared,
        too_large,
    )
else:
    small_models = importlib.import_module("small_models")
    value_weights = importlib.import_module("value_weights")
    from value_making import CoreNode, Given, Row, find, folder, made, of_class, prepared, too_large

__all__ = ["clip", "clip_vision", "control_net", "gligen", "lora", "samples", "unet"]

Weights = dict[str, torch.Tensor]


def _saved(kind: str, weights: Callable[[], Weights], name: str = "small.safetensors") -> str:
    """The name of a file with these weights among ComfyUI's models of that kind."""
    path = folder(kind) / name
    if not path.exists():
        plain = {key: item.contiguous().clone() for key, item in weights().items()}
        importlib.import_module("safetensors.torch").save_file(plain, str(path))
    return path.name


def unet() -> CoreNode:
    return CoreNode(
        "UNETLoader", unet_name=_saved("diffusion_models", small_models.unet_weights), weight_dtype="default"
    )


@cache
def _clip() -> Any:
    return small_models.clip()


def clip() -> Any:
    return _clip()


@cache
def _clip_vision() -> Any:
    return small_models.clip_vision(folder("clip_vision"))


def clip_vision() -> Any:
    return _clip_vision()


def vae() -> CoreNode:
    return CoreNode("VAELoader", vae_name=_saved("vae", small_models.tiny_vae_weights))


def control_net() -> CoreNode:
    name = _saved("controlnet", small_models.control_net_weights)
    return CoreNode("ControlNetLoader", control_net_name=name)


def gligen() -> CoreNode:
    return CoreNode("GLIGENLoader", gligen_name=_saved("gligen", value_weights.gligen))


def lora() -> str:
    return _saved("loras", value_weights.lora)


@cache
def _audio_encoder() -> Any:
    config = {"model_type": "wav2vec2", "embed_dim": 64, "num_heads": 4, "num_layers": 2, "conv_norm": False,
              "conv_bias": False, "do_normalize": False, "do_stable_layer_norm": False}  # fmt: skip
    encoder = find("comfy.audio_encoders.audio_encoders:AudioEncoderModel")(config)
    encoder.load_sd(value_weights.random(encoder.model))
    return encoder


def audio_encoder() -> Any:
    return _audio_encoder()


def samples() -> list[Row]:
    return [*_loaded(), *_special(), *_values()]


def _loader(kind: str, name: str, key: str, place: str, weights: Callable[[], Weights], **more: Any) -> Row:
    def prepare() -> CoreNode:
        return CoreNode(name, **{key: _saved(place, weights)}, **more)

    return prepared(kind, f"as {name} loads it", name, prepare)


def _loaded() -> list[Row]:
    small = small_models
    return [
        prepared("MODEL", "of SD1.5", "UNETLoader", unet),
        made("MODEL", "with a LoRA", "LoraLoaderModelOnly", model=unet, lora_name=lora, strength_model=0.8),
        made("MODEL", "with sampling of its own", "ModelSamplingDiscrete", model=unet,
             sampling="v_prediction"),
        made("MODEL", "with a patch of its guidance", "RescaleCFG", model=unet),
        prepared("VAE", "TAESD", "VAELoader", vae),
        made("CLIP", "of SD1.5, without its last layer", "CLIPSetLastLayer", clip=Given(clip),
             stop_at_clip_layer=-2),
        prepared("CONTROL_NET", "of SD1.5", "ControlNetLoader", control_net),
        of_class("CLIP_VISION", "ClipVisionModel", "its class", clip_vision,
                 too_large("CLIPVisionLoader", 304)),
        _loader("STYLE_MODEL", "StyleModelLoader", "style_model_name", "style_models",
                small.style_model_weights),
        _loader("UPSCALE_MODEL", "UpscaleModelLoader", "model_name", "upscale_models", value_weights.esrgan),
        prepared("GLIGEN", "as GLIGENLoader loads it", "GLIGENLoader", gligen),
        _loader("LATENT_UPSCALE_MODEL", "LatentUpscaleModelLoader", "model_name", "latent_upscale_models",
                value_weights.latent_upscaler),
        _loader("MODEL_PATCH", "ModelPatchLoader", "name", "model_patches", value_weights.model_patch),
        _loader("AUDIO_ENCODER", "AudioEncoderLoader", "audio_encoder_name", "audio_encoders",
                value_weights.wav2vec2),
        of_class("BACKGROUND_REMOVAL", "BackgroundRemovalModel", "its class", _background_removal,
                 too_large("LoadBackgroundRemovalModel", 220)),
    ]  # fmt: skip


def _special() -> list[Row]:
    return [
        prepared("PHOTOMAKER", "of one layer", "PhotoMakerLoader", _photomaker),
        _loader("DA3_MODEL", "LoadDA3Model", "model_name", "geometry_estimation",
                value_weights.depth_anything),
        prepared("MOGE_MODEL", "as LoadMoGeModel loads it", "LoadMoGeModel", _moge),
        _loader("INTERP_MODEL", "FrameInterpolationModelLoader", "model_name", "frame_interpolation",
                value_weights.interpolator),
        prepared("FACE_DETECTION_MODEL", "as LoadMediaPipeFaceLandmarker loads it",
                 "LoadMediaPipeFaceLandmarker", _face_model),
        _loader("OPTICAL_FLOW", "OpticalFlowLoader", "model_name", "optical_flow",
                value_weights.optical_flow),
    ]  # fmt: skip


def _moge() -> CoreNode:
    return CoreNode(
        "LoadMoGeModel", model_name=_saved("geometry_estimation", value_weights.moge, "moge.safetensors")
    )


def _face_model() -> CoreNode:
    return CoreNode(
        "LoadMediaPipeFaceLandmarker", model_name=_saved("detection", value_weights.face_landmarker)
    )


def _depth_model() -> CoreNode:
    name = _saved("geometry_estimation", value_weights.depth_anything)
    return CoreNode("LoadDA3Model", model_name=name)


def _photomaker() -> CoreNode:
    find("comfy_extras.nodes_photomaker:VISION_CONFIG_DICT")["num_hidden_layers"] = 1
    encoder = find("comfy_extras.nodes_photomaker:PhotoMakerIDEncoder")
    return CoreNode(
        "PhotoMakerLoader",
        photomaker_model_name=_saved("photomaker", lambda: value_weights.random(encoder())),
    )


def _background_removal() -> Any:
    known = find("comfy.bg_removal_model:BG_REMOVAL_MODELS")
    known["small"] = value_weights.background_remover
    config = folder("background_removal") / "small.json"
    config.write_text(json.dumps({"model_type": "small", "image_size": 64}), encoding="utf-8")
    try:
        return find("comfy.bg_removal_model:BackgroundRemovalModel")(str(config))
    finally:
        del known["small"]


def _values() -> list[Row]:
    picture = torch.rand(1, 64, 64, 3)
    trained = {"model": unet, "latents": CoreNode("EmptyLatentImage", width=64, height=64),
               "positive": CoreNode("CLIPTextEncode", text="a", clip=Given(clip)), "steps": 1, "rank": 1,
               "training_dtype": "fp32", "lora_dtype": "fp32", "existing_lora": "[None]"}  # fmt: skip
    frame = torch.rand(1, 64, 64, 3)
    return [
        made("AUDIO_ENCODER_OUTPUT", "layers", "AudioEncoderEncode", audio_encoder=Given(audio_encoder),
             audio=CoreNode("EmptyAudio", duration=0.2)),
        prepared("AUDIO_ENCODER_OUTPUT", "of the dancer's", "WanDancerEncodeAudio", _danced),
        *_trained(trained),
        made("IC_LORA_PARAMETERS", "of a model", "GetICLoRAParameters", iclora_model=unet),
        made("DA3_GEOMETRY", "maps", "DA3Inference", da3_model=_depth_model, image=Given(picture),
             resolution=140, mode="mono"),
        made("MOGE_GEOMETRY", "maps", "MoGeInference", moge_model=_moge, image=Given(picture)),
        made("FACE_LANDMARKS", "faces", "MediaPipeFaceLandmarker", face_detection_model=_face_model,
             image=Given(torch.rand(1, 128, 128, 3)), min_confidence=0.0),
        made("BOUNDING_BOX", "of faces", "MediaPipeFaceLandmarker", 1, face_detection_model=_face_model,
             image=Given(torch.rand(1, 128, 128, 3)), min_confidence=0.0),
        made("SAM3_TRACK_DATA", "masks", "SAM3_VideoTrack", images=Given(frame),
             model=Given(value_weights.sam3),
             initial_mask=CoreNode("SolidMask", width=64, height=64, value=1.0)),
        made("SHAPE_SUBDIVIDES", "sparse tensors", "VaeDecodeShapeTrellis", 1, samples=Given(_sparse_latent),
             vae=Given(value_weights.shape_vae)),
        made("MESH", "of a sparse latent", "VaeDecodeShapeTrellis", 0, samples=Given(_sparse_latent),
             vae=Given(value_weights.shape_vae)),
        made("POSE_KEYPOINT", "people", "SDPoseKeypointExtractor", model=Given(value_weights.pose_model),
             vae=vae,
             image=Given(picture)),
    ]  # fmt: skip


def _danced() -> CoreNode:
    return CoreNode("WanDancerEncodeAudio", audio=CoreNode("EmptyAudio", duration=2.0), video_frames=5)


def _sparse_latent() -> dict[str, Any]:
    return value_weights.sparse_latent()


def _trained(inputs: dict[str, Any]) -> list[Row]:
    def output(kind: str) -> Callable[[], CoreNode]:
        def prepare() -> CoreNode:
            outputs = importlib.import_module("nodes").NODE_CLASS_MAPPINGS["TrainLoraNode"].RETURN_TYPES
            names = [str(getattr(item, "value", item)) for item in outputs]
            return CoreNode("TrainLoraNode", names.index(kind), **inputs)

        return prepare

    return [
        prepared("LORA_MODEL", "trained", "TrainLoraNode", output("LORA_MODEL")),
        prepared("LOSS_MAP", "of a training", "TrainLoraNode", output("LOSS_MAP")),
    ]
