"""Workers that are forked from a zygote, and what must be as with workers that are executed."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from legion_shm import Supervisor, WorkerInfo, WorkerLost, WorkerSpec
from legion_shm.supervisor import processes
from legion_shm.supervisor import zygote as zygote_module
from tests import needs
from tests.system.support import flow, gone, node_started, pid_of, run, spec, wait_for

pytestmark = needs.linux

NODES = """
import os, random, sys, tempfile, threading, uuid
import numpy, torch

class Look:
    RETURN_TYPES = ("DICT",)
    FUNCTION = "run"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {"value": ("*",)}}
    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")
    def run(self, value=None):
        links = {}
        for fd in os.listdir("/proc/self/fd"):
            try:
                links[int(fd)] = os.readlink("/proc/self/fd/" + fd)
            except OSError:
                pass
        return ({
            "fds": sorted(link.split(":")[0].rsplit("/", 1)[-1] for link in links.values()),
            "env": dict(os.environ),
            "cwd": os.getcwd(),
            "path": list(sys.path),
            "argv": list(sys.argv),
            "group": (os.getpid(), os.getpgrp(), os.getsid(0)),
            "parent": os.getppid(),
            "random": [random.random(), float(numpy.random.random()), uuid.uuid4().hex,
                       next(tempfile._get_candidate_names()), float(torch.rand(1, dtype=torch.float64))],
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "sum": float((torch.ones(1 << 21) + torch.ones(1 << 21)).sum()),
            "stdin": os.read(0, 1),
        },)

NODE_CLASS_MAPPINGS = {"Look": Look}
"""

THREADS = """
import threading, time
threading.Thread(target=time.sleep, args=(3600,), daemon=True, name="somebodys").start()
"""


@pytest.fixture(autouse=True)
def zygotes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGION_ZYGOTE", "auto")


@pytest.fixture
def legion() -> Iterator[Supervisor]:
    with Supervisor(restart_backoff_s=0.01, restart_budget=10) as supervisor:
        yield supervisor


def zygote_of(pid: int) -> psutil.Process:
    parent = psutil.Process(pid).parent()
    assert parent is not None
    assert parent.pid != os.getpid(), "the worker is a child of ours: it was not forked"
    return parent


def idle(legion: Supervisor, on: WorkerSpec) -> WorkerInfo:
    found: list[WorkerInfo] = []

    def look() -> bool:
        found[:] = [w for w in legion.workers() if w.spec_key == on.key and w.state == "idle"]
        return bool(found)

    wait_for(look, "a worker is idle", within_s=60)
    return found[0]


def looking(tmp_path: Path, **fields: object) -> WorkerSpec:
    path = tmp_path / "look_nodes.py"
    path.write_text(NODES)
    return spec(node_modules=[path], **fields)


def test_a_forked_worker_is_as_an_executed_one(legion: Supervisor, tmp_path: Path) -> None:
    there = tmp_path / "folder"
    there.mkdir()
    fields = {"env": {"OWN": "1"}, "working_dir": str(there), "python_path": [str(tmp_path / "more")]}
    forked = run(legion, "Look", on=looking(tmp_path, **fields))
    executed = run(legion, "Look", on=looking(tmp_path, zygote="off", **fields))
    assert forked["parent"] != os.getpid()
    assert executed["parent"] == os.getpid()
    for same in ("fds", "env", "cwd", "path", "argv", "threads", "sum", "stdin"):
        assert forked[same] == executed[same], same
    assert forked["cwd"] == str(there)
    assert forked["env"]["OWN"] == "1"
    assert len(set(forked["group"])) == 1, "it leads a session and a group of its own"


def test_two_forks_have_random_streams_of_their_own(legion: Supervisor, tmp_path: Path) -> None:
    first = run(legion, "Look", on=looking(tmp_path))
    second = run(legion, "Look", on=looking(tmp_path, max_workers=2))
    assert first["parent"] == second["parent"], "specs that differ in their limits share a zygote"
    assert not set(first["random"]) & set(second["random"])


def test_a_replacement_comes_from_the_same_zygote(legion: Supervisor) -> None:
    pid = pid_of(idle_after_a_job(legion))
    zygote = zygote_of(pid)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pid not in {worker.pid for worker in legion.workers()}, "it is gone")
    again = pid_of(idle(legion, spec()))
    assert zygote_of(again) == zygote
    assert run(legion, "TestPass", 4) == 4


def idle_after_a_job(legion: Supervisor) -> WorkerInfo:
    assert run(legion, "TestPass", 1) == 1
    return idle(legion, spec())


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_how_a_forked_worker_ended_is_told(legion: Supervisor, name: str) -> None:
    zygote_of(pid_of(idle_after_a_job(legion)))
    with pytest.raises(WorkerLost, match=name) as caught:
        legion.submit(flow("TestSignal", name=name), spec=spec()).result(timeout=30)
    assert caught.value.signal_name == name
    with pytest.raises(WorkerLost, match="exited with code 7") as caught:
        legion.submit(flow("TestExit", code=7), spec=spec()).result(timeout=30)
    assert caught.value.exit_code == 7


def test_the_word_on_how_a_fork_ended_is_heard_when_it_comes(
    legion: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is seen while the zygote is stopped; then what the zygote says wakes the loop, and no look."""
    monkeypatch.setattr(processes, "_STATUS_LOOK_S", 60.0)
    monkeypatch.setattr(zygote_module, "_STATUS_WAIT_S", 60.0)
    pid = pid_of(idle_after_a_job(legion))
    (held,) = legion._loop._processes
    zygote = zygote_of(pid)
    zygote.suspend()
    try:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: held.status_awaited, "its end was seen")
        assert pid in {worker.pid for worker in legion.workers()}
    finally:
        zygote.resume()
    wait_for(lambda: pid not in {worker.pid for worker in legion.workers()}, "it is gone", within_s=10)


