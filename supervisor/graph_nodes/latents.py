"""A LATENT out of an image and back, without a model.

Owns ImageToLatent and LatentToImage. They are not a VAE and their latents mean nothing to a diffusion model:
they only rearrange, each 8x8 square of pixels becoming 64 channels per colour channel (space to depth), and
back, value for value. They let a graph without models make, move and check LATENT values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["FACTOR", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "ImageToLatent", "LatentToImage"]

FACTOR = 8


class ImageToLatent:
    """IMAGE ``[B,H,W,C]`` to samples ``[B,C*64,H//8,W//8]``, cut at the centre to multiples of 8."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"
    WRITES_SHARED = False
    CATEGORY = "latent"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"image": ("IMAGE",)}}

    def encode(self, image: torch.Tensor) -> tuple[dict[str, torch.Tensor]]:
        height, width = int(image.shape[1]), int(image.shape[2])
        if min(height, width) < FACTOR:
            raise ValueError(f"an image of {width}x{height} is too small; {FACTOR}x{FACTOR} is the least")
        top, left = height % FACTOR // 2, width % FACTOR // 2
        cut = image[
            :, top : top + height // FACTOR * FACTOR, left : left + width // FACTOR * FACTOR, :
        ].movedim(-1, 1)
        return ({"samples": torch.nn.functional.pixel_unshuffle(cut, FACTOR)},)


class LatentToImage:
    """The inverse of ImageToLatent."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    WRITES_SHARED = False
    CATEGORY = "latent"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"samples": ("LATENT",)}}

    def decode(self, samples: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor]:
        values = samples["samples"]
        if values.ndim != 4 or values.shape[1] % (FACTOR * FACTOR):
            raise ValueError(
                f"samples of shape {list(values.shape)} were not made by ImageToLatent, whose channels are a "
                f"multiple of {FACTOR * FACTOR}; decode a model's latents with its VAE"
            )
        return (torch.nn.functional.pixel_shuffle(values, FACTOR).movedim(1, -1).contiguous(),)


NODE_CLASS_MAPPINGS: dict[str, type] = {"ImageToLatent": ImageToLatent, "LatentToImage": LatentToImage}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "ImageToLatent": "Image to Latent (space to depth)",
    "LatentToImage": "Latent to Image (depth to space)",
}
