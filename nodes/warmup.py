"""LegionWarmup: starts a worker before it is needed.

Owns the node alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from legion_shm.nodes.link_types import LEGION_CAMPAIGN, LEGION_CONFIG

if TYPE_CHECKING:
    from legion_shm.nodes.legion_yaml import Configuration

__all__ = ["LegionWarmup"]


class LegionWarmup:
    """Starts the worker of a configuration, and waits until it is ready unless told otherwise."""

    RETURN_TYPES = (LEGION_CAMPAIGN,)
    RETURN_NAMES = ("legion_campaign",)
    FUNCTION = "warmup"
    WRITES_SHARED = False
    CATEGORY = "Legion"
    DESCRIPTION = "Starts a worker before the Legion: Master that needs it runs."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {
            "required": {"legion_config": (LEGION_CONFIG,)},
            "optional": {
                "wait": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "label_on": "until it is ready",
                        "label_off": "in the background",
                        "tooltip": "Whether to wait until the worker is ready, and fail if it can't start.",
                    },
                )
            },
        }

    def warmup(self, legion_config: Configuration, wait: bool = True) -> tuple[object]:
        from legion_shm.nodes.campaign import Campaign
        from legion_shm.nodes.shared_supervisor import warm_up

        if not legion_config.dry_run:
            warm_up(legion_config, wait=wait)
        return (Campaign(legion_config),)
