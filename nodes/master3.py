"""LegionMaster3: runs a workflow in a worker, with 3 channels.

Owns the node's shape alone; what it does is in master_node.py.
"""

from __future__ import annotations

from legion_shm.nodes.master_node import MasterNode, master_outputs

__all__ = ["LegionMaster3"]


class LegionMaster3(MasterNode):
    """A Master with 3 inputs and 3 outputs."""

    WRITES_SHARED = False
    CHANNELS = 3
    RETURN_TYPES, RETURN_NAMES = master_outputs(3)
