"""ComfyUI's `main.py` in two parts: where it is cut, what runs when, and when a first part is out of date."""

from __future__ import annotations

import logging
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from legion_shm.supervisor import comfy_main
from legion_shm.supervisor.comfy_main import MainProgram, is_manager, take_begun
from legion_shm.supervisor.comfy_preload import _import_libraries, imported_by

MAIN = """
import comfy_aimdo
import importlib.util
ran = ["first"]
if __name__ == "__main__":
    ran.append("settings")
if comfy_aimdo.wanted:
    ran.append("device")
def execute():
    for path in scripts:
        spec = importlib.util.spec_from_file_location("script", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
import scripts_to_run
scripts = scripts_to_run.paths
execute()
ran.append("scripts")
if 'torch' in sys.modules:
    ran.append("warning")
import json.decoder
from xml import dom
ran.append("main code")
def start_comfyui():
    ran.append("started")
if __name__ == "__main__":
    start_comfyui()
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "main.py").write_text("import sys\n" + MAIN)
    (tmp_path / "custom_nodes" / "early").mkdir(parents=True)
    fakes: dict[str, dict[str, Any]] = {
        "comfy_aimdo": {"wanted": True},
        "folder_paths": {"get_folder_paths": lambda _name: [str(tmp_path / "custom_nodes")]},
        "scripts_to_run": {"paths": []},
    }
    for name, values in fakes.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "main", raising=False)
    for name in ("__file__", "__spec__"):
        monkeypatch.setattr(sys.modules["__main__"], name, None, raising=False)
    yield tmp_path
    sys.modules.pop("main", None)
    take_begun(tmp_path)


def test_a_worker_of_its_own_runs_all_of_it_in_order_but_for_the_start(root: Path) -> None:
    program = MainProgram(root)
    program.begin()
    assert program.module.ran == ["first", "settings", "device", "scripts"]
    main = program.finish(torch_is_here=False)
    assert main.ran[4:] == [*(["warning"] if "torch" in sys.modules else []), "main code"]
    assert (main.__name__, sys.modules["main"]) == ("main", main)
    assert take_begun(root) is None


def test_a_zygote_leaves_the_device_and_the_main_code_to_its_forks(root: Path) -> None:
    MainProgram(root).begin(in_zygote=True)
    begun = take_begun(root)
    assert begun is not None
    assert begun.module.ran == ["first", "settings", "scripts"]
    assert begun.finish(torch_is_here=True).ran[3:] == ["device", "main code"], "and no warning of torch"
    assert take_begun(root) is None, "once"


def test_what_another_comfyuis_zygote_began_is_not_taken(root: Path, tmp_path: Path) -> None:
    MainProgram(root).begin(in_zygote=True)
    assert take_begun(tmp_path / "other") is None


def test_the_main_codes_imports_are_told(root: Path) -> None:
    program = MainProgram(root)
    assert program.modules() == ["json.decoder", "xml"]


def test_a_program_without_the_look_for_torch_is_not_divided(root: Path) -> None:
    path = root / "main.py"
    path.write_text(path.read_text().replace("'torch' in sys.modules", "'torch' in names()"))
    path.write_text(path.read_text() + "\ndef names(): return ()\n")
    assert not MainProgram(root).divided


def test_comfyui_manager_is_known_by_its_name_and_its_file(tmp_path: Path) -> None:
    for name, core in (("ComfyUI-Manager", True), ("comfyui-manager-3.39", True), ("comfyui-manager", False)):
        folder = tmp_path / str(core) / name  # apart: their names may be one to a system
        (folder / "glob").mkdir(parents=True)
        if core:
            (folder / "glob" / "manager_core.py").touch()
        assert is_manager(str(folder)) is core
    other = tmp_path / "other"
    (other / "glob").mkdir(parents=True)
    (other / "glob" / "manager_core.py").touch()
    assert not is_manager(str(other))


def test_the_managers_script_is_left_out_and_others_run(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = root / "ran"
    scripts: list[str] = []
    for name in ("comfyui-manager", "early"):
        folder = root / "custom_nodes" / name
        (folder / "glob").mkdir(parents=True)
        (folder / "glob" / "manager_core.py").touch()
        scripts.append(str(folder / "prestartup_script.py"))
        Path(scripts[-1]).write_text(f"import pathlib\npathlib.Path({str(ran)!r}).write_text({name!r})\n")
    monkeypatch.setattr(sys.modules["scripts_to_run"], "paths", scripts)
    with caplog.at_level(logging.INFO):
        MainProgram(root).begin()
    assert ran.read_text() == "early"
    assert "comfyui-manager is left out" in caplog.text


def test_a_change_of_what_the_first_part_read_is_seen(root: Path) -> None:
    program = MainProgram(root)
    program.begin(in_zygote=True)
    assert program.changed() == ""
    (root / "custom_nodes" / "plain").mkdir()
    assert program.changed() == "", "a pack without a script is loaded by each worker anyway"
    script = root / "custom_nodes" / "early" / "prestartup_script.py"
    script.touch()
    assert f"{Path('early', script.name)} has changed" in program.changed()
    script.unlink()
    assert program.changed() == ""
    os.utime(root / "main.py", ns=(1, 1))
    assert "main.py has changed" in program.changed()


def test_handlers_of_the_log_that_it_puts_up_are_known(root: Path) -> None:
    path = root / "main.py"
    path.write_text(
        path.read_text().replace(
            "ran = [", "import logging; logging.getLogger().addHandler(logging.NullHandler()); ran = ["
        )
    )
    program = MainProgram(root)
    program.begin()
    (handler,) = program.handlers
    logging.getLogger().removeHandler(handler)
    assert isinstance(handler, logging.NullHandler)


def test_imports_at_the_margin_are_found_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("import b.c\nfrom d import e\nfrom . import own\n    import inner\nimport b.c\n")
    assert imported_by([path, tmp_path / "none.py"]) == ["b.c", "d"]


def test_nothing_is_begun_to_start_with() -> None:
    assert comfy_main.take_begun(Path("/")) is None


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Some on the path; what they import is asked for and taken away again."""
    folder = tmp_path / "libraries"
    for name, text in {
        "lx_plain/__init__.py": "",
        "lx_plain/heavy.py": "import lx_heavy",
        "lx_set_up/__init__.py": "lib = None",
        "lx_set_up/inner.py": "from lx_set_up import lib",
        "lx_heavy/__init__.py": "",
        "lx_hides/__init__.py": "try:\n    import lx_heavy\nexcept ImportError:\n    lx_heavy = None\n",
        "lx_later/__init__.py": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.startswith("lx_")]:
        del sys.modules[name]


