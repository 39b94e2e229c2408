"""Node classes of one's own, by ComfyUI's protocol; own_nodes.py runs them in a worker."""

from __future__ import annotations

from typing import Any

import torch

from legion_shm import progress


class Vignette:
    """Darkens an image towards its corners."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "apply"
    CATEGORY = "examples"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE",),
                "strength": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0}),
            }
        }

    def apply(self, image: torch.Tensor, strength: float) -> tuple[torch.Tensor]:
        height, width = image.shape[1:3]
        y = torch.linspace(-1, 1, height).unsqueeze(1)
        x = torch.linspace(-1, 1, width).unsqueeze(0)
        shade = 1 - strength * (x.square() + y.square()) / 2
        frames: list[torch.Tensor] = []
        for number, frame in enumerate(image, 1):
            frames.append(frame * shade.unsqueeze(-1))
            progress(number, len(image))  # shows in the events, and stops here when the job is cancelled
        return (torch.stack(frames),)


class Statistics:
    """Mean and standard deviation, as two numbers."""

    RETURN_TYPES = ("FLOAT", "FLOAT")
    RETURN_NAMES = ("mean", "std")
    FUNCTION = "measure"
    CATEGORY = "examples"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",)}}

    def measure(self, image: torch.Tensor) -> tuple[float, float]:
        return float(image.mean()), float(image.std())


NODE_CLASS_MAPPINGS: dict[str, type] = {"Vignette": Vignette, "Statistics": Statistics}
