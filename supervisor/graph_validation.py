"""Whether a prompt can run with the node classes at hand, by ComfyUI's rules; and the plan to run it.

Owns the checks of classes, links, types, required inputs, constants and VALIDATE_INPUTS, and the order of
execution. It runs no node and keeps nothing between calls.

It differs from ComfyUI where ComfyUI would run a part of a prompt or stop at the first trouble: here every
node that some output node needs is checked, every problem found is reported, and any problem refuses the
prompt. The short names in the texts (required_input_missing, ...) are those of ComfyUI's node errors.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

from legion_shm.errors import InvalidWorkflow
from legion_shm.supervisor.graph_problems import Problem, refuse
from legion_shm.supervisor.graph_protocol import (
    InputSpec,
    Link,
    NodeClass,
    PlannedNode,
    find_input,
    hidden_inputs,
    input_types,
    parse_link,
    return_types,
    types_fit,
)

__all__ = ["CallFunction", "Plan", "SignatureRecipe", "hidden_value", "validate_prompt"]

CallFunction = Callable[[Callable[..., object], Mapping[str, Sequence[object]], bool], list[object]]
"""Calls a node class's function over lists of inputs: (function, inputs, input_is_list)."""

_LONGEST_LIST_SHOWN = 20
_CONVERSIONS: Mapping[str, Callable[[Any], object]] = {
    "INT": int,
    "FLOAT": float,
    "STRING": str,
    "BOOLEAN": bool,
}


class SignatureRecipe(NamedTuple):
    """What a node's signature is made of: bytes, links, None for what has no bytes.

    ``slots``: those of its slots that go into another node's signature.
    """

    parts: tuple[bytes | Link | None, ...]
    slots: frozenset[int]


@dataclass(frozen=True)
class Plan:
    """A prompt that may run: its needed nodes in an order in which they can run, and its whole text."""

    nodes: Mapping[str, PlannedNode]
    prompt: dict[str, dict[str, object]]
    recipes: dict[str, SignatureRecipe | None] = field(default_factory=dict[str, "SignatureRecipe | None"])
    """For every node, once it was worked out (`graph_cache`): None where nobody asks for its signature."""

    @cached_property
    def readers(self) -> Mapping[str, int]:
        """How many inputs each node's outputs are linked to, for those that have any."""
        return Counter(link.node_id for node in self.nodes.values() for link in node.links.values())


def validate_prompt(
    prompt: Mapping[str, Mapping[str, object]], classes: Mapping[str, NodeClass], call: CallFunction
) -> Plan:
    """The plan for ``prompt``, or InvalidWorkflow with every problem found. ``prompt`` is not changed."""
    problems = _structure_problems(prompt, classes)
    refuse(problems)
    try:
        texts = {key: _own_copy(node) for key, node in prompt.items()}
    except RecursionError:
        raise InvalidWorkflow("the workflow's values are nested too deeply") from None
    outputs = [
        key for key in texts if getattr(classes[_class_type(texts[key])], "OUTPUT_NODE", False) is True
    ]
    if not outputs:
        raise InvalidWorkflow(
            "prompt_no_outputs: the workflow has no output node, so nothing in it would run; add one, such "
            "as LegionExporter or SaveImage"
        )
    planned: dict[str, PlannedNode] = {}
    for node_id in _execution_order(texts, outputs, problems):
        check = _NodeCheck(node_id, texts, classes)
        planned[node_id] = check.run(call)
        problems.extend(check.problems)
    refuse(problems)
    return Plan(planned, texts)


def _structure_problems(prompt: object, classes: Mapping[str, NodeClass]) -> list[Problem]:
    if not isinstance(prompt, Mapping):
        return [Problem("invalid_prompt", f"the workflow is {type(prompt).__name__}, not a dict of nodes")]
    problems: list[Problem] = []
    for key, node in cast("Mapping[object, object]", prompt).items():
        if not isinstance(key, str):
            problems.append(Problem("invalid_prompt", f"the node id {key!r} is not a string"))
            continue
        if not isinstance(node, Mapping):
            problems.append(Problem("invalid_prompt", "the node is not a dict", key))
            continue
        fields = cast("Mapping[str, object]", node)
        class_type = fields.get("class_type")
        if not isinstance(class_type, str):
            problems.append(Problem("missing_node_type", "the node has no class_type", key))
        elif class_type not in classes:
            problems.append(
                Problem(
                    "missing_node_type",
                    f"no node class {class_type!r} is loaded; ComfyUI's own nodes and custom nodes run with "
                    "engine='comfy' (legion run: --engine comfy), those of a module of yours with "
                    "WorkerSpec.node_modules (legion run: --node-module)",
                    key,
                )
            )
        if not isinstance(fields.get("inputs", {}), Mapping):
            problems.append(Problem("invalid_prompt", "the node's inputs are not a dict", key))
    return problems


