"""The shortest useful program: one workflow, one image in, one image out.

    python examples/plain_script.py

No main guard is needed: workers do not import this file again.
"""

from __future__ import annotations

import torch

from legion_shm import Supervisor, WorkerSpec

workflow = {
    "in": {"class_type": "LegionImporter", "inputs": {}},
    "half": {
        "class_type": "ImageScaleBy",
        "inputs": {"image": ["in", 0], "upscale_method": "area", "scale_by": 0.5},
    },
    "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["half", 0]}},
}
image = torch.rand(1, 512, 768, 3)  # IMAGE: [batch, height, width, channels], 0 to 1

with Supervisor() as legion:
    job = legion.submit(workflow, inputs=[image], spec=WorkerSpec(engine="graph"))
    for event in job.events():
        print(event.kind, getattr(event, "class_type", ""), getattr(event, "status", ""))
    result = job.result(timeout=60)

small = result["output_1"]
print(tuple(image.shape), "->", tuple(small.shape), "with", result.stats.copies, "copies")
