"""Node classes of workers whose tensors lie on the emulated GPU: importing this makes them so."""

from __future__ import annotations

from typing import Any

from legion_shm.transport.torch_devices import use_devices
from tests.cuda.emulation import EmulatedDevices

use_devices(EmulatedDevices())


class Add:
    """The value and one more, as a tensor of its own; what is no tensor goes through."""

    FUNCTION = "run"
    CATEGORY = "test"
    RETURN_TYPES = ("*",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"value": ("*",)}}

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:  # noqa: N802 - the protocol's name
        return float("nan")

    def run(self, value: Any) -> tuple[Any]:
        return (value + 1,)


class Ones(Add):
    """As many as are asked for."""

    def run(self, value: Any) -> tuple[Any]:
        import torch

        return (torch.ones(int(value)),)


class Array(Add):
    """Ones in main memory."""

    def run(self, value: Any) -> tuple[Any]:
        import numpy as np

        return (np.ones(int(value), dtype=np.float32),)


class Same(Add):
    def run(self, value: Any) -> tuple[Any]:
        return (value,)


NODE_CLASS_MAPPINGS = {f"Gpu{kind.__name__}": kind for kind in (Add, Array, Ones, Same)}
