from __future__ import annotations

import pytest

from legion_shm.errors import WorkerLost
from legion_shm.exit_codes import describe_exit, ended_by, from_windows, name_of_end


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (0, 0, "exited with code 0"),
        (3, 3, "exited with code 3"),
        (0x7FFFFFFF, 0x7FFFFFFF, "exited with code 2147483647"),
        (0xC0000005, -1073741819, "crashed with 0xC0000005 (access violation)"),
        (0xC00000FD, -1073741571, "crashed with 0xC00000FD (stack overflow)"),
        (0xC0000374, -1073740940, "crashed with 0xC0000374 (heap corruption)"),
        (0xC0009999, -1073702503, "crashed with 0xC0009999"),
        (0x80000003, -2147483645, "crashed with 0x80000003 (breakpoint)"),
        (0xFFFFFFFF, 0xFFFFFFFF, "exited with code 4294967295"),
        (ended_by(9), -9, "was killed by SIGKILL (if nobody sent it: the system was out of memory)"),
        (ended_by(15), -15, "was killed by SIGTERM"),
    ],
)
def test_an_end_on_windows_is_told_in_words(status: int, code: int, text: str) -> None:
    assert from_windows(status) == code
    assert describe_exit(code) == text


def test_a_crash_is_named_where_a_signal_would_be() -> None:
    assert (
        WorkerLost("lost", exit_code=from_windows(0xC0000005)).signal_name == "0xC0000005 (access violation)"
    )
    assert name_of_end(-11) == "SIGSEGV"
    assert name_of_end(7) is None
    assert name_of_end(None) is None
