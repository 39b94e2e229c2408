"""From a spec as it was written to the spec that a worker is started from.

Owns what can be known of a spec in the caller's process: which engine ``auto`` means here, and whether the
paths in it exist. It starts nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import cast

from legion_shm.comfy_location import find_comfyui, not_found_message
from legion_shm.config import WorkerSpec
from legion_shm.errors import ConfigError
from legion_shm.supervisor.spawn import environment_with

__all__ = ["resolve_spec"]


def resolve_spec(spec: WorkerSpec) -> WorkerSpec:
    """The spec with its engine decided.

    ``auto`` is graph where ``node_modules`` are given, which only that engine loads; else comfy where a
    ComfyUI is found, else graph. Raises ConfigError where ``comfy`` is asked for and none is found, for a
    ``comfyui_path`` or ``node_modules`` that the engine has no use for, for a program, ``working_dir`` or
    node module that is not there, and for what is no WorkerSpec. The graph engine passes over ``extra_args``.
    """
    if not isinstance(cast("object", spec), WorkerSpec):
        raise ConfigError(f"spec: expected a WorkerSpec, got {type(spec).__name__}", key="spec")
    _check_paths(spec)
    modules = tuple(_module_path(module) for module in spec.node_modules)
    if modules != tuple(spec.node_modules):
        spec = spec.model_copy(update={"node_modules": modules})
    if spec.engine == "graph" or (spec.engine == "auto" and modules):
        if spec.comfyui_path is not None:
            raise ConfigError(
                "comfyui_path: this spec runs the graph engine (engine='graph' or node_modules), which "
                "needs none",
                key="comfyui_path",
            )
        return spec.model_copy(update={"engine": "graph"})
    if modules:
        raise ConfigError(
            "node_modules: the comfy engine does not load them; put node packs into ComfyUI's custom_nodes, "
            "or take engine='graph'",
            key="node_modules",
        )
    found = find_comfyui(spec.comfyui_path, environment_with(spec.env))
    if found is None:
        if spec.engine == "comfy":
            raise ConfigError(not_found_message(), key="comfyui_path")
        return spec.model_copy(update={"engine": "graph"})
    return spec.model_copy(update={"engine": "comfy", "comfyui_path": str(found.path)})


def _check_paths(spec: WorkerSpec) -> None:
    executable = spec.python_executable
    if executable is not None and shutil.which(executable) is None:
        raise ConfigError(
            f"python_executable: {executable!r} is not a program that can be run; give the path of a Python "
            "that has legion_shm installed, or leave it out to use this one",
            key="python_executable",
        )
    if spec.working_dir is not None and not Path(spec.working_dir).is_dir():
        raise ConfigError(f"working_dir: {spec.working_dir!r} is not a folder", key="working_dir")


def _module_path(module: str) -> str:
    """A path of a node module made absolute, for the worker's folder may be another; names stay names."""
    if os.sep not in module and not module.endswith(".py"):
        return module
    path = Path(module).expanduser()
    if not path.exists():
        raise ConfigError(f"node_modules: there is nothing at {module!r}", key="node_modules")
    return str(path.absolute())
