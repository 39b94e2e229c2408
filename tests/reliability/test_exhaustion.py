"""Out of memory, mappings, files, threads: a clear error after a bounded wait, and recovery afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from legion_shm import JobFailed, StartupError, Supervisor
from tests import needs
from tests.reliability.support import do
from tests.system.support import flow, run, run_script, spec

pytestmark = needs.rlimits

PREAMBLE = """
import os, resource, threading
import psutil, torch
from legion_shm import ArenaFull, LegionError, StartupError, Supervisor
from tests.reliability.support import do
from tests.system.support import flow, run, spec

def limit(what, value):
    resource.setrlimit(what, (value, resource.getrlimit(what)[1]))

def leave_files(count):
    "Let this process open so many files more."
    used, free = {int(fd) for fd in os.listdir("/proc/self/fd")}, 0
    top = 0
    while free <= count:
        free += top not in used
        top += 1
    limit(resource.RLIMIT_NOFILE, top - 1)

files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
space, _ = resource.getrlimit(resource.RLIMIT_AS)
"""


def program(tmp_path: Path, text: str) -> str:
    """What a program printed that ended well."""
    done = run_script("-c", PREAMBLE + text, cwd=tmp_path, within_s=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_supervisor_that_can_open_no_more_files_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    out = program(
        tmp_path,
        """
Supervisor().close()
before = len(os.listdir("/proc/self/fd"))
kinds = set()
for count in range(0, 30):
    leave_files(count)
    try:
        Supervisor().close()
        kinds.add("made")
    except StartupError as error:
        kinds.add("refused")
        assert "ulimit -n" in str(error), error
    finally:
        limit(resource.RLIMIT_NOFILE, files)
    assert len(os.listdir("/proc/self/fd")) == before, count
    assert threading.active_count() == 1
print(sorted(kinds))
with Supervisor() as legion:
    print(run(legion, "TestPass", 5))
""",
    )
    assert out.split("\n")[:2] == ["['made', 'refused']", "5"]


def test_a_supervisor_whose_thread_cannot_start_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    out = program(
        tmp_path,
        """
def refuse(self):
    raise RuntimeError("can't start new thread")
Supervisor().close()
before, start = len(os.listdir("/proc/self/fd")), threading.Thread.start
threading.Thread.start = refuse
try:
    Supervisor()
except StartupError as error:
    print(error)
threading.Thread.start = start
assert len(os.listdir("/proc/self/fd")) == before
with Supervisor() as legion:
    print(run(legion, "TestPass", 5))
""",
    )
    assert "thread could not be started" in out
    assert out.split()[-1] == "5"


def test_a_worker_that_cannot_be_given_files_is_a_clear_error_and_the_next_one_comes(tmp_path: Path) -> None:
    out = program(
        tmp_path,
        """
with Supervisor(arena_wait_s=1.0) as legion:
    for count in (0, 3, 6, 9, 12, 16):
        leave_files(count)
        try:
            own = spec(env={"N": str(count)})
            job = legion.submit(flow("TestAdd"), inputs=[torch.ones(1 << 18)], spec=own)
            error = job.exception(timeout=60)
        except LegionError as refused:
            error = refused
        finally:
            limit(resource.RLIMIT_NOFILE, files)
        assert error is None or isinstance(error, LegionError), error
        print(count, type(error).__name__)
        del error
        legion.stop_workers()
    assert float(run(legion, "TestAdd", torch.ones(1 << 18))[0]) == 2.0
    assert legion._loop.fault is None
print("recovered")
""",
    )
    assert "0 ArenaFull" in out or "0 StartupError" in out
    assert "recovered" in out


@pytest.mark.parametrize("close_first", [False, True], ids=["asked", "closed"])
def test_a_result_that_cannot_be_mapped_is_arena_full_each_time_and_close_goes_on(
    tmp_path: Path, close_first: bool
) -> None:
    out = program(
        tmp_path,
        f"""
legion = Supervisor()
job = legion.submit(flow("TestBig", nbytes=300 << 20), spec=spec())
assert job.exception(timeout=60) is None
folder = legion._directory.path
limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + (40 << 20))
if {close_first}:
    legion.close()
for _ in range(2):
    try:
        job.result()
        print("mapped all the same")
    except ArenaFull as error:
        assert "ulimit" in str(error), error
        print("ArenaFull")
limit(resource.RLIMIT_AS, space)
if not {close_first}:
    assert float(run(legion, "TestBig", nbytes=300 << 20)[0]) == 1.0
    legion.close()
assert legion._loop.fault is None
assert not folder.exists()
del job
print("files", sum("memfd:legion" in line for line in open("/proc/self/maps")))
""",
    )
    assert out.split("\n")[:3] == ["ArenaFull", "ArenaFull", "files 0"]


@pytest.mark.parametrize("zygote", ["auto", "off"])
def test_a_worker_that_can_start_no_thread_says_so(tmp_path: Path, zygote: Literal["auto", "off"]) -> None:
    """A stack that no address space has room for stands for a limit of threads, which does not bind root."""
    (tmp_path / "sitecustomize.py").write_text("import threading; threading.stack_size(1 << 46)\n")
    with Supervisor(restart_backoff_s=0.01, zygote=zygote) as legion:
        own = spec(env={"PYTHONPATH": str(tmp_path)})
        with pytest.raises(StartupError, match=r"control thread could not be started.*ulimit -u"):
            legion.submit(flow("TestText"), spec=own).result(timeout=60)
        assert run(legion, "TestPass", 5) == 5, "other workers are not affected"


def test_a_worker_that_can_start_no_more_threads_goes_on_without() -> None:
    with Supervisor() as legion:
        code = "import threading; threading.stack_size(1 << 46)\n"
        code += "try: threading.Thread(target=print).start()\nexcept RuntimeError as error: out = str(error)"
        assert "can't start new thread" in do(legion, code).result(timeout=60)["output_1"]
        large = do(legion, "out = value + 1", torch.ones(8 << 20)).result(timeout=60)["output_1"]
        assert float(large.min()) == float(large.max()) == 2.0, "large copies are done by one thread"
        start = "import threading; thread = threading.Thread(target=print); thread.start(); thread.join()"
        with pytest.raises(JobFailed, match="can't start new thread"):
            do(legion, start).result(timeout=60)
        assert (
            do(legion, f"import threading; threading.stack_size(0); {start}; out = 7").result(60)["output_1"]
            == 7
        )
        assert len(legion.workers()) == 1
