from __future__ import annotations

from collections import Counter

import pytest

from legion_shm.errors import BenchmarkError
from legion_shm.native_bench.schedule import SIZES, parse_sizes, rounds_for, strides, turns

NAMES = ("a", "b", "c", "d")


def test_every_way_has_one_turn_in_every_round() -> None:
    for present in turns(NAMES, {}, 20, seed=1):
        assert sorted(present) == list(NAMES)


def test_the_order_changes_from_round_to_round_and_is_the_same_for_the_same_seed() -> None:
    rounds = list(turns(NAMES, {}, 50, seed=1))
    assert len({tuple(present) for present in rounds}) > 10
    assert rounds == list(turns(NAMES, {}, 50, seed=1))
    assert rounds != list(turns(NAMES, {}, 50, seed=2))


def test_no_way_always_follows_the_same_other_one() -> None:
    followers = Counter(
        (present[place - 1], name)
        for present in turns(NAMES, {}, 400, seed=3)
        for place, name in enumerate(present)
        if place
    )
    assert len(followers) == len(NAMES) * (len(NAMES) - 1)
    assert max(followers.values()) < 2 * min(followers.values())


def test_a_slow_way_has_fewer_turns_but_is_in_the_first_three_rounds() -> None:
    every = strides({"a": 0.01, "b": 0.01, "c": 0.012, "d": 0.2})
    assert every["a"] == every["b"] == every["c"] == 1
    assert every["d"] > 1
    counts = Counter(name for present in turns(NAMES, every, 24, seed=1) for name in present)
    assert counts["a"] == 24
    assert 3 <= counts["d"] < 12
    assert all("d" in present for present in list(turns(NAMES, every, 24, seed=1))[:3])


def test_sizes_are_named_or_any_number_of_bytes_rounded_up_to_pages() -> None:
    named = parse_sizes("64KB, 25 MB,4k")
    assert [size.label for size in named] == ["64 KB", "25 MB", "4 KB"]
    assert named[1].shape == (1, 1080, 1920, 3)
    (other,) = parse_sizes("10001B")
    assert other.nbytes == 12288
    assert other.shape == (3072,)


@pytest.mark.parametrize("text", ["", "many", "0MB", "3 parsec", "-4KB"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(BenchmarkError, match="is no size"):
        parse_sizes(text)


def test_larger_tensors_get_fewer_rounds_and_an_asked_number_is_kept() -> None:
    counts = [rounds_for(size.nbytes, quick=False) for size in SIZES]
    assert counts == sorted(counts, reverse=True)
    assert all(rounds_for(size.nbytes, quick=True) < rounds_for(size.nbytes, quick=False) for size in SIZES)
    assert rounds_for(1 << 30, quick=True, rounds=77) == 77
