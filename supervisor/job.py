"""A submitted job as its caller holds it: a future with events.

Owns nothing but the caller's view; the news come through the `JobFeed`, and cancelling goes to the loop.

    loop thread ── emit, resolve ──▶ JobFeed ◀── Job: result, events, await ── any number of threads
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from legion_shm.errors import LegionError
from legion_shm.events import Event
from legion_shm.supervisor.feed import JobFeed
from legion_shm.supervisor.result import Result

__all__ = ["Job", "JobEvents"]


class Job:
    """One accepted job. Made by ``Supervisor.submit``; every method is safe from any thread.

    ``await job`` gives the result; ``async for event in job`` and ``for event in job.events()`` give its
    events, from the first one kept, for any number of readers. Cancelling a task that waits for it leaves the
    job running.
    """

    def __init__(self, feed: JobFeed, cancel: Callable[[str], None]) -> None:
        self._feed = feed
        self._cancel = cancel

    @property
    def id(self) -> str:
        return self._feed.job_id

    @property
    def state(self) -> str:
        """``queued``, ``running``, or how it ended: ``done``, ``failed``, ``cancelled``, ``lost``."""
        return self._feed.state

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._feed.done()

    def cancel(self) -> bool:
        """End the job, however far it is; False when it had ended already. Returns at once.

        A job that runs is interrupted between nodes, or where its node looks for it; if it goes on for
        ``cancel_grace_s`` its worker is ended.
        """
        self._feed.check_process()
        if self.done():
            return False
        self._cancel(self.id)
        return True

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end and return the outputs, or raise the job's error.

        Raises TimeoutError after ``timeout`` seconds; the job goes on.
        """
        self._feed.wait(timeout)
        return self._feed.result()

    def exception(self, timeout: float | None = None) -> LegionError | None:
        """Wait for the end and return the job's error, None when it is done. TimeoutError as `result`."""
        return self._feed.wait(timeout)

    def events(self) -> JobEvents:
        """An iterator (sync or async) over the events, ending with the terminal one."""
        return JobEvents(self._feed)

    def events_since(self, position: int, timeout: float | None = None) -> tuple[list[Event], int]:
        """Wait for news: the events from ``position`` on, and the position to ask for next. Begin with 0.

        Gives no events after ``timeout`` seconds without news, and at once after the terminal one; for those
        who have more than one thing to wait for.
        """
        return self._feed.events_from(position, timeout)

    def __await__(self) -> Generator[Any, None, Result]:
        return self._result_async().__await__()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self.events().__aiter__()

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.state}>"

    async def _result_async(self) -> Result:
        await self._feed.wait_async()
        return self._feed.result()


class JobEvents:
    """The events of one job: iterate it in a thread, or with ``async for`` in an event loop."""

    def __init__(self, feed: JobFeed) -> None:
        self._feed = feed

    def __iter__(self) -> Iterator[Event]:
        position = 0
        while True:
            events, position = self._feed.events_from(position)
            for event in events:
                yield event
                if event.terminal:
                    return

    async def __aiter__(self) -> AsyncIterator[Event]:
        position = 0
        while True:
            events, position = await self._feed.events_from_async(position)
            for event in events:
                yield event
                if event.terminal:
                    return
