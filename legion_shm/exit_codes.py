"""How a process ended: what exit codes say, and in which words.

Owns the numbers and the names. One convention on every system: from 0 on the process's own code, negative
when it was ended from outside or crashed. For a signal that is its number, as in `subprocess`. Windows has
no signals: its own codes for a crash (NTSTATUS, from 0xC0000000 on) are taken as signed numbers, which
makes them negative too, and what the supervisor ends there carries the number of the rung it was on.
"""

from __future__ import annotations

import contextlib
import signal

__all__ = ["describe_exit", "ended_by", "from_windows", "name_of_end"]

_ENDED = 0x4C47_0000
"""With the rung's number added: the code that a job object is ended with, which no program uses by chance."""
_SIGNALS_END = 0x1_0000  # signals have smaller numbers, and a signed NTSTATUS a larger magnitude
_SIGKILL = 9
_NAMES = {9: "SIGKILL", 15: "SIGTERM"}  # Windows' signal module lacks the first

_NTSTATUS = {
    0x80000003: "breakpoint",
    0xC0000005: "access violation",
    0xC0000006: "in-page error",
    0xC0000017: "out of memory",
    0xC000001D: "illegal instruction",
    0xC0000094: "integer division by zero",
    0xC00000FD: "stack overflow",
    0xC0000135: "a DLL was not found",
    0xC0000138: "a DLL lacks a numbered function",
    0xC0000139: "a DLL lacks a function",
    0xC000013A: "Ctrl-C",
    0xC0000142: "a DLL could not be initialized",
    0xC000012D: "the commit limit was reached",
    0xC0000374: "heap corruption",
    0xC0000409: "abort, or a stack buffer overrun",
    0xC0000420: "assertion failure",
}


def ended_by(number: int) -> int:
    """The code to end a job object with, for this rung of the stop ladder."""
    return _ENDED + number


def from_windows(status: int) -> int:
    """An unsigned exit status of Windows in the convention above."""
    status &= 0xFFFF_FFFF
    if status - _ENDED in _NAMES:
        return _ENDED - status
    return status - (1 << 32) if status in _NTSTATUS or status >> 28 == 0xC else status


def name_of_end(exit_code: int | None) -> str | None:
    """``"SIGSEGV"``, ``"0xC0000005 (access violation)"``; None where the process ended by itself."""
    if exit_code is None or exit_code >= 0:
        return None
    if -exit_code >= _SIGNALS_END:
        status = exit_code & 0xFFFF_FFFF
        name = _NTSTATUS.get(status)
        return f"0x{status:08X}" + (f" ({name})" if name else "")
    with contextlib.suppress(ValueError):
        return signal.Signals(-exit_code).name
    return _NAMES.get(-exit_code, f"signal {-exit_code}")


def describe_exit(exit_code: int | None) -> str:
    """How a process ended, in words that follow 'worker w1'."""
    if exit_code is None:
        return (
            "was killed or exited, status unknown (its zygote had died, or something else in this program "
            "took it: SIGCHLD ignored, waitpid for any child)"
        )
    name = name_of_end(exit_code)
    if name is None:
        return f"exited with code {exit_code}"
    if -exit_code >= _SIGNALS_END:
        return f"crashed with {name}"
    hint = " (if nobody sent it: the system was out of memory)" if exit_code == -_SIGKILL else ""
    return f"was killed by {name}{hint}"
