"""The values of a node's widgets in ComfyUI's saved format, by name.

Owns the order in which the page lays out a node's widgets, which is all that tells what a saved value is for.
Facts of the page (from its source): a widget for each input of a plain type, in the order that the class
declares them; a second one after a seed, for what happens to it after each run; one for an upload after the
required ones; and a dynamic combo's inputs after it, by the option that is chosen.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from legion_shm.errors import InvalidWorkflow
from legion_shm.nodes.saved_json import as_dict, as_dicts, as_items

__all__ = ["choose_variants", "fits_type", "widget_values"]

DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
_WIDGET_TYPES = frozenset(
    {
        "INT",
        "FLOAT",
        "BOOLEAN",
        "STRING",
        "COMBO",
        "COLOR",
        "COLORS",
        "MARKDOWN",
        "TEXTAREA",
        "MULTISELECT",
        "TREESELECT",
        "SELECTBUTTON",
        DYNAMIC_COMBO,
    }
)
_CONTROLS = frozenset({"fixed", "increment", "increment-wrap", "decrement", "randomize"})
_SEEDS = frozenset({"seed", "noise_seed"})
_UPLOADS = ("image_upload", "animated_image_upload", "video_upload", "audio_upload", "image_folder")


@dataclass(frozen=True)
class _Widget:
    name: str
    type: str
    options: Mapping[str, Any]

    @property
    def controlled(self) -> bool:
        """Whether a widget follows that says what happens to this one's value after each run."""
        if "control_after_generate" in self.options:
            return bool(self.options["control_after_generate"])
        return self.type == "INT" and self.name in _SEEDS

    @property
    def default(self) -> object:
        if "default" in self.options:
            return self.options["default"]
        if self.type == DYNAMIC_COMBO:
            return next((option["key"] for option in self.options.get("options", ())), None)
        if self.type == "COMBO":
            return next(iter(self.options.get("options", ())), None)
        return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False, "STRING": ""}.get(self.type)


