from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from legion_shm import (
    InvalidWorkflow,
    Job,
    JobCancelled,
    JobFailed,
    LogEvent,
    Supervisor,
    SupervisorClosed,
    WorkerLost,
    WorkerSpec,
)
from legion_shm.testing import assert_nothing_left, snapshot
from legion_shm.transport.channel import ChannelKind
from legion_shm.transport.segment import SegmentKind
from tests import needs
from tests.system.support import Gate, flow, gone, in_threads, only_worker, pid_of, run, spec, wait_for

MB = 1 << 20


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    with Supervisor() as supervisor:
        yield supervisor


def test_a_snapshot_says_what_a_worker_is_and_does(legion: Supervisor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    job = legion.submit(gate.flow(), inputs=[torch.ones(MB)], spec=spec())
    gate.entered()
    worker = only_worker(legion)
    assert (worker.state, worker.engine, worker.job_id) == ("busy", "graph", job.id)
    assert psutil.pid_exists(pid_of(worker))
    assert worker.host
    gate.open()
    result = job.result(timeout=20)
    idle = only_worker(legion)
    assert (idle.state, idle.job_id, idle.jobs_done) == ("idle", None, 1)
    run(legion, "TestBig", nbytes=4 * MB)
    assert only_worker(legion).arena_bytes >= 4 * MB
    wait_for(lambda: only_worker(legion).rss_bytes > 50 * MB, "a heartbeat told its size")
    assert result.engine == result.stats.engine == "graph"
    assert result.stats.worker_id == worker.id


def test_workers_are_warmed_up_before_the_first_job() -> None:
    with Supervisor() as legion:
        two = spec(max_workers=2)
        legion.warm_up(two, workers=2)
        wait_for(lambda: [worker.state for worker in legion.workers()] == ["idle", "idle"], "two are idle")
        legion.stop_workers(two)
        wait_for(lambda: not legion.workers(), "they have stopped")
        assert legion.submit(flow("TestPass"), inputs=[1], spec=two).result(timeout=30)["output_1"] == 1


def test_stopping_waits_for_the_job_that_runs(legion: Supervisor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    job = legion.submit(gate.flow(), inputs=["value"], spec=spec())
    gate.entered()
    pid = pid_of(only_worker(legion))
    legion.stop_workers(spec())
    later = legion.submit(flow("TestCounter"), spec=spec())
    gate.open()
    assert job.result(timeout=20)["output_1"] == "value"
    assert later.result(timeout=30)["output_2"] != pid, "a new one runs what came later"
    wait_for(lambda: gone(pid), "the old one has ended")


def test_free_drops_what_the_worker_has_cached(legion: Supervisor) -> None:
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "LegionOutput", "inputs": {"name": "image", "value": ["1", 0]}},
    }

    def cached() -> int:
        return legion.submit(workflow, spec=spec()).result(timeout=30).stats.nodes_cached

    cached()
    assert cached() == 1
    legion.free()
    assert cached() == 0
    legion.free(spec())
    assert cached() == 0


@needs.linux
def test_free_that_waits_says_how_much_memory_came_back(legion: Supervisor, tmp_path: Path) -> None:
    own = spec(env={"WHO": "freed"})
    big = {"width": 2000, "height": 2000, "batch_size": 1, "color": 5}  # 48 MB, which stay in the cache
    small = {"width": 8, "height": 8, "upscale_method": "nearest-exact", "crop": "disabled"}
    keeping: dict[str, dict[str, Any]] = {
        "big": {"class_type": "EmptyImage", "inputs": big},
        "small": {"class_type": "ImageScale", "inputs": {"image": ["big", 0], **small}},
        "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["small", 0]}},
    }
    legion.submit(keeping, spec=own).result(timeout=60)
    (freed,) = legion.free(own, wait_s=20)
    assert freed.worker_id in {worker.id for worker in legion.workers()}
    assert freed.host_bytes > 40 * MB
    assert freed.gpu_bytes == 0
    assert legion.free(own) == ()
    gate = Gate(tmp_path)
    job = legion.submit(gate.flow(), inputs=[1], spec=own)
    gate.entered()
    with pytest.raises(TimeoutError, match="runs a job still"):
        legion.free(own, wait_s=0.3)
    gate.open()
    job.result(timeout=20)


def test_free_waits_for_no_worker_that_has_died(legion: Supervisor, tmp_path: Path) -> None:
    own = spec(env={"WHO": "dies"})
    gate = Gate(tmp_path)
    job = legion.submit(gate.flow(), inputs=[1], spec=own)
    gate.entered()
    (worker,) = [one for one in legion.workers() if one.job_id == job.id]
    timer = threading.Timer(0.3, psutil.Process(pid_of(worker)).kill)
    timer.start()
    assert legion.free(own, wait_s=20) == ()
    timer.join()
    with pytest.raises(WorkerLost):
        job.result(timeout=20)


