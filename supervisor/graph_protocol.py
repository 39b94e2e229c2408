"""What the graph engine reads from a ComfyUI node class, and what it accepts there.

Owns the reading of INPUT_TYPES, RETURN_TYPES, hidden inputs and link values, and the rule by which two
types fit. It never calls a node's function and keeps no state. The protocol is ComfyUI's for classes
with INPUT_TYPES (its "V1"); classes of `comfy_api` ("V3") need the real ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

__all__ = [
    "ANY_TYPE",
    "HIDDEN_VALUES",
    "InputSpec",
    "Link",
    "NodeClass",
    "PlannedNode",
    "class_problem",
    "find_input",
    "hidden_inputs",
    "input_types",
    "parse_link",
    "return_types",
    "types_fit",
]

NodeClass = type[Any]
"""A node class: whatever a module's NODE_CLASS_MAPPINGS holds."""

ANY_TYPE = "*"
_BUILTIN = "legion_shm.supervisor.graph_nodes."

HIDDEN_VALUES = frozenset(
    {
        "PROMPT",
        "UNIQUE_ID",
        "EXTRA_PNGINFO",
        "DYNPROMPT",
        "AUTH_TOKEN_COMFY_ORG",
        "API_KEY_COMFY_ORG",
        "COMFY_USAGE_SOURCE",
    }
)
"""The hidden input types that ComfyUI fills in itself."""


@dataclass(frozen=True)
class Link:
    """An input's source: output ``slot`` of node ``node_id``."""

    node_id: str
    slot: int


@dataclass(frozen=True)
class InputSpec:
    """One declared input. ``type`` is a type name, or a list of the values allowed."""

    type: object
    category: str
    options: Mapping[str, Any]

    @property
    def choices(self) -> list[Any] | None:
        """The values allowed, where the type is such a list or COMBO."""
        kind = self.type
        if isinstance(kind, list):
            return [*cast("Sequence[Any]", kind)]
        return [*self.options.get("options", ())] if kind == "COMBO" else None


@dataclass(frozen=True)
class PlannedNode:
    """One node of a validated prompt: its constants converted, its links parsed."""

    node_id: str
    class_type: str
    node_class: NodeClass
    constants: Mapping[str, object]
    links: Mapping[str, Link]
    hidden: Mapping[str, str] = field(default_factory=dict[str, str])

    @cached_property
    def is_output(self) -> bool:
        return getattr(self.node_class, "OUTPUT_NODE", False) is True

    @cached_property
    def writes_shared(self) -> bool:
        """Whether its class may write into what others see. The promise is its own, not a base class's."""
        return vars(self.node_class).get("WRITES_SHARED", True) is not False

    @cached_property
    def input_is_list(self) -> bool:
        return bool(getattr(self.node_class, "INPUT_IS_LIST", False))

    @cached_property
    def kept(self) -> bool:
        """Whether its outputs may be kept for later jobs, as far as its class goes."""
        return bool(getattr(self.node_class, "KEEP_OUTPUTS", True))

    @cached_property
    def is_builtin(self) -> bool:
        return self.node_class.__module__.startswith(_BUILTIN)


def class_problem(node_class: object) -> str:
    """Why this cannot be a node class, or an empty string."""
    if not isinstance(node_class, type):
        return f"it is {type(node_class).__name__}, not a class"
    if hasattr(node_class, "GET_SCHEMA") or hasattr(node_class, "define_schema"):
        return "it is a comfy_api (V3) node, which only the comfy engine runs"
    missing = [name for name in ("INPUT_TYPES", "RETURN_TYPES", "FUNCTION") if not hasattr(node_class, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    function = cast(object, getattr(node_class, "FUNCTION"))  # noqa: B009
    if not isinstance(function, str) or not callable(getattr(node_class, function, None)):
        return f"its FUNCTION names {function!r}, which it does not have"
    promise = cast("object", vars(node_class).get("WRITES_SHARED", True))
    if not isinstance(promise, bool):
        return f"its WRITES_SHARED is {promise!r:.40}, neither True nor False"
    return ""


def input_types(node_class: NodeClass) -> Mapping[str, Any]:
    """INPUT_TYPES() of a class, checked to be a mapping of mappings; TypeError when it is not."""
    declared = cast(object, node_class.INPUT_TYPES())
    if not isinstance(declared, Mapping):
        raise TypeError(f"INPUT_TYPES() gave {type(declared).__name__}, not a dict")
    groups = cast("Mapping[str, Any]", declared)
    for group in ("required", "optional", "hidden"):
        if group in groups and not isinstance(groups[group], Mapping):
            raise TypeError(f"INPUT_TYPES()[{group!r}] is {type(groups[group]).__name__}, not a dict")
    return groups


def find_input(declared: Mapping[str, Any], name: str) -> InputSpec | None:
    """The declaration of input ``name``, or None.

    Asks the group itself whether it contains the name: some node packs declare any number of inputs by a
    dict whose ``in`` says yes to every name.
    """
    for category in ("required", "optional", "hidden"):
        group = declared.get(category)
        if group is None or name not in group:
            continue
        entry = group[name]
        if isinstance(entry, str):
            return InputSpec(entry, category, {})
        options = cast("object", entry[1]) if len(entry) > 1 else None
        if not isinstance(options, Mapping):
            return InputSpec(entry[0], category, {})
        return InputSpec(entry[0], category, cast("Mapping[str, Any]", options))
    return None


def hidden_inputs(declared: Mapping[str, Any]) -> dict[str, str]:
    """Hidden inputs that the engine fills in: name to one of HIDDEN_VALUES."""
    group = cast("Mapping[str, object]", declared.get("hidden") or {})
    return {name: kind for name, kind in group.items() if isinstance(kind, str) and kind in HIDDEN_VALUES}


def return_types(node_class: NodeClass) -> tuple[object, ...]:
    types: tuple[object, ...] = tuple(node_class.RETURN_TYPES)
    return types


def parse_link(value: object) -> Link | None:
    """The link that an API-format input value is, or None when it is a constant."""
    if not isinstance(value, (list, tuple)):
        return None
    pair = cast("list[object] | tuple[object, ...]", value)
    if len(pair) != 2:
        return None
    node_id, slot = pair
    if not isinstance(node_id, str) or isinstance(slot, bool) or not isinstance(slot, (int, float)):
        return None
    if slot != slot or slot in (float("inf"), float("-inf")) or int(slot) != slot:
        return None
    return Link(node_id, int(slot))


def types_fit(given: object, wanted: object) -> bool:
    """Whether an output of type ``given`` may be linked to an input of type ``wanted``.

    Types are names, comma-separated unions of names that fit when they share one, ``*`` that fits all, or
    lists of allowed values. ``!=`` is asked first: the wildcard classes of node packs override it.
    """
    if not (given != wanted):  # noqa: SIM202 - the question is which operator
        return True
    if ANY_TYPE in (given, wanted) or (isinstance(given, list) and wanted == "COMBO"):
        return True
    if not isinstance(given, str) or not isinstance(wanted, str):
        return False
    names_given = {name.strip() for name in given.split(",")}
    names_wanted = {name.strip() for name in wanted.split(",")}
    return ANY_TYPE in names_given | names_wanted or bool(names_given & names_wanted)
