from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from legion_shm.config import WorkerSpec
from legion_shm.supervisor.spawned import SpawnedWorker
from legion_shm.supervisor.worker_io import LineReader, WorkerIO, begun_mark, describe_exit
from tests import needs


class Pipe:
    def __init__(self) -> None:
        self.r, self.w = os.pipe()
        os.set_blocking(self.r, False)
        os.set_blocking(self.w, False)
        self.reader = LineReader(self.r)

    def write(self, data: bytes) -> None:
        assert os.write(self.w, data) == len(data)

    def hang_up(self) -> None:
        if self.w >= 0:
            os.close(self.w)
            self.w = -1

    def close(self) -> None:
        self.hang_up()
        os.close(self.r)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_nothing_written_is_nothing_read(pipe: Pipe) -> None:
    assert pipe.reader.read() == []
    assert not pipe.reader.ended


def test_a_line_comes_when_it_is_whole(pipe: Pipe) -> None:
    pipe.write(b"hello ")
    assert pipe.reader.read() == []
    pipe.write(b"world\nand")
    assert pipe.reader.read() == ["hello world"]
    pipe.write(b" more\n")
    assert pipe.reader.read() == ["and more"]


def test_a_last_line_without_an_end_comes_at_the_end(pipe: Pipe) -> None:
    pipe.write(b"one\ntwo")
    pipe.hang_up()
    assert pipe.reader.read() == ["one", "two"]
    assert pipe.reader.ended
    assert pipe.reader.read() == []


def test_each_step_of_a_progress_bar_is_a_line(pipe: Pipe) -> None:
    pipe.write(b"10%\r20%\r\n30%\r")
    assert pipe.reader.read() == ["10%", "20%", "30%"]


def test_blank_lines_are_left_out(pipe: Pipe) -> None:
    pipe.write(b"\n\n  \na\n\r\n b\n")
    assert pipe.reader.read() == ["a", " b"]


def test_what_is_not_utf8_is_shown_all_the_same(pipe: Pipe) -> None:
    pipe.write(b"caf\xc3\xa9 \xff\n")
    assert pipe.reader.read() == ["café \ufffd"]


@needs.posix
@pytest.mark.parametrize("end", [b"\n", b""])
def test_an_overlong_line_is_broken_up_and_nothing_of_it_is_lost(pipe: Pipe, end: bytes) -> None:
    text = bytes(ord("a") + n % 26 for n in range(20_000))
    pipe.write(text + end)
    pipe.hang_up()
    lines = pipe.reader.read()
    assert [len(line) for line in lines] == [8192, 8192, 3616]
    assert "".join(lines).encode() == text


def test_one_call_reads_a_bounded_part_of_a_flood(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that prints faster than we read must not keep the loop for ever."""
    reads = iter(range(10_000))

    def endless(fd: int, nbytes: int) -> bytes:
        assert next(reads) < 5_000, "it reads on and on"
        return b"spam\n" * 50

    with monkeypatch.context() as patched:
        patched.setattr(os, "read", endless)
        lines = pipe.reader.read()
    assert lines == ["spam"] * len(lines)
    assert 1000 <= len(lines) < 1100


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x0b\x0c\x1c\x1d\x1e\x85"), max_size=40)
    )
)
def test_however_the_bytes_are_cut_the_lines_are_the_same(lines: list[str]) -> None:
    data = "".join(line + "\n" for line in lines).encode()
    for size in (1, 3, 7, len(data) or 1):
        pipe = Pipe()
        try:
            seen: list[str] = []
            for start in range(0, len(data), size):
                pipe.write(data[start : start + size])
                seen += pipe.reader.read()
            assert seen == [line for line in lines if line.encode().strip()]
        finally:
            pipe.close()


# --- a worker -----------------------------------------------------------------------------------------


@dataclass
class FakeSpawned:
    stdout: int
    stderr: int
    begun: int = -1
    signals: list[int] = field(default_factory=list[int])

    def has_output(self) -> bool:
        return True

    def read(self, fd: int, nbytes: int) -> bytes:
        return os.read(fd, nbytes)

    def signal_group(self, number: int) -> None:
        self.signals.append(number)


def worker(log_lines: int = 3) -> WorkerIO:
    return WorkerIO("w1", WorkerSpec(), log_lines)


def test_a_worker_has_two_names_that_nobody_can_guess() -> None:
    one, other = worker(), worker()
    assert one.identities == (one.job_identity, one.control_identity)
    assert len({*one.identities, *other.identities}) == 4
    assert one.token.encode() in one.job_identity
    assert len(one.token) == 32
    assert one.arena != other.arena


def test_both_streams_are_read_and_the_last_lines_are_kept() -> None:
    out, err = Pipe(), Pipe()
    try:
        io = worker()
        io.adopt(cast("SpawnedWorker", FakeSpawned(out.r, err.r)))
        out.write(b"1\n2\n")
        err.write(b"3\n4\n")
        assert io.read_lines() == [("stdout", "1"), ("stdout", "2"), ("stderr", "3"), ("stderr", "4")]
        assert list(io.tail) == ["2", "3", "4"]
        assert io.read_lines() == []
    finally:
        out.close()
        err.close()


@needs.posix
def test_a_signal_goes_to_the_group_and_is_kept_for_a_worker_that_is_not_there_yet() -> None:
    io = worker()
    io.signal("SIGTERM")
    assert io.kill_wanted
    spawned = FakeSpawned(-1, -1)
    io.adopt(cast("SpawnedWorker", spawned))
    io.signal("SIGTERM")
    io.signal("SIGKILL")
    assert spawned.signals == [signal.SIGTERM, signal.SIGKILL]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-11, "was killed by SIGSEGV"),
        (-15, "was killed by SIGTERM"),
        (-250, "was killed by signal 250"),
        (-9, "was killed by SIGKILL (if nobody sent it: the system was out of memory)"),
    ],
)
def test_an_end_is_told_in_words(code: Any, text: str) -> None:
    assert describe_exit(code) == text


def test_an_end_that_nobody_can_tell_is_said_to_be_unknown_with_the_causes() -> None:
    assert re.search("status unknown.*zygote had died.*SIGCHLD", describe_exit(None))


def test_what_a_worker_began_is_known_after_its_end() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    item = worker()
    item.adopt(FakeSpawned(-1, -1, reader))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert not item.has_begun("j-1", 1)
    os.write(writer, f"{begun_mark('j-0', 1)}\n{begun_mark('j-1', 1)}\n".encode())
    os.close(writer)
    assert item.has_begun("j-1", 1)
    assert item.has_begun("j-1", 1), "asking does not forget"
    assert not item.has_begun("j-1", 2)
    assert not item.has_begun("j-0", 1)
    os.close(reader)