def widget_values(node: Mapping[str, Any], info: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The value of each widget of a saved node. ``info``: what its class declares, as in ``/object_info``.

    Raises InvalidWorkflow where the saved values cannot be told apart.
    """
    declared = as_dict(info.get("input"))
    linkable = _widget_names(node)
    named: object = node.get("widgets_values_named")
    saved: object = node.get("widgets_values")
    items = as_items(saved)
    if isinstance(named, Mapping):
        return _by_name(declared, cast("Mapping[str, Any]", named), linkable)
    if isinstance(saved, Mapping):
        return _by_name(declared, cast("Mapping[str, Any]", saved), linkable)
    if saved is None:
        return _by_position(declared, (), linkable)
    if not isinstance(saved, list):
        raise InvalidWorkflow(f"{where}: its widgets_values are neither a list nor an object")
    return _by_position(declared, items, linkable)


def _by_name(
    declared: Mapping[str, Any], values: Mapping[str, Any], linkable: frozenset[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def value_of(widget: _Widget) -> Any:
        found[widget.name] = values.get(widget.name, widget.default)
        return found[widget.name]

    for group in ("required", "optional"):
        _walk(_group(declared, group), linkable, value_of, "")
    return {name: value for name, value in found.items() if value is not None or name in values}


def _by_position(
    declared: Mapping[str, Any], values: Sequence[Any], linkable: frozenset[str]
) -> dict[str, Any]:
    reader = _Reader(values)
    _walk(_group(declared, "required"), linkable, reader.take, "")
    optional = _group(declared, "optional")
    uploads = sum(
        any(widget.options.get(flag) for flag in _UPLOADS)
        for widget in _plain_widgets(_group(declared, "required"), linkable)
    )
    if uploads:
        reader.skip_extra(len(list(_plain_widgets(optional, linkable))))
    _walk(optional, linkable, reader.take, "")
    return {name: value for name, value in reader.found.items() if value is not None}


class _Reader:
    """Takes saved values one by one, each for the widget that comes next."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._values = values
        self._next = 0
        self.found: dict[str, Any] = {}

    def take(self, widget: _Widget) -> Any:
        value = self._values[self._next] if self._next < len(self._values) else widget.default
        self._next += 1
        self.found[widget.name] = value
        if widget.controlled and self._peek() in _CONTROLS:
            self._next += 1
            if widget.type == "COMBO" and self._peek() == "":
                self._next += 1  # the filter of a controlled list
        return value

    def skip_extra(self, still_wanted: int) -> None:
        """Pass over values of widgets that the page adds and no class declares."""
        self._next += max(0, len(self._values) - self._next - still_wanted)

    def _peek(self) -> object:
        value = self._values[self._next] if self._next < len(self._values) else None
        return value if isinstance(value, str) else None


def _walk(inputs: Mapping[str, Any], linkable: frozenset[str], value_of: Any, prefix: str) -> None:
    for widget in _plain_widgets(inputs, linkable, prefix):
        value = value_of(widget)
        if widget.type == DYNAMIC_COMBO:
            for option in as_dicts(widget.options.get("options")):
                if option.get("key") == value:
                    chosen = as_dict(option.get("inputs"))
                    for group in ("required", "optional"):
                        _walk(_group(chosen, group), linkable, value_of, f"{widget.name}.")


def _plain_widgets(
    inputs: Mapping[str, Any], linkable: frozenset[str], prefix: str = ""
) -> Iterator[_Widget]:
    for plain_name, spec in inputs.items():
        name = prefix + plain_name
        kind: object
        kind, given, *_ = (*as_items(spec), None, None)
        options = dict(as_dict(given))
        if isinstance(kind, (list, tuple)):
            options.setdefault("options", as_items(cast("object", kind)))
            kind = "COMBO"
        kind = cast("object", options.get("widgetType", kind))
        if options.get("forceInput") or not isinstance(kind, str):
            continue
        if kind in _WIDGET_TYPES or name in linkable:
            yield _Widget(name, kind, options)


def _group(declared: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    return as_dict(declared.get(group))


def _widget_names(node: Mapping[str, Any]) -> frozenset[str]:
    """The inputs of a saved node that are widgets too."""
    return frozenset(str(slot.get("name")) for slot in as_dicts(node.get("inputs")) if slot.get("widget"))


def fits_type(value: object, kind: object) -> bool:
    """Whether a saved value can be one of a widget of this type."""
    if kind == "BOOLEAN":
        return isinstance(value, bool)
    if kind in ("INT", "FLOAT"):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "STRING":
        return isinstance(value, str)
    return value is not None


_COMMENT = re.compile(r"/\*[\s\S]*?\*/|//.*")
_ESCAPED = re.compile(r"\\([{}|])")


def choose_variants(text: str, pick: random.Random) -> str:
    """A text as the page sends it: without its comments, and with one variant of each ``{one|other}``.

    A backslash keeps a brace or a bar as it is. A brace without its partner reaches to the end of the text.
    """
    return _ESCAPED.sub(r"\1", _choose(text, pick))


def _choose(text: str, pick: random.Random) -> str:
    text = _COMMENT.sub("", text)
    parts: list[str] = []
    at = 0
    while at < len(text):
        if text[at] == "{":
            variants, at = _variants(text, at + 1)
            parts.append(_choose(pick.choice(variants), pick))
            continue
        step = 2 if text[at] == "\\" else 1
        parts.append(text[at : at + step])
        at += step
    return "".join(parts)


def _variants(text: str, at: int) -> tuple[list[str], int]:
    """What is between the bars up to the closing brace, and the position behind that."""
    variants, start, depth = list[str](), at, 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
        elif char == "{":
            depth += 1
        elif char == "}" and depth == 0:
            break
        elif char == "}":
            depth -= 1
        elif char == "|" and depth == 0:
            variants.append(text[start:at])
            start = at + 1
        at += 1
    return [*variants, text[start:at]], at + 1
