"""A result as CSV (every figure a line) and as markdown (to paste into an issue).

Owns both texts. They say the same as the other outputs: what was not measured is in the markdown too.
"""

from __future__ import annotations

import csv
import io

from legion_shm.native_bench.model import Result, Row
from legion_shm.native_bench.table import (
    HOPS_TITLE,
    MET,
    SECTIONS,
    describe,
    format_ms,
    format_row,
    hops_grid,
    transfer_grid,
    transfer_titles,
)

__all__ = ["to_csv", "to_markdown"]


def to_csv(result: Result) -> str:
    fields = list(Row.model_fields)
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in result.rows:
        values = row.model_dump()
        writer.writerow({name: "" if values[name] is None else values[name] for name in fields})
    return text.getvalue()


def to_markdown(result: Result) -> str:
    lines = [f"### Legion SHM {result.version}, `legion bench{' --quick' if result.quick else ''}`", ""]
    lines += [describe(result), ""]
    for (metric, use), title in transfer_titles().items():
        sizes, grid = transfer_grid(result, metric, use)
        if not grid:
            continue
        lines += [f"**{title}**", "", "| way | " + " | ".join(label for _, label in sizes) + " |"]
        lines.append("|---|" + "--:|" * len(sizes))
        for name, rows in grid:
            cells = [format_row(rows[nbytes]) if nbytes in rows else "" for nbytes, _ in sizes]
            bold = "**" if result.kind_of(name) == "legion" else ""
            lines.append(f"| {bold}{result.title_of(name)}{bold} | " + " | ".join(cells) + " |")
        lines.append("")
    hops, ways = hops_grid(result)
    if ways:
        lines += [f"<details><summary>{HOPS_TITLE}</summary>", "", f"| way | size | {' | '.join(hops)} |"]
        lines.append("|---|--:|" + "--:|" * len(hops))
        for name, size, of_hop in ways:
            figures_of_hops = " | ".join(format_ms(of_hop[hop].median) for hop in hops)
            lines.append(f"| {result.title_of(name)} | {size} | {figures_of_hops} |")
        lines += ["", "</details>", ""]
    for section, title in SECTIONS.items():
        figures = [row for row in result.rows if row.section == section]
        if not figures:
            continue
        lines += [f"<details><summary>{title}</summary>", "", "| what | size | median | p99 | n | x limit |"]
        lines.append("|---|--:|--:|--:|--:|--:|")
        for row in figures:
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            lines.append(
                f"| {row.case}, {row.metric} | {row.size} | {format_row(row)} "
                f"| {format_row(row, p99=True)} | {row.n} | {ratio} |"
            )
        lines += ["", "</details>", ""]
    if result.goals:
        lines += ["**Goals**", "", "| goal | wanted | measured | |", "|---|--:|--:|---|"]
        for goal in result.goals:
            lines.append(f"| {goal.goal} | {goal.wanted} | {goal.measured or '-'} | {MET[goal.met]} |")
        lines.append("")
    if result.not_measured:
        lines += ["**Not measured**", ""]
        lines += [f"- {missing.what}: {' '.join(missing.why.split())}" for missing in result.not_measured]
        lines.append("")
    return "\n".join(lines)
