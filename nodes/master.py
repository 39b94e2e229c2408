"""LegionMaster: runs a workflow in a worker, with 12 channels.

Owns the node's shape alone; what it does is in master_node.py.
"""

from __future__ import annotations

from legion_shm.nodes.master_node import MasterNode, master_outputs

__all__ = ["LegionMaster"]


class LegionMaster(MasterNode):
    """A Master with 12 inputs and 12 outputs."""

    WRITES_SHARED = False
    CHANNELS = 12
    RETURN_TYPES, RETURN_NAMES = master_outputs(12)
