"""The calls into Windows that starting a worker takes, each with its errors raised.

Owns no state but the libraries; a handle that a call gives is the caller's to close. Never made elsewhere
than on Windows.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import subprocess
from collections.abc import Mapping
from ctypes import wintypes
from typing import Any

__all__ = ["PIPE_BYTES", "PendingRead", "Win32"]

PIPE_BYTES = 65536
"""What a pipe holds before its writer waits, and the most that one read gives."""

_JOB_EXTENDED_LIMITS = 9  # JobObjectExtendedLimitInformation
_KILL_ON_JOB_CLOSE = 0x2000  # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
_STARTF_USESTDHANDLES = 0x100
_INFINITE = 0xFFFFFFFF
_WAIT_OBJECT_0 = 0
_ERROR_OPERATION_ABORTED = 995


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


class PendingRead:
    """A read from a pipe that Windows carries out by itself. Made by `Win32.begin_read`.

    Only the thread that began it may ask for its result or give it up: Windows completes it in that thread.
    """

    def __init__(self, api: Any, overlapped: Any) -> None:
        self._api, self._overlapped = api, overlapped

    def wait(self) -> None:
        """Until it is complete or given up; from any thread."""
        self._api.WaitForSingleObject(self._overlapped.event, _INFINITE)

    def result(self) -> bytes | None:
        """What came, at most `PIPE_BYTES`; None until something has. Raises OSError at the pipe's end."""
        if self._api.WaitForSingleObject(self._overlapped.event, 0) != _WAIT_OBJECT_0:
            return None
        _, error = self._overlapped.GetOverlappedResult(True)
        if error == _ERROR_OPERATION_ABORTED:
            raise BrokenPipeError("the read was given up")
        return bytes(self._overlapped.getbuffer())

    def give_up(self) -> None:
        """End it, with its result lost."""
        with contextlib.suppress(OSError):  # it has ended with an error of its own
            self._overlapped.cancel()
            self._overlapped.GetOverlappedResult(True)


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
        read, write = self._api.CreatePipe(None, PIPE_BYTES)
        return int(read), int(write)

    def output_pipe(self) -> tuple[int, int]:
        """(read end, write end): as `pipe`, but the read end is for `begin_read` alone."""
        read, write = importlib.import_module("asyncio.windows_utils").pipe(
            overlapped=(True, False), bufsize=PIPE_BYTES
        )
        return int(read), int(write)

    def begin_read(self, handle: int) -> PendingRead:
        """Have Windows read from an output pipe. Raises OSError at the pipe's end."""
        overlapped, _ = self._api.ReadFile(handle, PIPE_BYTES, True)
        return PendingRead(self._api, overlapped)

    def inheritable(self, handle: int) -> int:
        """A second handle of the same object, which a child may inherit."""
        api = self._api
        own = api.GetCurrentProcess()
        return int(api.DuplicateHandle(own, handle, own, 0, True, api.DUPLICATE_SAME_ACCESS))

    def read(self, handle: int) -> bytes:
        """What a `pipe` holds, waiting for it; b"" once nobody can write to it any more."""
        try:
            data, _ = self._api.ReadFile(handle, PIPE_BYTES)
        except OSError:  # the pipe has been ended, or broken
            return b""
        return bytes(data)

    def write(self, handle: int, data: memoryview) -> None:
        while data:
            written, _ = self._api.WriteFile(handle, bytes(data[:PIPE_BYTES]))
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
