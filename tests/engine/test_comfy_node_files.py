"""ComfyUI's own node files in a zygote: which are loaded there, and which a worker loads all the same."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from legion_shm.supervisor import comfy_node_files
from legion_shm.supervisor.comfy_node_files import is_loaded, load_node_files

NODES = """
async def init_builtin_extra_nodes():
    for file in ["nodes_latent.py", 'nodes_broken.py', "nodes_missing.py"]:
        pass
"""


class Nodes:
    """ComfyUI's `nodes`, as far as it is asked for."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, str]] = []

    async def load_custom_node(self, path: str, ignore: object = (), module_parent: str = "") -> bool:
        self.loaded.append((os.path.basename(path), module_parent))
        if "broken" in path:
            logging.getLogger().error("it is broken")
        return "broken" not in path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nodes.py").write_text(NODES)
    for name in ("comfy_extras/nodes_latent", "comfy_extras/nodes_broken", "comfy_extras/nodes_unnamed"):
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("# nodes")
    (tmp_path / "comfy_api_nodes").mkdir()
    (tmp_path / "comfy_api_nodes" / "nodes_paid.py").write_text("# nodes")
    monkeypatch.setattr(comfy_node_files, "_loaded", {})
    return tmp_path


def path_of(root: Path, name: str) -> str:
    return str(root / "comfy_extras" / name)


def test_the_files_that_comfyui_names_are_loaded_as_it_loads_them(root: Path) -> None:
    nodes = Nodes()
    load_node_files(root, nodes, with_api_nodes=False)
    assert nodes.loaded == [("nodes_latent.py", "comfy_extras"), ("nodes_broken.py", "comfy_extras")]
    load_node_files(root, nodes, with_api_nodes=True)
    assert nodes.loaded[-1] == ("nodes_paid.py", "comfy_api_nodes")


def test_a_file_that_is_there_is_not_loaded_again_but_a_second_time_it_is(root: Path) -> None:
    load_node_files(root, Nodes(), with_api_nodes=False)
    assert not is_loaded(path_of(root, "nodes_latent.py"), "custom_nodes")
    assert is_loaded(path_of(root, "nodes_latent.py"), "comfy_extras")
    assert not is_loaded(path_of(root, "nodes_latent.py"), "comfy_extras")


def test_what_failed_is_left_to_the_worker_which_says_so(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_node_files(root, Nodes(), with_api_nodes=False)
    assert not caplog.records, "it was said where nobody can tell whose it is"
    assert not is_loaded(path_of(root, "nodes_broken.py"), "comfy_extras")
    logging.getLogger().error("heard")
    assert [record.message for record in caplog.records] == ["heard"]


def test_a_file_that_has_changed_since_is_loaded_by_the_worker(root: Path) -> None:
    load_node_files(root, Nodes(), with_api_nodes=False)
    Path(path_of(root, "nodes_latent.py")).write_text("# other nodes")
    assert not is_loaded(path_of(root, "nodes_latent.py"), "comfy_extras")


def test_a_comfyui_that_loads_its_nodes_otherwise_is_left_alone(root: Path) -> None:
    class Old:
        def load_custom_node(self, *_args: Any, **_named: Any) -> bool:
            raise AssertionError("it was called")

    load_node_files(root, Old(), with_api_nodes=True)
    assert not is_loaded(path_of(root, "nodes_latent.py"), "comfy_extras")
