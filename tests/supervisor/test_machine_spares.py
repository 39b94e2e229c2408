from __future__ import annotations

from collections.abc import Callable

import pytest

from legion_shm.supervisor.stimuli import (
    AskStop,
    CancelRequested,
    CloseRequested,
    SendJob,
    SpawnWorker,
    StopRequested,
    Tick,
    WarmUpRequested,
    WorkerExited,
)
from tests.supervisor.test_machine import Driver


def spawned(actions: object) -> list[str]:
    return [action.worker for action in actions if isinstance(action, SpawnWorker)]  # type: ignore[attr-defined]


def sent(actions: object) -> list[tuple[str, str]]:
    return [(action.worker, action.job) for action in actions if isinstance(action, SendJob)]  # type: ignore[attr-defined]


def asked(actions: object) -> list[str]:
    return [action.worker for action in actions if isinstance(action, AskStop)]  # type: ignore[attr-defined]


def working(driver: Driver, *, spares: int = 1, **fields: object) -> None:
    """A pool whose first worker runs job a, with its spares ready."""
    driver.pool(warm_spares=spares, **fields)  # type: ignore[arg-type]
    assert spawned(driver.submit("a"))[0] == "w1"
    assert sent(driver.ready("w1")) == [("w1", "a")]
    for number in range(2, 2 + spares):
        assert sent(driver.ready(f"w{number}")) == []


def gone(driver: Driver, worker: str) -> object:
    return driver.do(WorkerExited(worker, 0, "exited with code 0", ()))


LEAVES: dict[str, Callable[[Driver], object]] = {
    "is lost with its job": lambda driver: driver.dies("w1"),
    "has run its last job": lambda driver: driver.done("w1", "a"),
}


@pytest.mark.parametrize("how", LEAVES)
def test_a_spare_takes_the_place_of_a_worker_that(how: str) -> None:
    driver = Driver()
    working(driver, max_jobs_per_life=1)
    driver.submit("b")
    actions = LEAVES[how](driver)
    assert sent(actions) == [("w2", "b")]
    assert spawned(actions) == ["w3"], "and there is a new spare behind it"


def test_a_spare_takes_the_job_that_waited_for_a_worker_that_does_not_end_its_cancelled_one() -> None:
    driver = Driver(cancel_grace_s=5.0)
    working(driver)
    driver.cancel("a")
    assert sent(driver.submit("b")) == []
    assert sent(driver.later(5.0)) == [("w2", "b")], "before the process of the other has ended"


@pytest.mark.parametrize("spares", [0, 1, 3])
def test_the_first_job_starts_its_worker_and_so_many_spares(spares: int) -> None:
    driver = Driver()
    driver.pool(warm_spares=spares)
    assert len(spawned(driver.submit("a"))) == 1 + spares


def test_a_pool_without_a_job_has_no_spares() -> None:
    driver = Driver()
    driver.pool(warm_spares=2)
    assert spawned(driver.do(WarmUpRequested("p", 1))) == ["w1"]
    assert spawned(driver.ready("w1")) == []


def test_never_more_jobs_run_at_a_time_than_max_workers() -> None:
    driver = Driver()
    working(driver, spares=2)
    assert sent(driver.submit("b")) == []
    assert sent(driver.submit("c")) == []
    assert sent(driver.done("w1", "a")) == [("w1", "b")]
    assert spawned(driver.done("w1", "b")) == []


def test_jobs_one_after_another_each_find_a_worker_ready() -> None:
    driver = Driver()
    working(driver, max_jobs_per_life=1)
    assert spawned(driver.done("w1", "a")) == ["w3"], "one to wait for work, and its spare"
    gone(driver, "w1")
    driver.ready("w3")
    assert sent(driver.submit("b")) == [("w2", "b")]
    assert spawned(driver.done("w2", "b")) == ["w4"]
    assert sent(driver.submit("c")) == [("w3", "c")]


def test_idle_workers_are_the_spares_of_those_that_work() -> None:
    driver = Driver()
    driver.pool(max_workers=3, warm_spares=1)
    assert len(spawned(driver.do(WarmUpRequested("p", 3)))) == 3
    for worker in ("w1", "w2", "w3"):
        driver.ready(worker)
    assert spawned(driver.submit("a")) == []
    assert spawned(driver.submit("b")) == []
    assert spawned(driver.submit("c")) == ["w4"]


def test_spares_get_what_the_supervisor_has_left() -> None:
    driver = Driver(max_workers=2)
    driver.pool(warm_spares=3)
    assert len(spawned(driver.submit("a"))) == 2


def test_a_spare_makes_room_for_another_specs_job_and_comes_back_when_there_is_room() -> None:
    driver = Driver(max_workers=2)
    working(driver)
    driver.submit("b")  # waits for w1, and is no reason to keep the spare
    driver.pool("q")
    assert asked(driver.submit("x", "q")) == ["w2"]
    assert spawned(gone(driver, "w2")) == ["w3"]
    driver.ready("w3")
    assert driver.machine.workers["w3"].pool == "q"
    assert asked(driver.do(Tick())) == []
    assert spawned(driver.done("w3", "x")) == []
    assert asked(driver.do(StopRequested("q"))) == ["w3"]
    assert spawned(gone(driver, "w3")) == ["w4"]
    assert driver.machine.workers["w4"].pool == "p"