def test_an_input_that_a_node_is_linked_to_and_was_not_given_is_told_of(legion: Supervisor) -> None:
    prompt = flow("ImageInvert")
    prompt["node"]["inputs"] = {"image": ["in", 2]}
    job = legion.submit(prompt, inputs=[1], spec=spec())
    with pytest.raises(JobFailed, match=r"input image: expected an IMAGE.*got nothing") as failed:
        job.result(timeout=30)
    assert "'input_3' was not given: node node (ImageInvert), input image" in str(failed.value)
    assert any(
        "'input_3' was not given" in event.text for event in job.events() if isinstance(event, LogEvent)
    )


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8), 5])
def test_a_built_in_node_names_the_input_that_is_no_image(legion: Supervisor, image: object) -> None:
    prompt = flow("ImageInvert")
    prompt["node"]["inputs"] = {"image": ["in", 0]}
    with pytest.raises(JobFailed, match=r"node node \(ImageInvert\).*input image: expected an IMAGE"):
        legion.submit(prompt, inputs=[image], spec=spec()).result(timeout=30)


def test_targets_choose_the_output_nodes_that_run(legion: Supervisor) -> None:
    both = flow("TestRaise")
    both["other"] = {"class_type": "LegionOutput", "inputs": {"value": 7, "name": "other"}}
    result = legion.submit(both, spec=spec(), targets=["other"]).result(timeout=30)
    assert dict(result) == {"other": 7}
    with pytest.raises(InvalidWorkflow, match="targets: nobody"):
        legion.submit(both, spec=spec(), targets=["nobody"])


def test_extra_data_reaches_hidden_inputs_and_a_result_says_where_its_files_are(
    legion: Supervisor, tmp_path: Path
) -> None:
    saving: dict[str, dict[str, Any]] = {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["in", 0], "filename_prefix": "it"}},
    }
    result = legion.submit(
        saving,
        inputs=[torch.zeros(1, 8, 8, 3)],
        spec=spec(env={"LEGION_OUTPUT_DIR": str(tmp_path)}),
        extra_data={"extra_pnginfo": {"about": "tests"}},
    ).result(timeout=30)
    (told,) = result.ui["save"]["images"]
    path = Path(result.folders[told["type"]], told["subfolder"], told["filename"])
    assert path.parent == tmp_path
    with Image.open(path) as picture:
        assert json.loads(picture.info["about"]) == "tests"
    assert {transfer.name for transfer in result.stats.transfers} == {"input_1"}


def test_a_worker_ends_after_its_last_job_and_after_its_idle_time() -> None:
    with Supervisor() as legion:
        once = spec(max_jobs_per_life=2, env={"POOL": "once"})
        jobs = [legion.submit(flow("TestCounter"), spec=once) for _ in range(3)]
        pids = [job.result(timeout=30)["output_2"] for job in jobs]
        assert pids[0] == pids[1] != pids[2]
        wait_for(lambda: gone(pids[0]), "the first has ended")
        legion.stop_workers()
        wait_for(lambda: not legion.workers(), "all have stopped")
        brief = spec(idle_timeout_s=0.1, env={"POOL": "brief"})
        result = legion.submit(flow("TestBig"), spec=brief).result(timeout=30)["output_1"]
        wait_for(lambda: not legion.workers(), "it was idle for long enough")
        assert float(result.sum()) == result.numel()


def test_specs_beyond_max_workers_take_turns() -> None:
    with Supervisor(max_workers=1) as legion:
        for name in ("a", "b"):
            own = spec(env={"POOL": name})
            asked = legion.submit(flow("TestEnviron", name="POOL"), spec=own)
            assert asked.result(timeout=30)["output_1"] == name
            assert len(legion.workers()) == 1


def test_idle_memory_goes_back_to_the_system() -> None:
    with Supervisor(idle_trim_s=0.1, lease_flush_s=0.005) as legion:
        result = run(legion, "TestAdd", torch.ones(4 * MB))
        worker = psutil.Process(pid_of(only_worker(legion)))
        assert legion._memory.stats().total_bytes >= 16 * MB
        assert only_worker(legion).arena_bytes >= 16 * MB
        del result
        wait_for(lambda: not legion._memory.stats().total_bytes, "the supervisor's arena is given back")
        wait_for(lambda: not only_worker(legion).arena_bytes, "the worker's arena is given back")
        wait_for(lambda: "memfd:legion" not in str(worker.memory_maps()), "and unmapped there")
        assert float(run(legion, "TestAdd", torch.ones(4 * MB))[-1]) == 2.0


