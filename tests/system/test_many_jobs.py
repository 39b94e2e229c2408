from __future__ import annotations

import ctypes
import gc
import random
import re
import threading
from pathlib import Path

import psutil
import torch

from legion_shm import Supervisor, SupervisorSettings
from legion_shm.testing import assert_nothing_left, snapshot
from tests import needs
from tests.system.support import MEGABYTE_OF_FLOATS, flow, in_threads, only_worker, pid_of, run, spec

MB = 1 << 20


def anonymous_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps for the next time is nobody's leak
    status = Path("/proc/self/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


@needs.linux
def test_a_thousand_jobs_of_a_megabyte_from_eight_threads_leave_nothing_behind() -> None:
    torch.ones(1)
    gc.collect()
    before = snapshot()
    base = torch.arange(MEGABYTE_OF_FLOATS, dtype=torch.float32)
    shared = spec(max_workers=2)
    workflow = flow("TestAdd", amount=0.5)
    workers: set[str] = set()

    with Supervisor() as legion:
        figures: list[int] = []
        turn = threading.Barrier(8, action=lambda: figures.append(anonymous_bytes()))

        def submit(number: int) -> None:
            value, expected = torch.empty_like(base), torch.empty_like(base)
            for index in range(125):
                torch.add(base, number * 1000 + index, out=value)
                torch.add(value, 0.5, out=expected)
                result = legion.submit(workflow, inputs=[value], spec=shared).result(timeout=60)
                assert torch.equal(result["output_1"], expected)
                workers.add(result.stats.worker_id)
                del result
                if index in (24, 124):  # the first 200 jobs are the warm-up
                    turn.wait(timeout=60)

        in_threads(8, submit)
        warm, end = figures
        assert len(legion.workers()) == 2
        live = legion._memory.stats()
        arenas = [worker.arena_bytes for worker in legion.workers()]

    assert workers == {"w1", "w2"}
    assert end - warm < 4 * MB, f"800 jobs cost {(end - warm) / MB:.1f} MB that did not come back"
    assert live.total_bytes <= 64 * MB, "at most eight jobs at a time lived in the arena"
    assert all(size <= 64 * MB for size in arenas)
    assert_nothing_left(before)


def test_a_worker_keeps_nothing_of_small_jobs_that_are_over() -> None:
    with Supervisor() as legion:
        for _ in range(50):
            run(legion, "TestText", length=30_000)
        process = psutil.Process(pid_of(only_worker(legion)))
        warm = process.memory_info().rss
        for _ in range(1000):
            assert len(run(legion, "TestText", length=30_000)) == 30_000
        assert process.memory_info().rss - warm < 12 * MB


def test_values_that_go_round_between_threads_stay_right() -> None:
    """Results go in again as inputs and are dropped at once, or written, or kept: leases cross all ways."""
    shared = spec(max_workers=2)
    with Supervisor(SupervisorSettings(lease_flush_s=0.005)) as legion:

        def churn(number: int) -> None:
            rng = random.Random(number)
            kept: list[tuple[torch.Tensor, float]] = []
            value, expected = torch.full((MEGABYTE_OF_FLOATS // 4,), float(number)), float(number)
            for _ in range(50):
                if rng.random() < 0.2:
                    value = legion.share(value)
                if rng.random() < 0.3:
                    value += 1  # honoured, also where it is a view of a block that others view
                    expected += 1
                node, step = rng.choice([("TestPass", 0.0), ("TestAdd", 1.0)])
                job = legion.submit(flow(node), inputs=[value], spec=shared)
                if rng.random() < 0.5:
                    kept.append((value, expected))
                del value  # the job alone has it now
                value, expected = job.result(timeout=60)["output_1"], expected + step
                if len(kept) > 3:
                    kept.pop(rng.randrange(3))
                for tensor, fill in [*kept, (value, expected)]:
                    assert float(tensor.min()) == float(tensor.max()) == fill
                if rng.random() < 0.3:
                    value = value.clone()

        in_threads(6, churn)
        assert legion._loop._inbox.protocol_errors == 0
        assert legion._loop._lending.table.over_released == 0
