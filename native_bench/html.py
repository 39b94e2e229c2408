"""A result as one HTML file that opens offline: plots, tables, goals, settings, and what was not measured.

Owns the page. Everything is inside it: no script, no font, no address. It prints, and reads in light and
dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from legion_shm.native_bench.model import Result, Row
from legion_shm.native_bench.plots import factors_plot, hops_plot, transfer_plot
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
from legion_shm.native_bench.whole_path import HOPS

__all__ = ["to_html"]

_STYLE = """
:root{--ink:#24292f;--soft:#57606a;--line:#d8dee4;--paper:#fff;--card:#f6f8fa;--ours:#0b6e4f;--bad:#b3261e}
*{box-sizing:border-box}
body{margin:0;color:var(--ink);background:var(--paper);font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2.5rem 1.5rem 4rem}
h1{font-size:1.9rem;margin:0 0 .2rem;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.6rem 0 .4rem}
p{max-width:75ch}.soft,figcaption{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:.8rem;margin:1.4rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem}
.card b{display:block;font-size:1.45rem;color:var(--ours);line-height:1.25}
figure{margin:1rem 0;overflow-x:auto;background:#fff;border-radius:8px}
figure svg{max-width:100%;height:auto}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.32rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left}th{font-weight:600;color:var(--soft)}
td.text,th.text{text-align:left}
tr.ours td:first-child{color:var(--ours);font-weight:600}td.best{font-weight:700}
td small{color:var(--soft);display:block;line-height:1.1}
.met{color:var(--ours);font-weight:600}.missed{color:var(--bad);font-weight:600}.none{color:var(--soft)}
details{margin:.8rem 0}summary{cursor:pointer;color:var(--soft)}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9ba7b4;--line:#30363d;--paper:#0d1117;--card:#161b22;
--ours:#3cbf8f;--bad:#ff8a80}figure{background:#f6f8fa;padding:.5rem}}
@media print{main{max-width:none;padding:0}details{display:none}}
"""


_HEAD = (
    "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    "<meta name='viewport' content='width=device-width,initial-scale=1'>"
    "<title>{title}: transfer benchmark</title><style>{style}</style></head><body><main>"
)


def to_html(result: Result) -> str:
    """The whole page. Raises BenchmarkError where matplotlib is missing."""
    title = f"Legion SHM {escape(result.version)}"
    quick = ", quick run" if result.quick else ""
    parts = [
        _HEAD.format(title=title, style=_STYLE),
        "<h1>Tensor transfers between processes</h1>",
        f"<p class='soft'>{title}{quick} · {escape(describe(result))}</p>",
        _cards(result),
        *_transfers(result),
        *_goals(result),
        *_hops(result),
        *_sections(result),
        *_setup(result),
        "</main></body></html>",
    ]
    return "".join(parts)


def _cards(result: Result) -> str:
    cards: list[tuple[str, str]] = []
    sizes, grid = transfer_grid(result, "round_trip", "touch")
    size = next((nbytes for nbytes, label in sizes if label == "25 MB"), sizes[-1][0] if sizes else 0)
    label = dict(sizes).get(size, "")
    rows = {name: of[size] for name, of in grid if size in of}
    ours = rows.get("legion")
    others = {name: row for name, row in rows.items() if result.kind_of(name) == "peer"}
    if ours is not None:
        cards.append((f"{format_row(ours)} ms", f"{label} there and back, private memory"))
        if others:
            best = min(others, key=lambda name: others[name].median)
            cards.append(
                (
                    f"{others[best].median / ours.median:.1f}x",
                    f"against {result.title_of(best)}, the best other",
                )
            )
        if ours.ratio is not None:
            cards.append((f"{ours.ratio:.1f}x", "over the physical limit of copying"))
    resident = rows.get("legion-resident")
    if resident is not None:
        cards.append((f"{format_row(resident)} ms", f"{label} there and back, in the arena"))
    job = result.find("control", "empty-job", "round_trip")
    if job is not None:
        cards.append((f"{job.median:.0f} µs", "an empty job, submit to result"))
    return (
        "<div class='cards'>"
        + "".join(f"<div class='card'><b>{escape(value)}</b>{escape(words)}</div>" for value, words in cards)
        + "</div>"
    )


def _transfers(result: Result) -> Iterable[str]:
    yield (
        "<h2>Transfers</h2><p>Each way moves a fresh float32 tensor to another process, which uses it and "
        "answers with another one of the same size, used here. Ways take turns in every round; every byte is "
        "checked on both sides outside of the timed window. Small figures are 99th percentiles.</p>"
    )
    for (metric, use), title in transfer_titles().items():
        sizes, grid = transfer_grid(result, metric, use)
        if not grid:
            continue
        yield f"<h3>{escape(title)}</h3>"
        if metric == "round_trip" and use != "none":
            yield _figure(
                transfer_plot(result, metric, use), "Median round trip by size. Legion's ways are green."
            )
            size = next((nbytes for nbytes, label in sizes if label == "25 MB"), sizes[-1][0])
            label = dict(sizes)[size]
            if use == "touch":
                yield _figure(factors_plot(result, size, use), f"Round trip of {label}.")
        yield _transfer_table(result, sizes, grid)


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" if svg else ""


def _transfer_table(
    result: Result, sizes: Sequence[tuple[int, str]], grid: Sequence[tuple[str, dict[int, Row]]]
) -> str:
    best = {nbytes: min(of[nbytes].median for _, of in grid if nbytes in of) for nbytes, _ in sizes}
    lines = [
        "<div class='wide'><table><tr><th>way</th>",
        *(f"<th>{escape(label)}</th>" for _, label in sizes),
        "</tr>",
    ]
    for name, of in grid:
        lines.append(f"<tr class='{'ours' if result.kind_of(name) == 'legion' else ''}'>")
        lines.append(f"<td>{escape(result.title_of(name))}</td>")
        for nbytes, _ in sizes:
            row = of.get(nbytes)
            if row is None:
                lines.append("<td>–</td>")
                continue
            bold = " class='best'" if row.median == best[nbytes] else ""
            hint = f"n={row.n}, 95 % interval {row.low / 1000:.3g} to {row.high / 1000:.3g} ms"
            hint += "" if row.ratio is None else f", {row.ratio:.2f}x its limit ({row.bound_by})"
            figures = f"{format_row(row)}<small>{format_row(row, p99=True)}</small>"
            lines.append(f"<td{bold} title='{escape(hint)}'>{figures}</td>")
        lines.append("</tr>")
    return "".join([*lines, "</table></div>"])


def _goals(result: Result) -> Iterable[str]:
    if not result.goals:
        return
    met = sum(goal.met is True for goal in result.goals)
    known = sum(goal.met is not None for goal in result.goals)
    yield f"<h2>Goals</h2><p>{met} of {known} measured goals are met on this machine, in this run.</p>"
    yield "<div class='wide'><table><tr><th>goal</th><th>wanted</th><th>measured</th><th></th></tr>"
    for goal in result.goals:
        style = {True: "met", False: "missed", None: "none"}[goal.met]
        measured = escape(goal.measured or "–")
        yield f"<tr><td>{escape(goal.goal)}</td><td>{escape(goal.wanted)}</td><td>{measured}</td>"
        yield f"<td class='{style}'>{MET[goal.met]}</td></tr>"
    yield "</table></div>"


def _hops(result: Result) -> Iterable[str]:
    hops, ways = hops_grid(result)
    if not ways:
        return
    head = "".join(f"<th>{escape(hop)}</th>" for hop in hops)
    yield f"<h2>{HOPS_TITLE}</h2><div class='wide'><table><tr><th>way</th><th>size</th>{head}</tr>"
    for name, size, of_hop in ways:
        cells = "".join(f"<td>{format_ms(of_hop[hop].median)}</td>" for hop in hops)
        yield f"<tr><td>{escape(result.title_of(name))}</td><td>{escape(size)}</td>{cells}</tr>"
    yield "</table></div>"


def _sections(result: Result) -> Iterable[str]:
    for section, title in SECTIONS.items():
        rows = [row for row in result.rows if row.section == section]
        if not rows:
            continue
        yield f"<h2>{escape(title)}</h2>"
        if section == "path":
            names = [*(name for _, name in HOPS), "other"]
            yield _figure(
                hops_plot(rows, names), "Medians of each hop, as shares; the whole in milliseconds."
            )
        table = _section_table(rows)
        yield f"<details><summary>{len(rows)} figures</summary>{table}</details>" if len(rows) > 20 else table


def _section_table(rows: Sequence[Row]) -> str:
    head = "<tr><th>what</th><th>size</th><th>median</th><th>p99</th><th>n</th><th>x limit</th></tr>"
    lines = [f"<div class='wide'><table>{head}"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        what = row.case if row.metric in ("time", "round_trip", "bytes") else f"{row.case}, {row.metric}"
        lines.append(
            f"<tr><td>{escape(what)}</td><td>{escape(row.size)}</td><td>{format_row(row)}</td>"
            f"<td>{format_row(row, p99=True)}</td><td>{row.n}</td><td>{ratio}</td></tr>"
        )
    return "".join([*lines, "</table></div>"])


def _setup(result: Result) -> Iterable[str]:
    if result.not_measured:
        yield "<h2>Not measured</h2>"
        yield _pairs((missing.what, missing.why) for missing in result.not_measured)
    yield "<h2>How it was measured</h2>"
    yield _pairs(result.settings.items())
    yield "<h3>Ways and their settings</h3><div class='wide'><table><tr><th>way</th>"
    yield "<th class='text'>settings</th><th>version</th><th>check proved</th></tr>"
    for case in result.cases:
        version = f"{case.package} {case.version}".strip() if case.version else ""
        yield f"<tr><td>{escape(case.title)}</td><td class='text'>{escape(case.settings)}</td>"
        yield f"<td>{escape(version)}</td><td>{'yes' if case.proved else 'no'}</td></tr>"
    yield "</table></div><h3>Machine</h3>"
    yield _pairs((name.replace("_", " "), str(value)) for name, value in result.machine.items())
    yield "<h3>Packages</h3>"
    yield _pairs(result.packages.items())


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    lines = [
        f"<tr><td>{escape(name)}</td><td class='text'>{escape(value)}</td></tr>" for name, value in pairs
    ]
    return "<div class='wide'><table>" + "".join(lines) + "</table></div>"
