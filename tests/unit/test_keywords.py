from __future__ import annotations

from pathlib import Path

from legion_shm.config import SupervisorSettings, WorkerSpec
from legion_shm.keywords import SettingsKeywords, WorkerKeywords


def test_the_keywords_are_those_of_the_models() -> None:
    assert set(WorkerKeywords.__annotations__) == set(WorkerSpec.model_fields)
    assert set(SettingsKeywords.__annotations__) == set(SupervisorSettings.model_fields)


def test_paths_are_taken_as_they_are_annotated(tmp_path: Path) -> None:
    spec = WorkerSpec(node_modules=[tmp_path / "a.py"], python_path=tmp_path, comfyui_path=tmp_path)
    assert spec.node_modules == (str(tmp_path / "a.py"),)
    assert spec.python_path == (str(tmp_path),)
    assert spec.comfyui_path == str(tmp_path)
