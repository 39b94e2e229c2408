from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from legion_shm import Job, JobFailed, Result, Supervisor, UnsupportedValue
from legion_shm.transport.segment import SegmentKind
from tests import needs
from tests.system.support import MEGABYTE_OF_FLOATS, flow, only_worker, pid_of, run, spec, wait_for

KINDS = needs.SEGMENT_KINDS


@pytest.fixture(scope="module", params=KINDS)
def legion(request: pytest.FixtureRequest) -> Iterator[Supervisor]:
    with Supervisor(segments=request.param, lease_flush_s=0.005) as supervisor:
        yield supervisor


def full(fill: float) -> torch.Tensor:
    return torch.full((MEGABYTE_OF_FLOATS,), fill)


def submit(legion: Supervisor, class_type: str, value: object = None, **options: object) -> Job:
    return legion.submit(flow(class_type, **options), inputs=[value], spec=spec())


def finish(legion: Supervisor, class_type: str, value: object = None, **options: object) -> Result:
    return submit(legion, class_type, value, **options).result(timeout=60)


def copies(result: Result, direction: str) -> int:
    return sum(transfer.copies for transfer in result.stats.transfers if transfer.direction == direction)


def nothing_lives(legion: Supervisor) -> None:
    def live() -> int:
        gc.collect()
        return legion._loop._lending.table.live_blocks() + legion._memory.stats().blocks

    wait_for(lambda: not live(), f"{live()} blocks are free again")


def test_a_node_that_writes_into_its_input_changes_only_what_it_gives_out(legion: Supervisor) -> None:
    value = legion.share(full(1.0))
    plain = full(1.0)
    for given in (value, plain, value):
        result = finish(legion, "TestWriteInput", given, fill=9.0)
        assert result["output_2"] == 1.0, "the node got what was submitted"
        assert float(result["output_1"].min()) == 9.0, "what it wrote is in its output"
        assert float(given.max()) == 1.0, "and nowhere else"


def test_two_jobs_that_write_into_the_same_block_do_not_meet(legion: Supervisor) -> None:
    value = legion.share(full(1.0))
    jobs = [submit(legion, "TestWriteInput", value, fill=float(n)) for n in range(2, 8)]
    for n, job in enumerate(jobs, 2):
        result = job.result(timeout=60)
        assert result["output_2"] == 1.0
        assert float(result["output_1"].min()) == float(result["output_1"].max()) == float(n)
    assert float(value.sum()) == MEGABYTE_OF_FLOATS


def test_a_node_that_writes_into_an_output_it_kept_changes_nothing(legion: Supervisor) -> None:
    first = finish(legion, "TestKeepOutput", fill=1.0)["output_1"]
    given = legion.share(full(2.0))
    second = finish(legion, "TestKeepOutput", given)["output_1"]  # its input, kept and given out
    third = finish(legion, "TestKeepOutput", fill=3.0)["output_1"]
    finish(legion, "TestKeepOutput", fill=4.0)
    for tensor, fill in ((first, 1.0), (second, 2.0), (given, 2.0), (third, 3.0)):
        assert float(tensor.min()) == float(tensor.max()) == fill
    legion.stop_workers()  # which ends what the node keeps


@pytest.mark.parametrize("write", ["torch", "numpy", "view"])
def test_a_callers_write_into_a_received_tensor_is_honoured(legion: Supervisor, write: str) -> None:
    received = finish(legion, "TestAdd", full(1.0))["output_1"]
    again = finish(legion, "TestAdd", received)
    assert copies(again, "to_worker") == (1 if needs.WINDOWS else 0), "unwritten, it goes by handle"
    if write == "torch":
        received[5] = 40.0
    elif write == "numpy":
        np.asarray(received)[5] = 40.0
    else:
        received.view(-1, 4)[1, 1:2].mul_(20.0)
    honoured = finish(legion, "TestAdd", received)
    assert copies(honoured, "to_worker") == 1
    assert float(honoured["output_1"][5]) == 41.0
    assert float(honoured["output_1"][4]) == 3.0
    assert float(again["output_1"][5]) == 3.0, "who got it earlier does not see the write"


def test_a_write_right_after_submit_is_not_seen(legion: Supervisor) -> None:
    for given in (full(1.0), legion.share(full(1.0)), finish(legion, "TestBig", fill=1.0)["output_1"]):
        job = submit(legion, "TestAdd", given, amount=1.0)
        given.fill_(100.0)
        assert float(job.result(timeout=60)["output_1"].max()) == 2.0
        assert float(finish(legion, "TestPass", given)["output_1"].min()) == 100.0


@needs.linux
def test_one_result_passed_through_keeps_one_block(legion: Supervisor) -> None:
    received = finish(legion, "TestBig", fill=5.0)["output_1"]
    for _ in range(5):
        result = finish(legion, "TestPass", received)
        assert result.stats.copies == 0
        received = result["output_1"]
    assert float(received.sum()) == 5.0 * received.numel()


def test_a_tensor_twice_in_one_value_is_one_tensor_on_the_other_side(legion: Supervisor) -> None:
    tensor = full(1.0)
    value = {"samples": tensor, "again": [tensor, tensor[:10]], "inputs": (tensor,)}
    result = finish(legion, "TestPass", value)
    got: dict[str, Any] = result["output_1"]
    got["samples"][0] = 7.0
    assert float(got["again"][0][0]) == float(got["again"][1][0]) == float(got["inputs"][0][0]) == 7.0
    assert copies(result, "to_worker") == 1


