"""What a ComfyUI worker loads before any custom node does: done once, in the zygote that forks it.

Owns what may be loaded there, in the order of ComfyUI's own `main.py`, and the reasons not to. Custom nodes
are never loaded here; their prestartup scripts are run, since they have to come before the imports. Where
there is a GPU, nothing of ComfyUI's core is loaded, for `comfy.model_management` looks at the device when it
is imported; libraries alone are.

    main.py up to its main code ─▶ with --cpu: torch's library, core, and its own node files too
                                └▶ libraries that ComfyUI's other files import
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from legion_shm.supervisor.comfy_args import accelerator_found, headless_arguments, read_arguments
from legion_shm.supervisor.comfy_main import MainProgram
from legion_shm.supervisor.comfy_node_files import load_node_files
from legion_shm.supervisor.torch_library import torch_library_loading

__all__ = ["imported_by", "preload_comfyui"]

_LATE = ("comfy_config.config_parser",)
"""ComfyUI's own modules that need libraries alone, and that functions of it import."""

_WITH_CORE = ("legion_shm.supervisor.comfy_models",)
"""Our own modules that a worker imports once ComfyUI is there."""

_OWN_FILES = ("main.py", "execution.py", "server.py", "nodes.py", "folder_paths.py")
_IMPORT = re.compile(r"^(?:import|from)[ \t]+([\w.]+)", re.MULTILINE)
_TORCH_FIRST = frozenset({"comfy_aimdo"})  # to be set up before torch is loaded, and only by main.py
_NEEDS_TORCH = frozenset(
    {
        *("torch", "torchvision", "torchaudio", "torchsde", "kornia", "spandrel", "transformers"),
        *("safetensors", "comfy_kitchen"),
    }
)
_BESIDE = "sympy"
"""torch imports it a little later; it has no library of its own, and takes as long as torch's."""


def preload_comfyui(root: Path, extra_args: Sequence[str]) -> MainProgram | str:
    """Import it. The answer is what was begun, or why it must not be done.

    Raises ConfigError for arguments that ComfyUI refuses, and what a broken import or script raises.
    """
    sys.path[:] = [str(root), *(entry for entry in sys.path if entry != str(root))]
    program = MainProgram(root)
    if not program.divided:
        return f"{root / 'main.py'} does not show where its main code begins"
    given = read_arguments(extra_args)
    accelerator = _in_a_child(accelerator_found)
    with tempfile.TemporaryDirectory(prefix="legion-comfy-") as placeholder:
        # The worker's own folder takes its place in the fork: `comfy_start` tells ComfyUI's arguments.
        sys.argv = [
            str(root / "main.py"),
            *headless_arguments(given, temp=Path(placeholder), accelerator=accelerator),
        ]
        program.begin(in_zygote=True)
    arguments = sys.modules["comfy.cli_args"].args
    on_cpu = bool(getattr(arguments, "cpu", False))
    skipped = frozenset[str]()
    if not on_cpu and any(name in sys.modules for name in _TORCH_FIRST):
        if "torch" in sys.modules:
            return "a prestartup script loads torch, which this ComfyUI has to set up memory for first"
        # Its modules keep for good what the set-up has made, or that it has made nothing yet.
        skipped = _NEEDS_TORCH | _TORCH_FIRST
    if on_cpu:
        with torch_library_loading(), contextlib.suppress(ImportError):
            importlib.import_module(_BESIDE)
        _import_core(
            root, program.modules(), with_api_nodes=not getattr(arguments, "disable_api_nodes", False)
        )
    if culprit := _import_libraries(root, skipped):
        return f"{culprit} loads torch, which this ComfyUI has to set up memory for first"
    return program


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


def _import_libraries(root: Path, skipped: frozenset[str]) -> str:
    """What ComfyUI's files import and is not ComfyUI's. Missing ones are ComfyUI's to complain about.

    Those of a file that is loaded have been imported with it. The answer is the first that asked for what is
    ``skipped``, which it did not get; empty where none did.
    """
    loaded = {getattr(module, "__file__", None) for module in tuple(sys.modules.values())}
    refused = _Refused(skipped)
    sys.meta_path.insert(0, refused)
    try:
        theirs = imported_by([path for path in _files(root) if str(path) not in loaded])
        for name in (*theirs, *_LATE):
            top, *parts = name.split(".")
            own = (root / top).exists() or (root / f"{top}.py").exists()
            if top in skipped or (own and name not in _LATE):
                continue
            if not skipped.isdisjoint(parts):  # such as einops.layers.torch
                continue
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
            if refused.asked:
                return name
    finally:
        sys.meta_path.remove(refused)
    return ""


class _Refused:
    """Lets nobody import these packages, and notes that somebody tried: a library may hide that it did."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names, self.asked = names, False

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name.partition(".")[0] in self._names and name not in sys.modules:
            self.asked = True
            raise ModuleNotFoundError(f"{name} is not to be loaded yet", name=name)


def _import_core(root: Path, modules: Sequence[str], *, with_api_nodes: bool) -> None:
    """The main code's imports, then those of the node files, then these themselves."""
    for name in modules:
        importlib.import_module(name)
    folders = ("comfy_extras", "comfy_api_nodes") if with_api_nodes else ("comfy_extras",)
    for name in imported_by(
        [path for folder in folders for path in sorted((root / folder).glob("nodes_*.py"))]
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    load_node_files(root, importlib.import_module("nodes"), with_api_nodes=with_api_nodes)
    for name in _WITH_CORE:
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
