"""A process that outlives the owner of a runtime directory by moments, and removes what the owner left.

Owns that process: its start, its end, and that nobody but the owner keeps it waiting. What it runs is
`sweep`. A program that is ended by SIGTERM, SIGKILL or `os._exit` runs no code of ours any more, the kernel
ends its workers with it, and a library does not take a program's signal handlers: so somebody else has to
tidy up, who is in no group of theirs.

    owner ──── pipe: the directory's name, before the directory ────▶ sweeper waits for the pipe's end
      ✝ ─────────────────────── the kernel closes it ───────────────▶ takes the lock, removes, ends

There is none on Windows, nor where this program is not run by a plain Python interpreter. There, and where
somebody has killed it too, the next `runtime_dir.sweep_stale` removes what is left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Generator
from pathlib import Path

from legion_shm.transport import sweep

__all__ = ["Sweeper"]

_log = logging.getLogger("legion_shm.transport")

_END_WAIT_S = 5.0  # after SIGKILL


class Sweeper:
    """Started at once, for a directory that is not made yet.

    Never raises: without it, what is left stays until the next start.
    """

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self._process: subprocess.Popen[bytes] | None = None
        _sweepers.add(self)
        interpreter = _interpreter()
        if not interpreter:
            return
        try:
            reader, self._fd = os.pipe()
        except OSError as error:
            _log.debug("no sweeper: %s", error)
            return
        self.expect(path.name)
        try:
            with _signals_held_back():
                self._process = subprocess.Popen(
                    [interpreter, "-S", _flag(), sweep.__file__, os.path.abspath(path.parent)],
                    stdin=reader,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=os.sep,
                    env=_environment(),
                    start_new_session=True,
                )
        except (OSError, subprocess.SubprocessError) as error:
            _log.debug("no sweeper: %s", error)
            self._close_pipe()
        finally:
            os.close(reader)

    @property
    def pid(self) -> int | None:
        """None where there is none."""
        return None if self._process is None else self._process.pid

    def watches(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def expect(self, name: str) -> None:
        """Another name, before a directory beside the first is made."""
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                os.write(self._fd, f"{name}\n".encode("ascii"))

    def close(self) -> None:
        """There is nothing left to remove. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                process.kill()  # it may only just be starting
                process.wait(_END_WAIT_S)
        self._close_pipe()

    def forget(self) -> None:
        """In a forked child: it is not ours, and must not wait for us."""
        if self._process is not None:
            self._process.returncode = 0  # nobody is to warn of it
            self._process = None
        self._close_pipe()

    def _close_pipe(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_sweepers: weakref.WeakSet[Sweeper] = weakref.WeakSet()


def _forget_all() -> None:
    for sweeper in list(_sweepers):
        sweeper.forget()
    _sweepers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _interpreter() -> str:
    """What runs a Python file; empty where this program is something else, which must not be run again."""
    name = os.path.basename(sys.executable or "").lower()
    if sys.platform == "win32" or getattr(sys, "frozen", False) or not name.startswith(("python", "pypy")):
        return ""
    return sys.executable


def _flag() -> str:
    """Isolated: no folder of modules but the interpreter's own; which a variable may have to tell it."""
    return "-s" if "PYTHONHOME" in os.environ else "-I"


def _environment() -> dict[str, str]:
    """Enough for the interpreter to find its libraries, and nothing that makes it load others."""
    ours = {name: os.environ.get(name) for name in list(os.environ)}
    return {
        name: value
        for name, value in ours.items()
        if value is not None
        and name != "LD_PRELOAD"
        and (not name.startswith("PYTHON") or name in ("PYTHONHOME", "PYTHONPLATLIBDIR"))
    }


@contextlib.contextmanager
def _signals_held_back() -> Generator[None, None, None]:
    """What this thread starts meanwhile is not ended by what asks a whole service to end."""
    numbers = {getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)}
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
