"""Between Pillow's pictures and IMAGE tensors: the one place where the two meet.

Owns the conversion of one picture; shapes here are ``[H,W,C]``, values 0..1.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

__all__ = ["to_picture", "to_pixels"]


def to_picture(image: torch.Tensor) -> Image.Image:
    """An image of 1, 3 or 4 channels as an 8-bit picture; fractions are cut off, as ComfyUI does."""
    scaled = (255.0 * image.detach().to(device="cpu", dtype=torch.float32)).clamp(0, 255).to(torch.uint8)
    return Image.fromarray((scaled[..., 0] if scaled.shape[-1] == 1 else scaled).numpy())


def to_pixels(picture: Image.Image, full: float = 255.0) -> torch.Tensor:
    """A picture as float32 ``[H,W,C]``, where ``full`` becomes 1."""
    values = torch.as_tensor(np.array(picture, dtype=np.float32)) / full
    return values.unsqueeze(-1) if values.ndim == 2 else values
