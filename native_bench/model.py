"""A result: what is written to JSON, and read back for comparison and reports.

Owns the format and its version. Every figure is a `Row`; a row is named by section, case, metric, size and
use,
and that name is what two results are compared by. Reading is strict: a file that is no result, or of another
version, raises BenchmarkError. It computes nothing but looks rows up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from legion_shm.errors import BenchmarkError
from legion_shm.native_bench.summary import Summary

__all__ = ["FORMAT", "CaseInfo", "Goal", "Missing", "Result", "Row", "read_result", "write_result"]

FORMAT = "legion-bench/1"
"""Changes when a reader of the old format would read a new file wrongly."""

Section = Literal["transfer", "hops", "limit", "control", "start", "throughput", "path", "memory"]
Unit = Literal["us", "GB/s", "MB", "ratio"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Part):
    """One figure: statistics over ``n`` samples in ``unit``; lower is better but for GB/s.

    ``limit`` is the physical limit that the figure stands against, as ``bound_by`` says; ``ratio`` is
    median over limit (for GB/s limit over median), so that 1 is perfect.
    """

    section: Section
    case: str
    metric: str
    size_bytes: int = 0
    size: str = ""
    use: str = ""
    unit: Unit = "us"
    n: int
    median: float
    p99: float
    min: float
    max: float
    mean: float
    low: float
    high: float
    limit: float | None = None
    bound_by: str = ""
    ratio: float | None = None

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        return (self.section, self.case, self.metric, self.size_bytes, self.use)

    @classmethod
    def of(
        cls,
        section: Section,
        case: str,
        metric: str,
        summary: Summary,
        *,
        size_bytes: int = 0,
        size: str = "",
        use: str = "",
        unit: Unit = "us",
    ) -> Row:
        return cls(
            section=section,
            case=case,
            metric=metric,
            size_bytes=size_bytes,
            size=size,
            use=use,
            unit=unit,
            n=summary.n,
            median=round(summary.median, 3),
            p99=round(summary.p99, 3),
            min=round(summary.min, 3),
            max=round(summary.max, 3),
            mean=round(summary.mean, 3),
            low=round(summary.low, 3),
            high=round(summary.high, 3),
        )


class CaseInfo(_Part):
    """A way, as it was set up. ``proved``: it noticed a byte that was changed on purpose."""

    name: str
    title: str
    kind: Literal["legion", "peer"]
    settings: str
    package: str = ""
    version: str = ""
    proved: bool = False


class Missing(_Part):
    """What was not measured, and why."""

    what: str
    why: str


class Goal(_Part):
    """A goal and what came of it; ``met`` is None where the figures that it needs are not there."""

    goal: str
    wanted: str
    measured: str
    met: bool | None


class Result(_Part):
    """One run."""

    format: Literal["legion-bench/1"] = "legion-bench/1"
    version: str
    date: str
    quick: bool
    duration_s: float
    settings: Mapping[str, str]
    machine: Mapping[str, str | int | float]
    packages: Mapping[str, str]
    cases: tuple[CaseInfo, ...]
    rows: tuple[Row, ...]
    goals: tuple[Goal, ...] = ()
    not_measured: tuple[Missing, ...] = Field(default=())

    def find(self, section: str, case: str, metric: str, size_bytes: int = 0, use: str = "") -> Row | None:
        key = (section, case, metric, size_bytes, use)
        return next((row for row in self.rows if row.key == key), None)

    def title_of(self, name: str) -> str:
        return next((case.title for case in self.cases if case.name == name), name)

    def kind_of(self, name: str) -> str:
        return next((case.kind for case in self.cases if case.name == name), "")


def read_result(path: str | os.PathLike[str]) -> Result:
    """Raises BenchmarkError naming the file and what is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"cannot read the result {path}: {error}") from error
    try:
        return Result.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BenchmarkError(
            f"{path} is no result of format {FORMAT}: {where}: {first['msg']}; make it anew with "
            "`legion bench --json`"
        ) from None


def write_result(result: Result, path: str | os.PathLike[str]) -> None:
    Path(path).write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
