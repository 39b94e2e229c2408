"""The Legion nodes: the tables that ComfyUI and the graph engine load.

Owns the tables. Importing this package loads neither torch nor ComfyUI.
"""

from __future__ import annotations

from legion_shm.nodes.exporter import LegionExporter
from legion_shm.nodes.importer import LegionImporter
from legion_shm.nodes.input import LegionInput
from legion_shm.nodes.output import LegionOutput

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "LegionExporter": LegionExporter,
    "LegionImporter": LegionImporter,
    "LegionInput": LegionInput,
    "LegionOutput": LegionOutput,
}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "LegionExporter": "Legion: Exporter",
    "LegionImporter": "Legion: Importer",
    "LegionInput": "Legion: Input",
    "LegionOutput": "Legion: Output",
}
