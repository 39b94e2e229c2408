"""What jobs leave free in a worker's heap: kept while jobs come, given back to the system when none do."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from legion_shm import Supervisor
from tests.system.support import spec, wait_for

SPEC = spec(node_modules=[Path(__file__).with_name("heap_nodes.py")])
FLOW = {
    "in": {"class_type": "LegionImporter", "inputs": {}},
    "node": {"class_type": "LeaveFree", "inputs": {"value": ["in", 0]}},
    "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["node", 0], "input_2": ["node", 1]}},
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")


@pytest.mark.parametrize(("idle_trim_s", "given_back"), [(0.3, True), (3600.0, False)])
def test_a_worker_without_jobs_gives_back_what_is_free_in_its_heap(
    idle_trim_s: float, given_back: bool
) -> None:
    with Supervisor(idle_trim_s=idle_trim_s) as legion:
        told = legion.submit(FLOW, inputs=[1], spec=SPEC).result(timeout=60)
        process, after_job = psutil.Process(int(str(told["output_1"]))), int(str(told["output_2"]))
        if given_back:
            wait_for(lambda: process.memory_info().rss < after_job - 60_000_000, "the heap is as large")
        else:
            legion.submit(FLOW, inputs=[2], spec=SPEC).result(timeout=60)
            assert process.memory_info().rss > after_job - 30_000_000


def test_after_a_long_job_it_is_given_back_at_once() -> None:
    with Supervisor(idle_trim_s=3600.0) as legion:
        told = legion.submit(FLOW, inputs=["long"], spec=SPEC).result(timeout=60)
        process, after_job = psutil.Process(int(str(told["output_1"]))), int(str(told["output_2"]))
        wait_for(lambda: process.memory_info().rss < after_job - 60_000_000, "the heap is as large")
