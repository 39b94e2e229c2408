from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout  # the built-in one from 3.11 on

import pytest

from legion_shm.errors import ArenaFull, ForkedError, InvalidHandle, StaleHandle
from legion_shm.transport import arena as arena_module
from legion_shm.transport.arena import SEGMENT_STEP_BYTES, Arena, Block
from legion_shm.transport.handles import BLOCK_ALIGN
from legion_shm.transport.segment import Segment, SegmentKind, create_segment
from tests import needs

PAGE = BLOCK_ALIGN
STEP = SEGMENT_STEP_BYTES


KIND: SegmentKind = "portable" if needs.WINDOWS else "memfd"


class Maker:
    """Stands for the supervisor: makes segments, up to ``limit_bytes`` of them as a machine would."""

    def __init__(self, kind: SegmentKind = KIND, limit_bytes: int | None = None) -> None:
        self.kind: SegmentKind = kind
        self.limit_bytes = limit_bytes
        self.sizes: list[int] = []
        self.made: dict[int, Segment] = {}
        self.before: Callable[[], object] = lambda: None

    def grow(self, nbytes: int) -> tuple[int, Segment]:
        self.before()
        held = sum(segment.nbytes for segment in self.made.values())
        if self.limit_bytes is not None and held + nbytes > self.limit_bytes:
            raise ArenaFull("the machine has no more")
        segment = create_segment(self.kind, nbytes, name_prefix="legion-test-")
        number = len(self.sizes)
        self.sizes.append(nbytes)
        self.made[number] = segment
        return number, segment

    def shrink(self, segment_id: int) -> None:
        del self.made[segment_id]


@pytest.fixture
def maker() -> Iterator[Maker]:
    maker = Maker()
    yield maker
    for segment in maker.made.values():
        segment.close()


def arena_of(maker: Maker, quota_bytes: int = 64 * STEP, **options: object) -> Arena:
    options.setdefault("full_wait_s", 0.0)
    return Arena(arena_id=5, grow=maker.grow, quota_bytes=quota_bytes, **options)  # type: ignore[arg-type]


def test_a_block_is_writable_memory_that_the_segment_shares(maker: Maker) -> None:
    arena = arena_of(maker)
    block = arena.reserve(5000)
    ctypes.memset(block.address, 7, 5000)
    assert block.handle.arena == 5
    assert block.handle.nbytes == 5000
    view = maker.made[block.handle.segment].map_block(block.handle.offset, 5000)
    assert ctypes.string_at(view.address, 5000) == b"\7" * 5000


def test_a_freed_block_is_used_again_with_another_generation(maker: Maker) -> None:
    arena = arena_of(maker)
    first = arena.reserve(PAGE)
    arena.free(first.handle)
    again = arena.reserve(PAGE)
    assert again.address == first.address
    assert again.handle.generation > first.handle.generation
    with pytest.raises(StaleHandle):
        arena.free(first.handle)
    arena.free(again.handle)
    with pytest.raises(StaleHandle):
        arena.free(again.handle)


def test_an_arena_grows_by_what_is_asked_or_a_quarter_and_by_whole_steps(maker: Maker) -> None:
    arena = arena_of(maker, quota_bytes=64 * STEP)
    for request in (1, 16 * STEP, STEP, 6 * STEP, STEP):
        arena.reserve(request)
    assert maker.sizes == [STEP, 16 * STEP, 5 * STEP, 6 * STEP]
    assert arena.stats().total_bytes == 28 * STEP


def test_growth_is_clipped_to_what_the_quota_leaves(maker: Maker) -> None:
    arena = arena_of(maker, quota_bytes=STEP + 3 * PAGE)
    arena.reserve(STEP)
    arena.reserve(2 * PAGE)
    assert maker.sizes == [STEP, 3 * PAGE]
    with pytest.raises(ArenaFull, match="no room"):
        arena.reserve(2 * PAGE)
    arena.reserve(PAGE)


def test_a_block_over_the_quota_fails_at_once(maker: Maker) -> None:
    arena = arena_of(maker, quota_bytes=STEP, full_wait_s=3600.0)
    with pytest.raises(ArenaFull, match="can never fit"):
        arena.reserve(STEP + 1)
    assert maker.sizes == []


def test_a_full_arena_waits_for_a_block_to_be_freed(maker: Maker) -> None:
    arena = arena_of(maker, quota_bytes=STEP, full_wait_s=30.0)
    held = arena.reserve(STEP)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(arena.reserve, STEP)
        with pytest.raises(FutureTimeout):
            waiting.result(timeout=0.05)
        arena.free(held.handle)
        assert waiting.result(timeout=10).address == held.address


