from __future__ import annotations

import os
from pathlib import Path

import pytest

from legion_shm import JobStarted, Supervisor, WorkerLost
from tests import needs
from tests.system.support import Gate, flow, pid_of, spec, wait_for


def test_the_next_job_runs_on_the_spare_of_a_worker_that_was_killed(tmp_path: Path) -> None:
    on = spec(warm_spares=1)
    with Supervisor() as legion:
        gate = Gate(tmp_path)
        lost = legion.submit(gate.flow(), inputs=[None], spec=on)
        gate.entered()
        wait_for(lambda: sorted(w.state for w in legion.workers()) == ["busy", "idle"], "a spare is ready")
        (spare,) = (worker.id for worker in legion.workers() if worker.state == "idle")
        waiting = legion.submit(flow("TestPass"), inputs=[5], spec=on)
        assert not waiting.done(), "one runs at a time"
        os.kill(next(pid_of(worker) for worker in legion.workers() if worker.state == "busy"), needs.KILL)
        with pytest.raises(WorkerLost):
            lost.result(timeout=60)
        assert waiting.result(timeout=60)["output_1"] == 5
        assert [e.worker_id for e in waiting.events() if isinstance(e, JobStarted)] == [spare]


def test_a_worker_of_one_job_is_followed_by_its_spare() -> None:
    on = spec(warm_spares=1, max_jobs_per_life=1)
    with Supervisor() as legion:
        seen = []
        for number in range(4):
            result = legion.submit(flow("TestPass"), inputs=[number], spec=on).result(timeout=60)
            assert result["output_1"] == number
            seen.append({worker.id for worker in legion.workers() if worker.state != "stopping"})
        assert len(set().union(*seen)) >= 4
        assert all(len(ids) <= 2 for ids in seen), "one that works, one that waits"
