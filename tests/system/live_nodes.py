"""Node classes around an object that can't leave its process; test_remote.py runs them in workers."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any, ClassVar


class Engine:
    """Holds a lock, so nothing can send it."""

    alive: ClassVar[weakref.WeakSet[Engine]] = weakref.WeakSet()

    def __init__(self, name: str) -> None:
        self.name, self.lock, self.runs = name, threading.Lock(), 0
        Engine.alive.add(self)

    def __repr__(self) -> str:
        return f"Engine({self.name})"


class _Node:
    FUNCTION = "run"
    CATEGORY = "test"
    RETURN_TYPES: tuple[str, ...] = ("*",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"value": ("*",)}}

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:  # noqa: N802 - the protocol's name
        return float("nan")


class MakeEngine(_Node):
    def run(self, value: Any) -> tuple[Any]:
        return (Engine(str(value)),)


class MakeTwo(_Node):
    """A dict with one engine twice and another one."""

    def run(self, value: Any) -> tuple[Any]:
        engine = Engine(str(value))
        return ({"a": engine, "b": [engine], "c": Engine("other"), "text": "plain"},)


class RunEngine(_Node):
    RETURN_TYPES = ("*", "*")

    def run(self, value: Any) -> tuple[Any, Any]:
        value.runs += 1
        return f"{type(value).__name__} {value.name} {value.runs}", value


class CountEngines(_Node):
    def run(self, value: Any) -> tuple[int]:
        gc.collect()
        return (len(Engine.alive),)


NODE_CLASS_MAPPINGS = {
    "MakeEngine": MakeEngine,
    "MakeTwo": MakeTwo,
    "RunEngine": RunEngine,
    "CountEngines": CountEngines,
}
