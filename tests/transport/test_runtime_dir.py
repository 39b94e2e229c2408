from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from legion_shm.errors import ConfigError
from legion_shm.transport import runtime_dir, sweep
from legion_shm.transport.runtime_dir import (
    SOCKET_PATH_MAX_BYTES,
    RuntimeDir,
    base_mark,
    default_base,
    sweep_stale,
)
from legion_shm.transport.segment import create_segment
from tests import needs
from tests.system.support import wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base() -> Iterator[Path]:
    # Not tmp_path: it is too long for a socket's path.
    with tempfile.TemporaryDirectory(prefix="lrt") as folder:
        yield Path(folder) / "base"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@needs.posix
def test_a_new_directory_is_private_unguessable_and_its_own(base: Path) -> None:
    with RuntimeDir.create(base) as first, RuntimeDir.create(base) as second:
        assert first.path != second.path
        assert first.segment_prefix != second.segment_prefix
        assert first.segment_prefix.startswith(f"legion-{base_mark(base)}")
        assert mode(base) == mode(first.path) == 0o700
        assert len(first.path.name) >= 16


@needs.posix
@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_the_umask_changes_nothing(base: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        made = RuntimeDir.create(base)
    finally:
        os.umask(before)
    assert mode(base) == mode(made.path) == 0o700
    made.close()


@needs.posix
def test_closing_removes_the_directory_with_its_sockets_and_lock(base: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    made = RuntimeDir.create(base)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(made.socket_path("control")))
        made.close()
    made.close()
    assert os.listdir(base) == []
    assert len(os.listdir("/proc/self/fd")) == fds


@needs.symlinks
def test_a_symlink_is_refused(base: Path) -> None:
    target = base.parent / "target"
    target.mkdir(mode=0o700)
    base.symlink_to(target)
    with pytest.raises(ConfigError, match="is a symbolic link"):
        RuntimeDir.create(base)
    assert sweep_stale(base) == []
    assert os.listdir(target) == []


@needs.posix
def test_another_users_directory_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match=r"belongs to user \d+, not to user 12345"):
        RuntimeDir.create(base)
    with pytest.raises(ConfigError, match="belongs to"):
        sweep_stale(base)
    assert os.listdir(base) == []


@needs.posix
@pytest.mark.parametrize("bits", [0o755, 0o777, 0o750, 0o1700, 0o500])
def test_a_directory_of_another_mode_is_refused(base: Path, bits: int) -> None:
    base.mkdir()
    base.chmod(bits)
    with pytest.raises(ConfigError, match=f"has mode {bits:04o}, not 0700") as caught:
        RuntimeDir.create(base)
    assert caught.value.key == "runtime_dir"
    assert os.listdir(base) == []


def test_a_file_in_its_place_is_refused(base: Path) -> None:
    base.write_text("")
    with pytest.raises(ConfigError, match="is not a directory"):
        RuntimeDir.create(base)
    with pytest.raises(ConfigError, match="cannot be made"):
        RuntimeDir.create(base / "below")


def test_a_path_too_long_for_a_socket_is_refused_before_anything_is_made(base: Path) -> None:
    long = base / ("x" * 80)
    with pytest.raises(ConfigError, match="too long for a socket"):
        RuntimeDir.create(long)
    assert not base.exists()
    with RuntimeDir.create(base) as made:
        room = SOCKET_PATH_MAX_BYTES - len(os.fsencode(made.path)) - 1
        made.socket_path("x" * room)
        with pytest.raises(ConfigError, match="longer than"):
            made.socket_path("x" * (room + 1))
        with pytest.raises(ConfigError, match="longer than"):
            made.socket_path("é" * (room // 2 + 1))


def test_a_bad_token_is_refused(base: Path) -> None:
    for token in ("", "UPPER", "a/b", "x" * 13):
        with pytest.raises(ConfigError, match="token"):
            RuntimeDir.create(base, token)


@needs.posix
def test_the_default_base_is_the_users_runtime_directory_or_the_temporary_one(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fallback = Path(tempfile.gettempdir()) / f"legion-shm-{os.getuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base.parent))
    assert default_base() == base.parent / "legion-shm"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base.parent / "missing"))
    assert default_base() == fallback
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert default_base() == fallback
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_base() == fallback
    long = base.parent / ("x" * 70)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    assert default_base() == fallback
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base.parent))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert default_base() == fallback.with_name("legion-shm-12345")


# --- what the dead leave ------------------------------------------------------------------------------


