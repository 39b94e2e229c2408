"""The widgets that a subgraph shows on its node in ComfyUI's saved format, and the values they have there.

Owns telling which value of an instance belongs to which input of the subgraph. Older pages keep the value in
the inner node alone, newer ones on each instance: where an instance's values can't be told for sure, the
inner node's counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from legion_shm.nodes.saved_json import as_dict, as_dicts, as_items
from legion_shm.nodes.saved_widgets import fits_type

__all__ = ["promoted_values"]

_CONTROLS = frozenset({"fixed", "increment", "increment-wrap", "decrement", "randomize"})
_MAX_DEPTH = 50


def promoted_values(
    instance: Mapping[str, Any],
    definition: Mapping[str, Any],
    definitions: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The values of an instance's own widgets, by the name of the subgraph's input."""
    promoted = [
        entry for entry in as_dicts(definition.get("inputs")) if _is_widget(entry, definition, definitions, 0)
    ]
    values = as_dict(instance.get("widgets_values_named"))
    if values:
        names = [str(entry.get("name")) for entry in promoted]
        return {name: values[name] for name in names if values.get(name) is not None}
    items = [*as_items(instance.get("widgets_values"))]
    if not items:
        return {}
    if len(items) > len(promoted):
        items = list(_without_controls(items, promoted))
    if len(items) != len(promoted):
        return {}
    if not all(
        value is None or fits_type(value, entry.get("type"))
        for entry, value in zip(promoted, items, strict=True)
    ):
        return {}
    return {
        str(entry.get("name")): value
        for entry, value in zip(promoted, items, strict=True)
        if value is not None
    }


def _without_controls(items: list[Any], promoted: list[Mapping[str, Any]]) -> Iterator[Any]:
    """Some pages saved, after a seed's value, what happens to it after each run."""
    at = 0
    for entry in promoted:
        if at >= len(items):
            return
        yield items[at]
        at += 1
        if entry.get("type") == "INT" and at < len(items) and items[at] in _CONTROLS:
            at += 1
    yield from items[at:]


def _is_widget(
    entry: Mapping[str, Any],
    definition: Mapping[str, Any],
    definitions: Mapping[str, Mapping[str, Any]],
    depth: int,
) -> bool:
    """Whether what is linked to a subgraph's input inside of it is a widget."""
    wanted = {str(number) for number in as_items(entry.get("linkIds"))}
    for node in as_dicts(definition.get("nodes")):
        for slot in as_dicts(node.get("inputs")):
            if slot.get("link") is None or str(slot["link"]) not in wanted:
                continue
            if slot.get("widget"):
                return True
            inner = definitions.get(str(node.get("type")))
            if inner is not None and depth < _MAX_DEPTH:
                return any(
                    _is_widget(deeper, inner, definitions, depth + 1)
                    for deeper in as_dicts(inner.get("inputs"))
                    if deeper.get("name") == slot.get("name")
                )
    return False
