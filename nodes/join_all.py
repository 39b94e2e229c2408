"""LegionJoinAll: waits for up to four campaigns.

Owns the node alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from legion_shm.nodes.link_types import LEGION_CAMPAIGN

if TYPE_CHECKING:
    from legion_shm.nodes.campaign import Campaign

__all__ = ["LegionJoinAll"]

_COUNT = 4


class LegionJoinAll:
    """Gives the campaigns on when all have ended; if some went wrong, raises the first one's error then."""

    RETURN_TYPES = (LEGION_CAMPAIGN,) * _COUNT
    RETURN_NAMES = tuple(f"campaign_{n}" for n in range(1, _COUNT + 1))
    FUNCTION = "join_all_campaigns"
    WRITES_SHARED = False
    CATEGORY = "Legion"
    DESCRIPTION = "Waits for several workflows that Masters run in the background."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {
            "required": {"campaign_1": (LEGION_CAMPAIGN,)},
            "optional": {f"campaign_{n}": (LEGION_CAMPAIGN,) for n in range(2, _COUNT + 1)},
        }

    def join_all_campaigns(self, **campaigns: Campaign | None) -> tuple[Campaign | None, ...]:
        from legion_shm.nodes.campaign import wait_for_all

        given = [campaigns.get(name) for name in self.RETURN_NAMES]
        wait_for_all([campaign for campaign in given if campaign is not None])
        return tuple(given)
