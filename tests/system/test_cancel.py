from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from legion_shm import DeadlineExceeded, Job, JobCancelled, Supervisor, WorkerInfo
from tests.system.support import (
    Gate,
    flow,
    gone,
    in_threads,
    node_started,
    only_worker,
    pid_of,
    run,
    spec,
    wait_for,
)

GRACE_S = 0.3


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    with Supervisor(cancel_grace_s=GRACE_S) as supervisor:
        run(supervisor, "TestPass")
        yield supervisor


def submit(legion: Supervisor, class_type: str, **options: object) -> Job:
    return legion.submit(flow(class_type, **options), spec=spec())


def cooperating(legion: Supervisor) -> Job:
    return submit(legion, "TestSleep", seconds=60.0, cooperate=True)


def ends_cancelled(job: Job) -> None:
    with pytest.raises(JobCancelled, match=job.id):
        job.result(timeout=20)
    assert job.state == "cancelled"
    assert [event.kind for event in job.events()][-1] == "cancelled"


def test_a_queued_job_is_cancelled_at_once_and_never_runs(legion: Supervisor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    running = legion.submit(gate.flow(), spec=spec())
    queued = legion.submit(flow("TestCounter"), inputs=[None], spec=spec())
    gate.entered()
    assert queued.state == "queued"
    assert queued.cancel()
    ends_cancelled(queued)
    assert [event.kind for event in queued.events()] == ["queued", "cancelled"]
    assert not running.done()
    gate.open()
    running.result(timeout=20)


def test_a_cooperating_node_is_interrupted_and_its_worker_kept(legion: Supervisor) -> None:
    worker = only_worker(legion)
    job = cooperating(legion)
    node_started(job)
    assert job.cancel()
    ends_cancelled(job)
    run(legion, "TestPass")
    assert only_worker(legion).pid == worker.pid


def test_a_job_is_interrupted_between_nodes(legion: Supervisor) -> None:
    worker = only_worker(legion)
    workflow = flow("TestUntilCancelled")
    workflow["next"] = {"class_type": "TestCounter", "inputs": {"value": ["node", 0]}}
    workflow["out"]["inputs"] = {"input_1": ["next", 0]}
    job = legion.submit(workflow, spec=spec())
    node_started(job)
    job.cancel()
    ends_cancelled(job)
    assert not any(getattr(event, "node_id", "") == "next" for event in job.events())
    run(legion, "TestPass")
    assert only_worker(legion).pid == worker.pid


def test_a_node_that_goes_on_costs_its_worker_after_the_grace(legion: Supervisor, tmp_path: Path) -> None:
    worker, gate, holding = only_worker(legion), Gate(tmp_path), tmp_path / "holding"
    for job, entered in (
        (legion.submit(gate.flow(), spec=spec()), gate.entered),
        (
            submit(legion, "TestHoldGil", seconds=60.0, entered=str(holding)),
            lambda: wait_for(holding.exists, "it holds the lock"),
        ),
    ):
        entered()
        cancelled_s = time.monotonic()
        job.cancel()
        ends_cancelled(job)
        assert time.monotonic() - cancelled_s >= GRACE_S
    assert gone(pid_of(worker))
    run(legion, "TestPass")
    assert only_worker(legion).pid != worker.pid, "the next job got a fresh one"


def test_a_job_is_cancelled_twice_and_after_its_end(legion: Supervisor) -> None:
    job = cooperating(legion)
    node_started(job)
    assert job.cancel()
    job.cancel()
    ends_cancelled(job)
    assert not job.cancel()
    done = submit(legion, "TestPass")
    done.result(timeout=20)
    assert not done.cancel()
    assert done.state == "done"
    assert run(legion, "TestPass", 5) == 5


def test_a_job_that_waits_for_its_worker_to_start_is_cancelled(legion: Supervisor) -> None:
    slow = spec(env={"POOL": "waits"})
    job = legion.submit(flow("TestPass"), spec=slow)
    job.cancel()
    ends_cancelled(job)
    legion.stop_workers(slow)


def test_cancelling_from_many_threads_at_any_moment_gives_each_job_one_end(legion: Supervisor) -> None:
    ends: list[tuple[str, str]] = []

    def churn(number: int) -> None:
        rng = random.Random(number)
        for _ in range(25):
            job = submit(legion, "TestSleep", seconds=rng.choice([0.0, 0.002, 0.01]), cooperate=True)
            if rng.random() < 0.5:
                node_started(job)
            for _ in range(rng.choice([0, 1, 3])):
                job.cancel()
            error = job.exception(timeout=60)
            assert error is None or isinstance(error, JobCancelled)
            kinds = [event.kind for event in job.events()]
            assert kinds.count("done") + kinds.count("cancelled") == 1
            assert kinds[-1] == job.state == ("done" if error is None else "cancelled")
            ends.append((job.id, job.state))

    in_threads(8, churn)
    assert len({job for job, _ in ends}) == 200
    assert {state for _, state in ends} == {"done", "cancelled"}
    assert len(legion.workers()) == 1


def test_a_deadline_ends_a_queued_and_a_running_job(legion: Supervisor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    blocker = legion.submit(gate.flow(), spec=spec())
    queued = legion.submit(flow("TestPass"), spec=spec(), deadline_s=0.05)
    with pytest.raises(DeadlineExceeded, match="while it waited"):
        queued.result(timeout=20)
    assert queued.state == "failed"
    gate.open()
    blocker.result(timeout=20)
    worker = only_worker(legion)
    running = legion.submit(flow("TestSleep", seconds=60.0, cooperate=True), spec=spec(), deadline_s=0.3)
    with pytest.raises(DeadlineExceeded, match="while it ran") as caught:
        running.result(timeout=20)
    assert isinstance(caught.value, TimeoutError)
    assert only_worker(legion).pid == worker.pid
    assert legion.submit(flow("TestPass"), spec=spec(), deadline_s=60).exception(timeout=20) is None


def test_a_result_that_is_not_there_in_time_leaves_the_job_alone(legion: Supervisor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    job = legion.submit(gate.flow(), inputs=["value"], spec=spec())
    gate.entered()
    with pytest.raises(TimeoutError, match="it goes on"):
        job.result(timeout=0.01)
    with pytest.raises(TimeoutError):
        job.exception(timeout=0)
    assert job.state == "running"
    gate.open()
    assert job.result(timeout=20)["output_1"] == "value"


def test_closing_cancels_what_runs_and_what_waits(tmp_path: Path) -> None:
    ended: list[Job] = []
    with Supervisor(cancel_grace_s=0.2, stop_grace_s=0.3) as legion:
        stubborn = submit(legion, "TestSleep", seconds=60.0)
        waiting = [submit(legion, "TestPass") for _ in range(5)]
        node_started(stubborn)
        worker: WorkerInfo = only_worker(legion)
        closing = threading.Thread(target=legion.close)
        closing.start()
        ended = [stubborn, *waiting]
        closing.join(timeout=20)
    assert gone(pid_of(worker))
    for job in ended:
        ends_cancelled(job)
    assert not ended[0].cancel()


def test_a_cancelled_start_leaves_no_process() -> None:
    with Supervisor() as legion:
        job = submit(legion, "TestPass")
        wait_for(lambda: legion.workers() and only_worker(legion).pid, "the worker is starting")
        pid = pid_of(only_worker(legion))
    ends_cancelled(job)
    assert gone(pid)
