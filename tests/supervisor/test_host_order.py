"""In which order a worker's main thread does what it was asked while it could not be asked."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from legion_shm.supervisor import host as host_module
from legion_shm.supervisor.host import _Host
from legion_shm.supervisor.worker_memory import WorkerMemory
from legion_shm.transport.codec_types import TransferStats
from legion_shm.transport.messages import Free, Freed
from legion_shm.transport.values import PackedValues


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


@pytest.mark.parametrize("copied", [(0,), (1 << 19,), (1 << 19, 1 << 19), (25 << 20,)])
def test_what_was_copied_is_unmapped_once_the_reply_is_on_the_wire(
    copied: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: done.append(name)

    memory: Any = object.__new__(WorkerMemory)
    stats = {str(each): TransferStats(copied_bytes=nbytes) for each, nbytes in enumerate(copied)}
    memory._kept = {"job": PackedValues((), stats)}
    memory.result_sent = note("let go")
    host: Any = object.__new__(_Host)
    host._memory, host._jobs = memory, SimpleNamespace(let_leave=note("on the wire"))
    host._control = SimpleNamespace(begin=note("begin"), end=note("end"), flush_logs=note("logs"))
    host._config = SimpleNamespace(begun_fd=-1)
    host._log_handler, host._jobs_lock = None, nullcontext()
    host._send_notes, host._send, host._execute = note("notes"), note("reply"), lambda _message: object()
    monkeypatch.setattr(host_module, "write_begun", note("begun"))
    host._run(SimpleNamespace(job="job", attempt=1))
    large = ["on the wire"] if sum(copied) >= 1 << 20 else []
    assert done[-2 - len(large) :] == ["reply", *large, "let go"]
