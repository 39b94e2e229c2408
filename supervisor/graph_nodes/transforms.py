"""Nodes that change an image's size or batch: ImageScale, ImageScaleBy, ImageCrop, ImageBatch and kin.

Owns nothing but those classes. IMAGE is ``[B,H,W,C]`` float 0..1 throughout.
"""

from __future__ import annotations

from typing import Any

import torch

from legion_shm.supervisor.graph_nodes.resize import (
    CROP_METHODS,
    MAX_RESOLUTION,
    UPSCALE_METHODS,
    match_channels,
    resize,
)

__all__ = [
    "NODE_CLASS_MAPPINGS",
    "NODE_DISPLAY_NAME_MAPPINGS",
    "GetImageSize",
    "ImageBatch",
    "ImageCrop",
    "ImageFromBatch",
    "ImageScale",
    "ImageScaleBy",
    "RepeatImageBatch",
]


class ImageScale:
    """Scales to a size; a width or height of 0 follows from the other by the aspect ratio."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"
    WRITES_SHARED = False
    CATEGORY = "image/upscaling"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        side = {"default": 512, "min": 0, "max": MAX_RESOLUTION, "step": 1}
        return {
            "required": {
                "image": ("IMAGE",),
                "upscale_method": (UPSCALE_METHODS,),
                "width": ("INT", side),
                "height": ("INT", side),
                "crop": (CROP_METHODS,),
            }
        }

    def upscale(
        self, image: torch.Tensor, upscale_method: str, width: int, height: int, crop: str
    ) -> tuple[torch.Tensor]:
        if width == 0 and height == 0:
            return (image,)
        if width == 0:
            width = max(1, round(image.shape[2] * height / image.shape[1]))
        elif height == 0:
            height = max(1, round(image.shape[1] * width / image.shape[2]))
        return (resize(image, width, height, upscale_method, crop),)


class ImageScaleBy:
    """Scales by a factor."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"
    WRITES_SHARED = False
    CATEGORY = "image/upscaling"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {
            "required": {
                "image": ("IMAGE",),
                "upscale_method": (UPSCALE_METHODS,),
                "scale_by": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 8.0, "step": 0.01}),
            }
        }

    def upscale(self, image: torch.Tensor, upscale_method: str, scale_by: float) -> tuple[torch.Tensor]:
        width = max(1, round(image.shape[2] * scale_by))
        height = max(1, round(image.shape[1] * scale_by))
        return (resize(image, width, height, upscale_method),)


class ImageCrop:
    """Cuts out ``width`` x ``height`` at ``x``, ``y``; what lies beyond the image is left off."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "crop"
    WRITES_SHARED = False
    CATEGORY = "image/transform"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        side = {"default": 512, "min": 1, "max": MAX_RESOLUTION, "step": 1}
        place = {"default": 0, "min": 0, "max": MAX_RESOLUTION, "step": 1}
        return {
            "required": {
                "image": ("IMAGE",),
                "width": ("INT", side),
                "height": ("INT", side),
                "x": ("INT", place),
                "y": ("INT", place),
            }
        }

    def crop(self, image: torch.Tensor, width: int, height: int, x: int, y: int) -> tuple[torch.Tensor]:
        left = min(x, image.shape[2] - 1)
        top = min(y, image.shape[1] - 1)
        return (image[:, top : top + height, left : left + width, :],)


class ImageBatch:
    """Joins two batches; the second is given the first's size, and both the larger number of channels."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "batch"
    WRITES_SHARED = False
    CATEGORY = "image/batch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"image1": ("IMAGE",), "image2": ("IMAGE",)}}

    def batch(self, image1: torch.Tensor, image2: torch.Tensor) -> tuple[torch.Tensor]:
        channels = max(image1.shape[-1], image2.shape[-1])
        first, second = match_channels(image1, channels), match_channels(image2, channels)
        if first.shape[1:] != second.shape[1:]:
            second = resize(second, first.shape[2], first.shape[1], "bilinear", "center")
        return (torch.cat((first, second), dim=0),)


class RepeatImageBatch:
    """A batch, ``amount`` times after each other."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "repeat"
    WRITES_SHARED = False
    CATEGORY = "image/batch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"image": ("IMAGE",), "amount": ("INT", {"default": 1, "min": 1, "max": 4096})}}

    def repeat(self, image: torch.Tensor, amount: int) -> tuple[torch.Tensor]:
        return (image.repeat(amount, 1, 1, 1),)


class ImageFromBatch:
    """``length`` images of a batch from ``batch_index`` on, which counts from the end when negative."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "frombatch"
    WRITES_SHARED = False
    CATEGORY = "image/batch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {
            "required": {
                "image": ("IMAGE",),
                "batch_index": ("INT", {"default": 0, "min": -MAX_RESOLUTION, "max": MAX_RESOLUTION}),
                "length": ("INT", {"default": 1, "min": 1, "max": 4096}),
            }
        }

    def frombatch(self, image: torch.Tensor, batch_index: int, length: int) -> tuple[torch.Tensor]:
        count = image.shape[0]
        first = batch_index + count if batch_index < 0 else batch_index
        first = max(0, min(count - 1, first))
        return (image[first : first + length].clone(),)


class GetImageSize:
    """Width, height and batch size of an image."""

    RETURN_TYPES = ("INT", "INT", "INT")
    RETURN_NAMES = ("width", "height", "batch_size")
    FUNCTION = "get_size"
    WRITES_SHARED = False
    CATEGORY = "image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"image": ("IMAGE",)}}

    def get_size(self, image: torch.Tensor) -> tuple[int, int, int]:
        return int(image.shape[2]), int(image.shape[1]), int(image.shape[0])


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "GetImageSize": GetImageSize,
    "ImageBatch": ImageBatch,
    "ImageCrop": ImageCrop,
    "ImageFromBatch": ImageFromBatch,
    "ImageScale": ImageScale,
    "ImageScaleBy": ImageScaleBy,
    "RepeatImageBatch": RepeatImageBatch,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "GetImageSize": "Get Image Size",
    "ImageBatch": "Batch Images",
    "ImageCrop": "Crop Image",
    "ImageFromBatch": "Get Image from Batch",
    "ImageScale": "Upscale Image",
    "ImageScaleBy": "Upscale Image By",
    "RepeatImageBatch": "Repeat Image Batch",
}
