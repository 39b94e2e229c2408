"""When segments of ordinary pages are tried to be made huge ones: at once, and rarely if that is refused."""

from __future__ import annotations

import itertools
import logging

import pytest

from legion_shm.supervisor import master_memory
from legion_shm.supervisor.master_memory import MasterMemory
from legion_shm.transport.segment import Segment

MIB = 1 << 20


class Stubborn:
    """Stands for a segment of so many ``parts``: ``refusals`` times it stays as it is."""

    def __init__(self, refusals: int, error: OSError | None = None, parts: int = 1) -> None:
        self.nbytes, self.ordinary, self.tried = MIB, True, 0
        self._refusals, self._error, self._parts = refusals, error, parts

    def condense(self) -> bool:
        self.tried += 1
        if self._error is not None:
            raise self._error
        if self.tried <= self._refusals:
            return False
        self._parts -= 1
        self.ordinary = self._parts > 0
        return True

    def close(self) -> None:
        pass


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(master_memory, "monotonic_s", clock)
    return clock


def memory_with(monkeypatch: pytest.MonkeyPatch, segment: Stubborn) -> MasterMemory:
    def create(*_: object, **__: object) -> Segment:
        return segment  # type: ignore[return-value]

    monkeypatch.setattr(master_memory, "create_segment", create)
    memory = MasterMemory(
        kind="portable",
        name_prefix="legion-c-",
        inline_max_bytes=1,
        quota_bytes=8 * MIB,
        full_wait_s=1.0,
        segment_added=lambda *_: None,
        segments_retired=lambda *_: None,
        resident=lambda _: None,
        remotes_dropped=lambda *_: None,
    )
    memory.create(memory.arena_id, MIB)
    return memory


def test_it_is_done_once_and_not_again(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    segment = Stubborn(0)
    memory = memory_with(monkeypatch, segment)
    assert memory.ordinary
    memory.condense()
    assert (segment.tried, memory.ordinary) == (1, False)
    clock.now_s += 1000.0
    memory.condense()
    assert (segment.tried, memory.ordinary) == (1, False)
    memory.close()


def test_a_large_segment_is_done_part_by_part(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    segment = Stubborn(0, parts=20)
    memory = memory_with(monkeypatch, segment)
    for number in range(20):
        assert (segment.tried, memory.ordinary) == (number, True)
        memory.condense()
    assert (segment.tried, memory.ordinary) == (20, False)
    memory.close()


def test_what_is_refused_is_tried_again_ever_more_rarely_and_then_left(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    segment = Stubborn(100)
    memory = memory_with(monkeypatch, segment)
    times_s: list[float] = []
    for _ in range(10_000):
        if memory.ordinary:
            times_s.append(clock.now_s - 1000.0)
        memory.condense()
        clock.now_s += 0.1
    assert segment.tried == len(times_s) == 6
    gaps_s = [after - before for before, after in itertools.pairwise(times_s)]
    assert gaps_s == pytest.approx([0.1, 1.0, 10.0, 60.0, 300.0], abs=0.2)
    assert not memory.ordinary
    memory.close()


def test_a_segment_that_cannot_even_be_tried_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "legion_shm.supervisor")
    segment = Stubborn(0, OSError(24, "Too many open files"))
    memory = memory_with(monkeypatch, segment)
    memory.condense()
    assert (segment.tried, memory.ordinary) == (1, False)
    assert "Too many open files" in caplog.text
    memory.close()
