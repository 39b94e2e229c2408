"""``python -m tests.comfy.side_by_side``: the Master nodes of LegionPower and of Legion SHM, in one run.

Two ComfyUI servers, each with one of the packages among its custom nodes, take turns at the same prompts. The
figures are of the Master node's own function in the server that runs it, on a fresh image each time, with a
worker that is warm and a worker workflow that hands the image straight back. Starts and idle memory, beside
those of the server itself, come after it (`tests.comfy.conformance.measure`).

LegionPower runs from a copy, none of whose files is changed. As shipped it does not run; what it needs is put
around it: absolute paths in its ``config.yaml`` (its placeholders are never filled in), a link to ComfyUI's
``main.py`` in the base directory (it starts the worker from there), a worker workflow without a comment (its
own example's ends in an error) and a temporary folder of the worker's own (else the worker's start empties
the master's).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import psutil

from legion_shm.clock import monotonic_s
from tests.comfy.conformance.runner import free_port
from tests.nodes.comfy_server import REPO, ComfyServer

SIZES = {"512²": (512, 512), "1024²": (1024, 1024), "1080p": (1080, 1920), "4K": (2160, 3840)}
BATCHES = (1, 8)
_WARM_UP = 3
"""Runs of a size that do not count: the first ones find no warm memory for it, in either."""
_SETTLE_S = 3.0
_PROMPT_WAIT_S = 300.0

# A source of fresh images and a sink; and a clock around the functions of the Master and the Warmupper.
PACK = """
import time
import torch

took = {}


def _measured(class_type):
    import nodes

    node_class = nodes.NODE_CLASS_MAPPINGS[class_type]
    inner = getattr(node_class, node_class.FUNCTION)
    if hasattr(inner, "measured"):
        return

    def outer(*args, **kwargs):
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            took[class_type] = time.perf_counter() - began

    outer.measured = True
    setattr(node_class, node_class.FUNCTION, outer)


class BenchSource:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "bench"

    @classmethod
    def INPUT_TYPES(cls):
        names = ("seed", "batch", "height", "width")
        return {"required": {name: ("INT", {"max": 1 << 40}) for name in names}}

    def run(self, seed, batch, height, width):
        _measured("LegionMaster")
        return (torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed)),)


class BenchSink:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "bench", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sent": ("IMAGE",), "came": ("*", {"forceInput": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, sent, came):
        worst = max(float((a - b).abs().max()) for a, b in zip(sent, came, strict=True))
        return {"ui": {"took_s": [took["LegionMaster"]], "difference": [worst]}}


class BenchReady:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "bench", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"legion_campaign": ("LEGION_CAMPAIGN",)}}

    def run(self, legion_campaign):
        return {"ui": {"took_s": [took["LegionWarmup"]]}}


class BenchClock:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LEGION_CONFIG",), "run", "bench"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"legion_config": ("LEGION_CONFIG",)}}

    def run(self, legion_config):
        _measured("LegionWarmup")
        return (legion_config,)


