from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from legion_shm import InvalidWorkflow, Job, JobCancelled, Supervisor, SupervisorClosed
from tests.system.support import Gate, flow, run, spec


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    with Supervisor() as supervisor:
        run(supervisor, "TestPass")
        yield supervisor


def test_a_job_is_submitted_awaited_and_read_in_a_coroutine(legion: Supervisor) -> None:
    async def main() -> None:
        job = await legion.asubmit(flow("TestProgress", steps=3), inputs=["value"], spec=spec())
        kinds = [event.kind async for event in job]
        assert kinds[0] == "queued"
        assert kinds[-1] == "done"
        assert {"started", "node", "progress", "preview"} <= {*kinds}
        result = await job
        assert result["output_1"] == "value"
        assert (await job) is result
        assert [event.kind async for event in job.events()] == kinds, "a late reader sees the same"

    asyncio.run(main())


def test_many_jobs_at_once_in_one_event_loop(legion: Supervisor) -> None:
    async def one(number: int) -> float:
        value = torch.full((20_000,), float(number))
        job = await legion.asubmit(flow("TestAdd"), inputs=[value], spec=spec())
        events = [event async for event in job]
        assert events[-1].terminal
        return float((await job)["output_1"][0])

    async def main() -> None:
        sums = await asyncio.gather(*(one(number) for number in range(60)))
        assert sums == [float(number + 1) for number in range(60)]

    asyncio.run(main())


def test_errors_come_out_of_asubmit_and_of_await(legion: Supervisor) -> None:
    async def main() -> None:
        broken = {"1": {"class_type": "TestPass", "inputs": {"value": ["2", 0]}}}
        with pytest.raises(InvalidWorkflow):
            await legion.asubmit(broken, spec=spec())
        job = await legion.asubmit(flow("TestSleep", seconds=60.0, cooperate=True), spec=spec())
        waiters = [asyncio.ensure_future(job._result_async()) for _ in range(3)]
        waiters[0].cancel()
        await asyncio.sleep(0)
        job.cancel()
        for waiter in waiters[1:]:
            with pytest.raises(JobCancelled):
                await waiter
        with pytest.raises(asyncio.CancelledError):
            await waiters[0]

    asyncio.run(main())


def test_a_waiter_that_gives_up_leaves_the_job_alone(legion: Supervisor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def main() -> None:
        job = await legion.asubmit(gate.flow(), inputs=["value"], spec=spec())
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(job._result_async(), timeout=0.05)
        assert not job.done()
        gate.open()
        assert (await job)["output_1"] == "value"
        assert not job._feed._wakers

    asyncio.run(main())


def test_the_event_loop_runs_on_while_inputs_are_encoded(
    legion: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encode waits until the event loop has made ten turns: it could not if asubmit held it."""
    turns = threading.Semaphore(0)
    pack = legion._memory.pack

    def slow_pack(*arguments: Any, **keywords: Any) -> object:
        for _ in range(10):
            assert turns.acquire(timeout=20), "the event loop stood still"
        return pack(*arguments, **keywords)

    monkeypatch.setattr(legion._memory, "pack", slow_pack)

    async def main() -> None:
        async def tick() -> None:
            while True:
                turns.release()
                await asyncio.sleep(0)

        ticker = asyncio.ensure_future(tick())
        job = await legion.asubmit(flow("TestPass"), inputs=[1], spec=spec())
        assert (await job)["output_1"] == 1
        ticker.cancel()

    asyncio.run(main())


def test_async_with_closes_the_supervisor_while_the_event_loop_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    went_on = threading.Event()

    async def main() -> Supervisor:
        async with Supervisor() as legion:
            job = await legion.asubmit(flow("TestPass"), inputs=[7], spec=spec())
            assert (await job)["output_1"] == 7
            close = legion.close

            def waiting_close() -> None:
                assert went_on.wait(timeout=20), "the event loop was held up"
                close()

            monkeypatch.setattr(legion, "close", waiting_close)
            asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(went_on.set))
        return legion

    legion = asyncio.run(main())
    with pytest.raises(SupervisorClosed):
        legion.submit(flow("TestPass"), inputs=[7], spec=spec())


@pytest.mark.parametrize("when", ["its inputs are encoded", "it has been handed in"])
def test_a_job_whose_asubmit_was_cancelled_is_cancelled_too(
    legion: Supervisor, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    jobs: list[Job] = []
    submit, pack = legion.submit, legion._memory.pack

    def here() -> None:
        reached.set()
        assert go_on.wait(timeout=20), "the cancelled coroutine did not end"

    def waiting_pack(*arguments: Any, **keywords: Any) -> object:
        if when == "its inputs are encoded":
            here()
        return pack(*arguments, **keywords)

    def noted_submit(*arguments: Any, **keywords: Any) -> Job:
        jobs.append(submit(*arguments, **keywords))
        if when == "it has been handed in":
            here()
        return jobs[0]

    monkeypatch.setattr(legion._memory, "pack", waiting_pack)
    monkeypatch.setattr(legion, "submit", noted_submit)

    async def main() -> None:
        submitting = asyncio.ensure_future(legion.asubmit(flow("TestUntilCancelled"), spec=spec()))
        await asyncio.to_thread(reached.wait, 20)
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        go_on.set()

    asyncio.run(main())
    with pytest.raises(JobCancelled):
        jobs[0].result(timeout=20)


def test_an_event_loop_that_ended_before_its_job_harms_nobody(legion: Supervisor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def main() -> object:
        job = await legion.asubmit(gate.flow(), inputs=["value"], spec=spec())
        waiter = asyncio.ensure_future(job._result_async())
        await asyncio.sleep(0)
        waiter.cancel()
        return job

    job = asyncio.run(main())
    gate.open()
    assert job.result(timeout=20)["output_1"] == "value"  # type: ignore[attr-defined]
