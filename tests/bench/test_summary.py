from __future__ import annotations

import random

import pytest

from legion_shm.native_bench.summary import percentile, ratio, summarize


def test_the_median_is_the_middle_or_between_the_two_middle_ones() -> None:
    assert summarize([3.0, 1.0, 2.0]).median == 2.0
    assert summarize([4.0, 1.0, 2.0, 3.0]).median == 2.5


def test_the_99th_percentile_of_a_hundred_is_the_second_largest_and_of_fewer_the_largest() -> None:
    hundred = [float(value) for value in range(1, 101)]
    assert summarize(hundred).p99 == 99.0
    assert summarize(hundred[:50]).p99 == 50.0


def test_one_sample_is_every_figure() -> None:
    summary = summarize([7.0])
    figures = (summary.median, summary.p99, summary.min, summary.max, summary.mean, summary.low, summary.high)
    assert figures == (7.0,) * 7
    assert summary.n == 1


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarize([])
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 0.5)


@pytest.mark.parametrize("n", [10, 40, 200])
def test_the_interval_of_the_median_holds_the_true_one_in_about_95_of_100_runs(n: int) -> None:
    source = random.Random(n)
    inside = 0
    for _ in range(1000):
        summary = summarize([source.expovariate(1.0) for _ in range(n)])
        assert summary.low <= summary.median <= summary.high
        inside += summary.low <= 0.6931 <= summary.high
    assert 930 <= inside <= 995


def test_a_ratio_to_what_is_not_there_is_none() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(None, 2.0) is None
    assert ratio(3.0, None) is None
    assert ratio(3.0, 0.0) is None
