"""Tensors of a real GPU: they cross within its memory, or through main memory, and arrive where they were."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from legion_shm import JobFailed, Supervisor, UnsupportedValue, WorkerLost, WorkerSpec
from tests import needs
from tests.system.support import (
    REPO,
    Gate,
    in_threads,
    only_worker,
    pid_of,
    run_script,
    spec,
    wait_for,
)

HAS_CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device that torch can use")
if HAS_CUDA:
    torch.zeros(1, device="cuda")  # what the driver opens stays open, and is no leak of a test

NODES = Path(__file__).with_name("cuda_nodes.py")
MIB = 1 << 20


def on_gpu(**env: str) -> WorkerSpec:
    return spec(node_modules=[NODES], env=env)


def flow(class_type: str, outputs: int = 1) -> dict[str, Any]:
    return {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "node": {"class_type": class_type, "inputs": {"value": ["in", 0]}},
        "out": {
            "class_type": "LegionExporter",
            "inputs": {f"input_{slot + 1}": ["node", slot] for slot in range(outputs)},
        },
    }


def run(legion: Supervisor, class_type: str, value: object, *, on: WorkerSpec | None = None) -> Any:
    job = legion.submit(flow(class_type), inputs=[value], spec=on or on_gpu())
    return job.result(timeout=120)["output_1"]


WAYS = {"within the GPU": 1 << 30, "through main memory": 0}


@pytest.fixture(scope="module", params=list(WAYS.values()), ids=list(WAYS))
def legion(request: pytest.FixtureRequest) -> Iterator[Supervisor]:
    with Supervisor(gpu_arena_quota_bytes=request.param) as supervisor:
        yield supervisor


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    left, right = (each.contiguous().cpu().view(torch.uint8) for each in (one, other))
    return bool(torch.equal(left, right))


DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_the_gpu_is_there_again_to_the_bit(legion: Supervisor, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (3, 5, 8 * 16), dtype=torch.uint8)
    sent = bits.view(dtype).cuda()
    back = run(legion, "TestPass", sent)
    assert same_bits(back, sent)
    assert back.data_ptr() != sent.data_ptr()


@pytest.mark.parametrize("nbytes", [0, 4, 4096, MIB, 25 * MIB, 100 * MIB])
def test_any_size_is_computed_on_there_and_comes_back(legion: Supervisor, nbytes: int) -> None:
    sent = torch.randn(nbytes // 4, device="cuda")
    assert same_bits(run(legion, "Double", sent), sent * 2)


def test_views_of_one_memory_arrive_as_views_of_one_memory(legion: Supervisor) -> None:
    sent = torch.arange(12.0, device="cuda").reshape(3, 4)
    one, turned = run(legion, "TestPass", [sent, sent.t()])
    assert one.is_cuda
    assert torch.equal(turned, one.t())
    one[0, 1] = 99
    assert turned[1, 0] == 99
    assert sent[0, 1] == 1


def test_strides_gradients_sparse_and_conjugate_tensors_keep_what_they_are(legion: Supervisor) -> None:
    turned = torch.randn(6, 7, device="cuda").t()
    back = run(legion, "TestPass", turned)
    assert same_bits(back, turned)
    assert back.stride() == turned.stride()
    weight = torch.nn.Parameter(torch.randn(4, device="cuda"))
    back = run(legion, "TestPass", weight)
    assert type(back) is torch.nn.Parameter
    assert back.requires_grad
    assert same_bits(back.detach(), weight.detach())
    sparse = torch.eye(4, device="cuda").to_sparse()
    assert torch.equal(run(legion, "TestPass", sparse).to_dense(), torch.eye(4, device="cuda"))
    conjugate = torch.randn(5, dtype=torch.complex64, device="cuda").conj()
    assert torch.equal(run(legion, "TestPass", conjugate), conjugate)


def test_work_that_the_gpu_has_not_done_yet_is_waited_for(legion: Supervisor) -> None:
    sent = torch.zeros(16 * MIB, device="cuda")
    for _ in range(100):
        sent += 1  # queued: the host is far ahead
    assert bool((run(legion, "SideStream", sent) == 300).all())


def test_nobody_else_sees_what_a_node_writes_into_its_input(legion: Supervisor) -> None:
    sent = torch.arange(5.0, device="cuda")
    for _ in range(2):
        job = legion.submit(flow("WriteInPlace", 2), inputs=[sent], spec=on_gpu())
        result = job.result(timeout=120)
        assert result["output_2"].tolist() == [0, 1, 2, 3, 4]
        assert result["output_1"].tolist() == [9] * 5
        assert sent.tolist() == [0, 1, 2, 3, 4]


def test_what_the_caller_writes_into_a_received_tensor_is_passed_on(legion: Supervisor) -> None:
    back = run(legion, "Double", torch.ones(4, device="cuda"))
    back[1] = 7
    assert run(legion, "Describe", back)[1] == [2, 7, 2, 2]


def test_a_worker_without_the_gpu_refuses_unless_the_caller_allows_the_cpu(legion: Supervisor) -> None:
    blind = on_gpu(CUDA_VISIBLE_DEVICES="")
    sent = torch.ones(3, device="cuda")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    with pytest.raises(UnsupportedValue, match=rf"cuda device {uuid}.*allow_cpu"):
        run(legion, "Describe", sent, on=blind)
    job = legion.submit(flow("Describe"), inputs=[sent], spec=blind, allow_cpu=True)
    assert job.result(timeout=120)["output_1"] == ["cpu", [1, 1, 1], False]


def test_a_worker_that_has_the_gpu_by_its_uuid_is_told_apart_by_it(legion: Supervisor) -> None:
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    named = on_gpu(CUDA_VISIBLE_DEVICES=uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    assert run(legion, "Describe", torch.ones(2, device="cuda"), on=named) == ["cuda:0", [1, 1], True]


def test_jobs_that_need_no_gpu_open_none_neither_here_nor_in_the_worker(tmp_path: Path) -> None:
    script = tmp_path / "cpu_only.py"
    script.write_text(
        "import torch\n"
        "from legion_shm import Supervisor, WorkerSpec\n"
        f"spec = WorkerSpec(engine='graph', node_modules=[{str(NODES)!r}])\n"
        "with Supervisor() as legion:\n"
        f"    job = legion.submit({flow('Describe')!r}, inputs=[torch.ones(1 << 18)], spec=spec)\n"
        "    device, values, opened = job.result(timeout=120)['output_1']\n"
        "print(device, len(values), opened, torch.cuda.is_initialized())\n"
    )
    done = run_script(str(script), cwd=REPO, within_s=120)
    assert done.stdout.split() == ["cpu", str(1 << 18), "False", "False"], done.stderr


def test_memory_that_the_gpu_has_not_fails_the_job_and_keeps_the_worker(legion: Supervisor) -> None:
    run(legion, "Describe", 1)
    before = {worker.pid for worker in legion.workers()}
    with pytest.raises(JobFailed, match=r"out of memory|OutOfMemory") as caught:
        run(legion, "TakeAll", 1)
    assert caught.value.node_id == "node"
    assert run(legion, "Double", torch.ones(2, device="cuda")).tolist() == [2, 2]
    assert {worker.pid for worker in legion.workers()} == before


def test_free_gives_the_gpus_memory_back_and_says_how_much() -> None:
    with Supervisor() as legion:
        assert run(legion, "Hoard", 512) >= 512 * MIB
        free_before, _ = torch.cuda.mem_get_info()
        (freed,) = legion.free(on_gpu(), wait_s=60)
        assert freed.gpu_bytes >= 512 * MIB
        wait_for(lambda: torch.cuda.mem_get_info()[0] >= free_before + 500 * MIB, "the driver has it again")


def test_a_killed_workers_memory_of_the_gpu_comes_back(tmp_path: Path) -> None:
    with Supervisor() as legion:
        run(legion, "Hoard", 1024)
        gate = Gate(tmp_path)
        job = legion.submit(gate.flow(), inputs=[torch.ones(4, device="cuda")], spec=on_gpu())
        gate.entered()
        held, _ = torch.cuda.mem_get_info()
        os.kill(pid_of(only_worker(legion)), needs.KILL)
        with pytest.raises(WorkerLost):
            job.result(timeout=30)
        wait_for(lambda: torch.cuda.mem_get_info()[0] >= held + 1000 * MIB, "the GPU's memory is back")
        assert run(legion, "Double", torch.ones(2, device="cuda")).tolist() == [2, 2]


def test_a_dropped_tensor_of_the_gpu_holds_no_block_of_the_arena(legion: Supervisor) -> None:
    for _ in range(5):
        run(legion, "Double", torch.ones(8 * MIB // 4, device="cuda"))
    wait_for(lambda: not any(worker.job_id for worker in legion.workers()), "all is quiet")
    before = sum(worker.arena_bytes for worker in legion.workers())
    for _ in range(20):
        run(legion, "Double", torch.ones(8 * MIB // 4, device="cuda"))
    assert sum(worker.arena_bytes for worker in legion.workers()) <= before


# --- within the GPU's memory ---------------------------------------------------------------------------


def script(tmp_path: Path, body: str, env: dict[str, str] | None = None) -> list[str]:
    """What a program of its own prints; it has ``legion``, ``spec`` and ``passed(value)``."""
    path = tmp_path / "program.py"
    path.write_text(
        "import torch\n"
        "from legion_shm import Supervisor, WorkerSpec\n"
        "def main():\n"
        f"    spec = WorkerSpec(engine='graph', node_modules=[{str(NODES)!r}])\n"
        f"    flow = {flow('Double')!r}\n"
        "    with Supervisor() as legion:\n"
        "        def doubled(value):\n"
        "            return legion.submit(flow, inputs=[value], spec=spec).result(timeout=120)['output_1']\n"
        + "".join(f"        {line}\n" for line in body.splitlines())
        + "main()\n"
    )
    done = run_script(str(path), cwd=REPO, within_s=150, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_nothing_of_a_gpus_tensor_is_in_main_memory() -> None:
    with Supervisor() as legion:
        sent = torch.randn(25 * MIB // 4, device="cuda")
        for _ in range(3):
            assert same_bits(run(legion, "Double", sent), sent * 2)
        worker = only_worker(legion)
        assert worker.gpu_arena_bytes >= 25 * MIB
        assert worker.arena_bytes == 0
        assert legion._memory.stats().total_bytes == 0


@pytest.mark.parametrize("conf", ["backend:cudaMallocAsync", "expandable_segments:True"])
def test_whatever_allocator_torch_uses_on_either_side(tmp_path: Path, conf: str) -> None:
    body = (
        "sent = torch.arange(1 << 20, device='cuda')\n"
        "results = [bool((doubled(sent) == 2 * sent).all()) for _ in range(3)]\n"
        "print(results.count(True), legion.workers()[0].gpu_arena_bytes > 0, legion.workers()[0].arena_bytes)"
    )
    printed = script(tmp_path, body, {"PYTORCH_CUDA_ALLOC_CONF": conf})
    assert printed == ["3", "True", "0"]


def test_results_of_the_gpu_come_to_a_program_that_had_not_used_it(tmp_path: Path) -> None:
    body = (
        "flow['node']['class_type'] = 'OnGpu'\n"
        "print(torch.cuda.is_initialized())\n"
        "print(float(doubled(1 << 20).sum()) == 1 << 20, torch.cuda.is_initialized())\n"
        "import time\n"
        "time.sleep(1.1)\n"
        "print(float(doubled(1 << 20).sum()) == 1 << 20, legion.workers()[0].gpu_arena_bytes > 0)"
    )
    assert script(tmp_path, body) == ["False", "True", "True", "True", "True"]


def test_threads_with_streams_of_their_own_get_their_own_bytes(legion: Supervisor) -> None:
    cuda: Any = torch.cuda

    def work(number: int) -> None:
        with cuda.stream(cuda.Stream()):
            for round_ in range(5):
                sent = torch.full((4 * MIB,), float(number * 100 + round_), device="cuda")
                back = run(legion, "Double", sent)
                assert bool((back == 2 * (number * 100 + round_)).all())

    in_threads(4, work)


def test_inference_mode_on_this_side_changes_nothing(legion: Supervisor) -> None:
    with torch.inference_mode():
        sent = torch.randn(MIB, device="cuda")
        back = run(legion, "Double", sent)
    assert not back.is_inference()
    back += 1
    assert same_bits(back, sent * 2 + 1)
    assert same_bits(run(legion, "Double", back), back * 2)


def test_a_result_outlives_its_killed_worker_and_unused_memory_goes_back() -> None:
    torch.cuda.empty_cache()
    with Supervisor(idle_trim_s=0.2) as legion:
        job = legion.submit(flow("OnGpu"), inputs=[64 * MIB], spec=on_gpu())
        assert job.exception(timeout=120) is None
        free_before, _ = torch.cuda.mem_get_info()
        os.kill(pid_of(only_worker(legion)), needs.KILL)
        wait_for(lambda: not legion.workers(), "the worker is gone")
        assert legion._memory.gpu._segments
        assert bool((job.result()["output_1"] == 1).all())
        torch.cuda.empty_cache()
        wait_for(
            lambda: torch.cuda.mem_get_info()[0] >= free_before + 200 * MIB,
            "what was shared and what the worker had is the driver's again",
        )


def test_what_doctor_says_of_the_gpu() -> None:
    from legion_shm.transport.gpu_probe import probe

    assert "opened by another process" in probe(str(torch.cuda.get_device_properties(0).uuid))


def test_this_module_ran_against_a_real_driver() -> None:
    driver = ctypes.CDLL("nvcuda.dll" if needs.WINDOWS else "libcuda.so.1")
    version = ctypes.c_int()
    assert driver.cuDriverGetVersion(ctypes.byref(version)) == 0
    assert version.value >= 11000
