"""A result on a terminal: tables that rich prints, and the words and number formats that all reports share.

Owns the tables. Times are milliseconds, whatever their size: one unit is compared at a glance. The best of
each column is bold. Printing changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from legion_shm.native_bench.compare import Comparison
from legion_shm.native_bench.model import Result, Row

__all__ = [
    "HOPS_TITLE",
    "MET",
    "SECTIONS",
    "describe",
    "format_ms",
    "format_row",
    "hops_grid",
    "print_comparison",
    "print_result",
    "transfer_grid",
    "transfer_titles",
]

MET: Mapping[bool | None, str] = {True: "met", False: "missed", None: "not measured"}

SECTIONS: Mapping[str, str] = {
    "control": "Control round trip",
    "start": "Worker starts and first use",
    "throughput": "Throughput",
    "memory": "Memory",
    "path": "Whole path: where a job's time goes",
    "limit": "Physical limits",
}

HOPS_TITLE = "Where Legion's round trips spend their time, median ms"

_WIDTH = 118  # what six sizes need; a narrower terminal wraps lines, and no figure is cut
_ROUND, _ONE = "round_trip", "one_way"


def hops_grid(result: Result) -> tuple[list[str], list[tuple[str, str, dict[str, Row]]]]:
    """Where Legion's round trips spend their time: the hops, and by way and size the row of each hop."""
    rows = [row for row in result.rows if row.section == "hops"]
    grid: dict[tuple[str, str], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row.size_bytes):
        grid.setdefault((row.case, row.size), {})[row.metric] = row
    hops = list(dict.fromkeys(row.metric for row in rows))
    return hops, [(case, size, of_hop) for (case, size), of_hop in sorted(grid.items(), key=_by_case)]


def _by_case(item: tuple[tuple[str, str], object]) -> str:
    return item[0][0]


def transfer_titles() -> dict[tuple[str, str], str]:
    """The tables of transfers by metric and use, in order."""
    return {
        (_ROUND, "touch"): "Round trip, one word of each page used, median ms",
        (_ROUND, "read"): "Round trip, read whole, median ms",
        (_ONE, "touch"): "One way, one word of each page used, median ms",
        (_ONE, "read"): "One way, read whole, median ms",
        (_ROUND, "none"): "Round trip of the handle alone, median ms",
        (_ROUND, "cuda"): "Round trip of tensors on a GPU, read whole there, median ms",
        (_ONE, "cuda"): "One way, tensors on a GPU, read whole there, median ms",
    }


def format_ms(value_us: float) -> str:
    """Three significant digits, in milliseconds."""
    value = value_us / 1000
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    if value >= 1:
        return f"{value:.2f}"
    return f"{value:.3f}"


def format_row(row: Row, *, p99: bool = False) -> str:
    """The median (or the 99th percentile) with its unit, but for milliseconds in tables of transfers."""
    value = row.p99 if p99 else row.median
    if row.unit == "us":
        text = format_ms(value)
        return text if row.section == "transfer" else f"{text} ms"
    return f"{value:.2f}" if row.unit == "ratio" else f"{value:.2f} {row.unit}"


def describe(result: Result) -> str:
    """The machine and the run in a line."""
    machine = result.machine
    return (
        f"{machine.get('processor')}, {machine.get('cpus')} CPUs, {machine.get('memory_gib')} GiB, "
        f"{machine.get('system')} {machine.get('kernel')}, {machine.get('python')}, "
        f"torch {result.packages.get('torch', '?')}; {result.date}, {result.duration_s:.0f} s"
    )


def transfer_grid(
    result: Result, metric: str, use: str
) -> tuple[list[tuple[int, str]], list[tuple[str, dict[int, Row]]]]:
    """Sizes (bytes, label) and, by way in the order of the run, its row of each size."""
    rows = [row for row in result.rows if (row.section, row.metric, row.use) == ("transfer", metric, use)]
    sizes = sorted({(row.size_bytes, row.size) for row in rows})
    grid: list[tuple[str, dict[int, Row]]] = []
    for case in result.cases:
        of_name = {row.size_bytes: row for row in rows if row.case == case.name}
        if of_name:
            grid.append((case.name, of_name))
    return sizes, grid


