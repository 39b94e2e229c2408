"""Loading node modules: from a name or a path to a table of node classes.

Owns the import of modules that hold NODE_CLASS_MAPPINGS, and the checks of what they hold. It never looks
into a class beyond whether it can be a node class.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

from legion_shm.errors import ConfigError, LegionError, StartupError
from legion_shm.supervisor.graph_protocol import NodeClass, class_problem

__all__ = ["load_node_classes", "load_node_module"]

_log = logging.getLogger(__name__)
_KEY = "node_modules"


def load_node_classes(
    modules: Sequence[str | os.PathLike[str]], builtin: Sequence[str] = ()
) -> dict[str, NodeClass]:
    """Every class of ``builtin``, then of ``modules``, by class name. A later one replaces an earlier one.

    Raises ConfigError where a module is not there or holds no node classes, and StartupError where one
    raises while it is imported.
    """
    classes: dict[str, NodeClass] = {}
    origin: dict[str, str] = {}
    for source in [*builtin, *modules]:
        shown = os.fspath(source)
        for name, node_class in _classes_of(_loaded(source, shown), shown).items():
            if name in classes and classes[name] is not node_class:
                _log.warning("node class %s of %s replaces the one of %s", name, shown, origin[name])
            classes[name] = node_class
            origin[name] = shown
    return classes


def _loaded(source: str | os.PathLike[str], shown: str) -> ModuleType:
    """The module, or StartupError that names it and shows the frames that are its own."""
    try:
        return load_node_module(source)
    except LegionError:
        raise
    except Exception as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename not in (__file__, os.path.realpath(__file__))
            and not frame.filename.startswith("<frozen importlib")
            and frame.filename != importlib.__file__
        ]
        told = "".join([*traceback.format_list(frames), *traceback.format_exception_only(type(error), error)])
        raise StartupError(
            f"the node module {shown} cannot be imported: {type(error).__name__}: {error}\n{told.rstrip()}"
        ) from error


def load_node_module(source: str | os.PathLike[str]) -> ModuleType:
    """Import a node module: a dotted name, or the path of a .py file or of a package's directory."""
    text = os.fspath(source)
    if not isinstance(source, str) or text.endswith(".py") or "/" in text or os.sep in text:
        return _load_path(Path(text))
    try:
        return importlib.import_module(text)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing and (text == missing or text.startswith(missing + ".")):
            near = next((path for path in (f"./{text}.py", f"./{text}") if Path(path).exists()), None)
            raise ConfigError(
                f"{_KEY}: no module named {text!r} can be imported; "
                + (f"did you mean {near}? Or " if near else "")
                + "name an importable module, or give the path of a .py file or of a package's directory "
                "(its folder may be added by python_path)",
                key=_KEY,
            ) from None
        raise


def _load_path(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    start = path / "__init__.py" if path.is_dir() else path
    if not start.is_file():
        raise ConfigError(
            f"{_KEY}: {start} is not a file; give a .py file or a directory with an __init__.py", key=_KEY
        )
    name = f"legion_nodes_{_identifier(path.stem)}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    folders = [str(path)] if path.is_dir() else None
    spec = importlib.util.spec_from_file_location(name, start, submodule_search_locations=folders)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{_KEY}: {start} cannot be imported as Python; give a .py file", key=_KEY)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _identifier(text: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in text)


def _classes_of(module: ModuleType, shown: str) -> dict[str, NodeClass]:
    mappings = cast("object", getattr(module, "NODE_CLASS_MAPPINGS", None))
    if mappings is None:
        extra = ""
        if hasattr(module, "comfy_entrypoint"):
            extra = "; it has a comfy_entrypoint (V3), which only the comfy engine loads"
        raise ConfigError(
            f"{_KEY}: {shown} has no NODE_CLASS_MAPPINGS, the dict of class name to node class{extra}",
            key=_KEY,
        )
    if not isinstance(mappings, Mapping):
        raise ConfigError(
            f"{_KEY}: NODE_CLASS_MAPPINGS of {shown} is {type(mappings).__name__}, not a dict", key=_KEY
        )
    classes: dict[str, NodeClass] = {}
    for name, node_class in cast("Mapping[object, object]", mappings).items():
        problem = class_problem(node_class)
        if not isinstance(name, str) or problem:
            raise ConfigError(
                f"{_KEY}: {name!r} of {shown} is no node class: {problem or 'its name is not a string'}",
                key=_KEY,
            )
        classes[name] = cast("NodeClass", node_class)
    return classes
