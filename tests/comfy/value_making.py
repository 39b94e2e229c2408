"""Makes values with core nodes of the ComfyUI in this process, run by its own executor.

Owns how a sample is made and what its row says of that; the samples themselves are `value_samples`',
`value_media`'s and `value_models`'. Imported in a process where ComfyUI is loaded, beside its driver.

    CoreNode("FlipSigmas", sigmas=CoreNode("KarrasScheduler"))  ─▶ a prompt ─▶ ComfyEngine ─▶ the value
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

from legion_shm.supervisor.engine import JobRequest

__all__ = [
    "BEYOND",
    "NO_NODE",
    "Absent",
    "CoreNode",
    "Given",
    "Missing",
    "Row",
    "Workshop",
    "find",
    "folder",
    "made",
    "of_class",
    "prepared",
    "python",
    "too_large",
    "widget",
]

NO_NODE = "no core node gives one"
BEYOND = "more than core nodes give"


class Absent(Exception):
    """This version of ComfyUI has no such value; the text is what its column says."""


class Missing(Absent):
    """This version of ComfyUI has no such node or class."""

    def __init__(self, name: str) -> None:
        super().__init__("no such node")
        self.name = name


@dataclass(frozen=True)
class Given:
    """What comes into the workflow from Python, by a link; a function is called when it is needed."""

    value: Any


class CoreNode:
    """One output of a core node. Inputs: constants, other nodes' outputs, or `Given`; the rest are defaults.

    Two underscores stand for the dot in the names of nested inputs.
    """

    def __init__(self, name: str, slot: int = 0, /, **inputs: Any) -> None:
        self.name, self.slot = name, slot
        self.inputs = {key.replace("__", "."): item for key, item in inputs.items()}


@dataclass(frozen=True)
class Row:
    """A sample: its type, which value it is, and how it is made.

    ``make`` is a node, or a function that gives the value or, when it has prepared what the node needs, the
    node. ``why`` says why no core node makes it; ``taker`` names the node whose widget sends such a value.
    """

    kind: str
    what: str
    make: CoreNode | Callable[[], Any]
    maker: str
    why: str = ""
    taker: str = ""
    has: Callable[[Any], bool] | None = None

    @property
    def made_by(self) -> str:
        return f"Python: {self.why}" if self.why else self.maker

    def having(self, has: Callable[[Any], bool]) -> Row:
        """The same, of which it is checked that the value is what the row says."""
        return replace(self, has=has)


def made(kind: str, what: str, name: str, slot: int = 0, /, **inputs: Any) -> Row:
    """A value that a core node makes."""
    return Row(kind, what, CoreNode(name, slot, **inputs), name)


def prepared(kind: str, what: str, name: str, prepare: Callable[[], CoreNode]) -> Row:
    """A value that core node ``name`` makes of what ``prepare`` has made or written to files first."""
    return Row(kind, what, prepare, name)


def python(kind: str, what: str, value: Any, why: str = NO_NODE) -> Row:
    """A value written down here, in the form of that type; with `NO_NODE`, where that is so."""
    return Row(kind, what, value if callable(value) else lambda: value, "", why)


def widget(kind: str, what: str, taker: str, value: Any) -> Row:
    """What the frontend's widget of node ``taker`` sends: no core node gives it, and that node takes it."""
    return Row(kind, what, lambda: value, "", f"{NO_NODE}; what {taker}'s widget sends", taker)


def of_class(kind: str, what: str, maker: str, make: Callable[[], Any], why: str) -> Row:
    """A value of a class or function of ComfyUI's, made without its node for the reason that is given."""
    return Row(kind, what, make, maker, f"{maker}; {why}")


def too_large(node: str, millions: int) -> str:
    return f"{node} takes no model of less than {millions} million weights"


