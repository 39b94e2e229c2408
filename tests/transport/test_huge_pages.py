"""Segments in huge pages behave as those in ordinary ones, and are of ordinary ones where there are none."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from legion_shm.errors import ArenaFull
from legion_shm.transport.handles import BLOCK_ALIGN as PAGE
from legion_shm.transport.segment import Segment, attach_segment, create_segment
from tests import needs
from tests.system.support import wait_for

if sys.platform == "linux":
    from legion_shm.transport import huge_pages, mappings, segment_memfd
    from legion_shm.transport.huge_pages import huge_pages_problem

    HUGE = mappings.HUGE_PAGE_BYTES
    PROBLEM = huge_pages_problem()
else:
    HUGE, PROBLEM = 1 << 21, "not Linux"

pytestmark = needs.linux
needs_huge = pytest.mark.skipif(bool(PROBLEM), reason=f"no huge pages: {PROBLEM}")

PREFIX = f"legion-h{os.getpid()}-"
SIZE = 3 * HUGE + 5 * PAGE  # the last pages are of no huge one


@pytest.fixture
def owner() -> Iterator[Segment]:
    segment = create_segment("memfd", SIZE, name_prefix=PREFIX)
    yield segment
    segment.close()


@pytest.fixture
def reader(owner: Segment) -> Iterator[Segment]:
    segment = attached_again(owner)
    yield segment
    segment.close()


def attached_again(segment: Segment) -> Segment:
    assert isinstance(segment.descriptor, int)
    return attach_segment("memfd", os.dup(segment.descriptor), segment.nbytes)


def put(address: int, text: bytes) -> None:
    ctypes.memmove(address, text, len(text))


def get(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes)


def mapped_huge_bytes(address: int) -> int:
    """Of the mapping that holds an address: how much of it huge pages are mapped in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "ShmemPmdMapped:":
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{address:#x} is not mapped")


def allocated_bytes(segment: Segment) -> int:
    assert isinstance(segment.descriptor, int)
    return os.fstat(segment.descriptor).st_blocks * 512


def condensed(segment: Segment) -> None:
    """Until it has been done: it is refused where pages are in use for the moment."""
    for _ in range(100):
        if not segment.ordinary:
            return
        segment.condense()
    pytest.skip("this machine has no huge pages left now")


@needs_huge
def test_owner_and_readers_map_the_huge_pages_whole(owner: Segment, reader: Segment) -> None:
    condensed(owner)  # what was not at hand when it was made
    owner.prefault(0, SIZE)
    assert mapped_huge_bytes(owner.shared_address()) == 3 * HUGE
    assert mapped_huge_bytes(reader.map_block(0, SIZE).address) == 3 * HUGE
    assert allocated_bytes(owner) == SIZE


def test_a_reader_sees_all_that_the_owner_wrote_and_new_memory_is_zero(
    owner: Segment, reader: Segment
) -> None:
    assert get(owner.shared_address(), SIZE) == bytes(SIZE)
    noise = os.urandom(PAGE)
    for offset in range(0, SIZE, PAGE):
        put(owner.shared_address() + offset, struct.pack("<Q", offset) + noise[8:])
    seen = get(reader.map_block(0, SIZE).address, SIZE)
    for offset in range(0, SIZE, PAGE):
        assert seen[offset : offset + PAGE] == struct.pack("<Q", offset) + noise[8:]


def test_a_readers_write_is_its_own_and_shows_as_dirty_alone(owner: Segment, reader: Segment) -> None:
    put(owner.shared_address() + HUGE, b"hello")
    view = reader.map_block(0, SIZE)
    get(view.address, SIZE)
    assert not view.dirty(0, SIZE)
    put(view.address + HUGE, b"HELLO")
    assert view.dirty(HUGE, 1)
    assert not view.dirty(0, HUGE)
    assert not view.dirty(HUGE + PAGE, SIZE - HUGE - PAGE)
    assert get(owner.shared_address() + HUGE, 5) == b"hello"
    assert get(attached_again(owner).map_block(HUGE, PAGE).address, 5) == b"hello"
    view.release()
    put(owner.shared_address() + HUGE, b"again")
    assert get(reader.map_block(0, SIZE).address + HUGE, 5) == b"again"


@pytest.mark.parametrize("offset", [0, 7 * PAGE, HUGE, HUGE + PAGE])
def test_an_isolated_block_is_its_owners_alone_and_its_neighbours_stay_shared(
    owner: Segment, reader: Segment, offset: int
) -> None:
    nbytes = HUGE + 3 * PAGE
    address = owner.shared_address()
    owner.prefault(0, SIZE)
    put(address + offset, b"published")
    view = reader.map_block(offset, nbytes)
    assert owner.isolate(offset, nbytes)
    assert owner.isolated_clean(offset, nbytes)
    assert get(address + offset, 9) == b"published"
    put(address + offset + nbytes - 6, b"secret")
    assert not owner.isolated_clean(offset, nbytes)
    assert get(view.address + nbytes - 6, 6) == bytes(6)
    put(address + offset + nbytes, b"neighbour")
    assert get(reader.map_block(offset + nbytes, PAGE).address, 9) == b"neighbour"
    owner.rejoin(offset, nbytes)
    assert get(address + offset + nbytes - 6, 6) == bytes(6)
    put(address + offset, b"rewritten")
    assert get(view.address, 9) == b"rewritten"


def test_nothing_of_it_is_left_when_its_last_view_is_gone() -> None:
    def holdings() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), sum(PREFIX in line for line in maps.splitlines())

    before = holdings()
    segment = create_segment("memfd", SIZE, name_prefix=PREFIX)
    views = [segment.map_block(0, SIZE) for _ in range(6)]
    segment.prefault(0, SIZE)
    segment.close()
    assert holdings()[1] > before[1]
    del segment, views
    assert holdings() == before


