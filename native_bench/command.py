"""`legion bench` and `python -m legion_shm.native_bench`: the options, progress, what is written where.

Owns the command. What it does loads when it runs, so that other commands start without it.

Exit codes: 0 measured; 1 a regression (``--compare``), or nothing of ours could be measured; 2 bad usage.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import click

__all__ = ["bench"]

_EPILOG = """\b
Examples:
  legion bench --quick
  legion bench --html report.html --json result.json
  legion bench --peers ours,zeromq,iceoryx2 --sizes 25MB,100MB
  legion bench --compare before.json
  legion bench --from result.json --markdown
"""


@click.command("bench", epilog=_EPILOG, short_help="Measure transfers, ours and others', side by side.")
@click.option("--quick", is_flag=True, help="Fewer sizes and rounds: under a minute.")
@click.option("--sizes", metavar="LIST", help="For instance 64KB,25MB; any size will do.")
@click.option("--peers", metavar="LIST", help="Only these ways (see --list); `ours` means all of Legion's.")
@click.option("--rounds", type=click.IntRange(1, 100_000), help="Samples of each way and size.")
@click.option("--json", "json_file", metavar="FILE", help="Write the result, for --compare and --from.")
@click.option("--csv", "csv_file", metavar="FILE", help="Write every figure as a line.")
@click.option("--html", "html_file", metavar="FILE", help="Write a report with plots, one file.")
@click.option("--markdown", is_flag=True, help="Print the result as markdown, to paste into an issue.")
@click.option("--compare", "compare_file", metavar="OLD.json", help="Show what is slower than then.")
@click.option("--from", "from_file", metavar="FILE.json", help="Measure nothing: report on that result.")
@click.option("--list", "list_ways", is_flag=True, help="Name the ways and whether they can run here.")
@click.option("--comfyui", metavar="PATH", help="Measure the whole path through this ComfyUI as well.")
@click.option(
    "--comfyui-python", metavar="EXE", help="The Python with that ComfyUI's packages, and Legion's."
)
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def bench(
    *,
    list_ways: bool,
    from_file: str | None,
    compare_file: str | None,
    markdown: bool,
    quiet: bool,
    peers: str | None,
    json_file: str | None,
    csv_file: str | None,
    html_file: str | None,
    **chosen: Any,
) -> int:
    """Measure how fast tensors cross between processes: Legion's ways and others', in one run.

    Each way's contents are checked on both sides in every exchange. What was not measured is said.
    """
    from rich.console import Console

    from legion_shm.errors import BenchmarkError

    try:
        if list_ways:
            return _list(Console())
        from legion_shm.native_bench.compare import compare
        from legion_shm.native_bench.export import to_csv, to_markdown
        from legion_shm.native_bench.model import read_result, write_result
        from legion_shm.native_bench.table import print_comparison, print_result

        for file in filter(None, (json_file, csv_file, html_file)):
            _check_place(Path(file))
        if html_file and not _has_matplotlib():
            raise BenchmarkError(
                f"--html needs matplotlib for its plots: {sys.executable} -m pip install matplotlib"
            )
        old = None if compare_file is None else read_result(compare_file)
        if from_file is not None:
            result = read_result(from_file)
        else:
            from legion_shm.native_bench.run import Options, run

            names = None if peers is None else [name.strip() for name in peers.split(",") if name.strip()]
            with _progress(quiet) as show:
                result = run(Options(peers=names, show=show, **chosen))
    except BenchmarkError as error:
        raise click.UsageError(str(error)) from None
    if json_file:
        write_result(result, json_file)
    if csv_file:
        Path(csv_file).write_text(to_csv(result), encoding="utf-8")
    if html_file:
        from legion_shm.native_bench.html import to_html

        try:
            page = to_html(result)
        except BenchmarkError as error:
            raise click.UsageError(str(error)) from None
        Path(html_file).write_text(page, encoding="utf-8")
    if markdown:
        click.echo(to_markdown(result))
    else:
        print_result(result, Console())
    if old is not None:
        comparison = compare(result, old)
        print_comparison(comparison, Console(stderr=markdown))
        return 1 if comparison.regressions else 0
    return 0 if result.rows else 1


def _check_place(path: Path) -> None:
    """Minutes of measuring are not to be lost for a misspelt folder."""
    from legion_shm.errors import BenchmarkError

    folder = path.parent
    if not folder.is_dir():
        raise BenchmarkError(f"{str(path)!r}: there is no folder {str(folder)!r}; make it first")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise BenchmarkError(f"{str(path)!r} can't be written to; give another file")


def _list(console: Any) -> int:
    from rich.table import Table

    from legion_shm.native_bench.peers import all_peers

    table = Table("name", "way", "can run here", "settings")
    for column in table.columns:
        column.overflow = "fold"
    for peer in all_peers():
        missing = peer.missing()
        table.add_row(peer.name, peer.title, "yes" if not missing else f"no: {missing}", peer.settings)
    console.print(table)
    return 0


@contextlib.contextmanager
def _progress(quiet: bool) -> Generator[Callable[[str], None]]:
    """A line that is rewritten on a terminal; nothing elsewhere.

    No thread draws it: it would run on the processors that are measured.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return

    def show(text: str) -> None:
        sys.stderr.write(f"\r\x1b[2K{text[:100]}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[2K")
        sys.stderr.flush()


def _has_matplotlib() -> bool:
    """Looked for before anything is measured, rather than afterwards."""
    try:
        return importlib.util.find_spec("matplotlib") is not None
    except (ImportError, ValueError):
        return False
