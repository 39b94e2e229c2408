"""LegionJoin: waits for one campaign and gives its outputs.

Owns the node alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from legion_shm.nodes.any_type import ANY
from legion_shm.nodes.importer import CHANNELS
from legion_shm.nodes.link_types import LEGION_CAMPAIGN

if TYPE_CHECKING:
    from legion_shm.nodes.campaign import Campaign

__all__ = ["LegionJoin"]


class LegionJoin:
    """Gives the 12 outputs of a campaign once its workflow has run; any number of Joins may wait for one."""

    RETURN_TYPES = (ANY,) * CHANNELS
    RETURN_NAMES = tuple(f"output_{n}" for n in range(1, CHANNELS + 1))
    FUNCTION = "join_campaign"
    WRITES_SHARED = False
    CATEGORY = "Legion"
    DESCRIPTION = "Waits for a workflow that a Legion: Master runs in the background, and gives its outputs."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"legion_campaign": (LEGION_CAMPAIGN,)}}

    def join_campaign(self, legion_campaign: Campaign) -> tuple[object, ...]:
        from legion_shm.nodes.campaign import numbered_outputs

        return numbered_outputs(legion_campaign.wait())
