"""The directory of one running supervisor: where its sockets live.

Owns the directory, the lock file beside it and the removal of what dead supervisors left: at once by a
process of its own (`sweeper`), else by whoever starts next. It never follows a symlink, and never uses a
directory that another user could write to.

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
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
import weakref
from pathlib import Path

from legion_shm import faults
from legion_shm.errors import ConfigError
from legion_shm.transport.sweep import base_trouble, is_same_file, remove_lock, sweep_one, try_lock
from legion_shm.transport.sweeper import Sweeper

__all__ = ["SOCKET_PATH_MAX_BYTES", "RuntimeDir", "base_mark", "default_base", "sweep_stale"]

SOCKET_PATH_MAX_BYTES = 100
"""`sun_path` holds 108 bytes on Linux and 104 on macOS, with the final zero; ZeroMQ adds nothing."""

_log = logging.getLogger("legion_shm.transport")

_NAME_BYTES = 8
_SOCKET_NAME_BYTES = 16
_TOKEN = re.compile(r"[a-z0-9]{1,12}")
_OPEN_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)


class RuntimeDir:
    """A fresh private directory, removed by `close`, else by its sweeper, else by the next `sweep_stale`.

    ``path`` is the directory; ``segment_prefix`` starts the names of all portable segments that belong
    to this supervisor (and to no other, given a ``token`` of its own).
    """

    def __init__(
        self, path: Path, segment_prefix: str, lock_path: Path, lock_fd: int, sweeper: Sweeper | None
    ) -> None:
        self.path = path
        self.segment_prefix = segment_prefix
        self._lock_path = lock_path
        self._lock_fd = lock_fd
        self._sweeper = sweeper
        self._base: Path | None = path.parent
        self._pid = os.getpid()
        _open_dirs.add(self)

    @classmethod
    def create(
        cls, base: Path | None = None, token: str | None = None, *, sweeper: bool = True
    ) -> RuntimeDir:
        """Make the directory and take its lock.

        ``token``: up to 12 of a-z0-9, which names the supervisor in its segments' names; by default
        `base_mark` and random letters. ``sweeper``: whether a process of its own waits for our end.
        Raises `ConfigError`, saying what to do, where the base is not safe or its path too long.
        """
        given, base = base, default_base() if base is None else base
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
        watcher = Sweeper(path) if sweeper else None
        try:
            path, lock_fd = _make(path, f"legion-{token}-", watcher)
        except BaseException:
            if watcher is not None:
                watcher.close()
            raise
        made = cls(path, f"legion-{token}-", path.with_suffix(".lock"), lock_fd, watcher)
        made._base = given
        return made

    def watch(self) -> None:
        """Have another sweeper where somebody has ended it."""
        if self._sweeper is None or self._sweeper.watches() or self._lock_fd < 0:
            return
        if self._sweeper.pid is not None:
            self._sweeper.close()
            self._sweeper = Sweeper(self.path)

    def current(self) -> Path:
        """The directory's path; of another one, made now, where it or its lock file is gone.

        A folder of temporary files is cleaned, a user's runtime directory goes when he logs out. Raises as
        `create` does.
        """
        if self._lock_fd < 0 or (is_same_file(self._lock_path, self._lock_fd) and self.path.is_dir()):
            return self.path
        token = self.segment_prefix.split("-")[1]
        other = RuntimeDir.create(self._base, token, sweeper=self._sweeper is not None)
        _log.warning("the runtime directory %s was removed; from now on it is %s", self.path, other.path)
        left, lock_path, lock_fd, sweeper = self.path, self._lock_path, self._lock_fd, self._sweeper
        self.path, self._lock_path, self._lock_fd = other.path, other._lock_path, other._lock_fd
        self._sweeper, other._lock_fd = other._sweeper, -1
        _open_dirs.discard(other)
        _remove(left, lock_path, lock_fd, sweeper)
        return self.path

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
        _remove(self.path, self._lock_path, fd, self._sweeper)

    def forget_lock(self) -> None:
        """In a forked child: let go of the inherited lock file, which else would outlive the supervisor."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> RuntimeDir:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _remove(path: Path, lock_path: Path, lock_fd: int, sweeper: Sweeper | None) -> None:
    shutil.rmtree(path, ignore_errors=True)
    remove_lock(lock_path, lock_fd)
    if sweeper is not None:
        sweeper.close()


def _make(path: Path, prefix: str, sweeper: Sweeper | None) -> tuple[Path, int]:
    """The directory's path, which may have become another, and the descriptor that holds its lock."""
    # The lock comes first and goes last, so that a directory without one is never a live supervisor's.
    while True:
        lock_path = path.with_suffix(".lock")
        lock_fd = os.open(lock_path, _OPEN_FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        if try_lock(lock_fd) and is_same_file(lock_path, lock_fd):
            break
        # Another supervisor's sweep came between, and took the new file for a dead one's.
        os.close(lock_fd)
        path = path.with_name(secrets.token_hex(_NAME_BYTES))
        if sweeper is not None:
            sweeper.expect(path.name)
    try:
        os.write(lock_fd, prefix.encode("ascii"))
        if faults.hit is not None:
            faults.hit("runtime_dir.after_lock")
        path.mkdir(mode=0o700)
        path.chmod(0o700)
    except BaseException:
        remove_lock(lock_path, lock_fd)
        raise
    return path, lock_fd


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
        path = lock_path.with_suffix("")
        if sweep_one(str(path)):
            swept.append(path)
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
    trouble = base_trouble(base)
    if trouble:
        raise ConfigError(
            f"the runtime directory {base} {trouble}; remove it, or give another runtime_dir",
            key="runtime_dir",
        )


def _uid() -> int:
    return os.getuid() if sys.platform != "win32" else 0