def print_result(result: Result, console: Console) -> None:
    console.width = max(console.width, _WIDTH)
    console.print(f"\n[bold]Legion SHM {result.version}[/bold], {describe(result)}\n", highlight=False)
    for (metric, use), title in transfer_titles().items():
        sizes, grid = transfer_grid(result, metric, use)
        if grid:
            console.print(_transfer_table(result, f"{title} (p99)", sizes, grid))
    hops, lines = hops_grid(result)
    if lines:
        table = Table("way", "size", *hops, title=HOPS_TITLE, title_justify="left")
        for case, size, of_hop in lines:
            table.add_row(case, size, *(format_ms(of_hop[hop].median) for hop in hops))
        console.print(table)
    for section, title in SECTIONS.items():
        rows = [row for row in result.rows if row.section == section]
        if rows:
            console.print(_section_table(title, rows))
    if result.goals:
        table = Table("goal", "wanted", "measured", "", title="Goals", title_justify="left")
        styles = {True: "green", False: "red", None: "dim"}
        for goal in result.goals:
            table.add_row(
                goal.goal, goal.wanted, goal.measured or "-", Text(MET[goal.met], style=styles[goal.met])
            )
        console.print(table)
    if result.not_measured:
        table = Table("not measured", "why", title="Not measured", title_justify="left")
        for missing in result.not_measured:
            table.add_row(missing.what, Text(missing.why))
        console.print(table)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """What changed, and the count of what did not."""
    console.width = max(console.width, _WIDTH)
    for warning in comparison.warnings:
        console.print(Text(f"Note: {warning}", style="yellow"))
    console.print(
        f"\nThe machine was {comparison.drift:.2f} times slower than then by what is not ours; "
        "factors below are beside that."
    )
    table = Table("figure", "size", "use", "then", "now", "times slower", "", title_justify="left")
    for change in comparison.changes:
        if change.verdict == "same":
            continue
        row = change.row
        table.add_row(
            f"{row.section}: {row.case}, {row.metric}",
            row.size,
            row.use,
            format_row(change.before),
            format_row(row),
            f"{change.factor:.2f}",
            Text(change.verdict, style="red" if change.verdict == "slower" else "green"),
        )
    if table.row_count:
        console.print(table)
    same = sum(change.verdict == "same" for change in comparison.changes)
    console.print(f"{len(comparison.regressions)} regressions; {same} figures as before.")


def _transfer_table(
    result: Result, title: str, sizes: Sequence[tuple[int, str]], grid: Sequence[tuple[str, dict[int, Row]]]
) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("way", no_wrap=True)
    for _, label in sizes:
        table.add_column(label, justify="right", no_wrap=True)
    best = {
        nbytes: min((rows[nbytes].median for _, rows in grid if nbytes in rows), default=0.0)
        for nbytes, _ in sizes
    }
    previous = ""
    for name, rows in grid:
        kind = result.kind_of(name)
        if previous and kind != previous:
            table.add_section()
        previous = kind
        cells: list[Text] = []
        for nbytes, _ in sizes:
            row = rows.get(nbytes)
            if row is None:
                cells.append(Text("-", style="dim"))
                continue
            cell = Text(format_ms(row.median), style="bold" if row.median == best[nbytes] else "")
            cell.append(f" ({format_ms(row.p99)})", style="dim")
            cells.append(cell)
        table.add_row(name, *cells)
    return table


def _section_table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("what", "size"):
        table.add_column(name)
    for name in ("median", "p99", "n", "x limit"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        what = f"{row.case}, {row.metric}" if row.metric not in ("time", "round_trip", "bytes") else row.case
        table.add_row(what, row.size, format_row(row), format_row(row, p99=True), str(row.n), ratio)
    return table
