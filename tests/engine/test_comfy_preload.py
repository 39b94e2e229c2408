"""When a ComfyUI's imports may be shared, and what of its `main.py` counts as imports and settings."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import pytest

from legion_shm.supervisor.comfy_args import GivenArguments
from legion_shm.supervisor.comfy_preload import imported_by, is_settings, reason_against
from legion_shm.supervisor.comfy_start import is_torch_warning


def given(*arguments: str) -> GivenArguments:
    parser = argparse.ArgumentParser()
    parser.add_argument("--disable-all-custom-nodes", action="store_true")
    parser.add_argument("--whitelist-custom-nodes", nargs="+", default=[])
    parser.add_argument("--base-directory")
    parser.add_argument("--extra-model-paths-config", nargs="+", action="append")
    parser.add_argument("--enable-manager", action="store_true")
    return GivenArguments(parser, arguments)


def custom_node(folder: Path, name: str, *, script: bool = True) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    if script:
        (folder / name / "prestartup_script.py").touch()


def test_without_custom_nodes_imports_may_be_shared(tmp_path: Path) -> None:
    custom_node(tmp_path / "custom_nodes", "plain", script=False)
    custom_node(tmp_path / "custom_nodes", "off.disabled")
    assert reason_against(tmp_path, given()) == ""


def test_a_prestartup_script_has_to_come_first(tmp_path: Path) -> None:
    custom_node(tmp_path / "custom_nodes", "early")
    assert "early has a prestartup script" in reason_against(tmp_path, given())
    assert reason_against(tmp_path, given("--disable-all-custom-nodes")) == ""
    allowed = ("--disable-all-custom-nodes", "--whitelist-custom-nodes")
    assert reason_against(tmp_path, given(*allowed, "other")) == ""
    assert "early" in reason_against(tmp_path, given(*allowed, "other", "early"))
    assert "enable-manager" in reason_against(
        tmp_path, given("--enable-manager", "--disable-all-custom-nodes")
    )


def test_custom_nodes_elsewhere_are_looked_at_too(tmp_path: Path) -> None:
    root, base, more = tmp_path / "root", tmp_path / "base", tmp_path / "more"
    root.mkdir()
    custom_node(base / "custom_nodes", "based")
    assert "based" in reason_against(root, given("--base-directory", str(base)))
    custom_node(more / "packs", "extra")
    config = tmp_path / "paths.yaml"
    config.write_text(f"mine:\n  base_path: {more}\n  custom_nodes: packs\n")
    assert "extra" in reason_against(root, given("--extra-model-paths-config", str(config)))
    (root / "extra_model_paths.yaml").write_text(config.read_text())
    assert "extra" in reason_against(root, given())
    (root / "extra_model_paths.yaml").write_text("[broken")
    assert reason_against(root, given()) == ""


@pytest.mark.parametrize(
    ("statement", "wanted"),
    [
        ("import os", True),
        ("from a import b", True),
        ("comfy.options.enable_args_parsing()", True),
        ("if __name__ == '__main__':\n    pass", True),
        ("if __name__ == '__main__' and args.x:\n    pass", False),
        ("execute_prestartup_script()", False),
        ("def f(): pass", False),
        ("setup_logger(args)", False),
    ],
)
def test_what_counts_as_settings(statement: str, wanted: bool) -> None:
    (node,) = ast.parse(statement).body
    assert is_settings(node) is wanted


def test_the_look_for_torch_is_where_the_main_code_begins() -> None:
    (node,) = ast.parse("if 'torch' in sys.modules:\n    pass").body
    assert is_torch_warning(node)
    (other,) = ast.parse("if 'torch' in names:\n    pass").body
    assert not is_torch_warning(other)


def test_imports_at_the_margin_are_found_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("import b.c\nfrom d import e\nfrom . import own\n    import inner\nimport b.c\n")
    assert imported_by([path, tmp_path / "none.py"]) == ["b.c", "d"]
