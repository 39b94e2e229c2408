"""A user's folder of its own for each test; the nodes' shared supervisor is closed after each module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from legion_shm.nodes import legion_yaml
from legion_shm.nodes.shared_supervisor import close_shared_supervisor


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEGION_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(legion_yaml, "_explained", set[str]())
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture(autouse=True, scope="module")
def shared_supervisor_is_closed(nothing_left_by_the_module: None) -> Iterator[None]:
    yield
    close_shared_supervisor()
