from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from legion_shm.errors import InvalidHandle
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle, new_arena_id, round_up

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
HANDLES = st.builds(BlockHandle, U64, U32, U64, st.integers(1, 2**64 - 1), U64)
GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(HANDLES)
def test_a_handle_survives_the_wire(handle: BlockHandle) -> None:
    packed: bytes = msgpack.packb(handle.to_wire())
    assert BlockHandle.from_wire(msgpack.unpackb(packed)) == handle


@given(GARBAGE)
def test_garbage_from_the_wire_is_an_invalid_handle_and_nothing_else(obj: object) -> None:
    try:
        handle = BlockHandle.from_wire(obj)
    except InvalidHandle:
        return
    assert handle.to_wire() == obj


@pytest.mark.parametrize(
    "wire",
    [
        None,
        [],
        [1, 2, 0, 4],
        [1, 2, 0, 4, 5, 6],
        [1, 2, 0, 4, True],
        [1, 2, 0, 4.0, 5],
        [1, 2, 0, 0, 5],
        [1, 2, 0, -4, 5],
        [1, 2**32, 0, 4, 5],
        [2**64, 2, 0, 4, 5],
        [1, 2, -4096, 4, 5],
        "12345",
        b"12345",
        {0: 1, 1: 2, 2: 0, 3: 4, 4: 5},
    ],
)
def test_a_malformed_handle_is_refused(wire: object) -> None:
    with pytest.raises(InvalidHandle):
        BlockHandle.from_wire(wire)


def test_a_block_that_fills_its_segment_is_within_it() -> None:
    BlockHandle(1, 0, 0, 4 * BLOCK_ALIGN, 1).check_within(4 * BLOCK_ALIGN)
    BlockHandle(1, 0, 3 * BLOCK_ALIGN, BLOCK_ALIGN, 1).check_within(4 * BLOCK_ALIGN)


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, 4 * BLOCK_ALIGN + 1),
        (4 * BLOCK_ALIGN, 1),
        (3 * BLOCK_ALIGN, BLOCK_ALIGN + 1),
        (2**64 - BLOCK_ALIGN, BLOCK_ALIGN),
        (BLOCK_ALIGN, 2**64 - BLOCK_ALIGN),
        (1, 1),
        (BLOCK_ALIGN // 2, 1),
        (-BLOCK_ALIGN, BLOCK_ALIGN),
        (0, 0),
    ],
)
def test_a_block_outside_of_its_segment_or_off_a_page_is_refused(offset: int, nbytes: int) -> None:
    with pytest.raises(InvalidHandle):
        BlockHandle(1, 0, offset, nbytes, 1).check_within(4 * BLOCK_ALIGN)


def test_sizes_are_rounded_up_to_whole_pages() -> None:
    assert [round_up(n, 8) for n in (0, 1, 7, 8, 9)] == [0, 8, 8, 8, 16]
    assert BlockHandle(1, 0, 0, BLOCK_ALIGN + 1, 1).span == 2 * BLOCK_ALIGN


def test_arenas_have_different_ids() -> None:
    assert len({new_arena_id() for _ in range(100)}) == 100
