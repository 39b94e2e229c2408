"""Starting a worker process on Windows: the launcher beside `spawn`, with the same promises.

Owns the process, the job object that it lives in, its pipes, and the threads that tell of them by sockets,
since no poller takes a pipe there. Never used elsewhere than on Windows.

    supervisor                                   worker, in a job object of its own
    job object (only handle) ───────────────────▶ KILL_ON_JOB_CLOSE: the system ends whatever is in the job
                                                  when the supervisor's process is gone, however it went
    stdout, stderr ◀──────────────────── pipe ◀── handles 1 and 2, from its creation on
        sockets that ring ◀── thread ◀────┘
    begun lines ◀──────────── thread ◀── pipe ◀── a fourth inherited handle
    payload ──────────────────────────── pipe ──▶ handle 0; at its end once the payload is read
    exit socket ◀──────────── thread ◀─────────── the process object

The process is created suspended and runs when it is in its job, so that nothing it starts can be outside.
It has no console window and no part in the console's Ctrl-C. There are no signals: both lower rungs of
the stop ladder end the job at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing import reduction
from multiprocessing.context import set_spawning_popen
from typing import TYPE_CHECKING, Any, cast

from legion_shm.errors import StartupError
from legion_shm.exit_codes import ended_by, from_windows
from legion_shm.supervisor.spawned import SIGKILL, SpawnedWorker
from legion_shm.supervisor.win32 import PendingRead, Win32

if TYPE_CHECKING:
    from legion_shm.supervisor.spawn import HostConfig, WorkerProcess

__all__ = ["WindowsWorker", "start_worker", "with_descriptors"]

_RINGS = 4096
_READS_A_TURN = 4  # a pipe's worth may lie in the read that is under way, and another in the pipe
_BEGUN_BYTES = 4096  # of its newest lines: the last one counts
_BEGUN_WAIT_S = 1.0  # from the process's end until the end of what it wrote

_CREATE_SUSPENDED = 0x4
_CREATE_NEW_PROCESS_GROUP = 0x200
_CREATE_UNICODE_ENVIRONMENT = 0x400
_CREATE_NO_WINDOW = 0x08000000


class _Output:
    """What a worker writes into a pipe, read by the loop's own thread; a thread beside it only rings a bell.

    A read is always under way. Whoever takes its result begins the next one, so what a worker wrote before
    it sent a message is there when the message is, however late the bell.
    """

    def __init__(self, win32: Win32, handle: int, name: str) -> None:
        self.bell, self._striker = socket.socketpair()
        self.bell.setblocking(False)
        self._striker.setblocking(False)
        self._striker.send(b"\0")  # who hears it begins the first read
        self._win32, self._handle = win32, handle
        self._pending: PendingRead | None = None
        self._begun = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._ring, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _ring(self) -> None:
        while not self._ended:
            self._begun.wait()
            self._begun.clear()
            pending = self._pending
            if pending is not None:
                pending.wait()
                with contextlib.suppress(OSError):  # it rings already, or nobody hears it any more
                    self._striker.send(b"\0")
        self._striker.close()  # which is heard as well

    def take(self) -> bytes:
        """All that has been written, bounded; b"" at its end. Raises BlockingIOError while nothing has."""
        with contextlib.suppress(OSError):
            self.bell.recv(_RINGS)
        parts: list[bytes] = []
        while not self._ended:
            try:
                if self._pending is None:
                    self._pending = self._win32.begin_read(self._handle)
                    self._begun.set()
                part = self._pending.result() if len(parts) < _READS_A_TURN else None
            except OSError:
                self._end()
                break
            if part is None:
                break
            parts.append(part)
            self._pending = None
        data = b"".join(parts)
        if not data and not self._ended:
            raise BlockingIOError
        return data

    def _end(self) -> None:
        self._ended, self._pending = True, None
        self._begun.set()

    def close(self) -> None:
        if self._pending is not None:
            self._pending.give_up()
        self._end()
        self.bell.close()
        self._win32.close(self._handle)


class _Begun:
    """Reads the lines about begun jobs as they come, so that a worker never waits to write one."""

    def __init__(self, win32: Win32, handle: int, name: str) -> None:
        self._win32, self._handle = win32, handle
        self._text = b""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while data := self._win32.read(self._handle):
            with self._lock:
                self._text = (self._text + data)[-_BEGUN_BYTES:]
        self._win32.close(self._handle)

    def join(self) -> None:
        self._thread.join(_BEGUN_WAIT_S)

    def take(self) -> bytes:
        with self._lock:
            text, self._text = self._text, b""
        if not text:
            raise BlockingIOError
        return text


class WindowsWorker(SpawnedWorker):
    """A process in a job object. Made by `start`."""

    def __init__(self, win32: Win32, job: int, process: int, pid: int, pipes: _Pipes) -> None:
        self.pid = pid
        self.descriptors = None
        self._win32, self._job, self._process = win32, job, process
        self._out, self._err, self._begun = pipes.out, pipes.err, pipes.begun
        self.stdout, self.stderr = self._out.bell.fileno(), self._err.bell.fileno()
        self.begun = -1
        self._exit_r, self._exit_w = socket.socketpair()
        self.exit_fd = self._exit_r.fileno()
        self._status: int | None = None
        self._lock = threading.Lock()
        self._waiter = threading.Thread(target=self._await_end, name=f"legion-exit-{pid}", daemon=True)
        self._waiter.start()

    def _await_end(self) -> None:
        self._win32.wait(self._process)
        self._begun.join()
        self._status = from_windows(self._win32.exit_status(self._process))
        with contextlib.suppress(OSError):  # nobody waits for it any more
            self._exit_w.send(b"\0")

    def read(self, fd: int, nbytes: int) -> bytes:
        if fd == self.begun:
            return self._begun.take()
        return (self._out if fd == self.stdout else self._err).take()

    def exit_code(self) -> int | None:
        return self._status

    def signal_group(self, number: int) -> None:
        with self._lock:
            if self._job:
                with contextlib.suppress(OSError):  # it has ended
                    self._win32.terminate_job(self._job, ended_by(number))

    def join(self, timeout_s: float) -> None:
        self._waiter.join(timeout_s)

    def close(self) -> None:
        self.signal_group(SIGKILL)
        with self._lock:
            job, self._job = self._job, 0
        if not job:
            return
        self._win32.close(job)
        self.join(1.0)
        self._out.close()
        self._err.close()
        self._exit_r.close()
        self._exit_w.close()
        if not self._waiter.is_alive():
            self._win32.close(self._process)


class _Pipes:
    """The parent's ends of a worker's three pipes."""

    def __init__(self, win32: Win32, worker: str, out: int, err: int, begun: int) -> None:
        self.out = _Output(win32, out, f"legion-stdout-{worker}")
        self.err = _Output(win32, err, f"legion-stderr-{worker}")
        self.begun = _Begun(win32, begun, f"legion-begun-{worker}")

    def start(self) -> None:
        for each in (self.out, self.err, self.begun):
            each.start()


def start_worker(
    config: HostConfig,
    *,
    executable: str,
    flags: tuple[str, ...],
    own_path: tuple[str, ...],
    env: Mapping[str, str],
    working_dir: str,
    win32: Win32 | None = None,
) -> WindowsWorker:
    """Start a worker process. Raises StartupError when the process can't even be started.

    ``env`` is the child's whole environment.
    """
    from legion_shm.supervisor.spawn import WorkerProcess

    process = WorkerProcess(config, None)
    try:
        return _start(win32 or Win32(), process, executable, flags, own_path, _environment(env), working_dir)
    except (OSError, ValueError) as error:
        raise StartupError(
            f"worker {config.worker}: the process could not be started with {executable}: {error}",
            worker_id=config.worker,
        ) from error


def with_descriptors(config: HostConfig) -> HostConfig:
    """In the worker: the inherited handle as a descriptor, which its own children do not inherit."""
    msvcrt: Any = importlib.import_module("msvcrt")
    handle = config.begun_fd
    getattr(os, "set_handle_inheritable")(handle, False)  # noqa: B009
    return replace(config, begun_fd=msvcrt.open_osfhandle(handle, os.O_WRONLY))


def _start(
    win32: Win32,
    process: WorkerProcess,
    executable: str,
    flags: tuple[str, ...],
    own_path: tuple[str, ...],
    env: dict[str, str],
    working_dir: str,
) -> WindowsWorker:
    config = process.host_config
    executable, env = _real_executable(executable, env)
    with contextlib.ExitStack() as childs, contextlib.ExitStack() as ours:

        def pipe(
            make: Callable[[], tuple[int, int]], reader: contextlib.ExitStack, writer: contextlib.ExitStack
        ) -> tuple[int, int]:
            read, write = make()
            reader.callback(win32.close, read)
            writer.callback(win32.close, write)
            return read, write

        def std(handle: int) -> int:
            copy = win32.inheritable(handle)
            childs.callback(win32.close, copy)
            return copy

        job = win32.create_job()
        ours.callback(win32.close, job)
        out_r, out_w = pipe(win32.output_pipe, ours, childs)
        err_r, err_w = pipe(win32.output_pipe, ours, childs)
        begun_r, begun_w = pipe(win32.pipe, ours, childs)
        payload_r, payload_w = pipe(win32.pipe, childs, ours)
        begun = std(begun_w)
        process.host_config = config = replace(config, begun_fd=begun)
        payload = _payload(process, working_dir)
        program = _program(own_path)
        line = subprocess.list2cmdline([executable, *flags, "-c", program, "--multiprocessing-fork"])
        handle, thread, pid = win32.create_process(
            executable,
            line,
            _CREATE_SUSPENDED | _CREATE_NEW_PROCESS_GROUP | _CREATE_UNICODE_ENVIRONMENT | _CREATE_NO_WINDOW,
            env,
            (std(payload_r), std(out_w), std(err_w)),
            (begun,),
        )
        ours.callback(win32.close, handle)
        try:
            win32.assign(job, handle)
            win32.resume(thread)
        except BaseException:
            win32.terminate(handle)
            raise
        finally:
            win32.close(thread)
        childs.close()
        pipes = _Pipes(win32, config.worker, out_r, err_r, begun_r)
        worker = WindowsWorker(win32, job, handle, pid, pipes)
        pipes.start()
        ours.pop_all()
        with contextlib.suppress(OSError):  # it has ended already: its end will be seen
            win32.write(payload_w, payload)
        win32.close(payload_w)
        return worker


def _payload(process: WorkerProcess, working_dir: str) -> memoryview:
    """What multiprocessing's ``spawn_main`` reads: preparation data without a main module, the process."""
    buffer = io.BytesIO()
    set_spawning_popen(cast("Any", process))  # any object: it says that an authentication key may be written
    try:
        preparation = {
            "name": process.name,
            "authkey": process.authkey,
            "dir": working_dir,
            "orig_dir": working_dir,
        }
        reduction.dump(preparation, buffer)
        reduction.dump(process, buffer)
    finally:
        set_spawning_popen(None)
    return buffer.getbuffer()


def _program(own_path: tuple[str, ...]) -> str:
    # "-c" puts the current folder first on sys.path, where a file of the user's could hide a library.
    return (
        "import sys; sys.path[:1] = [p for p in sys.path[:1] if p]; "
        f"sys.path.extend(p for p in {list(own_path)!r} if p not in sys.path); "
        "import msvcrt; from multiprocessing.spawn import spawn_main; "
        "spawn_main(pipe_handle=msvcrt.get_osfhandle(0))"
    )


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """Windows tells names apart by more than their case; of two that are one to it, the later counts."""
    return {name.upper(): value for name, value in env.items()}


def _real_executable(executable: str, env: dict[str, str]) -> tuple[str, dict[str, str]]:
    """A virtual environment's python.exe starts another and waits: leave it out where it is our own."""
    base = getattr(sys, "_base_executable", None) or executable
    if executable != sys.executable or os.path.normcase(base) == os.path.normcase(executable):
        return executable, env
    return base, {**env, "__PYVENV_LAUNCHER__": executable}
