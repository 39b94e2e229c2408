"""The layout holds: one package out of five folders, light to import, imports downward only."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
FOLDERS = ("legion_shm", "transport", "supervisor", "nodes", "native_bench")
LINKS = FOLDERS[1:]
SITE_PACKAGES = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})

# The codec's edge, the graph engine (inside functions) and its nodes, native_bench: a worker loads them
# after it has set its environment, a caller with its first tensor.
TORCH_IMPORTERS = {
    "transport/resident.py",
    "transport/tensors.py",
    "transport/torch_devices.py",
    "supervisor/graph.py",
    "supervisor/graph_holders.py",
    "supervisor/graph_slots.py",
    "supervisor/graph_writes.py",
    "supervisor/comfy_models.py",
    "supervisor/comfy_models_build.py",
    "supervisor/comfy_models_kinds.py",
    "supervisor/comfy_models_packages.py",
    "supervisor/comfy_models_parcels.py",
    "supervisor/comfy_models_patchers.py",
    "supervisor/comfy_models_plan.py",
    "supervisor/comfy_models_recipes.py",
    "supervisor/comfy_models_special.py",
    "supervisor/comfy_models_state.py",
    "supervisor/comfy_models_weights.py",
    "legion_shm/cli_values.py",
    "legion_shm/doctor.py",
    "legion_shm/testing/nodes.py",
}
TORCH_FOLDERS = ("supervisor/graph_nodes/", "native_bench/")
ZMQ_IMPORTERS = {"transport/channel.py", "native_bench/peers/zeromq.py"}

DEPENDENCIES = (
    "torch", "numpy", "zmq", "msgpack", "psutil", "yaml", "pydantic", "PIL.Image", "rich.console", "click",
    "safetensors.torch", "asyncio", "multiprocessing.shared_memory", "concurrent.futures",
)  # fmt: skip


def modules() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from (path for path in sorted((REPO / folder).rglob("*.py")) if not _behind_link(path))


def _behind_link(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents)


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def checkout_without_symlinks(target: Path, links: str) -> Path:
    """A copy of the sources as without symlinks: each a text file with its target, or an empty folder."""
    for folder in FOLDERS:
        shutil.copytree(
            REPO / folder,
            target / folder,
            ignore=lambda directory, names: {
                n for n in names if n == "__pycache__" or Path(directory, n).is_symlink()
            },
        )
    for link in LINKS:
        path = target / "legion_shm" / link
        path.unlink(missing_ok=True)  # a text file, where this checkout itself has no symlinks
        if links == "empty folders":
            path.mkdir()
        else:
            path.write_text(f"../{link}", encoding="utf-8")
    shutil.copy2(REPO / "__init__.py", target)
    return target


def run_isolated(code: str, *arguments: object, path: tuple[str, ...] = (), cwd: Path) -> dict[str, Any]:
    """What ``code`` prints as JSON in a Python that sees the standard library and ``path``, nothing else."""
    prelude = f"import sys; sys.path.extend({list(path)!r})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", prelude + code, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"stderr": done.stderr}


LOAD_AS_COMFYUI_DOES = """
import importlib.util, json, logging, sys
logging.basicConfig()

