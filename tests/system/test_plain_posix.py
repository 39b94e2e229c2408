"""Without pidfd and F_SETSIG, as on macOS, forced here: threads wait, segments are named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from legion_shm import Supervisor, WorkerLost
from legion_shm.supervisor.facilities import PLAIN
from legion_shm.transport.runtime_dir import default_base
from tests import needs
from tests.system.support import (
    MEGABYTE_OF_FLOATS,
    flow,
    gone,
    node_started,
    only_worker,
    pid_of,
    run,
    script_env,
    spec,
    wait_for,
)

pytestmark = needs.posix

PROGRAM = """
import sys, torch
from legion_shm import Supervisor
from tests.system.support import flow, node_started, only_worker, spec
legion = Supervisor(segments="portable")
value = legion.share(torch.ones(1 << 18))
job = legion.submit(flow("TestSleep", seconds=60.0), spec=spec())
node_started(job)
print(only_worker(legion).pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAIN, "1")
    monkeypatch.setattr(os, "pidfd_open", None, raising=False)  # whoever takes it fails


def test_a_tensor_goes_there_and_back_and_a_killed_worker_is_seen_at_once() -> None:
    with Supervisor(segments="portable", channel="ipc") as legion:
        value = torch.rand(MEGABYTE_OF_FLOATS)
        assert torch.equal(run(legion, "TestAdd", value), value + 1)
        job = legion.submit(flow("TestSleep", seconds=60.0), spec=spec())
        node_started(job)
        killed_s = time.monotonic()
        os.kill(pid_of(only_worker(legion)), signal.SIGKILL)
        with pytest.raises(WorkerLost, match="SIGKILL"):
            job.result(timeout=20)
        assert time.monotonic() - killed_s < 2.0
        assert torch.equal(run(legion, "TestAdd", value), value + 1), "the next job has a new worker"
        pid = pid_of(only_worker(legion))
    assert gone(pid)


def segments_with(prefix: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]


def test_neither_workers_nor_segments_nor_folders_outlive_a_killed_supervisor() -> None:
    base = default_base()
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=script_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        (lock,) = base.glob("*.lock")
        prefix = lock.read_text()
        assert segments_with(prefix)
        program.kill()
        program.wait(10)
        wait_for(lambda: gone(pid), "the worker is gone", within_s=2.0)
        wait_for(lambda: not list(base.iterdir()), "the folder is gone", within_s=2.0)
        assert not segments_with(prefix), "nor is there a segment"
