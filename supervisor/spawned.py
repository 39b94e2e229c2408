"""A started worker process as the supervisor holds it: the one interface of the launchers.

Owns the interface alone. `spawn` implements it for POSIX systems, `spawn_windows` for Windows; what they
promise is the same, and nobody else looks at which of them it is.

    loop ◀── exit_fd, stdout, stderr: descriptors that a poller can wait for
    loop ──▶ signal_group, close: to the process and whatever it started
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod

__all__ = ["SIGKILL", "SIGTERM", "SpawnedWorker"]

SIGTERM, SIGKILL = 15, 9
"""The rungs of the stop ladder, by their numbers on every system that has signals."""


class SpawnedWorker(ABC):
    """The parent's side of a worker process. A worker ends with its supervisor, however that ends.

    ``exit_fd`` becomes readable when the process has ended; ``stdout`` and ``stderr`` when it has written,
    and at the end of that. Each is a number that a poller takes: a descriptor, on Windows a socket.
    ``descriptors`` is where memfd segments are handed over, None where there are none.
    """

    pid: int
    exit_fd: int
    stdout: int
    stderr: int
    begun: int
    descriptors: socket.socket | None

    def has_output(self) -> bool:
        """Whether ``stdout`` or ``stderr`` may be worth a `read`. False is sure, and comes quicker."""
        return True

    def read(self, fd: int, nbytes: int) -> bytes:
        """From ``stdout``, ``stderr`` or ``begun``: up to so many bytes, b"" at the end of it.

        Raises BlockingIOError while nothing has come.
        """
        return os.read(fd, nbytes)

    @abstractmethod
    def exit_code(self) -> int | None:
        """Negative for a signal, and for a crash that Windows reports.

        None while it runs, and where nobody can tell.
        """

    def ended(self) -> bool:
        return self.exit_code() is not None

    @abstractmethod
    def signal_group(self, number: int) -> None:
        """Signal the worker and whatever it started and left in its group; gone ones are ignored.

        ``number``: `SIGTERM` or `SIGKILL`. Where there are no signals both end it at once.
        """

    @abstractmethod
    def join(self, timeout_s: float) -> None:
        """Wait for the process's end, so long at most."""

    @abstractmethod
    def close(self) -> None:
        """Free everything of the parent's side; the process must have ended. Kills what it left behind."""
