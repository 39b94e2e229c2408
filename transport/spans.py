"""Which parts of a range of numbers are in a set: disjoint half-open spans, merged where they meet.

Owns that bookkeeping and nothing else. Not thread-safe: its users hold a lock.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

__all__ = ["Spans"]


class Spans:
    """A set of whole numbers as sorted spans ``[start, end)``."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        if start >= end:
            return
        first = bisect_left(self._ends, start)  # the first span that ends at or after start
        last = bisect_right(self._starts, end)  # behind the last one that starts at or before end
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def remove(self, start: int, end: int) -> None:
        if start >= end:
            return
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last:
            return
        left, right = self._starts[first], self._ends[last - 1]
        kept = [span for span in ((left, start), (end, right)) if span[0] < span[1]]
        self._starts[first:last] = [span[0] for span in kept]
        self._ends[first:last] = [span[1] for span in kept]

    def covers(self, start: int, end: int) -> bool:
        """Whether all of ``[start, end)`` is in the set."""
        if start >= end:
            return True
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and end <= self._ends[at]

    def touches(self, start: int, end: int) -> bool:
        """Whether any of ``[start, end)`` is in the set."""
        return start < end and bisect_right(self._ends, start) < bisect_left(self._starts, end)

    def take(self) -> tuple[int, int] | None:
        """Remove one span and give it; None where the set is empty."""
        if not self._starts:
            return None
        return self._starts.pop(), self._ends.pop()

    def __bool__(self) -> bool:
        return bool(self._starts)
