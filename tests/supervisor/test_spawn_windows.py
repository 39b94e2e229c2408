"""The launcher for Windows, with its calls into Windows carried out by POSIX's own.

What is shown here: the order of the calls, that nothing stays open, and what the loop sees. What Windows
does with the real calls is not.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest

from legion_shm.errors import StartupError
from legion_shm.exit_codes import ended_by
from legion_shm.supervisor import spawn_windows
from legion_shm.supervisor.spawn import HostConfig
from legion_shm.supervisor.spawn_windows import WindowsWorker, start_worker
from legion_shm.supervisor.spawned import SIGKILL, SIGTERM
from legion_shm.supervisor.win32 import PIPE_BYTES
from legion_shm.supervisor.worker_io import LineReader, begun_mark
from legion_shm.transport.channel import Endpoint
from tests import needs

pytestmark = needs.posix

JOB = 1_000_000
CHILD = """
import os, sys, time
begun = int(sys.argv[1])
payload = sys.stdin.buffer.read()
print("payload", len(payload) > 100, flush=True)
print("trouble", file=sys.stderr, flush=True)
os.write(begun, b"j-1 1\\nj-2 1\\n")
"""


class PosixRead:
    """A read that is carried out when it is looked at. ``deaf``: who waits for it hears of its end alone."""

    def __init__(self, fd: int, deaf: bool) -> None:
        self._fd, self._deaf = fd, deaf
        self._done = threading.Event()

    def wait(self) -> None:
        while not self._done.wait(0.005):
            with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
                if not self._deaf and select.select([self._fd], [], [], 0)[0]:
                    return

    def result(self) -> bytes | None:
        try:
            data = os.read(self._fd, PIPE_BYTES)
        except BlockingIOError:
            return None
        self._done.set()
        if not data:
            raise BrokenPipeError
        return data

    def give_up(self) -> None:
        self._done.set()


class PosixWin32:
    """The same calls: handles are descriptors, a job is a process group, suspended is not yet written to."""

    def __init__(self, ending: str = "sys.exit(7)", *, deaf: bool = False) -> None:
        self.calls: list[str] = []
        self.open: set[int] = set()
        self.process: subprocess.Popen[bytes] | None = None
        self.env: Mapping[str, str] = {}
        self.flags = 0
        self.status: int | None = None
        self.refuse = ""
        self._ending, self._deaf = ending, deaf
        self._lock = threading.Lock()

    def _note(self, call: str, handle: int | None = None) -> int:
        if call == self.refuse:
            raise OSError(5, f"{call} refused")
        self.calls.append(call)
        if handle is not None:
            self.open.add(handle)
            return handle
        return 0

    def create_job(self) -> int:
        return self._note("create_job", JOB)

    def assign(self, job: int, process: int) -> None:
        assert job == JOB
        self._note("assign")

    def resume(self, thread: int) -> None:
        self._note("resume")

    def terminate(self, process: int) -> None:
        self._note("terminate")
        assert self.process is not None
        self.process.kill()

    def terminate_job(self, job: int, exit_code: int) -> None:
        assert job == JOB
        self._note("terminate_job")
        assert self.process is not None
        if self.process.poll() is None:
            self.status = exit_code
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def pipe(self) -> tuple[int, int]:
        read, write = os.pipe()
        return self._note("pipe", read), self._note("pipe", write)

    def output_pipe(self) -> tuple[int, int]:
        read, write = self.pipe()
        os.set_blocking(read, False)
        return read, write

    def begin_read(self, handle: int) -> PosixRead:
        return PosixRead(handle, self._deaf)

    def inheritable(self, handle: int) -> int:
        return self._note("inheritable", os.dup(handle))

    def read(self, handle: int) -> bytes:
        return os.read(handle, 65536)

    def write(self, handle: int, data: memoryview) -> None:
        self._note("write")
        while data:
            data = data[os.write(handle, data) :]

    def create_process(
        self,
        executable: str,
        line: str,
        flags: int,
        env: Mapping[str, str],
        std: tuple[int, int, int],
        others: tuple[int, ...],
    ) -> tuple[int, int, int]:
        assert "spawn_main" in line
        assert "--multiprocessing-fork" in line
        self._note("create_process")
        self.flags, self.env = flags, env
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD + self._ending, str(others[0])],
            stdin=std[0],
            stdout=std[1],
            stderr=std[2],
            pass_fds=others,
            start_new_session=True,
        )
        pid = self.process.pid
        self.open |= {JOB + 1, JOB + 2}
        return JOB + 1, JOB + 2, pid

    def wait(self, process: int, timeout_ms: int = 0) -> bool:
        assert self.process is not None
        self.process.wait(60)
        return True

    def exit_status(self, process: int) -> int:
        assert self.process is not None
        assert self.process.returncode is not None
        return self.process.returncode if self.status is None else self.status

    def close(self, handle: int) -> None:
        with self._lock:
            self.open.remove(handle)  # KeyError: closed twice
        if handle < JOB:
            os.close(handle)


def config() -> HostConfig:
    """The launcher looks at the worker's name alone; the rest goes into the payload as it is."""
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(HostConfig))
    values.update(worker="w1", endpoint=Endpoint("tcp://127.0.0.1:1"))
    return HostConfig(**values)


