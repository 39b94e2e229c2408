"""Scaling of IMAGE tensors, as several nodes need it.

Owns the five methods and the centre crop. Shapes here are IMAGE's, ``[B,H,W,C]``.
"""

from __future__ import annotations

import torch
from PIL import Image

from legion_shm.supervisor.graph_nodes.pictures import to_picture, to_pixels

__all__ = ["CROP_METHODS", "MAX_RESOLUTION", "UPSCALE_METHODS", "match_channels", "resize"]

UPSCALE_METHODS = ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]
CROP_METHODS = ["disabled", "center"]
MAX_RESOLUTION = 16384


def resize(image: torch.Tensor, width: int, height: int, method: str, crop: str = "disabled") -> torch.Tensor:
    """``image`` at ``width`` x ``height``; with crop "center" cut to the new aspect ratio first.

    "lanczos" is Pillow's and works on 8 bits per channel; the others are `torch.nn.functional.interpolate`'s.
    """
    if crop == "center":
        image = _crop_to_aspect(image, width, height)
    if method == "lanczos":
        return _lanczos(image, width, height)
    planes = image.movedim(-1, 1)
    return torch.nn.functional.interpolate(planes, size=(height, width), mode=method).movedim(1, -1)


def _crop_to_aspect(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    old_height, old_width = int(image.shape[1]), int(image.shape[2])
    old_aspect, new_aspect = old_width / old_height, width / height
    left = top = 0
    if old_aspect > new_aspect:
        left = round((old_width - old_width * (new_aspect / old_aspect)) / 2)
    elif old_aspect < new_aspect:
        top = round((old_height - old_height * (old_aspect / new_aspect)) / 2)
    return image[:, top : old_height - top, left : old_width - left, :]


def _lanczos(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    scaled = [
        to_pixels(to_picture(frame).resize((width, height), resample=Image.Resampling.LANCZOS))
        for frame in image
    ]
    return torch.stack(scaled).to(device=image.device, dtype=image.dtype)


def match_channels(image: torch.Tensor, channels: int) -> torch.Tensor:
    """``image`` with ``channels`` channels: cut, or filled up with ones (an alpha that hides nothing)."""
    have = int(image.shape[-1])
    if have > channels:
        return image[..., :channels]
    if have < channels:
        return torch.nn.functional.pad(image, (0, channels - have), value=1.0)
    return image
