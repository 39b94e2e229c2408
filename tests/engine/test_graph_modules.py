from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from legion_shm.errors import ConfigError, StartupError
from legion_shm.supervisor.graph import GraphEngine
from legion_shm.supervisor.graph_modules import load_node_classes

NODE = """
class Mine:
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return (VALUE,)

NODE_CLASS_MAPPINGS = {"Mine": Mine}
"""


@pytest.fixture(autouse=True)
def modules_as_before() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "nodes_of" in name or name.startswith("legion_nodes_"):
            del sys.modules[name]


def value_of(classes: dict[str, type]) -> int:
    made = classes["Mine"]()
    return int(made.run()[0])


def test_a_module_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nodes_of_mine.py").write_text("VALUE = 1\n" + NODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert value_of(load_node_classes(["nodes_of_mine"])) == 1


def test_a_module_is_found_by_the_path_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "nodes_of_file.py"
    file.write_text("VALUE = 2\n" + NODE)
    assert value_of(load_node_classes([str(file)])) == 2
    assert value_of(load_node_classes([file])) == 2


def test_a_package_is_found_by_the_path_of_its_directory_and_may_import_its_own_parts(tmp_path: Path) -> None:
    package = tmp_path / "Some-Nodes v2"
    package.mkdir()
    (package / "__init__.py").write_text("from .value import VALUE\n" + NODE)
    (package / "value.py").write_text("VALUE = 3\n")
    assert value_of(load_node_classes([str(package)])) == 3


def test_two_files_of_the_same_name_are_two_modules(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "nodes_of_same.py").write_text(f"VALUE = {number}\n" + NODE)
    assert value_of(load_node_classes([tmp_path / "1" / "nodes_of_same.py"])) == 1
    assert value_of(load_node_classes([tmp_path / "2" / "nodes_of_same.py"])) == 2


def test_a_later_module_replaces_a_class_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [tmp_path / f"nodes_of_{number}.py" for number in (1, 2)]
    for number, file in enumerate(files, start=1):
        file.write_text(f"VALUE = {number}\n" + NODE)
    with caplog.at_level(logging.WARNING):
        assert value_of(load_node_classes(files)) == 2
    assert "node class Mine" in caplog.text
    assert "nodes_of_2.py replaces the one of" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no NODE_CLASS_MAPPINGS"),
        ("def comfy_entrypoint(): ...", "which only the comfy engine loads"),
        ("NODE_CLASS_MAPPINGS = []", "is list, not a dict"),
        ("NODE_CLASS_MAPPINGS = {'Mine': 5}", "'Mine' of .* is no node class: it is int, not a class"),
        ("NODE_CLASS_MAPPINGS = {5: int}", "is no node class"),
        ("class A: pass\nNODE_CLASS_MAPPINGS = {'A': A}", "it has no INPUT_TYPES, RETURN_TYPES, FUNCTION"),
        (
            "class A:\n INPUT_TYPES = RETURN_TYPES = ()\n FUNCTION = 'go'\nNODE_CLASS_MAPPINGS = {'A': A}",
            "its FUNCTION names 'go', which it does not have",
        ),
        ("class A:\n define_schema = 1\nNODE_CLASS_MAPPINGS = {'A': A}", "comfy_api \\(V3\\)"),
    ],
)
def test_a_module_without_proper_node_classes_is_a_config_error(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "nodes_of_error.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        GraphEngine([str(file)]).start()
    assert caught.value.key == "node_modules"


@pytest.mark.parametrize(
    "source", ["no_such_module_here", "json.no_such_part", "./no_such_file.py", "./no_such_dir"]
)
def test_a_module_that_is_not_there_is_a_config_error(source: str) -> None:
    with pytest.raises(ConfigError, match="no_such"):
        load_node_classes([source])


def test_what_a_broken_module_raises_comes_through_and_a_mended_one_loads(tmp_path: Path) -> None:
    file = tmp_path / "nodes_of_broken.py"
    file.write_text("import no_such_dependency")
    with pytest.raises(StartupError, match=r"cannot be imported: ModuleNotFoundError.*no_such_dependency"):
        load_node_classes([file])
    file.write_text("VALUE = 10 ** 3  # mended\n" + NODE)
    assert value_of(load_node_classes([file])) == 1000