def started(win32: PosixWin32, env: Mapping[str, str] | None = None) -> WindowsWorker:
    return start_worker(
        config(),
        executable=sys.executable,
        flags=(),
        own_path=(),
        env={} if env is None else env,
        working_dir="/",
        win32=win32,  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    )


@pytest.fixture
def own_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_base_executable", sys.executable, raising=False)


def readable(fd: int, within_s: float = 20.0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


def lines_of(worker: WindowsWorker, fd: int) -> list[str]:
    reader, lines = LineReader(fd, worker.read), list[str]()
    while not reader.ended:
        assert readable(fd)
        lines += reader.read()
    return lines


def threads_of_outputs() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name in ("legion-stdout-w1", "legion-stderr-w1")]


def closed(win32: PosixWin32) -> bool:
    deadline_s = time.monotonic() + 10
    while win32.open and time.monotonic() < deadline_s:
        time.sleep(0.005)  # the threads close their pipes
    return not win32.open


@pytest.mark.usefixtures("own_python")
def test_output_begun_jobs_and_the_end_are_seen() -> None:
    win32 = PosixWin32()
    worker = started(win32)
    assert worker.descriptors is None
    assert lines_of(worker, worker.stdout) == ["payload True"]
    assert lines_of(worker, worker.stderr) == ["trouble"]
    assert readable(worker.exit_fd)
    assert worker.exit_code() == 7
    begun = LineReader(worker.begun, worker.read)
    assert begun.read()[-1] == begun_mark("j-2", 1)
    assert begun.read() == [], "asking twice finds nothing new"
    worker.close()
    worker.close()
    assert closed(win32), f"left open: {win32.open}"


@pytest.mark.usefixtures("own_python")
def test_what_it_wrote_is_read_whether_or_not_the_thread_that_tells_of_it_runs() -> None:
    win32 = PosixWin32("time.sleep(60)", deaf=True)
    worker = started(win32)
    assert readable(worker.stdout), "it rings once, so that the first read is begun by who will read"
    begun, stdout, stderr = (
        LineReader(fd, worker.read) for fd in (worker.begun, worker.stdout, worker.stderr)
    )
    written = stdout.read()
    while not begun.read():  # what the child writes last
        assert worker.exit_code() is None
    assert not readable(worker.stdout, 0)
    assert written + stdout.read() == ["payload True"]
    assert stderr.read() == ["trouble"]
    assert not stdout.ended
    worker.close()
    assert closed(win32), f"left open: {win32.open}"
    deadline_s = time.monotonic() + 10
    while (left := threads_of_outputs()) and time.monotonic() < deadline_s:
        left[0].join(0.1)
    assert not left, "its reads were given up"


