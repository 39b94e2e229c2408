"""A result's plots, as SVG text: matplotlib draws, without a display.

Owns what is drawn. Legion's ways are in one strong hue, others' in muted ones with a marker of their own
each, so that no plot depends on telling twenty colours apart; every line is also in a table of the report.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from typing import Any

from legion_shm.errors import BenchmarkError
from legion_shm.native_bench.model import Result, Row
from legion_shm.native_bench.table import format_ms, transfer_grid

__all__ = ["factors_plot", "hops_plot", "transfer_plot"]

_OURS = ("#0b6e4f", "#12a06f", "#3cbf8f", "#7bd8b4", "#0b6e4f")
_OTHERS = (
    "#c0562f", "#3a6ea5", "#8a6d3b", "#7a5195", "#a23b72", "#5c6b73", "#b8860b", "#2f7f86",
)  # fmt: skip
_MARKERS = "sD^v<>pP*Xhd8H"
_INK, _GRID, _LIMIT = "#24292f", "#d8dee4", "#8c959f"
_HOP_COLOURS = (
    "#3a6ea5", "#c9d6e2", "#7fa9d1", "#8a6d3b", "#d9a441", "#0b6e4f", "#7bd8b4", "#b48ead", "#8c959f",
)  # fmt: skip


def _pyplot() -> Any:
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        raise BenchmarkError("the report's plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "legion",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 9,
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _LIMIT,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "grid.color": _GRID,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
        }
    )
    return pyplot


def _svg(pyplot: Any, figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def transfer_plot(result: Result, metric: str, use: str) -> str:
    """Median time over size, both logarithmic, a line for each way; empty where it was not measured."""
    sizes, grid = transfer_grid(result, metric, use)
    if not grid or len(sizes) < 2:
        return ""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(9.6, 5.4))
    ours = others = 0
    for name, rows in sorted(grid, key=lambda item: result.kind_of(item[0]) == "legion"):
        found = [rows[nbytes] for nbytes, _ in sizes if nbytes in rows]
        x, y = [row.size_bytes for row in found], [row.median / 1000 for row in found]
        if result.kind_of(name) == "legion":
            style = {"color": _OURS[ours % len(_OURS)], "linewidth": 2.4, "marker": "o", "markersize": 5}
            style["linestyle"] = ("-", "--", "-.", ":")[ours % 4]
            ours += 1
        else:
            style = {"color": _OTHERS[others % len(_OTHERS)], "linewidth": 1, "alpha": 0.85}
            style |= {"marker": _MARKERS[others % len(_MARKERS)], "markersize": 4}
            others += 1
        axes.plot(x, y, label=result.title_of(name), **style)
    bounds = next((rows for name, rows in grid if name == "legion"), {})
    limits = [(nbytes, row.limit / 1000) for nbytes, row in sorted(bounds.items()) if row.limit]
    if len(limits) > 1:
        axes.plot(
            *zip(*limits, strict=True), color=_LIMIT, linewidth=1.4, linestyle=(0, (1, 1)),
            label="physical limit of copying",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([nbytes for nbytes, _ in sizes], [label for _, label in sizes])
    axes.minorticks_off()
    axes.set_xlabel("size of the tensor")
    axes.set_ylabel("milliseconds, median")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(True, which="major", linewidth=0.6)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8
    )
    return _svg(pyplot, figure)


def factors_plot(result: Result, nbytes: int, use: str) -> str:
    """Bars of one size: each way's round trip, the fastest on top, in milliseconds (logarithmic)."""
    _, grid = transfer_grid(result, "round_trip", use)
    rows = sorted(((name, of[nbytes]) for name, of in grid if nbytes in of), key=lambda item: item[1].median)
    if not rows:
        return ""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(9.6, 0.6 + 0.29 * len(rows)))
    values = [row.median / 1000 for _, row in rows]
    colours = [_OURS[0] if result.kind_of(name) == "legion" else "#b9c3cc" for name, _ in rows]
    places = list(range(len(rows)))[::-1]
    low = min(values) / 2
    axes.barh(places, [value - low for value in values], left=low, color=colours, height=0.68)
    axes.set_xscale("log")
    axes.set_xlim(low, max(values) * 3)
    for place, (_, row), value in zip(places, rows, values, strict=True):
        axes.plot([row.low / 1000, row.high / 1000], [place, place], color=_INK, linewidth=1.1)
        times = "" if row.ratio is None else f"   {row.ratio:.1f}x its limit"
        axes.text(
            max(value, row.high / 1000) * 1.05,
            place,
            f"{format_ms(row.median)} ms{times}",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(places, [result.title_of(name) for name, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("milliseconds, median; the line is its 95 % interval")
    axes.grid(True, axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    return _svg(pyplot, figure)


def hops_plot(rows: Sequence[Row], hops: Sequence[str]) -> str:
    """Stacked bars: where each kind of job's time goes. ``rows``: those of the section ``path``."""
    jobs = list(dict.fromkeys((row.case, row.size) for row in rows if row.metric == "total"))
    if not jobs:
        return ""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(9.6, 0.9 + 0.42 * len(jobs)))
    medians = {(row.case, row.size, row.metric): row.median for row in rows}
    places = list(range(len(jobs)))[::-1]
    for place, (case, size) in zip(places, jobs, strict=True):
        values = [medians.get((case, size, hop), 0.0) for hop in hops]
        whole = sum(values) or 1.0
        left = 0.0
        for number, (hop, value) in enumerate(zip(hops, values, strict=True)):
            share = 100 * value / whole
            axes.barh(
                place, share, left=left, height=0.62, color=_HOP_COLOURS[number % len(_HOP_COLOURS)],
                label=hop if place == places[0] else None,
            )  # fmt: skip
            left += share
        total = medians[case, size, "total"]
        axes.text(101, place, f"{format_ms(total)} ms", va="center", fontsize=8)
    axes.set_yticks(places, [f"{case}, {size}" for case, size in jobs])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the time from submit to result, %")
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, -0.32 if len(jobs) < 5 else -0.2),
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    return _svg(pyplot, figure)
