"""What the system tests share: specs, workflows of one test node, waiting on conditions, scripts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from legion_shm import Job, NodeEvent, Supervisor, WorkerInfo, WorkerSpec
from legion_shm.testing.nodes import NODE_CLASS_MAPPINGS

REPO = Path(__file__).resolve().parents[2]
NODES = "legion_shm.testing.nodes"
Workflow = dict[str, dict[str, Any]]

# A segment at least, and not small enough to travel inside a message.
MEGABYTE_OF_FLOATS = 1 << 18


def spec(**fields: Any) -> WorkerSpec:
    """A graph worker with the test nodes. Different ``env`` values keep workers apart."""
    env = {"OMP_NUM_THREADS": "1", **fields.pop("env", {})}
    modules = (NODES, *map(str, fields.pop("node_modules", ())))
    return WorkerSpec(engine="graph", node_modules=modules, env=env, **fields)


def flow(class_type: str, **options: object) -> Workflow:
    """input_1 goes into the node's ``value``; its outputs are the job's output_1, output_2, ..."""
    node: Any = NODE_CLASS_MAPPINGS.get(class_type)
    slots = 1 if node is None else len(node.RETURN_TYPES)
    return {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "node": {"class_type": class_type, "inputs": {"value": ["in", 0], **options}},
        "out": {
            "class_type": "LegionExporter",
            "inputs": {f"input_{slot + 1}": ["node", slot] for slot in range(slots)},
        },
    }


def run(
    legion: Supervisor,
    class_type: str,
    value: object = None,
    *,
    on: WorkerSpec | None = None,
    **options: object,
) -> Any:
    """The first output of one node."""
    job = legion.submit(flow(class_type, **options), inputs=[value], spec=on or spec())
    return job.result(timeout=100)["output_1"]


def wait_for(condition: Callable[[], object], what: str, within_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(0.005)


def node_started(job: Job, node_id: str = "node") -> None:
    """Wait until the worker says that it runs this node."""
    for event in job.events():
        if isinstance(event, NodeEvent) and event.node_id == node_id and event.status == "started":
            return
    raise AssertionError(f"{job} ended before node {node_id} ran: {job.exception(0)}")


def only_worker(legion: Supervisor) -> WorkerInfo:
    (worker,) = legion.workers()
    return worker


def worker_of(legion: Supervisor, job: Job) -> WorkerInfo:
    (worker,) = [worker for worker in legion.workers() if worker.job_id == job.id]
    return worker


def pid_of(worker: WorkerInfo) -> int:
    assert worker.pid is not None
    return worker.pid


def gone(pid: int) -> bool:
    """Whether the process has ended; one that only waits to be reaped has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Gate:
    """A running TestGate node: `entered` waits for it, `open` lets it go on."""

    def __init__(self, folder: Path, name: str = "gate") -> None:
        self._entered, self._go = folder / f"{name}.entered", folder / f"{name}.go"

    def flow(self) -> Workflow:
        return flow("TestGate", entered=str(self._entered), go=str(self._go))

    def entered(self) -> None:
        wait_for(self._entered.exists, "the gate was reached")

    def open(self) -> None:
        self._go.touch()


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(0)``, ``work(1)``, ... at once; the first exception is raised here."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=90)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def script_env(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **more}


def run_script(
    *arguments: str, cwd: Path, stdin: str = "", env: Mapping[str, str] | None = None, within_s: float = 100.0
) -> subprocess.CompletedProcess[str]:
    """A Python program of its own, to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=script_env(**(env or {})),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=within_s,
    )
