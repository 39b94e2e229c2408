"""Whether somebody else holds a tensor: a node's attribute, a view, an array, a storage, C++.

Owns the count of references, as Python and torch keep it: of the tensor, of the one that it is a view of, of
their storage. What numbers to expect depends on both versions and is not written down: they are counted on
tensors that certainly nobody else holds. Where counting proves nothing, the answer is that somebody may.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from legion_shm.supervisor.graph_slots import Slot

__all__ = ["alone", "array_alone", "storage_key"]


def storage_key(tensor: Any) -> int:
    """Equal for tensors of one storage, while it lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


def alone(slots: Sequence[Slot], known: Collection[int] = ()) -> set[Slot]:
    """The slots whose tensors nobody holds but these slots, all of those that share their storage.

    A storage over memory of somebody else's (`torch.from_numpy`, `torch.frombuffer`) tells nothing of who
    holds that, unless it is ``known``, by `storage_key`, to be nobody. Tensors are plain ones (`is_plain`).
    """
    if not _countable():
        return set()
    groups: dict[int, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(storage_key(slot.value), []).append(slot)
    free: set[Slot] = set()
    for key, group in groups.items():
        if _memory_is_torchs(group[0].value) if key not in known else True:
            counts = [_count(slot) for slot in group]
            views = counts[0][-1] is not None
            if all(count == _expected(len(group), views) for count in counts):
                free.update(group)
    return free


def array_alone(slot: Slot) -> bool:
    """Whether this is a numpy array with memory of its own that nobody holds but its slot."""
    array = slot.value
    numpy = sys.modules.get("numpy")
    if numpy is None or type(array) is not numpy.ndarray or array.base is not None or not _countable():
        return False
    return (
        not array.dtype.hasobject
        and bool(array.flags.owndata)
        and sys.getrefcount(array) == _expected_of_array()
    )


@lru_cache(maxsize=1)
def _expected_of_array() -> int:
    import numpy as np

    slot = Slot(np.empty(1))
    array = slot.value
    return sys.getrefcount(array)


def _memory_is_torchs(tensor: Any) -> bool:
    storage = tensor.untyped_storage()
    return storage.resizable() and not (tensor.device.type == "cpu" and storage.is_shared())


def _count(slot: Slot) -> tuple[Any, ...]:
    tensor = slot.value
    storage = tensor.untyped_storage()
    base = tensor._base
    return (
        sys.getrefcount(tensor),
        tensor._use_count(),
        sys.getrefcount(storage),
        _storage_use_count(storage._cdata),
        None if base is None else (sys.getrefcount(base), base._use_count()),
    )


@lru_cache(maxsize=64)
def _expected(members: int, views: bool) -> tuple[Any, ...]:
    """What `_count` gives for each of so many tensors of one storage, which nobody else holds."""
    import torch

    with torch.no_grad():
        base: Any = torch.empty(members, device="cpu")  # whatever a node has made the default
        empty: Any = torch.empty
        if views:
            slots = [Slot(base[n : n + 1]) for n in range(members)]
        else:
            slots = [
                Slot(empty(0, device="cpu").set_(base.untyped_storage(), n, (1,), (1,)))
                for n in range(members)
            ]
        del base
    counts = [_count(slot) for slot in slots]
    return counts[-1] if all(count == counts[0] for count in counts) else ()


def _storage_use_count(pointer: int) -> int:
    import torch

    internals: Any = vars(torch)["_C"]
    count: int = internals._storage_Use_Count(pointer)
    return count


@lru_cache(maxsize=1)
def _countable() -> bool:
    """Whether this Python and this torch count references, and show it."""
    import torch

    locked = getattr(sys, "_is_gil_enabled", lambda: True)()
    return bool(
        locked
        and hasattr(vars(torch)["_C"], "_storage_Use_Count")
        and hasattr(torch.Tensor, "_use_count")
        and hasattr(torch.UntypedStorage, "resizable")
    )