NODE_CLASS_MAPPINGS = {c.__name__: c for c in (BenchSource, BenchSink, BenchReady, BenchClock)}
"""

PASSTHROUGH = {
    "12": {"class_type": "LegionImporter", "inputs": {}},
    "13": {
        "class_type": "LegionExporter",
        "inputs": {"data_exchange_root": ["12", 5], "input_1": ["12", 0]},
    },
}


@dataclass
class Side:
    """One of the two: its server, and what was measured there."""

    name: str
    server: ComfyServer
    arguments: str
    ready_s: list[float] = field(default_factory=list[float])
    idle_uss: list[int] = field(default_factory=list[int])
    took_s: dict[tuple[str, int], list[float]] = field(default_factory=dict[tuple[str, int], list[float]])
    worst: float = 0.0

    def config(self, worker: int) -> dict[str, Any]:
        """Each number stands for a worker of its own."""
        settings = [
            "comfyui: {type: local_process, port: auto}",
            "execution:",
            f"  extra_args: {json.dumps(self.arguments)}",
            f'  env_vars: {{WORKER: "{worker}"}}',
            "workflow: passthrough.json",
        ]
        return {"class_type": "LegionConfig", "inputs": {"config_yaml": "\n".join(settings)}}

    def run(self, prompt: dict[str, Any], output: str) -> dict[str, Any]:
        entry = self.server.wait(self.server.queue(prompt), _PROMPT_WAIT_S)
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(f"{self.name}: {json.dumps(entry['status'], indent=1)[:4000]}")
        return dict(entry["outputs"][output])

    def start_worker(self, worker: int) -> None:
        known = set(self._descendants())
        prompt = {
            "config": self.config(worker),
            "clock": {"class_type": "BenchClock", "inputs": {"legion_config": ["config", 0]}},
            "warm": {"class_type": "LegionWarmup", "inputs": {"legion_config": ["clock", 0]}},
            "ready": {"class_type": "BenchReady", "inputs": {"legion_campaign": ["warm", 0]}},
        }
        self.ready_s.append(self.run(prompt, "ready")["took_s"][0])
        Event().wait(_SETTLE_S)
        new = [process for process in self._descendants() if process not in known]
        self.idle_uss.append(sum(process.memory_full_info().uss for process in new))

    def passthrough(self, size: str, batch: int, seed: int) -> float:
        height, width = SIZES[size]
        shape = {"seed": seed, "batch": batch, "height": height, "width": width}
        prompt = {
            "config": self.config(0),
            "source": {"class_type": "BenchSource", "inputs": shape},
            "master": {
                "class_type": "LegionMaster",
                "inputs": {"legion_config": ["config", 0], "input_1": ["source", 0]},
            },
            "sink": {"class_type": "BenchSink", "inputs": {"sent": ["source", 0], "came": ["master", 1]}},
        }
        shown = self.run(prompt, "sink")
        self.worst = max(self.worst, shown["difference"][0])
        return float(shown["took_s"][0])

    def _descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.server.process.pid).children(recursive=True)

    def close(self) -> None:
        left = self._descendants() if self.server.process.poll() is None else []
        self.server.stop()
        for process in left:  # LegionPower's workers outlive their master
            if process.is_running():
                process.kill()
        psutil.wait_procs(left, timeout=10)


def legion_power(comfyui: Path, python: str, tree: Path, base: Path) -> Side:
    copy = base / "LegionPower"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(".git"))
    runtime = base / "user" / "default" / "ComfyUI-LegionPower"
    (runtime / "workflows").mkdir(parents=True)
    (runtime / "workflows" / "passthrough.json").write_text(json.dumps(PASSTHROUGH))
    (base / "main.py").symlink_to(comfyui / "main.py")
    settings = {
        "ports": {"start_port": free_port(), "max_workers": 20},
        "worker": {"startup_timeout": 300},
        "paths": {
            "workflows_roots": [str(runtime / "workflows")],
            "data_exchange_root": str(runtime / "data_exchange"),
            "temp_root_dir": str(runtime / "temp"),
        },
    }
    (runtime / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (base / "worker").mkdir()
    arguments = (
        f"--cpu --listen 127.0.0.1 --base-directory {base} --front-end-root {base / 'frontend'} "
        f"--temp-directory {base / 'worker'} --database-url sqlite:///:memory:"
    )
    server = ComfyServer(
        comfyui,
        python,
        base,
        legion=copy,
        name="ComfyUI-LegionPower",
        probe_pack=PACK,
        environment={},
    )
    return Side("LegionPower", server, arguments)


def legion_shm(comfyui: Path, python: str, base: Path) -> Side:
    workflows = base / "user" / "default" / "Legion-SHM" / "workflows"
    workflows.mkdir(parents=True)
    (workflows / "passthrough.json").write_text(json.dumps(PASSTHROUGH))
    server = ComfyServer(comfyui, python, base, legion=REPO, probe_pack=PACK, environment={})
    return Side("Legion SHM", server, "--cpu")


def compare(sides: list[Side], *, runs: int, starts: int, say: Callable[[str], None]) -> None:
    for number in range(starts):
        for side in sides:
            side.start_worker(number)
            ready_s, uss = side.ready_s[-1], side.idle_uss[-1]
            say(f"{side.name}: worker {number} ready after {ready_s:.2f} s, {uss / 1e6:.0f} MB")
    seed = 0
    for batch in BATCHES:
        for size in SIZES:
            for number in range(runs + _WARM_UP):
                for side in sides:
                    seed += 1
                    took_s = side.passthrough(size, batch, seed)
                    if number >= _WARM_UP:
                        side.took_s.setdefault((size, batch), []).append(took_s)
            say(_row(sides, size, batch))


def _row(sides: list[Side], size: str, batch: int) -> str:
    theirs, ours = (side.took_s[size, batch] for side in sides)
    ratio = statistics.median(theirs) / statistics.median(ours)
    cells = [f"{statistics.median(took) * 1e3:.1f} ({max(took) * 1e3:.1f})" for took in (theirs, ours)]
    return f"| {size} | {batch} | {cells[0]} | {cells[1]} | {ratio:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.comfy.side_by_side", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument(
        "--comfyui-python", required=True, help="has ComfyUI's packages, Legion's, and requests"
    )
    parser.add_argument("--legionpower", type=Path, required=True, help="a checkout of ComfyUI-LegionPower")
    parser.add_argument("--runs", type=int, default=5, help="of each size, after those that warm it up")
    parser.add_argument("--starts", type=int, default=3, help="workers that each starts")
    parser.add_argument("--rounds", type=int, default=5, help="of starts beside the server's own; 0: none")
    chosen = parser.parse_args()
    comfyui, python = chosen.comfyui.expanduser().resolve(), os.path.expanduser(chosen.comfyui_python)
    began_s = monotonic_s()
    sides: list[Side] = []
    with tempfile.TemporaryDirectory(prefix="side-by-side-") as made:
        for name in ("theirs", "ours"):
            (Path(made) / name).mkdir()
        try:
            tree = chosen.legionpower.expanduser().resolve()
            sides.append(legion_power(comfyui, python, tree, Path(made) / "theirs"))
            sides.append(legion_shm(comfyui, python, Path(made) / "ours"))
            print("| image | batch | LegionPower, ms: median (worst) | Legion SHM, ms | times as fast |")
            print("|---|---|---|---|---|")
            compare(sides, runs=chosen.runs, starts=chosen.starts, say=lambda line: print(line, flush=True))
        finally:
            for side in sides:
                side.close()
    for side in sides:
        ready = ", ".join(f"{took_s:.2f}" for took_s in side.ready_s)
        print(
            f"{side.name}: ready after {ready} s; idle USS {statistics.median(side.idle_uss) / 1e6:.0f} MB; "
            f"largest difference between what was sent and what came back: {side.worst:.2g}"
        )
    print(f"took {monotonic_s() - began_s:.0f} s", flush=True)
    if chosen.rounds:
        measure = [python, "-m", "tests.comfy.conformance.measure", "--comfyui", str(comfyui)]
        return subprocess.run([*measure, "--runs", str(chosen.rounds)], cwd=REPO, check=False).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
