"""Which of the kernel's own facilities processes are watched with here, and what stands in for them.

Owns the answers, and the waiter that tells of a process's end where no descriptor does. Linux has a pidfd
and can signal a process group when a pipe ends; macOS has neither. `PLAIN` leaves them out on Linux too:
how the other way is tested there.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable

__all__ = ["PLAIN", "exit_descriptor", "has_pidfd", "kernel_signals_end", "launcher_in_words"]

PLAIN = "LEGION_SHM_PLAIN_POSIX"
"""Environment variable: ``1`` makes the supervisor and its workers do without Linux's own facilities."""


def _plain() -> bool:
    return os.environ.get(PLAIN) == "1"


def has_pidfd() -> bool:
    """Whether a process's end can be waited for as a descriptor."""
    return hasattr(os, "pidfd_open") and not _plain()


def kernel_signals_end() -> bool:
    """Whether the kernel itself ends a worker's group when the death pipe's writer is gone."""
    return sys.platform.startswith("linux") and not _plain()


def exit_descriptor(pid: int, wait: Callable[[], object]) -> int:
    """A descriptor that becomes readable when our child ``pid`` has ended.

    Without a pidfd a thread waits and then closes a pipe; ``wait()`` blocks until the end, and may reap
    the process. A descriptor that the child inherited would not do: its own children would hold it too.
    """
    if has_pidfd():
        return os.pidfd_open(pid)
    reader, writer = os.pipe()

    def run() -> None:
        try:
            if hasattr(os, "waitid"):  # leaves the process to be reaped by whoever asks for its exit code
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            else:
                wait()
        finally:
            os.close(writer)

    try:
        threading.Thread(target=run, name=f"legion-exit-{pid}", daemon=True).start()
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    return reader


def launcher_in_words() -> tuple[str, str, str]:
    """For `legion doctor`: how workers are started, how their end is seen, and how they die with us."""
    if sys.platform == "win32":
        return (
            "CreateProcess, each in a job object of its own, without a console window",
            "a thread waits for the process",
            "the system ends the job object with the supervisor",
        )
    start = "spawn, each in a process group of its own"
    seen = "pidfd" if has_pidfd() else "a thread waits for the process (no pidfd here)"
    if kernel_signals_end():
        return start, seen, "the kernel ends the group with the supervisor (death pipe, F_SETSIG)"
    why = f"{PLAIN}=1" if _plain() else f"no F_SETSIG on {sys.platform}"
    delay = "a node that holds the interpreter's lock delays it"
    return start, seen, f"a thread in the worker reads the death pipe ({why}): {delay}"
