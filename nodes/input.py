"""LegionInput: one of the job's inputs, by name.

Owns the node alone. It reads the current job and changes nothing in it.
"""

from __future__ import annotations

from typing import Any, cast

from legion_shm.errors import InvalidWorkflow, LegionError
from legion_shm.job_context import current_job
from legion_shm.nodes.any_type import ANY

__all__ = ["LegionInput"]

_NOTHING = object()


class LegionInput:
    """Gives the input of the job that is called ``name``; without one, ``default`` if that is given."""

    RETURN_TYPES = (ANY,)
    RETURN_NAMES = ("value",)
    FUNCTION = "read"
    WRITES_SHARED = False
    CATEGORY = "Legion/IO"
    DESCRIPTION = "Gives one value that the job was submitted with, by its name."
    KEEP_OUTPUTS = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {
            "required": {"name": ("STRING", {"default": "input_1"})},
            "optional": {"default": (ANY, {"forceInput": True})},
        }

    @classmethod
    def IS_CHANGED(cls, name: str | None, default: object = None) -> str | float:  # noqa: N802
        """The input's identity; NaN, which is never equal, where there is none or the name is linked."""
        try:
            job = current_job()
        except LegionError:
            return float("nan")
        if name is None:
            return float("nan")
        if name not in job.originals:
            return "absent"
        identity = job.identities.get(name)
        return float("nan") if identity is None else f"given:{identity.hex()}"

    def read(self, name: str, default: object = _NOTHING) -> tuple[object]:
        job = current_job()
        if not isinstance(cast("object", name), str) or not name:
            raise InvalidWorkflow(
                f"an input's name is non-empty text, and what is linked to it gave {name!r:.60}",
                input_name="name",
            )
        if name in job.originals:
            return (job.originals[name],)
        if default is not _NOTHING:
            return (default,)
        given = ", ".join(sorted(job.originals)) or "none"
        raise InvalidWorkflow(
            f"the workflow reads an input named {name!r}, which job {job.job_id} was not given and which has "
            f"no default (given: {given})",
            input_name=name,
        )
