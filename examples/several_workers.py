"""asyncio with several workers: many jobs at once, results as they come, one progress line each.

python examples/several_workers.py
"""

from __future__ import annotations

import asyncio

import torch

from legion_shm import Job, Supervisor, WorkerSpec

WORKFLOW = {
    "image": {"class_type": "LegionInput", "inputs": {"name": "image"}},
    "radius": {"class_type": "LegionInput", "inputs": {"name": "radius"}},
    "blur": {
        "class_type": "ImageBlur",
        "inputs": {"image": ["image", 0], "blur_radius": ["radius", 0], "sigma": 3.0},
    },
    "out": {"class_type": "LegionOutput", "inputs": {"name": "blurred", "value": ["blur", 0]}},
}


async def follow(job: Job) -> str:
    """Wait for a job by its events; a job that failed raises its error from ``await job``."""
    nodes = 0
    async for event in job:
        nodes += event.kind == "node"
    result = await job
    return f"{job.id}: {nodes} node events, mean {result['blurred'].mean():.4f}, in {result.stats.worker_id}"


async def main() -> None:
    # Each worker computes on one thread; two of them share the jobs.
    spec = WorkerSpec(engine="graph", max_workers=2, env={"OMP_NUM_THREADS": "1"})
    with Supervisor() as legion:
        legion.warm_up(spec, workers=2)
        jobs = [
            await legion.asubmit(
                WORKFLOW, inputs={"image": torch.rand(1, 256, 256, 3), "radius": radius}, spec=spec
            )
            for radius in (1, 2, 3, 5, 8)
        ]
        for line in await asyncio.gather(*(follow(job) for job in jobs)):
            print(line)


asyncio.run(main())
