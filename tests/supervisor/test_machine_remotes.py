"""Jobs that must run where an object of theirs lives, and the workers that hold such objects."""

from __future__ import annotations

from legion_shm.errors import JobCancelled, UnsupportedValue, WorkerLost
from legion_shm.supervisor.stimuli import (
    Action,
    AskStop,
    JobSubmitted,
    RemotesChanged,
    ResolveJob,
    SendJob,
    SpawnWorker,
    WarmUpRequested,
)
from tests.supervisor.test_machine import Driver, ended


def pinned(legion: Driver, job: str, worker: str, pool: str = "p") -> list[Action]:
    return legion.do(JobSubmitted(job, pool, None, 0, worker))


def two_idle() -> Driver:
    legion = Driver()
    legion.pool(max_workers=2)
    legion.do(WarmUpRequested("p", 2))
    legion.ready("w1")
    legion.ready("w2")
    return legion


def test_a_job_runs_in_the_worker_that_has_its_object_and_no_other() -> None:
    legion = two_idle()
    assert pinned(legion, "a", "w2") == [SendJob("w2", "a", 1)]
    assert pinned(legion, "b", "w2") == [], "w1 is idle and does not have it"
    assert legion.submit("c") == [SendJob("w1", "c", 1)], "others overtake it"
    assert legion.done("w2", "a") == [ResolveJob("a", "done", None), SendJob("w2", "b", 1)]


def test_a_job_whose_object_is_gone_with_its_worker_is_lost() -> None:
    legion = two_idle()
    pinned(legion, "a", "w2")
    pinned(legion, "waits", "w2")
    actions = legion.dies("w2")
    ended(actions, "waits", "lost", WorkerLost)
    ended(pinned(legion, "late", "w2"), "late", "lost", WorkerLost)


def test_an_object_of_another_spec_is_refused() -> None:
    legion = two_idle()
    legion.pool("q")
    ended(pinned(legion, "a", "w1", "q"), "a", "failed", UnsupportedValue)


def test_a_waiting_job_of_one_worker_starts_no_other() -> None:
    legion = Driver()
    legion.pool(max_workers=3)
    legion.submit("a")
    legion.ready("w1")
    assert pinned(legion, "b", "w1") == []
    ended(legion.cancel("b"), "b", "cancelled", JobCancelled)
    assert legion.submit("c") == [SpawnWorker("w2", "p")], "the place that b had is given back"


def test_a_worker_that_holds_an_object_is_not_stopped_to_make_room_until_it_is_dropped() -> None:
    legion = Driver(max_workers=1)
    legion.running()
    legion.done("w1", "j")
    legion.do(RemotesChanged("w1", 1))
    legion.pool("q")
    assert legion.submit("k", "q") == []
    assert legion.do(RemotesChanged("w1", -1)) == [AskStop("w1")]
    assert legion.dies("w1") == [SpawnWorker("w2", "q")]


def test_a_worker_that_holds_an_object_does_not_hand_its_place_on() -> None:
    legion = Driver(max_workers=1)
    legion.running("b0")
    legion.pool("q")
    legion.submit("patient", "q")
    legion.do(RemotesChanged("w1", 1))
    for number in range(20):
        legion.now += 1
        legion.submit(f"b{number + 1}")
        assert AskStop("w1") not in legion.done("w1", f"b{number}")