def _class_type(node: Mapping[str, object]) -> str:
    return cast("str", node["class_type"])


def _inputs(node: Mapping[str, object]) -> dict[str, object]:
    return cast("dict[str, object]", node["inputs"])


def _own_copy(node: Mapping[str, object]) -> dict[str, object]:
    inputs = cast("Mapping[str, object]", node.get("inputs", {}))
    return copy.deepcopy({**node, "inputs": dict(inputs)})


def _execution_order(
    texts: Mapping[str, dict[str, object]], outputs: Sequence[str], problems: list[Problem]
) -> list[str]:
    """The nodes that ``outputs`` need, sources first; depth first, so one branch ends before the next."""
    order: list[str] = []
    done: set[str] = set()
    path: dict[str, None] = {}
    for output in outputs:
        stack: list[tuple[str, list[str]]] = []
        if output not in done:
            path[output] = None
            stack.append((output, _sources(texts, output)))
        while stack:
            node_id, sources = stack[-1]
            if not sources:
                stack.pop()
                del path[node_id]
                done.add(node_id)
                order.append(node_id)
                continue
            source = sources.pop(0)
            if source in path:
                trail = list(path)
                cycle = " -> ".join([*trail[trail.index(source) :], source])
                problems.append(
                    Problem("dependency_cycle", f"nodes depend on each other: {cycle}", source,
                             _class_type(texts[source]))
                )  # fmt: skip
            elif source not in done:
                path[source] = None
                stack.append((source, _sources(texts, source)))
    return order


def _sources(texts: Mapping[str, dict[str, object]], node_id: str) -> list[str]:
    links = (parse_link(value) for value in _inputs(texts[node_id]).values())
    return list(dict.fromkeys(link.node_id for link in links if link is not None and link.node_id in texts))


