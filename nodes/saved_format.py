"""ComfyUI's saved workflow format turned into the API format, without a browser.

Owns what the page does when it exports: links followed through reroutes, primitives, bypassed nodes and
subgraphs, muted nodes left out with the links from them. The values of widgets are saved_widgets.py's. It
changes nothing of what it is given, and knows node classes only through a function that it is given.

    saved nodes and links ──▶ _Graph, one for the workflow and one per subgraph instance
                                 each node's inputs ──▶ _Source: a node's output, or a value
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from legion_shm.errors import InvalidWorkflow
from legion_shm.nodes.saved_json import as_dict, as_dicts, as_items
from legion_shm.nodes.saved_subgraphs import promoted_values
from legion_shm.nodes.saved_widgets import choose_variants, widget_values

__all__ = ["convert_saved_workflow", "is_saved_format"]

_MUTED, _BYPASSED = 2, 4
_NOTES = frozenset({"Note", "MarkdownNote"})
_PRIMITIVE, _REROUTE = "PrimitiveNode", "Reroute"
_VIRTUAL = _NOTES | {_PRIMITIVE, _REROUTE}
_INPUT_NODE, _OUTPUT_NODE = "-10", "-20"
"""The ids that stand for a subgraph's own inputs and outputs in its links."""
_MAX_DEPTH = 50
_MAX_NODES = 100_000

Node = Mapping[str, Any]
Lookup = Callable[[str], Mapping[str, Any] | None]


def is_saved_format(document: Mapping[str, Any]) -> bool:
    """Whether this is a saved workflow, with its layout, rather than one in the API format."""
    return isinstance(document.get("nodes"), list) and ("links" in document or "version" in document)


def convert_saved_workflow(
    saved: Mapping[str, Any], node_class: Lookup, *, pick: random.Random | None = None
) -> dict[str, dict[str, Any]]:
    """The API format of a saved workflow.

    ``node_class`` gives what a class declares, as ComfyUI's ``/object_info`` words it (``{"input":
    {"required": {...}, "optional": {...}}}``), or None. ``pick`` chooses among ``{one|other}`` in prompts.
    Raises InvalidWorkflow naming the node for a class that is not known, and for a file that is broken.
    """
    definitions: dict[str, Mapping[str, Any]] = {}
    for definition in as_dicts(as_dict(saved.get("definitions")).get("subgraphs")):
        definitions[str(definition.get("id"))] = definition
    root = _Graph(saved, definitions, path=(), outer=None, instance=None)
    prompt: dict[str, dict[str, Any]] = {}
    pick = pick or random.Random()
    for graph, node in root.all_nodes():
        if len(prompt) >= _MAX_NODES:
            raise InvalidWorkflow(f"it has more than {_MAX_NODES} nodes with those of its subgraphs")
        prompt[graph.full_id(node)] = _converted(graph, node, node_class, pick)
    for node in prompt.values():
        inputs = node["inputs"]
        for name in [name for name, value in inputs.items() if _dangles(value, prompt)]:
            del inputs[name]
    if not prompt:
        raise InvalidWorkflow("it has no nodes that run")
    return prompt


def _converted(graph: _Graph, node: Node, node_class: Lookup, pick: random.Random) -> dict[str, Any]:
    kind, where = str(node.get("type")), graph.where(node)
    info = node_class(kind)
    if info is None:
        raise InvalidWorkflow(f"{where}: {_unknown(kind)}", node_id=graph.full_id(node))
    inputs: dict[str, Any] = {}
    for name, value in widget_values(node, info, where).items():
        inputs[name] = _constant(_processed(value, name, info, pick))
    for slot in as_dicts(node.get("inputs")):
        source = graph.source(slot, str(slot.get("type", "*")), _Trail())
        if isinstance(source, _Value):
            inputs[str(slot.get("name"))] = _constant(source.value)
        elif source is not None:
            inputs[str(slot.get("name"))] = [source.node_id, source.slot]
    title = node.get("title") or as_dict(node.get("properties")).get("Node name for S&R") or kind
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": str(title)}}


