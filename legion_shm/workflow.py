"""Workflows in ComfyUI's API format: loading, and what their own text can tell.

Owns the structural check (shape, links, cycles), so that a mistake is raised by ``submit`` in the caller's
process. It knows no node class but the four that carry values in and out, whose channels are
`legion_shm.channels`'; types, ranges and required inputs are the engine's to check.

API format: ``{"node id": {"class_type": "ImageScale", "inputs": {"image": ["1", 0], "width": 512}}}``;
an input given as ``[node id, slot]`` is a link to that node's output.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, cast

from legion_shm.errors import InvalidWorkflow

__all__ = [
    "CHANNELS",
    "Workflow",
    "WorkflowSource",
    "is_link",
    "limited_to",
    "load_workflow",
    "pack_workflow",
]

CHANNELS = 12
"""Numbered channels of LegionImporter and LegionExporter: ``input_1`` to ``input_12``."""

Workflow = dict[str, dict[str, Any]]
WorkflowSource = Union[Mapping[str, Any], str, "os.PathLike[str]"]

_MAX_BYTES = 64 << 20
_SLOTS = {"LegionImporter": CHANNELS + 1, "LegionInput": 1, "LegionExporter": 0, "LegionOutput": 0}


def is_link(value: object) -> bool:
    """Whether an input's value is a link, ``[node id, output slot]``, as ComfyUI reads it."""
    if not isinstance(value, list):
        return False
    items = cast("list[object]", value)
    return (
        len(items) == 2
        and isinstance(items[0], str)
        and isinstance(items[1], (int, float))
        and not isinstance(items[1], bool)
    )


def load_workflow(source: WorkflowSource) -> Workflow:
    """An API-format workflow from a mapping, a file's path or JSON text, checked in its structure.

    Returns a fresh, JSON-clean copy: the caller's object may be changed afterwards. Raises
    InvalidWorkflow naming the node and the input at fault.
    """
    if isinstance(source, Mapping):
        raw: object = source
        where = "the workflow"
    elif isinstance(source, os.PathLike):
        raw, where = _read_file(Path(source)), f"the workflow file {os.fspath(source)}"
    elif isinstance(cast("object", source), str):
        if not source.strip():
            raise InvalidWorkflow("the workflow is an empty text; give JSON text or the path of a file")
        if source.lstrip()[:1] in ("{", "["):
            raw, where = _parse(source, "the workflow text"), "the workflow text"
        else:
            raw, where = _read_file(Path(source)), f"the workflow file {source}"
    else:
        raise InvalidWorkflow(f"a workflow is a dict, a path or JSON text, not {type(source).__name__}")
    return _checked(_unwrapped(raw), where)


def _unwrapped(raw: object) -> object:
    """The workflow inside of what ComfyUI's ``POST /prompt`` takes; anything else as it is."""
    if not isinstance(raw, Mapping):
        return raw
    mapping = cast("Mapping[object, object]", raw)
    inner = mapping.get("prompt")
    if isinstance(inner, Mapping) and "class_type" not in inner and len(mapping) <= 3:
        return cast("Mapping[object, object]", inner)
    return mapping


