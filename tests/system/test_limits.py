from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from legion_shm import (
    ArenaFull,
    ConfigError,
    InvalidWorkflow,
    JobFailed,
    LegionError,
    MessageTooLarge,
    QueueFull,
    Supervisor,
    SupervisorClosed,
    UnsupportedValue,
)
from tests.system.support import Gate, flow, only_worker, run, spec, wait_for

MB = 1 << 20


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    """Little of everything."""
    with Supervisor(
        arena_quota_bytes=8 * MB, arena_wait_s=0.2, max_message_bytes=1 * MB, max_queue=5, lease_flush_s=0.005
    ) as supervisor:
        run(supervisor, "TestPass")
        yield supervisor


def megabytes(count: float) -> torch.Tensor:
    return torch.ones(int(count * MB) // 4)


def test_a_full_arena_is_an_error_after_a_bounded_wait_and_recovers(legion: Supervisor) -> None:
    kept = [legion.share(megabytes(2)) for _ in range(3)]
    assert float(run(legion, "TestPass", kept[0])[0]) == 1.0
    with pytest.raises(ArenaFull, match="quota"):
        legion.submit(flow("TestPass"), inputs=[megabytes(3)], spec=spec())
    with pytest.raises(ArenaFull, match="can never fit"):
        legion.submit(flow("TestPass"), inputs=[megabytes(9)], spec=spec())
    with pytest.raises(ArenaFull):
        legion.submit(flow("TestPass"), inputs=[[megabytes(1), megabytes(1), megabytes(1)]], spec=spec())
    with pytest.raises(ArenaFull):
        legion.empty((3 * MB,))
    kept.clear()
    gc.collect()
    assert run(legion, "TestPass", megabytes(7)).numel() == 7 * MB // 4
    wait_for(lambda: legion._pending == 0, "the last job's place is free")


def test_a_submit_waits_for_memory_that_is_freed_in_time(legion: Supervisor, tmp_path: Path) -> None:
    with Supervisor(arena_quota_bytes=8 * MB, arena_wait_s=60) as patient:
        gate = Gate(tmp_path)
        patient.submit(gate.flow(), inputs=[megabytes(6)], spec=spec())
        gate.entered()
        gate.open()
        after = patient.submit(flow("TestPass"), inputs=[megabytes(6)], spec=spec())
        assert after.result(timeout=30)["output_1"].numel() == 6 * MB // 4


def test_results_that_are_kept_fill_their_workers_arena_until_they_are_dropped(legion: Supervisor) -> None:
    worker = only_worker(legion)
    kept = [run(legion, "TestBig", nbytes=2 * MB) for _ in range(4)]
    with pytest.raises(ArenaFull, match="quota"):
        run(legion, "TestBig", nbytes=2 * MB)
    assert all(float(tensor[-1]) == 1.0 for tensor in kept)
    kept.pop()
    wait_for(lambda: legion._memory.live_views() == 3, "the view is gone")
    kept.append(run(legion, "TestBig", nbytes=2 * MB, fill=5.0))
    assert [float(tensor[0]) for tensor in kept] == [1.0, 1.0, 1.0, 5.0]
    kept.clear()
    with pytest.raises(ArenaFull, match="can never fit"):
        run(legion, "TestBig", nbytes=9 * MB)
    assert run(legion, "TestBig", nbytes=7 * MB).numel() == 7 * MB // 4
    assert only_worker(legion).pid == worker.pid, "the worker is kept"


def test_a_message_over_the_limit_is_refused_at_the_door(legion: Supervisor) -> None:
    with pytest.raises(MessageTooLarge, match="max_message_bytes"):
        legion.submit(flow("TestPass"), inputs=[[0.5] * 200_000], spec=spec())
    with pytest.raises(MessageTooLarge, match="max_message_bytes"):
        legion.submit(flow("TestPrint", text="x" * (2 * MB)), spec=spec())
    inputs = [legion.share(megabytes(1)), megabytes(1), [0.5] * 200_000]
    with pytest.raises(MessageTooLarge):
        legion.submit(flow("TestPass"), inputs=inputs, spec=spec())
    del inputs
    wait_for(lambda: not legion._memory.stats().blocks, "what was reserved is free")


def test_a_result_over_the_limit_fails_the_job_and_keeps_the_worker(legion: Supervisor) -> None:
    worker = only_worker(legion)
    given = legion.share(megabytes(1))
    with pytest.raises(MessageTooLarge, match="max_message_bytes"):
        run(legion, "TestNumbers", given, count=200_000)
    assert run(legion, "TestNumbers", count=50_000) == [0.5] * 50_000
    assert only_worker(legion).pid == worker.pid
    del given
    wait_for(lambda: not legion._loop._lending.table.live_blocks(), "no lease is left")


def test_one_more_job_than_the_queue_holds_is_refused(legion: Supervisor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    jobs = [legion.submit(gate.flow(), spec=spec())]
    jobs += [legion.submit(flow("TestPass"), spec=spec()) for _ in range(4)]
    with pytest.raises(QueueFull, match="max_queue = 5"):
        legion.submit(flow("TestPass"), spec=spec())
    gate.open()
    for job in jobs:
        job.result(timeout=20)
    assert run(legion, "TestPass", 1) == 1


def test_what_is_wrong_with_a_call_is_said_by_the_call(legion: Supervisor) -> None:
    with pytest.raises(ConfigError, match="priority"):
        legion.submit(flow("TestPass"), spec=spec(), priority=3)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    wrong: list[dict[str, Any]] = [{"deadline_s": -1}, {"retries": "many"}, {"spec": {"engin": "graph"}}]
    for options in wrong:
        with pytest.raises(ConfigError, match=next(iter(options))):
            legion.submit(flow("TestPass"), **options)
    for workers in (0, -1, "two", 1.5, True):
        with pytest.raises(ConfigError, match="workers"):
            legion.warm_up(spec(), workers=workers)  # type: ignore[arg-type]
    known = {worker.id for worker in legion.workers()}
    with pytest.raises(
        ConfigError, match=r"2 were asked for, but max_workers of the worker spec is 1"
    ) as few:
        legion.warm_up(spec(), workers=2)
    assert few.value.key == "max_workers"
    assert {worker.id for worker in legion.workers()} == known
    value = [[0, {"control": open}]]
    with pytest.raises(UnsupportedValue) as caught:
        legion.submit(flow("TestPass"), inputs=[1, value], spec=spec())
    assert caught.value.path == "input_2[0][1]['control']"
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(UnsupportedValue, match="input_1"):
        legion.submit(flow("TestPass"), inputs=[loop], spec=spec())
    assert legion._pending == 0


@pytest.mark.parametrize(
    ("workflow", "text"),
    [
        ({}, "no nodes"),
        ("not a file", "not a file"),
        ("{broken", "line 1"),
        ({"1": {"inputs": {}}}, "class_type"),
        ({"1": {"class_type": "TestPass", "inputs": {"value": ["9", 0]}}}, "'9'"),
        ({"1": {"class_type": "TestPass", "inputs": {"value": ["1", 0]}}}, "cycle"),
        ({"1": {"class_type": "TestPass", "inputs": {"value": object()}}}, "inputs"),
        ({"nodes": [], "links": []}, "API format"),
    ],
)
def test_a_workflow_whose_text_is_wrong_is_refused_at_the_door(
    legion: Supervisor, workflow: object, text: str
) -> None:
    with pytest.raises(InvalidWorkflow, match=text):
        legion.submit(workflow, spec=spec())  # type: ignore[arg-type]


def test_what_only_the_workers_classes_can_tell_fails_the_job(legion: Supervisor) -> None:
    unknown = legion.submit(flow("NoSuchClass"), spec=spec())
    with pytest.raises(InvalidWorkflow, match="NoSuchClass") as caught:
        unknown.result(timeout=20)
    assert caught.value.node_id == "node"
    wrong_type = flow("TestCounter")
    wrong_type["next"] = {"class_type": "ImageInvert", "inputs": {"image": ["node", 0]}}
    wrong_type["out"]["inputs"] = {"input_1": ["next", 0]}
    job = legion.submit(wrong_type, spec=spec())
    with pytest.raises(InvalidWorkflow, match="IMAGE") as caught:
        job.result(timeout=20)
    assert (caught.value.node_id, caught.value.input_name) == ("next", "image")
    twice = {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "one": {"class_type": "LegionOutput", "inputs": {"name": ["in", 0], "value": ["in", 1]}},
        "two": {"class_type": "LegionOutput", "inputs": {"name": ["in", 0], "value": ["in", 1]}},
    }
    with pytest.raises(InvalidWorkflow, match="twice"):
        legion.submit(twice, inputs=["same", 1], spec=spec()).result(timeout=20)
    with pytest.raises(InvalidWorkflow, match="'absent'"):
        legion.submit(
            {"a": {"class_type": "LegionInput", "inputs": {"name": "absent"}}}, inputs={"b": 1}, spec=spec()
        )


def test_an_output_that_cannot_travel_fails_the_job_with_its_path(legion: Supervisor) -> None:
    worker = only_worker(legion)
    with pytest.raises(UnsupportedValue) as caught:
        run(legion, "TestObject")
    assert caught.value.path == "output_1[1]['lock']"
    with pytest.raises(JobFailed, match="ValueError"):
        run(legion, "TestRaise")
    assert only_worker(legion).pid == worker.pid


def test_every_call_on_a_closed_supervisor_says_so() -> None:
    legion = Supervisor()
    legion.close()
    legion.close()
    for use in (
        lambda: legion.submit(flow("TestPass")),
        legion.workers,
        legion.warm_up,
        legion.free,
        legion.stop_workers,
        lambda: legion.empty((1,)),
        lambda: legion.share(torch.ones(1)),
        legion.__enter__,
    ):
        with pytest.raises(SupervisorClosed):
            use()


def test_a_runtime_directory_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    loose = tmp_path / "loose"
    loose.mkdir(mode=0o755)
    for path in (file, link, loose, tmp_path / ("long" * 30)):
        with pytest.raises(ConfigError) as caught:
            Supervisor(runtime_dir=path)
        assert caught.value.key == "runtime_dir"
        assert isinstance(caught.value, LegionError)


def test_what_is_of_another_type_is_refused_by_name(legion: Supervisor) -> None:
    wrong: Any = {"max_workers": 1}
    with pytest.raises(ConfigError, match="settings: expected SupervisorSettings or keywords, got dict"):
        Supervisor(wrong)
    for call in (legion.warm_up, legion.free, legion.stop_workers):
        with pytest.raises(ConfigError, match="spec: expected a WorkerSpec, got dict"):
            call(wrong)
    name: Any = "float32"
    with pytest.raises(TypeError, match="dtype: expected one of torch's"):
        legion.empty((2,), name)
    number: Any = 2
    with pytest.raises(TypeError, match=r"shape: expected a sequence of sizes, such as \(2,\)"):
        legion.empty(number)
    half: Any = (2.5,)
    with pytest.raises(TypeError):
        legion.empty(half)


def test_quantized_tensors_are_refused_in_shared_memory(legion: Supervisor) -> None:
    for dtype in (torch.quint8, torch.qint8, torch.qint32):
        with pytest.raises(TypeError, match="quantized"):
            legion.empty((2,), dtype)
    with pytest.warns(UserWarning, match="quantize"):
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.quint8)
    with pytest.raises(UnsupportedValue, match="quantized"):
        legion.share(quantized)
    assert torch.equal(legion.share(quantized.int_repr()), torch.full((3,), 2, dtype=torch.uint8))


def test_a_worker_may_have_more_time_to_stop_than_any_clock_goes() -> None:
    with Supervisor(stop_grace_s=1e300, term_grace_s=1e300) as supervisor:
        assert run(supervisor, "TestPass", 1) == 1