class _NodeCheck:
    """The checks of one node. Converts its constants in place, in the copy of the prompt that it is given."""

    def __init__(
        self, node_id: str, texts: Mapping[str, dict[str, object]], classes: Mapping[str, NodeClass]
    ) -> None:
        self.node_id = node_id
        self.texts = texts
        self.classes = classes
        self.class_type = _class_type(texts[node_id])
        self.node_class = classes[self.class_type]
        self.inputs = _inputs(texts[node_id])
        self.problems: list[Problem] = []
        self.constants: dict[str, object] = {}
        self.links: dict[str, Link] = {}
        self.received_types: dict[str, object] = {}

    def run(self, call: CallFunction) -> PlannedNode:
        hidden: dict[str, str] = {}
        try:
            declared = input_types(self.node_class)
            hidden = hidden_inputs(declared)
            self._check(declared, hidden, call)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self._problem("exception_during_validation", text)
        return PlannedNode(self.node_id, self.class_type, self.node_class, self.constants, self.links, hidden)

    def _problem(self, kind: str, detail: str, input_name: str | None = None) -> None:
        self.problems.append(Problem(kind, detail, self.node_id, self.class_type, input_name))

    def _check(self, declared: Mapping[str, Any], hidden: Mapping[str, str], call: CallFunction) -> None:
        if "DYNPROMPT" in hidden.values():
            self._problem("unsupported_node", "it asks for DYNPROMPT, which only the comfy engine has")
        validate = cast("Callable[..., object] | None", getattr(self.node_class, "VALIDATE_INPUTS", None))
        parameters = _parameters(validate)
        for name in cast("Mapping[str, object]", declared.get("required") or {}):
            if name not in self.inputs:
                self._problem(
                    "required_input_missing", "a required input has neither a value nor a link", name
                )
        for name in list(self.inputs):
            try:
                self._check_input(name, find_input(declared, name), parameters)
            except Exception as error:
                self._problem("exception_during_validation", f"{type(error).__name__}: {error}", name)
        if validate is not None and not self.problems:
            self._custom_validation(validate, parameters, hidden, call)

    def _check_input(self, name: str, spec: InputSpec | None, parameters: _Parameters) -> None:
        value = self.inputs[name]
        link = parse_link(value)
        if link is not None:
            self._check_link(name, link, spec, parameters)
        elif spec is None:
            return
        elif spec.category == "hidden":
            self.constants[name] = value
        elif isinstance(value, (list, tuple)):
            self._problem(
                "bad_linked_input",
                "a list as an input's value must be a link [node_id, slot]; write a list that is a value as "
                '{"__value__": [...]}',
                name,
            )
        else:
            self._check_constant(name, value, spec, parameters)

    def _check_link(self, name: str, link: Link, spec: InputSpec | None, parameters: _Parameters) -> None:
        source = self.texts.get(link.node_id)
        if source is None:
            self._problem(
                "bad_linked_input", f"it is linked to node {link.node_id}, which does not exist", name
            )
            return
        types = return_types(self.classes[_class_type(source)])
        if not 0 <= link.slot < len(types):
            self._problem(
                "bad_linked_input",
                f"it is linked to output {link.slot} of node {link.node_id} ({_class_type(source)}), which "
                f"has {len(types)} output{'' if len(types) == 1 else 's'}",
                name,
            )
            return
        self.links[name] = link
        if spec is None or spec.category == "hidden":
            return
        if spec.options.get("rawLink"):
            self._problem(
                "unsupported_node", "it asks for a raw link, which only the comfy engine gives", name
            )
        given = types[link.slot]
        self.received_types[name] = given
        if not parameters.asks("input_types") and not types_fit(given, spec.type):
            self._problem(
                "return_type_mismatch",
                f"node {link.node_id} ({_class_type(source)}) gives {_type_name(given)}, "
                f"the input takes {_type_name(spec.type)}",
                name,
            )

    def _check_constant(self, name: str, value: object, spec: InputSpec, parameters: _Parameters) -> None:
        value = _unwrap(value)
        convert = _CONVERSIONS.get(spec.type) if isinstance(spec.type, str) else None
        if convert is not None:
            try:
                value = convert(value)
            except Exception as error:
                self._problem(
                    "invalid_input_type", f"{_short(value)} cannot be made a {spec.type}: {error}", name
                )
                return
        self.inputs[name] = value
        self.constants[name] = value
        if parameters.asks(name) or parameters.takes_all:
            return
        options = spec.options
        if "min" in options and cast("Any", value) < options["min"]:
            self._problem(
                "value_smaller_than_min", f"{_short(value)} is less than the minimum {options['min']}", name
            )
        elif "max" in options and cast("Any", value) > options["max"]:
            self._problem(
                "value_bigger_than_max", f"{_short(value)} is more than the maximum {options['max']}", name
            )
        elif (choices := spec.choices) is not None:
            values = [value]
            if options.get("multiselect") and isinstance(value, list):
                values = cast("list[object]", value)
            wrong = [item for item in values if item not in choices]
            if wrong:
                shown = (
                    f"the {len(choices)} values of the list"
                    if len(choices) > _LONGEST_LIST_SHOWN
                    else ", ".join(repr(choice) for choice in choices) or "an empty list"
                )
                self._problem(
                    "value_not_in_list",
                    f"{', '.join(_short(item) for item in wrong)} is not among {shown}",
                    name,
                )

    def _custom_validation(
        self,
        validate: Callable[..., object],
        parameters: _Parameters,
        hidden: Mapping[str, str],
        call: CallFunction,
    ) -> None:
        given: dict[str, Sequence[object]] = {name: (value,) for name, value in self.constants.items()}
        given.update(dict.fromkeys(self.links, (None,)))
        given.update({name: (hidden_value(kind, self.node_id, {}),) for name, kind in hidden.items()})
        asked = {name: copy.deepcopy(values) for name, values in given.items() if parameters.wants(name)}
        checked = [name for name in asked if name not in hidden]
        if parameters.asks("input_types"):
            asked["input_types"] = (dict(self.received_types),)
        results = call(validate, asked, bool(getattr(self.node_class, "INPUT_IS_LIST", False)))
        for answer in results:
            if answer is True:
                continue
            reason = "VALIDATE_INPUTS refused the values" if answer is False else str(answer)
            values = ", ".join(f"{name}={_short(self.inputs[name])}" for name in checked)
            self._problem(
                "custom_validation_failed",
                f"{reason}{f' ({values})' if values else ''}",
                checked[0] if len(checked) == 1 else None,
            )


@dataclass(frozen=True)
class _Parameters:
    """Which inputs VALIDATE_INPUTS looks at itself."""

    names: frozenset[str]
    takes_all: bool

    def asks(self, name: str) -> bool:
        return name in self.names

    def wants(self, name: str) -> bool:
        return self.takes_all or name in self.names


def _parameters(function: Callable[..., object] | None) -> _Parameters:
    if function is None:
        return _Parameters(frozenset(), takes_all=False)
    parameters = inspect.signature(function).parameters.values()
    return _Parameters(
        frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)),
        takes_all=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def hidden_value(
    kind: str, node_id: str, prompt: Mapping[str, object], extra_data: Mapping[str, object] | None = None
) -> object:
    """What a hidden input of this kind receives; None for what only ComfyUI's server knows."""
    if kind == "UNIQUE_ID":
        return node_id
    if kind == "EXTRA_PNGINFO":
        return copy.deepcopy((extra_data or {}).get("extra_pnginfo"))
    return copy.deepcopy(dict(prompt)) if kind == "PROMPT" else None


def _unwrap(value: object) -> object:
    """A value written as ``{"__value__": [...]}``, which is how a list is told from a link."""
    if not isinstance(value, dict):
        return value
    wrapped = cast("dict[str, object]", value)
    return wrapped.get("__value__", wrapped)


def _type_name(kind: object) -> str:
    return "one of a list of values" if isinstance(kind, list) else str(kind)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
