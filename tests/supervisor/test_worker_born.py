"""Room for tensors that are born in a worker's arena: how much of the quota they may have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from legion_shm.supervisor.worker_born import QUOTA_DIVISOR, BornBlocks
from legion_shm.transport.handles import BlockHandle

MIB = 1 << 20


class FakeShim:
    """Nothing has been born, and as much was wanted as is said."""

    def __init__(self, missed_bytes: int, missed_largest: int) -> None:
        self._numbers = SimpleNamespace(missed_bytes=missed_bytes, missed_largest=missed_largest)

    def reserve(self, nbytes: int) -> bool:
        return True

    def numbers(self) -> SimpleNamespace:
        return self._numbers

    def find(self, address: int) -> None:
        return None

    def add(self, segment_id: int, segment: object) -> bool:
        return True


def room_made(quota_bytes: int, sent_bytes: int) -> list[int]:
    """The sizes of the regions that are asked for, while much more is wanted than there is."""
    asked: list[int] = []

    def grow(nbytes: int) -> tuple[int, Any]:
        asked.append(nbytes)
        return len(asked), SimpleNamespace(nbytes=nbytes)

    def publish(segment: int, offset: int, nbytes: int) -> BlockHandle:
        raise AssertionError("nothing was born")

    shim: Any = FakeShim(100 * quota_bytes, sent_bytes)
    born = BornBlocks(shim, quota_bytes=quota_bytes, publish=publish, grow=grow)
    for _ in range(10):
        assert born.adopt(0x1000, sent_bytes) is None
        born.make_room()
    assert born.total_bytes == sum(asked)
    return asked


def test_what_is_born_leaves_most_of_the_quota_to_copies() -> None:
    asked = room_made(64 * MIB, 2 * MIB)
    assert asked, "room is made"
    assert sum(asked) <= 64 * MIB // QUOTA_DIVISOR


def test_a_tensor_that_is_too_large_for_that_part_gets_no_room() -> None:
    assert room_made(16 * MIB, 4 * MIB) == [4 * MIB]
    assert room_made(16 * MIB, 6 * MIB) == []
