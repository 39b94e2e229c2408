"""A class of one's own crosses to a worker and back (my_curves.py, beside this file).

python examples/own_codec.py
"""

from __future__ import annotations

import torch
from my_curves import Curve, Grid  # type: ignore[import-not-found,unused-ignore]

from legion_shm import Supervisor, UnsupportedValue, WorkerSpec

workflow = {
    "1": {"class_type": "LegionImporter", "inputs": {}},
    "2": {"class_type": "ReverseCurve", "inputs": {"curve": ["1", 0]}},
    "3": {"class_type": "LegionExporter", "inputs": {"input_1": ["2", 0]}},
}
spec = WorkerSpec(engine="graph", node_modules=["my_curves"])  # elsewhere: codec_modules=["my_curves"]

with Supervisor() as legion:
    curve = Curve(torch.tensor([0.0, 0.5, 1.0]))
    result = legion.submit(workflow, inputs=[curve], spec=spec).result(timeout=60)
    points = result["output_1"].points
    print(f"Curve of {len(points)} points, reversed: {points.tolist()}")
    try:
        legion.submit(workflow, inputs=[{"grid": Grid()}], spec=spec)
    except UnsupportedValue as error:
        print(str(error).partition(";")[0])
