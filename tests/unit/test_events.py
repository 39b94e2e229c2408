from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_args

import pytest

from legion_shm import events
from legion_shm.errors import JobFailed
from legion_shm.events import (
    TERMINAL_STATES,
    Event,
    EventsDropped,
    JobEnded,
    JobQueued,
    JobRetrying,
    JobStarted,
    LogEvent,
    NodeEvent,
    PreviewEvent,
    ProgressEvent,
    TerminalState,
)

AT = ("j-1", 4, 12.5)
SAMPLES: dict[str, Event] = {
    "queued": JobQueued(*AT),
    "started": JobStarted(*AT, "w1", "graph", 1),
    "node": NodeEvent(*AT, "5", "Blur", "started"),
    "progress": ProgressEvent(*AT, "5", 3.0, 20.0),
    "preview": PreviewEvent(*AT, None, "JPEG", b"\xff\xd8"),
    "log": LogEvent(*AT, "stdout", "a line"),
    "retrying": JobRetrying(*AT, 1, "was killed"),
    "dropped": EventsDropped(*AT, 7),
    "done": JobEnded(*AT, "done"),
    "failed": JobEnded(*AT, "failed", JobFailed("x")),
    "cancelled": JobEnded(*AT, "cancelled"),
    "lost": JobEnded(*AT, "lost"),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_event_says_its_kind_its_job_its_number_and_its_time(kind: str) -> None:
    event = SAMPLES[kind]
    assert event.kind == kind
    assert (event.job_id, event.seq, event.time_s) == AT
    assert [field.name for field in fields(event)][:3] == ["job_id", "seq", "time_s"]
    assert type(event).__doc__


@pytest.mark.parametrize("kind", SAMPLES)
def test_only_the_end_is_terminal(kind: str) -> None:
    assert SAMPLES[kind].terminal == (kind in TERMINAL_STATES) == isinstance(SAMPLES[kind], JobEnded)


def test_the_terminal_states_are_four() -> None:
    assert set(get_args(TerminalState)) == TERMINAL_STATES == {"done", "failed", "cancelled", "lost"}


def test_every_event_class_is_public_and_has_a_kind_of_its_own() -> None:
    classes = Event.__subclasses__()
    assert {cls.__name__ for cls in classes} | {"Event", "TERMINAL_STATES", "TerminalState"} == set(
        events.__all__
    )
    assert {type(event) for event in SAMPLES.values()} == set(classes)
    names = [cls.name for cls in classes if cls is not JobEnded]
    assert len(set(names)) == len(names)
    assert "event" not in names


@pytest.mark.parametrize("kind", SAMPLES)
def test_events_are_facts_that_cannot_be_changed(kind: str) -> None:
    event: Any = SAMPLES[kind]
    with pytest.raises(FrozenInstanceError):
        event.seq = 5
    with pytest.raises(FrozenInstanceError):
        event.kind = "other"


@pytest.mark.parametrize("kind", [kind for kind in SAMPLES if kind != "failed"])
def test_events_can_be_sent_on(kind: str) -> None:
    assert pickle.loads(pickle.dumps(SAMPLES[kind])) == SAMPLES[kind]


def test_a_preview_does_not_print_its_bytes() -> None:
    assert "data" not in repr(SAMPLES["preview"])
    assert "JPEG" in repr(SAMPLES["preview"])


def test_a_line_of_output_has_no_level_and_a_record_has_one() -> None:
    line = LogEvent(*AT, "stderr", "oops")
    assert (line.level, line.logger) == (None, None)
    record = LogEvent(*AT, "log", "oops", "WARNING", "my.nodes")
    assert (record.level, record.logger) == ("WARNING", "my.nodes")
