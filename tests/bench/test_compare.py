from __future__ import annotations

from legion_shm.native_bench.compare import compare
from tests.bench.canned import canned


def test_a_planted_regression_is_found_and_nothing_else() -> None:
    comparison = compare(canned(slower=2.0), canned())
    assert {change.row.case for change in comparison.regressions} == {"legion"}
    assert all(1.9 < change.factor < 2.1 for change in comparison.regressions)
    assert abs(comparison.drift - 1) < 0.01


def test_a_machine_that_is_slower_as_a_whole_is_no_regression() -> None:
    comparison = compare(canned(machine=1.8), canned())
    assert comparison.regressions == ()
    assert abs(comparison.drift - 1.8) < 0.01
    assert all(
        0.95 < change.factor < 1.05 for change in comparison.changes if change.row.section == "transfer"
    )


def test_a_regression_shows_through_a_slower_machine() -> None:
    comparison = compare(canned(slower=1.6, machine=1.8), canned())
    assert {change.row.case for change in comparison.regressions} == {"legion"}


def test_what_became_faster_is_said() -> None:
    comparison = compare(canned(slower=0.5), canned())
    assert not comparison.regressions
    assert {change.row.case for change in comparison.changes if change.verdict == "faster"} == {"legion"}


def test_a_result_beside_itself_has_changed_nowhere() -> None:
    comparison = compare(canned(), canned())
    assert {change.verdict for change in comparison.changes} == {"same"}
    assert comparison.warnings == ()


def test_a_change_within_the_intervals_is_no_regression() -> None:
    old = canned()
    rows = [row.model_copy(update={"low": row.median / 2, "high": row.median * 3}) for row in old.rows]
    assert compare(canned(slower=2.0), old.model_copy(update={"rows": tuple(rows)})).regressions == ()


def test_another_machine_and_another_length_are_pointed_out() -> None:
    new = canned(quick=True).model_copy(update={"machine": {"processor": "another", "cpus": 64}})
    warnings = " ".join(compare(new, canned()).warnings)
    assert "another" in warnings
    assert "--quick" in warnings


def test_less_throughput_is_a_regression() -> None:
    old = canned()
    rows = [
        row.model_copy(update={"median": 1.0, "low": 0.9, "high": 1.1}) if row.unit == "GB/s" else row
        for row in old.rows
    ]
    comparison = compare(old.model_copy(update={"rows": tuple(rows)}), old)
    assert [change.row.section for change in comparison.regressions] == ["throughput"]
