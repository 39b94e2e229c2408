"""The death pipe: a process group ends when the only writer of its pipe is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests import needs

CHILD = """
import ctypes, os, sys
from legion_shm.supervisor import death_pipe
fd, how, busy = int(sys.argv[1]), sys.argv[2], sys.argv[3]
getattr(death_pipe, how)(fd)
os.fork()  # a member of the group dies too
os.write(1, b"armed\\n")
if busy == "lock held":
    ctypes.PyDLL(None).sleep(100)  # in C, holding the interpreter's lock
else:
    ctypes.CDLL(None).sleep(100)
"""


def started(how: str, busy: str) -> tuple[subprocess.Popen[bytes], int]:
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(reader), how, busy],
        pass_fds=(reader,),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(reader)
    return child, writer


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="F_SETSIG is Linux's")
@pytest.mark.parametrize("busy", ["lock free", "lock held"])
def test_the_kernel_ends_the_whole_group_when_the_writer_closes(busy: str) -> None:
    child, writer = started("arm", busy)
    with child:
        assert child.stdout is not None
        assert child.stdout.read(12) == b"armed\narmed\n"
        os.close(writer)
        assert child.stdout.read() == b"", "both processes have closed their output"
        assert child.wait(5) == -signal.SIGKILL


@needs.posix
def test_a_writer_that_was_gone_before_is_noticed() -> None:
    child, writer = started("arm", "lock free")
    os.close(writer)
    with child:
        assert child.wait(10) == -signal.SIGKILL


@needs.posix
def test_where_the_kernel_does_not_help_a_thread_does() -> None:
    child, writer = started("watch", "lock free")
    with child:
        assert child.stdout is not None
        assert child.stdout.read(12) == b"armed\narmed\n"
        os.close(writer)
        assert child.stdout.read() == b""
        assert child.wait(5) == -signal.SIGKILL
