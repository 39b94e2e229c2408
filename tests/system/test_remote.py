"""Objects that can't leave their worker: a handle in the master, the live object again in that worker."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from legion_shm import RemoteHandle, Supervisor, UnsupportedValue, WorkerLost, WorkerSpec
from tests import needs
from tests.system.support import spec, wait_for

LIVE = Path(__file__).with_name("live_nodes.py")
SPEC = spec(node_modules=[LIVE], max_workers=2)
OTHER = spec(node_modules=[LIVE], env={"OTHER": "1"})


def flow(class_type: str) -> dict[str, Any]:
    return {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "node": {"class_type": class_type, "inputs": {"value": ["in", 0]}},
        "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["node", 0]}},
    }


def both(class_type: str) -> dict[str, Any]:
    workflow = flow(class_type)
    workflow["out"]["inputs"]["input_2"] = ["node", 1]
    return workflow


@pytest.fixture
def legion() -> Iterator[Supervisor]:
    with Supervisor() as supervisor:
        yield supervisor


def run(
    legion: Supervisor, class_type: str, value: object, *, on: WorkerSpec = SPEC, remote: bool = True
) -> Any:
    return legion.submit(flow(class_type), inputs=[value], spec=on, remote=remote).result(timeout=60)[
        "output_1"
    ]


def engines(legion: Supervisor) -> int:
    return int(run(legion, "CountEngines", 0))


def test_a_handle_stands_for_the_object_and_gives_it_back_to_its_nodes(legion: Supervisor) -> None:
    handle = run(legion, "MakeEngine", "x")
    assert isinstance(handle, RemoteHandle)
    assert (handle.class_name.rpartition(".")[2], handle.text) == ("Engine", "Engine(x)")
    assert handle.worker_id in repr(handle)
    assert copy.deepcopy([handle])[0] is handle
    assert run(legion, "RunEngine", handle) == "Engine x 1"
    assert run(legion, "RunEngine", handle) == "Engine x 2"
    with pytest.raises(AttributeError, match=r"lives in worker .* without 'sample'"):
        handle.sample  # noqa: B018


def test_without_the_option_what_can_not_travel_is_refused_by_name(legion: Supervisor) -> None:
    with pytest.raises(UnsupportedValue, match="Engine has no codec") as caught:
        run(legion, "MakeTwo", "x", remote=False)
    assert caught.value.path == "output_1['a']"


def test_an_object_met_twice_is_one_handle_and_what_can_travel_does(legion: Supervisor) -> None:
    value = run(legion, "MakeTwo", "x")
    assert value["a"] is value["b"][0]
    assert value["c"] is not value["a"]
    assert value["text"] == "plain"
    assert run(legion, "RunEngine", value["b"][0]) == "Engine x 1"


def test_dropping_the_last_handle_frees_the_object(legion: Supervisor) -> None:
    handle = run(legion, "MakeEngine", "x")
    result = legion.submit(both("RunEngine"), inputs=[handle], spec=SPEC, remote=True).result(timeout=60)
    again = result["output_2"]
    assert again is not handle
    del handle, result
    assert engines(legion) == 1
    assert run(legion, "RunEngine", again) == "Engine x 2"
    del again
    gc.collect()
    wait_for(lambda: engines(legion) == 0, "the end")


def test_a_result_that_nobody_looks_at_frees_what_it_holds(legion: Supervisor) -> None:
    job = legion.submit(flow("MakeEngine"), inputs=["x"], spec=SPEC, remote=True)
    assert job.exception(timeout=60) is None
    del job
    gc.collect()
    wait_for(lambda: engines(legion) == 0, "the end")


def test_jobs_with_a_handle_run_in_its_worker_though_others_are_free(legion: Supervisor) -> None:
    legion.warm_up(SPEC, workers=2)
    wait_for(lambda: [worker.state for worker in legion.workers()] == ["idle", "idle"], "the end")
    handle = run(legion, "MakeEngine", "x")
    jobs = [legion.submit(flow("RunEngine"), inputs=[handle], spec=SPEC) for _ in range(8)]
    results = [job.result(timeout=60) for job in jobs]
    assert {result.stats.worker_id for result in results} == {handle.worker_id}
    assert [result["output_1"] for result in results] == [f"Engine x {n}" for n in range(1, 9)]


def test_a_handle_does_not_work_in_a_worker_of_another_spec(legion: Supervisor) -> None:
    handle = run(legion, "MakeEngine", "x")
    with pytest.raises(UnsupportedValue, match="is of another spec"):
        run(legion, "RunEngine", handle, on=OTHER)
    other = run(legion, "MakeEngine", "y", on=OTHER)
    with pytest.raises(UnsupportedValue, match="in several workers"):
        run(legion, "RunEngine", [handle, other])


def test_a_handle_of_another_supervisor_is_refused(legion: Supervisor) -> None:
    handle = run(legion, "MakeEngine", "x")
    with Supervisor() as second, pytest.raises(UnsupportedValue, match="another Supervisor"):
        run(second, "RunEngine", handle)


def test_after_its_worker_died_a_handle_raises_worker_lost(legion: Supervisor) -> None:
    handle = run(legion, "MakeEngine", "x")
    (worker,) = legion.workers()
    assert worker.pid is not None
    os.kill(worker.pid, needs.KILL)
    with pytest.raises(WorkerLost, match="worker"):
        legion.submit(flow("RunEngine"), inputs=[handle], spec=SPEC, retries=3).result(timeout=60)
    wait_for(lambda: all(info.pid != worker.pid for info in legion.workers()), "the end")
    with pytest.raises(WorkerLost, match="the object of a handle"):
        run(legion, "RunEngine", handle)
    assert run(legion, "RunEngine", run(legion, "MakeEngine", "new")) == "Engine new 1"


def test_a_worker_whose_objects_are_held_is_not_ended_for_being_idle(legion: Supervisor) -> None:
    short = spec(node_modules=[LIVE], idle_timeout_s=0.3)
    handle = run(legion, "MakeEngine", "x", on=short)
    idle = spec(node_modules=[LIVE], idle_timeout_s=0.3, env={"OTHER": "2"})
    run(legion, "CountEngines", 0, on=idle)
    wait_for(lambda: len(legion.workers()) == 1, "the end")  # the other one has gone
    assert run(legion, "RunEngine", handle, on=short) == "Engine x 1"
    del handle
    gc.collect()
    wait_for(lambda: not legion.workers(), "the end")
