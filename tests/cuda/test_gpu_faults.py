"""Tensors of an emulated GPU cross whatever fails in the driver, and whichever worker dies."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
import torch

from legion_shm import Supervisor, WorkerLost, faults
from legion_shm.clock import monotonic_s
from legion_shm.testing.failpoints import armed
from legion_shm.transport import gpu_memory
from tests import needs
from tests.cuda.emulation import TORCH_REFUSES, EmulatedGpu, emulated_gpu, needs_compiler
from tests.cuda.support import FLOATS, on_gpu, run, submit
from tests.system.support import Gate, in_threads, only_worker, pid_of, wait_for

pytestmark = needs_compiler


class Shared(NamedTuple):
    gpu: EmulatedGpu
    legion: Supervisor


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with emulated_gpu(tmp_path_factory.mktemp("gpu")) as gpu:
        with Supervisor(idle_trim_s=0.1, restart_backoff_s=0.01, restart_budget=1000) as legion:
            yield Shared(gpu, legion)
        assert gpu.allocations == []
        assert gpu.violations == ""


def begin_anew(shared: Shared) -> None:
    """A worker that was refused nothing yet comes next."""
    shared.legion.stop_workers()
    wait_for(lambda: not shared.legion.workers() and not shared.gpu.allocations, "nothing is there")


def test_what_a_tensor_is_stays_so(shared: Shared) -> None:
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
    got = run(shared.legion, "GpuSame", sent)
    assert shared.legion._memory.stats().total_bytes == 0
    assert got["same"] is got["base"]
    assert type(got["parameter"]) is torch.nn.Parameter
    for name, tensor in sent.items():
        assert torch.equal(got[name], tensor), name
        assert got[name].is_conj() == (False if name == "conjugate" else tensor.is_conj())
    assert got["turned"].stride() == base.t().stride()
    got["base"][1, 2] = -1
    assert got["turned"][2, 1] == got["row"][2] == -1
    assert base[1, 2] == FLOATS + 2


def test_the_sender_may_write_on_and_nobody_sees_it(shared: Shared) -> None:
    sent = torch.ones(FLOATS)
    job = submit(shared.legion, "GpuSame", sent)
    sent.fill_(5)
    first = job.result(timeout=60)["output_1"]
    assert float(first.sum()) == FLOATS
    second = run(shared.legion, "GpuSame", sent)
    first.fill_(7)
    assert float(second.sum()) == 5 * FLOATS
    assert float(run(shared.legion, "GpuSame", second).sum()) == 5 * FLOATS


FAULTS = {
    "what is opened is other memory": ("cuIpcOpenMemHandle_v2 corrupt",),
    "nothing can be opened": ("cuIpcOpenMemHandle_v2 801",),
    "nothing can be exported": ("cuIpcGetMemHandle 801",),
    "nothing can be allocated": ("cuMemAlloc_v2 2",),
    "no pattern can be written": ("cuMemcpyHtoDAsync_v2 1",),
    "no context can be entered": ("cuCtxPushCurrent_v2 201",),
    "the driver counts no device": ("cuDeviceGetCount 3",),
}


@pytest.mark.parametrize("lines", FAULTS.values(), ids=FAULTS)
def test_what_fails_in_the_driver_costs_no_job(
    shared: Shared, lines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, legion = shared
    monkeypatch.setattr(gpu_memory, "_ASK_AGAIN_S", 0.0)  # of this process, which the last fault refused
    begin_anew(shared)
    gpu.fail(*lines)
    try:
        sent = torch.rand(FLOATS)
        for _ in range(2):
            assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
        assert only_worker(legion).gpu_arena_bytes == 0
        assert only_worker(legion).arena_bytes > 0
    finally:
        gpu.fail()


def test_a_worker_whose_torch_takes_no_such_memory_works_without(shared: Shared) -> None:
    _, legion = shared
    refusing = on_gpu(env={TORCH_REFUSES: "1"})
    sent = torch.rand(FLOATS)
    for _ in range(2):
        job = submit(legion, "GpuAdd", sent, refusing)
        assert torch.equal(job.result(timeout=60)["output_1"], sent + 1)
    begin_anew(shared)


@pytest.mark.slow
def test_callers_get_their_own_bytes_while_workers_are_killed(shared: Shared) -> None:
    _, legion = shared
    on, until_s = on_gpu(max_workers=3), monotonic_s() + 8.0
    done = Counter[str]()

    def call(number: int) -> None:
        random = Random(number)
        while monotonic_s() < until_s:
            start, size = random.randrange(1 << 20), int(2 ** random.uniform(8, 19))
            sent = torch.arange(start, start + size, dtype=torch.int32)
            try:
                got = run(legion, "GpuSame", [sent, sent[size // 3 :]], on)
            except WorkerLost:
                done["lost"] += 1
                continue
            assert torch.equal(got[0], sent)
            assert torch.equal(got[1], sent[size // 3 :])
            done["whole"] += 1

    def kill(_: int) -> None:
        while monotonic_s() < until_s - 2:
            for worker in legion.workers():
                if worker.state == "busy" and done["whole"] > 20 * (done["killed"] + 1):
                    os.kill(pid_of(worker), needs.KILL)
                    done["killed"] += 1
                    break

    in_threads(4, lambda number: kill(number) if number == 3 else call(number))
    assert min(done["whole"], done["killed"]) > 0
    assert done["lost"] <= done["killed"]
    begin_anew(shared)


def test_a_dead_workers_memory_there_is_freed_while_its_main_memory_is_looked_at(shared: Shared) -> None:
    gpu, legion = shared
    begin_anew(shared)
    kept = run(legion, "GpuArray", FLOATS)
    first = submit(legion, "GpuOnes", FLOATS)
    assert first.exception(timeout=60) is None
    os.kill(pid_of(only_worker(legion)), needs.KILL)
    wait_for(lambda: not legion.workers(), "the worker is gone")
    assert len(gpu.allocations) == 1, "somebody has a block there"
    assert float(first.result()["output_1"].sum()) == FLOATS
    wait_for(lambda: gpu.allocations == [], "nobody has one any more")
    assert kept.sum() == FLOATS


DEATHS = {
    "with a block that is empty": ("arena.after_reserve=kill", "GpuOnes", FLOATS),
    "in the midst of its copy": ("gpu.copying=kill", "GpuOnes", FLOATS),
    "before it takes its segment": ("gpu.granted=kill", "GpuOnes", FLOATS),
    "with the supervisor's memory just open": ("gpu.opened=kill", "GpuSame", None),
    "with a result that is not sent": ("host.before_reply=kill", "GpuOnes", FLOATS),
}


@pytest.mark.parametrize(("fault", "node", "value"), DEATHS.values(), ids=DEATHS)
def test_a_worker_that_dies_there_leaves_nothing(
    shared: Shared, tmp_path: Path, fault: str, node: str, value: object
) -> None:
    gpu, legion = shared
    begin_anew(shared)
    sent = torch.rand(FLOATS) if value is None else value
    dying = on_gpu(env={faults.VARIABLE: f"{fault}?{tmp_path / 'died'}"})
    with pytest.raises(WorkerLost):
        run(legion, node, sent, dying)
    assert (tmp_path / "died").exists()
    assert run(legion, node, sent, dying).numel() == FLOATS, "the next one has all it needs"
    wait_for(lambda: gpu.allocations == [], "all of it comes back")
    assert gpu.violations == ""


@pytest.mark.parametrize("fault", ["gpu.create=raise:ENOMEM", "gpu.copying=raise:EIO"])
def test_what_fails_here_leaves_nothing(shared: Shared, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, legion = shared
    monkeypatch.setattr(gpu_memory, "_ASK_AGAIN_S", 0.0)
    begin_anew(shared)
    sent = torch.rand(FLOATS)
    with armed(fault):
        if "copying" in fault:
            with pytest.raises(OSError, match="Input/output"):
                run(legion, "GpuAdd", sent)
        else:
            assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
            assert gpu.allocations == []
    assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
    wait_for(lambda: gpu.allocations == [], "all of it comes back")


def test_a_killed_worker_takes_nothing_with_it_and_leaves_nothing(shared: Shared, tmp_path: Path) -> None:
    gpu, legion = shared
    begin_anew(shared)
    sent = torch.rand(FLOATS)
    first = submit(legion, "GpuAdd", sent)
    assert first.exception(timeout=60) is None, "done, and not decoded"
    gate = Gate(tmp_path)
    held = legion.submit(gate.flow(), inputs=[sent], spec=on_gpu())
    gate.entered()
    assert only_worker(legion).gpu_arena_bytes > 0
    os.kill(pid_of(only_worker(legion)), needs.KILL)
    with pytest.raises(WorkerLost):
        held.result(timeout=60)
    assert gpu.allocations
    assert torch.equal(first.result()["output_1"], sent + 1), "a dead worker's result"
    assert torch.equal(run(legion, "GpuAdd", sent), sent + 1)
    wait_for(lambda: gpu.allocations == [], "all of it comes back when nobody uses it")


def test_unused_memory_is_given_back_and_taken_again(shared: Shared) -> None:
    gpu, legion = shared
    begin_anew(shared)
    run(legion, "GpuAdd", torch.ones(FLOATS))
    before = only_worker(legion)
    for _ in range(2):
        assert float(run(legion, "GpuAdd", torch.ones(FLOATS)).sum()) == 2 * FLOATS
        own = [name for name in gpu.opened if f"open-{before.pid}-" in name]
        assert own, "the worker had it open"
        wait_for(
            lambda: not gpu.allocations and not any(f"open-{before.pid}-" in name for name in gpu.opened),
            "both arenas are given back",
        )
        assert gpu.violations == ""
    assert only_worker(legion).pid == before.pid


def test_a_gpus_unused_memory_goes_back_while_main_memory_is_in_use(shared: Shared) -> None:
    gpu, legion = shared
    begin_anew(shared)
    there = np.ones(FLOATS)
    kept = [run(legion, "GpuSame", there), run(legion, "GpuArray", FLOATS)]
    assert float(run(legion, "GpuAdd", torch.ones(FLOATS)).sum()) == 2 * FLOATS
    assert gpu.allocations
    wait_for(lambda: not gpu.allocations, "both arenas there are given back")
    assert only_worker(legion).arena_bytes > 0
    assert [float(each.sum()) for each in kept] == [FLOATS, FLOATS]
