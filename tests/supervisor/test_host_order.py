"""In which order a worker's main thread does what it was asked while it could not be asked."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from legion_shm.supervisor import host as host_module
from legion_shm.supervisor.host import _Host
from legion_shm.transport.messages import Free, Freed


def test_jobs_and_frees_that_came_together_are_done_in_the_order_in_which_they_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[object] = []
    nothing = SimpleNamespace(make_room=lambda: None, used=lambda *_: None, give_up_unused=lambda: None)
    host: Any = object.__new__(_Host)
    host._stopping, host._memory, host._heap = False, nothing, nothing
    host._engine = SimpleNamespace(free=lambda: done.append("free"))
    host._send = lambda message: done.append(type(message))

    def run(job: object) -> None:
        done.append(job)
        host._stopping = not host._waiting

    def measured(free: Any, _give_up: object) -> tuple[int, int]:
        free()
        return 1, 2

    host._run = run
    monkeypatch.setattr(host_module, "measured", measured)
    host._waiting = deque(["first", Free(), Free(), "second"])
    host.serve()
    assert done == ["first", "free", Freed, "free", Freed, "second"]
