"""Runs the comfy engine in a process of its own, one scenario after the other, and writes what came of each.

    python driver.py RESULTS.json COMFYUI_PATH [ComfyUI arguments ...]

Every function named ``scenario_...`` gives a JSON value. ComfyUI starts once, which takes most of the time.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib
import json
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from legion_shm.errors import InvalidWorkflow, JobFailed, LegionError
from legion_shm.supervisor.comfy import ComfyEngine
from legion_shm.supervisor.comfy_start import HeadlessComfy
from legion_shm.supervisor.engine import JobOutcome, JobRequest

WAIT_S = 20.0


class Events:
    def __init__(self) -> None:
        self.nodes: list[tuple[str, str, str]] = []
        self.steps: list[tuple[str | None, float, float]] = []
        self.previews: list[tuple[str | None, list[int]]] = []

    def node(self, node_id: str, class_type: str, status: str) -> None:
        self.nodes.append((node_id, class_type, status))

    def progress(self, node_id: str | None, value: float, total: float) -> None:
        self.steps.append((node_id, value, total))

    def preview(self, node_id: str | None, image: Any) -> None:
        self.previews.append((node_id, list(image.size)))

    def of(self, node_id: str) -> list[str]:
        return [status for given, _, status in self.nodes if given == node_id]


_jobs = 0


def request(
    prompt: dict[str, Any], inputs: dict[str, Any] | None = None, **identities: bytes | None
) -> JobRequest:
    global _jobs
    _jobs += 1
    digest = hashlib.sha256(json.dumps(prompt).encode()).digest()
    inputs = inputs or {}
    return JobRequest(f"job-{_jobs}", prompt, digest, inputs, {name: identities.get(name) for name in inputs})


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def chain(*class_types: str) -> dict[str, Any]:
    """Importer, then one-image nodes, then exporter: nodes "0", "1", ..., "out"."""
    prompt = {"0": node("LegionImporter")}
    for number, class_type in enumerate(class_types, 1):
        prompt[str(number)] = node(class_type, image=[str(number - 1), 0])
    prompt["out"] = node("LegionExporter", input_1=[str(len(class_types)), 0])
    return prompt


def comfy_of(engine: ComfyEngine) -> HeadlessComfy:
    assert engine._comfy is not None
    return engine._comfy


def kept_entries(engine: ComfyEngine) -> int:
    return len(comfy_of(engine).executor.caches.outputs.cache)


def run(engine: ComfyEngine, job: JobRequest, events: Events | None = None) -> JobOutcome:
    return engine.execute(job, events or Events())


def refusal(engine: ComfyEngine, prompt: dict[str, Any]) -> dict[str, Any]:
    events = Events()
    try:
        run(engine, request(prompt, {"input_1": picture()}), events)
    except InvalidWorkflow as error:
        return {
            "problems": list(error.problems),
            "node_id": error.node_id,
            "input_name": error.input_name,
            "events": events.nodes,
        }
    return {"problems": []}


def failure(engine: ComfyEngine, prompt: dict[str, Any]) -> dict[str, Any]:
    try:
        run(engine, request(prompt, {"input_1": picture()}))
    except LegionError as error:
        told: dict[str, Any] = {"kind": type(error).__name__, "text": str(error)}
        if isinstance(error, JobFailed):
            told.update(
                node_id=error.node_id,
                class_type=error.class_type,
                exception_type=error.exception_type,
                exception_message=error.exception_message,
                traceback=error.traceback,
                inputs=error.inputs_summary,
            )
        return told
    return {"kind": "none"}


def works(engine: ComfyEngine) -> bool:
    """Whether a plain job still runs right."""
    import torch

    image = picture()
    outcome = run(engine, request(chain("ImageInvert"), {"input_1": image}))
    return bool(torch.equal(outcome.outputs["output_1"], 1.0 - image))  # type: ignore[arg-type]


def picture(seed: int = 0, size: int = 16) -> Any:
    import torch

    return torch.rand((1, size, size, 3), generator=torch.Generator().manual_seed(seed))


# --- scenarios ------------------------------------------------------------------------------------------


def scenario_passthrough(engine: ComfyEngine) -> Any:
    import torch

    values: dict[str, Any] = {
        "input_1": torch.randn(3, 5, dtype=torch.float64).T,
        "input_2": {"samples": torch.randn(1, 4, 2, 2).half(), "batch_index": [0]},
        "input_3": [1, "two", None],
        "input_12": 2.5,
    }
    links = {f"input_{n}": ["0", n - 1] for n in (1, 2, 3, 12, 4)}
    outputs = run(
        engine, request({"0": node("LegionImporter"), "1": node("LegionExporter", **links)}, values)
    ).outputs
    return {
        "tensor": bool(torch.equal(outputs["output_1"], values["input_1"])),  # type: ignore[arg-type]
        "latent": outputs["output_2"] is values["input_2"],
        "list": outputs["output_3"] == values["input_3"],
        "number": outputs["output_12"],
        "absent": outputs["output_4"],
        "names": sorted(outputs),
    }


def scenario_named_channels(engine: ComfyEngine) -> Any:
    prompt = {
        "1": node("LegionInput", name="left"),
        "2": node("LegionInput", name="right", default=["1", 0]),
        "3": node("LegionOutput", name="a", value=["1", 0]),
        "4": node("LegionOutput", name="b", value=["2", 0]),
    }
    outcome = run(engine, request(prompt, {"left": 7}))
    missing = failure(
        engine, {"1": node("LegionInput", name="nobody"), "2": node("LegionOutput", value=["1", 0], name="x")}
    )
    twice = failure(
        engine,
        {
            "0": node("LegionImporter"),
            "1": node("LegionOutput", name="x", value=["0", 0]),
            "2": node("LegionOutput", name="x", value=["0", 1]),
        },
    )
    return {"outputs": dict(outcome.outputs), "missing": missing, "twice": twice}


def scenario_core_nodes(engine: ComfyEngine) -> Any:
    import torch

    prompt = {
        "0": node("LegionImporter"),
        "1": node("EmptyImage", width=32, height=16, batch_size=2, color=0xFF0000),
        "2": node("ImageInvert", image=["1", 0]),
        "3": node(
            "ImageScale", image=["2", 0], upscale_method="nearest-exact", width=8, height=8, crop="disabled"
        ),
        "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "5": node("LatentBlend", samples1=["0", 0], samples2=["4", 0], blend_factor="0.75"),
        "6": node("LegionExporter", input_1=["3", 0], input_2=["5", 0], data_exchange_root=["0", 12]),
    }
    latent = {"samples": torch.ones(1, 4, 8, 8)}
    outputs: dict[str, Any] = dict(run(engine, request(prompt, {"input_1": latent})).outputs)
    return {
        "image": list(outputs["output_1"].shape),
        "colour": outputs["output_1"][0, 0, 0].tolist(),
        "latent": outputs["output_2"]["samples"].unique().tolist(),
        "inference": outputs["output_1"].is_inference(),
    }


def scenario_cache(engine: ComfyEngine) -> Any:
    pack = sys.modules[next(name for name in sys.modules if name.endswith("legion_probe"))]
    prompt = chain("ProbeCount", "ImageInvert")
    found: list[dict[str, Any]] = []
    pack.RUNS.clear()
    for seed, identity in ((1, b"one"), (1, b"one"), (2, b"two"), (2, b"two"), (2, None), (2, None)):
        events = Events()
        outcome = run(engine, request(prompt, {"input_1": picture(seed)}, input_1=identity), events)
        value: Any = outcome.outputs["output_1"]
        found.append(
            {
                "executed": outcome.executed,
                "cached": outcome.cached,
                "runs": len(pack.RUNS),
                "exporter": events.of("out"),
                "middle": events.of("1"),
                "right": bool(abs(value - (1.0 - picture(seed) * 0.5)).max() < 1e-6),
            }
        )
    return found


def scenario_each_input_on_its_own(engine: ComfyEngine) -> Any:
    """An image that stays and a number that is another one each time, through one importer."""
    pack = sys.modules[next(name for name in sys.modules if name.endswith("legion_probe"))]
    prompt = chain("ProbeCount")
    prompt["2"] = node("ImageScaleBy", image=["1", 0], upscale_method="nearest-exact", scale_by=["0", 1])
    prompt["out"] = node("LegionExporter", input_1=["2", 0], input_2=["0", 4], data_exchange_root=["0", 12])
    found: list[dict[str, Any]] = []
    pack.RUNS.clear()
    for scale, identity in ((2.0, b"two"), (3.0, None), (3.0, b"three"), (3.0, b"three")):
        events, inputs = Events(), {"input_1": picture(9), "input_2": scale}
        outcome = run(engine, request(prompt, inputs, input_1=b"nine", input_2=identity), events)
        value: Any = outcome.outputs["output_1"]
        found.append(
            {
                "runs": len(pack.RUNS),
                "side": value.shape[1],
                "absent": outcome.outputs["output_2"],
                "counts": [outcome.executed, outcome.cached],
                "nodes": events.nodes,
            }
        )
    return found


def scenario_inputs_are_not_kept(engine: ComfyEngine) -> Any:
    """Neither the importer's outputs nor what shares memory with them, nor what can't be found again."""
    import torch

    alive: dict[str, list[bool]] = {}
    for name, identity in (("known", b"known"), ("never again", None)):
        alive[name] = []
        for class_types in (("ProbeLazy",), ("ProbeCount", "ProbeLazy")):
            block = (ctypes.c_float * (16 * 16 * 3))()  # as received tensors lie in blocks
            gone = weakref.ref(block)
            image = torch.frombuffer(block, dtype=torch.float32).reshape(1, 16, 16, 3)
            del block
            outcome = run(engine, request(chain(*class_types), {"input_1": image}, input_1=identity))
            del image, outcome
            alive[name].append(gone() is not None)
    entries = kept_entries(engine)
    for _ in range(20):
        run(engine, request(chain("ImageInvert"), {"input_1": torch.zeros(1, 4, 4, 3)}))
    return {"alive": alive, "grown": kept_entries(engine) - entries}


def scenario_validation(engine: ComfyEngine) -> Any:
    good = {"image": ["0", 0], "upscale_method": "nearest-exact", "width": 8, "height": 8, "crop": "disabled"}
    several = {
        "0": node("LegionImporter"),
        "1": node("ImageScale", **{**good, "width": -4}),
        "2": node("ImageScale", **{**good, "upscale_method": "magic"}),
        "3": node("ImageScale", **{key: value for key, value in good.items() if key != "height"}),
        "4": node("LegionExporter", input_1=["1", 0], input_2=["2", 0], input_3=["3", 0]),
        "5": node("LegionOutput", name="fine", value=["0", 0]),
    }
    return {
        "several": refusal(engine, several),
        "unknown class": refusal(
            engine, {"0": node("LegionImporter"), "7": node("NoSuchNode", image=["0", 0])}
        ),
        "no output": refusal(engine, {"0": node("LegionImporter")}),
        "wrong type": refusal(
            engine,
            {
                "1": node("EmptyLatentImage", width=64, height=64, batch_size=1),
                "2": node("PreviewImage", images=["1", 0]),
            },
        ),
        "wrong slot": refusal(
            engine,
            {
                "1": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
                "2": node("PreviewImage", images=["1", 3]),
            },
        ),
        "link to nowhere": refusal(engine, {"2": node("PreviewImage", images=["1", 0])}),
        "cycle": refusal(engine, chain("ImageInvert") | {"1": node("ImageInvert", image=["1", 0])}),
        "works": works(engine),
    }


def scenario_failures(engine: ComfyEngine) -> Any:
    return {
        "node": failure(engine, chain("ImageInvert", "ProbeFail")),
        "exit": failure(engine, chain("ProbeExit")),
        "blocked": failure(engine, chain("ProbeBlock", "ImageInvert")),
        "stopped": failure(engine, chain("ProbeStop")),
        "works": works(engine),
    }


def _interrupted(engine: ComfyEngine, *class_types: str) -> dict[str, Any]:
    pack = sys.modules[next(name for name in sys.modules if name.endswith("legion_probe"))]
    pack.NODE_RUNNING.clear()
    job, events = request(chain(*class_types), {"input_1": picture()}), Events()
    asked_s: list[float] = []

    def interrupt() -> None:
        pack.NODE_RUNNING.wait(WAIT_S)
        engine.interrupt("another-job")
        asked_s.append(time.monotonic())
        engine.interrupt(job.job_id)

    asker = threading.Thread(target=interrupt)
    asker.start()
    try:
        run(engine, job, events)
        kind = "none"
    except LegionError as error:
        kind = type(error).__name__
    ended_s = time.monotonic()
    asker.join(WAIT_S)
    return {
        "kind": kind,
        "took_s": ended_s - asked_s[0],
        "out": events.of("out"),
        "last": events.of(str(len(class_types))),
    }


def _interrupted_at_the_start(engine: ComfyEngine) -> dict[str, Any]:
    """After our last look and before ComfyUI's first: it clears its flag when a prompt starts."""
    executor: Any = comfy_of(engine).executor
    real, job, events = executor.execute, request(chain("ImageInvert"), {"input_1": picture()}), Events()

    def execute(*args: Any, **named: Any) -> None:
        engine.interrupt(job.job_id)
        real(*args, **named)

    executor.execute = execute
    try:
        run(engine, job, events)
    except LegionError as error:
        return {"kind": type(error).__name__, "events": events.nodes}
    finally:
        executor.execute = real
    return {"kind": "none"}


