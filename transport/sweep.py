"""Removing what one dead owner of a runtime directory left: its folder, its lock, its named segments.

Owns the removal, and what makes it safe: nothing goes before its owner's lock is held here, no link is
followed, and a base that is not ours alone is left untouched. It imports nothing of Legion and no module
that it can do without, for it is also a program, which `sweeper` starts beside each runtime directory:

    python sweep.py BASE        names come on standard input, one a line; its end is the owner's end
"""

from __future__ import annotations

import os
import stat
import sys
import time

__all__ = ["base_trouble", "is_same_file", "remove_lock", "sweep_one", "try_lock"]

_SHM_DIRECTORY = "/dev/shm"
_OPEN_FLAGS = (
    os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0) | getattr(os, "O_NOFOLLOW", 0)
)
_LOOK_S = 0.01
_LOCK_WAIT_S = 2.0  # a process that the owner had just forked lets go of its lock first


def base_trouble(base: str | os.PathLike[str]) -> str:
    """Why this folder is not to be trusted: anyone else could have made it, or could change it. Or empty."""
    info = os.lstat(base)
    if stat.S_ISLNK(info.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(info.st_mode):
        return "is not a directory"
    if sys.platform == "win32":
        return ""
    if info.st_uid != os.getuid():
        return f"belongs to user {info.st_uid}, not to user {os.getuid()}"
    if stat.S_IMODE(info.st_mode) != 0o700:
        return f"has mode {stat.S_IMODE(info.st_mode):04o}, not 0700"
    return ""


def sweep_one(path: str, *, wait_s: float = 0.0) -> bool:
    """Remove a runtime directory whose owner is dead; whether it was there, and is gone.

    ``path``: of the directory; its lock file lies beside it. ``wait_s``: how long the lock is waited for.
    """
    lock_path = f"{path}.lock"
    try:
        fd = os.open(lock_path, _OPEN_FLAGS)
    except OSError:  # removed just now by its own owner, or by another sweep
        return False
    until_s = time.monotonic() + wait_s
    while not try_lock(fd):
        if time.monotonic() >= until_s:
            os.close(fd)
            return False
        time.sleep(_LOOK_S)
    if not is_same_file(lock_path, fd):
        os.close(fd)
        return False
    _unlink_segments(os.read(fd, 64).decode("ascii", "replace"))
    import shutil

    shutil.rmtree(path, ignore_errors=True)
    remove_lock(lock_path, fd)
    return True


def is_same_file(path: str | os.PathLike[str], fd: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except OSError:
        return False


def _unlink_segments(prefix: str) -> None:
    import re

    if sys.platform == "win32" or not re.fullmatch(r"legion-[a-z0-9]{1,12}-", prefix):
        return
    try:
        names = os.listdir(_SHM_DIRECTORY)
    except OSError:  # a system that lists no names
        return
    for name in names:
        path = f"{_SHM_DIRECTORY}/{name}"
        if name.startswith(prefix) and _is_ours(path):
            _unlink(path)


def _is_ours(path: str) -> bool:
    try:
        return sys.platform != "win32" and os.lstat(path).st_uid == os.getuid()
    except OSError:
        return False


def _unlink(path: str | os.PathLike[str]) -> None:
    try:
        os.unlink(path)
    except OSError:  # gone already
        return


if sys.platform == "win32":
    import msvcrt

    def try_lock(fd: int) -> bool:
        try:
            os.lseek(fd, 1 << 20, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(fd, 0, os.SEEK_SET)
        return True

    def remove_lock(path: str | os.PathLike[str], fd: int) -> None:
        os.close(fd)
        _unlink(path)

else:
    import fcntl

    def try_lock(fd: int) -> bool:
        """Whether the lock is held here now; it was free, so its owner has ended, however that came."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def remove_lock(path: str | os.PathLike[str], fd: int) -> None:
        _unlink(path)  # while it is still locked, so that nobody takes the next file of this name for ours
        os.close(fd)


def _main(base: str) -> None:
    names = b""
    while more := os.read(0, 4096):
        names += more
    for name in names.decode("ascii").split():
        if os.sep not in name and not base_trouble(base):
            sweep_one(os.path.join(base, name), wait_s=_LOCK_WAIT_S)


if __name__ == "__main__":
    _main(sys.argv[1])
