"""What a zygote imports: only what every worker of its kind would import anyway.

Owns the lists, and the reasons not to preload at all. It imports no module of a user.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from legion_shm.comfy_location import find_comfyui
from legion_shm.supervisor.torch_library import torch_library_loading

__all__ = ["NotToBePreloaded", "preload"]

_HOST = ("psutil", "legion_shm.supervisor.host", "legion_shm.transport.segment_memfd")
_GRAPH = (
    "numpy",
    "torch",
    "PIL.Image",
    "legion_shm.transport.tensors",
    "legion_shm.supervisor.graph",
    "legion_shm.supervisor.graph_nodes",
    "legion_shm.nodes",
)
_COMFY = ("legion_shm.supervisor.comfy", "legion_shm.nodes")


class NotToBePreloaded(Exception):
    """Workers of this kind must not share what they import: the reason, in words."""


def preload(engine: str, comfyui_path: str | None, extra_args: Sequence[str]) -> Callable[[], str]:
    """Import it, in the order in which a worker would.

    The answer tells, whenever it is asked, what a new worker has to see and forks would not, for it has
    changed since. Raises NotToBePreloaded, and what an import raises.
    """
    if engine == "comfy":  # its own first, whose settings decide how torch is to be loaded
        changed = _preload_comfyui(comfyui_path, extra_args)
        _import((*_HOST, *_COMFY))
        return changed
    with torch_library_loading():
        _import(_HOST)
    _import(_GRAPH)
    return str


def _import(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)


def _preload_comfyui(comfyui_path: str | None, extra_args: Sequence[str]) -> Callable[[], str]:
    from legion_shm.supervisor.comfy_preload import preload_comfyui

    found = find_comfyui(comfyui_path, os.environ)
    if found is None:
        raise NotToBePreloaded("there is no ComfyUI")
    begun = preload_comfyui(Path(os.path.abspath(found.path)), extra_args)
    if isinstance(begun, str):
        raise NotToBePreloaded(begun)
    return begun.changed
