"""Nodes and programs that do to their process, or to what is around it, what nobody should."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from legion_shm import JobFailed, StartupError, Supervisor, WorkerLost
from tests import needs
from tests.reliability.support import do
from tests.system.support import gone, node_started, only_worker, pid_of, run_script, wait_for

pytestmark = needs.posix

FLOATS = 1 << 20


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    with Supervisor(restart_backoff_s=0.01, restart_budget=1000) as supervisor:
        yield supervisor


@pytest.fixture
def base() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="legion-"))  # short, for sockets' paths are
    yield folder / "base"
    shutil.rmtree(folder, ignore_errors=True)


def adds_one(legion: Supervisor, name: str) -> bool:
    """Whether a job with 4 MB in and out, in that worker, is right."""
    job = do(legion, "out = value + 1", torch.ones(FLOATS), name=name)
    return bool((job.result(timeout=60)["output_1"] == 2).all())


# --- what a node does to its own process ----------------------------------------------------------------

SURVIVED = {
    "closes its output": "import os; os.close(1); os.close(2)",
    "closes Python's streams": "import sys; sys.stdout.close(); sys.stderr.close()",
    "has no streams": "import sys; sys.stdout = sys.stderr = None",
    "forks a child that exits": "import os, sys\nif os.fork() == 0: sys.exit(3)",
    "forks a child that stays": "import os, time\nif os.fork() == 0:\n time.sleep(60); os._exit(0)",
    "wants a session": "import os\ntry: os.setsid()\nexcept OSError: pass",
    "wants another's group": "import os\ntry: os.setpgid(0, os.getppid())\nexcept OSError: pass",
    "stands in a folder that is gone": (
        "import os, tempfile\nfolder = tempfile.mkdtemp(); os.chdir(folder); os.rmdir(folder)"
    ),
    "forbids itself its files": "import os; os.umask(0o777)",
    "leaves a thread": "import threading, time; threading.Thread(target=time.sleep, args=(3600,)).start()",
    "leaves a process": (
        "import multiprocessing, time\n"
        "multiprocessing.get_context('fork').Process(target=time.sleep, args=(3600,)).start()"
    ),
    "hangs at its exit": "import atexit, time; atexit.register(time.sleep, 3600)",
    "ignores SIGTERM": "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "ignores SIGCHLD": "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "blocks all signals": "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
    "has no environment": "import os; os.environ.clear()",
    "never switches threads": "import sys; sys.setswitchinterval(1e6)",
    "makes warnings errors": "import warnings; warnings.simplefilter('error')",
    "turns logging off": (
        "import logging; logging.disable(logging.CRITICAL); logging.shutdown(); "
        "logging.getLogger().handlers.clear()"
    ),
    "changes torch's defaults": (
        "import torch; torch.set_default_dtype(torch.float64); torch.set_default_device('meta')"
    ),
    "prints a line that does not end": "import os\nfor _ in range(64): os.write(1, b'x' * (1 << 20))",
    "kills its zygote": (
        "import os, psutil\n"
        "parent = psutil.Process().parent()\n"
        "if '--multiprocessing-fork' in parent.cmdline(): parent.kill()"
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("habit", [*SURVIVED])
def test_what_a_node_does_to_its_process_harms_no_later_job_and_no_end(
    legion: Supervisor, habit: str
) -> None:
    if "zygote" in habit and not Path("/proc/self/cmdline").exists():
        pytest.skip("needs /proc")
    code = f"import os\n{SURVIVED[habit]}\nout = os.getpid()"
    pid = do(legion, code, name="rude").result(timeout=60)["output_1"]
    assert adds_one(legion, "rude")
    assert do(legion, "import os; out = os.getpid()", name="rude").result(timeout=60)["output_1"] == pid
    family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    legion.stop_workers()
    settings = legion.settings
    ladder_s = settings.stop_grace_s + settings.term_grace_s
    wait_for(lambda: all(gone(member) for member in family), "it has ended", within_s=ladder_s + 5.0)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import os; os.closerange(3, 4096)", "SIG|exited with code"),
        ("import os; os.execv('/bin/sh', ['sh', '-c', 'exit 3'])", "exited with code 3"),
        ("import signal, time; signal.alarm(1); time.sleep(30)", "SIGALRM"),
        ("import os, time; os.killpg(0, 9); time.sleep(30)", "SIGKILL"),
    ],
    ids=["closes all descriptors", "becomes another program", "sets an alarm", "kills its group"],
)
def test_a_node_that_ends_its_worker_costs_its_job_alone(legion: Supervisor, code: str, cause: str) -> None:
    with pytest.raises(WorkerLost, match=cause):
        do(legion, code, name="ends").result(timeout=60)
    assert adds_one(legion, "ends")


@pytest.mark.parametrize("name", ["GeneratorExit", "StopIteration", "KeyboardInterrupt", "SystemExit"])
def test_an_exception_that_is_no_error_fails_the_job_and_keeps_the_worker(
    legion: Supervisor, name: str
) -> None:
    pid = do(legion, "import os; out = os.getpid()").result(timeout=60)["output_1"]
    with pytest.raises(JobFailed, match=name):
        do(legion, f"raise {name}").result(timeout=60)
    assert do(legion, "import os; out = os.getpid()").result(timeout=60)["output_1"] == pid


# --- what happens to the program ------------------------------------------------------------------------


@pytest.mark.parametrize("gone_is", ["the directory", "its lock", "the socket", "the base"])
def test_a_runtime_directory_that_was_removed_is_made_again_for_the_next_worker(
    base: Path, gone_is: str
) -> None:
    with Supervisor(runtime_dir=str(base)) as legion:
        assert adds_one(legion, "first")
        directory = legion._directory.path
        if gone_is == "the directory":
            shutil.rmtree(directory)
        elif gone_is == "its lock":
            directory.with_suffix(".lock").unlink()
        elif gone_is == "the socket":
            (directory / "control").unlink()
        else:
            shutil.rmtree(base)
        assert adds_one(legion, "first"), "who is connected stays so"
        assert adds_one(legion, "second")
        assert len(list(base.iterdir())) == 2, "a folder and its lock"
        assert legion._directory.current() == legion._directory.path
    assert list(base.iterdir()) == []


def test_a_runtime_directory_that_was_removed_is_swept_all_the_same(base: Path) -> None:
    program = (
        "import os, shutil, sys\n"
        "from legion_shm import Supervisor\n"
        "from tests.reliability.support import do\n"
        "import torch\n"
        "legion = Supervisor(runtime_dir=sys.argv[1], segments='portable')\n"
        "shared = legion.share(torch.ones(1 << 18))\n"
        "shutil.rmtree(sys.argv[1])\n"
        "do(legion, 'out = 1').result(timeout=60)\n"
        "print(legion._directory.segment_prefix, flush=True)\n"
        "os._exit(0)\n"
    )
    done = run_script("-c", program, str(base), cwd=Path.cwd())
    prefix = done.stdout.strip()
    assert prefix, done.stderr
    wait_for(lambda: not list(base.iterdir()), "the folder is gone", within_s=2.0)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]


def test_a_runtime_directory_that_cannot_be_made_again_is_a_clear_error(base: Path) -> None:
    with Supervisor(runtime_dir=str(base)) as legion:
        assert adds_one(legion, "first")
        shutil.rmtree(base.parent)
        with pytest.raises(StartupError, match="there is no directory"):
            adds_one(legion, "second")
        assert adds_one(legion, "first")


SIGCHLD = """
import os, signal, sys, threading, time
from legion_shm import Supervisor, WorkerLost
from tests.reliability.support import do
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
else:
    def reap():
        while True:
            try:
                os.waitpid(-1, os.WNOHANG)
            except OSError:
                pass
            time.sleep(0.001)
    threading.Thread(target=reap, daemon=True).start()
