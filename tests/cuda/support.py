"""What tests with the emulated GPU share: workers whose tensors lie on it, jobs of one node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from legion_shm import Job, Supervisor, WorkerSpec
from tests.system.support import spec

NODES = Path(__file__).with_name("emulated_nodes.py")
MIB = 1 << 20
FLOATS = MIB // 4


def on_gpu(**fields: Any) -> WorkerSpec:
    return spec(node_modules=[NODES], **fields)


def flow(class_type: str) -> dict[str, Any]:
    return {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "node": {"class_type": class_type, "inputs": {"value": ["in", 0]}},
        "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["node", 0]}},
    }


def submit(
    legion: Supervisor, class_type: str, value: object, on: WorkerSpec | None = None, **more: Any
) -> Job:
    return legion.submit(flow(class_type), inputs=[value], spec=on or on_gpu(), **more)


def run(legion: Supervisor, class_type: str, value: object, on: WorkerSpec | None = None) -> Any:
    return submit(legion, class_type, value, on).result(timeout=60)["output_1"]
