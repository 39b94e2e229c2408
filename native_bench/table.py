"""A result on a terminal, and progress while it is made.

Owns the tables that rich prints. Times are milliseconds here, whatever their size: one unit is compared at a
glance. The best of each column is bold; a ratio to the physical limit stands in the last table.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from legion_shm.native_bench.model import Result, Row

__all__ = ["format_ms", "print_result", "transfer_grid"]


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


def transfer_grid(
    result: Result, metric: str, use: str
) -> tuple[list[tuple[int, str]], list[tuple[str, dict[int, Row]]]]:
    """Sizes (bytes, label) and, by way in the order of the run, its row of each size."""
    rows = [row for row in result.rows if (row.section, row.metric, row.use) == ("transfer", metric, use)]
    sizes = sorted({(row.size_bytes, row.size) for row in rows})
    names = [case.name for case in result.cases]
    grid: list[tuple[str, dict[int, Row]]] = []
    for name in names:
        of_name = {row.size_bytes: row for row in rows if row.case == name}
        if of_name:
            grid.append((name, of_name))
    return sizes, grid


_WIDTH = 118  # what six sizes need; a narrower terminal wraps lines, and no figure is cut

_TITLES = {
    ("round_trip", "touch"): "Round trip, one word of each page used, median ms (p99)",
    ("round_trip", "read"): "Round trip, read whole, median ms (p99)",
    ("one_way", "touch"): "One way, one word of each page used, median ms (p99)",
    ("one_way", "read"): "One way, read whole, median ms (p99)",
    ("round_trip", "none"): "Round trip of the handle alone, median ms (p99)",
}


def print_result(result: Result, console: Console) -> None:
    console.width = max(console.width, _WIDTH)
    machine = result.machine
    console.print(
        f"\n[bold]Legion SHM {result.version}[/bold], {machine.get('processor')}, "
        f"{machine.get('cpus')} CPUs, "
        f"{machine.get('memory_gib')} GiB, {machine.get('system')} {machine.get('kernel')}, "
        f"{machine.get('python')}, torch {result.packages.get('torch', '?')}"
    )
    for (metric, use), title in _TITLES.items():
        sizes, grid = transfer_grid(result, metric, use)
        if grid:
            console.print(_transfer_table(result, title, sizes, grid))
    if result.not_measured:
        table = Table("not measured", "why", title="Not measured", title_justify="left")
        for missing in result.not_measured:
            table.add_row(missing.what, missing.why)
        console.print(table)


def _transfer_table(
    result: Result,
    title: str,
    sizes: Sequence[tuple[int, str]],
    grid: Sequence[tuple[str, dict[int, Row]]],
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
        table.add_row(result.title_of(name), *cells)
    return table
