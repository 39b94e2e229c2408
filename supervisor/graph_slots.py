"""Values between nodes taken apart: their containers made anew, and what in them can be written into.

Owns the walk over lists, tuples, dicts, sets and deques, of these types or derived ones. It copies nothing
else: numbers, text and objects of other classes stay what they are.
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from legion_shm.supervisor.graph_arrays import is_array

__all__ = ["Slot", "Slots", "is_plain"]

_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes))
_CONTAINERS: Any = (list, dict, tuple, set, frozenset, deque)
_ITEMS: Any = (list, dict, deque)
_DICT: Any = dict
_SET: Any = set


class Slot:
    """Stands for what can be written into, wherever that occurs in a value: one slot for one object."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Slots:
    """``tensors``: the plain ones, on any device. ``others``: what else can be written into."""

    def __init__(self) -> None:
        import torch

        self._tensor: Any = torch.Tensor
        self.tensors: list[Slot] = []
        self.others: list[Slot] = []

    def taken(self, value: Any) -> Any:
        """The value with new containers, and a slot in place of whatever can be written into."""
        return _rebuild(value, self._slot_of, {})

    def filled(self, value: Any) -> Any:
        """What `taken` gave, with what the slots hold now."""
        if not self.tensors and not self.others:
            return value
        return _rebuild(value, _content, {})

    def _slot_of(self, value: Any) -> Any:
        if isinstance(value, self._tensor):
            slot = Slot(value)
            (self.tensors if is_plain(value) else self.others).append(slot)
            return slot
        return self._other(value)

    def _other(self, value: Any) -> Any:
        if not (type(value) is bytearray or is_array(value) or _is_picture(value)):
            return value
        slot = Slot(value)
        self.others.append(slot)
        return slot


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is its memory, its shape and its strides, and no more than that."""
    import torch

    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
        and not tensor.is_meta
        and not vars(tensor)
    )


def _is_picture(value: object) -> bool:
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def _content(value: Any) -> Any:
    return value.value if type(value) is Slot else value


def _rebuild(value: Any, leaf: Callable[[Any], Any], made: dict[int, Any]) -> Any:
    """``made``: by the identity of what it was made from, so that what was one object is one again."""
    kind = cast("Any", type(value))
    if kind in _PLAIN:
        return value
    if kind is list or kind is dict or isinstance(value, _CONTAINERS):
        if id(value) in made:
            return made[id(value)]
        return _container(value, kind, leaf, made)
    if id(value) not in made:
        made[id(value)] = leaf(value)
    return made[id(value)]


def _container(value: Any, kind: Any, leaf: Callable[[Any], Any], made: dict[int, Any]) -> Any:
    if kind is dict:
        pairs: dict[object, object] = {}
        made[id(value)] = pairs
        for key, item in cast("dict[object, object]", value).items():
            pairs[key] = _rebuild(item, leaf, made)
        return pairs
    if kind is list:
        items: list[object] = []
        made[id(value)] = items
        items.extend(_rebuild(item, leaf, made) for item in cast("list[object]", value))
        return items
    if isinstance(value, _ITEMS):
        new: Any = copy.copy(value)
        made[id(value)] = new
        for key in list(new) if isinstance(new, _DICT) else range(len(new)):
            new[key] = _rebuild(new[key], leaf, made)
        return new
    parts = [_rebuild(item, leaf, made) for item in cast("tuple[object, ...]", value)]
    result = _immutable(value, kind, parts)
    made[id(value)] = result
    return result


def _immutable(value: Any, kind: Any, parts: list[Any]) -> Any:
    if kind in (tuple, set, frozenset):
        return cast("Any", kind)(parts)
    if isinstance(value, _SET):
        fresh: Any = copy.copy(value)
        fresh.clear()
        fresh.update(parts)
        return fresh
    if all(new is old for new, old in zip(parts, value, strict=True)):
        return value
    return kind._make(parts) if hasattr(kind, "_make") else kind(parts)
