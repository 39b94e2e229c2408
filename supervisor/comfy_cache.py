"""What ComfyUI's caches may keep once a job is over.

Owns the removal of entries that no later prompt can find, and of those that keep a job's inputs in shared
memory. Everything else stays under the cache policy that the user chose for ComfyUI.

An entry is found again only by an equal key. One made with a NaN (IS_CHANGED's way to say "always") equals
no other, yet ComfyUI's default cache keeps it until memory runs short. And an importer's outputs are views
of blocks that are leased from another process: kept, they would fill that process's arena.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from legion_shm.workflow import is_link

__all__ = ["forget_spent_entries"]

_PER_KEY = ("cache", "used_generation", "timestamps", "children")
"""The tables by cache key that one or another of ComfyUI's caches has."""

_DEPTH_SEARCHED = 8


def forget_spent_entries(
    caches: Any, prompt: Any, classes: Mapping[str, Any], inputs: Mapping[str, object]
) -> int:
    """Remove them after a job; returns how many nodes were forgotten.

    ``caches`` is the executor's cache set, ``prompt`` the job's DynamicPrompt, ``classes`` ComfyUI's node
    classes, ``inputs`` what the job was given. A node is forgotten when its key holds a NaN, when its class
    says KEEP_OUTPUTS = False, or when an output shares memory with a tensor among ``inputs``.
    """
    node_ids = list(prompt.all_node_ids())
    spent = _never_again(prompt, node_ids)
    outputs = getattr(caches, "outputs", None)
    tables = [cache for cache in (outputs, getattr(caches, "ui", None)) if cache is not None]
    storages = _storages(inputs, 0)
    for node_id in node_ids:
        if node_id not in spent and (
            not getattr(classes.get(prompt.get_node(node_id).get("class_type")), "KEEP_OUTPUTS", True)
            or (storages and not storages.isdisjoint(_storages(_kept(outputs, node_id), 0)))
        ):
            spent.add(node_id)
    for cache in tables:
        for node_id in spent:
            _forget(cache, node_id)
    return len(spent)


def _never_again(prompt: Any, node_ids: list[str]) -> set[str]:
    """Nodes whose key holds a NaN: their own IS_CHANGED said so, or that of a node they are made from."""
    readers: dict[str, list[str]] = {}
    stack: list[str] = []
    for node_id in node_ids:
        node = prompt.get_node(node_id)
        if _holds_nan(node.get("is_changed")):
            stack.append(node_id)
        for value in node.get("inputs", {}).values():
            if is_link(value):
                readers.setdefault(value[0], []).append(node_id)
    found: set[str] = set()
    while stack:
        node_id = stack.pop()
        if node_id not in found:
            found.add(node_id)
            stack.extend(readers.get(node_id, ()))
    return found


def _holds_nan(value: object, depth: int = 0) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, (list, tuple)) and depth < _DEPTH_SEARCHED:
        return any(_holds_nan(item, depth + 1) for item in cast("list[object]", value))
    return False


def _cache_of(cache: Any, node_id: str) -> Any:
    """The part of a cache that holds the node: expanded nodes have their own in some of them."""
    find = getattr(cache, "_get_cache_for", None)
    return cache if find is None else find(node_id)


def _key(cache: Any, node_id: str) -> Any:
    keys = getattr(cache, "cache_key_set", None)
    return None if keys is None else keys.get_data_key(node_id)


def _kept(cache: Any, node_id: str) -> object:
    part = None if cache is None else _cache_of(cache, node_id)
    entry = getattr(part, "cache", {}).get(_key(part, node_id))
    return getattr(entry, "outputs", entry)


def _forget(cache: Any, node_id: str) -> None:
    part = _cache_of(cache, node_id)
    key = _key(part, node_id)
    if key is None:
        return
    for name in _PER_KEY:
        cast("dict[Any, Any]", getattr(part, name, {})).pop(key, None)
    subcaches = cast("dict[Any, Any]", getattr(part, "subcaches", {}))
    if subcaches:
        subcaches.pop(part.cache_key_set.get_subcache_key(node_id), None)


def _storages(value: object, depth: int) -> set[int]:
    """The addresses of the memory behind the tensors in a value."""
    storage = getattr(value, "untyped_storage", None)
    if storage is not None:
        try:
            address = int(storage().data_ptr())
        except Exception:  # sparse tensors and the like have no storage to ask
            return set()
        return {address} if address else set()
    if depth >= _DEPTH_SEARCHED:
        return set()
    array: Any = value
    while hasattr(array, "__array_interface__"):
        if not hasattr(array.base, "__array_interface__"):
            return {int(array.__array_interface__["data"][0])}
        array = array.base
    if isinstance(value, Mapping):
        items: list[object] = list(cast("Mapping[object, object]", value).values())
    elif isinstance(value, (list, tuple)):
        items = list(cast("list[object]", value))
    else:
        return set()
    return {address for item in items for address in _storages(item, depth + 1)}
