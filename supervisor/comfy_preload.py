"""What a ComfyUI worker imports before any custom node has a say: done once, in the zygote that forks it.

Owns what may be imported there, in the order of ComfyUI's own `main.py`, and the reasons not to. Custom nodes
and their scripts are the user's and are never loaded here. Where there is a GPU, nothing of ComfyUI's core is
either, for `comfy.model_management` looks at the device when it is imported; libraries alone are.

    main.py: its imports and its blocks of settings, in order ─▶ libraries that ComfyUI's files import
                                                              └▶ with --cpu: core and extra nodes' imports too
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from legion_shm.supervisor.comfy_args import (
    GivenArguments,
    accelerator_found,
    headless_arguments,
    read_arguments,
)
from legion_shm.supervisor.comfy_start import is_torch_warning

__all__ = ["imported_by", "is_settings", "preload_comfyui", "reason_against"]

_OWN_FILES = ("main.py", "execution.py", "server.py", "nodes.py", "folder_paths.py")
_IMPORT = re.compile(r"^(?:import|from)[ \t]+([\w.]+)", re.MULTILINE)
_TORCH_FIRST = ("comfy_aimdo",)  # to be set up before torch is loaded, and only by main.py
_NEEDS_TORCH = frozenset(
    {"torch", "torchvision", "torchaudio", "torchsde", "kornia", "spandrel", "transformers", "safetensors"}
)


def reason_against(root: Path, given: GivenArguments) -> str:
    """Why workers with these arguments must not share imports; empty where they may.

    A custom node's prestartup script, and ComfyUI-Manager's, may change packages or the environment, and
    count on being run before anything else is imported.
    """
    if given.value("enable_manager"):
        return "--enable-manager runs before ComfyUI's imports, and may install packages"
    if given.value("disable_all_custom_nodes"):
        allowed = frozenset(cast("Sequence[str]", given.value("whitelist_custom_nodes") or ()))
    else:
        allowed = None
    for folder in _custom_node_folders(root, given):
        for script in sorted(folder.glob("*/prestartup_script.py")):
            name = script.parent.name
            if not name.endswith(".disabled") and (allowed is None or name in allowed):
                return f"the custom node {name} has a prestartup script, which is to run before all imports"
    return ""


def _custom_node_folders(root: Path, given: GivenArguments) -> Iterator[Path]:
    yield Path(given.value("base_directory") or root) / "custom_nodes"
    configs = [root / "extra_model_paths.yaml"]
    for more in given.value("extra_model_paths_config") or ():
        configs += [Path(path) for path in (cast("list[str]", more) if isinstance(more, list) else [more])]
    for path in configs:
        with contextlib.suppress(OSError, ValueError):
            yield from _folders_in(path)


def _folders_in(config: Path) -> Iterator[Path]:
    import yaml

    try:
        sections: object = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return
    if not isinstance(sections, dict):
        return
    for section in cast("dict[object, Any]", sections).values():
        if isinstance(section, dict):
            values = cast("dict[str, Any]", section)
            base = os.path.expanduser(os.path.expandvars(str(values.get("base_path") or "")))
            for line in str(values.get("custom_nodes") or "").split("\n"):
                if line.strip():
                    yield config.parent / base / line.strip()


def preload_comfyui(root: Path, extra_args: Sequence[str]) -> str:
    """Import it. The answer is why not, where it must not be done, and empty where it has been.

    Raises ConfigError for arguments that ComfyUI refuses, and what a broken import raises.
    """
    sys.path[:] = [str(root), *(entry for entry in sys.path if entry != str(root))]
    given = read_arguments(extra_args)
    reason = reason_against(root, given)
    if reason:
        return reason
    accelerator = _in_a_child(accelerator_found)
    with tempfile.TemporaryDirectory(prefix="legion-comfy-") as placeholder:
        # The worker's own folder takes its place in the fork: `comfy_start` tells ComfyUI's arguments.
        sys.argv = [
            str(root / "main.py"),
            *headless_arguments(given, temp=Path(placeholder), accelerator=accelerator),
        ]
        tree = ast.parse((root / "main.py").read_bytes(), str(root / "main.py"))
        _run_settings(root, tree)
    arguments = sys.modules["comfy.cli_args"].args
    on_cpu = bool(getattr(arguments, "cpu", False))
    skipped = frozenset[str]()
    if not on_cpu and any(name in sys.modules for name in _TORCH_FIRST):
        skipped = _NEEDS_TORCH
    _import_libraries(root, skipped)
    if on_cpu:
        _import_core(root, tree, with_api_nodes=not getattr(arguments, "disable_api_nodes", False))
    return ""


def _in_a_child(ask: Any) -> bool:
    """The answer of a function that may open a GPU's library, which must never be open here."""
    pid = os.fork()
    if pid == 0:
        answer = 1
        try:
            answer = 0 if ask(os.environ) else 1
        finally:
            os._exit(answer)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _run_settings(root: Path, tree: ast.Module) -> None:
    """The part of `main.py` before its main code: imports, and blocks of settings that ask for ``__main__``.

    Nothing else of it: functions, log set-up and custom nodes' scripts are for the worker, which runs it all.
    """
    module = types.ModuleType("legion_main_settings")
    module.__file__ = str(root / "main.py")
    module.__name__ = "__main__"
    for statement in tree.body:
        if is_torch_warning(statement):
            break
        if is_settings(statement):
            exec(compile(ast.Module([statement], []), str(root / "main.py"), "exec"), module.__dict__)


def is_settings(statement: ast.stmt) -> bool:
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return True
    if isinstance(statement, ast.Expr):
        return ast.unparse(statement) == "comfy.options.enable_args_parsing()"
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def _import_libraries(root: Path, skipped: frozenset[str]) -> None:
    """What ComfyUI's files import and is not ComfyUI's. Missing ones are ComfyUI's to complain about."""
    for name in imported_by(_files(root)):
        top = name.partition(".")[0]
        if top in skipped or (root / top).exists() or (root / f"{top}.py").exists():
            continue
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _import_core(root: Path, tree: ast.Module, *, with_api_nodes: bool) -> None:
    """The main code's imports, then those of the node files that ComfyUI will load by their paths."""
    modules = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for statement in modules:
        names = [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
        names += [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
        for name in names:
            importlib.import_module(name)
    folders = ("comfy_extras", "comfy_api_nodes") if with_api_nodes else ("comfy_extras",)
    for name in imported_by(
        [path for folder in folders for path in sorted((root / folder).glob("nodes_*.py"))]
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _files(root: Path) -> list[Path]:
    folders = ("comfy", "comfy_execution", "comfy_extras", "comfy_api", "app", "utils", "api_server")
    paths = [root / name for name in _OWN_FILES]
    for folder in folders:
        paths += sorted((root / folder).rglob("*.py"))
    return paths


def imported_by(paths: Sequence[Path]) -> list[str]:
    """The modules that files import at their left margin, each once, in the order in which they come."""
    names: dict[str, None] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            for name in _IMPORT.findall(path.read_text(encoding="utf-8", errors="replace")):
                if not name.startswith("."):
                    names[name] = None
    return list(names)
