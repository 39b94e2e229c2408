"""What other threads ask of the loop: a queue of commands, and what wakes it.

Owns both. A command that comes after the end is handed to ``too_late``, once, by whoever comes last.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable

from legion_shm.supervisor.wake import Wake

__all__ = ["Command", "Commands"]

Command = Callable[[float], None]
"""Called on the loop's thread with the time."""


class Commands:
    """``post`` and ``leave`` are for any thread, the rest for the loop's.

    ``wake_fd`` is readable when something waits.
    """

    def __init__(self, too_late: Callable[[Command], None]) -> None:
        self._too_late = too_late
        self._queue: deque[Command] = deque()
        self._wake = Wake()
        self.wake_fd = self._wake.fd
        self._open = True
        self._awake = False
        self._lock = threading.RLock()

    def post(self, command: Command) -> None:
        """Have the loop call ``command(now)`` soon, after everything posted before. Never blocks.

        Also from a signal handler or a finalizer that interrupts another call of it.
        """
        self._queue.append(command)
        if self._awake:
            return
        with self._lock:
            if self._open:
                self._awake = True
                self._wake.set()
                return
        self._drop()

    def leave(self, command: Command) -> None:
        """Have ``command(now)`` called before whatever is posted next; nobody is woken for it."""
        self._queue.append(command)

    def carry_out(self, now: Callable[[], float], *, woken: bool) -> None:
        """Call every command that waits now; what comes meanwhile has written a wake-up for the next call."""
        if woken:
            self._wake.clear()
        self._awake = False
        for _ in range(len(self._queue)):
            self._queue.popleft()(now())

    def end(self) -> None:
        """Take no more commands; those that wait come too late."""
        with self._lock:
            self._open = self._awake = False

    def close(self) -> None:
        self._drop()
        self._wake.close()

    def _drop(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._too_late(self._queue.popleft())
