"""Frames and handles that no worker of ours would send: counted, the worker ended, its job resolved."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
import torch

from legion_shm import Supervisor, WorkerLost
from legion_shm.config import SupervisorSettings
from legion_shm.supervisor.inbox import Inbox
from legion_shm.supervisor.lending import MASTER, Lending
from legion_shm.supervisor.loop import _limits
from legion_shm.supervisor.machine import Machine
from legion_shm.supervisor.master_memory import MasterMemory
from legion_shm.supervisor.stimuli import JobSubmitted, PoolDefined, WorkerExited, WorkerReady
from legion_shm.supervisor.worker_io import WorkerIO
from legion_shm.transport.frames import encode_message
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.messages import (
    JobDone,
    LogRecord,
    Message,
    NodeNotes,
    SegmentRetired,
    Stop,
    ValueNote,
)
from tests import needs
from tests.reliability.support import do, hostile

SEGMENT = 1 << 20


class Rig:
    """An inbox with everything behind it but processes and sockets; worker w1 runs job j."""

    def __init__(self) -> None:
        settings = SupervisorSettings(max_message_bytes=1 << 16)
        self.machine = Machine(_limits(settings))
        self.resolved: list[Any] = []
        self.memory = MasterMemory(
            kind="portable" if needs.WINDOWS else "memfd",
            name_prefix="legion-attack-",
            inline_max_bytes=64,
            quota_bytes=1 << 24,
            full_wait_s=0.1,
            segment_added=lambda *_: None,
            segments_retired=lambda *_: None,
            resident=lambda _: None,
            remotes_dropped=lambda worker, numbers: None,
        )
        self.worker = WorkerIO("w1", hostile(), 10)
        self.worker.greeted.update({"job", "control"})
        self.signals: list[int] = []
        spawned: Any = SimpleNamespace(signal_group=self.signals.append, descriptors=None)
        self.worker.spawned = spawned
        self.sent: list[Message] = []
        processes: Any = SimpleNamespace(
            get=lambda _: self.worker,
            of_identity=lambda _: self.worker,
            send=lambda worker, message: self.sent.append(message),
            read_output=lambda worker: [],
        )
        nothing: Any = SimpleNamespace()
        self.lending = Lending(settings, self.memory, processes, nothing, nothing)
        self.segment, _ = self.memory.create(self.worker.arena, SEGMENT)
        self.lending.table.add_segment(self.worker.arena, self.segment, SEGMENT)
        submission: Any = SimpleNamespace(
            feed=SimpleNamespace(emit=lambda *makes, now: None),
            options=SimpleNamespace(allow_cpu=True),
            packed=SimpleNamespace(stats={}),
            times=SimpleNamespace(encoded_s=0.0, submitted_s=0.0, sent_s=0.0),
        )  # fmt: skip
        channel: Any = SimpleNamespace(receive=lambda: None)
        self.inbox = Inbox(
            max_bytes=settings.max_message_bytes,
            channel=channel,
            processes=processes,
            lending=self.lending,
            memory=self.memory,
            machine=self.machine,
            submissions={"j": submission},
            handle=lambda stimulus, now: self.resolved.extend(self.machine.handle(stimulus, now)),
            freed=lambda memory: None,
        )
        for stimulus in (
            PoolDefined("p", 1, 9.0, None, None),
            JobSubmitted("j", "p", None, 0),
            WorkerReady("w1"),
        ):
            self.machine.handle(stimulus, 0.0)
        assert self.machine.jobs["j"].worker == "w1"
        self.live = self.handle(0, 4096, 1)
        self.lending.table.publish(self.live, MASTER)

    def handle(self, offset: int, nbytes: int, generation: int = 9, **other: int) -> BlockHandle:
        fields = {"arena": self.worker.arena, "segment": self.segment, **other}
        return BlockHandle(fields["arena"], fields["segment"], offset, nbytes, generation)

    def hears(self, frame: bytes) -> None:
        self.inbox._read(self.worker, self.worker.job_identity, frame)

    def result(self, *blocks: BlockHandle, new: bool = True) -> bytes:
        note = ValueNote("output_1", msgpack.packb([1, 0, 5]), blocks, (new,) * len(blocks), None, (0,) * 6)
        return encode_message(JobDone("j", 1, (note,), (), 0, 0, 0, 0, 0, 0), max_bytes=1 << 30)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.memory.close()


def frame(message: Message) -> bytes:
    return encode_message(message, max_bytes=1 << 30)


def row(*items: object) -> bytes:
    packed: bytes = msgpack.packb(items)
    return packed


FRAMES = {
    "corrupted": bytes(range(256)),
    "empty": b"",
    "truncated": frame(LogRecord("INFO", "x", "y"))[:-2],
    "with bytes after it": frame(Stop()) + b"x",
    "oversize": frame(LogRecord("INFO", "x", "y" * (1 << 16))),
    "deeply nested": b"\x91" * 50_000,
    "of an unknown version": row(2, 11, 1, 1, 1, ""),
    "of an unknown code": row(1, 99),
    "with a field too many": row(1, 9, "j", 1, 1),
    "of another type": row(1, 9, 5, 1),
    "for a worker": frame(Stop()),
    "with another's greeting": row(1, 1, "w2", "token", "job", 1),
    "that asks for less than nothing": row(1, 10, -1),
    "of what no node does": frame(NodeNotes("j", 1, (("a", "b", "exploded"),))),
    "with figures below zero": row(1, 7, "j", 1, [["o", b"", [], [], None, [-1] * 6]], [], *[0] * 6, []),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_is_none_ends_its_worker_and_its_job(rig: Rig, name: str) -> None:
    rig.hears(FRAMES[name])
    assert rig.inbox.protocol_errors == 1
    assert rig.worker.violation.split(":")[0] in ("ProtocolError", "InvalidHandle", "StaleHandle")
    assert rig.signals == [9]
    assert not rig.resolved, "its exit does that"
    rig.hears(FRAMES[name])
    assert rig.inbox.protocol_errors == 1, "nothing more is heard of it"
    (ended,) = rig.machine.handle(WorkerExited("w1", -9, rig.worker.violation, ()), 1.0)[:1]
    assert isinstance(getattr(ended, "error", None), WorkerLost)


def forged(rig: Rig) -> dict[str, tuple[str, bytes]]:
    handle, result = rig.handle, rig.result
    live = rig.live
    release = [1, 12]
    where = [rig.worker.arena, rig.segment]
    return {
        "of another arena": ("ProtocolError", result(handle(0, 10, arena=1))),
        "of a segment that was not granted": ("InvalidHandle", result(handle(0, 10, segment=77))),
        "beyond its segment": ("InvalidHandle", result(handle(1 << 40, 10))),
        "longer than its segment": ("InvalidHandle", result(handle(8192, SEGMENT))),
        "whose sum overflows": ("InvalidHandle", result(handle((1 << 64) - 4096, 8192))),
        "off a page": ("InvalidHandle", result(handle(8200, 10))),
        "over a block that is in use": ("InvalidHandle", result(handle(0, 8192))),
        "twice": ("InvalidHandle", result(handle(8192, 10), handle(8192, 10))),
        "that is negative": ("InvalidHandle", row(*release, [[*where, -4096, 10, 1]])),
        "without a length": ("InvalidHandle", row(*release, [[*where, 0, 0, 1]])),
        "of a generation below zero": ("InvalidHandle", row(*release, [[*where, 0, 10, -1]])),
        "that was never published": ("StaleHandle", result(handle(8192, 10), new=False)),
        "of another size": ("InvalidHandle", result(handle(0, 100, live.generation), new=False)),
        "of an earlier life": ("StaleHandle", result(handle(0, 4096, live.generation - 1), new=False)),
        "of a segment in use that it gives up": ("ProtocolError", frame(SegmentRetired((rig.segment,)))),
    }  # fmt: skip


FORGED = (
    "of another arena", "of a segment that was not granted", "beyond its segment", "longer than its segment",
    "whose sum overflows", "off a page", "over a block that is in use", "twice", "that is negative",
    "without a length", "of a generation below zero", "that was never published", "of another size",
    "of an earlier life", "of a segment in use that it gives up",
)  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_handle_is_refused_before_memory_is_touched(
    rig: Rig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("memory was looked at")

    monkeypatch.setattr(rig.memory, "view", touched)
    kind, attack = forged(rig)[name]
    rig.hears(attack)
    assert rig.worker.violation.split(":")[0] == kind, rig.worker.violation
    assert rig.inbox.protocol_errors == 1
    assert rig.lending.table.live_blocks() == 1, "what the attack had taken is given back"
    assert rig.lending.table.holds(rig.live, MASTER)


# --- the same, by a worker that is real ---------------------------------------------------------------


FORGE = """
h = host()
from legion_shm.transport.handles import BlockHandle
note = ("output_1", b"", (BlockHandle(h._config.arena, 77, 0, 10, 1),), (True,), None, (0,) * 6)
send_raw(wire(JobDone(h._control.busy_job, 1, (note,), (), 0, 0, 0, 0, 0, 0)))
import time; time.sleep(30)
"""


def test_a_worker_that_attacks_loses_its_own_job_and_nobody_elses() -> None:
    with Supervisor() as legion:
        do(legion, "out = 1", name="neighbour").result(timeout=60)
        garbage = "send_raw(bytes(range(256))); import time; time.sleep(30)"
        for code, said in ((garbage, "broke the protocol"), (FORGE, "InvalidHandle")):
            with pytest.raises(WorkerLost, match=said):
                do(legion, code).result(timeout=40)
            value = do(legion, "out = value + 1", torch.ones(1 << 18), name="neighbour").result(timeout=30)
            assert float(value["output_1"].sum()) == 2.0 * (1 << 18)
        assert legion._loop._inbox.protocol_errors == 2
        # ZeroMQ itself takes no frame so far over the limit: it breaks the connection off, and makes another.
        oversize = "send_raw(bytes((64 << 20) + 8192)); import time; time.sleep(0.3); out = 1"
        assert do(legion, oversize).result(timeout=30)["output_1"] == 1
        assert legion._loop.fault is None
