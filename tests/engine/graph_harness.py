"""What the graph engine's tests share: an engine with given node classes, a job in one line, a recorder."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from legion_shm.supervisor.engine import JobOutcome, JobRequest
from legion_shm.supervisor.graph import GraphEngine

Prompt = dict[str, dict[str, Any]]
_numbers = itertools.count()


class Recorder:
    """Implements EngineEvents; ``on_node`` is called after each node event."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, str]] = []
        self.progressed: list[tuple[str | None, float, float]] = []
        self.previewed: list[tuple[str | None, object]] = []
        self.on_node: Any = None

    def node(self, node_id: str, class_type: str, status: str) -> None:
        self.nodes.append((node_id, status))
        if self.on_node is not None:
            self.on_node(node_id, status)

    def progress(self, node_id: str | None, value: float, total: float) -> None:
        self.progressed.append((node_id, value, total))

    def preview(self, node_id: str | None, image: object) -> None:
        self.previewed.append((node_id, image))

    def with_status(self, status: str) -> list[str]:
        return [node_id for node_id, seen in self.nodes if seen == status]


class Harness:
    """An engine that has started, and jobs for it."""

    def __init__(self, engine: GraphEngine) -> None:
        self.engine = engine
        self.events = Recorder()

    def run(
        self,
        prompt: Mapping[str, Mapping[str, Any]],
        inputs: Mapping[str, object] | None = None,
        identities: Mapping[str, bytes | None] | None = None,
        *,
        job_id: str | None = None,
    ) -> JobOutcome:
        self.events.nodes.clear()
        request = JobRequest(
            job_id=job_id or f"job-{next(_numbers)}",
            prompt=prompt,
            prompt_digest=_digest(prompt),
            inputs=inputs or {},
            identities=identities or {},
        )
        return self.engine.execute(request, self.events)


def _digest(prompt: object) -> bytes:
    try:
        return hashlib.sha256(json.dumps(prompt, default=repr).encode()).digest()
    except RecursionError:
        return b"too deep for json"


@contextmanager
def engine_with(classes: Mapping[str, type], **options: Any) -> Generator[Harness]:
    """A started engine that knows the built-in nodes and ``classes``."""
    module = ModuleType(f"legion_test_nodes_{next(_numbers)}")
    module.NODE_CLASS_MAPPINGS = dict(classes)  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    engine = GraphEngine([module.__name__], **options)
    try:
        engine.start()
        yield Harness(engine)
    finally:
        engine.close()
        del sys.modules[module.__name__]


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def node_class(
    function: Any = None,
    *,
    required: Mapping[str, Any] | None = None,
    optional: Mapping[str, Any] | None = None,
    hidden: Mapping[str, str] | None = None,
    returns: tuple[Any, ...] = ("*",),
    output: bool = False,
    **attributes: Any,
) -> type:
    """A node class whose function is ``function(**inputs)``, without self."""

    def run(_self: object, **inputs: object) -> object:
        return function(**inputs) if function is not None else (None,) * len(returns)

    async def run_async(_self: object, **inputs: object) -> object:
        return await function(**inputs)

    declared = {
        "required": dict(required or {}),
        "optional": {} if optional is None else optional,
        "hidden": dict(hidden or {}),
    }
    is_async = attributes.pop("is_async", False)
    members: dict[str, Any] = {
        "INPUT_TYPES": classmethod(lambda _cls: declared),
        "RETURN_TYPES": returns,
        "FUNCTION": "run",
        "OUTPUT_NODE": output,
        "run": run_async if is_async else run,
        **attributes,
    }
    return type("TestNode", (), members)
