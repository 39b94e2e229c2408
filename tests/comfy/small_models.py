"""Small models of the families that ComfyUI detects by their weights, with random weights, loaded by ComfyUI.

For a process that has ComfyUI on its path. Each function gives what the loader node of that name would give.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch


def fill(module: torch.nn.Module, seed: int, scale: float = 0.03) -> dict[str, torch.Tensor]:
    """Random weights; what starts as ones or zeros in training stays near that."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            value = torch.empty(tensor.shape, dtype=torch.float32).normal_(0, scale, generator=generator)
            found[name] = value + 1 if tensor.dim() == 1 and name.endswith("weight") else value
        else:
            found[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            if name.endswith("position_ids"):
                found[name] = torch.arange(tensor.shape[-1]).expand(tensor.shape).clone()
    return found


def _module(name: str) -> Any:
    return importlib.import_module(name)


def made(name: str, *arguments: Any, **settings: Any) -> Any:
    """An object of that class of ComfyUI with all its weights there, which some settings leave for later."""
    module, _, kind = name.rpartition(".")
    memory: Any = sys.modules.get("comfy.memory_management")
    dynamic = getattr(memory, "aimdo_enabled", False)
    if dynamic:
        memory.aimdo_enabled = False
    try:
        return getattr(_module(module), kind)(*arguments, **settings)
    finally:
        if dynamic:
            memory.aimdo_enabled = True


def unet_weights(
    seed: int = 1, channel_mult: tuple[int, ...] = (1, 1), **more: Any
) -> dict[str, torch.Tensor]:
    """The weights of an SD1.5 UNet with fewer blocks. (1, 1) takes 146 MB, (1, 2, 3) 880 MB."""
    ops = _module("comfy.ops").disable_weight_init
    levels = len(channel_mult)
    depth = [1] * (levels - 1) + [0]
    settings: dict[str, Any] = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [1] * levels,
        "channel_mult": list(channel_mult),
        "transformer_depth": depth,
        "transformer_depth_output": [item for item in depth for _ in range(2)],
        "transformer_depth_middle": 1,
        "context_dim": 768,
        "num_heads": 8,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "legacy": False,
        "operations": ops,
        "dtype": torch.float32,
    }
    unet = made("comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel", **{**settings, **more})
    return fill(unet, seed)


def sd15(seed: int = 1, channel_mult: tuple[int, ...] = (1, 1)) -> Any:
    """MODEL: a UNet of the SD1.5 family."""
    return _module("comfy.sd").load_diffusion_model_state_dict(unet_weights(seed, channel_mult))


def wan(seed: int = 2, dim: int = 256, layers: int = 2) -> Any:
    """MODEL: a diffusion transformer of the Wan family."""
    model = made(
        "comfy.ldm.wan.model.WanModel",
        model_type="t2v",
        dim=dim,
        ffn_dim=dim * 2,
        num_heads=dim // 128,
        num_layers=layers,
        text_dim=4096,
        operations=_module("comfy.ops").disable_weight_init,
        dtype=torch.float32,
    )
    return _module("comfy.sd").load_diffusion_model_state_dict(fill(model, seed))


