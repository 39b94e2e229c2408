"""Statistics of samples: pure functions, with what each figure means.

Owns the choice of figures. Medians, because a shared machine's noise only ever adds; the 99th percentile,
because somebody waits for the worst of a hundred. With fewer than 100 samples it is their maximum, and ``n``
says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Summary", "percentile", "ratio", "summarize"]


@dataclass(frozen=True)
class Summary:
    """In the unit of the samples. ``low`` and ``high``: a 95 % interval of the median."""

    n: int
    median: float
    p99: float
    min: float
    max: float
    mean: float
    low: float
    high: float


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """Of sorted values, the smallest that at least that fraction of them does not exceed (nearest rank)."""
    if not ordered:
        raise ValueError("no samples")
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


def summarize(samples: Sequence[float]) -> Summary:
    """Of at least one sample. Raises ValueError."""
    ordered = sorted(samples)
    n = len(ordered)
    if not n:
        raise ValueError("no samples")
    middle = n // 2
    median = ordered[middle] if n % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    # The ranks n/2 -+ 1.96 sqrt(n)/2 enclose the median of the distribution in 95 of 100 runs.
    reach = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach) - 1)
    return Summary(
        n=n,
        median=median,
        p99=percentile(ordered, 0.99),
        min=ordered[0],
        max=ordered[-1],
        mean=sum(ordered) / n,
        low=ordered[low],
        high=ordered[max(high, low)],
    )


def ratio(value: float | None, base: float | None) -> float | None:
    """``value`` in units of ``base``; None where one of them is not there."""
    return None if value is None or not base else value / base