def test_leases_end_when_and_only_when_the_last_view_dies(legion: Supervisor) -> None:
    nothing_lives(legion)
    result = finish(legion, "TestAdd", full(1.0))
    array = result["output_1"].detach().numpy()[::2]
    storage = result["output_1"].untyped_storage()
    del result
    for _ in range(20):  # blocks that are free would be used again, and overwrite what we look at
        finish(legion, "TestBig", fill=8.0)
    assert array.min() == array.max() == 2.0
    del array
    finish(legion, "TestBig", fill=8.0)
    assert torch.tensor([], dtype=torch.float32).set_(storage)[0] == 2.0
    del storage
    nothing_lives(legion)


def test_a_result_that_nobody_read_is_given_back(legion: Supervisor) -> None:
    job = submit(legion, "TestBig")
    assert job.exception(timeout=60) is None
    assert legion._loop._lending.table.live_blocks()
    del job
    nothing_lives(legion)


def test_a_failed_job_pins_none_of_its_callers_tensors(legion: Supervisor) -> None:
    gc.collect()
    gc.disable()  # reference counts alone must do it
    try:

        def fail() -> Job:
            value = legion.share(full(1.0))
            job = submit(legion, "TestRaise", value)
            try:
                job.result(timeout=60)
            except JobFailed:
                return job
            raise AssertionError(f"{value} did not fail")

        job = fail()
        wait_for(lambda: not legion._memory.stats().blocks, "the input's block is free")
        assert job.state == "failed"
    finally:
        gc.enable()


@dataclass
class UnknownToWorkers:
    number: int


def open_segments(pid: int) -> list[str]:
    links: list[str] = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed just now
            links.append(os.readlink(fd))
    return [link for link in links if "memfd" in link]


@needs.linux
def test_a_segment_that_its_worker_never_looked_into_is_let_go_of_all_the_same() -> None:
    workflow = {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "unknown": {"class_type": "TestPass", "inputs": {"value": ["in", 0]}},
        "tensor": {"class_type": "TestPass", "inputs": {"value": ["in", 1]}},
        "out": {
            "class_type": "LegionExporter",
            "inputs": {"input_1": ["unknown", 0], "input_2": ["tensor", 0]},
        },
    }
    with Supervisor(idle_trim_s=0.05, lease_flush_s=0.005) as legion:
        run(legion, "TestPass", 1)
        pid = pid_of(only_worker(legion))
        unread = legion.submit(workflow, inputs=[UnknownToWorkers(1), full(1.0)], spec=spec())
        assert isinstance(unread.exception(timeout=60), UnsupportedValue)
        wait_for(lambda: not legion._memory.stats().segments, "the input's segment is given back")
        assert float(run(legion, "TestAdd", full(1.0))[0]) == 2.0
        wait_for(lambda: not legion._memory.stats().segments, "that one's too")
        run(legion, "TestPass", 1)
        wait_for(lambda: not open_segments(pid), "the worker has no segment open")


def test_resident_tensors_cost_no_copy_and_are_isolated(legion: Supervisor) -> None:
    kind = legion._memory.kind
    value = legion.empty((2, MEGABYTE_OF_FLOATS), torch.float32)
    value.fill_(1.0)
    result = finish(legion, "TestAdd", value[1])
    assert copies(result, "to_worker") == (0 if kind == "memfd" else 1)
    assert copies(finish(legion, "TestAdd", value), "to_worker") == (0 if kind == "memfd" else 1)
    value[0] = 3.0
    assert float(finish(legion, "TestAdd", value)["output_1"][0].mean()) == 4.0
    assert legion.share(torch.zeros(0, 4)).shape == (0, 4)
    assert legion.share(full(1.0)[::2]).is_contiguous()
    assert legion.share(torch.tensor(2.5)).item() == 2.5


@pytest.mark.parametrize("segments", KINDS)
def test_a_resident_block_that_was_sent_is_made_ready_for_its_next_use(segments: SegmentKind) -> None:
    with Supervisor(segments=segments, idle_trim_s=600.0) as legion:
        value = legion.empty((MEGABYTE_OF_FLOATS,), torch.float32)
        value.fill_(1.0)
        finish(legion, "TestAdd", value)
        del value
        wait_for(lambda: not legion._memory.stats().blocks, "the block is free")
        wait_for(lambda: not legion._memory.cold, "its pages are mapped again")


@pytest.mark.parametrize("segments", KINDS)
def test_results_stay_valid_after_their_worker_and_their_supervisor(segments: SegmentKind) -> None:
    with Supervisor(segments=segments) as legion:
        value = legion.share(full(4.0))
        first = finish(legion, "TestAdd", value)["output_1"]
        unread = submit(legion, "TestBig", fill=6.0)
        assert unread.exception(timeout=60) is None
        pid = pid_of(only_worker(legion))
        os.kill(pid, needs.KILL)
        wait_for(lambda: [w.pid for w in legion.workers()] != [pid], "the worker's end was seen")
        second = run(legion, "TestAdd", first)
        late = unread.result()["output_1"]
    for tensor, fill in ((value, 4.0), (first, 5.0), (second, 6.0), (late, 6.0)):
        assert float(tensor.min()) == float(tensor.max()) == fill
        tensor[0] = 1.0
        assert float(tensor[0]) == 1.0
    with Supervisor(segments=segments) as other:
        assert float(run(other, "TestAdd", second)[1]) == 7.0
        assert float(run(other, "TestAdd", second)[0]) == 2.0


def test_a_result_can_be_read_for_the_first_time_after_close() -> None:
    with Supervisor() as legion:
        job = submit(legion, "TestBig", fill=6.0)
        assert job.exception(timeout=60) is None
    assert float(job.result()["output_1"][0]) == 6.0
