"""Looking into JSON of uncertain shape: what is not as expected counts as empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

__all__ = ["as_dict", "as_dicts", "as_items"]


def as_dict(value: object) -> Mapping[str, Any]:
    """The value if it is an object, else an empty one."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def as_items(value: object) -> Sequence[Any]:
    """The value if it is a list, else an empty one."""
    return cast("Sequence[Any]", value) if isinstance(value, (list, tuple)) else ()


def as_dicts(value: object) -> list[Mapping[str, Any]]:
    """The objects in the value, if it is a list."""
    return [cast("Mapping[str, Any]", item) for item in as_items(value) if isinstance(item, Mapping)]
