"""What one message has copied already: where its next value finds it."""

from __future__ import annotations

import weakref

from hypothesis import given
from hypothesis import strategies as st

from legion_shm.transport.codec_blocks import Fresh
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 25)), max_size=25)


def block(number: int) -> BlockHandle:
    return BlockHandle(1, 1, number * BLOCK_ALIGN, BLOCK_ALIGN, number + 1)


@given(SPANS, st.lists(st.tuples(st.integers(0, 70), st.integers(1, 25)), max_size=40))
def test_bytes_are_found_where_any_copy_holds_all_of_them(
    copied: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    fresh = Fresh()
    for number, (low, nbytes) in enumerate(copied):
        fresh.note(low, nbytes, block(number), 64 * number, object())
    for low, nbytes in [*wanted, *copied]:
        holding = [
            (block(number), 64 * number + low - start)
            for number, (start, size) in enumerate(copied)
            if start <= low and low + nbytes <= start + size
        ]
        found = fresh.find(low, nbytes)
        assert found in holding if holding else found is None


def test_what_was_copied_is_kept_where_it_is_as_long_as_it_may_be_found() -> None:
    class Source:
        pass

    fresh = Fresh()
    sources = [Source() for _ in range(3)]
    alive = [weakref.ref(source) for source in sources]
    fresh.note(10, 10, block(0), 0, sources[0])
    fresh.note(40, 10, block(1), 0, sources[1])
    fresh.note(30, 30, block(2), 0, sources[2])  # holds the second one's bytes too
    sources.clear()
    assert [ref() is not None for ref in alive] == [True, False, True]
    assert fresh.find(42, 4) == (block(2), 12)
    assert fresh.handles == {block(0), block(1), block(2)}
