"""What a model of 1 GB costs between a master and its workers: the figures of docs/models.md.

    python -m tests.comfy.model_figures --comfyui FOLDER --comfyui-python PYTHON [--workers 4] [--json FILE]

The master is ComfyUI's Python, started by this command. Times are of this machine; compare them with the copy
of the same bytes that is timed beside them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_CHANNELS = (1, 2, 4)
_ROUNDS = 7
_FRESH_ROUNDS = 3
"""Each of them takes another block of the arena, which has room for six."""
_IDLE_TRIM_S = 2.0
_FRESH = {
    "one thread": (1, False),
    "two threads": (2, False),
    "allocated first, one thread": (1, True),
    "allocated first, two threads": (2, True),
}
"""Ways to copy into fresh shared memory: threads, and whether its pages are allocated first."""


def _rollup(pid: int) -> dict[str, int]:
    """Bytes by name, of /proc/PID/smaps_rollup."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, amount, *_ = line.split()
        found[name.rstrip(":")] = int(amount) * 1024
    return found


def _fresh_copy_ms(source: bytearray, threads: int, *, allocated: bool) -> float:
    """One copy of as many bytes into shared memory that nobody has touched yet: the limit of a first copy.

    ``allocated``: its pages are allocated first, as an arena's are, which makes a shortage an error.
    """
    nbytes = len(source)
    fd = os.memfd_create("legion-figures")
    try:
        begun = time.perf_counter()
        os.ftruncate(fd, nbytes)
        if allocated:
            os.posix_fallocate(fd, 0, nbytes)
        with mmap.mmap(fd, nbytes) as memory:
            target = ctypes.c_char.from_buffer(memory)
            addresses = ctypes.addressof(target), ctypes.addressof(ctypes.c_char.from_buffer(source))
            step = -(-nbytes // threads)
            parts = [
                threading.Thread(
                    target=ctypes.memmove, args=(*(at + low for at in addresses), min(step, nbytes - low))
                )
                for low in range(0, nbytes, step)
            ]
            for part in parts:
                part.start()
            for part in parts:
                part.join()
            took = time.perf_counter() - begun
            del target
    finally:
        os.close(fd)
    return took * 1000


def _parent(pid: int) -> int:
    """The process that forked it."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _copy_ms(nbytes: int) -> float:
    """One copy of so many bytes between warm private buffers, as the codec copies."""
    from legion_shm.transport.copying import copy_memory

    source, target = bytearray(nbytes), bytearray(nbytes)
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in (target, source)]
    times: list[float] = []
    for _ in range(5):
        started = time.perf_counter()
        copy_memory(addresses[0], addresses[1], nbytes)
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


def measure(root: Path, base: Path, workers: int) -> dict[str, Any]:
    """In a process that runs ComfyUI's Python."""
    sys.path.append(str(Path(__file__).parent))
    driver: Any = importlib.import_module("models_driver")
    driver.start_comfyui(root, base)
    small_models: Any = importlib.import_module("small_models")
    import torch

    from legion_shm import Supervisor, WorkerSpec
    from legion_shm.supervisor.comfy_models import TABLE

    spec = WorkerSpec(
        engine="comfy",
        comfyui_path=str(root),
        python_executable=sys.executable,
        extra_args=(f"--base-directory={base}", "--disable-all-custom-nodes", "--disable-api-nodes"),
        max_workers=workers,
    )
    model = small_models.sd15(channel_mult=_CHANNELS)
    weights = sum(item.numel() * item.itemsize for item in model.model.parameters())
    generator = torch.Generator().manual_seed(0)
    cond = [[torch.randn(1, 77, 768, generator=generator), {}]]
    settings = {
        "seed": 7,
        "steps": 1,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    links = {"model": ["0", 0], "positive": ["0", 1], "negative": ["0", 1], "latent_image": ["0", 2]}
    sample = {
        "0": driver.node("LegionImporter"),
        "1": driver.node("KSampler", **settings, **links),
        "2": driver.node("LegionExporter", input_1=["1", 0]),
    }
    wait_s = 300.0
    found: dict[str, Any] = {"weights_bytes": weights, "tensors": len(list(model.model.parameters()))}
    with Supervisor(arena_quota_bytes=8 << 30, idle_trim_s=_IDLE_TRIM_S) as legion:

        def latent(fill: float) -> dict[str, Any]:
            return {"samples": torch.full((1, 4, 8, 8), fill)}

        def submit(fill: float) -> Any:
            return legion.submit(sample, inputs=[model, cond, latent(fill)], spec=spec)

        here = driver.run_node(
            "KSampler", model=model, **settings, positive=cond, negative=cond, latent_image=latent(0.0)
        )

        def start(count: int) -> dict[str, int]:
            legion.warm_up(spec, workers=count)
            deadline = time.monotonic() + wait_s
            while [worker.state for worker in legion.workers()].count("idle") < count:
                if time.monotonic() > deadline:
                    raise TimeoutError("the workers did not start")
                time.sleep(0.1)
            return {worker.id: worker.pid for worker in legion.workers() if worker.pid is not None}

        def at_rest(pids: Iterable[int]) -> list[dict[str, int]]:
            """Once they have given back what a job leaves free."""
            time.sleep(_IDLE_TRIM_S + 1.0)
            return [_rollup(pid) for pid in pids]

        user, user_pid = next(iter(start(1).items()))
        first = submit(0.0).result(timeout=wait_s)
        found["equal"] = bool(torch.equal(here["samples"], first["output_1"]["samples"]))
        found["first_encode_ms"] = first.stats.encode_s * 1000
        found["first_decode_ms"] = first.stats.decode_s * 1000
        encode, decode = [], []
        for number in range(_ROUNDS):
            stats = submit(1.0 + number).result(timeout=wait_s).stats
            encode.append(stats.encode_s * 1000)
            decode.append(stats.decode_s * 1000)
        found["second_encode_ms"] = statistics.median(encode)
        found["second_encode_max_ms"] = max(encode)
        found["second_decode_ms"] = statistics.median(decode[1:])
        found["second_decode_max_ms"] = max(decode)
        zygote = _parent(user_pid)
        alone, zygote_of_one = at_rest([user_pid, zygote])
        pids = start(workers)
        others = [pid for worker, pid in pids.items() if worker != user]
        one, *without = at_rest([user_pid, *others])
        for number in range(4):
            jobs = [submit(20.0 + number * workers + offset) for offset in range(workers)]
            for job in jobs:
                job.result(timeout=wait_s)
        busy = [_rollup(pid) for pid in pids.values()]
        *after, zygote_of_all = at_rest([*pids.values(), zygote])
        unused = statistics.mean(item["Pss"] for item in without)
        found["workers"] = workers
        found["pss_worker_without_bytes"] = unused
        found["pss_one_bytes"] = one["Pss"] - unused
        found["pss_all_bytes"] = sum(item["Pss"] for item in after) - workers * unused
        found["pss_total_alone_bytes"] = alone["Pss"]
        found["pss_total_one_bytes"] = one["Pss"]
        found["pss_total_all_bytes"] = sum(item["Pss"] for item in after)
        found["pss_total_all_just_after_bytes"] = sum(item["Pss"] for item in busy)
        found["pss_zygote_of_one_bytes"] = zygote_of_one["Pss"]
        found["pss_zygote_of_all_bytes"] = zygote_of_all["Pss"]
        found["uss_bytes"] = statistics.mean(item["Private_Dirty"] + item["Private_Clean"] for item in after)
        found["mapped"] = sum(1 for item in after if item["Pss_Shmem"] > weights / (2 * workers))
        again: list[float] = []
        fresh: dict[str, list[float]] = {name: [] for name in _FRESH}
        source = bytearray(weights)
        for _ in range(_FRESH_ROUNDS):
            TABLE._by_object.clear()
            TABLE._weights.clear()
            gc.collect()
            stats = submit(0.0).result(timeout=wait_s).stats
            again.append(stats.encode_s * 1000)
            for name, (threads, allocated) in _FRESH.items():
                fresh[name].append(_fresh_copy_ms(source, threads, allocated=allocated))
        del source
        found["fresh_copy_ms"] = {name: statistics.median(times) for name, times in fresh.items()}
        found["first_again_encode_ms"] = statistics.median(again)
        found["copy_ms"] = _copy_ms(weights)
    return found


def _show(found: dict[str, Any]) -> str:
    gigabyte = found["weights_bytes"] / 1e9
    times = found["pss_all_bytes"] / found["pss_one_bytes"]
    just_after, among = found["pss_total_all_just_after_bytes"], found["pss_total_one_bytes"]
    rows = [
        ("weights", f"{gigabyte:.2f} GB in {found['tensors']} tensors"),
        ("sampling in a worker equals the master's", "to the bit" if found["equal"] else "NO"),
        ("one copy of the weights, warm memory to warm memory", f"{found['copy_ms']:.0f} ms"),
        *(
            (f"one copy into fresh shared memory, {name}", f"{took:.0f} ms")
            for name, took in found["fresh_copy_ms"].items()
        ),
        ("first transfer, submit, new arena", f"{found['first_encode_ms']:.0f} ms"),
        ("the same, median in turns with those copies", f"{found['first_again_encode_ms']:.0f} ms"),
        ("first transfer, in the worker", f"{found['first_decode_ms']:.0f} ms"),
        (
            "second transfer, submit (median, worst)",
            f"{found['second_encode_ms']:.1f}, {found['second_encode_max_ms']:.1f} ms",
        ),
        (
            "second transfer, in the worker (median, worst)",
            f"{found['second_decode_ms']:.1f}, {found['second_decode_max_ms']:.1f} ms",
        ),
        ("PSS that the model adds to one worker", f"{found['pss_one_bytes'] / 1e9:.2f} GB"),
        (
            f"PSS that it adds to {found['workers']} workers together",
            f"{found['pss_all_bytes'] / 1e9:.2f} GB: {times:.2f} times",
        ),
        ("PSS in all: one worker, alone", f"{found['pss_total_alone_bytes'] / 1e9:.2f} GB"),
        (f"one of {found['workers']}, the others without", f"{found['pss_total_one_bytes'] / 1e9:.2f} GB"),
        (
            f"{found['workers']} with the model",
            (
                f"{found['pss_total_all_bytes'] / 1e9:.2f} GB: "
                f"{found['pss_total_all_bytes'] / found['pss_total_alone_bytes']:.2f} times one alone, "
                f"{found['pss_total_all_bytes'] / found['pss_total_one_bytes']:.2f} times one among them"
            ),
        ),
        (
            "the same right after their jobs",
            f"{just_after / 1e9:.2f} GB: {just_after / among:.2f} times one among them",
        ),
        (
            f"zygote beside one, beside {found['workers']}",
            f"{found['pss_zygote_of_one_bytes'] / 1e9:.2f}, {found['pss_zygote_of_all_bytes'] / 1e9:.2f} GB",
        ),
        ("private to each worker", f"{found['uss_bytes'] / 1e6:.0f} MB"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", required=True, type=Path)
    parser.add_argument("--comfyui-python", required=True, type=Path)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        found = measure(given.comfyui, given.inside, given.workers)
        (given.inside / "figures.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in ("custom_nodes", "input", "models", "output", "temp"):
            (Path(folder) / name).mkdir()
        command = [given.comfyui_python, Path(__file__), "--inside", folder, "--workers", given.workers]
        command += ["--comfyui", given.comfyui, "--comfyui-python", given.comfyui_python]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        subprocess.run([str(part) for part in command], cwd=folder, env=environment, check=True)
        text = (Path(folder) / "figures.json").read_text()
    if given.json is not None:
        given.json.write_text(text)
    print(_show(json.loads(text)))


if __name__ == "__main__":
    main()
