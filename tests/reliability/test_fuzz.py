"""A few seconds of the fuzzing that `make fuzz` does for minutes, and the kept corpus."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.fuzz import CORPUS, TARGETS, answer, fuzz, seeds


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_a_peer_sends_is_refused_or_understood(target: str) -> None:
    tried, answers = fuzz(target, seconds=1.5, seed=0)
    assert tried > 200
    assert answers >= 5


def test_the_command_runs_every_target() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.fuzz", "--seconds", "0.1"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_good_inputs_are_understood(target: str) -> None:
    assert answer(target, seeds(target)[len(list(CORPUS.glob(f"{target}-*")))]) == "accepted"


def test_an_error_of_another_kind_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> None:
        if b"\xff" in data:
            raise IndexError("list index out of range")

    monkeypatch.setitem(TARGETS, "codec", broken)
    with pytest.raises(AssertionError, match="gives IndexError"):
        fuzz("codec", seconds=5.0, seed=0)
