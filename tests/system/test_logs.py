from __future__ import annotations

from collections.abc import Iterator

import pytest

from legion_shm import EventsDropped, Job, LogEvent, PreviewEvent, ProgressEvent, Supervisor, WorkerLost
from tests.system.support import flow, run, spec


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    with Supervisor(event_history=50_000) as supervisor:
        run(supervisor, "TestPass")
        yield supervisor


def ended(legion: Supervisor, class_type: str, **options: object) -> Job:
    job = legion.submit(flow(class_type, **options), inputs=[None], spec=spec())
    job.exception(timeout=60)
    return job


def lines(job: Job, stream: str) -> list[str]:
    return [event.text for event in job.events() if isinstance(event, LogEvent) and event.stream == stream]


@pytest.mark.parametrize("stream", ["stdout", "stderr", "log"])
def test_every_line_arrives_in_order_and_before_the_end(legion: Supervisor, stream: str) -> None:
    for count in (1, 2, 3, 5000) if stream == "log" else (1, 2, 3, 5000, 20_000):
        job = ended(legion, "TestPrint", stream=stream, text="a line", count=count)
        expected = [f"a line {number}" for number in range(count)] if count > 1 else ["a line"]
        assert lines(job, stream) == expected


def test_a_log_record_says_its_level_and_its_logger(legion: Supervisor) -> None:
    job = ended(legion, "TestPrint", stream="log", text="two\nlines")
    (event,) = [event for event in job.events() if isinstance(event, LogEvent)]
    assert (event.kind, event.level, event.logger) == ("log", "WARNING", "legion.test")
    assert event.text == "two\nlines"


def test_a_very_long_line_is_broken_up_and_not_lost(legion: Supervisor) -> None:
    text = "".join(chr(ord("a") + number % 26) for number in range(300_000))
    job = ended(legion, "TestPrint", text=text)
    assert "".join(lines(job, "stdout")) == text
    assert max(map(len, lines(job, "stdout"))) <= 8192


def test_binary_garbage_harms_nobody(legion: Supervisor) -> None:
    garbage = bytes(range(256)) * 64
    job = ended(legion, "TestWriteBytes", hex=(garbage + b"\nafter it\n").hex())
    assert lines(job, "stdout")[-1] == "after it"
    assert job.state == "done"


def test_progress_bars_come_as_lines(legion: Supervisor) -> None:
    bar = b"".join(b"\r%3d%%" % percent for percent in (0, 50, 100)) + b"\n"
    job = ended(legion, "TestWriteBytes", hex=bar.hex())
    assert lines(job, "stdout") == ["  0%", " 50%", "100%"]


def test_what_one_job_wrote_is_not_told_to_the_next(legion: Supervisor) -> None:
    for number in range(30):
        job = ended(legion, "TestPrint", text=f"job {number}", stream="stderr")
        assert lines(job, "stderr") == [f"job {number}"]


def test_progress_and_previews_arrive_and_the_last_step_always_does(legion: Supervisor) -> None:
    job = ended(legion, "TestProgress", steps=500)
    steps = [event for event in job.events() if isinstance(event, ProgressEvent)]
    assert [step.value for step in steps] == sorted(step.value for step in steps)
    assert (steps[-1].value, steps[-1].total, steps[-1].node_id) == (500.0, 500.0, "node")
    (preview,) = [event for event in job.events() if isinstance(event, PreviewEvent)]
    assert (preview.format, preview.data[:2]) == ("JPEG", b"\xff\xd8")


def test_history_and_tail_are_bounded_and_what_is_gone_is_counted() -> None:
    with Supervisor(event_history=20, log_tail_lines=7) as legion:
        job = ended(legion, "TestPrint", count=1000)
        events = list(job.events())
        assert isinstance(events[0], EventsDropped)
        assert len(events) == 21
        assert events[0].count == events[1].seq
        assert events[-1].kind == "done"
        workflow = flow("TestPrint", text="line", count=1000)
        workflow["end"] = {"class_type": "TestExit", "inputs": {"value": ["node", 0]}}
        workflow["out"]["inputs"] = {"input_1": ["end", 0]}
        error = legion.submit(workflow, spec=spec()).exception(timeout=60)
        assert isinstance(error, WorkerLost)
        assert error.log_tail == tuple(f"line {number}" for number in range(993, 1000))


def test_an_input_that_no_node_reads_is_a_warning(legion: Supervisor) -> None:
    workflow = {"a": {"class_type": "LegionOutput", "inputs": {"name": "ui", "value": ["b", 0]}},
                "b": {"class_type": "LegionInput", "inputs": {"name": "wanted"}}}  # fmt: skip
    job = legion.submit(workflow, inputs={"wanted": 1, "unread": 2}, spec=spec())
    result = job.result(timeout=20)
    assert dict(result) == {"ui": 1}, "no name of an output is taken"
    assert result.ui == {}
    assert any("'unread'" in text for text in lines(job, "log"))
