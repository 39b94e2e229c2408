"""Nodes that write into tensors they share with others: seeing it, and keeping them to themselves.

Owns the copies and the comparisons. The version counters are torch's, which every in-place operation of torch
moves; writes through numpy or raw memory do not. It changes no tensor.

Within one worker nodes hand each other the very same tensors. So that none sees what another writes into its
input, a class is on *trial* when it runs for the first time in a worker: it works on copies, which are
compared with the originals afterwards. Classes that leave their inputs alone get the originals from then on,
the others always copies. One that writes only later is found out by the version counters: kept outputs that
were written into are not used again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

__all__ = ["Trial", "Watch", "private_copy"]

_DEPTH = 8  # values of ComfyUI nest three or four deep: CONDITIONING is a list of pairs of tensor and dict


class Watch:
    """Remembers which state the tensors inside some values are in."""

    __slots__ = ("_seen",)

    def __init__(self, values: object) -> None:
        self._seen: list[tuple[Any, int]] = []
        for tensor in _tensors(values, _DEPTH):
            version = _version(tensor)
            if version is not None:
                self._seen.append((tensor, version))

    def changed(self) -> bool:
        """Whether any of them has been written into since."""
        return any(_version(tensor) != version for tensor, version in self._seen)


def _version(tensor: Any) -> int | None:
    try:
        return int(tensor._version)
    except RuntimeError:  # made in inference mode: it has no counter
        return None


def private_copy(values: object) -> Any:
    """The same values with a copy in place of each tensor; the same tensor twice is one copy."""
    copies: dict[int, Any] = {}

    def copy(tensor: Any) -> Any:
        return copies.setdefault(id(tensor), tensor.clone())

    return _map(values, copy, _DEPTH)


class Trial:
    """Copies for a node whose class is not known yet, and what they show afterwards."""

    def __init__(self, values: object) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        copies: dict[int, Any] = {}

        def copy(tensor: Any) -> Any:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.clone()
                self._pairs.append((tensor, copies[id(tensor)]))
            return copies[id(tensor)]

        self.values: Any = _map(values, copy, _DEPTH)

    def wrote(self) -> bool:
        """Whether any copy is not any more what it was copied from."""
        return any(_version(copy) or not _equal(original, copy) for original, copy in self._pairs)

    def give_back(self, values: Any) -> Any:
        """The values that the node gave, with the originals where it passed copies of them on."""
        originals = {id(copy): original for original, copy in self._pairs}
        return _map(values, lambda tensor: originals.get(id(tensor), tensor), _DEPTH)


def _equal(one: Any, other: Any) -> bool:
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    try:
        if one.is_floating_point() or one.is_complex():
            return bool(torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True))
        return bool(torch.equal(one, other))
    except (RuntimeError, NotImplementedError):  # a dtype or layout that torch can't compare
        return True


_NO_TENSORS = frozenset((type(None), bool, int, float, str, bytes))


def _is_tensor(value: object) -> bool:
    if type(value) in _NO_TENSORS:
        return False
    import torch

    return isinstance(value, torch.Tensor)


def _tensors(value: object, depth: int) -> Iterator[Any]:
    if type(value) in _NO_TENSORS:
        return
    if _is_tensor(value):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in cast("Mapping[object, object]", value).values():
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for item in cast("list[object]", value):
            yield from _tensors(item, depth - 1)


def _map(value: object, change: Callable[[Any], Any], depth: int) -> Any:
    if _is_tensor(value):
        return change(value)
    if depth and type(value) is dict:
        items = cast("dict[object, object]", value).items()
        return {key: _map(item, change, depth - 1) for key, item in items}
    if depth and type(value) in (list, tuple):
        mapped = [_map(item, change, depth - 1) for item in cast("list[object]", value)]
        return mapped if type(value) is list else tuple(mapped)
    return value
