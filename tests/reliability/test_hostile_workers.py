"""What a worker may say or do to its supervisor that no worker of ours would: nobody else is harmed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from legion_shm import InvalidWorkflow, JobFailed, LogEvent, Supervisor, WorkerLost
from legion_shm.doctor import _try_death_signal
from legion_shm.supervisor.replies import TEXT_MAX, readable
from tests import needs
from tests.reliability.support import do
from tests.system.support import only_worker, wait_for

ELEMENTS = 1 << 18

HEARTBEATS_GO_ON = """
import time
control = host()._control
beats, until_s = control.beats, time.monotonic() + 20.0
while control.beats < beats + 2 and control.is_alive() and time.monotonic() < until_s:
    time.sleep(0.01)
out = control.beats >= beats + 2
"""


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    with Supervisor(restart_backoff_s=0.01, lease_flush_s=0.005, heartbeat_interval_s=0.1) as supervisor:
        yield supervisor


def fill(legion: Supervisor, value: float) -> torch.Tensor:
    tensor = do(legion, f"import torch; out = torch.full(({ELEMENTS},), {value})").result(timeout=60)[
        "output_1"
    ]
    assert isinstance(tensor, torch.Tensor)
    return tensor


@pytest.mark.parametrize("later", [0, 1], ids=["the same", "of another attempt"])
def test_a_result_that_comes_twice_changes_nothing(legion: Supervisor, later: int) -> None:
    twice = f"""
import dataclasses, torch
h = host()
send = h._send
def doubled(message):
    send(message)
    if type(message).__name__ == "JobDone":
        send(dataclasses.replace(message, attempt=message.attempt + {later}))
        h._send = send
h._send = doubled
out = torch.full(({ELEMENTS},), 1.0)
"""
    ignored = legion._loop._inbox.ignored
    kept = do(legion, twice).result(timeout=60)["output_1"]
    more = [fill(legion, 7.0) for _ in range(4)]
    wait_for(lambda: legion._loop._inbox.ignored > ignored, "the second one was counted")
    assert (float(kept.min()), float(kept.max())) == (1.0, 1.0), "nobody was given its block"
    assert all(float(tensor.min()) == 7.0 for tensor in more)


def test_a_result_that_comes_early_gives_back_what_was_made_for_it(legion: Supervisor) -> None:
    """A reply to an attempt that is none is ignored; the true one after it counts."""
    early = f"""
import dataclasses, torch
h = host()
send = h._send
def relabelled(message):
    if type(message).__name__ == "JobDone":
        send(dataclasses.replace(message, attempt=message.attempt + 1))
        h._send = send
        values = h._memory.encode_outputs(message.job, {{"output_1": torch.full(({ELEMENTS},), 5.0)}}, {{}})
        message = dataclasses.replace(message, values=values, released=())
    send(message)
h._send = relabelled
out = torch.full(({ELEMENTS},), 1.0)
"""
    ignored = legion._loop._inbox.ignored
    assert float(do(legion, early).result(timeout=60)["output_1"][0]) == 5.0
    assert legion._loop._inbox.ignored > ignored
    assert float(fill(legion, 3.0).sum()) == 3.0 * ELEMENTS


def test_one_segment_is_asked_for_at_a_time(legion: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import time
send, frame = send_raw, wire(SegmentRequest(1 << 20))
for _ in range(2):
    send(frame)
time.sleep(10)
"""
    refused = threading.Event()
    create = legion._memory.create

    def create_later(*arguments: Any) -> Any:
        assert refused.wait(timeout=20), "the second request was let through"
        return create(*arguments)

    assert float(fill(legion, 1.0)[0]) == 1.0
    with monkeypatch.context() as patched:
        patched.setattr(legion._memory, "create", create_later)
        with pytest.raises(WorkerLost, match="one more before the first came"):
            do(legion, code).result(timeout=30)
        refused.set()
    assert float(fill(legion, 2.0)[0]) == 2.0


def test_a_worker_that_asks_for_more_than_its_quota_does_not_get_it() -> None:
    """Its own arena asks for no more than that; what it says all the same is for the supervisor to refuse."""
    quota = 8 << 20
    code = f"""
import time
for _ in range(12):
    send_raw(wire(SegmentRequest({quota // 4})))
    time.sleep(0.1)
"""
    with Supervisor(arena_quota_bytes=quota) as legion:
        job, most = do(legion, code), 0
        while not job.done():
            most = max(most, *(worker.arena_bytes for worker in legion.workers()), 0)
        assert quota // 2 <= most <= quota


