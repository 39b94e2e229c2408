from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from legion_shm.errors import StaleHandle
from legion_shm.transport.allocator import BlockAllocator
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle, round_up

PAGE = BLOCK_ALIGN


class AllocatorAgainstItsModel(RuleBasedStateMachine):
    """Any sequence of calls keeps blocks apart, accounts for each page and never repeats a generation."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(7)
        self.segments: dict[int, int] = {}
        self.live: list[BlockHandle] = []
        self.freed: list[BlockHandle] = []
        self.generations: set[int] = set()
        self.next_segment = 0
        self.peak = 0

    @rule(pages=st.integers(1, 40))
    def add_segment(self, pages: int) -> None:
        self.allocator.add_segment(self.next_segment, pages * PAGE)
        self.segments[self.next_segment] = pages * PAGE
        self.next_segment += 1

    @rule(nbytes=st.integers(1, 12 * PAGE))
    def reserve(self, nbytes: int) -> None:
        fits = round_up(nbytes) <= self.allocator.largest_free
        handle = self.allocator.reserve(nbytes)
        assert (handle is not None) == fits
        if handle is None:
            return
        assert handle.arena == 7
        assert handle.nbytes == nbytes
        handle.check_within(self.segments[handle.segment])
        assert handle.generation not in self.generations
        self.generations.add(handle.generation)
        self.live.append(handle)
        self.peak = max(self.peak, sum(h.span for h in self.live))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        handle = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.allocator.free(handle)
        self.freed.append(handle)

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def free_again(self, data: st.DataObject) -> None:
        with pytest.raises(StaleHandle):
            self.allocator.free(data.draw(st.sampled_from(self.freed)))

    @rule()
    def remove_an_idle_segment(self) -> None:
        for segment in self.allocator.idle_segments()[:1]:
            self.allocator.remove_segment(segment)
            del self.segments[segment]

    @invariant()
    def blocks_do_not_overlap(self) -> None:
        spans = sorted((h.segment, h.offset, h.offset + h.span) for h in self.live)
        for (segment, _, end), (other, start, _) in pairwise(spans):
            assert segment != other or end <= start

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        assert self.allocator.total_bytes == sum(self.segments.values())
        assert self.allocator.live_bytes == sum(h.span for h in self.live)
        assert self.allocator.peak_bytes == self.peak
        assert self.allocator.blocks == len(self.live)
        assert set(self.allocator.live()) == set(self.live)

    @invariant()
    def free_neighbours_are_one_extent(self) -> None:
        largest = 0
        for segment, nbytes in self.segments.items():
            edge = 0
            for start, end in sorted(
                (h.offset, h.offset + h.span) for h in self.live if h.segment == segment
            ):
                largest = max(largest, start - edge)
                edge = end
            largest = max(largest, nbytes - edge)
        assert self.allocator.largest_free == largest

    @invariant()
    def idle_segments_are_the_empty_ones(self) -> None:
        used = {h.segment for h in self.live}
        idle = self.allocator.idle_segments()
        assert set(idle) == set(self.segments) - used
        assert [self.segments[s] for s in idle] == sorted((self.segments[s] for s in idle), reverse=True)


AllocatorAgainstItsModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_allocator_against_its_model = AllocatorAgainstItsModel.TestCase


def allocator_of(*pages: int) -> BlockAllocator:
    allocator = BlockAllocator(1)
    for segment, count in enumerate(pages):
        allocator.add_segment(segment, count * PAGE)
    return allocator


def reserved(allocator: BlockAllocator, nbytes: int) -> BlockHandle:
    handle = allocator.reserve(nbytes)
    assert handle is not None
    return handle


def test_a_freed_block_is_used_again_before_untouched_memory() -> None:
    allocator = allocator_of(100)
    first = reserved(allocator, 3 * PAGE)
    reserved(allocator, PAGE)
    allocator.free(first)
    again = reserved(allocator, 3 * PAGE)
    assert again.offset == first.offset
    assert again.generation != first.generation


def test_the_smallest_extent_that_holds_a_block_is_taken() -> None:
    allocator = allocator_of(10, 4, 6)
    assert reserved(allocator, 4 * PAGE).segment == 1
    assert reserved(allocator, 5 * PAGE).segment == 2


def test_a_handle_that_differs_in_any_field_is_stale() -> None:
    allocator = allocator_of(10)
    handle = reserved(allocator, PAGE)
    for change in ({"arena": 2}, {"segment": 3}, {"offset": PAGE}, {"nbytes": 5}, {"generation": 99}):
        with pytest.raises(StaleHandle):
            allocator.free(replace(handle, **change))
    allocator.free(handle)


def test_a_segment_in_use_is_not_removed() -> None:
    allocator = allocator_of(2)
    handle = reserved(allocator, PAGE)
    with pytest.raises(ValueError, match="still holds 1 block"):
        allocator.remove_segment(0)
    allocator.free(handle)
    allocator.remove_segment(0)
    assert allocator.reserve(1) is None
    assert allocator.total_bytes == 0


def test_nonsense_is_refused() -> None:
    allocator = allocator_of(2)
    with pytest.raises(ValueError, match="already"):
        allocator.add_segment(0, PAGE)
    with pytest.raises(ValueError, match="holds no block"):
        allocator.add_segment(1, PAGE - 1)
    with pytest.raises(ValueError, match="at least one byte"):
        allocator.reserve(0)
