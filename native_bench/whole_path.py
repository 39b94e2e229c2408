"""Where the time of whole jobs goes: submit to result, by hop, through the graph engine and ComfyUI.

Owns the two jobs: a tensor that passes through, and a small graph of image nodes (the demo's soft glow). The
hops are those of ``Result.stats``; what they leave of the whole is ``other``: checks at the door, hand-overs
between threads. Each job's image differs in one pixel, so that no cache knows it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from legion_shm.config import WorkerSpec
from legion_shm.native_bench.model import Row
from legion_shm.native_bench.summary import summarize
from legion_shm.supervisor.result import JobStats

__all__ = ["HOPS", "OTHER", "hops_of", "measure_whole_path"]

HOPS = (
    ("encode_s", "encode"),
    ("queue_s", "queue"),
    ("to_worker_s", "wire and wake-up there"),
    ("decode_s", "decode"),
    ("execute_s", "execute"),
    ("result_encode_s", "encode result"),
    ("from_worker_s", "wire and wake-up back"),
    ("result_decode_s", "decode result"),
)
OTHER = "other"
"""What the hops leave of the whole."""

_WARM_UP = 3
_LONG_TIMEOUT_S = 300.0  # a ComfyUI may take minutes to start


def measure_whole_path(
    *, rounds: int, comfyui: str | None, comfyui_python: str | None = None, show: Callable[[str], None]
) -> list[Row]:
    """Both jobs, the first with two sizes, through the graph engine and, if given, that ComfyUI.

    ``comfyui_python``: the interpreter that has ComfyUI's packages, and Legion's; ours by default. Raises
    LegionError.
    """
    from legion_shm.supervisor.api import Supervisor

    engines = {"graph": WorkerSpec(engine="graph")}
    if comfyui is not None:
        extra = () if _has_gpu() else ("--cpu",)
        engines["comfy"] = WorkerSpec(
            engine="comfy",
            comfyui_path=comfyui,
            python_executable=comfyui_python,
            extra_args=extra,
            startup_timeout_s=_LONG_TIMEOUT_S,
        )
    glow = json.loads((files("legion_shm") / "demo_data" / "soft_glow.json").read_text(encoding="utf-8"))
    small, large = ("512x512", (1, 512, 512, 3)), ("1080p", (1, 1080, 1920, 3))
    jobs = (
        ("passthrough", _passthrough(), small),
        ("passthrough", _passthrough(), large),
        ("soft glow", glow, small),
    )
    rows: list[Row] = []
    with Supervisor() as legion:
        for engine, spec in engines.items():
            for job, flow, (label, shape) in jobs:
                show(f"whole path: {engine}, {job}, {label}")
                rows += _rows(f"{engine}: {job}", label, shape, _sample(legion, spec, flow, shape, rounds))
            legion.stop_workers(spec)
    return rows


def hops_of(stats: JobStats) -> dict[str, float]:
    """Microseconds by hop."""
    return {name: float(getattr(stats, hop)) * 1e6 for hop, name in HOPS}


def _passthrough() -> dict[str, Any]:
    return {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["in", 0]}},
    }


def _sample(
    legion: Any, spec: WorkerSpec, flow: dict[str, Any], shape: tuple[int, ...], rounds: int
) -> dict[str, list[float]]:
    import torch

    samples: dict[str, list[float]] = {"total": [], "other": [], **{name: [] for _, name in HOPS}}
    for number in range(_WARM_UP + rounds):
        image = torch.full(shape, 0.5)
        image[0, 0, 0, 0] = number / 1000
        started_s = time.monotonic()
        result = legion.submit(flow, inputs=[image], spec=spec).result(timeout=_LONG_TIMEOUT_S)
        total_us = (time.monotonic() - started_s) * 1e6
        if number < _WARM_UP:
            continue
        hops = hops_of(result.stats)
        for name, value in hops.items():
            samples[name].append(value)
        samples["total"].append(total_us)
        samples["other"].append(max(0.0, total_us - sum(hops.values())))
        del result
    return samples


def _rows(case: str, label: str, shape: tuple[int, ...], samples: dict[str, list[float]]) -> list[Row]:
    nbytes = 4 * shape[0] * shape[1] * shape[2] * shape[3]
    return [
        Row.of("path", case, hop, summarize(values), size_bytes=nbytes, size=label)
        for hop, values in samples.items()
    ]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
