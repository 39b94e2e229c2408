from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from legion_shm import JobFailed, JobRetrying, Supervisor, WorkerLost
from tests import needs
from tests.system.support import (
    MEGABYTE_OF_FLOATS,
    Gate,
    flow,
    gone,
    node_started,
    only_worker,
    pid_of,
    run,
    spec,
    wait_for,
    worker_of,
)


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    with Supervisor(restart_backoff_s=0.01) as supervisor:
        yield supervisor


def test_a_worker_killed_in_mid_job_costs_that_job_alone(legion: Supervisor, tmp_path: Path) -> None:
    shared = spec(max_workers=2)
    before = legion.submit(flow("TestBig", fill=3.0), spec=shared).result(timeout=60)["output_1"]
    other_gate, gate = Gate(tmp_path, "other"), Gate(tmp_path, "gate")
    other = legion.submit(other_gate.flow(), inputs=[torch.ones(MEGABYTE_OF_FLOATS)], spec=shared)
    job = legion.submit(gate.flow(), spec=shared)
    other_gate.entered()
    gate.entered()
    victim = worker_of(legion, job)

    os.kill(pid_of(victim), needs.KILL)
    killed_s = time.monotonic()
    with pytest.raises(WorkerLost, match=needs.KILLED) as caught:
        job.result(timeout=10)
    assert time.monotonic() - killed_s < 1.0

    assert caught.value.signal_name == (None if needs.WINDOWS else "SIGKILL")
    assert (caught.value.job_id, caught.value.worker_id) == (job.id, victim.id)
    assert job.state == "lost"
    assert float(before.sum()) == 3.0 * before.numel(), "results delivered before stay readable"
    assert not other.done()
    other_gate.open()
    assert float(other.result(timeout=20)["output_1"].sum()) == MEGABYTE_OF_FLOATS
    after = legion.submit(flow("TestAdd"), inputs=[before], spec=shared).result(timeout=20)
    assert float(after["output_1"][0]) == 4.0, "and can be passed on, though their writer is dead"


def test_the_last_words_of_a_lost_worker_are_quoted(legion: Supervisor) -> None:
    workflow = {
        **flow("TestPrint", text="the last words"),
        "end": {"class_type": "TestExit", "inputs": {"value": ["node", 0], "code": 7}},
        "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["end", 0]}},
    }
    with pytest.raises(WorkerLost, match="exited with code 7") as caught:
        legion.submit(workflow, spec=spec()).result(timeout=30)
    assert "the last words" in str(caught.value)
    assert caught.value.log_tail[-1] == "the last words"
    assert (caught.value.exit_code, caught.value.signal_name) == (7, None)


@needs.posix
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_a_crash_is_named_and_faulthandlers_log_is_kept(legion: Supervisor, name: str) -> None:
    with pytest.raises(WorkerLost, match=name) as caught:
        legion.submit(flow("TestSignal", name=name), spec=spec()).result(timeout=30)
    assert caught.value.signal_name == name
    assert any("Fatal Python error" in line for line in caught.value.log_tail)
    assert any("testing/nodes.py" in line for line in caught.value.log_tail)


def test_a_node_that_raises_or_exits_politely_costs_no_worker(legion: Supervisor) -> None:
    count = run(legion, "TestCounter")
    with pytest.raises(JobFailed, match="no such thing") as caught:
        run(legion, "TestRaise", kind="KeyError", text="no such thing")
    assert (caught.value.node_id, caught.value.class_type) == ("node", "TestRaise")
    assert caught.value.exception_type == "KeyError"
    assert "raise getattr(builtins, kind)(text)" in caught.value.traceback
    for kind in ("MemoryError", "RecursionError", "KeyboardInterrupt"):
        with pytest.raises(JobFailed, match=kind):
            run(legion, "TestRaise", kind=kind)
    with pytest.raises(JobFailed, match="SystemExit"):
        run(legion, "TestExit", raising=True)
    assert run(legion, "TestCounter") == count + 1


def test_an_idle_worker_that_is_killed_is_replaced_and_no_job_is_affected(legion: Supervisor) -> None:
    shared = spec(env={"POOL": "idle"})
    result = run(legion, "TestBig", on=shared, fill=2.0)

    def mine() -> list[int | None]:
        return [w.pid for w in legion.workers() if w.spec_key == shared.key and w.state == "idle"]

    (pid,) = mine()
    assert pid is not None
    os.kill(pid, needs.KILL)
    wait_for(lambda: mine() not in ([], [pid]), "another worker is idle")
    assert gone(pid)
    assert float(run(legion, "TestAdd", result, on=shared)[0]) == 3.0
    legion.stop_workers(shared)


def test_a_job_that_asked_for_it_is_run_again_elsewhere(legion: Supervisor, tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"
    value = torch.full((MEGABYTE_OF_FLOATS,), 5.0)
    workflow = flow("TestDieUntil", file=str(deaths), deaths=2)
    job = legion.submit(workflow, inputs=[value], spec=spec(), retries=2)
    value.zero_()
    result = job.result(timeout=60)
    assert float(result["output_1"].min()) == 5.0, "the inputs were kept for it"
    assert result.stats.attempts == 3
    retries = [event for event in job.events() if isinstance(event, JobRetrying)]
    assert [event.attempt for event in retries] == [1, 2]
    assert all(needs.KILLED in event.reason for event in retries)
    assert len(set(deaths.read_text().split())) == 2


def test_a_job_that_has_cost_three_workers_is_poisoned(legion: Supervisor, tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"
    workflow = flow("TestDieUntil", file=str(deaths), deaths=100)
    with pytest.raises(WorkerLost, match="cost 3 workers"):
        legion.submit(workflow, spec=spec(), retries=50).result(timeout=60)
    assert len(deaths.read_text().split()) == 3
    assert run(legion, "TestPass", 1) == 1


@needs.posix
def test_a_stopped_worker_is_found_hung_and_ended() -> None:
    with Supervisor(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.5) as legion:
        run(legion, "TestPass")
        pid = pid_of(only_worker(legion))
        job = legion.submit(flow("TestSignal", name="SIGSTOP"), spec=spec())
        with pytest.raises(WorkerLost, match="heartbeat_timeout_s"):
            job.result(timeout=20)
        assert gone(pid)
        assert run(legion, "TestPass", "next") == "next"


def test_what_a_worker_started_ends_with_it(legion: Supervisor) -> None:
    shared = spec(env={"POOL": "family"})
    grandchild = run(legion, "TestGrandchild", on=shared)
    assert not gone(grandchild)
    job = legion.submit(flow("TestSleep", seconds=60.0), spec=shared)
    node_started(job)
    os.kill(pid_of(worker_of(legion, job)), needs.KILL)
    assert isinstance(job.exception(timeout=10), WorkerLost)
    wait_for(lambda: gone(grandchild), "the grandchild has ended")
    again = run(legion, "TestGrandchild", on=shared)
    legion.stop_workers(shared)
    wait_for(lambda: gone(again), "a polite end ends it too")


def test_a_job_sent_to_a_worker_that_was_just_killed_runs_in_another(legion: Supervisor) -> None:
    own = spec(env={"NAME": "just-killed"})
    legion.submit(flow("TestAdd"), inputs=[torch.ones(1)], spec=own).result(timeout=60)
    for number in range(3):
        victim = next(info for info in legion.workers() if info.spec_key == own.key)
        os.kill(pid_of(victim), needs.KILL)
        job = legion.submit(flow("TestAdd"), inputs=[torch.full((1,), float(number))], spec=own)
        assert float(job.result(timeout=60)["output_1"]) == number + 1.0