def test_a_full_arena_asks_its_owner_to_wait(maker: Maker) -> None:
    def free(_: float) -> bool:
        arena.free(held.handle)
        return True

    arena = arena_of(maker, quota_bytes=STEP, full_wait_s=30.0, wait=free)
    held = arena.reserve(STEP)
    assert arena.reserve(1).address == held.address


def test_a_full_arena_gives_up_in_time(maker: Maker) -> None:
    waits: list[float] = []

    def wait(timeout_s: float) -> bool:
        waits.append(timeout_s)
        return False

    arena = arena_of(maker, quota_bytes=STEP, full_wait_s=0.05, wait=wait)
    arena.reserve(STEP)
    with pytest.raises(ArenaFull, match=r"1 blocks use .* let go of results"):
        arena.reserve(1)
    assert waits
    assert all(0 < timeout_s <= 0.05 for timeout_s in waits)


def test_idle_segments_are_given_up_for_a_block_that_fits_none_of_them(maker: Maker) -> None:
    arena = arena_of(maker, quota_bytes=4 * STEP, shrink=maker.shrink)
    small = [arena.reserve(STEP) for _ in range(3)]
    for block in small[:2]:
        arena.free(block.handle)
    with pytest.raises(ArenaFull, match="no room"):
        arena.reserve(4 * STEP)
    assert sorted(maker.made) == [0, 1, 2]
    arena.reserve(3 * STEP)
    assert sorted(maker.made) == [2, 3]
    assert arena.stats().total_bytes == 4 * STEP
    assert arena.trim() == []


def test_without_shrink_the_next_trim_tells_which_segments_were_given_up(maker: Maker) -> None:
    arena = arena_of(maker, quota_bytes=2 * STEP)
    arena.free(arena.reserve(STEP).handle)
    arena.reserve(2 * STEP)
    assert arena.trim() == [0]
    assert arena.trim() == []


