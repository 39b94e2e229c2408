"""A class of one's own, its codec, and a node that takes it; own_codec.py sends one through a worker."""

from __future__ import annotations

from typing import Any

import torch

from legion_shm import register_codec


class Curve:
    """Not a dataclass: those cross by themselves."""

    def __init__(self, points: torch.Tensor) -> None:
        self.points = points


register_codec(Curve, reduce=lambda curve: {"points": curve.points}, rebuild=lambda state: Curve(**state))


class Grid:
    """Without a codec, so it is refused by name."""


class ReverseCurve:
    RETURN_TYPES = ("CURVE",)
    FUNCTION = "reverse"
    CATEGORY = "examples"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"curve": ("CURVE",)}}

    def reverse(self, curve: Curve) -> tuple[Curve]:
        return (Curve(curve.points.flip(0)),)


NODE_CLASS_MAPPINGS = {"ReverseCurve": ReverseCurve}
