"""Workers are started from wherever a program may be, and never run its main module again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from legion_shm.transport.runtime_dir import default_base
from tests import needs
from tests.system.support import gone, run_script, script_env, wait_for

# Not under a main guard: a second import of __main__ would count, and start workers of its own.
BODY = """
from pathlib import Path
with open("imports", "a") as file:
    file.write("x")
from legion_shm import Supervisor, WorkerSpec
from tests.system.support import flow, spec
"""

WORK = """
with Supervisor() as legion:
    print("result", legion.submit(flow("TestPass"), inputs=[42], spec=spec()).result(timeout=60)["output_1"])
"""

OWN_NODES = """
import sys
class OwnNode:
    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {"value": ("*",)}}
    def run(self, value=None):
        return (f"own {getattr(sys.modules['__main__'], '__file__', None)}",)
NODE_CLASS_MAPPINGS = {"OwnNode": OwnNode}
"""


def program_of(work: str) -> str:
    return BODY + work


def went_well(done: subprocess.CompletedProcess[str], folder: Path, output: str = "result 42") -> None:
    assert done.returncode == 0, done.stderr
    assert output in done.stdout
    assert (folder / "imports").read_text() == "x", "the main module ran once"
    assert "Traceback" not in done.stderr


def test_a_plain_script_without_a_main_guard_and_its_own_nodes(tmp_path: Path) -> None:
    (tmp_path / "own_nodes.py").write_text(OWN_NODES)
    own = 'own = WorkerSpec(engine="graph", node_modules=["own_nodes"])\n'
    ask = 'print(legion.submit(flow("OwnNode"), spec=own).result(timeout=60)["output_1"])\n'
    (tmp_path / "script.py").write_text(f"{BODY}{own}{WORK}    {ask}")
    (tmp_path / "elsewhere").mkdir()
    # From another folder: what counts is where the script is.
    done = run_script("../script.py", cwd=tmp_path / "elsewhere")
    assert "own " in done.stdout, done.stderr
    assert "script.py" not in done.stdout
    went_well(done, tmp_path / "elsewhere")


@pytest.mark.parametrize("way", ["-c", "-m", "stdin", "repl"])
def test_other_ways_to_run_a_program(tmp_path: Path, way: str) -> None:
    (tmp_path / "program.py").write_text(BODY + WORK)
    if way == "-c":
        done = run_script("-c", BODY + WORK, cwd=tmp_path)
    elif way == "-m":
        done = run_script("-m", "program", cwd=tmp_path)
    elif way == "stdin":
        done = run_script("-", cwd=tmp_path, stdin=BODY + WORK)
    else:
        body = BODY.replace('    file.write("x")\n', '    _ = file.write("x")\n\n')  # as it is typed
        lines = f"{body.strip()}\n{WORK}\nexit()\n"
        done = run_script("-i", "-q", cwd=tmp_path, stdin=lines)
    went_well(done, tmp_path)


def test_a_thread_starts_a_worker_and_the_program_ends_without_close(tmp_path: Path) -> None:
    program = program_of("""
import threading
legion = Supervisor()
def work():
    print("result", legion.submit(flow("TestPass"), inputs=[42], spec=spec()).result(timeout=60)["output_1"])
    print("grandchild", legion.submit(flow("TestGrandchild"), spec=spec()).result(timeout=60)["output_1"])
    legion.submit(flow("TestSleep", seconds=60.0, cooperate=True), spec=spec())
    for _ in range(3):
        legion.submit(flow("TestBig"), spec=spec())
    print("workers", *(worker.pid for worker in legion.workers()))
thread = threading.Thread(target=work)
thread.start()
thread.join()
""")
    done = run_script("-c", program, cwd=tmp_path)
    went_well(done, tmp_path)
    pids = [int(word) for line in done.stdout.splitlines()[1:] for word in line.split()[1:]]
    assert len(pids) == 2
    for pid in pids:
        wait_for(lambda pid=pid: gone(pid), f"process {pid} has ended")  # type: ignore[misc]


def test_an_exception_inside_with_ends_the_workers_and_comes_out(tmp_path: Path) -> None:
    program = program_of("""
with Supervisor() as legion:
    legion.submit(flow("TestPass"), spec=spec()).result(timeout=60)
    print("worker", legion.workers()[0].pid, flush=True)
    legion.submit(flow("TestSleep", seconds=60.0, cooperate=True), spec=spec())
    raise KeyError("the program's own")
