"""What the reliability tests share: jobs that run given code in a worker, a quiet neighbour's latency."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from legion_shm import Job, Supervisor, WorkerSpec
from tests.system.support import Workflow, flow, spec

NODES = Path(__file__).with_name("hostile_nodes.py")


def hostile(**fields: Any) -> WorkerSpec:
    """A worker that has the class Hostile; a name keeps workers apart."""
    name = fields.pop("name", "hostile")
    return spec(node_modules=[NODES], env={"POOL": name, **fields.pop("env", {})}, **fields)


def code_flow(code: str) -> Workflow:
    workflow = flow("TestPass")
    workflow["node"] = {"class_type": "Hostile", "inputs": {"value": ["in", 0], "code": code}}
    return workflow


def do(legion: Supervisor, code: str, value: object = None, *, name: str = "hostile", **options: Any) -> Job:
    """Submit a job that executes ``code`` in the worker of that name; ``out`` is its output."""
    return legion.submit(code_flow(code), inputs=[value], spec=hostile(name=name), **options)


def slowest_s(legion: Supervisor, until: Job, *, name: str = "quiet") -> tuple[float, int]:
    """The longest that a small job of a warm neighbour took while a job ran, and how many were tried."""
    worst_s, tried = 0.0, 0
    while not until.done():
        asked_s = time.monotonic()
        assert do(legion, "out = 1", name=name).result(timeout=60)["output_1"] == 1
        worst_s, tried = max(worst_s, time.monotonic() - asked_s), tried + 1
    return worst_s, tried