def _read_file(path: Path) -> object:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InvalidWorkflow(f"the workflow file {path} is larger than {_MAX_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidWorkflow(
            f"the workflow file {str(path)!r} is not UTF-8 text; give the JSON file that ComfyUI exports "
            "(menu Workflow, Export (API))"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidWorkflow):
            raise
        raise InvalidWorkflow(f"cannot read the workflow file {str(path)!r}: {error}") from error
    return _parse(text, f"the workflow file {path}")


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidWorkflow(
            f"{where} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except RecursionError:
        raise InvalidWorkflow(f"{where} is nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise InvalidWorkflow(f"{where} is not valid JSON: {error}") from None


def _checked(raw: object, where: str) -> Workflow:
    if not isinstance(raw, Mapping):
        raise InvalidWorkflow(f"{where}: expected an object of nodes, got {type(raw).__name__}")
    nodes = cast("Mapping[object, object]", raw)
    if isinstance(nodes.get("nodes"), Sequence) and "links" in nodes:
        raise InvalidWorkflow(
            f"{where} is in ComfyUI's saved format; export it in the API format "
            "(menu Workflow, Export (API)) and submit that"
        )
    if not nodes:
        raise InvalidWorkflow(f"{where} has no nodes")
    workflow: Workflow = {}
    numbered = False
    for key, value in nodes.items():
        node_id = str(key)
        if node_id in workflow:
            raise InvalidWorkflow(f"{where}: node id {node_id!r} is there twice", node_id=node_id)
        workflow[node_id] = _node(node_id, value)
        numbered = numbered or isinstance(key, int)
    if numbered:
        _links_to_text(workflow)
    _check_links(workflow)
    _check_cycles(workflow)
    return workflow


def _node(node_id: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidWorkflow(
            f"node {node_id}: expected an object with class_type and inputs, got {type(value).__name__}",
            node_id=node_id,
        )
    node = cast("Mapping[str, object]", value)
    class_type = node.get("class_type")
    if not isinstance(class_type, str) or not class_type:
        raise InvalidWorkflow(f"node {node_id}: class_type is missing or not text", node_id=node_id)
    inputs = node.get("inputs", {})
    if not isinstance(inputs, Mapping):
        raise InvalidWorkflow(
            f"node {node_id} ({class_type}): inputs must be an object, got {type(inputs).__name__}",
            node_id=node_id,
        )
    clean: dict[str, Any] = {"class_type": class_type, "inputs": {}}
    for name, content in cast("Mapping[object, object]", inputs).items():
        if not isinstance(name, str):
            raise InvalidWorkflow(
                f"node {node_id} ({class_type}): input name {name!r} is not text", node_id=node_id
            )
        try:
            clean["inputs"][name] = _json_copy(content, 0)
        except _NotJson as error:
            raise InvalidWorkflow(
                f"node {node_id} ({class_type}), input {name}: {error}; only JSON values can stand in a "
                "workflow, pass others through `inputs`",
                node_id=node_id,
                input_name=name,
            ) from None
    for extra in ("_meta", "is_changed"):
        if extra in node:
            try:
                clean[extra] = _json_copy(node[extra], 0)
            except _NotJson as error:
                raise InvalidWorkflow(f"node {node_id}: {extra}: {error}", node_id=node_id) from None
    return clean


class _NotJson(Exception):
    pass


def _json_copy(value: object, depth: int) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            raise _NotJson(f"the number {value} does not fit into 64 bits")
        return int(value)
    if isinstance(value, float):
        return float(value)
    if depth > 64:
        raise _NotJson("it is nested more than 64 deep")
    if isinstance(value, Mapping):
        mapping = cast("Mapping[object, object]", value)
        if not all(isinstance(key, str) for key in mapping):
            raise _NotJson("an object's keys must be text")
        return {key: _json_copy(item, depth + 1) for key, item in mapping.items()}
    if isinstance(value, (list, tuple)):
        return [_json_copy(item, depth + 1) for item in cast("Sequence[object]", value)]
    raise _NotJson(f"a {type(value).__name__} is not a JSON value")


def _links_to_text(workflow: Workflow) -> None:
    """Where a dict has numbers for node ids, its links have too; JSON knows only text."""
    for node in workflow.values():
        for value in node["inputs"].values():
            link = cast("list[object]", value) if isinstance(value, list) else []
            if len(link) == 2 and type(link[0]) is type(link[1]) is int and str(link[0]) in workflow:
                link[0] = str(link[0])


def _check_links(workflow: Workflow) -> None:
    for node_id, node in workflow.items():
        for name, value in node["inputs"].items():
            if not is_link(value):
                continue
            source, slot = value
            if source not in workflow:
                raise InvalidWorkflow(
                    f"node {node_id} ({node['class_type']}), input {name}: "
                    f"links to node {source!r}, which is not in the workflow",
                    node_id=node_id,
                    input_name=name,
                )
            if not math.isfinite(slot) or slot != int(slot) or slot < 0:
                raise InvalidWorkflow(
                    f"node {node_id} ({node['class_type']}), input {name}: "
                    f"{slot!r} is not the number of an output slot",
                    node_id=node_id,
                    input_name=name,
                )
            value[1] = int(slot)
            kind = workflow[source]["class_type"]
            slots = _SLOTS.get(kind)
            if slots is not None and slot >= slots:
                has = "1 output" if slots == 1 else f"{slots} outputs"
                raise InvalidWorkflow(
                    f"node {node_id} ({node['class_type']}), input {name}: it is linked to output {value[1]} "
                    f"of node {source} ({kind}), which has {has}"
                    + ("; the first is output 0" if slots else ""),
                    node_id=node_id,
                    input_name=name,
                )


def _check_cycles(workflow: Workflow) -> None:
    done: set[str] = set()
    for start in workflow:
        if start in done:
            continue
        trail: dict[str, None] = {start: None}
        stack = [(start, iter(_sources(workflow[start])))]
        while stack:
            node_id, links = stack[-1]
            step = next(links, None)
            if step is None:
                stack.pop()
                trail.pop(node_id)
                done.add(node_id)
                continue
            name, source = step
            if source in trail:
                ring = [*list(trail)[list(trail).index(source) :], source]
                raise InvalidWorkflow(
                    "the workflow's links form a cycle: " + " <- ".join(ring),
                    node_id=node_id,
                    input_name=name,
                )
            if source not in done:
                trail[source] = None
                stack.append((source, iter(_sources(workflow[source]))))


def _sources(node: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, value[0]) for name, value in node["inputs"].items() if is_link(value)]


def limited_to(workflow: Workflow, targets: Iterable[str]) -> Workflow:
    """The nodes with these ids and all that they are made of, in the workflow's order.

    Raises InvalidWorkflow for an id that is not there, and for none.
    """
    wanted = [str(target) for target in targets]
    unknown = [target for target in wanted if target not in workflow]
    if unknown or not wanted:
        names = ", ".join(unknown) or "none given"
        raise InvalidWorkflow(f"targets: {names}: expected ids of output nodes of the workflow")
    kept: set[str] = set()
    while wanted:
        node_id = wanted.pop()
        if node_id not in kept:
            kept.add(node_id)
            wanted.extend(source for _, source in _sources(workflow[node_id]))
    return {node_id: node for node_id, node in workflow.items() if node_id in kept}


def pack_workflow(workflow: Workflow) -> tuple[bytes, bytes]:
    """A workflow as JSON bytes for the wire, and its digest: equal for equal workflows in equal order."""
    data = json.dumps(workflow, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return data, hashlib.blake2b(data, digest_size=16).digest()