""")
    done = run_script("-c", program, cwd=tmp_path)
    assert done.returncode == 1
    assert "the program's own" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert gone(int(done.stdout.split()[1]))


@needs.posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_is_interrupted_ends_with_its_workers(tmp_path: Path, number: signal.Signals) -> None:
    program = program_of("""
from tests.system.support import node_started
with Supervisor() as legion:
    job = legion.submit(flow("TestSleep", seconds=60.0, cooperate=True), spec=spec())
    node_started(job)
    print("worker", legion.workers()[0].pid, flush=True)
    job.result()
""")
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=script_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline().split()[1])
    os.killpg(process.pid, number)  # as a terminal does; the worker is in a group of its own
    _, errors = process.communicate(timeout=30)
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    assert errors.count("Traceback") == (1 if number == signal.SIGINT else 0), errors
    assert process.returncode == -number
    wait_for(lambda: gone(worker), "the worker has ended", within_s=2.0)
    base = default_base()
    wait_for(lambda: not list(base.iterdir()), "the folder is gone", within_s=2.0)


def test_a_supervisor_that_is_dropped_warns_and_ends_its_workers(tmp_path: Path) -> None:
    program = program_of("""
import warnings, gc, threading
from tests.system.support import gone
legion = Supervisor()
legion.submit(flow("TestPass"), spec=spec()).result(timeout=60)
pid = legion.workers()[0].pid
thread = legion._loop._thread
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    del legion
    gc.collect()
thread.join(20)
print("warned", [w.category.__name__ for w in caught], gone(pid), thread.is_alive())
warnings.simplefilter("error")
legion = Supervisor()
thread = legion._loop._thread
del legion
gc.collect()
thread.join(20)
print("ended", not thread.is_alive())
""")
    done = run_script("-c", program, cwd=tmp_path)
    assert "warned ['ResourceWarning'] True False" in done.stdout, done.stderr
    assert "ended True" in done.stdout, done.stderr


@needs.fork
def test_a_forked_child_is_refused_and_its_parent_is_fine(tmp_path: Path) -> None:
    program = program_of("""
import os, sys, torch
from legion_shm import ForkedError
legion = Supervisor()
kept = legion.submit(flow("TestBig", fill=3.0), spec=spec()).result(timeout=60)["output_1"]
job = legion.submit(flow("TestSleep", seconds=0.3), inputs=[legion.share(torch.ones(1 << 18))], spec=spec())
pid = os.fork()
if pid == 0:
    refused = 0
    for use in (
        lambda: legion.submit(flow("TestPass"), spec=spec()),
        lambda: legion.workers(),
        lambda: legion.share(torch.ones(1 << 18)),
        lambda: job.result(),
        lambda: job.cancel(),
        lambda: list(job.events()),
    ):
        try:
            use()
        except ForkedError:
            refused += 1
    legion.close()
    with Supervisor() as own:
        value = own.submit(flow("TestPass"), inputs=[5], spec=spec()).result(timeout=60)["output_1"]
    print("child", refused, float(kept[0]), value, flush=True)
    sys.exit(3)
_, status = os.waitpid(pid, 0)
print("parent", os.waitstatus_to_exitcode(status), float(job.result(timeout=30)["output_1"].sum()))
print("result", legion.submit(flow("TestPass"), inputs=[42], spec=spec()).result(timeout=60)["output_1"])
""")
    done = run_script("-c", program, cwd=tmp_path)
    assert "child 6 3.0 5" in done.stdout, done.stderr
    assert f"parent 3 {float(1 << 18)}" in done.stdout, done.stdout + done.stderr
    went_well(done, tmp_path)


@needs.fork
def test_a_forked_child_that_lives_on_does_not_keep_the_workers_alive(tmp_path: Path) -> None:
    program = program_of("""
import os, time
legion = Supervisor()
legion.submit(flow("TestPass"), spec=spec()).result(timeout=60)
child = os.fork()
if child == 0:
    time.sleep(60)
print("pids", child, legion.workers()[0].pid, flush=True)
os.kill(os.getpid(), 9)
""")
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=script_env(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child, worker = (int(word) for word in process.stdout.readline().split()[1:])
    try:
        assert process.wait(timeout=20) == -signal.SIGKILL
        wait_for(lambda: gone(worker), "the worker has ended", within_s=2.0)
        assert not gone(child)
    finally:
        psutil.Process(child).kill()
        process.stdout.close()