@needs.fork
@pytest.mark.parametrize("end", ["out = 'child'", "raise SystemExit(0)", "raise ValueError('child')"])
def test_a_child_that_a_node_forked_does_not_become_a_second_worker(legion: Supervisor, end: str) -> None:
    code = f"""
import os
child = os.fork()
if child == 0:
    {end}
else:
    out = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    assert do(legion, code).result(timeout=30)["output_1"] == 1
    worker = next(info for info in legion.workers() if info.state in ("idle", "busy"))
    assert worker.pid is not None
    assert not psutil.Process(worker.pid).children()


@needs.posix
def test_the_doctors_probe_leaves_the_threads_signals_as_they_were() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    _try_death_signal()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before
    number = signal.SIGRTMIN + 5
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        _try_death_signal()
        assert number in signal.pthread_sigmask(signal.SIG_BLOCK, set()), "also where it was blocked"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- texts ------------------------------------------------------------------------------------------


def test_an_error_with_lone_surrogates_can_be_printed(legion: Supervisor) -> None:
    job = do(legion, "raise ValueError('a\\ud800\\0b')")
    with pytest.raises(JobFailed) as caught:
        job.result(timeout=30)
    for text in (str(caught.value), caught.value.exception_message, caught.value.traceback):
        assert "a\\ud800\0b" in text, "shown as an escape"
        text.encode()


def test_log_records_with_lone_surrogates_can_be_printed(legion: Supervisor) -> None:
    job = do(legion, "send_raw(wire(LogRecord('IN\\ud800', 'x\\udfff', 'y\\ud800')))")
    job.result(timeout=30)
    for event in job.events():
        repr(event).encode()
        if isinstance(event, LogEvent):
            assert (event.level, event.logger, event.text) == ("IN\\ud800", "x\\udfff", "y\\ud800")
            break
    else:
        raise AssertionError("the record did not come")


@pytest.mark.parametrize(
    "says",
    [
        "current_job().progress(1, 2, node_id=5)",
        "current_job().preview(torch.zeros(8, 8, 3), node_id=5)",
        "log.handle(logging.makeLogRecord({'name': 5, 'levelname': None, 'msg': 'x', 'levelno': 40}))",
        "in_thread(log.handle, logging.makeLogRecord({'name': 5, 'msg': 'x', 'levelno': 40}))",
        "in_thread(logging.getLogger('x' * (100 << 20)).error, 'x')",
        "in_thread(current_job().progress, 1, 2, node_id='x' * (100 << 20))",
    ],
)
def test_what_a_node_says_in_odd_types_and_sizes_costs_no_job(legion: Supervisor, says: str) -> None:
    code = f"""
import logging, threading, torch
from legion_shm import current_job
log = logging.getLogger("odd")
def in_thread(call, *args, **named):
    thread = threading.Thread(target=call, args=args, kwargs=named)
    thread.start(); thread.join()
{says}
"""
    assert do(legion, code).exception(timeout=60) is None
    assert do(legion, HEARTBEATS_GO_ON).result(timeout=60)["output_1"]


def test_an_error_that_names_a_node_by_a_number_fails_its_job_alone(legion: Supervisor) -> None:
    code = "import legion_shm\nraise legion_shm.InvalidWorkflow('x', node_id=5)"
    with pytest.raises(InvalidWorkflow) as caught:
        do(legion, code).result(timeout=60)
    assert caught.value.node_id == "5"


@needs.rlimits
def test_a_worker_whose_node_has_used_up_all_descriptors_is_not_taken_for_hung() -> None:
    code = f"""
import os, resource
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
{HEARTBEATS_GO_ON}
for fd in taken:
    os.close(fd)
"""
    with Supervisor(heartbeat_interval_s=0.1, heartbeat_timeout_s=2.0) as legion:
        assert do(legion, code).result(timeout=60)["output_1"]


def test_huge_texts_of_a_worker_are_cut(legion: Supervisor) -> None:
    code = """
h, m = host(), "m" * 5_000_000
reply = JobFailedReply(
    h._control.busy_job, 1, "JobFailed", m, None, None, m, m, m, m, (), ""
)
send_raw(wire(reply))
h._send = lambda message: None
"""
    with pytest.raises(JobFailed, match="characters left out") as caught:
        do(legion, code, name="huge").result(timeout=30)
    error = caught.value
    for text in (error.exception_type, error.exception_message, error.traceback, error.inputs_summary):
        assert len(text) < TEXT_MAX + 100
    legion.stop_workers()


def test_a_preview_of_many_megabytes_is_not_kept(legion: Supervisor) -> None:
    picture = "PreviewNote(h._control.busy_job, 1, None, 'JPEG', b'x' * (5 << 20))"
    code = f"h = host(); send_raw(wire({picture}))"
    job = do(legion, code)
    job.result(timeout=60)
    assert "preview" not in [event.kind for event in job.events()]


def test_a_text_is_cut_in_its_middle_and_short_ones_stay_as_they_are() -> None:
    assert readable("as it is: é\0") == "as it is: é\0"
    assert readable("a" * 50 + "b" * 100 + "c" * 50, 100) == (
        "a" * 50 + "\n... 100 characters left out ...\n" + "c" * 50
    )


@pytest.mark.parametrize(
    ("raising", "kind"),
    [
        ("raise type('Odd', (BaseException,), {})('x')", "Odd"),
        ("raise GeneratorExit()", "GeneratorExit"),
        ("raise KeyboardInterrupt()", "KeyboardInterrupt"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_whatever_a_node_raises_is_told_with_the_nodes_id(
    legion: Supervisor, raising: str, kind: str
) -> None:
    do(legion, "out = 1").result(timeout=60)
    pid = only_worker(legion).pid
    with pytest.raises(JobFailed, match=kind) as caught:
        do(legion, raising).result(timeout=30)
    assert (caught.value.node_id, caught.value.class_type) == ("node", "Hostile")
    assert only_worker(legion).pid == pid, "and costs no worker"