def test_a_mapping_reserves_no_addresses_beyond_itself() -> None:
    def mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        spans = (line.split()[0].split("-") for line in lines if "00:00 0" in line and "---p" in line)
        return sum(int(end, 16) - int(start, 16) for start, end in spans)

    fd = os.memfd_create("legion-map")
    os.ftruncate(fd, SIZE)
    before = mapped()
    addresses = [mappings.map_file(nbytes, 1, fd) for nbytes in (HUGE, HUGE + 1, SIZE)]
    assert [address % HUGE for address in addresses] == [0, 0, 0]
    assert mappings.map_file(HUGE, 1, fd, 3 * PAGE) % HUGE == 3 * PAGE
    assert mapped() == before
    for address, nbytes in zip(addresses, (HUGE, HUGE + PAGE, SIZE), strict=True):
        mappings.unmap(address, nbytes)
    os.close(fd)


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EINVAL, errno.EAGAIN])
def test_where_there_are_no_huge_pages_left_the_rest_is_ordinary_ones(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    calls: list[int] = []

    def refused(address: int, nbytes: int, advice: int) -> int:
        if advice == mappings.MADV_COLLAPSE:
            calls.append(nbytes)
            return code
        return 0

    monkeypatch.setattr(huge_pages, "huge_pages_problem", lambda: "")
    monkeypatch.setattr(huge_pages, "advise", refused)
    monkeypatch.setattr(huge_pages, "monotonic_s", lambda: 0.0)
    segment = create_segment("memfd", SIZE, name_prefix=PREFIX)
    assert allocated_bytes(segment) == SIZE
    # One that is in use for the moment says nothing of the others.
    assert calls == [HUGE] * (3 if code == errno.EAGAIN else 1)
    assert not segment.condense()
    assert segment.ordinary, "they may be had later"
    assert allocated_bytes(segment) == SIZE
    segment.close()


@needs_huge
def test_a_kernel_that_takes_long_to_put_huge_pages_together_is_waited_for_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = iter(range(0, 1000, 5))
    with monkeypatch.context() as slow:
        slow.setattr(huge_pages, "monotonic_s", lambda: float(next(now_s)))
        segment = create_segment("memfd", SIZE, name_prefix=PREFIX)
    reader = attached_again(segment)
    segment.prefault(0, SIZE)
    assert mapped_huge_bytes(segment.shared_address()) <= HUGE
    assert allocated_bytes(segment) == SIZE
    noise = os.urandom(SIZE)
    put(segment.shared_address(), noise)
    view = reader.map_block(0, SIZE)
    put(view.address + 2 * HUGE, b"my own")
    assert segment.ordinary
    condensed(segment)
    assert get(segment.shared_address(), SIZE) == noise
    assert get(view.address + 2 * HUGE, 6) == b"my own"
    assert view.dirty(2 * HUGE, 1)
    assert not view.dirty(0, 2 * HUGE)
    assert get(view.address, 2 * HUGE) == noise[: 2 * HUGE]
    other = attached_again(segment).map_block(0, SIZE)
    assert mapped_huge_bytes(other.address) == 3 * HUGE
    assert get(other.address, SIZE) == noise
    assert allocated_bytes(segment) == SIZE
    segment.condense()
    segment.close()
    segment.condense()
    reader.close()


def test_a_large_segment_is_condensed_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def condense(_fd: int, start: int, end: int) -> int:
        asked.append((start >> 20, end >> 20))
        return end if len(asked) != 2 else start

    monkeypatch.setattr(segment_memfd, "fill_with_huge_pages", lambda _fd, nbytes: (0, nbytes))
    monkeypatch.setattr(segment_memfd, "condense", condense)
    segment = create_segment("memfd", 144 << 20, name_prefix=PREFIX)
    assert [segment.condense() for _ in range(4)] == [True, False, True, True]
    assert not segment.ordinary
    assert asked == [(0, 64), (64, 128), (64, 128), (128, 144)]
    segment.close()


@needs_huge
def test_what_is_condensed_keeps_what_others_write_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter(range(0, 1000, 5))
    with monkeypatch.context() as slow:
        slow.setattr(huge_pages, "monotonic_s", lambda: float(next(now_s)))
        segment = create_segment("memfd", 16 * HUGE, name_prefix=PREFIX)
    address, over = segment.shared_address(), threading.Event()
    written: list[int] = []
    lost: list[int] = []

    def write() -> None:
        number = 0
        while not over.is_set() or number < 3:
            number += 1
            for offset in range(0, 16 * HUGE, PAGE):
                cell = ctypes.c_uint32.from_address(address + offset)
                if cell.value != number - 1:
                    lost.append(offset)
                cell.value = number
        written.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    condensed(segment)
    over.set()
    writer.join(60)
    assert not lost, "each write was there when the next one came"
    pages = range(0, 16 * HUGE, PAGE)
    assert {ctypes.c_uint32.from_address(address + offset).value for offset in pages} == set(written)
    other = attached_again(segment).map_block(0, 16 * HUGE)
    assert {ctypes.c_uint32.from_address(other.address + offset).value for offset in pages} == set(written)
    assert mapped_huge_bytes(other.address) > HUGE
    segment.close()


def test_a_shortage_while_huge_pages_are_made_is_the_arenas_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huge_pages, "huge_pages_problem", lambda: "")
    monkeypatch.setattr(os, "posix_fallocate", short)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ArenaFull):
        create_segment("memfd", SIZE, name_prefix=PREFIX)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("answer", "reason"), [(True, "does not tell which of them"), (False, "hides which of them")]
)
@needs_huge
def test_a_kernel_that_cannot_tell_written_huge_pages_gets_ordinary_ones(
    monkeypatch: pytest.MonkeyPatch, answer: bool, reason: str
) -> None:
    monkeypatch.setattr(huge_pages, "may_be_written", lambda *_: answer)
    monkeypatch.setattr(huge_pages, "_verdict", [])
    wait_for(lambda: reason in huge_pages_problem(), "one could be had for the probe")
    segment = create_segment("memfd", SIZE, name_prefix=PREFIX)
    segment.prefault(0, SIZE)
    assert not segment.ordinary
    assert mapped_huge_bytes(segment.shared_address()) == 0
    assert allocated_bytes(segment) == SIZE
    segment.close()


@pytest.mark.parametrize(
    ("code", "lasting"), [(errno.EINVAL, True), (errno.ENOMEM, False), (errno.EAGAIN, False)]
)
@needs_huge
def test_what_fails_for_the_moment_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, code: int, lasting: bool
) -> None:
    monkeypatch.setattr(huge_pages, "_verdict", [])
    with monkeypatch.context() as refusing:
        refusing.setattr(huge_pages, "advise", lambda *_: code)
        assert os.strerror(code) in huge_pages_problem()
    if lasting:
        assert os.strerror(code) in huge_pages_problem()
    else:
        wait_for(lambda: not huge_pages_problem(), "one could be had for the probe")
