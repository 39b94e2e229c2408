"""One conformance suite for both kinds of segment, and what is particular to each."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from legion_shm.errors import ArenaFull, InvalidHandle
from legion_shm.transport import dirty
from legion_shm.transport.handles import BLOCK_ALIGN
from legion_shm.transport.segment import (
    Segment,
    SegmentKind,
    attach_segment,
    available_memory_bytes,
    create_segment,
)
from tests import needs

PAGE = BLOCK_ALIGN
SIZE = 16 * PAGE
PREFIX = f"legion-t{os.getpid()}-"
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=needs.SEGMENT_KINDS)
def kind(request: pytest.FixtureRequest) -> SegmentKind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def owner(kind: SegmentKind) -> Iterator[Segment]:
    segment = create_segment(kind, SIZE, name_prefix=PREFIX)
    yield segment
    segment.close()


@pytest.fixture
def reader(owner: Segment) -> Iterator[Segment]:
    segment = attached_again(owner)
    yield segment
    segment.close()


def attached_again(owner: Segment) -> Segment:
    descriptor = owner.descriptor
    return attach_segment(
        owner.kind, os.dup(descriptor) if isinstance(descriptor, int) else descriptor, owner.nbytes
    )


def named_segments() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(PREFIX)]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


def put(address: int, text: bytes) -> None:
    ctypes.memmove(address, text, len(text))


def get(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes)


def run_child(owner: Segment, body: str) -> str:
    """Run code in a fresh process that has ``segment`` attached; returns what it prints."""
    descriptor = owner.descriptor
    script = textwrap.dedent(
        f"""
        import ctypes, os, signal, sys
        from legion_shm.transport.segment import attach_segment

        def end():
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

        segment = attach_segment({owner.kind!r}, {descriptor!r}, {owner.nbytes})
        """
    ) + textwrap.dedent(body)
    fds = (descriptor,) if isinstance(descriptor, int) else ()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, pass_fds=fds, capture_output=True, text=True, timeout=30
    )
    assert done.returncode in (0, signal.SIGTERM if needs.WINDOWS else -signal.SIGKILL), done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


# --- both kinds ---------------------------------------------------------------------------------------


def test_a_reader_sees_what_the_owner_wrote(owner: Segment, reader: Segment) -> None:
    put(owner.shared_address() + 2 * PAGE, b"hello")
    block = reader.map_block(2 * PAGE, 100)
    assert get(block.address, 5) == b"hello"
    assert block.nbytes == PAGE


def test_a_readers_write_is_seen_by_nobody_else(owner: Segment, reader: Segment) -> None:
    put(owner.shared_address(), b"hello")
    block = reader.map_block(0, PAGE)
    put(block.address, b"HELLO")
    assert get(owner.shared_address(), 5) == b"hello"
    other = attached_again(owner)
    assert get(other.map_block(0, PAGE).address, 5) == b"hello"
    other.close()


@needs.linux
def test_written_pages_are_dirty_and_only_they(owner: Segment, reader: Segment) -> None:
    block = reader.map_block(4 * PAGE, 4 * PAGE)
    get(block.address, 4 * PAGE)
    assert not block.dirty(0, 4 * PAGE)
    put(block.address + 2 * PAGE + 17, b"x")
    assert block.dirty(0, 4 * PAGE)
    assert block.dirty(2 * PAGE, 1)
    assert block.dirty(3 * PAGE - 1, 1)
    assert not block.dirty(0, 2 * PAGE)
    assert not block.dirty(3 * PAGE, PAGE)


def test_pages_count_as_dirty_where_that_cannot_be_known(
    owner: Segment, reader: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = reader.map_block(0, PAGE)

    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, "not dumpable")

    monkeypatch.setattr(os, "open", refused)
    assert block.dirty(0, PAGE)
    assert not dirty.pagemap_readable()
    put(block.address, b"scribble")
    block.release()
    put(owner.shared_address(), b"new text")
    assert get(reader.map_block(0, PAGE).address, 8) == b"new text"


def test_after_release_a_block_shows_its_next_content(owner: Segment, reader: Segment) -> None:
    for text in (b"first", b"other", b"third"):
        put(owner.shared_address() + PAGE, text)
        block = reader.map_block(PAGE, PAGE)
        assert get(block.address, 5) == text
        put(block.address, b"XXXXX")
        block.release()
        block.release()


def test_two_live_views_of_one_block_never_share_a_page(owner: Segment, reader: Segment) -> None:
    put(owner.shared_address(), b"hello")
    blocks = [reader.map_block(0, 2 * PAGE) for _ in range(7)]
    overlapping = reader.map_block(PAGE, 2 * PAGE)
    for index, block in enumerate(blocks):
        put(block.address, b"%05d" % index)
        put(block.address + PAGE, b"mine!")
    assert [get(block.address, 5) for block in blocks] == [b"%05d" % i for i in range(7)]
    assert get(overlapping.address, 5) == bytes(5)
    assert get(owner.shared_address(), 5) == b"hello"


def test_views_stay_valid_after_their_segment_is_closed(owner: Segment) -> None:
    put(owner.shared_address(), b"hello")
    reader = attached_again(owner)
    block, memory, address = reader.map_block(0, PAGE), owner.shared_memory(), owner.shared_address()
    reader.close()
    owner.close()
    assert get(block.address, 5) == b"hello"
    put(block.address, b"HELLO")
    block.release()
    put(address, b"again")
    del memory
    for closed in (reader, owner):
        closed.close()
        with pytest.raises(InvalidHandle):
            closed.map_block(0, PAGE)


@needs.linux
def test_nothing_of_a_segment_is_left_when_its_last_view_is_gone(kind: SegmentKind) -> None:
    def holdings() -> tuple[int, int, list[str]]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        mapped = sum(PREFIX in line for line in maps.splitlines())
        return open_fds(), mapped, named_segments()

    before = holdings()
    owner = create_segment(kind, SIZE, name_prefix=PREFIX)
    reader = attached_again(owner)
    owner.shared_address()
    blocks = [reader.map_block(0, PAGE) for _ in range(6)]
    assert holdings()[1] > 0
    owner.close()
    reader.close()
    assert holdings()[1] > 0
    assert holdings()[2] == []
    del blocks, owner, reader
    assert holdings() == before


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(SIZE, 1), (SIZE - PAGE, PAGE + 1), (-PAGE, PAGE), (5, 1), (0, 0), (0, SIZE + 1)]
)
def test_a_block_outside_of_the_segment_is_not_mapped(reader: Segment, offset: int, nbytes: int) -> None:
    with pytest.raises(InvalidHandle):
        reader.map_block(offset, nbytes)


@pytest.mark.parametrize("claimed", [SIZE + PAGE, SIZE - PAGE, 0, -PAGE, SIZE + 1])
def test_a_segment_of_another_size_than_claimed_is_refused(owner: Segment, claimed: int) -> None:
    descriptor = owner.descriptor
    fds = open_fds()
    mine = os.dup(descriptor) if isinstance(descriptor, int) else descriptor
    with pytest.raises(InvalidHandle):
        attach_segment(owner.kind, mine, claimed)
    assert open_fds() == fds


def test_a_descriptor_of_the_other_kind_is_refused(kind: SegmentKind) -> None:
    with pytest.raises(InvalidHandle):
        attach_segment(kind, "legion-test-nosuch" if kind == "memfd" else 0, SIZE)


@pytest.mark.parametrize("nbytes", [0, -PAGE, PAGE + 1])
def test_a_segment_is_whole_pages(kind: SegmentKind, nbytes: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        create_segment(kind, nbytes, name_prefix=PREFIX)


@needs.rlimits
def test_a_shortage_is_arena_full_and_leaves_nothing(kind: SegmentKind) -> None:
    fds = open_fds()
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))
    try:
        with pytest.raises(ArenaFull):
            create_segment(kind, 2 * SIZE, name_prefix=PREFIX)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_fds() == fds
    assert named_segments() == []


@needs.linux
def test_more_than_the_machine_has_left_is_never_allocated(kind: SegmentKind) -> None:
    available = available_memory_bytes()
    assert available is not None
    with pytest.raises(ArenaFull, match="bytes of memory left"):
        create_segment(kind, 2 * available // PAGE * PAGE, name_prefix=PREFIX)


def test_another_process_reads_writes_privately_and_leaves_the_segment_whole(owner: Segment) -> None:
    put(owner.shared_address() + 3 * PAGE, b"from the parent")
    printed = run_child(
        owner,
        f"""
        block = segment.map_block({3 * PAGE}, 100)
        print(ctypes.string_at(block.address, 15).decode(), block.dirty(0, 100))
        ctypes.memset(block.address, 0, 100)
        print(ctypes.string_at(block.address, 15) == bytes(15), block.dirty(0, 100))
        """,
    )
    assert printed.splitlines() == [f"from the parent {needs.WINDOWS}", "True True"]
    assert get(owner.shared_address() + 3 * PAGE, 15) == b"from the parent"
    # Its exit, orderly or not, must not take the segment away from the others.
    run_child(owner, "segment.map_block(0, 1); end()")
    reader = attached_again(owner)
    assert get(reader.map_block(3 * PAGE, 15).address, 15) == b"from the parent"
    reader.close()


def test_what_another_process_wrote_outlives_its_kill(owner: Segment) -> None:
    block = owner.map_block(0, PAGE)
    run_child(
        owner,
        """
        ctypes.memmove(segment.shared_address(), b"last words", 10)
        end()
        """,
    )
    assert get(block.address, 10) == b"last words"


# --- memfd --------------------------------------------------------------------------------------------


@pytest.fixture
def memfd() -> Iterator[Segment]:
    segment = create_segment("memfd", SIZE, name_prefix=PREFIX)
    yield segment
    segment.close()


@needs.linux
def test_a_memfd_segment_cannot_be_resized_and_is_not_inherited(memfd: Segment) -> None:
    fd = memfd.descriptor
    assert isinstance(fd, int)
    for size in (0, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    assert not os.get_inheritable(fd)


@needs.linux
def test_a_memfd_without_seals_is_refused() -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    with pytest.raises(InvalidHandle, match="seals"):
        attach_segment("memfd", fd, SIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@needs.linux
def test_a_descriptor_that_is_no_memfd_is_refused_and_closed(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(InvalidHandle, match="not a memfd"):
        attach_segment("memfd", fd, SIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@needs.linux
def test_an_isolated_block_hides_its_owners_writes_until_it_rejoins(memfd: Segment) -> None:
    reader = attached_again(memfd)
    address = memfd.shared_address() + PAGE
    put(address, b"published")
    put(address + PAGE, b"neighbour")
    view = reader.map_block(PAGE, PAGE)
    assert memfd.isolate(PAGE, PAGE)
    assert get(address, 9) == b"published"
    assert memfd.isolated_clean(PAGE, PAGE)
    put(address, b"SCRIBBLED")
    put(address + PAGE, b"NEIGHBOUR")
    assert not memfd.isolated_clean(PAGE, PAGE)
    assert get(view.address, 9) == b"published"
    assert get(reader.map_block(2 * PAGE, PAGE).address, 9) == b"NEIGHBOUR"
    memfd.rejoin(PAGE, PAGE)
    assert get(address, 9) == b"published"
    put(address, b"rewritten")
    assert get(view.address, 9) == b"rewritten"
    reader.close()


@needs.linux
def resident_pages(segment: Segment) -> int:
    """How many pages of the shared mapping this process has mapped."""
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(segment.shared_address() // PAGE * 8)
        entries = pagemap.read(segment.nbytes // PAGE * 8)
    return sum(entry >> 63 for (entry,) in struct.iter_unpack("<Q", entries))


@needs.linux
def test_what_rejoins_is_mapped_ahead_of_its_next_use_and_what_is_isolated_is_not(
    memfd: Segment,
) -> None:
    memfd.prefault(0, 8 * PAGE)
    assert memfd.isolate(0, 4 * PAGE)
    assert memfd.isolate(4 * PAGE, 4 * PAGE)
    assert not memfd.cold
    memfd.rejoin(0, 4 * PAGE)
    assert memfd.cold
    assert resident_pages(memfd) == 0
    memfd.warm()
    assert not memfd.cold
    assert resident_pages(memfd) == 4
    assert memfd.isolated_clean(4 * PAGE, 4 * PAGE)
    memfd.rejoin(4 * PAGE, 4 * PAGE)
    assert memfd.isolate(4 * PAGE, 4 * PAGE)  # used again before anybody came to map it
    memfd.warm()
    assert resident_pages(memfd) == 4
    assert memfd.isolated_clean(4 * PAGE, 4 * PAGE)


@needs.linux
def test_isolation_after_close_is_refused_and_touches_nothing(memfd: Segment) -> None:
    memory, address = memfd.shared_memory(), memfd.shared_address()
    put(address, b"hello")
    memfd.close()
    assert not memfd.isolate(0, PAGE)
    memfd.rejoin(0, PAGE)
    assert not memfd.isolated_clean(0, PAGE)
    assert get(address, 5) == b"hello"
    del memory


@needs.linux
def test_a_released_view_is_handed_out_again_at_the_same_address(memfd: Segment) -> None:
    first = memfd.map_block(0, PAGE)
    address = first.address
    first.release()
    assert memfd.map_block(0, PAGE).address == address


@needs.linux
def test_a_view_whose_pages_cannot_be_dropped_is_never_handed_out_again(
    memfd: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from legion_shm.transport import segment_memfd

    first = memfd.map_block(0, PAGE)
    put(first.address, b"stale")
    monkeypatch.setattr(segment_memfd, "MADV_DONTNEED", -1)
    first.release()
    put(memfd.shared_address(), b"fresh")
    assert get(memfd.map_block(0, PAGE).address, 5) == b"fresh"


# --- portable -----------------------------------------------------------------------------------------


@pytest.fixture
def portable() -> Iterator[Segment]:
    segment = create_segment("portable", SIZE, name_prefix=PREFIX)
    yield segment
    segment.close()


@needs.posix
def test_a_portable_segment_is_never_told_to_the_resource_tracker(
    portable: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multiprocessing import resource_tracker

    told: list[object] = []
    monkeypatch.setattr(resource_tracker, "register", lambda *args: told.append(args))
    attached_again(portable).close()
    create_segment("portable", PAGE, name_prefix=PREFIX).close()
    assert told == []


@needs.posix
def test_only_the_creator_unlinks_the_name(portable: Segment) -> None:
    name = str(portable.descriptor)
    attached_again(portable).close()
    assert name in named_segments()
    child = os.fork()
    if child == 0:
        portable.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert name in named_segments()
    portable.close()
    assert name not in named_segments()


@pytest.mark.parametrize("name", ["", "../etc/passwd", "a/b", "x" * 40, "nul\0", "legion-test-nosuch"])
def test_a_name_that_is_none_of_ours_is_refused(name: str) -> None:
    with pytest.raises(InvalidHandle):
        attach_segment("portable", name, SIZE)


def test_a_prefix_that_makes_too_long_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 22"):
        create_segment("portable", SIZE, name_prefix="x" * 23)


def test_a_portable_block_cannot_be_isolated(portable: Segment) -> None:
    assert not portable.isolate(0, PAGE)
    portable.rejoin(0, PAGE)
    assert not portable.isolated_clean(0, PAGE)


def test_a_system_without_private_mappings_of_shared_memory_gets_a_copy(
    portable: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mmap.mmap

    def without_private(fd: int, length: int, **options: Any) -> mmap.mmap:
        if options.get("access") == mmap.ACCESS_COPY:
            raise OSError(errno.EINVAL, "as macOS says")
        return real(fd, length, **options)

    put(portable.shared_address() + PAGE, b"hello")
    monkeypatch.setattr(mmap, "mmap", without_private)
    block = portable.map_block(PAGE, PAGE)
    assert get(block.address, 5) == b"hello"
    assert block.dirty(0, PAGE)
    put(block.address, b"HELLO")
    assert get(portable.shared_address() + PAGE, 5) == b"hello"
