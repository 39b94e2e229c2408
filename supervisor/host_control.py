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
from typing import Any

from legion_shm.clock import monotonic_s
from legion_shm.errors import InvalidHandle
from legion_shm.supervisor.engine import Engine
from legion_shm.supervisor.spawn import HostConfig
from legion_shm.supervisor.worker_memory import WorkerMemory
from legion_shm.transport.channel import ClientChannel
from legion_shm.transport.frames import decode_message, encode_message
from legion_shm.transport.messages import Cancel, Heartbeat, Hello, LogRecord, Message, Released, in_batches

__all__ = ["ControlThread"]

_IDLE_WAIT_S = 0.25  # its own pace while nothing is viewed and nothing runs


class ControlThread(threading.Thread):
    """Its socket is its own; other threads reach it through bounded queues."""

    def __init__(self, config: HostConfig, memory: WorkerMemory) -> None:
        super().__init__(name="legion-control", daemon=True)
        self._config, self._memory = config, memory
        self._posted: deque[Message] = deque(maxlen=10_000)
        self._logs: deque[LogRecord] = deque(maxlen=1_000)
        self._stop_wanted = threading.Event()
        self.engine: Engine | None = None
        self.busy_job = ""

    def post(self, message: Message) -> None:
        self._posted.append(message)

    def log(self, record: LogRecord) -> None:
        self._logs.append(record)

    def flush_logs(self, send: Any) -> None:
        """Send the log records now, from the calling thread, with its own ``send``."""
        while self._logs:
            with contextlib.suppress(IndexError):
                send(self._logs.popleft())

    def stop(self) -> None:
        self._stop_wanted.set()
        if self.is_alive():
            self.join(timeout=1.0)

    def run(self) -> None:
        import psutil

        config = self._config
        channel = ClientChannel(config.endpoint, config.control_identity, max_bytes=config.max_message_bytes)

        def send(message: Message) -> None:
            channel.send(encode_message(message, max_bytes=config.max_message_bytes))

        process = psutil.Process()
        try:
            send(Hello(config.worker, config.token, "control", os.getpid()))
            next_beat_s, beats = monotonic_s(), 0
            while not self._stop_wanted.is_set():
                now = monotonic_s()
                if now >= next_beat_s:
                    beats += 1
                    next_beat_s = now + config.heartbeat_interval_s
                    rss = process.memory_info().rss
                    send(Heartbeat(beats, rss, self._memory.arena_bytes(), self.busy_job))
                busy = self.busy_job or self._posted or self._memory.live_views()
                frame = channel.receive(
                    min(next_beat_s - now, config.lease_flush_s if busy else _IDLE_WAIT_S)
                )
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

    def _flush(self, send: Any) -> None:
        while self._posted:
            send(self._posted.popleft())
        self.flush_logs(send)

    def _take(self, message: Message) -> None:
        if isinstance(message, Cancel):
            if self.engine is not None:
                self.engine.interrupt(message.job)
            return
        raise InvalidHandle(f"{type(message).__name__} does not belong on the control socket")
