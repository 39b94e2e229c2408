"""The codec's own figures: every case is timed, and compared with another checkout's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from legion_shm.native_bench.codec import CASES, Codec

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", CASES)
def test_each_case_can_be_encoded_and_decoded_again_and_again(name: str) -> None:
    encode, decode = Codec().figures(name)
    assert 0 < encode < 10e6
    assert 0 < decode < 10e6


def test_a_checkout_is_compared_with_another_case_by_case() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "legion_shm.native_bench.codec", "--against", str(REPO), "--turns", "1"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    head, *rows = done.stdout.splitlines()
    assert head.split("  ")[0] == "case"
    assert [next(name for name in CASES if row.startswith(name)) for row in rows] == list(CASES)
    ratios = [[float(cell) for cell in row.split()[-2:]] for row in rows]
    assert all(0.01 < ratio < 100 for pair in ratios for ratio in pair)