def scenario_interrupt(engine: ComfyEngine) -> Any:
    early = request(chain("ImageInvert"), {"input_1": picture()})
    engine.interrupt(early.job_id)
    events = Events()
    try:
        run(engine, early, events)
        early_kind = "none"
    except LegionError as error:
        early_kind = type(error).__name__
    return {
        "early": {"kind": early_kind, "events": events.nodes},
        "at the start": _interrupted_at_the_start(engine),
        "running": _interrupted(engine, "ProbeSlow"),
        "swallowed": _interrupted(engine, "ProbeSwallow", "ProbeCount"),
        "async": _interrupted(engine, "ProbeAsync"),
        "works": works(engine),
    }


def scenario_progress(engine: ComfyEngine) -> Any:
    events = Events()
    run(engine, request(chain("ProbeSampler", "ProbeOwnProgress"), {"input_1": picture()}), events)
    return {"steps": events.steps, "previews": events.previews, "nodes": events.nodes}


def scenario_expanded(engine: ComfyEngine) -> Any:
    import torch

    events, image = Events(), picture()
    outcome = run(engine, request(chain("ProbeExpand", "ProbeLazy"), {"input_1": image}), events)
    value: Any = outcome.outputs["output_1"]
    return {
        "nodes": events.nodes,
        "close": bool(torch.allclose(value, image, atol=1e-6)),
        "executed": outcome.executed,
    }


