"""What ties a worker process to its supervisor on POSIX: pipes, the descriptor socket, the death pipe.

Owns both ends until the process has its own, and ours from then on; it starts no process, and knows nothing
of what goes through them.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from legion_shm.supervisor.spawned import SIGKILL, SpawnedWorker

__all__ = [
    "PosixWorker",
    "ProcessHandle",
    "WorkerEnds",
    "close_once",
    "forget_after_fork",
    "make_pipe",
    "remember_for_fork",
]


def make_pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    r, w = os.pipe()
    reader.callback(close_once, r)
    writer.callback(close_once, w)
    return r, w


def close_once(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


class ProcessHandle(Protocol):
    """What is asked of a worker's process, however it was started."""

    @property
    def exitcode(self) -> int | None:
        """Negative for a signal; None while it runs, and where nobody can tell."""
        ...

    def ended(self) -> bool: ...

    def join(self, timeout: float | None = None) -> None: ...

    def close(self) -> None:
        """Let go of it. ValueError while it runs."""
        ...


@dataclass
class PosixWorker(SpawnedWorker):
    """A process that leads its session and group. Closing the death pipe's write end kills the group."""

    process: ProcessHandle
    pid: int
    exit_fd: int
    stdout: int
    stderr: int
    death_fd: int
    begun: int
    descriptors: socket.socket | None

    def has_output(self) -> bool:
        return bool(self._output.poll(0))

    @cached_property
    def _output(self) -> select.poll:
        poll = select.poll()
        for fd in (self.stdout, self.stderr):
            poll.register(fd, select.POLLIN)
        return poll

    def ended(self) -> bool:
        return self.process.ended()

    def exit_code(self) -> int | None:
        return self.process.exitcode

    def signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def join(self, timeout_s: float) -> None:
        self.process.join(timeout_s)

    def close(self) -> None:
        self.signal_group(SIGKILL)
        self.process.join(timeout=1.0)
        self.let_go()
        close_once(self.exit_fd)
        with contextlib.suppress(ValueError):
            self.process.close()

    def let_go(self) -> None:
        """Close our ends of what ties a process to us; the process itself is not looked at."""
        forget_after_fork(self.death_fd)
        for fd in (self.stdout, self.stderr, self.death_fd, self.begun):
            close_once(fd)
        if self.descriptors is not None:
            self.descriptors.close()


_death_fds: set[int] = set()
_death_lock = threading.Lock()
_fork_hook = False


def remember_for_fork(fd: int) -> None:
    """A forked child of ours must not keep the write end: the workers would outlive us with it."""
    global _fork_hook
    with _death_lock:
        _death_fds.add(fd)
        if not _fork_hook:
            os.register_at_fork(after_in_child=_close_in_child)
            _fork_hook = True


def forget_after_fork(fd: int) -> None:
    with _death_lock:
        _death_fds.discard(fd)


def _close_in_child() -> None:
    for fd in _death_fds:
        close_once(fd)
    _death_fds.clear()


class WorkerEnds:
    """Both ends of what ties a worker to us. The child's are closed here once the child has its own.

    ``theirs``: the child's descriptors, in the order stdout, stderr, death pipe, begun pipe, and the
    descriptor socket where there is one. Raises OSError.
    """

    def __init__(self, *, descriptors: bool) -> None:
        self._ours = contextlib.ExitStack()
        self._childs = contextlib.ExitStack()
        try:
            self.stdout, out_w = make_pipe(self._ours, self._childs)
            self.stderr, err_w = make_pipe(self._ours, self._childs)
            death_r, self.death_fd = make_pipe(self._childs, self._ours)
            self.begun, begun_w = make_pipe(self._ours, self._childs)
            remember_for_fork(self.death_fd)
            self._ours.callback(forget_after_fork, self.death_fd)
            self.theirs: tuple[int, ...] = (out_w, err_w, death_r, begun_w)
            self.descriptors: socket.socket | None = None
            if descriptors:
                self.descriptors, theirs = _descriptor_sockets()
                self._ours.callback(self.descriptors.close)
                self._childs.callback(theirs.close)
                self.descriptors.setblocking(False)
                theirs.setblocking(False)
                self.theirs += (theirs.fileno(),)
            for fd in (self.stdout, self.stderr, self.begun, begun_w):
                os.set_blocking(fd, False)
        except BaseException:
            self.close()
            raise

    def close_childs(self) -> None:
        self._childs.close()

    def close(self) -> None:
        """Close everything: the child's too, and the death pipe, which ends a child that has its own."""
        self._childs.close()
        self._ours.close()

    def spawned(self, process: ProcessHandle, pid: int, exit_fd: int) -> PosixWorker:
        """Hand our ends over to the worker that has come of it."""
        self._childs.close()
        self._ours.pop_all()
        return PosixWorker(
            process, pid, exit_fd, self.stdout, self.stderr, self.death_fd, self.begun, self.descriptors
        )


def _descriptor_sockets() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
