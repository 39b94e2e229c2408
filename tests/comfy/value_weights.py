"""Random weights of the smallest models that ComfyUI's loaders of rarer types take, and small such models.

For a process that has ComfyUI on its path. What is named for a file gives the file's tensors.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch

__all__ = [
    "background_remover",
    "depth_anything",
    "esrgan",
    "face_landmarker",
    "gligen",
    "interpolator",
    "latent_upscaler",
    "lora",
    "model_patch",
    "moge",
    "optical_flow",
    "pose_model",
    "random",
    "sam3",
    "shape_vae",
    "sparse_latent",
    "wav2vec2",
]

Weights = dict[str, torch.Tensor]


def _module(name: str) -> Any:
    return importlib.import_module(name)


def random(module: torch.nn.Module, seed: int = 30) -> Weights:
    """Random weights for that module; what starts as ones in training stays near that."""
    return dict(_module("small_models").fill(module, seed))


def _ops() -> Any:
    return _module("comfy.ops").disable_weight_init


def lora() -> Weights:
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q"
    return {f"{key}.lora_up.weight": torch.rand(320, 2), f"{key}.lora_down.weight": torch.rand(2, 320)}


def gligen() -> Weights:
    gligens = _module("comfy.gligen")
    block = random(gligens.GatedSelfAttentionDense(64, 768, 8, 8))
    place = "input_blocks.1.1.transformer_blocks.0.fuser."
    found = {f"{place}{name}": item for name, item in block.items()}
    return found | {
        f"position_net.{name}": item for name, item in random(gligens.PositionNet(768, 768)).items()
    }


def esrgan() -> Weights:
    architecture = _module("spandrel.architectures.ESRGAN").ESRGAN
    return random(architecture(num_filters=16, num_blocks=1, scale=2))


def latent_upscaler() -> Weights:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "hidden_channels": 32,
        "num_blocks": 1,
        "global_residual": False,
    }
    model = _module("comfy.ldm.hunyuan_video.upsampler").HunyuanVideo15SRModel("720p", config)
    return random(model.model)


def model_patch() -> Weights:
    """LTX's duration head; before there was one, the projection of USO's pictures."""
    try:
        return random(_module("comfy.ldm.lightricks.duration_head").DurationHead())
    except ImportError:
        kind = importlib.import_module("value_making").find(
            "comfy_extras.nodes_model_patch:SigLIPMultiFeatProjModel"
        )
        return {f"feature_embedder.{name}": item for name, item in random(kind(operations=_ops())).items()}


def wav2vec2() -> Weights:
    """Of the smallest size that is loaded; in half precision."""
    net = _module("comfy.audio_encoders.wav2vec2").Wav2Vec2Model(
        embed_dim=768, num_heads=12, num_layers=12, conv_norm=False, conv_bias=False, do_normalize=False,
        do_stable_layer_norm=False, dtype=torch.float32, operations=_ops(),
    )  # fmt: skip
    return {name: item.half() for name, item in random(net).items()}


def depth_anything() -> Weights:
    """Of Depth Anything 3's smallest size, with a narrow head; in half precision."""
    net = _module("comfy.ldm.depth_anything_3.model").DepthAnything3Net(
        backbone_name="vits", out_layers=(5, 7, 9, 11), head_dim_in=384, head_features=16,
        head_out_channels=(16, 16, 16, 16), operations=_ops(), dtype=torch.float32,
    )  # fmt: skip
    return {name: item.half() for name, item in random(net).items()}


def moge() -> Weights:
    config = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 4, "layer_norm_eps": 1e-6,
              "use_swiglu_ffn": False}  # fmt: skip
    net = _module("comfy.ldm.moge.model").MoGeModelV1(
        config, dim_upsample=[32, 32, 32], operations=_ops(), dtype=torch.float32
    )
    return random(net)


def interpolator() -> Weights:
    net = _module("comfy_extras.frame_interpolation_models.ifnet").IFNet(head_ch=4, channels=[16] * 5)
    return random(net)


def optical_flow() -> Weights:
    return random(_module("torchvision.models.optical_flow").raft_large(weights=None, progress=False))


