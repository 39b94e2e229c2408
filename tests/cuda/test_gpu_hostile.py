"""What a worker may say of a GPU's memory that no worker of ours would: it is ended, or nothing happens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from legion_shm import Job, Supervisor, WorkerLost
from tests.cuda.emulation import UUID, EmulatedGpu, emulated_gpu, needs_compiler
from tests.cuda.support import FLOATS, NODES, run, submit
from tests.reliability import support as reliability
from tests.system.support import only_worker, spec, wait_for

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedGpu]:
    with emulated_gpu(tmp_path_factory.mktemp("gpu")) as gpu:
        yield gpu
        assert gpu.allocations == []
        assert gpu.violations == ""


@pytest.fixture(scope="module")
def legion(gpu: EmulatedGpu) -> Iterator[Supervisor]:
    with Supervisor(restart_backoff_s=0.01, idle_trim_s=0.1) as supervisor:
        yield supervisor


def do(legion: Supervisor, code: str, value: object = None) -> Job:
    on = spec(node_modules=[reliability.NODES, NODES])
    return legion.submit(reliability.code_flow(code), inputs=[value], spec=on)


WRONG = {
    "a request of nothing": (f"GpuSegmentRequest({UUID!r}, 0)", "a segment of 0 bytes"),
    "a request on no device": ("GpuSegmentRequest('', 4096)", "a segment of 4096 bytes"),
    "a request on a long one": ("GpuSegmentRequest('x' * 81, 4096)", "a segment of 4096 bytes"),
    "copies of nothing": ("HostCopyRequest(())", "none or too many"),
    "copies of what was never delivered": (
        "HostCopyRequest((BlockHandle(1, 2, 0, 4096, 3),))",
        "never delivered to this worker",
    ),
    "copies of its own": (
        "HostCopyRequest((BlockHandle(host()._config.arena, 1, 0, 4096, 3),))",
        "never delivered to this worker",
    ),
    "what the supervisor says": ("HostCopies((), '')", "does not send HostCopies"),
    "an introduction": (
        "GpuSegmentIntroduced(1, 2, 3, 'x', b'', b'')",
        "does not send GpuSegmentIntroduced",
    ),
}


@pytest.mark.parametrize(("message", "words"), WRONG.values(), ids=WRONG)
def test_a_worker_that_says_what_can_not_be_is_ended(
    legion: Supervisor, gpu: EmulatedGpu, message: str, words: str
) -> None:
    code = (
        "import time; from legion_shm.transport.handles import BlockHandle; "
        f"send_raw(wire({message})); time.sleep(20)"
    )
    with pytest.raises(WorkerLost, match=words):
        do(legion, code).result(timeout=30)


def test_segments_are_asked_for_one_by_one(legion: Supervisor) -> None:
    code = f"""
import time
frame = wire(GpuSegmentRequest({UUID!r}, 4096))
for _ in range(50):
    send_raw(frame)
time.sleep(20)
"""
    with pytest.raises(WorkerLost, match="one more before the first came"):
        do(legion, code).result(timeout=30)


def test_a_worker_that_asks_for_more_than_its_quota_does_not_get_it(legion: Supervisor) -> None:
    code = f"""
asked = [host()._memory._ask(GpuSegmentRequest({UUID!r}, 600 << 20)) for _ in range(2)]
out = [type(answer).__name__ for answer in asked]
"""
    granted = do(legion, code).result(timeout=30)["output_1"]
    assert granted == ["GpuSegmentIntroduced", "SegmentRefused"]
    legion.stop_workers()


def test_copies_of_what_others_were_given_are_refused(legion: Supervisor) -> None:
    others = submit(legion, "GpuOnes", FLOATS)
    assert others.exception(timeout=30) is None
    lending = legion._loop._lending
    blocks = [block.handle for block in lending.table._blocks.values()]
    (handle,) = [each for each in blocks if legion._memory.gpu.knows(each)]
    code = f"""
import time
from legion_shm.transport.handles import BlockHandle
send_raw(wire(HostCopyRequest((BlockHandle(*{handle.to_wire()}),))))
time.sleep(20)
"""
    with pytest.raises(WorkerLost, match="never delivered to this worker"):
        do(legion, code).result(timeout=30)
    assert float(others.result()["output_1"].sum()) == FLOATS


def test_a_device_that_nobody_has_is_refused(legion: Supervisor) -> None:
    code = "out = type(host()._memory._ask(GpuSegmentRequest('nobodys', 4096))).__name__"
    assert do(legion, code).result(timeout=30)["output_1"] == "SegmentRefused"


def test_closing_what_is_not_open_changes_nothing(legion: Supervisor) -> None:
    code = "send_raw(wire(GpuSegmentsClosed(1, (2, 3)))); out = 1"
    assert do(legion, code).result(timeout=30)["output_1"] == 1
    sent = torch.rand(FLOATS)
    assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)


def test_giving_up_a_segment_whose_block_somebody_has_ends_the_worker(legion: Supervisor) -> None:
    made = do(legion, f"import torch; out = torch.ones({FLOATS})")
    assert made.exception(timeout=30) is None
    code = """
import time
ids = tuple(host()._memory._gpu._memory._owners)
send_raw(wire(SegmentRetired(ids)))
time.sleep(20)
"""
    with pytest.raises(WorkerLost, match="given up while a block in it is in use"):
        do(legion, code).result(timeout=30)
    assert float(made.result()["output_1"].sum()) == FLOATS


def test_a_segment_that_a_worker_will_not_close_is_freed_when_it_ends(
    legion: Supervisor, gpu: EmulatedGpu
) -> None:
    legion.stop_workers()
    wait_for(lambda: not legion.workers() and not gpu.allocations, "nothing is there")
    deaf = "host()._memory._gpu.drop = lambda arena, ids: None; out = float(value.sum())"
    assert do(legion, deaf, torch.ones(FLOATS)).result(timeout=30)["output_1"] == FLOATS
    pid = only_worker(legion).pid
    memory: Any = legion._memory
    wait_for(lambda: memory.gpu._going, "its owner gave it up")
    assert any(f"open-{pid}-" in name for name in gpu.opened)
    assert gpu.allocations
    assert gpu.violations == ""
    legion.stop_workers()
    wait_for(lambda: not gpu.allocations, "nobody has it open")
