"""The nodes that answer in Legion's worker: the same `Responder` that every other way has.

Owns the node classes; `ours` submits them. None is ever cached, so that every job is a real one, and none
writes into anything that it was given or has returned. A worker has one responder, since one thread measures
at a time.
"""

from __future__ import annotations

import mmap
from dataclasses import asdict
from typing import Any, ClassVar

from legion_shm.native_bench import payload
from legion_shm.native_bench.payload import Order
from legion_shm.native_bench.peers.base import Responder

__all__ = ["NODE_CLASS_MAPPINGS"]


class _Responder(Responder):
    """``private``: the answer lies in memory that no allocator of this process can have put into an arena."""

    def prepare_as(self, order: Order, *, private: bool) -> None:
        if not private or order.device != "cpu":
            self.prepare(order)
            return
        import torch

        memory: Any = torch.frombuffer(mmap.mmap(-1, order.nbytes), dtype=torch.float32)
        self._order = order
        self._reply = payload.make(order, reply=True, into=memory.reshape(order.shape))


_responder = _Responder()


class _BenchNode:
    """``value`` is what the importer gave."""

    RETURN_TYPES: tuple[str, ...] = ("*",)
    FUNCTION = "run"
    CATEGORY = "Legion/benchmark"
    KEEP_OUTPUTS: ClassVar[bool] = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {}, "optional": {"value": ("*", {"forceInput": True})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: object) -> float:  # noqa: N802 - the protocol's name
        return float("nan")


class BenchPrepare(_BenchNode):
    """Takes the order, as a dict; with ``private`` in it, too."""

    WRITES_SHARED = False

    def run(self, value: dict[str, Any] | None = None) -> tuple[object]:
        plain = dict(value or {})
        private = bool(plain.pop("private", True))
        _responder.prepare_as(Order.from_plain(plain), private=private)
        return (True,)


class BenchExchange(_BenchNode):
    """Uses its input and gives the prepared answer."""

    WRITES_SHARED = False

    def run(self, value: Any = None) -> tuple[object]:
        return (_responder.take(value),)


class BenchPassOn(_BenchNode):
    """Uses its input and gives it on."""

    WRITES_SHARED = False

    def run(self, value: Any = None) -> tuple[object]:
        _responder.take(value)
        return (value,)


class BenchSpoil(_BenchNode):
    """As BenchPassOn, but gives a copy in which one value is changed."""

    WRITES_SHARED = False

    def run(self, value: Any = None) -> tuple[object]:
        _responder.take(value)
        spoiled = value.clone()
        (spoiled.numpy() if spoiled.is_cpu else spoiled).reshape(-1)[-1] += 1
        return (spoiled,)


class BenchProduce(_BenchNode):
    """Gives the prepared answer; has no input."""

    WRITES_SHARED = False

    def run(self, value: Any = None) -> tuple[object]:
        return (_responder.give(),)


class BenchFinish(_BenchNode):
    """Checks what came, lets go of it, and says what it saw."""

    WRITES_SHARED = False

    def run(self, value: object = None) -> tuple[object]:
        return (asdict(_responder.finish()),)


class BenchTouch(_BenchNode):
    """Uses one word of each page of its input and gives their sum; needs no order beforehand."""

    WRITES_SHARED = False

    def run(self, value: Any = None) -> tuple[object]:
        return (payload.use(value, "touch"),)


class BenchEmpty(_BenchNode):
    """Nothing: what a job costs that moves nothing."""

    WRITES_SHARED = False

    def run(self, value: object = None) -> tuple[object]:
        return (value,)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        BenchPrepare,
        BenchExchange,
        BenchPassOn,
        BenchSpoil,
        BenchProduce,
        BenchFinish,
        BenchTouch,
        BenchEmpty,
    )
}
