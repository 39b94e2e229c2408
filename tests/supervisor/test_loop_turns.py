"""The loop's turns: what is put off while jobs end is not put off for ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from legion_shm.supervisor.loop import Loop
from legion_shm.supervisor.stimuli import Stimulus, Tick


class Turns:
    """A loop without sockets and processes, whose every turn may resolve a job."""

    def __init__(self, *, jobs_end: bool, deadline_s: float | None) -> None:
        self.handled: list[Stimulus] = []
        self.looked = 0
        self.waited: list[float] = []
        self.jobs_end = jobs_end
        self.loop = cast("Any", Loop.__new__(Loop))
        self.loop._put_off, self.loop._tick_s = False, None
        self.loop._settings = SimpleNamespace(heartbeat_interval_s=60.0)
        self.loop._machine = SimpleNamespace(next_deadline_s=lambda: deadline_s, handle=self._handle)
        self.loop._channel = SimpleNamespace(wait=self._wait)
        self.loop._orders = SimpleNamespace(resolved=0, carry_out=None)
        self.loop._commands = SimpleNamespace(wake_fd=-1, carry_out=lambda *_, **__: None)
        self.loop._inbox = SimpleNamespace(drain=self._drain)
        self.loop.memory = SimpleNamespace(drain_released=list)
        self.loop._lending = SimpleNamespace(
            next_due_s=lambda _: None, pass_descriptors=self._look, return_leases=lambda _: None
        )
        self.loop._processes = SimpleNamespace(
            next_due_s=lambda: None, exited=lambda _: [], tend=lambda _: None
        )

    def _handle(self, stimulus: Stimulus, _now: float) -> list[Any]:
        self.handled.append(stimulus)
        return []

    def _wait(self, timeout_s: float) -> tuple[bool, list[int]]:
        self.waited.append(timeout_s)
        return True, []

    def _drain(self, *, waits: bool = False) -> None:
        if waits and self.jobs_end:
            self.loop._orders.resolved += 1

    def _look(self, _now: float) -> None:
        self.looked += 1

    def run(self, turns: int) -> None:
        for _ in range(turns):
            self.loop._turn()


def test_a_turn_in_which_a_job_ends_leaves_the_rest_to_the_next_one_soon() -> None:
    turns = Turns(jobs_end=True, deadline_s=None)
    turns.run(1)
    assert turns.looked == 0
    turns.jobs_end = False
    turns.run(1)
    assert turns.looked == 1
    assert turns.waited[1] == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("jobs_end", [True, False])
def test_what_is_due_is_seen_to_although_a_job_ends_in_every_turn(jobs_end: bool) -> None:
    turns = Turns(jobs_end=jobs_end, deadline_s=1.0)
    turns.run(10)
    count = 5 if jobs_end else 10
    assert turns.looked == count
    assert turns.handled == [Tick()] * count
