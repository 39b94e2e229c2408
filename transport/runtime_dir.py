"""The directory of one running supervisor: where its sockets live.

Owns the directory, the lock file beside it and the removal of what dead supervisors left. It never
follows a symlink, and never uses a directory that another user could write to.

On Windows a directory has no mode: who may enter is what the access list of its parent hands down. That of
the user's own temporary folder (the default) lets in the user, the system and administrators; of a base
that is given elsewhere nothing is checked. No socket lies there (the channel is TCP with keys of its own),
and of a dead supervisor there is only this folder to remove: its segments went with its last handle.

    <base>/              0700, ours: $XDG_RUNTIME_DIR/legion-shm or <tempdir>/legion-shm-<uid>
      <name>.lock        locked while its supervisor lives; holds the prefix of its segments' names
      <name>/            0700, unguessable; the sockets
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import weakref
from pathlib import Path

from legion_shm import faults
from legion_shm.errors import ConfigError
from legion_shm.transport.segment_portable import unlink_name

__all__ = ["SOCKET_PATH_MAX_BYTES", "RuntimeDir", "base_mark", "default_base", "sweep_stale"]

SOCKET_PATH_MAX_BYTES = 100
"""`sun_path` holds 108 bytes on Linux and 104 on macOS, with the final zero; ZeroMQ adds nothing."""

_NAME_BYTES = 8
_SOCKET_NAME_BYTES = 16
_PREFIX = re.compile(r"legion-[a-z0-9]{1,12}-")
_TOKEN = re.compile(r"[a-z0-9]{1,12}")
_SHM_DIRECTORY = "/dev/shm"
_OPEN_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)


class RuntimeDir:
    """A fresh private directory, removed by `close` or, after a crash, by the next `sweep_stale`.

    ``path`` is the directory; ``segment_prefix`` starts the names of all portable segments that belong
    to this supervisor (and to no other, given a ``token`` of its own).
    """

    def __init__(self, path: Path, segment_prefix: str, lock_path: Path, lock_fd: int) -> None:
        self.path = path
        self.segment_prefix = segment_prefix
        self._lock_path = lock_path
        self._lock_fd = lock_fd
        self._pid = os.getpid()
        _open_dirs.add(self)

    @classmethod
    def create(cls, base: Path | None = None, token: str | None = None) -> RuntimeDir:
        """Make the directory and take its lock.

        ``token``: up to 12 of a-z0-9, which names the supervisor in its segments' names; by default
        `base_mark` and random letters.
        Raises `ConfigError`, saying what to do, where the base is not safe or its path too long.
        """
        base = default_base() if base is None else base
        token = f"{base_mark(base)}{secrets.token_hex(4)}" if token is None else token
        if not _TOKEN.fullmatch(token):
            raise ConfigError(f"token {token!r}: expected up to 12 of a-z and 0-9", key="token")
        path = base / secrets.token_hex(_NAME_BYTES)
        if len(os.fsencode(path)) + 1 + _SOCKET_NAME_BYTES > SOCKET_PATH_MAX_BYTES:
            raise ConfigError(
                f"the path {path} is too long for a socket in it (limit {SOCKET_PATH_MAX_BYTES} bytes); "
                "give a shorter runtime_dir, or set XDG_RUNTIME_DIR or TMPDIR",
                key="runtime_dir",
            )
        _make_base(base)
        # The lock comes first and goes last, so that a directory without one is never a live supervisor's.
        prefix = f"legion-{token}-"
        while True:
            lock_path = path.with_suffix(".lock")
            lock_fd = os.open(lock_path, _OPEN_FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
            if _try_lock(lock_fd) and _is_same_file(lock_path, lock_fd):
                break
            # Another supervisor's sweep came between, and took the new file for a dead one's.
            os.close(lock_fd)
            path = base / secrets.token_hex(_NAME_BYTES)
        try:
            os.write(lock_fd, prefix.encode("ascii"))
            if faults.hit is not None:
                faults.hit("runtime_dir.after_lock")
            path.mkdir(mode=0o700)
            path.chmod(0o700)
        except BaseException:
            _remove_lock(lock_path, lock_fd)
            raise
        return cls(path, prefix, lock_path, lock_fd)

    def socket_path(self, name: str) -> Path:
        """The path of a socket in this directory; `ConfigError` where no socket can have it."""
        path = self.path / name
        if len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
            raise ConfigError(
                f"the path {path} is longer than {SOCKET_PATH_MAX_BYTES} bytes; give a shorter runtime_dir",
                key="runtime_dir",
            )
        return path

    def close(self) -> None:
        """Remove the directory and what is in it. Idempotent; does nothing in a forked child."""
        if self._lock_fd < 0 or os.getpid() != self._pid:
            return
        fd, self._lock_fd = self._lock_fd, -1
        _open_dirs.discard(self)
        shutil.rmtree(self.path, ignore_errors=True)
        _remove_lock(self._lock_path, fd)

    def forget_lock(self) -> None:
        """In a forked child: let go of the inherited lock file, which else would outlive the supervisor."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> RuntimeDir:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def base_mark(base: Path) -> str:
    """Four of 0-9a-f, with which the tokens of supervisors with this base begin: whose a segment is."""
    return hashlib.blake2b(os.fsencode(base.absolute()), digest_size=2).hexdigest()


