"""A worker that floods its supervisor costs its neighbours some milliseconds, and nothing else."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from legion_shm import LogEvent, Supervisor, WorkerLost
from legion_shm.config import SupervisorSettings
from legion_shm.supervisor.inbox import Inbox
from legion_shm.supervisor.lending import Lending
from legion_shm.supervisor.worker_io import WorkerIO
from legion_shm.transport.fdpass import SegmentReceiver
from legion_shm.transport.frames import encode_message
from legion_shm.transport.messages import Heartbeat
from tests import needs
from tests.reliability.support import do, hostile, slowest_s

FLOOD = """
import time
frame = wire({message})
send = send_raw
until, out = time.monotonic() + 1.5, 0
while time.monotonic() < until:
    send(frame)
    out += 1
"""


class FakeChannel:
    """Two workers' frames, taken in turns, as a ROUTER takes them."""

    def __init__(self, flood: int) -> None:
        frame = encode_message(Heartbeat(1, 1, 1, ""), max_bytes=1000)
        self.frames = [(b"noisy", frame)] * flood
        self.frames.insert(1, (b"quiet", frame))

    def receive(self, *, waits: bool) -> tuple[bytes, bytes] | None:
        return self.frames.pop(0) if self.frames else None


def fake_inbox(flood: int, handle: Any = lambda stimulus, now: None) -> Inbox:
    workers = {
        name: SimpleNamespace(
            id=name.decode(), violation="", job_identity=b"", greeted={"control"}, ready=False, rss_bytes=0
        )
        for name in (b"noisy", b"quiet")
    }
    processes = SimpleNamespace(of_identity=workers.get)
    nothing: Any = SimpleNamespace()
    channel: Any = FakeChannel(flood)
    return Inbox(
        max_bytes=1000,
        channel=channel,
        processes=processes,  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        lending=nothing,
        memory=nothing,
        machine=nothing,
        submissions={},
        handle=handle,
        freed=nothing,
    )


def test_one_turn_of_the_loop_takes_a_bounded_number_of_frames() -> None:
    inbox = fake_inbox(1200)
    assert inbox.drain() == {"noisy", "quiet"}, "more waits, of one of these at most"
    assert len(inbox._channel.frames) == 701  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
    assert inbox.drain() == {"noisy"}, "of the quiet one nothing is left"
    assert inbox.drain() is None


def test_one_turn_of_the_loop_takes_a_bounded_time() -> None:
    inbox = fake_inbox(1200, handle=lambda stimulus, now: time.sleep(0.005))
    started_s = time.monotonic()
    assert inbox.drain() is not None
    assert time.monotonic() - started_s < 0.2, "20 ms, and the frame that was begun"


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    """With three workers that are warm, of which two are about to misbehave."""
    with Supervisor(event_history=100_000) as supervisor:
        for started in [do(supervisor, "out = 1", name=name) for name in ("one", "two", "quiet")]:
            started.result(timeout=60)
        yield supervisor


@pytest.mark.parametrize(
    "message",
    ["LogRecord('INFO', 'x', 'y')", "ProgressNote(host()._control.busy_job, 1, None, 1.0, 2.0)"],
    ids=["logs", "progress"],
)
def test_two_workers_that_flood_starve_no_third(legion: Supervisor, message: str) -> None:
    floods = [do(legion, FLOOD.format(message=message), name=name) for name in ("one", "two")]
    worst_s, tried = slowest_s(legion, floods[0])
    assert tried > 3
    assert worst_s < 5.0, "one that is starved waits 7 s and more"
    sent = [flood.result(timeout=60)["output_1"] for flood in floods]
    assert min(sent) > 1000, sent


def test_a_flood_of_log_records_is_thinned_and_what_was_left_out_is_counted(legion: Supervisor) -> None:
    code = (
        "import logging\nfor number in range(30_000):\n    logging.getLogger('flood').warning('%d', number)"
    )
    job = do(legion, code, name="quiet")
    job.result(timeout=60)
    events = [event for event in job.events() if isinstance(event, LogEvent)]
    told = [event.text for event in events if event.logger == "legion_shm" and "left out" in event.text]
    kept = [event for event in events if event.logger == "flood"]
    assert told
    assert len(kept) >= 10_000
    assert len(kept) + sum(int(text.split()[0]) for text in told) == 30_000


def test_a_job_that_died_in_a_flood_is_resolved_within_a_second(legion: Supervisor, tmp_path: Path) -> None:
    died = tmp_path / "died"
    flood = FLOOD.format(message="LogRecord('INFO', 'x', 'y')")
    other = do(legion, flood, name="two")
    end = f"open({str(died)!r}, 'w').write(str(time.monotonic())); import os; os.kill(os.getpid(), 9)"
    assert isinstance(do(legion, flood + end, name="one").exception(timeout=20), WorkerLost)
    assert time.monotonic() - float(died.read_text()) < 1.0
    other.result(timeout=60)


def fake_worker(sock: socket.socket) -> WorkerIO:
    worker = WorkerIO("w1", hostile(), 10)
    spawned: Any = SimpleNamespace(descriptors=sock, signal_group=lambda number: None)
    worker.spawned = spawned
    return worker


@needs.linux
def test_descriptors_that_a_worker_does_not_take_wait_for_it_and_not_the_loop() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = os.memfd_create("x")
    try:
        segments: Any = SimpleNamespace(
            segment=lambda arena, segment: SimpleNamespace(nbytes=4096, descriptor=fd)
        )
        nothing: Any = SimpleNamespace()
        lending = Lending(SupervisorSettings(), segments, nothing, nothing, nothing)
        worker = fake_worker(ours)
        started_s = time.monotonic()
        for number in range(2000):
            lending._send_descriptor(worker, 1, number)
        assert time.monotonic() - started_s < 0.9, "a second for each would be the old wait"
        assert worker.unsent
        assert lending._waiting == {"w1": worker}

        taken: list[int] = []
        receiver = SegmentReceiver(theirs)
        while worker.unsent or len(taken) < 2000:
            lending.pass_descriptors(worker.unsent_since_s)
            for _, segment, _, received in receiver.receive_pending():
                taken.append(segment)
                os.close(received)
        assert taken == list(range(2000)), "each once, in order"
        lending.pass_descriptors(time.monotonic())
        assert not lending._waiting

        for number in range(2000):
            lending._send_descriptor(worker, 1, number)
        lending.pass_descriptors(worker.unsent_since_s + 9.0)
        assert not worker.violation
        lending.pass_descriptors(worker.unsent_since_s + 10.0)
        assert "descriptor" in worker.violation
    finally:
        ours.close()
        theirs.close()
        os.close(fd)