def find(*names: str) -> Any:
    """The first of these classes or functions (``module:name``) that there is."""
    for name in names:
        module, _, attribute = name.partition(":")
        # ComfyUI loads its extra nodes by their paths; another import would make the classes a second time.
        path = module.replace(".", "/")
        loaded = next((item for key, item in sys.modules.items() if key.endswith(f"/{path}")), None)
        try:
            return getattr(loaded or importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
    raise Missing(names[0])


class _Silent:
    """Events that nobody listens to."""

    def node(self, node_id: str, class_type: str, status: str) -> None:
        pass

    def progress(self, node_id: str | None, value: float, total: float) -> None:
        pass

    def preview(self, node_id: str | None, image: object) -> None:
        pass


@dataclass(eq=False)
class Workshop:
    """Runs nodes with a `ComfyEngine` that has started, and knows what this ComfyUI's nodes give and take."""

    engine: Any
    gives: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    takes: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    _jobs: int = 0

    def __post_init__(self) -> None:
        for name, cls in self.classes().items():
            for kind in self.outputs(cls):
                self.gives.setdefault(kind, set()).add(name)
            for kinds in self._inputs(cls):
                for kind in kinds.split(","):
                    self.takes.setdefault(kind, set()).add(name)

    @staticmethod
    def classes() -> dict[str, Any]:
        """The core nodes; those that need a service of the network are not loaded."""
        mapping = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
        return {name: cls for name, cls in mapping.items() if not name.startswith("Legion")}

    @staticmethod
    def outputs(node: Any) -> list[str]:
        return [_type_name(item) for item in node.RETURN_TYPES or ()]

    @staticmethod
    def _inputs(node: Any) -> list[str]:
        inputs = node.INPUT_TYPES()
        return [
            _type_name(spec[0])
            for group in ("required", "optional")
            for spec in inputs.get(group, {}).values()
        ]

    @cache  # noqa: B019 - there is one workshop
    def types(self) -> dict[str, int]:
        """Every type name that this ComfyUI has, and how many of its core nodes give it."""
        found = {member.value for member in find("comfy.comfy_types:IO")}
        for item in vars(importlib.import_module("comfy_api.latest._io")).values():
            if isinstance(item, type) and isinstance(getattr(item, "io_type", None), str):
                found.add(item.io_type)  # type: ignore[attr-defined]
        return {kind: len(self.gives.get(kind, ())) for kind in found | set(self.gives) | set(self.takes)}

    def make(self, row: Row) -> Any:
        """The row's value. Raises `Absent` where this version has none, ValueError for a wrong row."""
        if row.kind not in self.types():
            raise Absent("no such type")
        if row.why.startswith(NO_NODE) and row.kind in self.gives:
            raise Absent("from a node")
        value = self._made(row)
        if row.has is not None and not row.has(value):
            raise Absent("otherwise")
        return value

    def _made(self, row: Row) -> Any:
        if row.taker and row.taker not in self.takes.get(row.kind, ()):
            raise Missing(row.taker)
        if not row.why and row.maker not in self.classes():
            raise Missing(row.maker)
        value = row.make if isinstance(row.make, CoreNode) else row.make()
        if not isinstance(value, CoreNode):
            return value
        outputs = self.outputs(self.classes()[value.name])
        if value.slot >= len(outputs):
            raise Missing(value.name)
        if value.name != row.maker or outputs[value.slot] != row.kind:
            raise ValueError(f"output {value.slot} of {value.name} is {outputs[value.slot]}, not {row.kind}")
        return self.run(value)

    def run(self, node: CoreNode) -> Any:
        """The value of that output, of ComfyUI's executor after its validation."""
        prompt: dict[str, dict[str, Any]] = {}
        given: dict[str, Any] = {}
        prompt["out"] = {
            "class_type": "LegionExporter",
            "inputs": {"input_1": self._written(node, prompt, given)},
        }
        if given:
            prompt["in"] = {"class_type": "LegionImporter", "inputs": {}}
        self._jobs += 1
        digest = b"%d" % self._jobs
        identities = dict.fromkeys(given, digest)
        request = JobRequest(f"sample-{self._jobs}", prompt, digest, given, identities)
        return self.engine.execute(request, _Silent()).outputs["output_1"]

    def _written(self, node: CoreNode, prompt: dict[str, dict[str, Any]], given: dict[str, Any]) -> list[Any]:
        cls = self.classes().get(node.name)
        if cls is None:
            raise Missing(node.name)
        inputs = {key: self._link(item, prompt, given) for key, item in node.inputs.items()}
        for key, spec in cls.INPUT_TYPES().get("required", {}).items():
            if not any(name == key or name.startswith(f"{key}.") for name in inputs):
                inputs.update(_default(key, spec))
        name = str(len(prompt))
        prompt[name] = {"class_type": node.name, "inputs": inputs}
        return [name, node.slot]

    def _link(self, item: Any, prompt: dict[str, dict[str, Any]], given: dict[str, Any]) -> Any:
        value = item.value if isinstance(item, Given) else item
        value = value() if isinstance(value, FunctionType) else value
        if isinstance(value, CoreNode):
            return self._written(value, prompt, given)
        if not isinstance(item, Given) and _is_constant(value):
            return {"__value__": value} if isinstance(value, list) else value  # else it would be a link
        number = len(given) + 1
        given[f"input_{number}"] = value
        return ["in", number - 1]


def _type_name(item: Any) -> str:
    return str(getattr(item, "value", item)) if isinstance(item, str) else "COMBO"


def _is_constant(item: Any) -> bool:
    try:
        json.dumps(item)
    except (TypeError, ValueError):
        return False
    return True


def _default(key: str, spec: Any) -> Mapping[str, Any]:
    """What the frontend would send for a widget that nobody touched."""
    options = spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return {key: options["default"]}
    choices = spec[0] if isinstance(spec[0], list) else options.get("options", [])
    if choices and isinstance(choices[0], str):
        return {key: choices[0]}
    return {}


def folder(kind: str) -> Path:
    """The first folder of this ComfyUI for models of that kind."""
    path = Path(find("folder_paths:get_folder_paths")(kind)[0])
    path.mkdir(parents=True, exist_ok=True)
    return path
