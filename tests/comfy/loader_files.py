"""Model files with small random weights, and what ComfyUI's loader nodes load from them.

For a process that has ComfyUI on its path. Widths are reduced where ComfyUI lets them be: for text encoders
by ``model_options`` of the call that the node makes, for CLIP_VISION by a configuration file in place of its
own (`models_pack.use_configurations_of`). What kind of model a file holds is found out by ComfyUI alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_CLIP = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 64}
_T5 = {"d_ff": 32, "d_kv": 64, "num_heads": 2, "num_layers": 24, "vocab_size": 2048}
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128256,
}
_VISION = {
    "hidden_size": 64,
    "image_size": 56,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "projection_dim": 768,
}


def _pattern() -> str:
    """How text is split before it is tokenized; newer versions know one such pattern alone."""
    try:
        tokenizer: Any = importlib.import_module("comfy.text_encoders.bpe_tokenizer")
    except ImportError:
        return r"\s?\S+|\s+"
    return str(tokenizer._LLAMA_PATTERN)


class LoaderFiles:
    """Files in the model folders of one base directory. ``models`` is the module `small_models`."""

    name = "loaders.safetensors"

    def __init__(self, models: Any, pack: Any, base: Path, run_node: Callable[..., Any]) -> None:
        self._models, self._base, self._run_node = models, base, run_node
        self._configure()
        pack.use_configurations_of(base)

    def _configure(self) -> None:
        """What ComfyUI takes from beside its code: a narrow CLIP_VISION, and a Llama's tokenizer of bytes."""
        folder = self._base / "configurations"
        (folder / "llama_tokenizer").mkdir(parents=True, exist_ok=True)
        vision = {**self._json("clip_vision_config_vitl.json"), **_VISION}
        (folder / "clip_vision_config_vitl.json").write_text(json.dumps(vision))
        specials = {f"<|special_{number}|>": 128000 + number for number in range(256)}
        begin = next(iter(specials))
        split = {
            "type": "Split",
            "pattern": {"Regex": _pattern()},
            "behavior": "Isolated",
            "invert": False,
        }
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        flags = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        template: list[dict[str, Any]] = [
            {"SpecialToken": {"id": begin, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        tokenizer = {
            "version": "1.0",
            "added_tokens": [{"id": at, "content": name, **flags} for name, at in specials.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": template,
                "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {begin: {"id": begin, "ids": [128000], "tokens": [begin]}},
            },
            "decoder": level,
            "model": {
                "type": "BPE",
                "vocab": {**{chr(33 + at): at for at in range(94)}, "\u0120": 94, **specials},
                "merges": [],
            },
        }
        (folder / "llama_tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin}
        (folder / "llama_tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))

    def save(self, folder: str, weights: dict[str, torch.Tensor], name: str = name) -> Path:
        path = self._base / "models" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
        return path

    # --- weights --------------------------------------------------------------------------------------------

    def _json(self, name: str) -> dict[str, Any]:
        folder = Path(str(importlib.import_module("comfy").__path__[0]))
        found: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
        return found

    def _filled(self, kind: str, seed: int, *arguments: Any, **settings: Any) -> dict[str, torch.Tensor]:
        made = self._models.made(kind, *arguments, **settings)
        weights: dict[str, torch.Tensor] = self._models.fill(made, seed)
        return weights

    def clip_l(self, seed: int = 70) -> dict[str, torch.Tensor]:
        config = {**self._json("sd1_clip_config.json"), **_CLIP}
        return self._encoder("comfy.clip_model.CLIPTextModel", seed, config)

    def clip_g(self, seed: int = 71) -> dict[str, torch.Tensor]:
        config = {**self._json("clip_config_bigg.json"), **_CLIP}
        return self._encoder("comfy.clip_model.CLIPTextModel", seed, config)

    def t5(self, width: int, seed: int = 72) -> dict[str, torch.Tensor]:
        config = {**self._json("text_encoders/t5_config_xxl.json"), **_T5, "d_model": width}
        return self._encoder("comfy.text_encoders.t5.T5", seed, config)

    def llama(self, seed: int = 73) -> dict[str, torch.Tensor]:
        return self._encoder("comfy.text_encoders.llama.Llama2", seed, dict(_LLAMA))

    def _encoder(self, kind: str, seed: int, config: dict[str, Any]) -> dict[str, torch.Tensor]:
        operations = importlib.import_module("comfy.ops").disable_weight_init
        weights = self._filled(kind, seed, config, torch.float32, "cpu", operations)
        return {name: tensor.half() for name, tensor in weights.items()}

    def vision(self, seed: int = 74) -> dict[str, torch.Tensor]:
        """Of the family that 24 layers tell."""
        path = self._base / "configurations" / "clip_vision_config_vitl.json"
        made = importlib.import_module("comfy.clip_vision").ClipVisionModel(str(path))
        weights: dict[str, torch.Tensor] = self._models.fill(made.model, seed)
        return weights

    def gligen(self, seed: int = 75) -> dict[str, torch.Tensor]:
        """For each transformer of `small_models.sd15`."""
        blocks = ("input_blocks.1", "middle_block.1", "output_blocks.0", "output_blocks.1")
        weights: dict[str, torch.Tensor] = {}
        for number, block in enumerate(blocks):
            part = self._filled("comfy.gligen.GatedSelfAttentionDense", seed + number, 320, 768, 8, 40)
            weights |= {f"{block}.fuser.{name}": tensor for name, tensor in part.items()}
            weights[f"{block}.fuser.alpha_attn"] = torch.tensor(0.5)
            weights[f"{block}.fuser.alpha_dense"] = torch.tensor(0.5)
        net = self._filled("comfy.gligen.PositionNet", seed, 768, 768)
        return weights | {f"position_net.{name}": tensor for name, tensor in net.items()}

    # --- loaders --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _narrow(self, t5_width: int) -> Generator[None, None, None]:
        """The text encoders that nodes load are as narrow as the files here."""
        sd: Any = importlib.import_module("comfy.sd")
        load = sd.load_clip
        options: dict[str, Any] = {
            "model_config": dict(_CLIP),
            "t5xxl_model_config": {**_T5, "d_model": t5_width},
            "llama_model_config": _LLAMA,
        }

        def narrow(*given: Any, **named: Any) -> Any:
            own = named.pop("model_options", {})
            return load(*given, **named, model_options={**own, **options})

        sd.load_clip = narrow
        try:
            yield
        finally:
            sd.load_clip = load

    def clips(self) -> dict[str, Any]:
        """CLIP by the loaders of two, three and four files."""
        for name, weights in (
            ("l", self.clip_l()),
            ("g", self.clip_g()),
            ("t5", self.t5(64)),
            ("wide_t5", self.t5(4096)),
            ("llama", self.llama()),
        ):
            self.save("text_encoders", weights, f"{name}.safetensors")
        two = {"clip_name1": "l.safetensors", "clip_name2": "g.safetensors"}
        three = {**two, "clip_name3": "wide_t5.safetensors"}
        four = {**two, "clip_name3": "t5.safetensors", "clip_name4": "llama.safetensors"}
        run = self._run_node
        with self._narrow(4096):
            found = {
                "DualCLIPLoader": run("DualCLIPLoader", **two, type="sdxl"),
                "DualCLIPLoader, sd3": run("DualCLIPLoader", **two, type="sd3"),
                "TripleCLIPLoader": run("TripleCLIPLoader", **three),
            }
        with self._narrow(64):
            found["QuadrupleCLIPLoader"] = run("QuadrupleCLIPLoader", **four)
        return found

    def clip_vision(self) -> Any:
        self.save("clip_vision", self.vision())
        return self._run_node("CLIPVisionLoader", clip_name=self.name)

    def unclip_checkpoint(self) -> tuple[Any, Any, Any]:
        """MODEL, VAE and CLIP_VISION of one checkpoint."""
        unet = self._models.unet_weights(
            seed=76, context_dim=1024, use_linear_in_transformer=True, num_classes="sequential",
            adm_in_channels=1536, num_heads=-1, num_head_channels=64,
        )  # fmt: skip
        weights = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
        tiny = self._models.tiny_vae_weights()
        weights |= {f"first_stage_model.{name}": tensor for name, tensor in tiny.items()}
        vision = self.vision(seed=77)
        weights |= {f"embedder.model.visual.{name}": tensor for name, tensor in vision.items()}
        self.save("checkpoints", weights, "unclip.safetensors")
        loader = importlib.import_module("nodes").NODE_CLASS_MAPPINGS["unCLIPCheckpointLoader"]()
        with torch.inference_mode():
            model, _, vae, vision_model = loader.load_checkpoint("unclip.safetensors")
        return model, vae, vision_model

    def checkpoint_clip(self) -> Any:
        """CLIP of a checkpoint."""
        weights = {
            f"model.diffusion_model.{key}": item for key, item in self._models.unet_weights(seed=78).items()
        }
        text = {f"cond_stage_model.transformer.{key}": item for key, item in self.clip_l(79).items()}
        path = self.save("checkpoints", {**weights, **text}, "with_clip.safetensors")
        load = importlib.import_module("comfy.sd").load_checkpoint_guess_config
        with torch.inference_mode():
            return load(str(path), te_model_options={"clip_l_model_config": dict(_CLIP)})[1]

    def upscale_model(self) -> Any:
        module = importlib.import_module("spandrel.architectures.ESRGAN").ESRGAN(
            num_filters=64, num_blocks=2, scale=2
        )
        self.save("upscale_models", self._models.fill(module, 80))
        return self._run_node("UpscaleModelLoader", model_name=self.name)

    def gligen_model(self) -> Any:
        self.save("gligen", self.gligen())
        return self._run_node("GLIGENLoader", gligen_name=self.name)

    def lora(self, model: Any) -> str:
        """The name of a LoRA's file for such a model."""
        self.save("loras", self._models.lora_of(model, seed=81))
        return self.name
