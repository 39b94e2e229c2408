"""What a zygote imports: only what every worker of its kind would import anyway.

Owns the lists, and the reasons not to preload at all. It imports no module of a user.
"""

from __future__ import annotations

import importlib

__all__ = ["NotToBePreloaded", "preload"]

_ALWAYS = (
    "numpy",
    "torch",
    "PIL.Image",
    "psutil",
    "legion_shm.supervisor.host",
    "legion_shm.transport.tensors",
)
_GRAPH = ("legion_shm.supervisor.graph", "legion_shm.supervisor.graph_nodes", "legion_shm.nodes")


class NotToBePreloaded(Exception):
    """Workers of this kind must not share what they import: the reason, in words."""


def preload(engine: str, comfyui_path: str | None, extra_args: tuple[str, ...]) -> None:
    """Import it, in the order in which a worker would. Raises NotToBePreloaded, and what an import raises."""
    if engine != "graph":
        raise NotToBePreloaded("the comfy engine")
    for name in (*_ALWAYS, *_GRAPH):
        importlib.import_module(name)
