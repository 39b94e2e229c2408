"""A custom node pack for the tests: copied into a ComfyUI's custom_nodes, and loaded by ComfyUI."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import os
import signal
import threading
from typing import Any

PromptServer: Any = importlib.import_module("server").PromptServer
ProgressBar: Any = importlib.import_module("comfy.utils").ProgressBar
ExecutionBlocker: Any = importlib.import_module("comfy_execution.graph").ExecutionBlocker
GraphBuilder: Any = importlib.import_module("comfy_execution.graph_utils").GraphBuilder

RUNS: list[str] = []
NODE_RUNNING = threading.Event()


async def probe_route(_request: Any) -> Any:
    return None


PromptServer.instance.routes.get("/legion_probe")(probe_route)


class _Probe:
    RETURN_TYPES: tuple[str, ...] = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"image": ("IMAGE",)}}


class ProbeSampler(_Probe):
    """Three steps of a progress bar, each with a preview."""

    def run(self, image: Any) -> tuple[Any]:
        from PIL import Image

        bar = ProgressBar(3)
        for step in range(1, 4):
            bar.update_absolute(step, 3, ("JPEG", Image.new("RGB", (8, 4), (step, 0, 0)), 64))
        return (image + 0.25,)


class ProbeSlow(_Probe):
    """Works in small steps until it is interrupted, or for half a minute."""

    def run(self, image: Any) -> tuple[Any]:
        bar, pause = ProgressBar(3000), threading.Event()
        NODE_RUNNING.set()
        for _ in range(3000):
            pause.wait(0.01)
            bar.update(1)
        return (image,)


class ProbeSwallow(_Probe):
    """Takes its interruption for a failure of its own and goes on; the next node must not run."""

    def run(self, image: Any) -> tuple[Any]:
        bar, pause = ProgressBar(3000), threading.Event()
        NODE_RUNNING.set()
        for _ in range(3000):
            pause.wait(0.01)
            try:
                bar.update(1)
            except Exception:
                break
        return (image,)


class ProbeAsync(_Probe):
    async def run(self, image: Any) -> tuple[Any]:
        NODE_RUNNING.set()
        await asyncio.sleep(30)
        return (image,)


class ProbeOwnProgress(_Probe):
    """Reports through legion_shm, as a node does that also runs outside of ComfyUI."""

    def run(self, image: Any) -> tuple[Any]:
        import legion_shm

        legion_shm.progress(1, 2)
        return (image,)


class ProbeFail(_Probe):
    def run(self, image: Any) -> tuple[Any]:
        raise ValueError(f"no image of {image.shape[0]} suits me")


class ProbeExit(_Probe):
    def run(self, image: Any) -> tuple[Any]:
        raise SystemExit(3)


class ProbeCrash(_Probe):
    def run(self, image: Any) -> tuple[Any]:
        os.kill(os.getpid(), signal.SIGSEGV)
        return (image,)


class ProbeEatMemory(_Probe):
    """Wants a gigabyte while its process may have no more than 64 MB more than it has."""

    def run(self, image: Any) -> tuple[Any]:
        import resource

        import torch

        with open("/proc/self/statm", encoding="ascii") as file:
            has = int(file.read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (has + (64 << 20), hard))
        try:
            return (torch.ones(1 << 28) + image.sum(),)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class ProbeKilled(_Probe):
    """As the kernel's OOM killer does it."""

    def run(self, image: Any) -> tuple[Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return (image,)


class ProbeHoldGil(_Probe):
    """Sleeps in C for a minute without giving up the interpreter's lock."""

    def run(self, image: Any) -> tuple[Any]:
        ctypes.PyDLL(None).sleep(60)
        return (image,)


class ProbeBlock(_Probe):
    def run(self, image: Any) -> tuple[Any]:
        return (ExecutionBlocker("blocked by the probe"),)


class ProbeStop(_Probe):
    """Interrupts by itself, as nodes that wait for a choice do when none is made."""

    def run(self, image: Any) -> tuple[Any]:
        raise importlib.import_module("comfy.model_management").InterruptProcessingException


class ProbeCount(_Probe):
    def run(self, image: Any) -> tuple[Any]:
        RUNS.append("count")
        return (image * 0.5,)


class ProbeExpand(_Probe):
    """Becomes two ImageInvert nodes."""

    def run(self, image: Any) -> dict[str, Any]:
        graph = GraphBuilder()
        first = graph.node("ImageInvert", image=image)
        second = graph.node("ImageInvert", image=first.out(0))
        return {"result": (second.out(0),), "expand": graph.finalize()}


class ProbeLazy(_Probe):
    """Asks for its image only when it runs."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"image": ("IMAGE", {"lazy": True})}}

    def check_lazy_status(self, image: Any) -> list[str]:
        return ["image"] if image is None else []

    def run(self, image: Any) -> tuple[Any]:
        return (image,)


NODE_CLASS_MAPPINGS = {
    kind.__name__: kind
    for kind in (
        ProbeAsync,
        ProbeBlock,
        ProbeCount,
        ProbeCrash,
        ProbeEatMemory,
        ProbeExit,
        ProbeExpand,
        ProbeFail,
        ProbeHoldGil,
        ProbeKilled,
        ProbeLazy,
        ProbeOwnProgress,
        ProbeSampler,
        ProbeSlow,
        ProbeStop,
        ProbeSwallow,
    )
}
