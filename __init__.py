"""ComfyUI's entry: what ComfyUI reads when this repository lies in ``custom_nodes/``.

Owns nothing but the way to ``legion_shm.nodes``, whose mappings it hands on. Imports without ComfyUI and
without torch. Where ``legion_shm`` was not installed with pip, the folders beside this file serve as it;
they never become importable under names of their own, since ``nodes`` is ComfyUI's.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

WEB_DIRECTORY = "./web"
"""Where ComfyUI finds the nodes' help pages, relative to this file."""


def _load_from_checkout(root: Path) -> None:
    """Make ``legion_shm`` importable from ``root`` without making its other folders so."""
    package = root / "legion_shm"
    spec = importlib.util.spec_from_file_location(
        "legion_shm", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{package} holds no package", name="legion_shm")
    module = importlib.util.module_from_spec(spec)
    sys.modules["legion_shm"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["legion_shm"]
        raise


def _watch_loaders() -> None:
    """From now on models know which file they came from, for `models: recipe`; workers need not."""
    if "comfy.sd" in sys.modules and "legion_shm.supervisor.host" not in sys.modules:
        from legion_shm.supervisor.comfy_loaders import watch_loaders

        watch_loaders()


def _load() -> tuple[dict[str, type], dict[str, str]]:
    root = Path(__file__).resolve().parent
    try:
        if importlib.util.find_spec("legion_shm") is None:
            _load_from_checkout(root)
        from legion_shm.nodes import NODE_CLASS_MAPPINGS as CLASSES
        from legion_shm.nodes import NODE_DISPLAY_NAME_MAPPINGS as NAMES

        _watch_loaders()
    except ImportError as error:
        logging.getLogger("legion_shm").error(
            "The Legion nodes are not available: %s. Run `python -m pip install -r requirements.txt` in %s.",
            error,
            root,
        )
        return {}, {}
    return dict(CLASSES), dict(NAMES)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = _load()
