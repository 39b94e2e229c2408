"""Load: many jobs with workers killed among them, and random sequences of everything a caller can do."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from legion_shm import Job, JobCancelled, StartupError, Supervisor, WorkerLost
from legion_shm.testing import assert_nothing_left, snapshot
from tests import needs
from tests.reliability.soak import soak
from tests.system.support import flow, spec

ELEMENTS = 1 << 16


@needs.linux
def test_a_short_soak_loses_nothing_but_the_jobs_of_killed_workers() -> None:
    report = soak(160, kill_every=50, big_bytes=8_000_000)
    assert not report.wrong
    assert sum(report.outcomes.values()) == 160
    assert report.outcomes.get("lost", 0) <= report.kills, "one at most with each"
    assert set(report.outcomes) <= {"done", "lost"}
    assert max(report.descriptors) < report.descriptors[0] + 40
    assert report.grown_kib() < 60_000


_shared: list[Supervisor] = []


def shared() -> Supervisor:
    """One for all examples: most of what could go wrong is in what an earlier one left."""
    if not _shared:
        _shared.append(
            Supervisor(
                restart_backoff_s=0.001, restart_backoff_max_s=0.01, restart_budget=1000, cancel_grace_s=0.2
            )
        )
    return _shared[0]


@pytest.fixture(autouse=True, scope="module")
def closed_in_the_end() -> Iterator[None]:
    before = snapshot()
    yield
    while _shared:
        _shared.pop().close()
    gc.collect()
    assert_nothing_left(before)


KILLED_AT_START = (StartupError,) if needs.WINDOWS else ()
"""There an end by force is an exit code like others, and a start that ended so is not tried again."""


class Callers(RuleBasedStateMachine):
    """Jobs and their results against a model that knows what each must be, with real workers."""

    def __init__(self) -> None:
        super().__init__()
        self.legion = shared()
        self.specs = [spec(env={"POOL": name}) for name in ("a", "b")]
        self.jobs: list[tuple[Job, float, bool]] = []
        self.kept: list[tuple[torch.Tensor, float]] = []
        self.kills = 0

    @rule(value=st.integers(0, 1000), pool=st.integers(0, 1), retries=st.integers(0, 1))
    def submit(self, value: int, pool: int, retries: int) -> None:
        tensor = torch.full((ELEMENTS,), float(value))
        job = self.legion.submit(flow("TestAdd"), inputs=[tensor], spec=self.specs[pool], retries=retries)
        self.jobs.append((job, value + 1.0, False))

    @rule(pool=st.integers(0, 1), which=st.integers(0, 9))
    def pass_on(self, pool: int, which: int) -> None:
        if self.kept:
            tensor, value = self.kept[which % len(self.kept)]
            job = self.legion.submit(flow("TestAdd"), inputs=[tensor], spec=self.specs[pool])
            self.jobs.append((job, value + 1.0, False))

    @rule(which=st.integers(0, 9))
    def cancel(self, which: int) -> None:
        if self.jobs:
            index = which % len(self.jobs)
            job, value, _ = self.jobs[index]
            job.cancel()
            self.jobs[index] = (job, value, True)

    @rule(which=st.integers(0, 9), keep=st.booleans())
    def look(self, which: int, keep: bool) -> None:
        if self.jobs:
            self.check(*self.jobs.pop(which % len(self.jobs)), keep=keep)

    @rule(which=st.integers(0, 9))
    def drop_a_job(self, which: int) -> None:
        if self.jobs:
            self.jobs.pop(which % len(self.jobs))

    @rule(which=st.integers(0, 9))
    def drop_a_result(self, which: int) -> None:
        if self.kept:
            self.kept.pop(which % len(self.kept))

    @rule(which=st.integers(0, 9), number=st.sampled_from([needs.KILL, signal.SIGTERM, signal.SIGSEGV]))
    def kill(self, which: int, number: int) -> None:
        workers = [worker for worker in self.legion.workers() if worker.pid is not None]
        if workers and self.kills < 4:
            self.kills += 1
            with suppress(ProcessLookupError):
                os.kill(workers[which % len(workers)].pid or 0, number)

    @rule(pool=st.integers(0, 1))
    def stop(self, pool: int) -> None:
        if self.kills < 4:
            self.kills += 1
            self.legion.stop_workers(self.specs[pool])

    @rule()
    def free(self) -> None:
        self.legion.free()

    @invariant()
    def what_is_kept_stays_as_it_was(self) -> None:
        assert self.legion._loop.fault is None
        for tensor, value in self.kept:
            assert (float(tensor[0]), float(tensor[-1])) == (value, value)

    def check(self, job: Job, value: float, cancelled: bool, *, keep: bool) -> None:
        error = job.exception(timeout=60)
        assert sum(event.terminal for event in job.events()) == 1
        if error is None:
            tensor = job.result()["output_1"]
            assert (float(tensor.min()), float(tensor.max()), tensor.numel()) == (value, value, ELEMENTS)
            if keep:
                self.kept.append((tensor, value))
        elif isinstance(error, JobCancelled):
            assert cancelled
        else:
            assert isinstance(error, (WorkerLost, *KILLED_AT_START)), error
            assert self.kills

    def teardown(self) -> None:
        while self.jobs:
            self.check(*self.jobs.pop(), keep=False)
        self.what_is_kept_stays_as_it_was()


TestCallers: Any = Callers.TestCase
TestCallers.settings = settings(
    max_examples=int(os.environ.get("LEGION_STATEFUL_EXAMPLES", "6")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    database=None,
    print_blob=True,
)
