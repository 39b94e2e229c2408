"""Faults in their exact places: whatever dies where, each job has one end, and no tensor is half written."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil
import pytest
import torch

from legion_shm import (
    ArenaFull,
    ConfigError,
    Job,
    JobCancelled,
    JobFailed,
    NodeEvent,
    StartupError,
    Supervisor,
    WorkerLost,
    WorkerSpec,
    faults,
)
from legion_shm.testing.failpoints import PLACES, arm, armed
from legion_shm.transport.runtime_dir import base_mark
from tests import needs
from tests.reliability.support import do
from tests.system.support import REPO, flow, gone, run, script_env, spec, wait_for

MB = 1 << 20
ELEMENTS = 4 * MB // 4


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    with Supervisor(restart_backoff_s=0.01, lease_flush_s=0.005, stop_grace_s=2.0) as supervisor:
        yield supervisor


def failing(text: str, born: Literal["auto", "off"] = "off") -> WorkerSpec:
    """Its outputs are copied into its arena, unless they are to be ``born`` there."""
    return spec(env={faults.VARIABLE: text}, born_in_arena=born)


def add(legion: Supervisor, on: WorkerSpec, fill: float, **options: int) -> Job:
    """Four megabytes in and four others out, each byte of them known."""
    return legion.submit(flow("TestAdd"), inputs=[torch.full((ELEMENTS,), fill)], spec=on, **options)  # type: ignore[arg-type]


def whole(job: Job, value: float) -> bool:
    tensor = job.result(timeout=60)["output_1"]
    return (float(tensor.min()), float(tensor.max()), tensor.numel()) == (value, value, ELEMENTS)


# --- the worker dies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("host.before_hello", marks=pytest.mark.slow),
        pytest.param("host.before_ready", marks=needs.posix),
        "host.before_begun",
    ],
)
def test_a_worker_killed_before_it_begins_costs_no_job(
    legion: Supervisor, tmp_path: Path, place: str
) -> None:
    died = tmp_path / "died"
    own = failing(f"{place}=kill?{died}")
    assert whole(add(legion, own, 3.0), 4.0), "though it asked for no retry"
    assert died.exists()
    legion.stop_workers(own)


@pytest.mark.parametrize(
    "place",
    [
        "host.after_begun",
        pytest.param("worker.segment_granted", marks=pytest.mark.slow),
        pytest.param("arena.after_reserve", marks=pytest.mark.slow),
        "copy.half_done",
        pytest.param("host.before_reply", marks=pytest.mark.slow),
    ],
)
def test_a_worker_killed_in_the_midst_loses_its_job_and_tears_nothing(
    legion: Supervisor, tmp_path: Path, place: str
) -> None:
    died = tmp_path / "died"
    own = failing(f"{place}=kill?{died}")
    lost = add(legion, own, 3.0)
    with pytest.raises(WorkerLost, match=needs.KILLED):
        lost.result(timeout=60)
    assert died.exists()
    wait_for(lambda: not legion._loop._lending.table.live_blocks(), "its leases are over")
    died.unlink()
    again = add(legion, own, 5.0, retries=1)
    assert whole(again, 6.0), "the inputs were kept for the next worker"
    assert again.result().stats.attempts == 2
    legion.stop_workers(own)


@pytest.mark.parametrize(
    ("fault", "born"), [("copy.half_done=kill@3", "off"), ("host.before_reply=kill@3", "auto")]
)
def test_a_worker_killed_in_mid_write_leaves_what_it_delivered_before(
    legion: Supervisor, fault: str, born: Literal["auto", "off"]
) -> None:
    own = failing(fault, born)
    kept = [add(legion, own, float(number)) for number in range(2)]
    tensors = [job.result(timeout=60)["output_1"] for job in kept]
    with pytest.raises(WorkerLost):
        add(legion, own, 9.0).result(timeout=60)
    assert [(float(tensor.min()), float(tensor.max())) for tensor in tensors] == [(1.0, 1.0), (2.0, 2.0)]
    assert whole(legion.submit(flow("TestAdd"), inputs=[tensors[1]], spec=spec()), 3.0), "and it goes on"
    legion.stop_workers()


def test_a_worker_killed_right_after_its_reply_gives_the_whole_result_or_none(
    legion: Supervisor, tmp_path: Path
) -> None:
    own = failing(f"host.after_reply=kill?{tmp_path / 'died'}")
    job = add(legion, own, 3.0)
    if job.exception(timeout=60) is None:
        assert whole(job, 4.0)
    else:
        assert isinstance(job.exception(), WorkerLost)
    assert whole(add(legion, own, 4.0), 5.0)
    legion.stop_workers(own)


@pytest.mark.parametrize("action", ["kill", pytest.param("stop", marks=needs.posix)])
def test_a_worker_that_fails_while_it_stops_is_gone_all_the_same(legion: Supervisor, action: str) -> None:
    own = failing(f"host.while_stopping={action}")
    assert whole(add(legion, own, 1.0), 2.0)
    (pid,) = [worker.pid for worker in legion.workers() if worker.spec_key == own.key]
    assert pid is not None
    legion.stop_workers(own)
    wait_for(lambda: gone(pid), "the ladder has ended it", within_s=10.0)


@needs.posix
def test_a_worker_stopped_in_mid_write_is_found_hung(tmp_path: Path) -> None:
    with Supervisor(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.5) as legion:
        own = failing(f"copy.half_done=stop?{tmp_path / 'stopped'}")
        with pytest.raises(WorkerLost, match="heartbeat_timeout_s"):
            add(legion, own, 1.0).result(timeout=30)
        assert whole(add(legion, own, 2.0), 3.0)


def test_a_worker_stuck_in_c_with_the_interpreters_lock_is_found_hung() -> None:
    with Supervisor(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.5) as legion:
        do(legion, "out = 1").result(timeout=60)
        with pytest.raises(WorkerLost, match="heartbeat_timeout_s"):
            do(
                legion,
                "import ctypes, sys\n"
                "if sys.platform == 'win32': ctypes.PyDLL('kernel32').Sleep(60_000)\n"
                "else: ctypes.PyDLL(None).sleep(60)",
            ).result(timeout=30)


def test_a_worker_that_exits_at_its_start_says_its_code(legion: Supervisor) -> None:
    own = failing("host.before_ready=exit")
    with pytest.raises(StartupError, match="exited with code 13"):
        add(legion, own, 1.0).result(timeout=60)


# --- cancelled at a place -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["host.before_begun", "host.after_begun", "copy.half_done", "host.before_reply"]
)
def test_a_job_cancelled_twice_at_any_place_has_one_end(
    legion: Supervisor, tmp_path: Path, place: str
) -> None:
    gate = tmp_path / "gate"
    own = failing(f"{place}=pause:{gate}?{tmp_path / 'once'}")
    job = add(legion, own, 1.0)
    wait_for((tmp_path / "gate.entered").exists, "the worker is there")
    assert job.cancel()
    job.cancel()
    (tmp_path / "gate.go").touch()
    assert isinstance(job.exception(timeout=30), JobCancelled)
    assert not job.cancel()
    assert sum(event.terminal for event in job.events()) == 1
    assert whole(add(legion, own, 2.0), 3.0)
    legion.stop_workers(own)


# --- memory is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["ENOSPC", "EMFILE", "ENOSYS", "EPERM", "ENOMEM"])
@pytest.mark.parametrize("segments", needs.SEGMENT_KINDS)
def test_memory_that_the_system_refuses_is_arena_full_and_comes_back(
    trouble: str, segments: Literal["memfd", "portable"]
) -> None:
    """ENOSPC: /dev/shm is full. EMFILE: no descriptors. ENOSYS, EPERM: memfd_create is forbidden."""
    with Supervisor(arena_wait_s=0.3, segments=segments) as legion:
        with armed(f"segment.create=raise:{trouble}"):
            asked_s = time.monotonic()
            with pytest.raises(ArenaFull):
                legion.share(torch.ones(ELEMENTS))
            assert time.monotonic() - asked_s < 5.0
        assert float(legion.share(torch.ones(ELEMENTS)).sum()) == ELEMENTS


def test_a_worker_that_is_refused_memory_fails_its_job_and_goes_on() -> None:
    with Supervisor(arena_wait_s=0.3) as legion:
        run(legion, "TestPass")
        with armed("segment.create=raise:ENOSPC"), pytest.raises(ArenaFull, match="No space left"):
            run(legion, "TestBig", nbytes=MB)
        assert float(run(legion, "TestBig", nbytes=MB)[0]) == 1.0
        assert len(legion.workers()) == 1


def test_an_allocation_that_fails_inside_a_worker_fails_the_job_alone(legion: Supervisor) -> None:
    own = failing("arena.after_reserve=raise:MemoryError@1")
    with pytest.raises(JobFailed, match="MemoryError"):
        add(legion, own, 1.0).result(timeout=60)
    assert whole(add(legion, own, 1.0), 2.0)
    legion.stop_workers(own)


def test_a_node_that_is_out_of_memory_empties_the_caches_and_keeps_its_worker(legion: Supervisor) -> None:
    workflow = {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "LegionOutput", "inputs": {"name": "image", "value": ["1", 0]}},
        "3": {"class_type": "TestRaise", "inputs": {"kind": ["in", 0], "value": ["1", 0]}},
        "4": {"class_type": "LegionOutput", "inputs": {"name": "none", "value": ["3", 0]}},
    }

    def image_was(kind: str) -> str:
        job = legion.submit(workflow, inputs=[kind], spec=spec())
        with pytest.raises(JobFailed, match=kind):
            job.result(timeout=60)
        return next(e.status for e in job.events() if isinstance(e, NodeEvent) and e.node_id == "1")

    image_was("ValueError")
    (worker,) = [worker.id for worker in legion.workers() if worker.spec_key == spec().key]
    assert image_was("ValueError") == "cached"
    assert image_was("MemoryError") == "cached"
    assert image_was("ValueError") == "started", "what was kept is gone"
    assert [info.id for info in legion.workers() if info.spec_key == spec().key] == [worker]


# --- the supervisor dies --------------------------------------------------------------------------------

PROGRAM = """
import sys, torch
from legion_shm import Supervisor
from tests.system.support import flow, spec

