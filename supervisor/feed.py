"""What the loop tells of one job, and waiting for it: the state, the bounded event history, the outcome.

Owns the one lock and condition of a job. The loop writes (`emit`, `set_running`, `resolve`); any number of
callers' threads and event loops wait and read, through the `Job` around it. An event is made when it is first
read: most jobs' events never are.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from legion_shm.clock import monotonic_s
from legion_shm.errors import ForkedError, JobError, LegionError
from legion_shm.events import TERMINAL_STATES, Event, EventsDropped, JobEnded, TerminalState
from legion_shm.supervisor.result import Delivery, Result
from legion_shm.waits import heard

__all__ = ["JobFeed", "LateEvent", "MakeEvent"]

_LOOK_S = 1.0


MakeEvent = Callable[[str, int, float], Event]
"""Gives an event from the job's id, the event's sequence number and its time."""


LateEvent = tuple[Callable[..., Event], tuple[Any, ...], float]
"""What makes an event, what it takes besides the id, the number and the time, and the time."""


class _History:
    """The last events of a job; ``first`` is the sequence number of the oldest one that is kept."""

    __slots__ = ("first", "job", "kept", "limit")

    def __init__(self, job: str, limit: int, *entries: LateEvent) -> None:
        self.job, self.limit, self.first = job, limit, 0
        self.kept: deque[Event | LateEvent] = deque(entries)

    def append(self, *entries: LateEvent) -> None:
        self.kept.extend(entries)
        while len(self.kept) > self.limit:
            self.kept.popleft()
            self.first += 1

    def since(self, position: int) -> list[Event]:
        """The events from that sequence number on, which must be kept still."""
        for index in range(position - self.first, len(self.kept)):
            entry = self.kept[index]
            if isinstance(entry, tuple):
                make, more, time_s = entry
                self.kept[index] = make(*more, self.job, self.first + index, time_s)
        return cast("list[Event]", list(self.kept)[position - self.first :])

    @property
    def end(self) -> int:
        return self.first + len(self.kept)


class JobFeed:
    """One job's news. ``on_end`` is called once, by the loop, before those who wait for the end wake."""

    def __init__(
        self, job_id: str, *, history: int, on_end: Callable[[], None], first: LateEvent | None = None
    ) -> None:
        """``history``: how many events are kept. ``first``: one that there is from the start."""
        self.job_id = job_id
        self._on_end = on_end
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._news: threading.Condition | None = None  # made by the first reader of events
        self._ended = threading.Lock()  # apart, so that news wake nobody who waits for the end alone
        self._ended.acquire()  # given up at the end; whoever gets it then passes it on
        self._readers = 0
        self._history = _History(job_id, history) if first is None else _History(job_id, history, first)
        self._state: str = "queued"
        self._error: LegionError | None = None
        self._delivery: Delivery | None = None
        self._result: Result | None = None
        self._decode_error: LegionError | None = None
        self._decoding = threading.Lock()
        self._wakers: list[Callable[[], None]] = []

    @property
    def state(self) -> str:
        return self._state

    def done(self) -> bool:
        return self._state in TERMINAL_STATES

    # --- the loop's side ------------------------------------------------------------------------------

    def emit(self, *makes: MakeEvent, now: float) -> None:
        """Append an event for each ``make(job id, sequence number, time)``; nothing after the end."""
        self._emit([(make, (), now) for make in makes])

    def emit_rows(self, make: Callable[..., Event], rows: Sequence[tuple[Any, ...]], now: float) -> None:
        """As `emit`: for each row an event ``make(*row, job id, sequence number, time)``."""
        self._emit([(make, row, now) for row in rows])

    def _emit(self, entries: list[LateEvent]) -> None:
        with self._lock:
            if not self.done():
                self._history.append(*entries)
                self._wake()

    def begin(self, make: Callable[..., Event], row: tuple[Any, ...], now: float) -> None:
        """The job runs from now on; the event that tells of it, as in `emit_rows`."""
        with self._lock:
            if self._state not in TERMINAL_STATES:
                self._state = "running"
                self._history.append((make, row, now))
                self._wake()

    def set_running(self, running: bool) -> None:
        with self._lock:
            if not self.done():
                self._state = "running" if running else "queued"

    def resolve(
        self, state: TerminalState, error: LegionError | None, delivery: Delivery | None, now: float
    ) -> None:
        """End the job, once."""
        with self._lock:
            if self.done():
                raise AssertionError(f"job {self.job_id} was resolved twice")
            if isinstance(error, JobError) and error.job_id is None:
                error.job_id = self.job_id
            self._error, self._delivery = error, delivery
            self._history.append((_job_ended, (state, error), now))
            self._state = state
        self._on_end()
        self._ended.release()
        if self._readers or self._wakers:  # who comes now sees the end
            with self._lock:
                self._wake()

    def _wake(self) -> None:
        if self._readers:
            self._changed.notify_all()
        if self._wakers:
            wakers, self._wakers = self._wakers, []
            for wake in wakers:
                wake()

    # --- the callers' side ----------------------------------------------------------------------------

    def wait(self, timeout: float | None) -> LegionError | None:
        """Wait for the end: the job's error, or None. Raises TimeoutError."""
        self.check_process()
        if not self.done() and not heard(self._end_comes, timeout) and timeout is not None:
            raise TimeoutError(f"job {self.job_id} is {self._state} after {timeout:g} s; it goes on")
        return self._error

    def _end_comes(self, timeout: float | None) -> bool:
        """Whether the job ends within that time."""
        deadline_s = None if timeout is None else monotonic_s() + timeout
        while True:
            left_s = _LOOK_S if deadline_s is None else min(_LOOK_S, max(0.0, deadline_s - monotonic_s()))
            if self._ended.acquire(timeout=left_s):
                self._ended.release()
                return True
            # Ctrl-C may have ended a waiter right after it had got the lock: nobody waits for it for ever.
            if self.done() or (deadline_s is not None and monotonic_s() >= deadline_s):
                return self.done()

    @property
    def _changed(self) -> threading.Condition:
        with self._lock:
            if self._news is None:
                self._news = threading.Condition(self._lock)
            return self._news

    async def wait_async(self) -> None:
        await self._until(self.done)

    def result(self) -> Result:
        """The outputs of a job that has ended, decoded by whoever asks first; or its error, raised."""
        if self._error is not None:
            raise _fresh(self._error)
        with self._decoding:
            delivery, self._delivery = self._delivery, None
            if delivery is not None:
                try:
                    self._result = delivery.decode()
                except LegionError as error:
                    self._decode_error = error.with_traceback(None)
                except BaseException as error:
                    self._decode_error = LegionError(
                        f"job {self.job_id} is done, and its result was lost while it was decoded: {error!r}"
                    )
                    raise
            if self._decode_error is not None:
                raise _fresh(self._decode_error)
            if self._result is None:
                raise AssertionError(f"job {self.job_id} is {self._state} and has no result")
            return self._result

    def events_from(self, position: int, timeout: float | None = None) -> tuple[list[Event], int]:
        """Wait for news after a position: the events since, and the position after them.

        Gives none after ``timeout`` seconds without any, and at once where the job's last one is before it.
        """
        self.check_process()
        if timeout is not None:
            timeout = min(timeout, threading.TIMEOUT_MAX)
        with self._changed:
            news = partial(self._changed.wait_for, lambda: self._has_news(position))
            self._readers += 1
            try:
                heard(news, timeout)
            finally:
                self._readers -= 1
            return self._since(position)

    async def events_from_async(self, position: int) -> tuple[list[Event], int]:
        await self._until(lambda: self._has_news(position))
        with self._lock:
            return self._since(position)

    def check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(f"job {self.job_id} belongs to process {self._pid}, not to its forked child")

    def _has_news(self, position: int) -> bool:
        """Whether there are events from there on, or will never be any."""
        return self._history.end > position or self.done()

    def _since(self, position: int) -> tuple[list[Event], int]:
        history = self._history
        events: list[Event] = []
        position = max(position, 0)
        if position < history.first:
            missed = history.first - position
            events.append(EventsDropped(self.job_id, position, monotonic_s(), missed))
            position = history.first
        events.extend(history.since(position))
        return events, history.end

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait in an event loop: whoever changes something wakes us there."""
        self.check_process()
        loop = asyncio.get_running_loop()
        while True:
            changed: asyncio.Future[None] = loop.create_future()
            with self._lock:
                if condition():
                    return
                wake = _waker(loop, changed)
                self._wakers.append(wake)
            try:
                await changed
            finally:
                with self._lock, contextlib.suppress(ValueError):
                    self._wakers.remove(wake)  # it is there still when the waiter was cancelled


def _job_ended(
    state: TerminalState, error: LegionError | None, job: str, seq: int, time_s: float
) -> JobEnded:
    return JobEnded(job, seq, time_s, state, error)


def _fresh(error: LegionError) -> LegionError:
    """A copy to raise: its traceback must not tie the job to its callers' frames and what they hold."""
    fresh = copy.copy(error)
    fresh.__cause__ = error.__cause__
    return fresh


def _waker(loop: asyncio.AbstractEventLoop, changed: asyncio.Future[None]) -> Callable[[], None]:
    def finish() -> None:
        if not changed.done():
            changed.set_result(None)

    def wake() -> None:
        try:
            loop.call_soon_threadsafe(finish)
        except RuntimeError:
            return  # that event loop has ended, and its waiters with it

    return wake
