"""Which memory is encoding or decoding a value just now, for codecs that keep something in shared memory.

A reducer may place what it will send again, as a model's weights, into a block of its own once
(`BlockStore.resident_buffer`), and send that block's tensor each time: by handle, with nothing copied.
"""

from __future__ import annotations

from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol

__all__ = [
    "Placing",
    "Residence",
    "WeightsWay",
    "current_residence",
    "note_placed",
    "residing",
    "weights_go",
    "weights_way",
]

WeightsWay = Literal["auto", "reference", "recipe"]
"""How the weights of models go: by a block of shared memory, by the call that loaded them, or the cheaper."""


class Residence(Protocol):
    """The shared memory of this process, as far as such a codec needs it."""

    def resident_buffer(self, nbytes: int) -> Any:
        """A writable ctypes array of ``nbytes`` in the arena, whose block lives as long as it does.

        Raises `ArenaFull`.
        """
        ...

    def room_bytes(self) -> int:
        """How much more fits into the arena now, as far as its quota goes."""
        ...

    @property
    def forgotten(self) -> deque[str]:
        """Takes the keys of what was placed here to be sent often and is gone. Appended to by finalizers."""
        ...


_current: ContextVar[Residence | None] = ContextVar("legion_residence", default=None)


def current_residence() -> Residence | None:
    """The memory whose `pack` or `unpack` called this; None outside of them."""
    return _current.get()


_way: ContextVar[WeightsWay] = ContextVar("legion_weights_way", default="reference")


def weights_way() -> WeightsWay:
    """How what is encoded just now may send the weights of models."""
    return _way.get()


class weights_go:  # noqa: N801 - used as a function, as is `residing`; generators take three times as long
    """Let what is encoded inside send the weights of models that way."""

    __slots__ = ("_token", "_wanted")

    def __init__(self, way: WeightsWay) -> None:
        self._wanted: WeightsWay = way

    def __enter__(self) -> None:
        self._token = _way.set(self._wanted)

    def __exit__(self, *exception: object) -> None:
        _way.reset(self._token)


@dataclass
class Placing:
    """What reducers copied into blocks of their own, for the figures of the value that is being encoded."""

    copied_bytes: int = 0
    copies: int = 0


_placing: ContextVar[Placing | None] = ContextVar("legion_placing", default=None)


def note_placed(nbytes: int) -> None:
    """One more copy into a resident block."""
    placing = _placing.get()
    if placing is not None:
        placing.copied_bytes += nbytes
        placing.copies += 1


class residing:  # noqa: N801
    """Let what is encoded or decoded inside find this memory, if it can hold anything for longer."""

    __slots__ = ("_memory", "_tokens")

    def __init__(self, memory: object) -> None:
        self._memory: Any = memory if hasattr(memory, "resident_buffer") else None

    def __enter__(self) -> Placing:
        placing = Placing()
        self._tokens = _current.set(self._memory), _placing.set(placing)
        return placing

    def __exit__(self, *exception: object) -> None:
        memory_token, placing_token = self._tokens
        _current.reset(memory_token)
        _placing.reset(placing_token)