def _unknown(kind: str) -> str:
    if kind in ("GetNode", "SetNode"):
        return (
            f"{kind} is resolved by the page alone; replace it by links, or export the workflow in the API "
            "format (menu Workflow, Export (API))"
        )
    if kind.startswith("workflow") and kind[8:9] in (">", "/"):
        return "group nodes are not converted; turn it into a subgraph, or export in the API format"
    return (
        f"there is no node class {kind!r} here, so its widgets cannot be told; install its custom nodes, or "
        "export the workflow in the API format (menu Workflow, Export (API)) where it is installed"
    )


def _processed(value: Any, name: str, info: Mapping[str, Any], pick: random.Random) -> Any:
    if not isinstance(value, str):
        return value
    for group in ("required", "optional"):
        spec: object = as_dict(as_dict(info.get("input")).get(group)).get(name)
        options = as_items(spec)[1:2]
        if options and as_dict(options[0]).get("dynamicPrompts"):
            return choose_variants(value, pick)
    return value


def _constant(value: object) -> object:
    """A list as a constant has to be wrapped, for two items would be taken for a link."""
    items = as_items(value)
    return {"__value__": [*items]} if isinstance(value, (list, tuple)) else value


def _dangles(value: object, prompt: Mapping[str, Any]) -> bool:
    return any(source not in prompt for source in as_items(value)[:1])


@dataclass(frozen=True)
class _Output:
    node_id: str
    slot: int


@dataclass(frozen=True)
class _Value:
    value: Any


_Source = _Output | _Value | None


