from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest

from legion_shm import Supervisor
from tests import needs
from tests.system.support import gone, run, script_env, wait_for

SHARED_MEMORY = Path("/dev/shm")
SWEEPER = os.path.join("transport", "sweep.py")

PROGRAM = """
import os
import sys
import torch
from legion_shm import NodeEvent, Supervisor
from tests.system.support import flow, node_started, spec

base, segments, act = sys.argv[1:]
legion = Supervisor(runtime_dir=base, segments=segments)
if act == "start":
    legion.warm_up(spec())
elif act != "unused":
    value = legion.share(torch.ones(1 << 18))
    result = legion.submit(flow("TestAdd"), inputs=[value], spec=spec()).result(timeout=60)
    grandchild = legion.submit(flow("TestGrandchild"), spec=spec()).result(timeout=60)["output_1"]
    print("grandchild", grandchild, flush=True)
    if act != "idle":
        job = legion.submit(flow(act, seconds=60.0), spec=spec())
        node_started(job)
print("ready", flush=True)
sys.stdin.read()
os._exit(7)
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


def sweepers_of(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children() if SWEEPER in " ".join(child.cmdline())]


def sweeper_of(pid: int) -> int:
    wait_for(lambda: sweepers_of(pid), "it is executed")
    (sweeper,) = sweepers_of(pid)
    return sweeper


def workers_of(pid: int) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if "--multiprocessing-fork" in child.cmdline()
    ]


def family_of(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


@contextlib.contextmanager
def running(
    base: Path, segments: str, act: str, **env: str
) -> Generator[tuple[subprocess.Popen[str], list[int]], None, None]:
    """A program with a supervisor that is where ``act`` says, and all processes that belong to it."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(base), segments, act],
        env=script_env(**env),
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
        if act != "unused":
            wait_for(lambda: workers_of(program.pid), "a worker process is there")
        yield program, pids + family_of(program.pid)
    finally:
        program.kill()
        program.wait(timeout=10)
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.close()
        program.stdout.close()


def end(program: subprocess.Popen[str], how: str) -> float:
    """End it so that no code of ours runs in it; when that was."""
    if how == "exit":
        assert program.stdin is not None
        program.stdin.close()  # os._exit
    else:
        os.kill(program.pid, getattr(signal, how))
    ended_s = time.monotonic()
    assert program.wait(timeout=10) == (7 if how == "exit" else -getattr(signal, how))
    return ended_s


@needs.posix
@pytest.mark.parametrize(
    ("act", "segments", "how", "zygote"),
    [
        ("unused", "portable", "SIGTERM", "auto"),
        ("start", "portable", "SIGKILL", "auto"),
        pytest.param("start", "memfd", "SIGTERM", "off", marks=needs.linux),
        pytest.param("start", "memfd", "exit", "auto", marks=[needs.linux, pytest.mark.slow]),
        ("idle", "portable", "SIGTERM", "off"),
        pytest.param("idle", "portable", "SIGKILL", "auto", marks=pytest.mark.slow),
        pytest.param("idle", "memfd", "exit", "off", marks=[needs.linux, pytest.mark.slow]),
        pytest.param("TestSleep", "memfd", "SIGTERM", "auto", marks=needs.linux),
        pytest.param("TestSleep", "memfd", "SIGTERM", "off", marks=[needs.linux, pytest.mark.slow]),
        pytest.param("TestSleep", "memfd", "SIGKILL", "off", marks=[needs.linux, pytest.mark.slow]),
        pytest.param("TestHoldGil", "portable", "exit", "off", marks=pytest.mark.slow),
        ("TestHoldGil", "portable", "SIGKILL", "auto"),
    ],
)
def test_a_program_that_is_ended_at_once_leaves_nothing_and_needs_no_next_start(
    base: Path, act: str, segments: str, how: str, zygote: str
) -> None:
    with running(base, segments, act, LEGION_ZYGOTE=zygote) as (program, pids):
        prefixes = tuple(lock.read_text() for lock in base.glob("*.lock"))
        assert len(prefixes) == 1
        assert bool(segments_of(base)) == (segments == "portable" and act not in ("unused", "start"))
        ended_s = end(program, how)
        wait_for(lambda: all(gone(pid) for pid in pids), f"processes {pids} are gone", within_s=2.0)
        wait_for(lambda: not list(base.iterdir()), "the folder and its lock are gone", within_s=2.0)
        wait_for(
            lambda: not [name for name in shared_names() if name.startswith(prefixes)],
            "the named segments are gone",
            within_s=2.0,
        )
        assert time.monotonic() - ended_s < 2.0


@pytest.mark.parametrize(
    ("act", "segments"),
    [
        ("idle", "portable"),
        pytest.param("TestSleep", "memfd", marks=needs.linux),
        ("TestHoldGil", "portable"),
        pytest.param("start", "memfd", marks=needs.linux),
    ],
)
def test_nothing_outlives_a_killed_supervisor_whose_sweeper_was_killed_too(
    base: Path, act: str, segments: str
) -> None:
    with running(base, segments, act) as (program, pids):
        if not needs.WINDOWS:
            os.kill(sweeper_of(program.pid), signal.SIGKILL)
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


@needs.posix
def test_a_sweeper_that_was_killed_is_replaced_when_the_next_worker_starts(base: Path) -> None:
    with Supervisor(runtime_dir=str(base)) as legion:
        first = sweeper_of(os.getpid())
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: gone(first), "it has ended")
        assert run(legion, "TestPass", 1) == 1
        assert sweeper_of(os.getpid()) != first
    assert list(base.iterdir()) == []


@needs.posix
def test_what_asks_a_whole_service_to_end_does_not_end_the_sweeper_first(base: Path) -> None:
    with running(base, "memfd" if sys.platform == "linux" else "portable", "idle") as (program, pids):
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            os.kill(sweeper_of(program.pid), number)
        assert not gone(sweeper_of(program.pid))
        for pid in (program.pid, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        wait_for(lambda: all(gone(pid) for pid in pids), f"processes {pids} are gone", within_s=2.0)
        assert list(base.iterdir()) == []


@needs.posix
def test_a_program_that_replaces_itself_by_another_leaves_nothing(base: Path) -> None:
    """As ComfyUI-Manager restarts ComfyUI: the process lives on, the program in it does not."""
    code = (
        "import os, sys\nfrom legion_shm import Supervisor\nfrom tests.system.support import run\n"
        "legion = Supervisor(runtime_dir=sys.argv[1])\nrun(legion, 'TestPass')\n"
        "print(legion.workers()[0].pid, flush=True)\n"
        "os.execv(sys.executable, [sys.executable, '-c', 'import sys; sys.stdin.read()'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(base)],
        env=script_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as program:
        assert program.stdout is not None
        worker = int(program.stdout.readline())
        wait_for(lambda: gone(worker), "the worker has ended", within_s=2.0)
        wait_for(lambda: not list(base.iterdir()), "the folder is gone", within_s=2.0)
        assert program.poll() is None
        program.kill()


@needs.fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_the_program_forked_does_not_keep_the_sweeper_waiting(base: Path) -> None:
    code = (
        "import os, sys, time\nfrom legion_shm import Supervisor\n"
        "legion = Supervisor(runtime_dir=sys.argv[1])\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(60)\n"
        "print(child, flush=True)\nos._exit(0)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(base)], env=script_env(), stdout=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        child = int(program.stdout.readline())
        assert program.wait(10) == 0
    try:
        wait_for(lambda: not list(base.iterdir()), "the folder is gone", within_s=2.0)
        assert not gone(child)
    finally:
        os.kill(child, signal.SIGKILL)


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
