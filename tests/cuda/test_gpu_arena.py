"""Tensors of a GPU cross within its memory, over an emulated CUDA driver and real processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from legion_shm import LogEvent, Supervisor, UnsupportedValue
from tests import needs
from tests.cuda.emulation import HIDDEN, EmulatedGpu, emulated_gpu, needs_compiler
from tests.cuda.support import FLOATS, MIB, on_gpu, run, submit
from tests.system.support import only_worker, pid_of, wait_for

pytestmark = needs_compiler


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[EmulatedGpu]:
    with emulated_gpu(tmp_path) as gpu:
        yield gpu
        assert gpu.allocations == [], "all is freed with the supervisor"
        assert gpu.violations == "", "nothing was freed while somebody had it open"


def test_a_tensor_crosses_in_the_gpus_memory_both_ways(gpu: EmulatedGpu) -> None:
    with Supervisor() as legion:
        sent = torch.rand(FLOATS)
        for _ in range(3):
            assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
        worker = only_worker(legion)
        assert worker.gpu_arena_bytes > 0
        assert worker.arena_bytes == 0
        assert legion._memory.stats().total_bytes == 0
        assert len(gpu.allocations) == 2, "one segment each way is used again"
        assert len(gpu.opened) == 2
        assert os.getpid() in gpu.contexts


def test_a_process_that_does_not_use_the_gpu_is_not_made_to(tmp_path: Path) -> None:
    with emulated_gpu(tmp_path, used=False) as gpu:
        with Supervisor() as legion:
            assert float(run(legion, "GpuOnes", FLOATS).sum()) == FLOATS
            worker = only_worker(legion)
            assert (worker.gpu_arena_bytes > 0, worker.arena_bytes > 0) == (False, True)
            assert (gpu.contexts, gpu.initialized) == ([], [])
            gpu.use()
            gpu.devices.used = True
            wait_for(
                lambda: run(legion, "GpuOnes", FLOATS) is not None and only_worker(legion).gpu_arena_bytes,
                "the worker asked again",
            )
        assert gpu.allocations == []


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