def test_workers_go_on_without_their_zygote_and_the_next_start_makes_another(legion: Supervisor) -> None:
    pid = pid_of(idle_after_a_job(legion))
    zygote = zygote_of(pid)
    zygote.kill()
    wait_for(lambda: gone(zygote.pid), "the zygote is dead")
    assert run(legion, "TestPass", 2) == 2
    assert pid_of(idle(legion, spec())) == pid
    job = legion.submit(flow("TestSleep", seconds=60.0), spec=spec())
    node_started(job)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerLost, match="status unknown"):
        job.result(timeout=30)
    assert run(legion, "TestPass", 3) == 3
    assert zygote_of(pid_of(idle(legion, spec()))) != zygote


def test_a_zygote_that_does_not_answer_is_ended(legion: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("legion_shm.supervisor.zygote._ANSWER_WAIT_S", 0.3)
    zygote = zygote_of(pid_of(idle_after_a_job(legion)))
    zygote.suspend()
    assert run(legion, "TestPass", 5, on=spec(max_workers=2)) == 5
    assert gone(zygote.pid)


def test_threads_that_imports_leave_behind_rule_forks_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "legion_shm.supervisor")
    (tmp_path / "psutil").mkdir()
    own = Path(psutil.__file__)
    (tmp_path / "psutil" / "__init__.py").write_text(
        f"{THREADS}\n__path__[:] = [{str(own.parent)!r}]\n"
        f"exec(compile(open({str(own)!r}, encoding='utf-8').read(), {str(own)!r}, 'exec'))\n"
    )
    own_spec = spec(python_path=[tmp_path])
    with Supervisor() as legion:
        run(legion, "TestPass", 1, on=own_spec)
        first = pid_of(idle(legion, own_spec))
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: first not in {worker.pid for worker in legion.workers()}, "it is gone")
        assert run(legion, "TestPass", 2, on=own_spec) == 2
        for worker in legion.workers():
            parent = psutil.Process(pid_of(worker)).parent()
            assert parent is not None
            assert parent.pid == os.getpid(), "they are executed"
    assert "1 more threads running" in caplog.text
    assert caplog.text.count("started one by one") == 1


def test_an_import_that_ends_the_zygote_is_the_workers_to_tell(tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text("import os\nprint('no psutil for you')\nos._exit(9)\n")
    with Supervisor(restart_budget=0) as legion:
        job = legion.submit(flow("TestPass"), spec=spec(python_path=[tmp_path]))
        error = job.exception(timeout=60)
        assert "code 9" in str(error)
        assert "no psutil for you" in str(error)


def test_an_unused_zygote_ends() -> None:
    with Supervisor(zygote_idle_s=0.2) as short:
        run(short, "TestPass", 1)
        zygote = zygote_of(pid_of(idle(short, spec())))
        short.stop_workers()
        wait_for(lambda: gone(zygote.pid), "it has ended")
        assert run(short, "TestPass", 2) == 2


def test_zygotes_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGION_ZYGOTE", "off")
    with Supervisor() as legion:
        run(legion, "TestPass", 1)
        parent = psutil.Process(pid_of(idle(legion, spec()))).parent()
        assert parent is not None
        assert parent.pid == os.getpid()
