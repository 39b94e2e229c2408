from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from legion_shm.errors import InvalidHandle, StaleHandle
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle
from legion_shm.transport.leases import LeaseTable

PAGE = BLOCK_ALIGN
ARENA = 7


def block(
    page: int, pages: int = 1, *, generation: int = 1, segment: int = 1, arena: int = ARENA
) -> BlockHandle:
    return BlockHandle(arena, segment, page * PAGE, pages * PAGE - 3, generation)


@pytest.fixture
def table() -> LeaseTable:
    table = LeaseTable()
    table.add_segment(ARENA, 1, 16 * PAGE)
    return table


def test_a_block_is_freed_when_its_last_lease_ends(table: LeaseTable) -> None:
    table.publish(block(0), "job")
    table.lease(block(0), "w1")
    table.lease(block(0), "w1")
    table.release(block(0), "w1")
    table.drop_holder("job")
    assert not table.has_freed
    assert table.live_blocks() == 1
    table.release(block(0), "w1")
    assert table.has_freed
    assert table.drain_freed() == {ARENA: [block(0)]}
    assert table.drain_freed() == {}
    assert table.live_blocks() == table.live_blocks(ARENA) == 0


def test_a_holder_that_is_gone_takes_all_its_leases_with_it(table: LeaseTable) -> None:
    for page in range(4):
        table.publish(block(page), "w1")
        table.lease(block(page), "w1")
    table.lease(block(3), "master")
    table.drop_holder("w1")
    table.drop_holder("w1")
    assert table.drain_freed() == {ARENA: [block(0), block(1), block(2)]}
    assert table.holds(block(3), "master")
    assert not table.holds(block(3), "w1")


@pytest.mark.parametrize("who", ["master", "w2"])
def test_more_ends_than_deliveries_are_counted_and_change_nothing(table: LeaseTable, who: str) -> None:
    table.publish(block(0), "w1")
    table.lease(block(0), "master")
    table.release_all([block(0)], "master")
    table.release(block(0), who)
    table.release(block(5), who)
    table.release(block(0, generation=2), "w1")
    assert table.over_released == 3
    assert table.holds(block(0), "w1")


@pytest.mark.parametrize(
    "handle",
    [
        block(0, segment=2),
        block(0, arena=8),
        block(15, 2),
        block(16),
        BlockHandle(ARENA, 1, 5, 10, 1),
        BlockHandle(ARENA, 1, 0, 0, 1),
    ],
    ids=["segment", "arena", "past the end", "outside", "unaligned", "empty"],
)
def test_what_was_not_granted_cannot_be_published(table: LeaseTable, handle: BlockHandle) -> None:
    with pytest.raises(InvalidHandle):
        table.publish(handle, "w1")
    assert table.live_blocks() == 0
    assert not table.holds(handle, "w1")


@pytest.mark.parametrize(
    "handle",
    [block(4, 2), block(4, 1), block(5, 1), block(3, 2), block(3, 9), block(5, 4), block(4, 2, generation=2)],
)
def test_a_block_that_overlaps_a_live_one_cannot_be_published(table: LeaseTable, handle: BlockHandle) -> None:
    table.publish(block(4, 2), "w1")
    with pytest.raises(InvalidHandle, match="overlaps"):
        table.publish(handle, "w1")
    assert table.live_blocks() == 1
    table.publish(block(3), "w1")
    table.publish(block(6), "w1")


def test_a_handle_is_checked_to_the_letter(table: LeaseTable) -> None:
    table.publish(block(4, 2), "w1")
    table.check(block(4, 2))
    with pytest.raises(InvalidHandle, match="another size"):
        table.check(block(4, 1))
    with pytest.raises(InvalidHandle, match="no such segment"):
        table.check(block(4, 2, segment=9))
    with pytest.raises(InvalidHandle, match="no such segment"):
        table.check(block(4, 2, arena=9))
    for stale in (block(4, 2, generation=0), block(5)):
        with pytest.raises(StaleHandle):
            table.check(stale)
        with pytest.raises(StaleHandle):
            table.lease(stale, "w2")
    table.drop_holder("w1")
    with pytest.raises(StaleHandle):
        table.lease(block(4, 2), "w2")


def test_freed_space_can_be_published_again_and_the_old_handle_is_stale(table: LeaseTable) -> None:
    table.publish(block(0), "w1")
    table.drop_holder("w1")
    table.publish(block(0, 3, generation=2), "w1")
    with pytest.raises(StaleHandle):
        table.check(block(0))
    assert table.drain_freed(ARENA) == {ARENA: [block(0)]}
    assert table.drain_freed(ARENA) == {}


