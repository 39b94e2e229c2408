"""Values nested at random in lists, tuples and dicts, where one object may occur several times."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

__all__ = ["nested"]

_KEYS = ("samples", "", 0, -1, 2.5, True, None, ("a", 1), b"key")
_DEPTH = 4


def nested(source: random.Random, values: Sequence[Any], depth: int = _DEPTH) -> Any:
    """A container of some of ``values`` and of containers of them, the same for the same ``source``."""
    inner: list[Any] = []
    for _ in range(source.randint(1, 4)):
        deeper = depth > 1 and source.random() < 0.4
        inner.append(nested(source, values, depth - 1) if deeper else source.choice(values))
    inner += source.choices(inner, k=source.randint(0, 2))  # the same objects again
    kind = source.choice((list, tuple, dict, OrderedDict))
    if kind is list or kind is tuple:
        return kind(inner)
    keys: list[Any] = (
        source.sample(_KEYS, len(inner)) if len(inner) <= len(_KEYS) else list(range(len(inner)))
    )
    named = zip(keys, inner, strict=True)
    return OrderedDict(named) if kind is OrderedDict else dict(named)