_open_dirs: weakref.WeakSet[RuntimeDir] = weakref.WeakSet()


def _forget_locks() -> None:
    for runtime_dir in list(_open_dirs):
        runtime_dir.forget_lock()
    _open_dirs.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def default_base() -> Path:
    """$XDG_RUNTIME_DIR/legion-shm where that is ours and short enough, else <tempdir>/legion-shm-<uid>."""
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given and os.path.isabs(given):
        base = Path(given) / "legion-shm"
        room = SOCKET_PATH_MAX_BYTES - _SOCKET_NAME_BYTES - 2 * _NAME_BYTES - 2
        with contextlib.suppress(OSError):
            if os.stat(given).st_uid == _uid() and len(os.fsencode(base)) <= room:
                return base
    return Path(tempfile.gettempdir()) / f"legion-shm-{_uid()}"


def sweep_stale(base: Path | None = None) -> list[Path]:
    """Remove the directories of supervisors that are dead, with their portable segments.

    Returns the directories. A supervisor is dead when its lock is free, however it ended. Portable
    segments are found where the system lists their names (Linux).
    """
    base = default_base() if base is None else base
    swept: list[Path] = []
    if not base.is_dir() or base.is_symlink():
        return swept
    _check_base(base)
    for lock_path in sorted(base.glob("*.lock")):
        try:
            fd = os.open(lock_path, _OPEN_FLAGS | getattr(os, "O_NOFOLLOW", 0))
        except OSError:  # closed just now by its own supervisor, or by another sweep
            continue
        if not _try_lock(fd):
            os.close(fd)
            continue
        if _is_same_file(lock_path, fd):
            _unlink_segments(os.read(fd, 64).decode("ascii", "replace"))
            path = lock_path.with_suffix("")
            shutil.rmtree(path, ignore_errors=True)
            swept.append(path)
            _remove_lock(lock_path, fd)
        else:
            os.close(fd)
    return swept


def _make_base(base: Path) -> None:
    if not base.parent.is_dir():  # a path with a slip of the pen in it must not be made true
        raise ConfigError(
            f"the runtime directory {base} cannot be made: there is no directory {base.parent}; "
            "make that one first, or give another runtime_dir",
            key="runtime_dir",
        )
    try:
        with contextlib.suppress(FileExistsError):
            base.mkdir(mode=0o700)
            base.chmod(0o700)  # a umask may have taken bits away
    except OSError as error:
        raise ConfigError(
            f"the runtime directory {base} cannot be made: {error.strerror}; give another runtime_dir",
            key="runtime_dir",
        ) from error
    _check_base(base)


def _check_base(base: Path) -> None:
    """Refuse a base that anyone else could have made, or could change."""
    info = os.lstat(base)
    trouble = ""
    if stat.S_ISLNK(info.st_mode):
        trouble = "is a symbolic link"
    elif not stat.S_ISDIR(info.st_mode):
        trouble = "is not a directory"
    elif sys.platform != "win32" and info.st_uid != _uid():
        trouble = f"belongs to user {info.st_uid}, not to user {_uid()}"
    elif sys.platform != "win32" and stat.S_IMODE(info.st_mode) != 0o700:
        trouble = f"has mode {stat.S_IMODE(info.st_mode):04o}, not 0700"
    if trouble:
        raise ConfigError(
            f"the runtime directory {base} {trouble}; remove it, or give another runtime_dir",
            key="runtime_dir",
        )


def _unlink_segments(prefix: str) -> None:
    if not _PREFIX.fullmatch(prefix):
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(_SHM_DIRECTORY):
            if name.startswith(prefix) and os.lstat(f"{_SHM_DIRECTORY}/{name}").st_uid == _uid():
                unlink_name(name)


def _uid() -> int:
    return os.getuid() if sys.platform != "win32" else 0


def _is_same_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except OSError:
        return False


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> bool:
        try:
            os.lseek(fd, 1 << 20, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(fd, 0, os.SEEK_SET)
        return True

    def _remove_lock(path: Path, fd: int) -> None:
        os.close(fd)
        _unlink(path)

else:
    import fcntl

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _remove_lock(path: Path, fd: int) -> None:
        _unlink(path)  # while it is still locked, so that nobody takes the next file of this name for ours
        os.close(fd)
