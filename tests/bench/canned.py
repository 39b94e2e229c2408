"""A small result made by hand: two of our ways, two others, limits, goals; what the reports are tested on."""

from __future__ import annotations

from legion_shm.native_bench.goals import check_goals
from legion_shm.native_bench.limits import with_limits
from legion_shm.native_bench.model import CaseInfo, Missing, Result, Row
from legion_shm.native_bench.summary import summarize
from legion_shm.native_bench.whole_path import HOPS, OTHER

MB25 = 1080 * 1920 * 3 * 4
SIZES = ((4096, "4 KB"), (MB25, "25 MB"))
BASE_US = {"legion": 200.0, "legion-resident": 120.0, "iceoryx2": 150.0, "pipe": 900.0}


def around(median: float, spread: float = 0.02) -> list[float]:
    """Samples of that median, closely around it."""
    return [median * (1 + spread * step / 10) for step in range(-10, 11)]


def transfer(case: str, nbytes: int, label: str, median_us: float) -> list[Row]:
    return [
        Row.of("transfer", case, metric, summarize(around(value)), size_bytes=nbytes, size=label, use="touch")
        for metric, value in (("round_trip", median_us), ("one_way", median_us / 2))
    ]


def canned(*, slower: float = 1.0, machine: float = 1.0, quick: bool = False) -> Result:
    """``slower``: by how much our private path is; ``machine``: by how much everything is."""
    rows: list[Row] = []
    for nbytes, label in SIZES:
        grown = 1.0 if nbytes == 4096 else 20.0
        for case, base in BASE_US.items():
            factor = machine * grown * (slower if case == "legion" else 1.0)
            rows += transfer(case, nbytes, label, base * factor)
        for name, value in (("copy_warm_1", 60.0), ("copy_warm_2", 40.0), ("touch", 2.0)):
            rows.append(
                Row.of(
                    "limit",
                    name,
                    "time",
                    summarize(around(value * grown * machine)),
                    size_bytes=nbytes,
                    size=label,
                )
            )
    rows.append(Row.of("limit", "wake_futex", "time", summarize(around(10.0 * machine))))
    for name, value in (("empty-job", 300.0), ("zeromq-bare", 50.0)):
        rows.append(Row.of("control", name, "round_trip", summarize(around(value * machine))))
    for number, hop in enumerate((*(name for _, name in HOPS), OTHER)):
        rows.append(
            Row.of(
                "hops",
                "legion",
                hop,
                summarize([1000.0 * (number + 1)]),
                size_bytes=MB25,
                size="25 MB",
                use="touch",
            )
        )
    for hop in (*(name for _, name in HOPS), "other", "total"):
        value = 900.0 if hop == "total" else 100.0
        rows.append(
            Row.of("path", "graph: passthrough", hop, summarize([value]), size_bytes=MB25, size="1080p")
        )
    rows.append(
        Row.of("throughput", "1 worker, 4 in flight", "to_worker", summarize([4.0, 5.0, 6.0]), unit="GB/s")
    )
    rows = with_limits(rows)
    return Result(
        version="1.2.3",
        date="2026-01-02T03:04Z",
        quick=quick,
        duration_s=12.5,
        settings={"order": "round robin"},
        machine={
            "processor": "Test <CPU>",
            "cpus": 2,
            "memory_gib": 8.0,
            "kernel": "6.1",
            "python": "CPython 3.11",
        },
        packages={"torch": "2.0"},
        cases=tuple(
            CaseInfo(
                name=name,
                title=f"Way {name}",
                kind="legion" if name.startswith("legion") else "peer",
                settings="as documented",
                proved=True,
            )
            for name in BASE_US
        ),
        rows=tuple(rows),
        goals=check_goals(rows),
        not_measured=(Missing(what="ray", why="the package ray is not installed"),),
    )
