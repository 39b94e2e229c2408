from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from legion_shm import Supervisor
from tests import needs
from tests.system.support import gone, script_env, wait_for

SHARED_MEMORY = Path("/dev/shm")

PROGRAM = """
import sys
import torch
from legion_shm import NodeEvent, Supervisor
from tests.system.support import flow, node_started, spec

base, segments, act = sys.argv[1:]
legion = Supervisor(runtime_dir=base, segments=segments)
if act == "start":
    legion.warm_up(spec())
else:
    value = legion.share(torch.ones(1 << 18))
    result = legion.submit(flow("TestAdd"), inputs=[value], spec=spec()).result(timeout=60)
    grandchild = legion.submit(flow("TestGrandchild"), spec=spec()).result(timeout=60)["output_1"]
    print("grandchild", grandchild, flush=True)
    if act != "idle":
        job = legion.submit(flow(act, seconds=60.0), spec=spec())
        node_started(job)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def base() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="legion-"))  # short, for sockets' paths are
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def shared_names() -> list[str]:
    """On Windows none: a name there ends with its last handle, and cannot be listed."""
    return [] if needs.WINDOWS else os.listdir(SHARED_MEMORY)


def segments_of(base: Path) -> list[str]:
    """The portable segments of the supervisors, dead or alive, that have a lock file in ``base``."""
    prefixes = [lock.read_text() for lock in base.glob("*.lock")]
    return [name for name in shared_names() for prefix in prefixes if name.startswith(prefix)]


def workers_of(pid: int) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if "--multiprocessing-fork" in child.cmdline()
    ]


@pytest.mark.parametrize(
    ("act", "segments"),
    [
        ("idle", "portable"),
        pytest.param("TestSleep", "memfd", marks=needs.linux),
        ("TestHoldGil", "portable"),
        pytest.param("start", "memfd", marks=needs.linux),
    ],
)
def test_nothing_outlives_a_killed_supervisor(base: Path, act: str, segments: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(base), segments, act],
        env=script_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdin is not None
        assert program.stdout is not None
        pids: list[int] = []
        while (line := program.stdout.readline().split()) != ["ready"]:
            assert line, "the program has ended early"
            pids.append(int(line[1]))
        wait_for(lambda: workers_of(program.pid), "a worker process is there")
        pids += [worker.pid for worker in workers_of(program.pid)]
        left = segments_of(base)
        assert bool(left) == (segments == "portable" and not needs.WINDOWS)

        os.kill(program.pid, needs.KILL)
        killed_s = time.monotonic()
        program.wait(timeout=10)
        wait_for(lambda: all(gone(pid) for pid in pids), f"processes {pids} are gone", within_s=2.0)
        assert time.monotonic() - killed_s < 2.0

        assert len(list(base.iterdir())) == 2, "its folder and its lock, as a killed process leaves them"
        with Supervisor(runtime_dir=str(base)):
            assert len(list(base.iterdir())) == 2, "the new one's alone"
            assert not {*left} & {*shared_names()}
        assert list(base.iterdir()) == []
    finally:
        program.kill()
        program.wait(timeout=10)
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.close()
        program.stdout.close()


def test_a_living_supervisor_is_left_alone_by_the_next_one(base: Path) -> None:
    with Supervisor(runtime_dir=str(base), segments="portable") as first:
        shared = first.empty((1 << 18,))
        mine = segments_of(base)
        with Supervisor(runtime_dir=str(base)):
            assert len(list(base.iterdir())) == 4
        assert segments_of(base) == mine
        assert bool(mine) is not needs.WINDOWS
        shared.fill_(1)
    assert list(base.iterdir()) == []
    del shared
