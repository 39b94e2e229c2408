"""Spans against a plain set of numbers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from legion_shm.transport.spans import Spans

_EDGE = 24
_edges = st.tuples(st.integers(0, _EDGE), st.integers(0, _EDGE))
_steps = st.lists(st.tuples(st.sampled_from(["add", "remove"]), _edges), max_size=20)


@given(steps=_steps, asked=_edges)
def test_spans_are_a_set_of_numbers(steps: list[tuple[str, tuple[int, int]]], asked: tuple[int, int]) -> None:
    spans, numbers = Spans(), set[int]()
    for step, (start, end) in steps:
        if step == "add":
            spans.add(start, end)
            numbers |= set(range(start, end))
        else:
            spans.remove(start, end)
            numbers -= set(range(start, end))
    wanted = set(range(*asked))
    assert spans.covers(*asked) == (wanted <= numbers)
    assert spans.touches(*asked) == bool(wanted & numbers)
    assert bool(spans) == bool(numbers)
    taken: list[tuple[int, int]] = []
    while (span := spans.take()) is not None:
        taken.append(span)
    assert {number for span in taken for number in range(*span)} == numbers
    ordered = sorted(taken)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(ordered))
