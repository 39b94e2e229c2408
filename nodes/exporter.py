"""LegionExporter: where a worker's workflow hands over the job's numbered outputs.

Owns the node alone. It delivers to the current job and keeps nothing.
"""

from __future__ import annotations

from typing import Any

from legion_shm.job_context import current_job
from legion_shm.nodes.any_type import ANY
from legion_shm.nodes.importer import CHANNELS

__all__ = ["LegionExporter", "single"]

_NAMES = tuple((f"input_{n}", f"output_{n}") for n in range(1, CHANNELS + 1))


class LegionExporter:
    """Delivers what is linked to ``input_N`` as the job's ``output_N``; what is not linked is not delivered.

    An input that is a list of several items (from a node with OUTPUT_IS_LIST) is delivered as a list.
    ``data_exchange_root`` is ignored; it is there so that workflows wired for LegionPower load.
    """

    RETURN_TYPES = ()
    FUNCTION = "export_data"
    WRITES_SHARED = False
    CATEGORY = "Legion/IO"
    DESCRIPTION = "Hands what is linked to its inputs 1 to 12 back to whoever submitted the job."
    OUTPUT_NODE = True
    INPUT_IS_LIST = True
    KEEP_OUTPUTS = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        inputs = {f"input_{n}": (ANY,) for n in range(1, CHANNELS + 1)}
        return {"required": {}, "optional": {"data_exchange_root": (ANY, {"forceInput": True}), **inputs}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: object) -> float:  # noqa: N802 - the protocol's name
        """NaN, which is never equal: a cached exporter would deliver nothing."""
        return float("nan")

    def export_data(self, data_exchange_root: object = None, **inputs: list[object]) -> tuple[()]:
        job = current_job()
        for given, delivered in _NAMES:
            if given in inputs:
                job.deliver_as_is(delivered, single(inputs[given]))
        return ()


def single(items: list[object]) -> object:
    """The value that a list input stands for: its one item, or a list of several (or no) items."""
    return items[0] if len(items) == 1 else list(items)
