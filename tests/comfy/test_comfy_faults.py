"""The starred rows of docs/reliability.md, on a real ComfyUI: its worker killed, crashed, hung, orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from legion_shm import Job, JobFailed, Supervisor, WorkerLost, WorkerSpec
from tests.comfy.conftest import RealComfyUI, chain
from tests.system.support import gone, node_started, pid_of, script_env, wait_for

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(300)]

_WAIT_S = 150


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    with Supervisor(restart_backoff_s=0.01, heartbeat_timeout_s=5.0) as supervisor:
        yield supervisor


def submit(legion: Supervisor, spec: WorkerSpec, class_type: str, **options: Any) -> Job:
    return legion.submit(chain(class_type), inputs=[torch.full((1, 8, 8, 3), 0.25)], spec=spec, **options)


def works(legion: Supervisor, spec: WorkerSpec) -> None:
    image = submit(legion, spec, "ImageInvert").result(timeout=_WAIT_S)["output_1"]
    assert (float(image.min()), float(image.max())) == (0.75, 0.75)


def test_an_idle_comfyui_that_is_killed_is_replaced(legion: Supervisor, spec: WorkerSpec) -> None:
    works(legion, spec)
    (worker,) = legion.workers()
    os.kill(pid_of(worker), signal.SIGKILL)
    killed_s = time.monotonic()
    wait_for(lambda: worker.id not in [info.id for info in legion.workers()], "its end was seen")
    assert time.monotonic() - killed_s < 2.0
    works(legion, spec)


def test_a_comfyui_that_is_killed_in_mid_job_loses_that_job(legion: Supervisor, spec: WorkerSpec) -> None:
    job = submit(legion, spec, "ProbeSlow")
    node_started(job, "1")
    os.kill(pid_of(legion.workers()[0]), signal.SIGKILL)
    with pytest.raises(WorkerLost, match="SIGKILL"):
        job.result(timeout=10)
    works(legion, spec)


def test_a_comfyui_that_crashes_names_the_cause(legion: Supervisor, spec: WorkerSpec) -> None:
    with pytest.raises(WorkerLost, match="SIGSEGV") as caught:
        submit(legion, spec, "ProbeCrash").result(timeout=_WAIT_S)
    assert any("Fatal Python error" in line for line in caught.value.log_tail)


def test_a_comfyui_whose_node_is_out_of_memory_fails_that_job_and_is_kept(
    legion: Supervisor, spec: WorkerSpec
) -> None:
    works(legion, spec)
    (worker,) = legion.workers()
    with pytest.raises(JobFailed, match="can't allocate memory") as caught:
        submit(legion, spec, "ProbeEatMemory").result(timeout=_WAIT_S)
    assert (caught.value.node_id, caught.value.class_type) == ("1", "ProbeEatMemory")
    works(legion, spec)
    assert [info.id for info in legion.workers()] == [worker.id]


def test_a_comfyui_that_the_system_kills_for_memory_names_that_cause(
    legion: Supervisor, spec: WorkerSpec
) -> None:
    with pytest.raises(WorkerLost, match="out of memory"):
        submit(legion, spec, "ProbeKilled").result(timeout=_WAIT_S)
    works(legion, spec)


def test_a_comfyui_whose_node_holds_the_interpreters_lock_is_found_hung(
    legion: Supervisor, spec: WorkerSpec
) -> None:
    with pytest.raises(WorkerLost, match="heartbeat_timeout_s = 5"):
        submit(legion, spec, "ProbeHoldGil").result(timeout=_WAIT_S)


PROGRAM = """
import sys, torch
from legion_shm import Supervisor, WorkerSpec
from tests.comfy.test_comfy_faults import submit
from tests.system.support import node_started
path, python, *arguments = sys.argv[1:]
spec = WorkerSpec(engine="comfy", comfyui_path=path, python_executable=python, extra_args=arguments)
legion = Supervisor()
node_started(submit(legion, spec, "ProbeSlow"), "1")
print(legion.workers()[0].pid, flush=True)
sys.stdin.read()
"""


def test_a_comfyui_ends_with_its_killed_supervisor(comfyui: RealComfyUI) -> None:
    command = [sys.executable, "-c", PROGRAM, str(comfyui.path), str(comfyui.python), *comfyui.arguments]
    program = subprocess.Popen(
        command, env=script_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout is not None
        worker = int(program.stdout.readline())
        program.kill()
        wait_for(lambda: gone(worker), "it ends with its supervisor", within_s=2.0)
    finally:
        program.kill()
        program.communicate(timeout=10)
    Supervisor().close()
