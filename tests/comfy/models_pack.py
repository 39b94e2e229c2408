"""A node pack for the tests of models: copied into a worker's custom_nodes. They look at what came."""

from __future__ import annotations

import hashlib
import importlib
import os
from typing import Any

import torch


class AnyType(str):
    __slots__ = ()

    def __ne__(self, _other: object) -> bool:
        return False


ANY = AnyType("*")


def digest(tensors: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    with torch.inference_mode():  # what ComfyUI made in it can be looked at nowhere else
        for tensor in tensors:
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def torch_module(value: Any) -> Any:
    """The torch module behind a MODEL, CLIP, VAE or other object."""
    for name in ("model", "cond_stage_model", "first_stage_model", "control_model"):
        found = getattr(value, name, None)
        if isinstance(found, torch.nn.Module):
            return found
    raise TypeError(f"no torch module in a {type(value).__name__}")


def patcher_of(value: Any) -> Any:
    """The patcher of a MODEL, CLIP or VAE."""
    return getattr(value, "patcher", value)


class _HostBuffer:
    """In place of memory that only comfy_aimdo's library can get."""

    def __init__(self, *_sizes: int) -> None: ...


def emulate_dynamic_vram() -> None:
    """Give each model the patcher that it has with dynamic VRAM on a GPU, as ComfyUI's main does it.

    What needs the library or a GPU is left out: nothing can be loaded under such a patcher here, and what
    asks for a plain one in its place is ComfyUI's own.
    """
    buffers: Any = importlib.import_module("comfy_aimdo.host_buffer")
    model_patcher: Any = importlib.import_module("comfy.model_patcher")

    def new(cls: Any, *_given: Any, **_named: Any) -> Any:
        return object.__new__(cls)

    kind: Any = model_patcher.ModelPatcherDynamic
    buffers.HostBuffer = _HostBuffer
    kind.__new__ = new  # which gives a plain one for the CPU
    model_patcher.CoreModelPatcher = kind


if os.environ.get("LEGION_TEST_DYNAMIC_VRAM"):
    emulate_dynamic_vram()


def use_configurations_of(folder: Any) -> None:
    """Have ComfyUI find the configurations of CLIP_VISION, and Llama's tokenizer, in this folder."""
    for name in ("comfy.clip_vision", "comfy.text_encoders.hunyuan_video"):
        importlib.import_module(name).__file__ = os.path.join(folder, "configurations", "code.py")


if os.environ.get("LEGION_TEST_CONFIGURATIONS"):
    use_configurations_of(os.environ["LEGION_TEST_CONFIGURATIONS"])


class _Probe:
    RETURN_TYPES: tuple[str, ...] = ("*",)
    FUNCTION = "run"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"value": (ANY,)}}


class ModelsLook(_Probe):
    """What kind of object it is, a digest of its weights, and which process this is."""

    def run(self, value: Any) -> tuple[Any]:
        module = torch_module(value)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return ([kind, type(module).__name__, digest(module.state_dict().values()), os.getpid()],)


class ModelsPatchers(_Probe):
    """The classes of a value's patcher, and of one that is asked for without dynamic VRAM."""

    def run(self, value: Any) -> tuple[Any]:
        patcher = patcher_of(value)
        plain = patcher.clone(disable_dynamic=True)
        kinds = [type(patcher).__name__, type(plain).__name__]
        return ([*kinds, plain.model is not patcher.model, digest(plain.model.state_dict().values())],)


class ModelsForget(_Probe):
    """Says that a model was changed; then asks for it without dynamic VRAM, and gives the error's text."""

    def run(self, value: Any) -> tuple[Any]:
        from legion_shm.supervisor.comfy_models import models_changed

        models_changed(value)
        try:
            patcher_of(value).clone(disable_dynamic=True)
        except Exception as error:
            return (f"{type(error).__name__}: {error}",)
        return ("",)


class ModelsBack(_Probe):
    """What came, as it came."""

    def run(self, value: Any) -> tuple[Any]:
        return (value,)


class ModelsWrite(_Probe):
    """Writes into the weights in place, as a careless node might."""

    def run(self, value: Any) -> tuple[Any]:
        module = torch_module(value)
        with torch.inference_mode():
            for parameter in module.parameters():
                parameter.data.add_(1.0)
        return (digest(module.state_dict().values()),)


class ModelsSame(_Probe):
    """Whether two objects share one torch module here."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"value": (ANY,), "other": (ANY,)}}

    def run(self, value: Any, other: Any) -> tuple[Any]:
        return (torch_module(value) is torch_module(other),)


class ModelsStyle(_Probe):
    """A STYLE_MODEL's answer to a fixed CLIP_VISION_OUTPUT."""

    def run(self, value: Any) -> tuple[Any]:
        class Output:
            last_hidden_state = torch.linspace(-1, 1, 2 * 16 * 1024).reshape(2, 16, 1024)

        return (value.get_cond(Output()),)


class ModelsPatch(_Probe):
    """Puts a patch of this pack into a model, which other packages may not know."""

    def run(self, value: Any) -> tuple[Any]:
        patched = value.clone()
        patched.set_model_sampler_post_cfg_function(half)
        return (patched,)


def half(args: Any) -> Any:
    return args["denoised"] * 0.5


_CLASSES = (
    ModelsBack,
    ModelsForget,
    ModelsLook,
    ModelsPatch,
    ModelsPatchers,
    ModelsSame,
    ModelsStyle,
    ModelsWrite,
)
NODE_CLASS_MAPPINGS = {kind.__name__: kind for kind in _CLASSES}
