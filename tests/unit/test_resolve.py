"""Which engine a spec gets, and what is refused before any worker starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from legion_shm.config import WorkerSpec
from legion_shm.errors import ConfigError
from legion_shm.supervisor.resolve import resolve_spec


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    root = tmp_path / "comfy-tree"
    (root / "comfy").mkdir(parents=True)
    (root / "main.py").touch()
    (root / "nodes.py").touch()
    return root


@pytest.fixture(autouse=True)
def no_comfyui_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)


@pytest.mark.parametrize("wrong", ["graph", {}, {"engine": "graph"}, 0])
def test_what_is_no_spec_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="spec: expected a WorkerSpec, got") as caught:
        resolve_spec(wrong)
    assert caught.value.key == "spec"


def test_auto_is_graph_where_no_comfyui_is_found_and_comfy_where_one_is(comfyui: Path) -> None:
    assert resolve_spec(WorkerSpec()).engine == "graph"
    found = resolve_spec(WorkerSpec(env={"COMFYUI_PATH": str(comfyui)}))
    assert (found.engine, found.comfyui_path) == ("comfy", str(comfyui))
    assert resolve_spec(WorkerSpec(comfyui_path=str(comfyui))).engine == "comfy"


def test_auto_with_node_modules_is_graph_for_no_other_engine_loads_them(comfyui: Path) -> None:
    spec = WorkerSpec(node_modules=["my_nodes"], env={"COMFYUI_PATH": str(comfyui)})
    assert resolve_spec(spec).engine == "graph"


def test_settings_that_the_engine_has_no_use_for_are_refused(comfyui: Path) -> None:
    with pytest.raises(ConfigError, match="custom_nodes") as caught:
        resolve_spec(WorkerSpec(engine="comfy", comfyui_path=str(comfyui), node_modules=["my_nodes"]))
    assert caught.value.key == "node_modules"
    with pytest.raises(ConfigError, match="needs none") as caught:
        resolve_spec(WorkerSpec(engine="graph", comfyui_path=str(comfyui)))
    assert caught.value.key == "comfyui_path"


def test_comfy_without_a_comfyui_says_how_to_point_to_one() -> None:
    with pytest.raises(ConfigError, match="COMFYUI_PATH") as caught:
        resolve_spec(WorkerSpec(engine="comfy"))
    assert caught.value.key == "comfyui_path"


def test_paths_that_are_not_there_are_refused_and_relative_modules_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (
        ("python_executable", "/nowhere/python"),
        ("working_dir", str(tmp_path / "none")),
        ("node_modules", "./none.py"),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve_spec(WorkerSpec(engine="graph", **{key: value}))  # type: ignore[arg-type]
        assert caught.value.key == key
    monkeypatch.chdir(tmp_path)
    Path("mine.py").touch()
    assert resolve_spec(WorkerSpec(node_modules=["mine.py", "pkg.mod"])).node_modules == (
        str(tmp_path / "mine.py"),
        "pkg.mod",
    )
