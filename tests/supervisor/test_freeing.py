"""What is collected when a worker frees, and when; which answer belongs to which request."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest

from legion_shm.supervisor import freeing
from legion_shm.supervisor.freeing import FreedMemory, Freeing, IdleHeap
from tests import needs


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def frozen() -> Iterator[weakref.ref[Cycle]]:
    """Garbage that a start has frozen."""
    garbage = weakref.ref(Cycle())
    gc.freeze()
    yield garbage
    gc.unfreeze()


@pytest.fixture
def fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freeing, "_shared", False)
    freeing.forked()


def test_what_a_start_froze_is_collected_before_memory_is_given_up(frozen: weakref.ref[Cycle]) -> None:
    seen: list[object] = []
    freeing.measured(lambda: None, lambda: seen.append(frozen()))
    assert seen == [None]
    assert gc.get_freeze_count() > 0


@pytest.mark.usefixtures("fork")
def test_a_fork_looks_at_nothing_that_it_shares_and_freezes_nothing_of_its_own(
    frozen: weakref.ref[Cycle],
) -> None:
    own: list[weakref.ref[Cycle]] = []
    freeing.measured(lambda: own.append(weakref.ref(Cycle())), lambda: None)
    assert frozen() is not None, "its pages would be copied"
    freeing.freeze()
    count = gc.get_freeze_count()
    freeing.freeze()
    assert gc.get_freeze_count() == count
    assert own[0]() is None


def test_an_answer_to_an_earlier_request_is_none_to_this_one() -> None:
    asked = Freeing()
    asked.sent_to({"w1": 2})
    asked.answered(FreedMemory("w1", 1, 0), 1)
    assert not asked.wait(0)
    asked.answered(FreedMemory("w1", 2, 0), 2)
    assert asked.wait(0)
    assert asked.freed == (FreedMemory("w1", 2, 0),)


def test_workers_that_were_not_asked_or_have_ended_are_not_waited_for() -> None:
    asked = Freeing()
    assert not asked.wait(0), "it was sent to nobody yet"
    asked.sent_to({"w1": 1, "w2": 1})
    asked.answered(FreedMemory("w3", 1, 0), 1)
    asked.answered(FreedMemory("w1", 4, 0), 1)
    assert not asked.wait(0)
    asked.forget_all_but(["w1"])
    assert asked.wait(0)
    assert asked.freed == (FreedMemory("w1", 4, 0),)


class FakeCuda:
    """As much of torch.cuda as giving back takes: 300 bytes are kept, 200 of them for nobody."""

    def __init__(self, *, opened: bool = True) -> None:
        self.opened, self.reserved = opened, 300

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return self.opened

    def device_count(self) -> int:
        return 1

    def memory_reserved(self, device: int) -> int:
        return self.reserved + device

    def empty_cache(self) -> None:
        assert self.opened, "this would open the GPU"
        self.reserved = 100


@pytest.mark.parametrize(("opened", "came_back"), [(True, 200), (False, 0)])
def test_what_torch_keeps_of_a_gpu_is_given_back_and_counted_and_no_gpu_is_opened_for_it(
    monkeypatch: pytest.MonkeyPatch, opened: bool, came_back: int
) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=FakeCuda(opened=opened)))
    assert freeing.measured(lambda: None, lambda: None)[1] == came_back


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []
    monkeypatch.setattr(freeing, "trim_heap", lambda: done.append("heap"))
    monkeypatch.setattr(freeing, "_free_matrix_buffers", lambda: done.append("buffers"))
    return done


def test_a_heap_is_given_back_once_after_a_job_and_a_pause(trims: list[str]) -> None:
    heap = IdleHeap(10.0)
    assert heap.due_in_s(0.0) is None
    assert not heap.give_back(0.0), "there was no job"
    heap.used(100.0)
    assert heap.due_in_s(104.0) == 6.0
    assert not heap.give_back(109.9)
    assert not trims
    assert heap.give_back(110.0)
    assert trims == ["buffers", "heap"]
    assert heap.due_in_s(111.0) is None
    assert not heap.give_back(200.0), "nothing was used since"


def test_a_heap_stays_while_jobs_follow_each_other(trims: list[str]) -> None:
    heap = IdleHeap(10.0)
    for now_s in (0.0, 9.0, 18.0):
        heap.used(now_s)
    assert not heap.give_back(27.9)
    assert not trims


def test_a_heap_is_given_back_right_after_a_job_that_took_long(trims: list[str]) -> None:
    heap = IdleHeap(10.0)
    heap.used(100.0, IdleHeap.LONG_JOB_S)
    assert heap.due_in_s(100.0) == 0.0
    assert heap.give_back(100.0)
    assert trims == ["buffers", "heap"]
    heap.used(101.0, IdleHeap.LONG_JOB_S / 2)
    assert heap.due_in_s(101.0) == 10.0


@needs.linux
def test_what_is_free_in_a_heap_goes_back_to_the_system() -> None:
    process = psutil.Process()
    blocks = [bytearray(100_000) for _ in range(1000)]  # below the size that is mapped alone
    last = bytearray(100_000)  # so that the heap does not simply shrink
    del blocks
    before = process.memory_info().rss
    heap = IdleHeap(1.0)
    heap.used(0.0)
    assert heap.give_back(1.0)
    assert before - process.memory_info().rss > 50_000_000
    del last
