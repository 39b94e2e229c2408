"""Two results side by side: what has become slower, what faster, and by how much the machine itself differs.

Owns the judgement. Pure. The drift of the machine is the middle of the changes of what is not ours (limits,
and
other ways' transfers); a change of ours counts beside that drift. It is a regression where it is more than
the threshold and the 95 % intervals of the medians, drift allowed for, do not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from legion_shm.native_bench.model import Result, Row

__all__ = ["THRESHOLD", "Change", "Comparison", "compare"]

THRESHOLD = 1.25
"""Runs of one version on one noisy machine differ by as much."""

_STEADY_SECTIONS = frozenset({"transfer", "control", "start", "throughput", "path", "memory"})


@dataclass(frozen=True)
class Change:
    """One figure then and now. ``factor``: how much slower it is now, the machine's drift taken out."""

    row: Row
    before: Row
    factor: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """``drift``: how much slower the machine was. ``warnings``: why the two may not be comparable."""

    changes: tuple[Change, ...]
    drift: float
    warnings: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict == "slower")


def compare(new: Result, old: Result, *, threshold: float = THRESHOLD) -> Comparison:
    """Match rows by name; judge those of ours."""
    before = {row.key: row for row in old.rows}
    pairs = [(row, before[row.key]) for row in new.rows if row.key in before]
    ours = {case.name for case in new.cases if case.kind == "legion"}
    steady = [(row, then) for row, then in pairs if _is_yardstick(row, ours)]
    drift = _middle([_slower(row, then) for row, then in steady]) if steady else 1.0
    changes: list[Change] = []
    for row, then in pairs:
        if _is_yardstick(row, ours) or row.section not in _STEADY_SECTIONS:
            continue
        scale = drift if row.unit in ("us", "GB/s") else 1.0
        factor = _slower(row, then) / scale
        changes.append(Change(row, then, factor, _verdict(row, then, factor, scale, threshold)))
    changes.sort(key=lambda change: -change.factor)
    return Comparison(tuple(changes), drift, _warnings(new, old, len(steady)))


def _is_yardstick(row: Row, ours: set[str]) -> bool:
    if row.section == "limit":
        return row.metric == "time" and row.size_bytes != 4096
    if row.section == "transfer":
        return row.case not in ours and row.metric == "round_trip"
    return row.case in ("zeromq-bare", "python-torch")


def _slower(row: Row, then: Row) -> float:
    """How many times slower now; for GB/s how many times less."""
    new, old = (then.median, row.median) if row.unit == "GB/s" else (row.median, then.median)
    if old <= 0:
        return 1.0 if new <= 0 else float("inf")
    return new / old


def _verdict(row: Row, then: Row, factor: float, scale: float, threshold: float) -> str:
    if row.unit == "GB/s":
        worse, better = row.high * scale < then.low, row.low * scale > then.high
    else:
        worse, better = row.low / scale > then.high, row.high / scale < then.low
    if factor > threshold and worse:
        return "slower"
    if factor < 1 / threshold and better:
        return "faster"
    return "same"


def _warnings(new: Result, old: Result, steady: int) -> tuple[str, ...]:
    warnings = [
        f"{fact}: {old.machine.get(fact)} then, {new.machine.get(fact)} now"
        for fact in ("processor", "cpus", "kernel", "python")
        if new.machine.get(fact) != old.machine.get(fact)
    ]
    if new.quick != old.quick:
        warnings.append("one of the two is a --quick run: fewer samples, wider intervals")
    if not steady:
        warnings.append("the two have no yardstick in common (limits or other ways): drift is not taken out")
    return tuple(warnings)


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