def killed_supervisor(base: Path, token: str, *, sweeper: bool = False) -> tuple[Path, str]:
    """A process that makes a runtime directory and a portable segment, and is killed."""
    script = f"""
import os, signal
from pathlib import Path
from legion_shm.transport.runtime_dir import RuntimeDir
from legion_shm.transport.segment import create_segment
made = RuntimeDir.create(Path({str(base)!r}), {token!r}, sweeper={sweeper})
segment = create_segment("portable", 65536, name_prefix=made.segment_prefix)
made.socket_path("control").write_text("")
print(made.path, segment.descriptor, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    path, name = done.stdout.split()
    return Path(path), name


@needs.posix
def test_what_a_killed_supervisor_left_is_removed_by_its_sweeper_and_nothing_else_is(base: Path) -> None:
    with RuntimeDir.create(base) as alive:
        stale = RuntimeDir.create(base, sweeper=False)
        stale.forget_lock()  # of a third, which is dead and is nobody's but the next start's
        mine = create_segment("portable", 65536, name_prefix=alive.segment_prefix)
        path, name = killed_supervisor(base, f"t{os.getpid()}c", sweeper=True)
        wait_for(lambda: not path.with_suffix(".lock").exists(), "the sweeper is done", within_s=2.0)
        assert not path.exists()
        assert name not in os.listdir("/dev/shm")
        assert mine.descriptor in os.listdir("/dev/shm")
        assert alive.path.is_dir()
        assert stale.path.is_dir()
        mine.close()
    assert sweep_stale(base) == [stale.path]


@needs.posix
def test_a_sweeper_ends_with_its_directory(base: Path) -> None:
    made = RuntimeDir.create(base)
    assert made._sweeper is not None
    pid = made._sweeper.pid
    assert pid is not None
    made.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@needs.posix
def test_a_directory_that_cannot_be_made_has_no_sweeper_for_long(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = psutil.Process().children()
    monkeypatch.setattr(Path, "mkdir", forbidden)
    os.mkdir(base, 0o700)
    with pytest.raises(PermissionError):
        RuntimeDir.create(base)
    assert psutil.Process().children() == before
    assert os.listdir(base) == []


def forbidden(self: Path, **_: object) -> None:
    raise FileExistsError if self.exists() else PermissionError(13, "forbidden")


@needs.posix
@pytest.mark.parametrize("trouble", ["held", "link", "open", "swept"])
def test_a_sweeper_removes_nothing_where_it_cannot_be_sure(base: Path, trouble: str) -> None:
    """Its owner's lock is held by someone, the base is not what it was, another sweep was first."""
    made = RuntimeDir.create(base, sweeper=False)
    (made.path / "control").write_text("")
    told = subprocess.Popen(
        [sys.executable, "-I", sweep.__file__, str(base)], stdin=subprocess.PIPE, cwd=os.sep
    )
    assert told.stdin is not None
    told.stdin.write(f"{made.path.name}\n../{made.path.name}\n".encode())
    elsewhere = base.with_name("elsewhere")
    if trouble == "held":
        pass
    elif trouble == "link":
        base.rename(elsewhere)
        base.symlink_to(elsewhere)
    elif trouble == "open":
        base.chmod(0o777)
    else:
        made.forget_lock()
        assert sweep_stale(base) == [made.path]
        made = RuntimeDir.create(base, sweeper=False)
    if trouble in ("link", "open"):
        made.forget_lock()
    told.stdin.close()
    assert told.wait(20) == 0
    assert made.path.is_dir()
    if trouble != "swept":
        assert (made.path / "control").exists()
    base.chmod(0o700)
    if trouble == "link":
        base.unlink()
        elsewhere.rename(base)
    made.close()


@needs.posix
def test_a_sweeper_follows_no_link_out_of_its_directory(base: Path) -> None:
    outside = base.parent / "outside"
    outside.mkdir()
    (outside / "keep").write_text("")
    made = RuntimeDir.create(base, sweeper=False)
    (made.path / "link").symlink_to(outside)
    made.forget_lock()
    assert sweep.sweep_one(str(made.path))
    assert os.listdir(outside) == ["keep"]
    (base / "b").symlink_to(outside)
    (base / "b.lock").write_text("")
    sweep.sweep_one(str(base / "b"))
    assert os.listdir(outside) == ["keep"]


@needs.posix
def test_a_sweeper_removes_nothing_outside_of_its_base(base: Path) -> None:
    other = base.with_name("other")
    stale = RuntimeDir.create(other, sweeper=False)
    stale.forget_lock()
    base.mkdir(mode=0o700)
    subprocess.run(
        [sys.executable, "-I", sweep.__file__, str(base)],
        input=f"../other/{stale.path.name}\n{stale.path}\n".encode(),
        check=True,
        timeout=20,
    )
    assert stale.path.is_dir()
    assert sweep_stale(other) == [stale.path]


