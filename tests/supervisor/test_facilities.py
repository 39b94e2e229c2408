"""What stands in for Linux's own facilities, forced here: how a system without them behaves."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from legion_shm.supervisor.facilities import PLAIN, exit_descriptor, launcher_in_words
from legion_shm.supervisor.wake import Wake
from tests import needs


def readable(fd: int, within_s: float) -> bool:
    return bool(select.select([fd], [], [], within_s)[0])


@needs.posix
@pytest.mark.parametrize("way", ["as it is here", "waitid", "wait"])
def test_the_end_of_a_process_makes_its_descriptor_readable(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "as it is here":
        monkeypatch.setenv(PLAIN, "1")
    if way == "wait":
        monkeypatch.delattr(os, "waitid")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    fd = exit_descriptor(child.pid, child.wait)
    try:
        assert not readable(fd, 0.05), "it still runs"
        child.send_signal(signal.SIGKILL)
        assert readable(fd, 10)
        assert child.wait(10) == -signal.SIGKILL, "its exit code is still there to be asked for"
    finally:
        os.close(fd)
        child.communicate()


@needs.posix
def test_a_child_of_the_process_does_not_hide_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAIN, "1")
    program = "import os, time; os.fork() or time.sleep(60); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, start_new_session=True)
    fd = exit_descriptor(child.pid, child.wait)
    try:
        assert child.stdin is not None
        child.stdin.close()  # the parent ends with an error, its child sleeps on
        assert readable(fd, 10)
        child.wait(10)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        os.close(fd)


@needs.posix
def test_the_words_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAIN, "1")
    assert "thread" in launcher_in_words()[1]
    assert PLAIN in launcher_in_words()[2]
    monkeypatch.delenv(PLAIN)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "no F_SETSIG on darwin" in launcher_in_words()[2]
    monkeypatch.setattr(sys, "platform", "win32")
    assert "job object" in launcher_in_words()[0]


@pytest.mark.parametrize("sockets", [pytest.param(False, marks=needs.posix), True])
def test_a_wake_up_is_seen_until_it_is_cleared(sockets: bool) -> None:
    wake = Wake(sockets=sockets)
    try:
        assert not readable(wake.fd, 0)
        for _ in range(3):
            wake.set()
        assert readable(wake.fd, 5)
        wake.clear()
        assert not readable(wake.fd, 0)
        wake.clear()
        for _ in range(300_000 if sockets else 70_000):
            wake.set()  # more than fit: never blocks
        assert readable(wake.fd, 0)
    finally:
        wake.close()
