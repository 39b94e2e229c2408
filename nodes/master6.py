"""LegionMaster6: runs a workflow in a worker, with 6 channels.

Owns the node's shape alone; what it does is in master_node.py.
"""

from __future__ import annotations

from legion_shm.nodes.master_node import MasterNode, master_outputs

__all__ = ["LegionMaster6"]


class LegionMaster6(MasterNode):
    """A Master with 6 inputs and 6 outputs."""

    WRITES_SHARED = False
    CHANNELS = 6
    RETURN_TYPES, RETURN_NAMES = master_outputs(6)
