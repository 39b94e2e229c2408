from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from legion_shm import ConfigError, StartupError, StartupTimeout, Supervisor, WorkerInfo, WorkerSpec
from legion_shm.supervisor.spawn import environment_with
from tests import needs
from tests.system.support import flow, gone, in_threads, pid_of, run, spec, wait_for

SPAWNED = """
from pathlib import Path
with open({counter!r}, "a") as file:
    file.write("x")
starts = len(Path({counter!r}).read_text())
NODE_CLASS_MAPPINGS = {{}}
"""


def module(folder: Path, text: str, name: str = "own_nodes") -> Path:
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def counting_module(folder: Path, then: str) -> tuple[Path, Path]:
    """A node module that adds a letter to a file at each import, then does ``then``."""
    counter = folder / "starts"
    return module(folder, SPAWNED.format(counter=str(counter)) + then), counter


def test_a_broken_node_module_is_quoted_and_given_up_at_the_second_time(tmp_path: Path) -> None:
    path, counter = counting_module(tmp_path, "print('about to break')\n1 / 0  # the broken line\n")
    broken = spec(node_modules=[path])
    with Supervisor() as legion:
        for _ in range(2):
            jobs = [legion.submit(flow("TestPass"), spec=broken) for _ in range(3)]
            for job in jobs:
                with pytest.raises(StartupError, match="ZeroDivisionError") as caught:
                    job.result(timeout=30)
                assert "1 / 0  # the broken line" in caught.value.traceback
                assert "about to break" in caught.value.log_tail
        starts = len(counter.read_text())
        assert starts >= 2
        with pytest.raises(StartupError, match="ZeroDivisionError"):
            legion.submit(flow("TestPass"), spec=broken).result(timeout=30)
        assert len(counter.read_text()) == starts, "the third time nothing was started"
        assert run(legion, "TestPass", 1) == 1, "other specs are not affected"


def test_a_missing_module_and_one_without_nodes_say_so(tmp_path: Path) -> None:
    with Supervisor() as legion:
        for given, text in (("no_such_module_here", "no_such_module_here"), ("json", "NODE_CLASS_MAPPINGS")):
            job = legion.submit(flow("TestPass"), spec=spec(node_modules=[given]))
            with pytest.raises(StartupError, match=text):
                job.result(timeout=30)


def test_what_keeps_the_control_thread_from_its_work_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text("raise ImportError('this psutil is not one')\n")
    with Supervisor() as legion:
        job = legion.submit(flow("TestPass"), spec=spec(python_path=[tmp_path], startup_timeout_s=600.0))
        with pytest.raises(StartupError, match="control thread failed: ImportError: this psutil is not one"):
            job.result(timeout=60)
        assert run(legion, "TestPass", 1) == 1, "other specs are not affected"


@needs.posix
def test_a_worker_that_dies_by_a_signal_at_its_start_is_tried_again(tmp_path: Path) -> None:
    twice = "import os, signal\nif starts <= 2: os.kill(os.getpid(), signal.SIGKILL)\n"
    path, counter = counting_module(tmp_path, twice)
    with Supervisor(restart_backoff_s=0.01) as legion:
        job = legion.submit(flow("TestPass"), inputs=["value"], spec=spec(node_modules=[path]))
        assert job.result(timeout=60)["output_1"] == "value"
        assert len(counter.read_text()) == 3
        assert [event.kind for event in job.events()][:2] == ["queued", "started"]