class Absent:
    names = {"torch", "comfy", "folder_paths", "execution", "server"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
root = sys.argv[1]
spec = importlib.util.spec_from_file_location(root.replace(".", "_x_"), root + "/__init__.py",
                                              submodule_search_locations=[root])
entry = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = entry
spec.loader.exec_module(entry)
package = sys.modules.get("legion_shm")
print(json.dumps({
    "classes": sorted(entry.NODE_CLASS_MAPPINGS),
    "titles": sorted(entry.NODE_DISPLAY_NAME_MAPPINGS),
    "loaded": sorted({"torch", "comfy", "zmq"} & set(sys.modules)),
    "package": package and package.__file__,
    "nodes": getattr(sys.modules.get("legion_shm.nodes"), "__file__", None),
    "top_level": [n for n in ("nodes", "transport", "supervisor", "native_bench")
                  if n in sys.modules or importlib.util.find_spec(n) is not None],
}))
"""


@pytest.mark.parametrize("links", ["symlinks", "text files", "empty folders"])
def test_entry_finds_its_own_folders_without_an_install_without_torch_and_without_comfyui(
    tmp_path: Path, links: str
) -> None:
    root = REPO if links == "symlinks" else checkout_without_symlinks(tmp_path / "Legion-SHM", links)
    found = run_isolated(LOAD_AS_COMFYUI_DOES, root, path=tuple(SITE_PACKAGES), cwd=tmp_path)
    assert {"LegionImporter", "LegionExporter"} <= set(found["classes"]), found["stderr"]
    assert set(found["titles"]) <= set(found["classes"])
    assert found["loaded"] == []
    assert found["top_level"] == []
    assert Path(found["package"]) == root / "legion_shm" / "__init__.py"
    assert Path(found["nodes"]).resolve() == root / "nodes" / "__init__.py"


def test_entry_imports_on_a_python_without_any_dependency_and_says_what_to_do(tmp_path: Path) -> None:
    found = run_isolated(LOAD_AS_COMFYUI_DOES, REPO, cwd=tmp_path)
    assert found["top_level"] == []
    if not found["classes"]:
        assert "pip install -r requirements.txt" in found["stderr"]


def test_requirements_end_in_the_one_spelling_that_every_installer_takes() -> None:
    assert (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()[-1] == "--editable=."


def test_requirements_name_every_dependency_for_installers_that_leave_that_line_out() -> None:
    project = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", project, flags=re.MULTILINE | re.DOTALL)
    wanted = [line for line in re.findall(r'"([^"]+)"', block) if not line.startswith("torch")]
    assert (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()[:-1] == wanted


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_imports_as_a_part_of_legion_shm_from_the_checkout(folder: str) -> None:
    name = "legion_shm" if folder == "legion_shm" else f"legion_shm.{folder}"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == REPO / folder / "__init__.py"


_DEFINING = (ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def test_each_module_says_what_it_owns_and_what_it_offers() -> None:
    wanting: list[str] = []
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bare = path.name == "__init__.py" and not any(isinstance(node, _DEFINING) for node in tree.body)
        offers = bare or any(
            isinstance(target, ast.Name) and target.id == "__all__"
            for node in tree.body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        )
        if not ast.get_docstring(tree):
            wanting.append(f"{relative(path)}: no docstring")
        if not offers and path.name != "__main__.py":
            wanting.append(f"{relative(path)}: no __all__")
    assert wanting == []


def test_lazy_exports_are_exactly_the_public_names_and_each_resolves() -> None:
    import legion_shm

    exports: dict[str, str] = legion_shm._EXPORTS
    assert set(exports) == set(legion_shm.__all__)
    assert len(set(legion_shm.__all__)) == len(legion_shm.__all__)
    assert set(legion_shm.__all__) <= set(dir(legion_shm))
    for name, module in exports.items():
        assert getattr(legion_shm, name) is getattr(importlib.import_module(module), name)
        assert name in importlib.import_module(module).__all__


def test_version_is_the_one_of_the_distribution() -> None:
    import legion_shm

    project = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{legion_shm.__version__}"' in project.splitlines()


def _imports(path: Path, package: str) -> bool:
    """Whether the file imports ``package`` anywhere but for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        if any(name.partition(".")[0] == package for name in names):
            return True
    return False


@pytest.mark.parametrize(
    ("package", "importers", "folders"),
    [("torch", TORCH_IMPORTERS, TORCH_FOLDERS), ("zmq", ZMQ_IMPORTERS, ())],
)
def test_heavy_packages_are_imported_by_the_listed_files_only(
    package: str, importers: set[str], folders: tuple[str, ...]
) -> None:
    found = {relative(path) for path in modules() if _imports(path, package)}
    assert {name for name in found if not name.startswith(folders)} == importers


def test_no_module_reads_the_wall_clock() -> None:
    uses = [
        f"{relative(path)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in {"time.time", "time.time_ns"})
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "time"
            and "time" in {a.name for a in node.names}
        )
    ]
    assert uses == []


@pytest.mark.skipif(
    not (REPO / "legion_shm" / "transport").is_dir(), reason="this checkout has no symbolic links"
)
def test_imports_go_downward_only() -> None:
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def _run_in_checkout(code: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_of_the_package_loads_neither_torch_nor_zeromq_nor_numpy() -> None:
    loaded = _run_in_checkout("import legion_shm, sys; print(*sys.modules)")
    assert "legion_shm" in loaded
    assert not {"torch", "zmq", "numpy", "pydantic", "asyncio", "multiprocessing"} & set(loaded)


def test_import_of_the_package_takes_less_than_100_ms() -> None:
    code = "import time; t = time.perf_counter(); import legion_shm; print(time.perf_counter() - t)"
    assert statistics.median(float(_run_in_checkout(code)[0]) for _ in range(5)) < 0.1


@pytest.mark.slow
def test_use_of_every_public_name_stays_light_beside_importing_the_dependencies() -> None:
    code = f"""
import importlib, time
for name in {DEPENDENCIES!r}: importlib.import_module(name)
started = time.process_time()
import legion_shm
for name in legion_shm.__all__: getattr(legion_shm, name)
print(time.process_time() - started)
"""
    # Some 0.07 s on a quiet machine. The processor's time, at its best: a busy one must not fail this.
    assert min(float(_run_in_checkout(code)[0]) for _ in range(5)) < 0.3
