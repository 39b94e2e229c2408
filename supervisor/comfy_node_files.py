"""ComfyUI's own node files, loaded once by a zygote for all workers that it forks.

Owns which files may be loaded there, and which of them a worker's ComfyUI need not load again. Custom nodes'
files are never among them. A file that fails there, or has changed since, is loaded by the worker as if
nothing had been; so what is wrong with it is told where it belongs.

    zygote: load_node_files ── fork ──▶ worker: ComfyUI asks for a file ─▶ is_loaded? ─▶ load_custom_node
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from pathlib import Path
from typing import Any

from legion_shm.supervisor.comfy_main import Stamp, stamp_of

__all__ = ["is_loaded", "load_node_files"]

_NAMED = re.compile(r"""["'](nodes_\w+\.py)["']""")

_loaded: dict[tuple[str, str], Stamp] = {}  # by path and module_parent


def load_node_files(root: Path, nodes: Any, *, with_api_nodes: bool) -> None:
    """Have ComfyUI's ``nodes`` load its own node files, as it would at its start."""
    load = getattr(nodes, "load_custom_node", None)
    if not asyncio.iscoroutinefunction(load):
        return
    root = Path(os.path.realpath(root))
    # Files that ComfyUI has and does not load are not to be run: those that it loads stand in its nodes.py.
    named: list[str] = _NAMED.findall((root / "nodes.py").read_text(encoding="utf-8", errors="replace"))
    paths = [root / "comfy_extras" / name for name in dict.fromkeys(named)]
    if with_api_nodes:
        paths += sorted((root / "comfy_api_nodes").glob("nodes_*.py"))
    asyncio.run(_load_all(load, [path for path in paths if path.is_file()]))


async def _load_all(load: Any, paths: list[Path]) -> None:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # the worker meets what is wrong too, and ComfyUI says it there
    try:
        for path in paths:
            parent, stamp = path.parent.name, stamp_of(str(path))
            if await load(str(path), module_parent=parent):
                _loaded[str(path), parent] = stamp
    finally:
        logging.disable(disabled)


def is_loaded(path: str, module_parent: str) -> bool:
    """Whether the zygote has loaded this file, as it still is. True once for each."""
    stamp = _loaded.pop((path, module_parent), None)
    return stamp is not None and stamp == stamp_of(path)
