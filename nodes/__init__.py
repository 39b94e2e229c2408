"""The Legion nodes: the tables that ComfyUI and the graph engine load.

Owns the tables. Importing this package loads neither torch nor ComfyUI, and nothing of the supervisor:
what the nodes of a master do is imported when they do it, for workers load these classes too.
"""

from __future__ import annotations

from legion_shm.nodes.configuration import LegionConfig
from legion_shm.nodes.exporter import LegionExporter
from legion_shm.nodes.importer import LegionImporter
from legion_shm.nodes.input import LegionInput
from legion_shm.nodes.join import LegionJoin
from legion_shm.nodes.join_all import LegionJoinAll
from legion_shm.nodes.master import LegionMaster
from legion_shm.nodes.master3 import LegionMaster3
from legion_shm.nodes.master6 import LegionMaster6
from legion_shm.nodes.output import LegionOutput
from legion_shm.nodes.release import LegionRelease
from legion_shm.nodes.warmup import LegionWarmup

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "LegionConfig": LegionConfig,
    "LegionWarmup": LegionWarmup,
    "LegionMaster3": LegionMaster3,
    "LegionMaster6": LegionMaster6,
    "LegionMaster": LegionMaster,
    "LegionJoin": LegionJoin,
    "LegionJoinAll": LegionJoinAll,
    "LegionRelease": LegionRelease,
    "LegionExporter": LegionExporter,
    "LegionImporter": LegionImporter,
    "LegionInput": LegionInput,
    "LegionOutput": LegionOutput,
}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "LegionConfig": "Legion: Configuration",
    "LegionWarmup": "Legion: Warmupper",
    "LegionMaster3": "Legion: Master (3 channels)",
    "LegionMaster6": "Legion: Master (6 channels)",
    "LegionMaster": "Legion: Master (12 channels)",
    "LegionJoin": "Legion: Join Campaign",
    "LegionJoinAll": "Legion: Join All Campaigns",
    "LegionRelease": "Legion: Release Worker",
    "LegionExporter": "Legion: Exporter",
    "LegionImporter": "Legion: Importer",
    "LegionInput": "Legion: Input",
    "LegionOutput": "Legion: Output",
}