@pytest.mark.usefixtures("own_python")
def test_more_than_a_pipe_holds_comes_whole() -> None:
    win32 = PosixWin32("os.write(1, b'x' * 8191 + b'\\n' + (b'y' * 99 + b'\\n') * 20_000)")
    worker = started(win32)
    lines = lines_of(worker, worker.stdout)
    assert lines == ["payload True", "x" * 8191, *["y" * 99] * 20_000]
    worker.close()
    assert closed(win32)


@pytest.mark.usefixtures("own_python")
def test_one_who_never_stops_writing_keeps_the_reader_for_a_turn_alone() -> None:
    class Flooded(PosixRead):
        def result(self) -> bytes:
            return b"x\n"

    class Flood(PosixWin32):
        def begin_read(self, handle: int) -> PosixRead:
            return Flooded(handle, deaf=False)

    win32 = Flood("time.sleep(60)")
    worker = started(win32)
    assert 2 <= len(worker.read(worker.stdout, PIPE_BYTES)) <= 100
    worker.close()
    assert closed(win32)


@pytest.mark.usefixtures("own_python")
def test_it_runs_only_when_it_is_in_its_job_and_has_its_payload_after_that() -> None:
    win32 = PosixWin32()
    worker = started(win32)
    assert readable(worker.exit_fd)
    worker.close()
    assert win32.flags & 0x4, "created suspended"
    assert win32.flags & 0x200, "out of the console's Ctrl-C"
    order = [call for call in win32.calls if call not in ("pipe", "inheritable")]
    assert order[:5] == ["create_job", "create_process", "assign", "resume", "write"]
    assert closed(win32)


@pytest.mark.usefixtures("own_python")
@pytest.mark.parametrize("rung", [SIGTERM, SIGKILL])
def test_both_lower_rungs_of_the_ladder_end_the_job(rung: int) -> None:
    win32 = PosixWin32("time.sleep(60)")
    worker = started(win32)
    assert readable(worker.stdout)
    assert worker.exit_code() is None
    worker.signal_group(rung)
    assert readable(worker.exit_fd)
    assert worker.exit_code() == -rung
    assert win32.status == ended_by(rung)
    worker.close()
    worker.signal_group(rung)  # too late, and no harm
    assert closed(win32)


@pytest.mark.usefixtures("own_python")
@pytest.mark.parametrize("call", ["create_job", "pipe", "inheritable", "create_process", "assign", "resume"])
def test_where_windows_refuses_a_call_nothing_is_left(call: str) -> None:
    win32 = PosixWin32("time.sleep(60)")
    win32.refuse = call
    with pytest.raises(StartupError, match=f"w1: the process could not be started.*{call} refused"):
        started(win32)
    assert closed(win32), f"left open: {win32.open}"
    if win32.process is not None:
        assert "terminate" in win32.calls, "a process that is in no job would be left"
        win32.process.wait(10)


@pytest.mark.usefixtures("own_python")
def test_names_of_the_environment_have_no_case() -> None:
    win32 = PosixWin32()
    worker = started(win32, {"Path": "one", "SYSTEMROOT": "w", "path": "two"})
    assert readable(worker.exit_fd)
    worker.close()
    assert win32.env == {"PATH": "two", "SYSTEMROOT": "w"}
    assert closed(win32)


def test_a_virtual_environments_starter_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_base_executable", "/base/python", raising=False)
    real: Any = spawn_windows._real_executable  # pyright: ignore[reportPrivateUsage]
    assert real(sys.executable, {"A": "1"}) == (
        "/base/python",
        {"A": "1", "__PYVENV_LAUNCHER__": sys.executable},
    )
    assert real("/other/python", {}) == ("/other/python", {})