@needs.posix
def test_a_worker_that_keeps_dying_at_its_start_is_given_up_within_the_budget(tmp_path: Path) -> None:
    path, counter = counting_module(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n")
    with Supervisor(restart_backoff_s=0.01, restart_budget=1) as legion:
        job = legion.submit(flow("TestPass"), spec=spec(node_modules=[path]))
        with pytest.raises(StartupError, match=r"restart_budget.*SIGKILL"):
            job.result(timeout=60)
        assert len(counter.read_text()) == 2
        with pytest.raises(StartupError):
            legion.submit(flow("TestPass"), spec=spec(node_modules=[path])).result(timeout=5)
        assert len(counter.read_text()) == 2


def test_a_worker_that_never_gets_ready_is_ended_and_the_setting_named(tmp_path: Path) -> None:
    path = module(tmp_path, "import time\ntime.sleep(600)\nNODE_CLASS_MAPPINGS = {}\n")
    with Supervisor() as legion:
        run(legion, "TestPass")
        slow = spec(node_modules=[path], startup_timeout_s=0.4)
        job = legion.submit(flow("TestPass"), spec=slow)

        def starting() -> list[WorkerInfo]:
            return [worker for worker in legion.workers() if worker.state == "starting" and worker.pid]

        wait_for(starting, "the worker is starting")
        (worker,) = starting()
        pid = pid_of(worker)
        with pytest.raises(StartupTimeout, match="startup_timeout_s"):
            job.result(timeout=30)
        wait_for(lambda: gone(pid), "its process has ended")


@needs.posix
def test_a_python_that_is_not_there_or_is_none_is_an_error(tmp_path: Path) -> None:
    with Supervisor(restart_budget=0) as legion:
        with pytest.raises((ConfigError, StartupError), match="no-such-python"):
            legion.submit(flow("TestPass"), spec=spec(python_executable="/no-such-python")).result(timeout=30)
        with pytest.raises(StartupError, match="exited with code 1"):
            legion.submit(flow("TestPass"), spec=spec(python_executable="/bin/false")).result(timeout=30)
        bare = tmp_path / "python"
        bare.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        bare.chmod(0o755)
        assert run(legion, "TestPass", 3, on=spec(python_executable=bare)) == 3


@needs.posix
def test_a_program_whose_folder_is_gone_still_has_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend("")
    folder.rmdir()
    alone = subprocess.run([sys.executable, "-c", "import socket"], capture_output=True, timeout=60)
    if alone.returncode:
        pytest.skip("this Python imports nothing with -c where its folder is gone (seen with 3.13.0)")
    with Supervisor() as legion:
        assert run(legion, "TestPass", 1) == 1


def changing_environment(stop: threading.Event) -> threading.Thread:
    """A thread that sets and removes variables of this process until ``stop``."""

    def disturb() -> None:
        number = 0
        while not stop.is_set():
            os.environ[f"LEGION_TEST_{number % 50}"] = "x"
            os.environ.pop(f"LEGION_TEST_{(number + 25) % 50}", None)
            number += 1

    thread = threading.Thread(target=disturb)
    thread.start()
    return thread


def test_the_environment_can_be_copied_while_it_changes() -> None:
    stop, interval_s = threading.Event(), sys.getswitchinterval()
    thread = changing_environment(stop)
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(500):
            assert environment_with({"OWN": "1"}).items() >= {("OWN", "1"), ("PATH", os.environ["PATH"])}
    finally:
        sys.setswitchinterval(interval_s)
        stop.set()
        thread.join()
        for name in [name for name in os.environ if name.startswith("LEGION_TEST_")]:
            del os.environ[name]


def test_the_environment_is_set_before_torch_loads_and_ours_is_untouched() -> None:
    """Workers of four specs are started while threads change this process's environment all the time."""
    stop = threading.Event()
    os.environ["LEGION_TEST_PARENT"] = "inherited"
    before = {name for name in os.environ if not name.startswith("LEGION_TEST_")}
    disturber = changing_environment(stop)
    try:
        with Supervisor() as legion:

            def ask(threads: int) -> None:
                count = threads % 2 + 1
                expected = count if os.cpu_count() else 1  # Wine says of no processor that it is there
                own = spec(env={"OMP_NUM_THREADS": count, "LEGION_TEST_OWN": f"number {threads}"})
                workflow = flow("TestEnviron", name="LEGION_TEST_OWN")
                result = legion.submit(workflow, spec=own).result(timeout=60)
                assert result["output_1"] == f"number {threads}"
                assert result["output_2"] == expected, "torch took it from its environment"
                assert run(legion, "TestEnviron", on=own, name="LEGION_TEST_PARENT") == "inherited"
                assert "LEGION_TEST_OWN" not in os.environ

            in_threads(4, ask)
    finally:
        stop.set()
        disturber.join()
        for name in [name for name in os.environ if name.startswith("LEGION_TEST_")]:
            del os.environ[name]
    assert {*os.environ} == before


def test_equal_specs_share_a_worker_and_different_ones_do_not() -> None:
    with Supervisor() as legion:

        def pid(given: WorkerSpec) -> int:
            result = legion.submit(flow("TestCounter"), spec=given).result(timeout=60)
            return int(result["output_2"])

        first = pid(spec(env={"A": "1", "B": "2"}))
        assert pid(spec(env={"B": 2, "A": "1"})) == first
        assert pid(spec(env={"A": "1", "B": "3"})) != first
        assert pid(spec(env={"A": "1", "B": "2"}, startup_timeout_s=60)) != first
        assert len(legion.workers()) == 3
        assert len({worker.spec_key for worker in legion.workers()}) == 3


def test_a_worker_s_python_without_a_package_is_told_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module', name='torch')")
    with Supervisor() as legion, pytest.raises(StartupError) as caught:
        run(legion, "Identity", 1, on=WorkerSpec(engine="graph", python_path=str(tmp_path)))
    assert f"could not start: {sys.executable} lacks the module 'torch'" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "torch.py" in caught.value.traceback


def test_a_codec_module_that_is_not_there_is_told_with_its_setting() -> None:
    with (
        Supervisor() as legion,
        pytest.raises(StartupError, match="codec_modules: no module named 'missing_codecs'"),
    ):
        run(legion, "Identity", 1, on=spec(codec_modules=["missing_codecs"]))
