"""What the tests of the nodes share: calling nodes as ComfyUI does, a user's folder, workflows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from legion_shm.nodes import NODE_CLASS_MAPPINGS

TEST_NODES = "legion_shm.testing.nodes"

GRAPH_YAML = f"""\
comfyui:
  type: graph
execution:
  node_modules: {TEST_NODES}
  env_vars:
    OMP_NUM_THREADS: "1"
"""


ASYNC_YAML = GRAPH_YAML + "  asynch: true\n"


def call(class_type: str, **inputs: Any) -> Any:
    """Run a node as ComfyUI does: a fresh object, its FUNCTION, keywords."""
    node_class: Any = NODE_CLASS_MAPPINGS[class_type]
    return getattr(node_class(), node_class.FUNCTION)(**inputs)


def config(yaml: str = GRAPH_YAML, **widgets: Any) -> Any:
    (made,) = call("LegionConfig", config_yaml=yaml, **widgets)
    return made


def flow(class_type: str | None = None, **options: object) -> dict[str, Any]:
    """input_1 through a node (or none) to output_1; input_2 straight to output_2."""
    prompt: dict[str, Any] = {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["in", 0], "input_2": ["in", 1]}},
    }
    if class_type is not None:
        prompt["node"] = {"class_type": class_type, "inputs": {"value": ["in", 0], **options}}
        prompt["out"]["inputs"]["input_1"] = ["node", 0]
    return prompt


def invert() -> dict[str, Any]:
    prompt = flow()
    prompt["invert"] = {"class_type": "ImageInvert", "inputs": {"image": ["in", 0]}}
    prompt["out"]["inputs"]["input_1"] = ["invert", 0]
    return prompt


def text(prompt: Mapping[str, Any]) -> str:
    return json.dumps(prompt)


def put_workflow(home: Path, name: str, content: Mapping[str, Any] | str) -> Path:
    """Write a file into the folder of worker workflows."""
    path = home / "Legion-SHM" / "workflows" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def image(height: int = 64, width: int = 48) -> Any:
    import torch

    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(height * width))


def master(prompt: dict[str, Any] | None = None, *inputs: object, yaml: str = GRAPH_YAML, **more: Any) -> Any:
    given = {f"input_{number}": value for number, value in enumerate(inputs, 1)}
    if prompt is not None:
        more["workflow_text"] = text(prompt)
    return call("LegionMaster", **{"legion_config": config(yaml), **given, **more})
