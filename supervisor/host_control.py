"""A worker's second thread: what goes on while a node runs.

Owns the control socket: heartbeats, cancellation, ended leases, and the log records and events of threads
other than the main one. A node that holds the interpreter's lock silences it; the heartbeat time-out is for
that.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from legion_shm.clock import monotonic_s
from legion_shm.errors import InvalidHandle, MessageTooLarge
from legion_shm.supervisor.engine import Engine
from legion_shm.supervisor.host_reports import REPORT_INTERVAL_S
from legion_shm.supervisor.spawn import HostConfig
from legion_shm.supervisor.wake import Wake
from legion_shm.supervisor.worker_memory import WorkerMemory
from legion_shm.transport.channel import ClientChannel
from legion_shm.transport.frames import decode_message, encode_message
from legion_shm.transport.messages import Cancel, Heartbeat, Hello, LogRecord, Message, Released, in_batches

__all__ = ["ControlThread"]

_ACTIVE_S = 1.0  # for so long after a job it keeps its quick pace
_GREETING_WAIT_S = 20.0  # from when the engine is up; who has not greeted then is too late for its heartbeats
_IDLE_WAIT_S = 0.25  # its own pace while nothing is viewed and nothing runs


class ControlThread(threading.Thread):
    """Its socket is its own; other threads reach it through bounded queues."""

    def __init__(self, config: HostConfig, memory: WorkerMemory, flush_slow_node: Callable[[], None]) -> None:
        super().__init__(name="legion-control", daemon=True)
        self._config, self._memory, self._flush_slow_node = config, memory, flush_slow_node
        self._wake = Wake()
        self._slow = False
        self._active_until_s = 0.0
        self._posted: deque[Message] = deque(maxlen=10_000)
        self._logs: deque[LogRecord] = deque(maxlen=20_000)  # LogHandler lets through fewer at once
        self._stop_wanted = threading.Event()
        self._greeted = threading.Event()
        self._failure: BaseException | None = None
        self.engine: Engine | None = None
        self.busy_job = ""
        self.beats = 0

    def begin(self, job: str) -> None:
        """From the main thread, at a job's begin: what its nodes report must not wait for a slow beat."""
        self.busy_job = job
        if self._slow:
            self._slow = False
            self._wake.set()

    def end(self) -> None:
        self.busy_job = ""
        self._active_until_s = monotonic_s() + _ACTIVE_S

    def post(self, message: Message) -> None:
        self._posted.append(message)

    def log(self, record: LogRecord) -> None:
        self._logs.append(record)

    def flush_logs(self, send: Any) -> None:
        """Send the log records now, from the calling thread, with its own ``send``."""
        while self._logs:
            with contextlib.suppress(IndexError):
                send(self._logs.popleft())

    def failure(self) -> BaseException | None:
        """What kept it from greeting the supervisor, if anything did; waits until that is known."""
        self._greeted.wait(_GREETING_WAIT_S)
        return self._failure

    def stop(self) -> None:
        self._stop_wanted.set()
        if self.is_alive():
            self.join(timeout=1.0)

    def run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._greeted.set()

    def _serve(self) -> None:
        import psutil  # beside the engine's own imports

        config = self._config
        channel = ClientChannel(config.endpoint, config.control_identity, max_bytes=config.max_message_bytes)

        def send(message: Message) -> None:
            channel.send(encode_message(message, max_bytes=config.max_message_bytes))

        channel.watch(self._wake.fd)
        process, rss = psutil.Process(), 0
        try:
            send(Hello(config.worker, config.token, "control", os.getpid()))
            self._greeted.set()
            next_beat_s = monotonic_s()
            while not self._stop_wanted.is_set():
                now = monotonic_s()
                if now >= next_beat_s:
                    self.beats += 1
                    next_beat_s = now + config.heartbeat_interval_s
                    with contextlib.suppress(OSError, psutil.Error):  # a node has used up the descriptors
                        rss = process.memory_info().rss
                    send(Heartbeat(self.beats, rss, self._memory.arena_bytes(), self.busy_job))
                frame = channel.receive(min(next_beat_s - now, self._pace_s(now)))
                self._wake.clear()
                if self.busy_job:
                    self._flush_slow_node()
                if frame is not None:
                    self._take(decode_message(frame, max_bytes=config.max_message_bytes))
                released = self._memory.drain_released()
                if released:
                    for some in in_batches(released):
                        send(Released(some))
                self._flush(send)
            self._flush(send)
        finally:
            channel.close()

    def _pace_s(self, now: float) -> float:
        """Quick while jobs come, so that `begin` need not wake this thread for each of them."""
        if not (self.busy_job or self._posted or now < self._active_until_s):
            self._slow = True
            if not self.busy_job:  # looked at again, for it may have begun just before it could see that
                return self._config.lease_flush_s if self._memory.live_views() else _IDLE_WAIT_S
        self._slow = False
        return REPORT_INTERVAL_S

    def _flush(self, send: Any) -> None:
        while self._posted:
            with contextlib.suppress(MessageTooLarge):  # its thread has gone on, and nobody else is to blame
                send(self._posted.popleft())
        self.flush_logs(send)

    def _take(self, message: Message) -> None:
        if isinstance(message, Cancel):
            if self.engine is not None:
                self.engine.interrupt(message.job)
            return
        raise InvalidHandle(f"{type(message).__name__} does not belong on the control socket")