def test_two_supervisors_in_one_program_do_not_meet() -> None:
    with Supervisor() as one, Supervisor(segments="portable") as two:

        def churn(number: int) -> None:
            value = torch.full((MB // 4,), float(number))
            for step in range(10):
                first = run(one if (number + step) % 2 else two, "TestAdd", value)
                value = run(two if (number + step) % 2 else one, "TestAdd", first)
            assert float(value.min()) == float(value.max()) == number + 20.0

        in_threads(4, churn)
        assert one.workers()[0].pid != two.workers()[0].pid
        one.close()
        assert run(two, "TestPass", 1) == 1


def test_closing_while_many_threads_submit_ends_each_of_their_jobs() -> None:
    before = snapshot()
    legion = Supervisor(cancel_grace_s=0.5)
    run(legion, "TestPass")
    started, jobs, refused = threading.Barrier(7), list[Job](), list[BaseException]()

    def submit() -> None:
        value = torch.ones(MB // 4)
        started.wait(timeout=20)
        while True:
            try:
                jobs.append(legion.submit(flow("TestAdd"), inputs=[value], spec=spec()))
            except SupervisorClosed as error:
                refused.append(error)
                return

    def close() -> None:
        started.wait(timeout=20)
        wait_for(lambda: len(jobs) > 20, "some jobs were submitted")
        legion.close()

    in_threads(7, lambda number: close() if number == 0 else submit())
    assert len(refused) == 6

    def look(job: Job) -> None:
        error = job.exception(timeout=0)
        assert error is None or isinstance(error, JobCancelled), error
        if error is None:
            assert float(job.result()["output_1"][0]) == 2.0

    while jobs:
        look(jobs.pop())
    assert_nothing_left(before)


def test_two_threads_that_are_first_with_a_spec_do_not_trip_each_other(
    legion: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    define, submitted, first = legion._loop.define, threading.Event(), threading.Lock()

    def slow_define(pool: str, given: WorkerSpec) -> None:
        if first.acquire(blocking=False):
            submitted.wait(timeout=1.0)  # the other thread overtakes
        define(pool, given)

    monkeypatch.setattr(legion._loop, "define", slow_define)
    new = spec(env={"POOL": "both first"})

    def ask(number: int) -> None:
        if number:
            wait_for(first.locked, "the other one is first")
        job = legion.submit(flow("TestPass"), inputs=[number], spec=new)
        submitted.set()
        assert job.result(timeout=30)["output_1"] == number

    in_threads(2, ask)
    legion.stop_workers(new)


def test_a_finalizer_may_submit_cancel_and_drop(legion: Supervisor) -> None:
    jobs: list[Job] = []

    class Owner:
        def __init__(self) -> None:
            self.cycle: Any = self

        def __del__(self) -> None:
            jobs.append(legion.submit(flow("TestAdd"), inputs=[torch.ones(MB // 4)], spec=spec()))
            if len(jobs) % 3 == 0:
                jobs[-1].cancel()

    for _ in range(30):
        weakref.ref(Owner())
        result = run(legion, "TestAdd", torch.ones(MB // 4))
        assert float(result[0]) == 2.0
    import gc

    gc.collect()
    assert len(jobs) == 30
    for job in jobs:
        assert isinstance(job.exception(timeout=30), (JobCancelled, type(None)))


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(("portable", "ipc"), marks=needs.posix),
        pytest.param(("memfd", "tcp"), marks=needs.linux),
        ("portable", "tcp"),
    ],
    ids="-".join,
)
def test_the_other_kinds_of_memory_and_channel_do_the_same(
    kinds: tuple[SegmentKind, ChannelKind], tmp_path: Path
) -> None:
    with Supervisor(segments=kinds[0], channel=kinds[1], cancel_grace_s=0.3) as legion:
        two = spec(max_workers=2)

        def churn(number: int) -> None:
            value: Any = torch.full((MB // 4,), float(number))
            for step in range(10):
                job = legion.submit(flow("TestAdd"), inputs=[value], spec=two)
                value = job.result(timeout=30)["output_1"]
                assert float(value.min()) == float(value.max()) == number + step + 1.0
            value[0] = -1.0
            again = legion.submit(flow("TestAdd"), inputs=[value], spec=two).result(timeout=30)["output_1"]
            assert (float(again[0]), float(again[1])) == (0.0, number + 11.0)

        in_threads(4, churn)
        gate = Gate(tmp_path)
        job = legion.submit(gate.flow(), spec=two)
        gate.entered()
        job.cancel()
        assert isinstance(job.exception(timeout=20), JobCancelled)
        small = legion.submit(flow("TestText", length=100_000), spec=two).result(timeout=30)
        assert len(small["output_1"]) == 100_000
