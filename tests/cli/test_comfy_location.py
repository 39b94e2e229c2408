from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from legion_shm.comfy_location import find_comfyui, not_found_message
from legion_shm.errors import ConfigError


def make_comfyui(path: Path, *, lacks: str = "", version: str = "1.2.3") -> Path:
    (path / "comfy").mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (path / name).touch()
    if version:
        (path / "comfyui_version.py").write_text(
            f'# made by hand\n__version__ = "{version}"\n', encoding="utf-8"
        )
    if lacks == "comfy":
        (path / "comfy").rmdir()
    elif lacks:
        (path / lacks).unlink()
    return path


@pytest.fixture(autouse=True)
def no_running_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "folder_paths", raising=False)


def test_places_are_looked_at_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, running, variable = (make_comfyui(tmp_path / name) for name in ("given", "running", "variable"))
    home = make_comfyui(tmp_path / "home" / "ComfyUI")
    env = {"HOME": str(tmp_path / "home")}
    found = find_comfyui(None, env)
    assert found is not None
    assert (found.path, found.how, found.version) == (home, "~/ComfyUI", "1.2.3")
    env["COMFYUI_PATH"] = str(variable)
    found = find_comfyui(None, env)
    assert found is not None
    assert (found.path, found.how) == (variable, "COMFYUI_PATH")
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(base_path=str(running)))
    found = find_comfyui(None, env)
    assert found is not None
    assert (found.path, found.how) == (running, "running in this process")
    found = find_comfyui(str(given), env)
    assert found is not None
    assert (found.path, found.how) == (given, "given")


def test_where_there_is_none_nothing_is_found_and_the_message_tells_what_to_do(tmp_path: Path) -> None:
    assert find_comfyui(None, {"HOME": str(tmp_path)}) is None
    assert find_comfyui(None, {}) is None
    message = not_found_message({"HOME": str(tmp_path)})
    assert "comfyui_path" in message
    assert "COMFYUI_PATH" in message


@pytest.mark.parametrize("lacks", ["main.py", "nodes.py", "comfy"])
def test_a_folder_that_lacks_a_part_is_passed_over_and_refused_when_given(tmp_path: Path, lacks: str) -> None:
    path = make_comfyui(tmp_path / "variable", lacks=lacks)
    env = {"HOME": str(tmp_path), "COMFYUI_PATH": str(path)}
    assert find_comfyui(None, env) is None
    assert lacks in not_found_message(env)
    with pytest.raises(ConfigError, match=lacks) as caught:
        find_comfyui(str(path), env)
    assert caught.value.key == "comfyui_path"
    assert str(path) in str(caught.value)


def test_a_folder_that_is_not_there_is_refused_when_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        find_comfyui(str(tmp_path / "missing"), {})


def test_a_tilde_means_the_home_of_the_environment_given(tmp_path: Path) -> None:
    make_comfyui(tmp_path / "comfy-ui")
    found = find_comfyui("~/comfy-ui", {"HOME": str(tmp_path)})
    assert found is not None
    assert found.path == tmp_path / "comfy-ui"


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_comfyui(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    found = find_comfyui("here", {})
    assert found is not None
    assert os.path.isabs(found.path)
    assert found.path == tmp_path / "here"


def test_the_version_comes_from_the_project_file_where_there_is_no_version_file(tmp_path: Path) -> None:
    path = make_comfyui(tmp_path / "a", version="")
    found = find_comfyui(str(path), {})
    assert found is not None
    assert found.version is None
    (path / "pyproject.toml").write_text('[project]\nname = "ComfyUI"\nversion = "0.8.0"\n', encoding="utf-8")
    found = find_comfyui(str(path), {})
    assert found is not None
    assert found.version == "0.8.0"
