"""Starting a worker process on Windows: the launcher beside `spawn`, with the same promises.

Owns the process, the job object that it lives in, and the threads that turn pipes, which no poller takes
there, into sockets, which one does. Never imported elsewhere than on Windows.

    supervisor                                   worker, in a job object of its own
    job object (only handle) ───────────────────▶ KILL_ON_JOB_CLOSE: the system ends whatever is in the job
                                                  when the supervisor's process is gone, however it went
    stdout, stderr sockets ◀─ thread ◀─ pipe ◀─── handles 1 and 2, from its creation on
    begun lines ◀──────────── thread ◀─ pipe ◀─── a fourth inherited handle
    payload ──────────────────────────── pipe ──▶ handle 0; at its end once the payload is read
    exit socket ◀──────────── thread ◀─────────── the process object

The process is created suspended and runs when it is in its job, so that nothing it starts can be outside.
It has no console window and no part in the console's Ctrl-C. There are no signals: both lower rungs of
the stop ladder end the job at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from ctypes import wintypes
from dataclasses import replace
from multiprocessing import reduction
from multiprocessing.context import set_spawning_popen
from typing import TYPE_CHECKING, Any, cast

from legion_shm.errors import StartupError
from legion_shm.exit_codes import ended_by, from_windows
from legion_shm.supervisor.spawned import SIGKILL, SpawnedWorker

if TYPE_CHECKING:
    from legion_shm.supervisor.spawn import HostConfig, WorkerProcess

__all__ = ["Win32", "WindowsWorker", "start_worker", "with_descriptors"]

_READ_BYTES = 65536
_BEGUN_BYTES = 4096  # of its newest lines: the last one counts
_BEGUN_WAIT_S = 1.0  # from the process's end until the end of what it wrote
_PIPE_BYTES = 65536

_JOB_EXTENDED_LIMITS = 9  # JobObjectExtendedLimitInformation
_KILL_ON_JOB_CLOSE = 0x2000  # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
_CREATE_SUSPENDED = 0x4
_CREATE_NEW_PROCESS_GROUP = 0x200
_CREATE_UNICODE_ENVIRONMENT = 0x400
_CREATE_NO_WINDOW = 0x08000000
_STARTF_USESTDHANDLES = 0x100
_INFINITE = 0xFFFFFFFF
_STILL_ACTIVE = 259
_WAIT_OBJECT_0 = 0


class _BasicLimits(ctypes.Structure):
    _fields_ = (
        ("PerProcessUserTimeLimit", ctypes.c_int64),
        ("PerJobUserTimeLimit", ctypes.c_int64),
        ("LimitFlags", wintypes.DWORD),
        ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t),
        ("ActiveProcessLimit", wintypes.DWORD),
        ("Affinity", ctypes.c_size_t),
        ("PriorityClass", wintypes.DWORD),
        ("SchedulingClass", wintypes.DWORD),
    )


class _ExtendedLimits(ctypes.Structure):
    _fields_ = (
        ("BasicLimitInformation", _BasicLimits),
        ("IoInfo", ctypes.c_uint64 * 6),
        ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t),
        ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    )


class Win32:
    """The calls into Windows that a launcher makes: CPython's own `_winapi`, and kernel32 for what it lacks.

    Handles are integers. Each call raises OSError where Windows refuses it.
    """

    def __init__(self) -> None:
        self._api: Any = importlib.import_module("_winapi")
        self._kernel: Any = getattr(ctypes, "WinDLL")("kernel32", use_last_error=True)  # noqa: B009
        handle, dword = wintypes.HANDLE, wintypes.DWORD
        for name, result, arguments in (
            ("CreateJobObjectW", handle, (ctypes.c_void_p, wintypes.LPCWSTR)),
            ("SetInformationJobObject", wintypes.BOOL, (handle, ctypes.c_int, ctypes.c_void_p, dword)),
            ("AssignProcessToJobObject", wintypes.BOOL, (handle, handle)),
            ("TerminateJobObject", wintypes.BOOL, (handle, wintypes.UINT)),
            ("ResumeThread", dword, (handle,)),
        ):
            function = getattr(self._kernel, name)
            function.restype, function.argtypes = result, arguments

    def create_job(self) -> int:
        """A job object whose processes end with its last handle, which no other process has."""
        job = int(self._checked(self._kernel.CreateJobObjectW(None, None)))
        limits = _ExtendedLimits()
        limits.BasicLimitInformation.LimitFlags = _KILL_ON_JOB_CLOSE
        try:
            self._checked(
                self._kernel.SetInformationJobObject(
                    job, _JOB_EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)
                )
            )
        except BaseException:
            self.close(job)
            raise
        return job

    def assign(self, job: int, process: int) -> None:
        self._checked(self._kernel.AssignProcessToJobObject(job, process))

    def terminate_job(self, job: int, exit_code: int) -> None:
        self._checked(self._kernel.TerminateJobObject(job, exit_code))

    def resume(self, thread: int) -> None:
        if self._kernel.ResumeThread(thread) == _INFINITE:
            raise self._error()

    def pipe(self) -> tuple[int, int]:
        """(read end, write end), neither inheritable."""
        read, write = self._api.CreatePipe(None, _PIPE_BYTES)
        return int(read), int(write)

    def inheritable(self, handle: int) -> int:
        """A second handle of the same object, which a child may inherit."""
        api = self._api
        own = api.GetCurrentProcess()
        return int(api.DuplicateHandle(own, handle, own, 0, True, api.DUPLICATE_SAME_ACCESS))

    def read(self, handle: int) -> bytes:
        """What a pipe holds, waiting for it; b"" once nobody can write to it any more."""
        try:
            data, _ = self._api.ReadFile(handle, _READ_BYTES)
        except OSError:  # the pipe has been ended, or broken
            return b""
        return bytes(data)

    def write(self, handle: int, data: memoryview) -> None:
        while data:
            written, _ = self._api.WriteFile(handle, bytes(data[:_PIPE_BYTES]))
            data = data[written:]

    def create_process(
        self,
        executable: str,
        line: str,
        flags: int,
        env: Mapping[str, str],
        std: tuple[int, int, int],
        others: tuple[int, ...],
    ) -> tuple[int, int, int]:
        """(process handle, main thread's handle, pid); it inherits its standard handles and ``others``."""
        startup = getattr(subprocess, "STARTUPINFO")()  # noqa: B009
        startup.dwFlags = _STARTF_USESTDHANDLES
        startup.hStdInput, startup.hStdOutput, startup.hStdError = std
        startup.lpAttributeList = {"handle_list": [*std, *others]}
        process, thread, pid, _ = self._api.CreateProcess(
            executable, line, None, None, True, flags, dict(env), None, startup
        )
        return int(process), int(thread), int(pid)

    def wait(self, process: int, timeout_ms: int = _INFINITE) -> bool:
        return bool(self._api.WaitForSingleObject(process, timeout_ms) == _WAIT_OBJECT_0)

    def exit_status(self, process: int) -> int:
        return int(self._api.GetExitCodeProcess(process))

    def terminate(self, process: int) -> None:
        self._api.TerminateProcess(process, 1)

    def close(self, handle: int) -> None:
        self._api.CloseHandle(handle)

    def _checked(self, result: Any) -> Any:
        if not result:
            raise self._error()
        return result

    def _error(self) -> OSError:
        code = getattr(ctypes, "get_last_error")()  # noqa: B009
        return getattr(ctypes, "WinError")(code)  # type: ignore[no-any-return]  # noqa: B009


class _Pump:
    """Carries what comes out of a pipe to a socket that a poller can wait for, until the pipe's end.

    Where nobody reads the socket the thread waits, and then the writer, as they would at a full pipe.
    """

    def __init__(self, win32: Win32, handle: int, name: str) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._win32, self._handle = win32, handle
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            while data := self._win32.read(self._handle):
                self._writer.sendall(data)
        except OSError:  # the supervisor has closed its end
            pass
        finally:
            self._writer.close()
            self._win32.close(self._handle)

    def close(self) -> None:
        self.reader.close()


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

    def __init__(self, win32: Win32, job: int, process: int, pid: int, pumps: _Pumps) -> None:
        self.pid = pid
        self.descriptors = None
        self._win32, self._job, self._process = win32, job, process
        self._out, self._err, self._begun = pumps.out, pumps.err, pumps.begun
        self._sockets = {pump.reader.fileno(): pump.reader for pump in (self._out, self._err)}
        self.stdout, self.stderr = self._out.reader.fileno(), self._err.reader.fileno()
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
        return self._sockets[fd].recv(nbytes)

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


class _Pumps:
    """The parent's ends of a worker's three pipes."""

    def __init__(self, win32: Win32, worker: str, out: int, err: int, begun: int) -> None:
        self.out = _Pump(win32, out, f"legion-stdout-{worker}")
        self.err = _Pump(win32, err, f"legion-stderr-{worker}")
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

        def pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
            read, write = win32.pipe()
            reader.callback(win32.close, read)
            writer.callback(win32.close, write)
            return read, write

        def std(handle: int) -> int:
            copy = win32.inheritable(handle)
            childs.callback(win32.close, copy)
            return copy

        job = win32.create_job()
        ours.callback(win32.close, job)
        out_r, out_w = pipe(ours, childs)
        err_r, err_w = pipe(ours, childs)
        begun_r, begun_w = pipe(ours, childs)
        payload_r, payload_w = pipe(childs, ours)
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
        pumps = _Pumps(win32, config.worker, out_r, err_r, begun_r)
        worker = WindowsWorker(win32, job, handle, pid, pumps)
        pumps.start()
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