def test_freed_blocks_can_be_had_arena_by_arena(table: LeaseTable) -> None:
    table.add_segment(8, 1, PAGE)
    table.publish(block(0), "w1")
    table.publish(block(0, arena=8), "w1")
    table.drop_holder("w1")
    assert table.drain_freed(8) == {8: [block(0, arena=8)]}
    assert table.drain_freed() == {ARENA: [block(0)]}


def test_a_segment_stays_while_a_block_in_it_lives(table: LeaseTable) -> None:
    table.add_segment(ARENA, 2, 4 * PAGE)
    table.publish(block(0, segment=2), "w1")
    assert table.arena_bytes(ARENA) == 20 * PAGE
    assert not table.remove_segment(ARENA, 2)
    assert table.remove_segment(ARENA, 1)
    assert table.arena_bytes(ARENA) == 4 * PAGE
    with pytest.raises(InvalidHandle):
        table.publish(block(0), "w1")
    table.drop_holder("w1")
    assert table.remove_segment(ARENA, 2)
    assert not table.remove_segment(99, 1)


def test_blocks_freed_before_their_owner_died_are_not_told_to_a_later_one(table: LeaseTable) -> None:
    table.publish(block(0), "w1")
    table.drop_holder("w1")
    table.condemn(ARENA)
    assert not table.has_freed
    assert table.drain_freed() == {}


def test_a_table_that_nobody_holds_anything_of_remembers_nobody(table: LeaseTable) -> None:
    for number in range(100):
        table.publish(block(0, generation=number), f"job:{number}")
        table.drop_holder(f"job:{number}")
    assert table._held == {}
    assert table._blocks == {}


def test_a_freed_block_leaves_its_neighbours_guarded(table: LeaseTable) -> None:
    for page in (0, 2, 4):
        table.publish(block(page, 2), f"w{page}")
    table.drop_holder("w2")
    for page in (0, 4):
        with pytest.raises(InvalidHandle, match="overlaps"):
            table.publish(block(page), "master")
    table.publish(block(2, 2, generation=2), "master")


def test_a_condemned_arena_takes_no_block_and_is_empty_with_its_last_one(table: LeaseTable) -> None:
    table.publish(block(0), "w1")
    table.publish(block(1), "w1")
    table.lease(block(0), "master")
    table.condemn(ARENA)
    with pytest.raises(InvalidHandle):
        table.publish(block(2), "w1")
    table.drop_holder("w1")
    assert table.drain_empty() == []
    assert table.drain_freed() == {}, "its owner is not there to be told"
    table.check(block(0))
    table.lease(block(0), "w2")
    table.release(block(0), "master")
    table.release(block(0), "w2")
    assert table.drain_empty() == [ARENA]
    assert table.drain_empty() == []
    assert table.live_blocks() == table.arena_bytes(ARENA) == 0
    with pytest.raises(InvalidHandle):
        table.check(block(0))


def test_an_arena_without_blocks_is_empty_as_soon_as_it_is_condemned(table: LeaseTable) -> None:
    table.condemn(ARENA)
    table.condemn(99)
    assert table.drain_empty() == [ARENA, 99]