def clip_weights(seed: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The weights of SD1.5's text encoder with two layers, and what is not as usual in its configuration."""
    config = {"num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 256}
    ops = _module("comfy.ops").disable_weight_init
    full = json.loads(
        (Path(_module("comfy.sd1_clip").__file__).parent / "sd1_clip_config.json").read_text("utf-8")
    )
    encoder = made("comfy.clip_model.CLIPTextModel", {**full, **config}, torch.float32, "cpu", ops)
    return fill(encoder, seed), config


def clip(seed: int = 3) -> Any:
    """CLIP: the text encoder of SD1.5 with two layers."""
    weights, config = clip_weights(seed)
    sd = _module("comfy.sd")
    return sd.load_text_encoder_state_dicts(
        [weights],
        clip_type=sd.CLIPType.STABLE_DIFFUSION,
        model_options={"model_config": dict(config), "clip_l_model_config": dict(config)},
    )


def vae(seed: int = 4) -> Any:
    """VAE: the autoencoder of SD1.5, narrower."""
    config = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    model = made("comfy.ldm.models.autoencoder.AutoencoderKL", ddconfig=config, embed_dim=4)
    return _module("comfy.sd").VAE(
        sd=fill(model, seed), config={"params": {"ddconfig": config, "embed_dim": 4}}
    )


def tiny_vae_weights(seed: int = 5) -> dict[str, torch.Tensor]:
    """The weights of a TAESD."""
    return fill(made("comfy.taesd.taesd.TAESD"), seed)


def tiny_vae(seed: int = 5) -> Any:
    """VAE: a TAESD."""
    return _module("comfy.sd").VAE(sd=tiny_vae_weights(seed))


def control_net_weights(seed: int = 6) -> dict[str, torch.Tensor]:
    """The weights of a ControlNet for `sd15`."""
    ops = _module("comfy.ops").disable_weight_init
    net = made(
        "comfy.cldm.cldm.ControlNet",
        image_size=32,
        in_channels=4,
        hint_channels=3,
        model_channels=320,
        num_res_blocks=[1, 1],
        channel_mult=[1, 1],
        transformer_depth=[1, 0],
        transformer_depth_output=[1, 1, 0, 0],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        num_head_channels=-1,
        use_spatial_transformer=True,
        legacy=False,
        operations=ops,
        dtype=torch.float32,
    )
    return fill(net, seed)


def control_net(seed: int = 6) -> Any:
    """CONTROL_NET: for `sd15`."""
    return _module("comfy.controlnet").load_controlnet_state_dict(control_net_weights(seed))


def clip_vision(folder: Path, seed: int = 7) -> Any:
    """CLIP_VISION: a vision transformer with two narrow layers."""
    config = {
        "hidden_act": "quick_gelu",
        "hidden_size": 64,
        "image_size": 56,
        "intermediate_size": 128,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "projection_dim": 32,
    }
    path = folder / "clip_vision.json"
    path.write_text(json.dumps(config))
    model = _module("comfy.clip_vision").ClipVisionModel(str(path))
    model.load_sd(fill(model.model, seed))
    return model


def _style_adapter() -> torch.nn.Module:
    made: torch.nn.Module = _module("comfy.t2i_adapter.adapter").StyleAdapter(
        width=1024, context_dim=768, num_head=8, n_layes=3, num_token=8
    )
    return made


def style_model_weights(seed: int = 8) -> dict[str, torch.Tensor]:
    """The weights of T2I's style adapter."""
    return fill(_style_adapter(), seed)


def style_model(seed: int = 8) -> Any:
    """STYLE_MODEL: the style adapter of T2I."""
    module = _style_adapter()
    module.load_state_dict(style_model_weights(seed))
    return _module("comfy.sd").StyleModel(module)


def upscale_model(seed: int = 9) -> Any:
    """UPSCALE_MODEL: an ESRGAN with one narrow block, as spandrel loads it."""
    module = _module("spandrel.architectures.ESRGAN").ESRGAN(num_filters=16, num_blocks=1, scale=2)
    found = _module("spandrel").ModelLoader().load_from_state_dict(fill(module, seed)).eval()
    if hasattr(_module("comfy_extras.nodes_upscale_model"), "model_management"):
        management = _module("comfy.model_management")
        patchers = _module("comfy.model_patcher")
        make = getattr(patchers, "CoreModelPatcher", patchers.ModelPatcher)
        found.patcher = make(
            found.model,
            load_device=management.get_torch_device(),
            offload_device=management.unet_offload_device(),
        )
    return found


def lora_of(model: Any, seed: int = 10, rank: int = 4) -> dict[str, torch.Tensor]:
    """The weights of a LoRA for the attention layers of `sd15`."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.model.diffusion_model.state_dict().items():
        if name.endswith(("to_q.weight", "to_v.weight")):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            out, into = tensor.shape
            found[f"diffusion_model.{name.removesuffix('.weight')}.lora_up.weight"] = torch.empty(
                out, rank
            ).normal_(0, 0.1, generator=generator)
            found[f"diffusion_model.{name.removesuffix('.weight')}.lora_down.weight"] = torch.empty(
                rank, into
            ).normal_(0, 0.1, generator=generator)
            del key
    return found
