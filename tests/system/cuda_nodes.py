"""Node classes that work on a GPU; test_cuda.py runs them in workers."""

from __future__ import annotations

import gc
from typing import Any


class _Node:
    FUNCTION = "run"
    CATEGORY = "test"
    RETURN_TYPES: tuple[str, ...] = ("*",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"value": ("*",)}}

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:  # noqa: N802 - the protocol's name
        return float("nan")


class Describe(_Node):
    """Where the tensor is, what it holds (as lists), and whether this process has a CUDA context."""

    def run(self, value: Any) -> tuple[Any]:
        import torch

        cuda: Any = torch.cuda
        held = [str(value.device), value.cpu().tolist()] if isinstance(value, torch.Tensor) else [None, None]
        return ([*held, cuda.is_initialized()],)


class Double(_Node):
    """A new tensor on the same device."""

    def run(self, value: Any) -> tuple[Any]:
        return (value * 2,)


class WriteInPlace(_Node):
    RETURN_TYPES = ("*", "*")

    def run(self, value: Any) -> tuple[Any, Any]:
        before = value.cpu().clone()
        value.fill_(9)
        return (value, before)


class SideStream(_Node):
    """Work that still goes on when the node returns, on a stream of its own; the host waits for none."""

    def run(self, value: Any) -> tuple[Any]:
        import torch

        cuda: Any = torch.cuda
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            made = value.clone()
            for _ in range(200):
                made += 1
        cuda.current_stream().wait_stream(stream)
        return (made,)


class TakeAll(_Node):
    """Asks for more memory than any GPU has."""

    def run(self, value: Any) -> tuple[Any]:
        import torch

        return (torch.empty(1 << 45, dtype=torch.uint8, device="cuda"),)


class Hoard(_Node):
    """Takes ``value`` MiB of the GPU's memory and lets go of it; torch keeps it for later."""

    def run(self, value: int) -> tuple[Any]:
        import torch

        taken = torch.empty(int(value) << 20, dtype=torch.uint8, device="cuda")
        del taken
        gc.collect()
        return (torch.cuda.memory_reserved(),)


class OnGpu(_Node):
    """``value`` ones on the device, which nobody sent."""

    def run(self, value: int) -> tuple[Any]:
        import torch

        return (torch.ones(int(value), device="cuda"),)


NODE_CLASS_MAPPINGS = {
    kind.__name__: kind for kind in (Describe, Double, WriteInPlace, SideStream, TakeAll, Hoard, OnGpu)
}
