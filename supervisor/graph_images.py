"""The check that what reaches an IMAGE input of a built-in node is an IMAGE.

Owns that check and its words. Nodes of others look at their inputs themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from legion_shm.supervisor.graph_protocol import NodeClass
from legion_shm.supervisor.graph_report import describe_value

__all__ = ["check_images"]


def check_images(node_class: NodeClass, inputs: Mapping[str, Sequence[object]]) -> None:
    """Raise ValueError that names the input whose value is no float tensor ``[B,H,W,C]``."""
    for name, optional in _image_inputs(cast("Hashable", node_class)):
        for value in inputs.get(name, ()):
            if (value is None and optional) or _is_image(value):
                continue
            given = "nothing" if value is None else describe_value(value)
            raise ValueError(
                f"input {name}: expected an IMAGE, a float tensor [batch, height, width, channels] "
                f"with values from 0 to 1; got {given}"
            )


@lru_cache(maxsize=256)
def _image_inputs(node_class: Any) -> tuple[tuple[str, bool], ...]:
    """Names of the inputs of type IMAGE, and whether each is optional."""
    declared = cast("Mapping[str, Mapping[str, Any]]", node_class.INPUT_TYPES())
    return tuple(
        (name, kind == "optional")
        for kind in ("required", "optional")
        for name, spec in declared.get(kind, {}).items()
        if spec[0] == "IMAGE"
    )


def _is_image(value: Any) -> bool:
    return getattr(value, "ndim", None) == 4 and bool(getattr(value.dtype, "is_floating_point", False))
