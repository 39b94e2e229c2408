from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from legion_shm.cli import main
from legion_shm.errors import BenchmarkError
from legion_shm.native_bench.export import to_csv, to_markdown
from legion_shm.native_bench.goals import check_goals
from legion_shm.native_bench.model import FORMAT, read_result, write_result
from legion_shm.native_bench.table import HOPS_TITLE, format_ms, hops_grid, print_result
from tests.bench.canned import MB25, canned
from tests.system.support import REPO, run_script

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib (extra `bench`) is not installed"
)


def test_a_result_survives_the_file(tmp_path: Path) -> None:
    write_result(canned(), tmp_path / "result.json")
    assert read_result(tmp_path / "result.json") == canned()
    assert json.loads((tmp_path / "result.json").read_text())["format"] == FORMAT


@pytest.mark.parametrize("spoil", ["format", "rows", "extra", "text"])
def test_a_file_that_is_no_result_is_refused_with_its_name(tmp_path: Path, spoil: str) -> None:
    document = json.loads(canned().model_dump_json())
    if spoil == "format":
        document["format"] = "legion-bench/999"
    elif spoil == "rows":
        document["rows"][0]["median"] = "fast"
    else:
        document["surprise"] = 1
    path = tmp_path / "old.json"
    path.write_text("{" if spoil == "text" else json.dumps(document))
    with pytest.raises(BenchmarkError, match=r"old\.json"):
        read_result(path)
    with pytest.raises(BenchmarkError, match=r"absent\.json"):
        read_result(tmp_path / "absent.json")


def test_the_terminal_shows_each_way_the_goals_and_what_is_missing() -> None:
    console = Console(file=io.StringIO(), width=60)
    print_result(canned(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("legion-resident", "iceoryx2", "25 MB", "3.00", "met", "missed", "ray", "not installed"):
        assert words in text
    assert "Test <CPU>" in text


def test_every_report_says_where_our_round_trips_spend_their_time() -> None:
    hops, ways = hops_grid(canned())
    assert hops[0] == "encode"
    assert hops[-1] == "other"
    assert [(case, size) for case, size, _ in ways] == [("legion", "25 MB")]
    cells = "1.00", "2.00", "9.00"
    markdown = next(
        line for line in to_markdown(canned()).splitlines() if line.startswith("| Way legion | 25 MB")
    )
    assert all(f" {cell} |" in markdown for cell in cells)
    console = Console(file=io.StringIO(), width=60)
    print_result(canned(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert HOPS_TITLE in text
    assert all(cell in text.split(HOPS_TITLE)[1] for cell in cells)


def test_csv_has_every_figure_as_a_line() -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(canned()))))
    assert len(lines) == len(canned().rows)
    (line,) = [
        each
        for each in lines
        if (each["case"], each["metric"], each["size_bytes"]) == ("legion", "round_trip", str(MB25))
    ]
    assert float(line["median"]) == 4000.0
    assert float(line["ratio"]) > 1


def test_markdown_has_tables_whose_lines_have_as_many_cells_as_their_heads() -> None:
    text = to_markdown(canned())
    width = 0
    for line in text.splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        width = width or line.count("|")
        assert line.count("|") == width, line
    assert "| **Way legion** | 0.200 | 4.00 |" in text
    assert "- ray: the package ray is not installed" in text


@needs_matplotlib
def test_the_page_holds_plots_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    write_result(canned(), tmp_path / "result.json")
    # In a process of its own: matplotlib starts a thread and a program where it builds its list of fonts.
    arguments = ("-m", "legion_shm.native_bench", "--from", "result.json", "--html", "page.html")
    done = run_script(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert "Way iceoryx2" in page
    assert "Test &lt;CPU&gt;" in page
    assert "Test <CPU>" not in page
    for outside in ("<script", "src=", "<link", "@import", "url(http"):
        assert outside not in page


def test_a_page_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_result(canned(), tmp_path / "result.json")
    given = ["bench", "--from", str(tmp_path / "result.json"), "--html", str(tmp_path / "page.html")]
    assert main(given) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_goals_are_met_missed_or_not_measured_by_the_figures() -> None:
    goals = {goal.goal: goal for goal in check_goals(canned().rows)}
    assert goals["private tensor, 4 KB"].met is True
    assert goals["private tensor, 25 MB"].met is False
    assert goals["private tensor, 400 MB"].met is None
    assert goals["ahead of every other way, 25 MB"].met is False
    assert "iceoryx2" in goals["ahead of every other way, 25 MB"].measured
    assert goals["empty job over a bare ZeroMQ ping-pong"].measured == "6.00x"
    assert goals["private against comfy-env, 25 MB"].met is None


def test_a_figure_stands_against_two_copies_two_uses_and_a_wake_up() -> None:
    row = canned().find("transfer", "legion", "round_trip", MB25, "touch")
    assert row is not None
    assert row.limit == pytest.approx(2 * (800 + 40) + 10)
    assert row.ratio == pytest.approx(4000 / 1690, abs=1e-3)
    one_way = canned().find("transfer", "legion", "one_way", MB25, "touch")
    assert one_way is not None
    assert one_way.limit == pytest.approx(845)
    handle = canned().find("transfer", "legion-resident", "round_trip", MB25, "touch")
    assert handle is not None
    assert handle.limit == pytest.approx(2 * 40 + 10)


@pytest.mark.parametrize(
    ("value_us", "text"), [(0.4, "0.000"), (99, "0.099"), (1234, "1.23"), (12345, "12.3"), (123456, "123")]
)
def test_milliseconds_have_three_digits(value_us: float, text: str) -> None:
    assert format_ms(value_us) == text


@pytest.mark.parametrize(
    "path", sorted((REPO / "native_bench" / "reference").glob("*.json")), ids=lambda p: p.stem
)
def test_a_committed_reference_can_be_read_and_names_no_machine_by_name(path: Path) -> None:
    result = read_result(path)
    assert {"processor", "cpus", "kernel", "python"} <= set(result.machine)
    assert any(row.case == "legion" for row in result.rows)
    assert not {"/root", "/home", "/tmp", "/work"} & set(re.findall(r"/[a-z]+", path.read_text("utf-8")))