with Supervisor(runtime_dir=sys.argv[1], segments=sys.argv[2]) as legion:
    value = legion.share(torch.ones(1 << 18))
    own = spec(env={"LEGION_FAILPOINTS": ""})
    legion.submit(flow("TestGrandchild"), spec=own).result(timeout=60)
    legion.submit(flow("TestAdd"), inputs=[value], spec=own).result(timeout=60)
print("not killed")
"""


@pytest.fixture
def base() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="legion-"))  # short, for sockets' paths are
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@needs.posix
@pytest.mark.parametrize(
    ("place", "segments"),
    [
        ("runtime_dir.after_lock", "memfd"),
        pytest.param("segment.create=kill@3", "portable", marks=pytest.mark.slow),
        ("processes.after_spawn", "memfd"),
        pytest.param("lending.before_descriptor", "memfd", marks=pytest.mark.slow),
        ("lending.after_descriptor", "memfd"),
        pytest.param("orders.after_send_job=kill@2", "portable", marks=pytest.mark.slow),
        ("inbox.after_leases=kill@2", "portable"),
        ("loop.before_end", "portable"),
    ],
)
def test_a_supervisor_killed_at_any_place_leaves_nothing(base: Path, place: str, segments: str) -> None:
    text = place if "=" in place else f"{place}=kill"
    mark = f"legion-{base_mark(base)}"
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(base), segments],
        env=script_env(LEGION_FAILPOINTS=text),
        stdout=subprocess.PIPE,
        text=True,
    )
    family: set[int] = set()
    try:
        while program.poll() is None:
            children = psutil.Process(program.pid).children(recursive=True)
            family |= {child.pid for child in children if "--multiprocessing-fork" in cmdline(child)}
            time.sleep(0.005)
    finally:
        program.kill()
        out, _ = program.communicate(timeout=10)
    assert (program.returncode, out) == (-9, ""), "it was killed, and there"
    wait_for(lambda: all(gone(pid) for pid in family), "its workers have ended", within_s=2.0)
    wait_for(lambda: not list(base.iterdir()), "its folder and its lock are gone", within_s=2.0)
    left = [name.name for name in Path("/dev/shm").iterdir() if name.name.startswith(mark)]
    assert not left, "segments with names"


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


# --- the failpoints themselves --------------------------------------------------------------------------


def test_each_place_is_in_the_code_and_in_a_test() -> None:
    folders = [REPO / name for name in ("transport", "supervisor")]
    sources = "".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.py"))
    used = re.findall(r'^ +faults\.hit\("([a-z_.]+)"\)', sources, re.MULTILINE)
    assert sorted(used) == sorted(PLACES), "each once"
    files = (Path(__file__), REPO / "tests" / "cuda" / "test_gpu_faults.py")
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    assert not [place for place in PLACES if tests.count(place) == 0]


def test_each_place_is_behind_one_look_at_a_variable() -> None:
    for folder in ("transport", "supervisor"):
        for path in (REPO / folder).glob("*.py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            for before, line in itertools.pairwise(lines):
                if line.lstrip().startswith("faults.hit(") and "half_done" not in line:
                    assert before.strip() == "if faults.hit is not None:", path


def test_without_the_variable_nothing_of_it_is_loaded(legion: Supervisor) -> None:
    loaded = "[name for name in sys.modules if 'failpoints' in name]"
    code = f"import sys; from legion_shm import faults; out = (faults.hit, {loaded})"
    assert do(legion, code).result(timeout=60)["output_1"] == (None, [])
    assert faults.hit is None


@pytest.mark.parametrize(
    "text", ["nowhere=kill", "copy.half_done", "copy.half_done=explode", "copy.half_done=kill@x", "="]
)
def test_a_mistyped_failpoint_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="LEGION_FAILPOINTS"):
        arm(text)
    assert faults.hit is None
