"""Nodes that change an image's pixels: ImageBlend, ImageInvert, ImageBlur.

Owns nothing but those classes. IMAGE is ``[B,H,W,C]`` float 0..1 throughout.
"""

from __future__ import annotations

from typing import Any

import torch

from legion_shm.supervisor.graph_nodes.resize import match_channels, resize

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "ImageBlend", "ImageBlur", "ImageInvert"]

_BLEND_MODES = ["normal", "multiply", "screen", "overlay", "soft_light", "difference"]


class ImageBlend:
    """Mixes two images by a blend mode of the W3C's compositing formulas, then by ``blend_factor``."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "blend_images"
    WRITES_SHARED = False
    CATEGORY = "image/filters"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {
            "required": {
                "image1": ("IMAGE",),
                "image2": ("IMAGE",),
                "blend_factor": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}),
                "blend_mode": (_BLEND_MODES,),
            }
        }

    def blend_images(
        self, image1: torch.Tensor, image2: torch.Tensor, blend_factor: float, blend_mode: str
    ) -> tuple[torch.Tensor]:
        other = match_channels(image2, image1.shape[-1]).to(image1.device)
        if other.shape[1:3] != image1.shape[1:3]:
            other = resize(other, image1.shape[2], image1.shape[1], "bicubic", "center")
        mixed = image1 * (1 - blend_factor) + _blend(image1, other, blend_mode) * blend_factor
        return (mixed.clamp(0, 1),)


def _blend(base: torch.Tensor, layer: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "normal":
        return layer
    if mode == "multiply":
        return base * layer
    if mode == "screen":
        return 1 - (1 - base) * (1 - layer)
    if mode == "overlay":
        return torch.where(base <= 0.5, 2 * base * layer, 1 - 2 * (1 - base) * (1 - layer))
    if mode == "soft_light":
        curve = torch.where(base <= 0.25, ((16 * base - 12) * base + 4) * base, base.sqrt())
        darker = base - (1 - 2 * layer) * base * (1 - base)
        return torch.where(layer <= 0.5, darker, base + (2 * layer - 1) * (curve - base))
    if mode == "difference":
        return base - layer
    raise ValueError(f"unknown blend_mode {mode!r}; use one of {', '.join(_BLEND_MODES)}")


class ImageInvert:
    """One minus each value."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "invert"
    WRITES_SHARED = False
    CATEGORY = "image/color"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"image": ("IMAGE",)}}

    def invert(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        return (1.0 - image,)


class ImageBlur:
    """A Gaussian blur whose ``sigma`` is in units of the radius, with mirrored edges."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "blur"
    WRITES_SHARED = False
    CATEGORY = "image/filters"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {
            "required": {
                "image": ("IMAGE",),
                "blur_radius": ("INT", {"default": 1, "min": 1, "max": 31, "step": 1}),
                "sigma": ("FLOAT", {"default": 1.0, "min": 0.1, "max": 10.0, "step": 0.1}),
            }
        }

    def blur(self, image: torch.Tensor, blur_radius: int, sigma: float) -> tuple[torch.Tensor]:
        if blur_radius == 0:
            return (image,)
        if blur_radius >= min(image.shape[1], image.shape[2]):
            raise ValueError(
                f"blur_radius {blur_radius} needs an image larger than it on both sides, "
                f"not {image.shape[2]}x{image.shape[1]}; use a smaller radius"
            )
        channels = int(image.shape[-1])
        weights = gaussian_weights(blur_radius, sigma).to(device=image.device, dtype=image.dtype)
        planes = torch.nn.functional.pad(image.movedim(-1, 1), [blur_radius] * 4, mode="reflect")
        # The square kernel exp(-(x²+y²)/2σ²) is the product of two lines, and two thin passes cost less.
        for kernel in (weights.view(1, 1, 1, -1), weights.view(1, 1, -1, 1)):
            planes = torch.nn.functional.conv2d(planes, kernel.repeat(channels, 1, 1, 1), groups=channels)
        return (planes.movedim(1, -1),)


def gaussian_weights(radius: int, sigma: float) -> torch.Tensor:
    """``2*radius+1`` weights that sum to 1, of a Gaussian over -1..1."""
    line = torch.linspace(-1, 1, 2 * radius + 1)
    weights = torch.exp(-(line**2) / (2.0 * sigma * sigma))
    return weights / weights.sum()


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "ImageBlend": ImageBlend,
    "ImageBlur": ImageBlur,
    "ImageInvert": ImageInvert,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "ImageBlend": "Blend Images",
    "ImageBlur": "Blur Image",
    "ImageInvert": "Invert Image Colors",
}
