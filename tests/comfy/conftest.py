"""Where the tests' ComfyUI is, and the folder that it works in."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from legion_shm import WorkerSpec

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class RealComfyUI:
    """A ComfyUI and a Python that has what it needs. ``base`` holds its custom nodes, inputs and outputs."""

    path: Path
    python: Path
    base: Path

    @property
    def arguments(self) -> list[str]:
        return [
            f"--base-directory={self.base}",
            "--disable-all-custom-nodes",
            "--whitelist-custom-nodes",
            "legion_probe",
            "--disable-api-nodes",
        ]


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> RealComfyUI:
    python = os.environ.get("COMFYUI_PYTHON", "")
    path = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "ComfyUI")
    if not python or not (path / "main.py").is_file():
        pytest.skip(
            "needs a real ComfyUI: set COMFYUI_PYTHON to a Python that has ComfyUI's packages and Legion's, "
            f"and COMFYUI_PATH to the folder with its main.py (looked in {path})"
        )
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("input", "models", "output", "temp", "custom_nodes/legion_probe", "custom_nodes/left_out"):
        (base / folder).mkdir(parents=True)
    (base / "temp" / "of_the_master.png").write_bytes(b"")
    shutil.copy(Path(__file__).with_name("probe_pack.py"), base / "custom_nodes/legion_probe/__init__.py")
    (base / "custom_nodes/left_out/__init__.py").write_text('NODE_CLASS_MAPPINGS = {"LeftOut": object}\n')
    return RealComfyUI(path, Path(python), base)


@pytest.fixture(scope="session")
def spec(comfyui: RealComfyUI) -> WorkerSpec:
    return WorkerSpec(
        engine="comfy",
        comfyui_path=str(comfyui.path),
        python_executable=str(comfyui.python),
        extra_args=tuple(comfyui.arguments),
    )


def chain(class_type: str) -> dict[str, Any]:
    """The image that is given, through one node, and back."""
    return {
        "0": {"class_type": "LegionImporter", "inputs": {}},
        "1": {"class_type": class_type, "inputs": {"image": ["0", 0]}},
        "2": {"class_type": "LegionExporter", "inputs": {"input_1": ["1", 0]}},
    }
