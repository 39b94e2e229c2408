"""Nodes that write into tensors they share with others: seeing it, and keeping them to themselves.

Owns the look at torch's version counters, which every in-place operation of torch moves; writes through numpy
or raw memory do not, and stay unseen. It changes no tensor.

Within one worker nodes hand each other the very same tensors, as in ComfyUI. A node that wrote into its
input is found out by these counters: kept outputs that were written into are not used again, and its class
is given copies of its own from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

__all__ = ["Watch", "private_copy"]

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


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _tensors(value: object, depth: int) -> Iterator[Any]:
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