@needs.posix
@pytest.mark.parametrize("what", ["another program", "a frozen program", "nothing"])
def test_a_program_that_is_no_plain_python_is_not_executed_again(
    base: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    ran = base.with_name("ran")
    program = base.with_name("python" if what == "a frozen program" else "renderer")
    program.write_text(f"#!/bin/sh\n: > {ran}\n")
    program.chmod(0o700)
    before = psutil.Process().children()  # of other tests, such as multiprocessing's tracker
    monkeypatch.setattr(sys, "executable", "" if what == "nothing" else str(program))
    monkeypatch.setattr(sys, "frozen", what == "a frozen program", raising=False)
    with RuntimeDir.create(base) as made:
        assert made._sweeper is not None
        assert made._sweeper.pid is None
        made.watch()
        assert psutil.Process().children() == before
    assert os.listdir(base) == []
    assert not ran.exists()


@needs.posix
def test_where_no_process_can_be_started_there_is_no_sweeper(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    fds = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(subprocess, "Popen", refused)
    with RuntimeDir.create(base):
        pass
    assert os.listdir(base) == []
    assert len(os.listdir("/proc/self/fd")) == fds


@needs.posix
def test_what_a_killed_supervisor_left_is_swept_and_the_living_are_not(base: Path) -> None:
    token = f"t{os.getpid()}"
    path, name = killed_supervisor(base, f"{token}a")
    assert (path / "control").exists()
    assert name in os.listdir("/dev/shm")
    with RuntimeDir.create(base, f"{token}b") as alive:
        mine = create_segment("portable", 65536, name_prefix=alive.segment_prefix)
        assert sweep_stale(base) == [path]
        assert name not in os.listdir("/dev/shm")
        assert mine.descriptor in os.listdir("/dev/shm")
        assert alive.path.is_dir()
        assert sweep_stale(base) == []
        mine.close()
    assert os.listdir(base) == []


@needs.posix
def test_a_lock_file_with_strange_content_removes_no_segment(base: Path) -> None:
    base.mkdir(mode=0o700)
    bystander = create_segment("portable", 65536, name_prefix=f"legion-t{os.getpid()}-")
    name = str(bystander.descriptor)
    for number, content in enumerate(["", "l", "legion-", "../", name, "\xff" * 200]):
        (base / f"{number}.lock").write_text(content, encoding="latin-1")
    assert len(sweep_stale(base)) == 6
    assert name in os.listdir("/dev/shm")
    assert os.listdir(base) == []
    bystander.close()


@needs.symlinks
def test_a_symlink_among_the_locks_is_not_followed(base: Path) -> None:
    base.mkdir(mode=0o700)
    outside = base.parent / "outside"
    outside.mkdir()
    (outside / "keep").write_text("")
    (base / "a.lock").symlink_to(outside / "keep")
    (base / "b").symlink_to(outside)
    (base / "b.lock").write_text("")
    sweep_stale(base)
    assert os.listdir(outside) == ["keep"]


def test_no_base_is_nothing_to_sweep(base: Path) -> None:
    assert sweep_stale(base) == []


@needs.fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_neither_removes_the_directory_nor_holds_its_lock(base: Path) -> None:
    made = RuntimeDir.create(base, sweeper=False)
    up_read, up_write = os.pipe()
    down_read, down_write = os.pipe()
    child = os.fork()
    if child == 0:
        made.close()
        os.write(up_write, b".")
        os.read(down_read, 1)
        os._exit(0)
    assert os.read(up_read, 1) == b"."
    assert made.path.is_dir()
    assert sweep_stale(base) == []
    os.close(made._lock_fd)  # as the parent's death would do, while its child lives on
    assert sweep_stale(base) == [made.path]
    os.write(down_write, b".")
    assert os.waitpid(child, 0)[1] == 0
    for fd in (up_read, up_write, down_read, down_write):
        os.close(fd)
    made.forget_lock = lambda: None  # type: ignore[method-assign]
    made._lock_fd = -1


@needs.posix
def test_a_sweep_that_comes_while_a_lock_file_is_made_costs_only_another_name(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sweep.try_lock
    swept: list[Path] = []

    def lock_after_a_sweep(fd: int) -> bool:
        if not swept:
            monkeypatch.setattr(runtime_dir, "try_lock", real)
            swept.extend(sweep_stale(base))
        return real(fd)

    monkeypatch.setattr(runtime_dir, "try_lock", lock_after_a_sweep)
    with RuntimeDir.create(base) as made:
        assert len(swept) == 1
        assert made.path not in swept
        assert sweep_stale(base) == []
        assert made.path.is_dir()
        assert made._sweeper is not None
        made.forget_lock()  # with its pipe, as our end would
        made._sweeper._close_pipe()
        wait_for(lambda: os.listdir(base) == [], "its sweeper knows the other name", within_s=2.0)
        made._sweeper.close()


def test_a_base_in_a_missing_folder_is_not_made(base: Path) -> None:
    with pytest.raises(ConfigError, match="there is no directory") as caught:
        RuntimeDir.create(base.parent / "x" / "b")
    assert caught.value.key == "runtime_dir"
    assert list(base.parent.iterdir()) == []