def test_a_spare_that_an_idle_spec_gave_up_comes_back_when_there_is_room() -> None:
    driver = Driver(max_workers=2)
    working(driver)
    driver.done("w1", "a")
    driver.pool("q")
    (given_up,) = asked(driver.submit("x", "q"))
    assert spawned(gone(driver, given_up)) == ["w3"]
    driver.ready("w3")
    driver.done("w3", "x")
    driver.do(StopRequested("q"))
    assert spawned(gone(driver, "w3")) == ["w4"]
    assert driver.machine.workers["w4"].pool == "p"


def test_no_worker_is_ended_for_the_sake_of_a_spare() -> None:
    driver = Driver(max_workers=2)
    driver.pool("q")
    driver.submit("x", "q")
    driver.ready("w1")
    driver.done("w1", "x")
    driver.pool(warm_spares=1)
    assert spawned(driver.submit("a")) == ["w2"]
    driver.ready("w2")
    assert asked(driver.submit("b")) == [], "one runs at a time: the second worker would be a spare"


def test_a_spare_that_dies_is_replaced_after_the_backoff() -> None:
    driver = Driver()
    working(driver)
    assert spawned(driver.dies("w2")) == []
    due_s = driver.machine.next_deadline_s()
    assert due_s == driver.now + 0.5
    driver.now += 0.5
    assert spawned(driver.do(Tick())) == ["w3"]


def test_spares_that_can_not_start_leave_the_worker_at_its_job() -> None:
    driver = Driver()
    driver.pool(warm_spares=1)
    driver.submit("a")
    driver.ready("w1")
    driver.refuses("w2")
    driver.now += 0.5
    assert spawned(driver.do(Tick())) == ["w3"]
    driver.refuses("w3")
    driver.now += 10
    assert spawned(driver.do(Tick())) == [], "the same reason twice"
    assert driver.machine.jobs["a"].state == "running"
    driver.submit("b")
    assert sent(driver.done("w1", "a")) == [("w1", "b")]


def test_a_spare_is_not_idle_while_others_work_and_then_has_its_time() -> None:
    driver = Driver()
    working(driver, idle_timeout_s=10.0)
    driver.now += 100
    assert driver.machine.next_deadline_s() is None or driver.machine.next_deadline_s() > driver.now  # type: ignore[operator]
    assert asked(driver.do(Tick())) == []
    driver.done("w1", "a")
    assert driver.machine.next_deadline_s() == driver.now + 10
    driver.now += 9.9
    assert asked(driver.do(Tick())) == []
    driver.now += 0.1
    assert sorted(asked(driver.do(Tick()))) == ["w1", "w2"]
    for worker in ("w1", "w2"):
        assert spawned(gone(driver, worker)) == []
    assert driver.machine.next_deadline_s() is None


def test_a_pool_that_has_been_idle_for_too_long_starts_no_spares_any_more() -> None:
    driver = Driver()
    working(driver, idle_timeout_s=10.0, max_jobs_per_life=1)
    driver.done("w1", "a")
    gone(driver, "w1")
    driver.now += 3
    driver.ready("w3")  # later than the other, so it has been idle for less
    driver.now += 7
    assert asked(driver.do(Tick())) == ["w2"]
    assert spawned(gone(driver, "w2")) == []
    driver.now += 3
    assert asked(driver.do(Tick())) == ["w3"]
    assert spawned(gone(driver, "w3")) == []


def test_idle_workers_beyond_the_spares_have_their_own_time() -> None:
    driver = Driver()
    driver.pool(max_workers=3, warm_spares=1, idle_timeout_s=10.0)
    driver.do(WarmUpRequested("p", 3))
    for worker in ("w1", "w2", "w3"):
        driver.ready(worker)
    driver.submit("a")
    driver.now += 10
    assert len(asked(driver.do(Tick()))) == 1
    left = [worker.id for worker in driver.machine.workers.values() if worker.state == "stopping"]
    assert spawned(gone(driver, left[0])) == []


def test_workers_that_were_asked_to_stop_get_no_spares() -> None:
    driver = Driver()
    working(driver)
    assert asked(driver.do(StopRequested("p"))) == ["w2"]
    assert spawned(gone(driver, "w2")) == []
    assert asked(driver.done("w1", "a")) == ["w1"]
    assert spawned(gone(driver, "w1")) == []
    assert len(spawned(driver.submit("b"))) == 2, "jobs that come later start new ones"


def test_closing_ends_spares_too() -> None:
    driver = Driver()
    working(driver)
    assert "w2" in asked(driver.do(CloseRequested()))
    assert spawned(gone(driver, "w2")) == []


def test_a_cancelled_job_leaves_its_spares_to_the_next() -> None:
    driver = Driver()
    working(driver)
    driver.do(CancelRequested("a"))
    driver.dies("w1")
    assert sent(driver.submit("b")) == [("w2", "b")]
