"""Node classes of one's own in a module of one's own (my_nodes.py, beside this file).

python examples/own_nodes.py
"""

from __future__ import annotations

import torch

from legion_shm import JobFailed, ProgressEvent, Supervisor, WorkerSpec

workflow = {
    "1": {"class_type": "LegionImporter", "inputs": {}},
    "2": {"class_type": "Vignette", "inputs": {"image": ["1", 0], "strength": ["1", 1]}},
    "3": {"class_type": "Statistics", "inputs": {"image": ["2", 0]}},
    "4": {
        "class_type": "LegionExporter",
        "inputs": {"input_1": ["2", 0], "input_2": ["3", 0], "input_3": ["3", 1]},
    },
}
spec = WorkerSpec(engine="graph", node_modules=["my_nodes"])

with Supervisor() as legion:
    job = legion.submit(workflow, inputs=[torch.ones(4, 64, 64, 3), 0.8], spec=spec)
    for event in job.events():
        if isinstance(event, ProgressEvent):
            print(f"node {event.node_id}: {event.value:g} of {event.total:g}")
    result = job.result(timeout=60)
    print(f"mean {result['output_2']:.3f}, std {result['output_3']:.3f}")

    try:  # a node's error comes back with its place and the worker's traceback; the worker goes on
        legion.submit(workflow, inputs=["not an image", 0.8], spec=spec).result(timeout=60)
    except JobFailed as error:
        print(f"node {error.node_id} ({error.class_type}): {error.exception_type}")