def scenario_ui(engine: ComfyEngine) -> Any:
    folder_paths: Any = importlib.import_module("folder_paths")
    prompt = {
        "1": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
        "2": node("PreviewImage", images=["1", 0]),
        "3": node("SaveImage", images=["1", 0], filename_prefix="probe"),
    }
    first, second = run(engine, request(prompt)), run(engine, request(prompt))
    shown: Any = first.ui["2"]["images"]
    temp = str(folder_paths.get_temp_directory())
    return {
        "first": {key: dict(value) for key, value in first.ui.items()},
        "second": {key: dict(value) for key, value in second.ui.items()},
        "second_cached": second.cached,
        "outputs": dict(first.outputs),
        "in_temp": os.path.isfile(os.path.join(temp, shown[0]["filename"])),
        "temp": temp,
    }


def scenario_routes(engine: ComfyEngine) -> Any:
    comfy = comfy_of(engine)
    return {
        "registered": any(getattr(route, "path", "") == "/legion_probe" for route in comfy.server.routes),
        "loop_runs": comfy.server.loop.is_running(),
        "left_out": "LeftOut" in comfy.nodes.NODE_CLASS_MAPPINGS,
    }


def scenario_listeners(_engine: ComfyEngine) -> Any:
    import psutil

    return [
        item.laddr.port for item in psutil.Process().net_connections() if item.status == psutil.CONN_LISTEN
    ]


