"""Nodes that need no image: EmptyImage, EmptyLatentImage and the primitives.

Owns nothing but those classes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from legion_shm.supervisor.graph_nodes.resize import MAX_RESOLUTION

__all__ = [
    "NODE_CLASS_MAPPINGS",
    "NODE_DISPLAY_NAME_MAPPINGS",
    "EmptyImage",
    "EmptyLatentImage",
    "PrimitiveBoolean",
    "PrimitiveFloat",
    "PrimitiveInt",
    "PrimitiveString",
    "PrimitiveStringMultiline",
]

_LATENT_CHANNELS = 4
_LATENT_FACTOR = 8


class EmptyImage:
    """A batch of images of one colour, ``0xRRGGBB``."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "generate"
    WRITES_SHARED = False
    CATEGORY = "image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        side = {"default": 512, "min": 1, "max": MAX_RESOLUTION, "step": 1}
        return {
            "required": {
                "width": ("INT", side),
                "height": ("INT", side),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
                "color": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFF, "step": 1, "display": "color"}),
            }
        }

    def generate(self, width: int, height: int, batch_size: int = 1, color: int = 0) -> tuple[torch.Tensor]:
        colour = (
            torch.tensor([color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF], dtype=torch.float32) / 255
        )
        return (colour.expand(batch_size, height, width, 3).contiguous(),)


class EmptyLatentImage:
    """A batch of empty latents: zeros ``[B,4,H/8,W/8]``."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "generate"
    WRITES_SHARED = False
    CATEGORY = "model/latent"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        side = {"default": 512, "min": 16, "max": MAX_RESOLUTION, "step": 8}
        return {
            "required": {
                "width": ("INT", side),
                "height": ("INT", side),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
            }
        }

    def generate(self, width: int, height: int, batch_size: int = 1) -> tuple[dict[str, Any]]:
        shape = (batch_size, _LATENT_CHANNELS, height // _LATENT_FACTOR, width // _LATENT_FACTOR)
        return ({"samples": torch.zeros(shape), "downscale_ratio_spacial": _LATENT_FACTOR},)


class PrimitiveString:
    """A text."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "execute"
    WRITES_SHARED = False
    CATEGORY = "utilities/primitive"
    INPUT: tuple[str, dict[str, Any]] = ("STRING", {"multiline": False})

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"value": cls.INPUT}}

    def execute(self, value: object) -> tuple[object]:
        return (value,)


class PrimitiveStringMultiline(PrimitiveString):
    """A text of several lines."""

    WRITES_SHARED = False
    INPUT = ("STRING", {"multiline": True})


class PrimitiveInt(PrimitiveString):
    """A whole number."""

    WRITES_SHARED = False
    RETURN_TYPES = ("INT",)
    INPUT = ("INT", {"min": -sys.maxsize, "max": sys.maxsize, "control_after_generate": "fixed"})


class PrimitiveFloat(PrimitiveString):
    """A number."""

    WRITES_SHARED = False
    RETURN_TYPES = ("FLOAT",)
    INPUT = ("FLOAT", {"min": -sys.maxsize, "max": sys.maxsize, "step": 0.1})


class PrimitiveBoolean(PrimitiveString):
    """True or false."""

    WRITES_SHARED = False
    RETURN_TYPES = ("BOOLEAN",)
    INPUT = ("BOOLEAN", {})


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "EmptyImage": EmptyImage,
    "EmptyLatentImage": EmptyLatentImage,
    "PrimitiveBoolean": PrimitiveBoolean,
    "PrimitiveFloat": PrimitiveFloat,
    "PrimitiveInt": PrimitiveInt,
    "PrimitiveString": PrimitiveString,
    "PrimitiveStringMultiline": PrimitiveStringMultiline,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "EmptyImage": "Empty Image",
    "EmptyLatentImage": "Empty Latent Image",
    "PrimitiveBoolean": "Boolean",
    "PrimitiveFloat": "Float",
    "PrimitiveInt": "Int",
    "PrimitiveString": "Text",
    "PrimitiveStringMultiline": "Text (Multiline)",
}
