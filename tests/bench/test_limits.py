from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from legion_shm.native_bench.limits import Limits, build_program, measure_limits
from legion_shm.native_bench.schedule import parse_sizes
from tests import needs

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler on this machine"
)


@needs_compiler
def test_the_program_is_built_once_and_measures_every_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    limits, sizes = Limits(), parse_sizes("64KB")
    assert measure_limits(sizes, quick=True, limits=limits, show=lambda text: None) == ""
    names = {row.case for row in limits.rows(sizes)}
    assert names == {
        "copy_warm_1", "copy_warm_2", "copy_warm_1_nt", "copy_warm_2_nt", "copy_fresh_memfd", "fault",
        "read_whole", "touch", "wake_spin", "wake_futex", "wake_eventfd",
    }  # fmt: skip
    assert all(row.min >= 0 and row.median > 0 for row in limits.rows(sizes))
    (program,) = [path for path in (tmp_path / "legion-shm").iterdir() if path.is_file()]
    made = program.stat().st_mtime_ns
    assert build_program() == (program, "")
    assert program.stat().st_mtime_ns == made


@needs.posix
def test_without_a_compiler_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    program, reason = build_program()
    assert program is None
    assert "no C compiler" in reason


@needs.posix
def test_a_compiler_that_fails_is_a_reason_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    program, reason = build_program()
    assert program is None
    assert "failed" in reason
