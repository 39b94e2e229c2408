from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from legion_shm.errors import (
    ArenaFull,
    ForkedError,
    InvalidWorkflow,
    JobCancelled,
    JobFailed,
    MessageTooLarge,
    ProtocolError,
    UnsupportedValue,
    WorkerLost,
)
from legion_shm.events import (
    Event,
    EventsDropped,
    JobEnded,
    JobQueued,
    JobStarted,
    ProgressEvent,
)
from legion_shm.supervisor.feed import JobFeed
from legion_shm.supervisor.job import Job
from legion_shm.supervisor.replies import error_from
from legion_shm.supervisor.result import Delivery, JobStats, Result, Transfer
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle
from legion_shm.transport.messages import JobCancelledReply, JobFailedReply, ValueNote, Values
from legion_shm.transport.values import REPORT

STATS = JobStats("graph", "w1", 1, 2, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 2.8)
A, B = BlockHandle(7, 1, 0, 100, 1), BlockHandle(7, 1, BLOCK_ALIGN, 100, 2)
VALUES: Values = (
    ValueNote("output_1", b"tree", (A, B), (True, True), None, (1, 100, 0, 100, 1, 0)),
    ValueNote(REPORT, b"tree", (), (), None, (0, 0, 0, 0, 0, 0)),
)


class FakeMemory:
    """A decoder that counts, and can refuse."""

    def __init__(self, error: Exception | None = None) -> None:
        self.unpacked = 0
        self.given_back: list[BlockHandle] = []
        self.remotes_back: list[int] = []
        self.expected: list[weakref.ref[Delivery]] = []
        self.error = error

    def unpack(
        self,
        values: Values,
        allow_cpu: bool,
        worker: str,
        remotes: tuple[int, ...],
        pickled: tuple[str, ...] = (),
    ) -> dict[str, object]:
        self.unpacked += 1
        if self.error is not None:
            raise self.error
        return {"output_1": "an image", REPORT: {"9": {"images": []}}}

    def give_back(
        self, handles: tuple[BlockHandle, ...], worker: str = "", remotes: tuple[int, ...] = ()
    ) -> None:
        self.given_back.extend(handles)
        self.remotes_back.extend(remotes)

    def expect(self, delivery: Delivery) -> None:
        self.expected.append(weakref.ref(delivery))