with Supervisor(restart_backoff_s=0.01) as legion:
    for name in ("one", "two"):
        job = do(legion, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", name=name)
        print(type(job.exception(timeout=60)).__name__, job.exception())
        failing = "import subprocess; out = subprocess.run(['false']).returncode"
        print(do(legion, failing, name=name).result(timeout=60)["output_1"])
"""


@pytest.mark.parametrize(
    ("children", "zygote"),
    [
        ("ignored", "auto"),
        ("ignored", "off"),
        pytest.param("reaped by somebody else", "auto", marks=pytest.mark.slow),
        pytest.param("reaped by somebody else", "off", marks=pytest.mark.slow),
    ],
)
def test_a_program_in_which_others_hear_of_our_childrens_ends_sees_them_all_the_same(
    children: str, zygote: str
) -> None:
    done = run_script("-c", SIGCHLD, children, cwd=Path.cwd(), env={"LEGION_ZYGOTE": zygote})
    assert not done.returncode, done.stderr
    first, one, second, two = done.stdout.splitlines()
    assert (one, two) == ("1", "1"), "a node hears how its own children end"
    for said in (first, second):
        assert said.startswith("WorkerLost")
        assert "exited with code" not in said, "it was killed"
        if zygote == "auto" and sys.platform == "linux":
            assert "SIGKILL" in said, "its zygote heard of it"


@needs.linux
def test_the_end_of_a_worker_whose_zygote_is_stopped_is_seen_within_two_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who could tell how it ended does not answer; that it has ended is known all the same."""
    monkeypatch.setenv("LEGION_ZYGOTE", "auto")
    with Supervisor(heartbeat_interval_s=5.0, heartbeat_timeout_s=60.0) as legion:
        assert adds_one(legion, "forked")
        worker = psutil.Process(pid_of(only_worker(legion)))
        zygote = worker.parent()
        assert zygote is not None
        assert zygote.pid != os.getpid()
        zygote.suspend()
        try:
            job = do(legion, "import time; time.sleep(60)", name="forked")
            node_started(job)
            os.kill(worker.pid, signal.SIGKILL)
            killed_s = time.monotonic()
            with pytest.raises(WorkerLost):
                job.result(timeout=30)
            assert time.monotonic() - killed_s < 2.0
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                zygote.resume()


@needs.linux
def test_all_processes_stopped_and_killed_at_once_are_replaced() -> None:
    with Supervisor(restart_backoff_s=0.01) as legion:
        assert adds_one(legion, "first")
        children = psutil.Process().children(recursive=True)
        ours = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for child in ours:
                act(child)
        assert adds_one(legion, "first")