def face_landmarker() -> Weights:
    """Both detectors, the mesh and the blendshapes, with a canonical face of random points."""
    kind = _module("comfy_extras.mediapipe.face_landmarker").FaceLandmarker
    found: Weights = {}
    for variant in ("short", "full"):
        for name, item in random(kind(detector_variant=variant, dtype=torch.float32)).items():
            found[name.replace("detector.", f"detector_{variant}.", 1)] = item
    parts = ("face_oval", "left_eye", "right_eye", "left_eyebrow", "right_eyebrow", "lips", "irises", "nose",
             "tesselation")  # fmt: skip
    found |= {f"topology.{part}": torch.tensor([[0, 1], [1, 2]], dtype=torch.int32) for part in parts}
    generator = torch.Generator().manual_seed(1)
    found["canonical_vertices"] = torch.rand(468, 3, generator=generator)
    found["procrustes_indices"] = torch.arange(33, dtype=torch.int32)
    found["procrustes_weights"] = torch.ones(33)
    return found


def background_remover(_config: Any, dtype: Any, device: Any, operations: Any) -> Any:
    """The backbone of BiRefNet, narrower, in its place."""
    return _module("comfy.background_removal.birefnet").SwinTransformer(
        embed_dim=24, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=12, device=device, dtype=dtype,
        operations=operations,
    )  # fmt: skip


def _patcher(module: torch.nn.Module) -> Any:
    cpu = torch.device("cpu")
    return _module("comfy.model_patcher").ModelPatcher(module, load_device=cpu, offload_device=cpu)


class _Whole(torch.nn.Module):
    """What a node asks of the model in a MODEL."""

    def __init__(self, diffusion_model: torch.nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    def get_dtype(self) -> torch.dtype:
        return torch.float32


def sam3() -> Any:
    """A MODEL: SAM3.1 with one block in its trunk."""
    net = _module("comfy.ldm.sam3.detector").SAM3Model(
        image_model="SAM31", embed_dim=64, depth=1, num_heads=4, dtype=torch.float32, operations=_ops()
    )
    net.load_state_dict(random(net), strict=False)
    return _patcher(_Whole(net))


def shape_vae() -> Any:
    """A VAE as Trellis2's nodes use it, with two narrow stages."""
    trellis = _module("comfy.ldm.trellis2.vae")
    module = trellis.ShapeVae.__new__(trellis.ShapeVae)
    torch.nn.Module.__init__(module)
    module.shape_dec = trellis.FlexiDualGridVaeDecoder(
        resolution=32, model_channels=[32, 16], latent_channels=32, num_blocks=[1, 0],
        block_type=["SparseConvNeXtBlock3d"] * 2, up_block_type=["SparseResBlockC2S3d"], block_args=[{}, {}],
    )  # fmt: skip
    module.load_state_dict(random(module), strict=False)
    module.register_buffer("resolution", torch.tensor(32.0), persistent=False)
    return SimpleNamespace(
        first_stage_model=module, vae_dtype=torch.float32, prepare_decode=lambda shape: None
    )


def sparse_latent() -> dict[str, Any]:
    coords = torch.tensor(
        [[0, x, y, z] for x in range(2) for y in range(2) for z in range(2)], dtype=torch.int32
    )
    return {"samples": torch.rand(1, 32, 8, 1), "coords": coords, "coord_resolution": 2}


def pose_model() -> Any:
    """A MODEL: a UNet with SDPose's head."""
    config = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64,
              "channel_mult": [1, 10],
              "num_res_blocks": [1, 1], "transformer_depth": [0, 0], "transformer_depth_output": [0] * 4,
              "transformer_depth_middle": -1, "num_heads": 1, "use_spatial_transformer": False,
              "legacy": False,
              "heatmap_head": True, "dtype": torch.float32}  # fmt: skip
    settings = _module("comfy.supported_models").SD15(config)
    settings.unet_config = config
    model = _module("comfy.model_base").BaseModel(settings, device=torch.device("cpu"))
    model.diffusion_model.load_state_dict(random(model.diffusion_model), strict=False)
    return _patcher(model)