def test_a_machine_short_of_memory_is_asked_for_less_and_then_for_what_lies_idle() -> None:
    maker = Maker(limit_bytes=9 * STEP)
    arena = arena_of(maker, shrink=maker.shrink)
    arena.reserve(8 * STEP)
    arena.free(arena.reserve(STEP // 2).handle)
    assert maker.sizes == [8 * STEP, STEP // 2]
    arena.reserve(STEP)
    assert maker.sizes == [8 * STEP, STEP // 2, STEP]
    assert sorted(maker.made) == [0, 2]
    with pytest.raises(ArenaFull, match="no room") as caught:
        arena.reserve(STEP)
    assert isinstance(caught.value.__cause__, ArenaFull)


def test_an_error_of_grow_reaches_the_caller_and_the_arena_works_on(maker: Maker) -> None:
    arena = arena_of(maker)

    def fail() -> None:
        raise ConnectionError("the supervisor is gone")

    maker.before = fail
    with pytest.raises(ConnectionError):
        arena.reserve(1)
    maker.before = lambda: None
    arena.reserve(1)


def test_a_block_that_cannot_be_mapped_is_not_lost(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = arena_of(maker)
    arena.free(arena.reserve(1).handle)

    def fail(*_: object) -> None:
        raise OSError("no address range left")

    monkeypatch.setattr(maker.made[0], "prefault", fail)
    with pytest.raises(OSError, match="no address range"):
        arena.reserve(1)
    assert arena.stats().blocks == 0


def test_one_thread_grows_while_others_free_and_take(maker: Maker) -> None:
    arena = arena_of(maker, full_wait_s=30.0)
    held = arena.reserve(STEP)
    growing, go_on = threading.Event(), threading.Event()

    def before() -> None:
        growing.set()
        assert go_on.wait(10)

    maker.before = before
    with ThreadPoolExecutor(2) as pool:
        grower = pool.submit(arena.reserve, 3 * STEP)
        assert growing.wait(10)
        other = pool.submit(arena.reserve, STEP)
        arena.free(held.handle)
        assert other.result(timeout=10).address == held.address
        go_on.set()
        assert grower.result(timeout=10).handle.segment == 1
    assert maker.sizes == [STEP, 3 * STEP]


def test_many_threads_never_share_a_block(maker: Maker) -> None:
    arena = arena_of(maker, quota_bytes=4 * STEP, full_wait_s=30.0)

    def work(seed: int) -> int:
        wrong = 0
        for turn in range(60):
            nbytes = 1 + (seed * 7919 + turn * 104729) % (STEP // 2)
            block = arena.reserve(nbytes)
            ctypes.memset(block.address, seed, nbytes)
            wrong += ctypes.string_at(block.address, nbytes) != bytes([seed]) * nbytes
            arena.free(block.handle)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(1, 9))) == 0
    stats = arena.stats()
    assert (stats.live_bytes, stats.blocks) == (0, 0)
    assert stats.peak_live_bytes <= stats.total_bytes <= 4 * STEP


def test_trim_closes_the_idle_segments(maker: Maker) -> None:
    arena = arena_of(maker)
    blocks = [arena.reserve(size) for size in (STEP, 3 * STEP, 2 * STEP)]
    for block in (blocks[0], blocks[1]):
        arena.free(block.handle)
    assert arena.trim() == [1, 0]
    assert arena.stats().total_bytes == 2 * STEP
    for number in (0, 1):
        with pytest.raises(InvalidHandle, match="closed"):
            maker.made[number].map_block(0, PAGE)
    arena.reserve(STEP)


def test_a_condemned_arena_gives_no_more_blocks_and_takes_them_back(maker: Maker) -> None:
    arena = arena_of(maker)
    block = arena.reserve(1)
    arena.condemn()
    with pytest.raises(ArenaFull, match="closed to new blocks"):
        arena.reserve(1)
    arena.free(block.handle)
    assert arena.stats().blocks == 0


def test_condemning_wakes_who_waits_for_room(maker: Maker) -> None:
    arena = arena_of(maker, quota_bytes=STEP, full_wait_s=30.0)
    arena.reserve(STEP)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(arena.reserve, 1)
        with pytest.raises(FutureTimeout):
            waiting.result(timeout=0.05)
        arena.condemn()
        with pytest.raises(ArenaFull, match="closed to new blocks"):
            waiting.result(timeout=10)


def test_a_block_stays_writable_after_its_arena_is_closed(maker: Maker) -> None:
    arena = arena_of(maker)
    block = arena.reserve(STEP)
    arena.close()
    ctypes.memset(block.address, 1, STEP)
    arena.free(block.handle)


@needs.linux
def test_the_owners_write_after_isolation_is_its_own(maker: Maker) -> None:
    arena = arena_of(maker)
    block = arena.reserve(PAGE)
    segment = maker.made[0]
    ctypes.memset(block.address, 1, PAGE)
    assert arena.isolate(block.handle)
    assert arena.isolate(block.handle)
    ctypes.memset(block.address, 2, PAGE)
    view = segment.map_block(block.handle.offset, PAGE)
    assert ctypes.string_at(view.address, 4) == b"\1\1\1\1"
    arena.rejoin(block.handle)
    arena.rejoin(block.handle)
    assert ctypes.string_at(block.address, 4) == b"\1\1\1\1"


@needs.linux
def test_freeing_an_isolated_block_shares_it_again(maker: Maker) -> None:
    arena = arena_of(maker)
    first = arena.reserve(PAGE)
    arena.isolate(first.handle)
    ctypes.memset(first.address, 9, PAGE)
    arena.free(first.handle)
    with pytest.raises(StaleHandle):
        arena.isolate(first.handle)
    again = arena.reserve(PAGE)
    assert again.address == first.address
    ctypes.memset(again.address, 3, PAGE)
    view = maker.made[0].map_block(again.handle.offset, PAGE)
    assert ctypes.string_at(view.address, 4) == b"\3\3\3\3"


def test_a_portable_arena_says_that_it_cannot_isolate() -> None:
    maker = Maker("portable")
    arena = arena_of(maker)
    block = arena.reserve(PAGE)
    assert not arena.isolate(block.handle)
    arena.rejoin(block.handle)
    arena.free(block.handle)
    arena.close()


def forked(action: Callable[[], object]) -> int:
    """The exit code of a forked child: 0 where ``action`` raised ForkedError there."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except ForkedError:
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs.fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_cannot_use_its_parents_arena(maker: Maker) -> None:
    arena = arena_of(maker)
    block: Block = arena.reserve(1)
    for action in (
        lambda: arena.reserve(1),
        lambda: arena.free(block.handle),
        lambda: arena.isolate(block.handle),
        lambda: arena.rejoin(block.handle),
        arena.trim,
        arena.stats,
        arena.condemn,
        arena.close,
    ):
        assert forked(action) == 0


def test_while_the_machine_is_short_of_memory_growth_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = Maker(limit_bytes=0)
    arena = arena_of(maker, full_wait_s=30.0)
    tries: list[None] = []

    def before() -> None:
        tries.append(None)
        if len(tries) > 6:
            maker.limit_bytes = None

    maker.before = before
    monkeypatch.setattr(arena_module, "_SHORTAGE_RETRY_S", 0.01)
    arena.reserve(1)
    assert len(tries) == 7
