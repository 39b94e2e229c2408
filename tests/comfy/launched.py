"""``python -m tests.comfy.launched``: ComfyUI's own server under `legion launch`, and the same without it.

Owns the nodes that a workflow on such a server is made of, one prompt there and back, and the comparison: two
servers take turns at the same prompts, and the figures are of the Master node's own function, on a fresh
image each time, with a worker that is warm and hands the image straight back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.comfy.side_by_side import SIZES
from tests.nodes.comfy_server import LAUNCH, ComfyServer

__all__ = ["PACK", "prompt_for", "shown_by", "start"]

_WARM_UP = 5

PACK = """
import os, time
import torch

took = []


def _measured(node_class):
    inner = getattr(node_class, node_class.FUNCTION)
    if hasattr(inner, "measured"):
        return

    def outer(*args, **kwargs):
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            took.append(time.perf_counter() - began)

    outer.measured = True
    setattr(node_class, node_class.FUNCTION, outer)


class LaunchSource:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "launch"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {name: ("INT", {"max": 1 << 40}) for name in ("seed", "height", "width")}}

    def run(self, seed, height, width):
        import nodes

        _measured(nodes.NODE_CLASS_MAPPINGS["LegionMaster"])
        return (torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed)),)


class LaunchSink:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "launch", True

    @classmethod
    def INPUT_TYPES(cls):
        came = ("*", {"forceInput": True})
        return {"required": {"sent": ("IMAGE",), "came": came, "inverted": came, "campaign": ("*", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, sent, came, inverted, campaign):
        stats = campaign.job.result(timeout=0).stats
        copies = {"to_worker": 0, "from_worker": 0}
        for transfer in stats.transfers:
            copies[transfer.direction] += transfer.copies
        shown = {
            "took_s": took[-1],
            "same": torch.equal(sent, came),
            "inverted": inverted is None or torch.equal(1.0 - sent, inverted),
            "copies": copies,
            "launched": "LEGION_LAUNCHED" in os.environ,
        }
        return {"ui": {"seen": [shown]}}


NODE_CLASS_MAPPINGS = {c.__name__: c for c in (LaunchSource, LaunchSink)}
"""


def start(comfyui: Path, python: str, base: Path, *, launched: bool) -> ComfyServer:
    """A server with those nodes, under `legion launch` or without it."""
    return ComfyServer(
        comfyui, python, base, probe_pack=PACK, environment={}, launcher=LAUNCH if launched else ()
    )


def prompt_for(seed: int, *, height: int, width: int, invert: bool = False) -> dict[str, Any]:
    """An image to a worker, which gives it back and, if asked for, its inverse as well."""
    flow: dict[str, Any] = {
        "0": {"class_type": "LegionImporter", "inputs": {}},
        "9": {"class_type": "LegionExporter", "inputs": {"input_1": ["0", 0]}},
    }
    if invert:
        flow["1"] = {"class_type": "ImageInvert", "inputs": {"image": ["0", 0]}}
        flow["9"]["inputs"]["input_2"] = ["1", 0]
    settings = 'comfyui: {type: local_process}\nexecution: {extra_args: "--cpu"}'
    image = {"seed": seed, "height": height, "width": width}
    master = {"legion_config": ["config", 0], "input_1": ["source", 0], "workflow_text": json.dumps(flow)}
    sink = {
        "sent": ["source", 0],
        "came": ["master", 1],
        "inverted": ["master", 2],
        "campaign": ["master", 0],
    }
    return {
        "config": {"class_type": "LegionConfig", "inputs": {"config_yaml": settings}},
        "source": {"class_type": "LaunchSource", "inputs": image},
        "master": {"class_type": "LegionMaster", "inputs": master},
        "sink": {"class_type": "LaunchSink", "inputs": sink},
    }


def shown_by(server: ComfyServer, prompt: dict[str, Any]) -> dict[str, Any]:
    """What the sink saw. AssertionError where the prompt fails."""
    return dict(server.run(prompt)["outputs"]["sink"]["seen"][0])


def compare(servers: dict[str, ComfyServer], sizes: Sequence[str], rounds: int) -> None:
    print(
        "| image | without, ms: median (worst), copies | under legion launch, ms | ratio |\n|---|---|---|---|"
    )
    seed = 0
    for size in sizes:
        height, width = SIZES[size]
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
        for number in range(_WARM_UP + rounds):
            for name, server in servers.items():
                seed += 1
                seen = shown_by(server, prompt_for(seed, height=height, width=width))
                if not seen["same"]:
                    raise RuntimeError(f"{name}: the image came back with other contents")
                if number >= _WARM_UP:
                    taken[name].append(seen)
        cells: list[str] = []
        medians: list[float] = []
        for runs in taken.values():
            took_ms = [1e3 * run["took_s"] for run in runs]
            copies = statistics.mean(sum(run["copies"].values()) for run in runs)
            medians.append(statistics.median(took_ms))
            cells.append(f"{medians[-1]:.1f} ({max(took_ms):.1f}), {copies:.2f}")
        print(f"| {size} | {cells[0]} | {cells[1]} | {medians[0] / medians[1]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.comfy.launched", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--comfyui-python", required=True, help="has ComfyUI's packages, and Legion's")
    parser.add_argument("--sizes", default="1080p", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each server and size")
    chosen = parser.parse_args()
    comfyui, python = chosen.comfyui.expanduser().resolve(), os.path.expanduser(chosen.comfyui_python)
    with tempfile.TemporaryDirectory(prefix="launched-") as made, contextlib.ExitStack() as stack:
        servers: dict[str, ComfyServer] = {}
        for name in ("plain", "launched"):
            base = Path(made) / name
            base.mkdir()
            servers[name] = start(comfyui, python, base, launched=name == "launched")
            stack.callback(servers[name].stop)
        compare(servers, chosen.sizes.split(","), chosen.rounds)


if __name__ == "__main__":
    main()
