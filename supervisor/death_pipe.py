"""The death pipe, on the worker's side: dying with the supervisor, however it died.

A pipe that never carries data. The supervisor holds the only write end; the kernel closes it when the
supervisor's process is gone.

On Linux the kernel then also sends SIGKILL to our whole process group, since the read end was told to
(``F_SETSIG``, ``F_SETOWN``, ``O_ASYNC``). No thread of ours has a part in it, so a node that holds the
interpreter's lock, or is stuck in C, does not delay it. Elsewhere (macOS) a thread waits for the pipe's
end. It has to get the interpreter's lock first: a node that holds it outlives the supervisor until it
lets go. Windows needs no pipe: there the supervisor's job object ends the worker.
"""

from __future__ import annotations

import os
import select
import signal
import threading

from legion_shm.supervisor.facilities import kernel_signals_end

__all__ = ["arm", "watch"]

_F_SETSIG = 10  # linux/fcntl.h; the fcntl module lacks it in some builds


def arm(fd: int) -> None:
    """Tie this process's group to the pipe's writer. The process must lead its group."""
    if fd < 0:  # Windows: the supervisor's job object does it
        return
    if not kernel_signals_end():
        watch(fd)
        return
    import fcntl

    fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(fd, _F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    # A writer that was gone before all this sends no signal any more.
    poll = select.poll()
    poll.register(fd, 0)
    if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
        _die()


def watch(fd: int) -> None:
    """The same by a thread, for systems whose kernels can't send the signal."""

    def wait() -> None:
        while os.read(fd, 1):
            continue
        _die()

    threading.Thread(target=wait, name="legion-death-pipe", daemon=True).start()


def _die() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)