class _Trail:
    """The steps of following one link, against links that lead in a circle."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str, int]] = set()

    def step(self, graph: _Graph, node: Node, slot: int, direction: str) -> None:
        key = (f"{direction}{graph.full_id(node)}", direction, slot)
        if key in self._seen:
            raise InvalidWorkflow(
                f"{graph.where(node)}: its links lead in a circle", node_id=graph.full_id(node)
            )
        self._seen.add(key)


class _Graph:
    """The nodes and links of the workflow, or of one instance of a subgraph."""

    def __init__(
        self,
        saved: Mapping[str, Any],
        definitions: Mapping[str, Mapping[str, Any]],
        *,
        path: tuple[str, ...],
        outer: _Graph | None,
        instance: Node | None,
    ) -> None:
        if len(path) > _MAX_DEPTH:
            raise InvalidWorkflow(f"subgraphs are nested more than {_MAX_DEPTH} deep, or contain themselves")
        self._saved, self._definitions = saved, definitions
        self._path, self._outer, self._instance = path, outer, instance
        self._nodes = {str(node.get("id")): node for node in as_dicts(saved.get("nodes"))}
        self._links = dict(_links(saved.get("links")))
        self._inner: dict[str, _Graph] = {}
        self._promoted = {} if instance is None else promoted_values(instance, saved, definitions)

    def full_id(self, node: Node) -> str:
        return ":".join((*self._path, str(node.get("id"))))

    def where(self, node: Node) -> str:
        return f"node {self.full_id(node)} ({node.get('type')})"

    def all_nodes(self) -> Iterator[tuple[_Graph, Node]]:
        """Every node that runs, those of subgraphs in place of their instances."""
        for node in self._nodes.values():
            if node.get("mode") in (_MUTED, _BYPASSED) or node.get("type") in _VIRTUAL:
                continue
            inner = self._subgraph(node)
            if inner is None:
                yield self, node
            else:
                yield from inner.all_nodes()

    # --- following links ----------------------------------------------------------------------------

    def source(self, slot: Mapping[str, Any], kind: str, trail: _Trail) -> _Source:
        """What an input slot of a node here gets: None where nothing comes to it."""
        if slot.get("link") is None:
            return None
        link = self._links.get(str(slot["link"]))
        if link is None:
            raise InvalidWorkflow(
                f"the input {slot.get('name')!r} has a link {slot['link']} that is not there"
            )
        if link.origin == _INPUT_NODE and self._outer is not None and self._instance is not None:
            return self._from_outside(link.slot, kind, trail)
        node = self._nodes.get(link.origin)
        if node is None:
            raise InvalidWorkflow(
                f"the link {slot['link']} comes from node {link.origin}, which is not there"
            )
        return self._output(node, link.slot, kind, trail)

    def _from_outside(self, number: int, kind: str, trail: _Trail) -> _Source:
        declared = as_dicts(self._saved.get("inputs"))
        if self._outer is None or self._instance is None or not 0 <= number < len(declared):
            raise InvalidWorkflow(f"subgraph {self._saved.get('name')!r} has no input {number}")
        name = str(declared[number].get("name"))
        trail.step(self._outer, self._instance, number, "in")
        for slot in as_dicts(self._instance.get("inputs")):
            if slot.get("name") == name and slot.get("link") is not None:
                return self._outer.source(slot, kind, trail)
        return _Value(self._promoted[name]) if name in self._promoted else None

    def _output(self, node: Node, slot: int, kind: str, trail: _Trail) -> _Source:
        trail.step(self, node, slot, "out")
        if node.get("mode") == _BYPASSED:
            return self._bypassed(node, slot, kind, trail)
        if node.get("type") == _PRIMITIVE:
            items = as_items(node.get("widgets_values"))
            return _Value(items[0]) if items else None
        if node.get("type") == _REROUTE:
            entries = as_dicts(node.get("inputs"))
            return self.source(entries[0], kind, trail) if entries else None
        inner = self._subgraph(node)
        if inner is None or node.get("mode") == _MUTED:
            return _Output(self.full_id(node), slot)
        return inner.result(slot, kind, trail)

    def result(self, number: int, kind: str, trail: _Trail) -> _Source:
        """What comes out of this subgraph's output."""
        for link in self._links.values():
            if link.target == _OUTPUT_NODE and link.target_slot == number:
                node = self._nodes.get(link.origin)
                if node is not None:
                    return self._output(node, link.slot, kind, trail)
                if link.origin == _INPUT_NODE:
                    return self._from_outside(link.slot, kind, trail)
        return None

    def _bypassed(self, node: Node, slot: int, kind: str, trail: _Trail) -> _Source:
        """A bypassed node gives an input on: that of the same number if it fits, else the first that does."""
        inputs, outputs = as_dicts(node.get("inputs")), as_dicts(node.get("outputs"))
        given = str(outputs[slot].get("type", "*")) if slot < len(outputs) else "*"
        if not inputs:
            return None
        if kind in ("*", ""):
            return self.source(inputs[slot if slot < len(inputs) else 0], kind, trail)

        def fits(entry: Mapping[str, Any]) -> bool:
            return _connects(str(entry.get("type")), given) and _connects(str(entry.get("type")), kind)

        same = inputs[slot : slot + 1]
        order = [entry for entry in same if fits(entry)]
        order += [entry for entry in inputs if str(entry.get("type")) == kind]
        order += [entry for entry in inputs if fits(entry)]
        return self.source(order[0], kind, trail) if order else None

    def _subgraph(self, node: Node) -> _Graph | None:
        definition = self._definitions.get(str(node.get("type")))
        if definition is None:
            return None
        node_id = str(node.get("id"))
        if node_id not in self._inner:
            self._inner[node_id] = _Graph(
                definition, self._definitions, path=(*self._path, node_id), outer=self, instance=node
            )
        return self._inner[node_id]


@dataclass(frozen=True)
class _Link:
    origin: str
    slot: int
    target: str
    target_slot: int


_LINK_FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot")


def _links(saved: object) -> Iterator[tuple[str, _Link]]:
    """Links are lists in the workflow and objects in subgraphs (and in the newer schema)."""
    for link in cast("Sequence[object]", as_items(saved)):
        if link is None:
            continue  # litegraph leaves holes
        try:
            entry = as_dict(link) or dict(zip(_LINK_FIELDS, as_items(link), strict=False))
            parts = [entry[key] for key in _LINK_FIELDS]
            yield str(parts[0]), _Link(str(parts[1]), int(parts[2]), str(parts[3]), int(parts[4]))
        except (KeyError, TypeError, ValueError):
            shown = repr(link)
            raise InvalidWorkflow(f"a link is broken: {shown[:100]}") from None


def _connects(one: str, other: str) -> bool:
    """Whether slots of these types may be linked, as the page sees it."""
    if one in ("*", "", "0") or other in ("*", "", "0"):
        return True
    return bool(set(one.lower().split(",")) & set(other.lower().split(",")))
