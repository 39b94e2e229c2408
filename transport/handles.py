"""The handle: how one process names a block of shared memory to another.

Owns the handle's fields, their ranges and their form on the wire. It never touches memory: a handle
is a claim by whoever sent it, and :meth:`BlockHandle.check_within` is asked before any byte behind it
is read.
"""

from __future__ import annotations

import mmap
import secrets
from dataclasses import dataclass
from operator import le
from typing import cast

from legion_shm.errors import InvalidHandle

__all__ = ["BLOCK_ALIGN", "BlockHandle", "new_arena_id", "round_up"]

BLOCK_ALIGN = max(mmap.PAGESIZE, mmap.ALLOCATIONGRANULARITY)
"""Blocks start and end on whole pages, so that a page written privately belongs to one block only; on
Windows a view can start only at the coarser allocation granularity."""

_U32_MAX = 2**32 - 1
_U64_MAX = 2**64 - 1
_LIMITS = (
    ("arena", 0, _U64_MAX),
    ("segment", 0, _U32_MAX),
    ("offset", 0, _U64_MAX),
    ("nbytes", 1, _U64_MAX),
    ("generation", 0, _U64_MAX),
)
_LOWS, _HIGHS = tuple(low for _, low, _ in _LIMITS), tuple(high for _, _, high in _LIMITS)
_INTS = {int}


def round_up(nbytes: int, align: int = BLOCK_ALIGN) -> int:
    """The smallest multiple of ``align`` that is not less than ``nbytes``."""
    return -(-nbytes // align) * align


def new_arena_id() -> int:
    """A random 64-bit number for a new arena; a restarted process's arena has another one."""
    return secrets.randbits(64)


@dataclass(frozen=True, slots=True)
class BlockHandle:
    """One block of one life: ``nbytes`` of payload at ``offset`` of a segment of an arena.

    ``arena`` is random and unique to one process's life; ``generation`` is never used twice in an
    arena, so a handle to a block that has been freed can't be taken for its successor.
    """

    arena: int
    segment: int
    offset: int
    nbytes: int
    generation: int

    @property
    def span(self) -> int:
        """Bytes of the whole pages that the block occupies."""
        return round_up(self.nbytes)

    def to_wire(self) -> list[int]:
        return [self.arena, self.segment, self.offset, self.nbytes, self.generation]

    @classmethod
    def from_wire(cls, obj: object) -> BlockHandle:
        """The handle that :meth:`to_wire` described. Anything else raises `InvalidHandle`."""
        if type(obj) is not list and type(obj) is not tuple:
            raise InvalidHandle(f"a block handle is a list of 5 integers, not a {type(obj).__name__}")
        items = cast("list[object] | tuple[object, ...]", obj)
        if len(items) != len(_LIMITS):
            raise InvalidHandle(f"a block handle has {len(_LIMITS)} fields, not {len(items)}")
        if set(map(type, items)) == _INTS:
            numbers = cast("list[int]", items)
            if all(map(le, _LOWS, numbers)) and all(map(le, numbers, _HIGHS)):
                return cls(*numbers)
        name, item = next(
            (name, item)
            for (name, low, high), item in zip(_LIMITS, items, strict=True)
            if type(item) is not int or not low <= item <= high
        )
        if type(item) is not int:
            raise InvalidHandle(f"block handle: {name} is a {type(item).__name__}, not an integer")
        raise InvalidHandle(f"block handle: {name} {item} is out of range")

    def check_within(self, segment_nbytes: int) -> None:
        """Raise `InvalidHandle` unless the block lies, aligned, in a segment of that many bytes."""
        if self.nbytes <= 0 or self.offset < 0:
            raise InvalidHandle(f"{self} has no extent")
        if self.offset % BLOCK_ALIGN:
            raise InvalidHandle(f"{self}: the offset is not a multiple of {BLOCK_ALIGN}")
        if self.nbytes > segment_nbytes or self.offset > segment_nbytes - self.nbytes:
            raise InvalidHandle(f"{self} ends outside of its segment of {segment_nbytes} bytes")
