"""The channels by which values enter and leave a workflow, as its text alone shows them.

Owns the reading of their names and the comparison with the inputs that a caller gives. It looks at no node
class but the four that carry values in and out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from legion_shm.errors import InvalidWorkflow
from legion_shm.workflow import CHANNELS, Workflow, is_link

__all__ = [
    "Channels",
    "check_inputs",
    "linked_channels",
    "missing_inputs",
    "name_inputs",
    "read_channels",
    "unread_inputs",
]

_NUMBERS = frozenset(str(number) for number in range(1, CHANNELS + 1))


@dataclass(frozen=True)
class Channels:
    """The channel names that a workflow's text shows.

    ``required`` maps an input name that some node cannot do without to that node's id. Names that
    come over a link are not known here: ``open_inputs`` is True if there is one.
    """

    inputs: frozenset[str]
    required: Mapping[str, str]
    outputs: Mapping[str, str]
    open_inputs: bool


def read_channels(workflow: Workflow) -> Channels:
    """Which channels a workflow reads and writes. Raises InvalidWorkflow for an output name given twice."""
    inputs: set[str] = set()
    required: dict[str, str] = {}
    outputs: dict[str, str] = {}
    open_inputs = False

    def add_output(name: str, node_id: str, input_name: str) -> None:
        other = outputs.setdefault(name, node_id)
        if other != node_id:
            raise InvalidWorkflow(
                f"node {node_id}, input {input_name}: the output {name!r} is delivered by "
                f"node {other} already; give each output a name of its own",
                node_id=node_id,
                input_name=input_name,
            )

    for node_id, node in workflow.items():
        kind, values = node["class_type"], node["inputs"]
        if kind == "LegionImporter":
            inputs.update(f"input_{number}" for number in range(1, CHANNELS + 1))
        elif kind == "LegionExporter":
            for name in values:
                number = name[len("input_") :] if name.startswith("input_") else ""
                if number.isdecimal():
                    if number not in _NUMBERS:
                        raise InvalidWorkflow(
                            f"node {node_id} (LegionExporter), input {name}: there are {CHANNELS} numbered "
                            "channels; use LegionOutput for more",
                            node_id=node_id,
                            input_name=name,
                        )
                    add_output(f"output_{number}", node_id, name)
        elif kind == "LegionInput":
            name = _channel_name(node_id, kind, values)
            if isinstance(name, str):
                inputs.add(name)
                if "default" not in values:
                    required.setdefault(name, node_id)
            elif is_link(name):
                open_inputs = True
        elif kind == "LegionOutput":
            name = _channel_name(node_id, kind, values)
            if isinstance(name, str):
                add_output(name, node_id, "name")
            if "value" not in values:
                raise InvalidWorkflow(
                    f"node {node_id} (LegionOutput), input value: nothing is linked to it",
                    node_id=node_id,
                    input_name="value",
                )
    return Channels(frozenset(inputs), required, outputs, open_inputs)


def _channel_name(node_id: str, kind: str, values: Mapping[str, Any]) -> object:
    """What a LegionInput or LegionOutput has as its name: text, or what only the engine can make text of."""
    name = values.get("name")
    if name is None or name == "":
        what = "is missing" if "name" not in values else f"is {name!r}"
        raise InvalidWorkflow(
            f"node {node_id} ({kind}), input name: it {what}; a channel's name is non-empty text",
            node_id=node_id,
            input_name="name",
        )
    return name


def name_inputs(inputs: Mapping[str, object] | Sequence[object] | None) -> dict[str, object]:
    """Inputs by channel name: a sequence fills ``input_1``, ``input_2``, ...; a mapping names its own.

    Raises InvalidWorkflow for names that are not text, and for anything else (a bare tensor, say).
    """
    if inputs is None:
        return {}
    if isinstance(inputs, (list, tuple)):
        return {f"input_{number}": value for number, value in enumerate(inputs, 1)}
    if isinstance(inputs, Mapping):
        for name in cast("Mapping[object, object]", inputs):
            if not isinstance(name, str) or not name:
                raise InvalidWorkflow(f"input name {name!r}: a channel's name is non-empty text")
        return dict(inputs)
    raise InvalidWorkflow(
        f"inputs must be a list, a tuple or a mapping of names to values, not {type(inputs).__name__}; "
        "for a single value write inputs=[value]"
    )


def check_inputs(channels: Channels, inputs: Mapping[str, object]) -> tuple[str, ...]:
    """The given names that no node reads. Raises InvalidWorkflow for a required one that is missing."""
    for name, node_id in channels.required.items():
        if name not in inputs:
            given = ", ".join(sorted(inputs)) or "none"
            raise InvalidWorkflow(
                f"node {node_id} (LegionInput): the input {name!r} was not given; given: {given}",
                node_id=node_id,
                input_name="name",
            )
    if channels.open_inputs:
        return ()
    return tuple(name for name in inputs if name not in channels.inputs)


def linked_channels(workflow: Workflow) -> tuple[tuple[str, str], ...]:
    """Each channel of LegionImporter that an input of a node is linked to, but for those that export it."""
    found: list[tuple[str, str]] = []
    importers = {node_id for node_id, node in workflow.items() if node["class_type"] == "LegionImporter"}
    for node_id, node in workflow.items():
        if node["class_type"] in ("LegionExporter", "LegionOutput"):
            continue
        for name, value in node["inputs"].items():
            if is_link(value) and value[0] in importers and value[1] < CHANNELS:
                where = f"node {node_id} ({node['class_type']}), input {name}"
                found.append((f"input_{value[1] + 1}", where))
    return tuple(found)


def unread_inputs(names: Sequence[str]) -> tuple[str, ...]:
    """One sentence for all inputs that no node reads, or none."""
    if not names:
        return ()
    what = "inputs {} are" if len(names) > 1 else "input {} is"
    return (f"{what.format(', '.join(map(repr, names)))} read by no node of the workflow",)


def missing_inputs(linked: Iterable[tuple[str, str]], inputs: Mapping[str, object]) -> tuple[str, ...]:
    """A sentence for each input of a node that will get None, for the channel that it is linked to."""
    return tuple(
        f"{channel!r} was not given: {where}, which is linked to it, gets None"
        for channel, where in linked
        if channel not in inputs
    )