def loaded() -> list[str]:
    return sorted(name for name in sys.modules if name.startswith("lx_"))


def preloaded(tmp_path: Path, code: str) -> tuple[str, list[str]]:
    root = tmp_path / "comfy_of_libraries"
    root.mkdir(exist_ok=True)
    (root / "nodes.py").write_text(code)
    return _import_libraries(root, frozenset({"lx_heavy", "lx_set_up", "heavy"})), loaded()


@pytest.mark.usefixtures("libraries")
def test_a_library_that_has_to_wait_is_not_preloaded_nor_is_any_part_of_it(tmp_path: Path) -> None:
    code = (
        "import lx_set_up.inner\nimport lx_plain.heavy\nimport lx_plain\nimport lx_missing\nimport lx_later\n"
    )
    assert preloaded(tmp_path, code) == ("", ["lx_later", "lx_plain"])
    assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_Refused"]


@pytest.mark.usefixtures("libraries")
def test_a_library_that_asks_for_what_has_to_wait_is_named_also_if_it_hides_that(tmp_path: Path) -> None:
    culprit, present = preloaded(tmp_path, "import lx_plain\nimport lx_hides\nimport lx_later\n")
    assert culprit == "lx_hides"
    assert "lx_heavy" not in present
    assert "lx_later" not in present
