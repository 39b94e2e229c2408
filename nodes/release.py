"""LegionRelease: ends a worker, or empties it, and says how much memory came back.

Owns the node's shape and its words; released_memory.py does it.
"""

from __future__ import annotations

from typing import Any

from legion_shm.nodes.any_type import ANY
from legion_shm.nodes.link_types import LEGION_CAMPAIGN, LEGION_CONFIG

__all__ = ["LegionRelease"]

_STOP = "stop the worker"
_FREE = "free its models and caches"


class LegionRelease:
    """Releases the workers of a configuration or campaign; all, where none is connected.

    A worker that runs a job is released after it. ``after`` is passed through, to say when it happens.
    """

    RETURN_TYPES = (ANY, "STRING", "FLOAT")
    RETURN_NAMES = ("after", "report", "released_mib")
    FUNCTION = "release"
    WRITES_SHARED = False
    CATEGORY = "Legion"
    DESCRIPTION = "Ends workers, or has them drop models and caches, and says how much memory came back."
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {
            "optional": {
                "legion_config": (LEGION_CONFIG,),
                "legion_campaign": (LEGION_CAMPAIGN,),
                "after": (ANY, {"tooltip": "Passed through: the release happens once this is there."}),
                "what": ([_STOP, _FREE], {"default": _STOP}),
                "timeout": (
                    "INT",
                    {"default": 600, "min": 1, "max": 86_400, "tooltip": "Seconds to wait for running jobs."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_inputs: object) -> float:  # noqa: N802 - the protocol's name
        """NaN, which is never equal: what was released may live again."""
        return float("nan")

    def release(
        self,
        legion_config: Any = None,
        legion_campaign: Any = None,
        after: object = None,
        what: str = _STOP,
        timeout: int = 600,
    ) -> dict[str, Any]:
        from legion_shm.nodes.master_node import chosen_configuration
        from legion_shm.nodes.released_memory import release_workers

        configuration = None
        if legion_config is not None or legion_campaign is not None:
            configuration = chosen_configuration(legion_config, legion_campaign)
        released = release_workers(configuration, stop=what == _STOP, timeout_s=timeout)
        return {"ui": {"text": [released.text]}, "result": (after, released.text, released.mib)}