class Rig:
    """A job, and the loop's end of it."""

    def __init__(self, history: int = 100) -> None:
        self.cancelled: list[str] = []
        self.ended = 0
        self.feed = JobFeed("j-1", history=history, on_end=self._on_end)
        self.job = Job(self.feed, self.cancelled.append)
        self.memory = FakeMemory()

    def _on_end(self) -> None:
        assert self.job.done()
        self.ended += 1

    def emit(self, make: Callable[[str, int, float], Event] = JobQueued, now: float = 1.0) -> None:
        self.feed.emit(make, now=now)

    def progress(self, count: int) -> None:
        for step in range(count):
            self.emit(lambda j, seq, at, step=step: ProgressEvent(j, seq, at, None, step, count))  # type: ignore[misc]

    def delivery(self) -> Delivery:
        return Delivery(
            VALUES,
            lambda took_s: replace(STATS, result_decode_s=took_s),
            self.memory,
            worker="w1",
            allow_cpu=False,
        )

    def finish(self) -> None:
        self.feed.resolve("done", None, self.delivery(), 9.0)

    def fail(self, error: JobFailed | None = None) -> None:
        self.feed.resolve("failed", error or JobFailed("a node raised", node_id="5"), None, 9.0)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start a call in a thread; its value or its exception lies in the list once the thread has ended."""
    box: list[Any] = []

    def run() -> None:
        try:
            box.append(call())
        except Exception as error:
            box.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, box


def _threads_in(function: str) -> int:
    return sum(frame.f_code.co_name == function for frame in sys._current_frames().values())


def blocked(rig: Rig, readers: int = 1) -> None:
    """Return once so many threads wait for news of the job."""
    deadline = threading.Event()
    timer = threading.Timer(10, deadline.set)
    timer.start()
    try:
        while not deadline.is_set():
            changed: Any = rig.feed._changed
            with changed:
                for_news = len(changed._waiters)
            if for_news + _threads_in("_end_comes") >= readers:
                return
        raise AssertionError("nobody waits")
    finally:
        timer.cancel()
        timer.join()


# --- results ------------------------------------------------------------------------------------------


def test_a_result_is_a_mapping_with_its_figures(rig: Rig) -> None:
    rig.finish()
    result = rig.job.result()
    assert dict(result) == {"output_1": "an image"}
    assert result.ui == {"9": {"images": []}}
    assert result.engine == result.stats.engine == "graph"
    assert result.stats.result_decode_s >= 0
    assert rig.job.exception() is None
    assert repr(result) == "Result(output_1; engine=graph)"


def test_an_output_that_is_not_there_is_named_beside_those_that_are() -> None:
    result = Result({"output_1": 1, "mask": 2}, {}, STATS)
    with pytest.raises(KeyError, match="no output 'output_2'; the job delivered output_1, mask"):
        result["output_2"]
    assert result.get("output_2") is None
    assert "mask" in result
    with pytest.raises(TypeError):
        result["x"] = 1  # type: ignore[index]


def test_copies_are_summed_over_what_crossed() -> None:
    crossed = tuple(Transfer("to_worker", str(n), 1, 10, 0, 10, n, 0) for n in (1, 2))
    assert replace(STATS, transfers=crossed).copies == 3


def test_a_result_is_decoded_once_for_all_who_ask(rig: Rig) -> None:
    threads = [in_thread(lambda: rig.job.result(timeout=10)) for _ in range(8)]
    rig.finish()
    for thread, _ in threads:
        thread.join(10)
    results = [box[0] for _, box in threads]
    assert rig.memory.unpacked == 1
    assert all(result is results[0] for result in results)
    assert rig.memory.given_back == [], "the decoder's views hold the leases now"


def test_waiting_ends_with_the_job(rig: Rig) -> None:
    thread, box = in_thread(rig.job.result)
    blocked(rig)
    rig.emit()
    blocked(rig)
    rig.finish()
    thread.join(10)
    assert box[0]["output_1"] == "an image"


@pytest.mark.parametrize("ask", ["result", "exception"])
def test_a_timeout_leaves_the_job_alone(rig: Rig, ask: str) -> None:
    with pytest.raises(TimeoutError, match=r"job j-1 is queued after 0.01 s; it goes on"):
        getattr(rig.job, ask)(timeout=0.01)
    with pytest.raises(TimeoutError):
        getattr(rig.job, ask)(timeout=0)
    rig.finish()
    assert rig.job.result(timeout=0)["output_1"] == "an image"


def test_a_failed_job_raises_its_error_at_each_ask(rig: Rig) -> None:
    error = JobFailed("a node raised", node_id="5", traceback="Traceback ...")
    error.__cause__ = ValueError("why")
    rig.fail(error)
    for _ in range(2):
        with pytest.raises(JobFailed, match="a node raised") as caught:
            rig.job.result()
        assert caught.value.node_id == "5"
        assert caught.value.traceback == "Traceback ..."
        assert caught.value.job_id == "j-1", "filled in"
        assert caught.value.__cause__ is error.__cause__
    assert rig.job.exception() is error
    assert rig.job.state == "failed"


def test_raising_a_jobs_error_keeps_nothing_of_its_callers_alive(rig: Rig) -> None:
    class Tensor:
        pass

    def caller() -> weakref.ref[Tensor]:
        tensor = Tensor()
        with pytest.raises(JobFailed):
            rig.job.result()
        return weakref.ref(tensor)

    rig.fail()
    gc.collect()
    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()


def test_a_result_that_cannot_be_decoded_says_so_each_time(rig: Rig) -> None:
    rig.memory.error = UnsupportedValue("output_1: no cuda:1 here", path="output_1")
    rig.finish()
    for _ in range(2):
        with pytest.raises(UnsupportedValue, match="no cuda:1 here") as caught:
            rig.job.result()
        assert caught.value.path == "output_1"
    assert rig.memory.unpacked == 1


# --- a delivery and its leases ------------------------------------------------------------------------


def test_a_job_dropped_undecoded_gives_its_leases_back() -> None:
    rig = Rig()
    memory = rig.memory
    rig.finish()
    assert memory.given_back == []
    del rig
    gc.collect()
    assert memory.given_back == [A, B]
    assert memory.unpacked == 0


def test_a_delivery_that_was_decoded_gives_nothing_back(rig: Rig) -> None:
    delivery = rig.delivery()
    assert delivery.decode() is delivery.decode()
    assert rig.memory.unpacked == 1
    del delivery
    gc.collect()
    assert rig.memory.given_back == []


def test_a_delivery_can_be_settled_before_anyone_asks(rig: Rig) -> None:
    rig.finish()
    delivery = rig.memory.expected[0]()
    assert delivery is not None, "the memory hears of each"
    delivery.settle()
    rig.memory.error = ProtocolError("the memory is closed")
    assert rig.job.result()["output_1"] == "an image"
    assert rig.memory.unpacked == 1


def test_a_delivery_that_could_not_be_decoded_leaves_giving_back_to_the_decoder(rig: Rig) -> None:
    rig.memory.error = ProtocolError("garbage")
    delivery = rig.delivery()
    for _ in range(2):
        with pytest.raises(ProtocolError, match="garbage"):
            delivery.decode()
    assert rig.memory.unpacked == 1
    del delivery
    gc.collect()
    assert rig.memory.given_back == []


# --- cancelling ---------------------------------------------------------------------------------------


def test_cancel_asks_once_per_call_and_never_after_the_end(rig: Rig) -> None:
    assert rig.job.cancel() is True
    assert rig.cancelled == ["j-1"]
    rig.feed.resolve("cancelled", JobCancelled("job j-1 was cancelled"), None, 2.0)
    assert rig.job.cancel() is False
    assert rig.cancelled == ["j-1"]
    with pytest.raises(JobCancelled):
        rig.job.result()


def test_the_state_follows_the_loop(rig: Rig) -> None:
    states = [rig.job.state]
    for running in (True, False, True):
        rig.feed.set_running(running)
        states.append(rig.job.state)
    assert not rig.job.done()
    rig.finish()
    rig.feed.set_running(True)
    assert [*states, rig.job.state] == ["queued", "running", "queued", "running", "done"]
    assert repr(rig.job) == "<Job j-1 done>"


def test_a_job_that_begins_runs_and_tells_so_in_one_step_and_never_after_its_end(rig: Rig) -> None:
    def started(worker: str, job: str, seq: int, at: float) -> JobStarted:
        return JobStarted(job, seq, at, worker, "graph", 1)

    rig.feed.begin(started, ("w1",), 2.0)
    assert rig.job.state == "running"
    rig.feed.emit_rows(lambda step, j, seq, at: ProgressEvent(j, seq, at, None, step, 2), [(1,), (2,)], 3.0)
    rig.finish()
    rig.feed.begin(started, ("w2",), 10.0)
    rig.feed.emit_rows(lambda step, j, seq, at: ProgressEvent(j, seq, at, None, step, 2), [(3,)], 10.0)
    assert rig.job.state == "done"
    assert [(event.kind, event.seq, event.time_s) for event in rig.job.events()] == [
        ("started", 0, 2.0),
        ("progress", 1, 3.0),
        ("progress", 2, 3.0),
        ("done", 3, 9.0),
    ]


def test_the_first_event_may_be_there_from_the_start() -> None:
    feed = JobFeed("j-1", history=5, on_end=lambda: None, first=(JobQueued, (), 0.5))
    (event,), position = feed.events_from(0)
    assert (event.kind, event.seq, event.time_s, position) == ("queued", 0, 0.5, 1)


def test_a_job_is_resolved_once(rig: Rig) -> None:
    rig.finish()
    with pytest.raises(AssertionError, match="twice"):
        rig.fail()
    assert rig.job.state == "done"
    assert rig.ended == 1
    assert [event.kind for event in rig.job.events()] == ["done"]


# --- events -------------------------------------------------------------------------------------------


def test_events_are_numbered_and_end_with_one_terminal_one(rig: Rig) -> None:
    rig.emit(JobQueued)
    rig.emit(lambda j, seq, at: JobStarted(j, seq, at, "w1", "graph", 1))
    rig.progress(2)
    rig.finish()
    rig.emit(JobQueued)
    assert rig.feed._history.end == 5, "nothing comes after the end"
    events = list(rig.job.events())
    assert [event.kind for event in events] == ["queued", "started", "progress", "progress", "done"]
    assert [event.seq for event in events] == [0, 1, 2, 3, 4]
    assert [event.terminal for event in events] == [False] * 4 + [True]
    assert {event.job_id for event in events} == {"j-1"}
    assert [event.time_s for event in events] == [1.0] * 4 + [9.0]


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("failed", JobFailed("x")),
        ("cancelled", JobCancelled("x")),
        ("lost", WorkerLost("x")),
    ],
)
def test_the_terminal_event_carries_the_error(rig: Rig, state: Any, error: Any) -> None:
    rig.feed.resolve(state, error, None, 3.0)
    (event,) = rig.job.events()
    assert isinstance(event, JobEnded)
    assert (event.kind, event.state, event.error) == (state, state, error)


def test_a_late_reader_sees_what_an_early_one_saw(rig: Rig) -> None:
    thread, early = in_thread(lambda: list(rig.job.events()))
    blocked(rig)
    rig.progress(5)
    rig.finish()
    thread.join(10)
    assert early[0] == list(rig.job.events()) == list(rig.job.events())
    assert len(early[0]) == 6


def test_asking_for_news_after_the_terminal_event_gives_none_at_once(rig: Rig) -> None:
    rig.emit()
    rig.finish()
    events, position = rig.job.events_since(0)
    assert events[-1].terminal
    thread, box = in_thread(lambda: rig.job.events_since(position))
    thread.join(5)
    assert box == [([], position)]


@pytest.mark.parametrize("timeout", [1e300, float("inf")])
def test_one_can_wait_for_news_longer_than_any_clock_goes(rig: Rig, timeout: float) -> None:
    rig.emit()
    position = rig.job.events_since(0)[1]
    thread, box = in_thread(lambda: rig.job.events_since(position, timeout))
    blocked(rig)
    rig.progress(1)
    thread.join(10)
    assert [event.kind for event in box[0][0]] == ["progress"]


def test_a_position_before_the_first_event_is_the_beginning(rig: Rig) -> None:
    rig.emit()
    assert [event.kind for event in rig.job.events_since(-3)[0]] == ["queued"]


def test_an_iterator_starts_over_each_time_it_is_iterated(rig: Rig) -> None:
    rig.progress(3)
    rig.finish()
    events = rig.job.events()
    assert list(events) == list(events)


def test_many_readers_in_threads_and_event_loops_see_the_same(rig: Rig) -> None:
    async def read() -> list[Event]:
        return [event async for event in rig.job]

    async def read_several() -> list[list[Event]]:
        return list(await asyncio.gather(*(read() for _ in range(5))))

    readers = [in_thread(lambda: list(rig.job.events())) for _ in range(5)]
    loops = [in_thread(lambda: asyncio.run(read_several())) for _ in range(3)]
    blocked(rig, 5)
    rig.progress(50)
    rig.finish()
    for thread, _ in (*readers, *loops):
        thread.join(10)
    seen = [box[0] for _, box in readers] + [events for _, box in loops for events in box[0]]
    assert len(seen) == 20
    assert all(events == seen[0] for events in seen)
    assert [event.seq for event in seen[0]] == list(range(51))


def test_a_reader_that_was_too_slow_learns_how_much_it_missed() -> None:
    rig = Rig(history=10)
    rig.progress(25)
    rig.finish()
    dropped, *rest = rig.job.events()
    assert isinstance(dropped, EventsDropped)
    assert (dropped.seq, dropped.count) == (0, 16)
    assert [event.seq for event in rest] == list(range(16, 26))
    assert rest[-1].terminal


def test_a_reader_that_falls_behind_in_the_middle_learns_it_there() -> None:
    rig = Rig(history=10)
    reader = iter(rig.job.events())
    rig.progress(3)
    assert [next(reader).seq for _ in range(3)] == [0, 1, 2]
    rig.progress(20)
    dropped = next(reader)
    assert isinstance(dropped, EventsDropped)
    assert (dropped.seq, dropped.count) == (3, 10)
    assert next(reader).seq == 13


def test_the_history_is_bounded() -> None:
    rig = Rig(history=10)
    rig.progress(1000)
    assert len(rig.feed._history.kept) == 10


# --- asyncio ------------------------------------------------------------------------------------------


def test_a_job_can_be_awaited(rig: Rig) -> None:
    async def main() -> Result:
        asyncio.get_running_loop().call_soon(rig.finish)
        return await rig.job

    assert asyncio.run(main())["output_1"] == "an image"


def test_a_job_that_has_ended_can_be_awaited_again_and_from_another_loop(rig: Rig) -> None:
    async def main() -> Result:
        return await rig.job

    rig.finish()
    assert asyncio.run(main()) is asyncio.run(main())


def test_a_job_can_be_awaited_from_several_event_loops_at_once(rig: Rig) -> None:
    async def main() -> list[Result]:
        return list(await asyncio.gather(*(rig.job._result_async() for _ in range(4))))

    loops = [in_thread(lambda: asyncio.run(main())) for _ in range(3)]
    wait_for(lambda: len(rig.feed._wakers) == 12)
    rig.finish()
    for thread, _ in loops:
        thread.join(10)
    assert len({id(result) for _, box in loops for result in box[0]}) == 1


def wait_for(condition: Callable[[], bool]) -> None:
    late = threading.Event()
    timer = threading.Timer(10, late.set)
    timer.start()
    try:
        while not condition():
            assert not late.is_set(), "it did not come true"
    finally:
        timer.cancel()
        timer.join()


def test_awaiting_a_failed_job_raises(rig: Rig) -> None:
    async def main() -> None:
        await rig.job

    rig.fail()
    with pytest.raises(JobFailed):
        asyncio.run(main())


def test_waiters_that_give_up_leave_nothing_behind(rig: Rig) -> None:
    async def main() -> None:
        for _ in range(20):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(rig.job._result_async(), 0.001)

    asyncio.run(main())
    assert rig.feed._wakers == []


def test_an_event_loop_that_has_ended_does_not_disturb_the_others(rig: Rig) -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(rig.job._result_async())
    loop.call_soon(loop.stop)
    loop.run_forever()
    wakers = list(rig.feed._wakers)
    assert len(wakers) == 1
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    rig.feed._wakers.extend(wakers)
    rig.finish()
    assert rig.job.result()["output_1"] == "an image"


def test_reading_events_can_be_left_early(rig: Rig) -> None:
    async def main() -> str:
        async for event in rig.job:
            if event.kind == "progress":
                return event.kind
        return "nothing"

    rig.progress(1)
    assert asyncio.run(main()) == "progress"


# --- forked children ----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_that_the_job_is_not_its_own(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.progress(1)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for use in (
        rig.job.result,
        rig.job.exception,
        rig.job.cancel,
        lambda: next(iter(rig.job.events())),
        lambda: rig.job.__await__().send(None),
        lambda: asyncio.run(rig.job._result_async()),
    ):
        with pytest.raises(ForkedError, match="job j-1 belongs to process"):
            use()


# --- replies ------------------------------------------------------------------------------------------


def reply(kind: str, **changes: Any) -> JobFailedReply:
    fields: dict[str, Any] = {
        "job": "j-1",
        "attempt": 1,
        "kind": kind,
        "message": "what happened",
        "node_id": "5",
        "class_type": "Blur",
        "exception_type": "builtins.ValueError",
        "exception_message": "why",
        "traceback": "Traceback ...",
        "inputs_summary": "image: Tensor",
        "problems": ("one", "two"),
        "path": "",
    }
    return JobFailedReply(**{**fields, **changes})


def test_a_node_that_raised_is_told_with_all_that_is_known() -> None:
    error = error_from(reply("JobFailed"), "w1")
    assert isinstance(error, JobFailed)
    expected = {
        "job_id": "j-1",
        "node_id": "5",
        "class_type": "Blur",
        "exception_type": "builtins.ValueError",
        "exception_message": "why",
        "traceback": "Traceback ...",
        "inputs_summary": "image: Tensor",
    }
    assert vars(error) == expected
    assert str(error) == "what happened\n  with the inputs\n  image: Tensor"


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("InvalidWorkflow", InvalidWorkflow),
        ("UnsupportedValue", UnsupportedValue),
        ("ArenaFull", ArenaFull),
        ("MessageTooLarge", MessageTooLarge),
        ("ProtocolError", JobFailed),
        ("SystemExit", JobFailed),
    ],
)
def test_a_workers_error_comes_back_as_its_class(kind: str, error: type[Exception]) -> None:
    told = error_from(reply(kind, path="input_1[0]"), "w1")
    assert type(told) is error
    assert str(told).startswith("what happened")
    if isinstance(told, InvalidWorkflow):
        assert (told.node_id, told.input_name, told.problems) == ("5", "input_1[0]", ("one", "two"))
    if isinstance(told, UnsupportedValue):
        assert told.path == "input_1[0]"


def test_an_interrupted_job_is_cancelled() -> None:
    error = error_from(JobCancelledReply("j-1", 1), "w1")
    assert isinstance(error, JobCancelled)
    assert error.job_id == "j-1"