def scenario_free(engine: ComfyEngine) -> Any:
    prompt = {
        "1": node("EmptyImage", width=8, height=8, batch_size=1, color=5),
        "2": node("PreviewImage", images=["1", 0]),
    }
    run(engine, request(prompt))
    before = run(engine, request(prompt)).cached
    engine.free()
    return {"before": before, "after": run(engine, request(prompt)).cached, "works": works(engine)}


def scenario_speed(engine: ComfyEngine) -> Any:
    prompt, image = chain(), picture(size=64)
    plain: list[float] = []
    for number in range(60):
        job = request(prompt, {"input_1": image}, input_1=str(number).encode())
        start = time.perf_counter()
        run(engine, job)
        plain.append((time.perf_counter() - start) * 1000)
    start = time.perf_counter()
    gc.collect()
    return {"median_ms": sorted(plain)[len(plain) // 2], "collect_ms": (time.perf_counter() - start) * 1000}


def main(results: Path, comfyui: str, arguments: tuple[str, ...]) -> None:
    start = time.monotonic()
    engine = ComfyEngine(comfyui_path=comfyui, extra_args=arguments)
    info = engine.start()
    told: dict[str, Any] = {
        "start": {
            "seconds": time.monotonic() - start,
            "name": info.name,
            "versions": dict(info.versions),
            "node_classes": info.node_classes,
        }
    }
    scenarios: dict[str, Callable[[ComfyEngine], Any]] = {
        name.removeprefix("scenario_"): value
        for name, value in globals().items()
        if name.startswith("scenario_")
    }
    for name, scenario in scenarios.items():
        try:
            told[name] = scenario(engine)
        except BaseException:
            told[name] = {"crashed": traceback.format_exc()}
    engine.close()
    told["closed"] = {"temp_left": os.path.exists(str(told.get("ui", {}).get("temp", "")))}
    results.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], tuple(sys.argv[3:]))
