"""LegionOutput: one of the job's outputs, by name.

Owns the node alone. It delivers to the current job and keeps nothing.
"""

from __future__ import annotations

from typing import Any

from legion_shm.errors import InvalidWorkflow
from legion_shm.job_context import current_job
from legion_shm.nodes.any_type import ANY
from legion_shm.nodes.exporter import single

__all__ = ["LegionOutput"]


class LegionOutput:
    """Delivers ``value`` as the job's output called ``name``; several items are delivered as a list."""

    RETURN_TYPES = ()
    FUNCTION = "write"
    WRITES_SHARED = False
    CATEGORY = "Legion/IO"
    DESCRIPTION = "Hands one value, by a name, back to whoever submitted the job."
    OUTPUT_NODE = True
    INPUT_IS_LIST = True
    KEEP_OUTPUTS = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"name": ("STRING", {"default": "output_1"}), "value": (ANY,)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: object) -> float:  # noqa: N802 - the protocol's name
        """NaN, which is never equal: a cached output would deliver nothing."""
        return float("nan")

    def write(self, name: list[str], value: list[object]) -> tuple[()]:
        if len(set(map(repr, name))) != 1:  # by repr: what is linked may have no hash
            raise InvalidWorkflow(
                f"LegionOutput takes one name, and was given {len(name)}: {', '.join(map(repr, name[:5]))}",
                input_name="name",
            )
        current_job().deliver_as_is(name[0], single(value))
        return ()
