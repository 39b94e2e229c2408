"""ComfyUI's own `main.py`, run once: up to its main code by a zygote or the worker, from there by the worker.

Owns where that program is cut, that each of its statements runs exactly once and in its order, and which of
the files that its first part reads have changed since. What it does with the functions is `comfy_start`'s.

    log, paths, settings, prestartup scripts ── cut ──▶ core, functions ─▶ (not: the block that starts it)
                zygote, or worker                            worker

The cut is where ComfyUI looks whether somebody has loaded torch too early, so all that a prestartup script
has to come before does come after it. ComfyUI-Manager is left out, for it belongs to the server: in a worker
it would rename the server's log file, install what waits for the server's next start, and then put a server
in the worker's place.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

__all__ = ["MainProgram", "Stamp", "is_manager", "stamp_of", "take_begun"]

_log = logging.getLogger("legion_shm.supervisor.comfy")

_SCRIPT = "prestartup_script.py"
_BEFORE_TORCH = "comfy_aimdo"  # to be set up before torch is loaded, and by the process that uses the GPU
_CODE = ("main.py", "comfyui_version.py", "extra_model_paths.yaml")

Stamp = tuple[int, int] | None

_begun: MainProgram | None = None


class MainProgram:
    """`begin` once, then `finish` once: in the same process, or in forks of it.

    Where the cut is not to be found, ``divided`` is false and all of it is the second part.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._path = root / "main.py"
        body = ast.parse(self._path.read_bytes(), str(self._path)).body
        cut = next((number for number, statement in enumerate(body) if is_torch_warning(statement)), 0)
        self.divided = cut > 0
        self._first, self._rest = body[:cut], body[cut:]
        self.module = types.ModuleType("main")
        self.module.__file__ = str(self._path)
        kept = [statement for statement in self._rest if not _is_last_block(statement)]
        if len(kept) == len(self._rest) - 1:
            self._rest = kept
            self.module.__name__ = "__main__"  # settings act only in blocks that ask for it
        self.handlers: list[logging.Handler] = []
        """The log handlers that it has put up."""
        self._stamps: dict[str, Stamp] = {}

    def begin(self, *, in_zygote: bool = False) -> None:
        """The first part. A zygote keeps it for its forks, which `take_begun` it."""
        global _begun
        sys.modules["main"] = self.module
        _be_the_program(self._path)
        postponed = [statement for statement in self._first if in_zygote and _is_for_the_device(statement)]
        self._run([statement for statement in self._first if statement not in postponed])
        self._rest = [*postponed, *self._rest]
        if in_zygote:
            self._stamps = self._look()
            _begun = self

    def finish(self, *, torch_is_here: bool) -> types.ModuleType:
        """The main code. ``torch_is_here``: it came with the zygote, and not by somebody's mistake."""
        self._run([each for each in self._rest if not (torch_is_here and is_torch_warning(each))])
        self.module.__name__ = "main"
        return self.module

    def modules(self) -> list[str]:
        """What the main code imports at its left margin, in its order."""
        names: list[str] = []
        for statement in self._rest:
            if isinstance(statement, ast.ImportFrom):
                names.append(statement.module or "")
            elif isinstance(statement, ast.Import):
                names += [alias.name for alias in statement.names]
        return names

    def changed(self) -> str:
        """Which of the files behind the first part is another one now, in words; empty where none is."""
        now = self._look()
        for path in sorted(self._stamps.keys() | now.keys()):
            if self._stamps.get(path) != now.get(path):
                return f"{path} has changed"
        return ""

    def _run(self, statements: list[ast.stmt]) -> None:
        before = list(logging.getLogger().handlers)
        with _manager_left_out():
            exec(compile(ast.Module(statements, []), str(self._path), "exec"), self.module.__dict__)
        self.handlers += [handler for handler in logging.getLogger().handlers if handler not in before]

    def _look(self) -> dict[str, Stamp]:
        paths = [str(self.root / name) for name in _CODE]
        given: Any = getattr(getattr(sys.modules.get("comfy.cli_args"), "args", None), "__dict__", {})
        for more in given.get("extra_model_paths_config") or ():
            paths += more if isinstance(more, list) else [more]
        for folder in cast("Any", sys.modules["folder_paths"]).get_folder_paths("custom_nodes"):
            with contextlib.suppress(OSError):
                paths += [os.path.join(entry, _SCRIPT) for entry in os.scandir(folder) if entry.is_dir()]
        return {path: stamp for path in paths if (stamp := stamp_of(path)) is not None}


def take_begun(root: Path) -> MainProgram | None:
    """The program that the zygote began from which this process was forked; None where none did."""
    global _begun
    begun, _begun = _begun, None
    return begun if begun is not None and begun.root == root else None


def is_torch_warning(statement: ast.stmt) -> bool:
    """With this ComfyUI begins its main code: was torch imported before?"""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "'torch' in sys.modules"


def is_manager(folder: str) -> bool:
    """Whether a custom node's folder is ComfyUI-Manager."""
    name = os.path.basename(folder).lower()
    return "comfyui-manager" in name and os.path.isfile(os.path.join(folder, "glob", "manager_core.py"))


def _is_for_the_device(statement: ast.stmt) -> bool:
    return not isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef)) and any(
        isinstance(node, ast.Name) and node.id == _BEFORE_TORCH for node in ast.walk(statement)
    )


def _is_last_block(statement: ast.stmt) -> bool:
    """``if __name__ == "__main__":`` around a call of start_comfyui."""
    return (
        isinstance(statement, ast.If)
        and ast.unparse(statement.test).replace("'", '"') == '__name__ == "__main__"'
        and any(isinstance(node, ast.Name) and node.id == "start_comfyui" for node in ast.walk(statement))
    )


def stamp_of(path: str) -> Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _be_the_program(path: Path) -> None:
    """Scripts and custom nodes look for ComfyUI beside the program's file, which a spawned process has not.

    What a node spawns goes by the name, and does not run the file.
    """
    program = sys.modules["__main__"]
    program.__file__ = str(path)
    program.__spec__ = importlib.machinery.ModuleSpec("__main__", None)


@contextlib.contextmanager
def _manager_left_out() -> Generator[None, None, None]:
    """ComfyUI loads prestartup scripts by their paths; that of ComfyUI-Manager becomes an empty module."""
    real: Any = importlib.util.spec_from_file_location

    def spec_from_file_location(name: str, location: Any = None, **named: Any) -> Any:
        folder, file = os.path.split(str(location))
        if file == _SCRIPT and is_manager(folder):
            _log.info("%s is left out: it belongs to ComfyUI's server", folder)
            return importlib.machinery.ModuleSpec(name, cast("Any", _Nothing()))
        return real(name, location, **named)

    importlib.util.spec_from_file_location = spec_from_file_location
    try:
        yield
    finally:
        importlib.util.spec_from_file_location = real


class _Nothing:
    """The loader of an empty module."""

    def create_module(self, _spec: object) -> None:
        return None

    def exec_module(self, _module: object) -> None:
        return None
