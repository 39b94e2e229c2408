"""What happens around Legion: the clock jumps, disks are full, memory has limits, the program ends."""

from __future__ import annotations

import ast
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from legion_shm import JobFailed, Supervisor, WorkerLost
from tests import needs
from tests.reliability.support import do
from tests.system.support import REPO, flow, gone, run_script, script_env, spec, wait_for

WALL_CLOCK = {
    "time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "datetime.now",
    "datetime.today", "datetime.datetime.now", "date.today", "datetime.date.today",
}  # fmt: skip


def test_nothing_of_ours_reads_the_wall_clock() -> None:
    found = [
        f"{path.relative_to(REPO).as_posix()}:{node.lineno}"
        for folder in ("legion_shm", "transport", "supervisor")
        for path in (REPO / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL_CLOCK
    ]
    assert [place.split(":")[0] for place in found] == ["supervisor/graph_nodes/files.py"], (
        "names of saved files"
    )


def test_a_clock_that_jumps_by_hours_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Supervisor(heartbeat_interval_s=0.05, heartbeat_timeout_s=1.0) as legion:
        jump = "import itertools, time; hours = itertools.count(); time.time = lambda: 3600.0 * next(hours)"
        do(legion, jump).result(timeout=60)
        hours = itertools.count(step=-1)
        monkeypatch.setattr("time.time", lambda: 3600.0 * next(hours))
        job = legion.submit(flow("TestSleep", seconds=0.3), spec=spec(), deadline_s=100.0)
        assert job.exception(timeout=100) is None
        (worker,) = [
            info.id for info in legion.workers() if info.jobs_done == 1 and info.spec_key != spec().key
        ]
        do(legion, "import time; time.sleep(0.3)").result(timeout=60)
        assert worker in [info.id for info in legion.workers()], "and its worker is the same"


# --- disks and memory -----------------------------------------------------------------------------------

MOUNTED = """
import os, sys, torch
from legion_shm import ArenaFull, ConfigError, Supervisor
from tests.system.support import flow, run, spec

with Supervisor(segments="portable", arena_wait_s=0.5) as legion:
    kept = legion.share(torch.ones(1 << 20))
    for _ in range(2):
        try:
            legion.share(torch.ones(7 << 19))
        except ArenaFull as error:
            print("ArenaFull", flush=True)
    job = legion.submit(flow("TestBig", nbytes=14 << 20), spec=spec())
    print(type(job.exception(timeout=60)).__name__)
    assert float(kept.sum()) == 1 << 20, "no SIGBUS for what was there"
    del kept
    print(float(run(legion, "TestAdd", torch.ones(1 << 18))[0]), "recovered")
for folder in ("/mnt/full/run", "/mnt/readonly/run", "/proc/nowhere/run"):
    try:
        Supervisor(runtime_dir=folder)
    except ConfigError as error:
        print("ConfigError", error.key)
"""


def may_mount() -> bool:
    trial = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and not subprocess.run(trial, capture_output=True).returncode


@pytest.mark.skipif(sys.platform != "linux" or not may_mount(), reason="may not mount a small /dev/shm")
def test_a_full_shared_memory_and_a_full_or_read_only_disk_are_clear_errors() -> None:
    steps = [
        "mount -t tmpfs -o size=16m tmpfs /dev/shm",
        "mount -t tmpfs tmpfs /mnt",
        "mkdir /mnt/full /mnt/readonly",
        "mount -t tmpfs -o nr_inodes=1 tmpfs /mnt/full",
        "mount -t tmpfs -o ro tmpfs /mnt/readonly",
        'exec "$0" -c "$1"',
    ]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", " && ".join(steps), sys.executable, MOUNTED],
        cwd=REPO,
        env=script_env(),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [
        "ArenaFull", "ArenaFull", "ArenaFull", "2.0 recovered",
        "ConfigError runtime_dir", "ConfigError runtime_dir", "ConfigError runtime_dir",
    ]  # fmt: skip


@needs.rlimits
def test_a_worker_at_its_limit_of_memory_fails_the_job_or_says_how_it_died() -> None:
    limited = "import resource, torch; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, -1)); "
    with Supervisor(restart_backoff_s=0.01) as legion:
        refused = do(legion, limited + "torch.ones(1 << 29)")
        assert isinstance(refused.exception(timeout=60), JobFailed)
        assert "memory" in str(refused.exception()).lower()
        killed = do(legion, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", name="killed")
        with pytest.raises(WorkerLost, match="out of memory"):
            killed.result(timeout=60)
        assert do(legion, "out = 5", name="killed").result(timeout=60)["output_1"] == 5


# --- told to end ------------------------------------------------------------------------------------------

PROGRAM = """
import signal, sys
from legion_shm import Supervisor
from tests.reliability.support import do, hostile
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with Supervisor(runtime_dir=sys.argv[1], segments="portable") as legion:
    do(legion, "import torch; out = torch.ones(1 << 18)").result(timeout=60)
    job = do(legion, "import time; time.sleep(60)")
    print(legion.workers()[0].pid, flush=True)
    job.result()
"""


@needs.posix
def test_a_sigterm_that_a_program_turns_into_an_exit_ends_in_order(tmp_path: Path) -> None:
    """Python's default handler gives no code of ours a chance: see docs/reliability.md."""
    base = Path(tempfile.gettempdir()) / f"legion-{os.getpid()}"
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(base)],
        env=script_env(),
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    try:
        assert program.stdout is not None
        worker = int(program.stdout.readline())
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=30) == 143
        assert gone(worker)
        assert not list(base.iterdir())
    finally:
        program.kill()
        program.communicate(timeout=10)
        base.rmdir()


@needs.posix
def test_a_child_in_a_session_of_its_own_is_beyond_the_group_and_lives_on() -> None:
    """What a worker starts ends with it, unless it goes out of its way: docs/reliability.md says so."""
    code = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
child.returncode, out = 0, child.pid
"""
    with Supervisor() as legion:
        child = do(legion, code).result(timeout=60)["output_1"]
    try:
        assert not gone(child)
    finally:
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: gone(child), "it is gone")


def test_a_program_that_ends_without_close_leaves_nothing(tmp_path: Path) -> None:
    base = Path(tempfile.gettempdir()) / f"legion-{os.getpid()}"
    program = """
import sys, threading
from legion_shm import Supervisor
from tests.reliability.support import do, hostile
legion = Supervisor(runtime_dir=sys.argv[1], segments="portable")
result = do(legion, "import torch; out = torch.ones(1 << 18)").result(timeout=60)
job = do(legion, "import time; time.sleep(60)", name="other")
print(legion.workers()[0].pid)
"""
    done = run_script("-c", program, str(base), cwd=tmp_path)
    try:
        assert done.returncode == 0, done.stderr
        assert gone(int(done.stdout))
        assert not list(base.iterdir())
    finally:
        base.rmdir()