class LeasesAgainstTheirModel(RuleBasedStateMachine):
    """The table agrees with a plain count of who holds what."""

    HOLDERS = ("master", "w1", "w2", "job:1")

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.granted: dict[tuple[int, int], int] = {}
        self.held: dict[BlockHandle, Counter[str]] = {}
        self.gone: list[BlockHandle] = []
        self.condemned: set[int] = set()
        self.generation = 0
        self.freed: Counter[BlockHandle] = Counter()
        self.empty: set[int] = set()
        self.over = 0
        for arena in (1, 2):
            self.grant(arena, 1, 6)

    def grant(self, arena: int, segment: int, pages: int) -> None:
        self.table.add_segment(arena, segment, pages * PAGE)
        self.granted[arena, segment] = pages * PAGE

    def live(self, data: st.DataObject) -> BlockHandle:
        return data.draw(st.sampled_from(list(self.held)))

    def settle(self) -> None:
        for handle in [h for h, holders in self.held.items() if not +holders]:
            del self.held[handle]
            self.gone.append(handle)
            if handle.arena not in self.condemned:
                self.freed[handle] += 1
        for arena in self.condemned - self.empty:
            if all(handle.arena != arena for handle in self.held):
                self.empty.add(arena)
                self.granted = {key: n for key, n in self.granted.items() if key[0] != arena}
                self.freed = Counter({h: n for h, n in self.freed.items() if h.arena != arena})

    @rule(
        arena=st.integers(1, 3),
        segment=st.integers(1, 2),
        page=st.integers(0, 6),
        nbytes=st.integers(1, 3 * PAGE),
        holder=st.sampled_from(HOLDERS),
    )
    def publish(self, arena: int, segment: int, page: int, nbytes: int, holder: str) -> None:
        self.generation += 1
        handle = BlockHandle(arena, segment, page * PAGE, nbytes, self.generation)
        room = self.granted.get((arena, segment), 0) if arena not in self.condemned else 0
        overlaps = any(
            (h.arena, h.segment) == (arena, segment)
            and h.offset < handle.offset + handle.span
            and handle.offset < h.offset + h.span
            for h in self.held
        )
        try:
            self.table.publish(handle, holder)
        except InvalidHandle:
            assert overlaps or handle.offset + nbytes > room
        else:
            assert not overlaps
            assert handle.offset + nbytes <= room
            self.held[handle] = Counter({holder: 1})

    @precondition(lambda self: self.held)
    @rule(data=st.data(), holder=st.sampled_from(HOLDERS))
    def lease(self, data: st.DataObject, holder: str) -> None:
        handle = self.live(data)
        self.table.lease(handle, holder)
        self.held[handle][holder] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data(), holder=st.sampled_from(HOLDERS))
    def release(self, data: st.DataObject, holder: str) -> None:
        handle = self.live(data)
        self.table.release(handle, holder)
        if self.held[handle][holder]:
            self.held[handle][holder] -= 1
        else:
            self.over += 1
        self.settle()

    @precondition(lambda self: self.gone)
    @rule(data=st.data(), holder=st.sampled_from(HOLDERS))
    def use_what_is_gone(self, data: st.DataObject, holder: str) -> None:
        handle = data.draw(st.sampled_from(self.gone))
        with pytest.raises((StaleHandle, InvalidHandle)):
            self.table.lease(handle, holder)
        with pytest.raises((StaleHandle, InvalidHandle)):
            self.table.check(handle)
        assert not self.table.holds(handle, holder)
        self.table.release(handle, holder)
        self.over += 1

    @rule(holder=st.sampled_from(HOLDERS))
    def drop_holder(self, holder: str) -> None:
        self.table.drop_holder(holder)
        for holders in self.held.values():
            del holders[holder]
        self.settle()

    @rule(arena=st.integers(1, 2))
    def grow(self, arena: int) -> None:
        if arena not in self.condemned and (arena, 2) not in self.granted:
            self.grant(arena, 2, 3)

    @rule(arena=st.integers(1, 2), segment=st.integers(1, 2))
    def retire(self, arena: int, segment: int) -> None:
        used = any((h.arena, h.segment) == (arena, segment) for h in self.held)
        assert self.table.remove_segment(arena, segment) == (not used and arena not in self.empty)
        if not used:
            self.granted.pop((arena, segment), None)

    @rule(arena=st.sampled_from([1, 2]), sure=st.integers(0, 5))
    def condemn(self, arena: int, sure: int) -> None:
        if not sure and arena not in self.condemned:
            self.table.condemn(arena)
            self.condemned.add(arena)
            self.settle()

    @rule(arena=st.none() | st.integers(1, 2))
    def drain(self, arena: int | None) -> None:
        drained = self.table.drain_freed(arena)
        expected = {h for h in self.freed if arena is None or h.arena == arena}
        found = [h for handles in drained.values() for h in handles]
        assert Counter(found) == Counter(expected), "each once"
        assert all(h.arena == key for key, handles in drained.items() for h in handles)
        for handle in expected:
            del self.freed[handle]

    @invariant()
    def they_agree(self) -> None:
        assert self.table.live_blocks() == len(self.held)
        assert self.table.over_released == self.over
        assert self.table.has_freed == bool(self.freed)
        for arena in (1, 2):
            assert self.table.live_blocks(arena) == sum(1 for h in self.held if h.arena == arena)
            assert self.table.arena_bytes(arena) == sum(n for (a, _), n in self.granted.items() if a == arena)
        for handle, holders in self.held.items():
            self.table.check(handle)
            assert {h for h in self.HOLDERS if self.table.holds(handle, h)} == set(+holders)

    def teardown(self) -> None:
        for holder in self.HOLDERS:
            self.drop_holder(holder)
        for arena in (1, 2):
            if arena not in self.condemned:
                self.table.condemn(arena)
        assert sorted(self.table.drain_empty()) == [1, 2]
        assert self.table.live_blocks() == 0


TestLeases = LeasesAgainstTheirModel.TestCase
TestLeases.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_a_block_is_live_while_somebody_has_a_lease_on_it() -> None:
    table = LeaseTable()
    table.add_segment(1, 1, 1 << 20)
    handle = BlockHandle(1, 1, 0, 100, 7)
    assert not table.is_live(handle)
    table.publish(handle, "w1")
    assert table.is_live(handle)
    assert not table.is_live(BlockHandle(1, 1, 0, 100, 8))
    table.release(handle, "w1")
    assert not table.is_live(handle)
