"""Tensors of a GPU cross within its memory, over an emulated CUDA driver and real processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from legion_shm import Job, LogEvent, Supervisor, UnsupportedValue, WorkerLost, WorkerSpec
from tests import needs
from tests.cuda.emulation import HIDDEN, EmulatedGpu, emulated_gpu, needs_compiler
from tests.system.support import Gate, only_worker, pid_of, spec, wait_for

pytestmark = needs_compiler

NODES = Path(__file__).with_name("emulated_nodes.py")
MIB = 1 << 20
FLOATS = MIB // 4


def on_gpu(**fields: Any) -> WorkerSpec:
    return spec(node_modules=[NODES], **fields)


def flow(class_type: str) -> dict[str, Any]:
    return {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "node": {"class_type": class_type, "inputs": {"value": ["in", 0]}},
        "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["node", 0]}},
    }


def submit(
    legion: Supervisor, class_type: str, value: object, on: WorkerSpec | None = None, **more: Any
) -> Job:
    return legion.submit(flow(class_type), inputs=[value], spec=on or on_gpu(), **more)


def run(legion: Supervisor, class_type: str, value: object, on: WorkerSpec | None = None) -> Any:
    return submit(legion, class_type, value, on).result(timeout=60)["output_1"]


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[EmulatedGpu]:
    with emulated_gpu(tmp_path) as gpu:
        yield gpu
        assert gpu.allocations == [], "all is freed with the supervisor"
        assert gpu.violations == "", "nothing was freed while somebody had it open"


def test_a_tensor_crosses_in_the_gpus_memory_both_ways(gpu: EmulatedGpu) -> None:
    with Supervisor() as legion:
        sent = torch.rand(FLOATS)
        for _ in range(4):
            assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
        worker = only_worker(legion)
        assert worker.gpu_arena_bytes > 0
        assert worker.arena_bytes == 0
        assert legion._memory.stats().total_bytes == 0
        assert len(gpu.allocations) == 2, "one segment each way is used again"
        assert len(gpu.opened) == 2
        assert os.getpid() in gpu.contexts


def test_what_a_tensor_is_stays_so(gpu: EmulatedGpu) -> None:
    base = torch.arange(3.0 * FLOATS).reshape(3, FLOATS)
    sent = {
        "base": base,
        "turned": base.t(),
        "row": base[1],
        "same": base,
        "sparse columns": torch.rand(64, FLOATS)[:, ::256],
        "parameter": torch.nn.Parameter(torch.rand(FLOATS)),
        "conjugate": torch.randn(FLOATS, dtype=torch.complex64).conj(),
        "small": torch.rand(3),
        "none": torch.empty(0, 3),
    }
    with Supervisor() as legion:
        got = run(legion, "GpuSame", sent)
        assert legion._memory.stats().total_bytes == 0
    assert got["same"] is got["base"]
    assert type(got["parameter"]) is torch.nn.Parameter
    for name, tensor in sent.items():
        assert torch.equal(got[name], tensor), name
        assert got[name].is_conj() == (False if name == "conjugate" else tensor.is_conj())
    assert got["turned"].stride() == base.t().stride()
    got["base"][1, 2] = -1
    assert got["turned"][2, 1] == got["row"][2] == -1
    assert base[1, 2] == FLOATS + 2


def test_the_sender_may_write_on_and_nobody_sees_it(gpu: EmulatedGpu) -> None:
    with Supervisor() as legion:
        sent = torch.ones(FLOATS)
        job = submit(legion, "GpuSame", sent)
        sent.fill_(5)
        first = job.result(timeout=60)["output_1"]
        second = run(legion, "GpuSame", sent)
        first.fill_(7)
        assert float(second.sum()) == 5 * FLOATS
        assert float(run(legion, "GpuSame", second).sum()) == 5 * FLOATS


def test_a_process_that_does_not_use_the_gpu_is_not_made_to(tmp_path: Path) -> None:
    with emulated_gpu(tmp_path, used=False) as gpu:
        with Supervisor() as legion:
            assert float(run(legion, "GpuOnes", FLOATS).sum()) == FLOATS
            worker = only_worker(legion)
            assert (worker.gpu_arena_bytes > 0, worker.arena_bytes > 0) == (False, True)
            assert gpu.contexts == []
            gpu.use()
            gpu.devices.used = True
            wait_for(
                lambda: run(legion, "GpuOnes", FLOATS) is not None and only_worker(legion).gpu_arena_bytes,
                "the worker asked again",
            )
        assert gpu.allocations == []


FAULTS = {
    "what is opened is other memory": ("cuIpcOpenMemHandle_v2 corrupt",),
    "nothing can be opened": ("cuIpcOpenMemHandle_v2 801",),
    "nothing can be exported": ("cuIpcGetMemHandle 801",),
    "nothing can be allocated": ("cuMemAlloc_v2 2",),
    "no pattern can be written": ("cuMemcpyHtoDAsync_v2 1",),
    "there is no context to be had": ("cuDevicePrimaryCtxRetain 2",),
    "the driver has no device": ("cuDeviceGetCount 3",),
}


@pytest.mark.parametrize("lines", FAULTS.values(), ids=FAULTS)
def test_what_fails_in_the_driver_costs_no_job(gpu: EmulatedGpu, lines: tuple[str, ...]) -> None:
    gpu.fail(*lines)
    with Supervisor() as legion:
        sent = torch.rand(FLOATS)
        for _ in range(3):
            assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
        assert only_worker(legion).gpu_arena_bytes == 0
        assert only_worker(legion).arena_bytes > 0


def test_a_worker_that_opens_other_memory_says_so_once_and_reads_copies(
    gpu: EmulatedGpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.fail("cuIpcOpenMemHandle_v2 corrupt")
    with Supervisor() as legion:
        sent = torch.rand(FLOATS)
        jobs = [submit(legion, "GpuAdd", sent) for _ in range(3)]
        for job in jobs:
            assert torch.equal(job.result(timeout=60)["output_1"], sent + 1)
        logs = [event for job in jobs for event in job.events() if isinstance(event, LogEvent)]
        told = [event.text for event in logs if "GPU" in event.text]
        assert len(told) == 1
        assert "its pattern is another" in told[0]
        before = legion._memory.gpu.segment_bytes(legion._memory.arena_id)
        gpu.fail()
        assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
        assert only_worker(legion).gpu_arena_bytes == 0
        assert legion._memory.gpu.avoided
        assert legion._memory.gpu.segment_bytes(legion._memory.arena_id) == before
        os.kill(pid_of(only_worker(legion)), needs.KILL)
        wait_for(lambda: not legion._memory.gpu.avoided, "its successor is not judged by it")
        assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
        assert only_worker(legion).gpu_arena_bytes > 0


def test_an_export_that_fails_is_told_once_here(gpu: EmulatedGpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.fail("cuIpcGetMemHandle 801")
    with caplog.at_level(logging.WARNING, "legion_shm"), Supervisor() as legion:
        for _ in range(3):
            run(legion, "GpuAdd", torch.rand(FLOATS))
    told = [record.getMessage() for record in caplog.records if "GPU" in record.getMessage()]
    assert len(told) == 1
    assert "cuIpcGetMemHandle: CUDA_ERROR_NOT_SUPPORTED: operation not supported (801)" in told[0]


def test_a_worker_without_the_device_reads_copies_or_refuses(gpu: EmulatedGpu) -> None:
    blind = on_gpu(env={HIDDEN: "1"})
    sent = torch.rand(FLOATS)
    with Supervisor() as legion:
        for _ in range(2):
            with pytest.raises(UnsupportedValue, match="allow_cpu"):
                run(legion, "GpuAdd", sent, blind)
        job = submit(legion, "GpuAdd", sent, blind, allow_cpu=True)
        assert torch.equal(job.result(timeout=60)["output_1"], sent + 1)
        assert legion._memory.gpu.avoided
        assert torch.equal(run(legion, "GpuAdd", sent), sent + 1), "others' pools are as they were"


@pytest.mark.parametrize("where", ["supervisor", "worker"])
def test_it_can_be_turned_off(gpu: EmulatedGpu, where: str) -> None:
    settings: dict[str, Any] = {"gpu_arena_quota_bytes": 0} if where == "supervisor" else {}
    on = on_gpu(gpu_arena="off") if where == "worker" else on_gpu()
    with Supervisor(**settings) as legion:
        for _ in range(2):
            assert float(run(legion, "GpuAdd", torch.ones(FLOATS), on).sum()) == 2 * FLOATS
        assert gpu.allocations == []
        assert only_worker(legion).arena_bytes > 0


def test_what_exceeds_the_quota_goes_through_main_memory(gpu: EmulatedGpu) -> None:
    with Supervisor(gpu_arena_quota_bytes=4 * MIB) as legion:
        for megabytes in (1, 8, 1, 3, 16):
            sent = torch.rand(megabytes * FLOATS)
            assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
            assert only_worker(legion).gpu_arena_bytes <= 4 * MIB
        assert only_worker(legion).gpu_arena_bytes > 0
        assert only_worker(legion).arena_bytes > 0


def test_where_the_device_is_full_main_memory_does(gpu: EmulatedGpu) -> None:
    gpu.limit(2 * MIB)
    with Supervisor() as legion:
        sent = torch.rand(8 * FLOATS)
        assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
        assert gpu.allocations == []


def test_a_killed_worker_takes_nothing_with_it_and_leaves_nothing(gpu: EmulatedGpu, tmp_path: Path) -> None:
    with Supervisor(idle_trim_s=0.2) as legion:
        sent = torch.rand(FLOATS)
        first = submit(legion, "GpuAdd", sent)
        assert first.exception(timeout=60) is None, "done, and not decoded"
        gate = Gate(tmp_path)
        held = legion.submit(gate.flow(), inputs=[sent], spec=on_gpu())
        gate.entered()
        os.kill(pid_of(only_worker(legion)), needs.KILL)
        with pytest.raises(WorkerLost):
            held.result(timeout=60)
        assert torch.equal(first.result()["output_1"], sent + 1), "a dead worker's result"
        assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
        wait_for(lambda: gpu.allocations == [], "all of it comes back when nobody uses it")


def test_unused_memory_is_given_back_and_taken_again(gpu: EmulatedGpu) -> None:
    with Supervisor(idle_trim_s=0.1) as legion:
        for _ in range(2):
            assert float(run(legion, "GpuAdd", torch.ones(FLOATS)).sum()) == 2 * FLOATS
            wait_for(lambda: not gpu.allocations and not gpu.opened, "both arenas are given back")
            assert gpu.violations == ""
        assert only_worker(legion).jobs_done == 2


def test_free_gives_the_workers_segments_back(gpu: EmulatedGpu) -> None:
    with Supervisor(idle_trim_s=600) as legion:
        run(legion, "GpuOnes", FLOATS)
        wait_for(lambda: legion.free(wait_s=10) and not gpu.allocations, "its segment is given back")


def test_results_are_read_after_the_supervisor_has_closed(gpu: EmulatedGpu) -> None:
    with Supervisor() as legion:
        job = submit(legion, "GpuOnes", FLOATS)
        assert job.exception(timeout=60) is None
    assert gpu.allocations == []
    assert float(job.result()["output_1"].sum()) == FLOATS
