from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import legion_shm.demo
from legion_shm import WorkerSpec
from legion_shm.cli import main
from legion_shm.demo import DemoReport, print_demo, run_demo
from legion_shm.supervisor.spawn import preload_for

DATA = Path(legion_shm.demo.__file__).parent / "demo_data"
RUNS = 2


@pytest.fixture(scope="module")
def report() -> DemoReport:
    measured = run_demo(runs=RUNS)
    return replace(measured, image=measured.image.clone())  # the view would outlive the check for leaks


FROM_SHARED_MEMORY = int(not hasattr(os, "memfd_create"))
"""A portable segment cannot be made its owner's alone in place: what lies there is copied when it is sent."""


def copies(run: Any) -> dict[str, int]:
    return {transfer.direction: transfer.copies for transfer in run.stats.transfers if transfer.payload_bytes}


def test_the_photograph_costs_one_copy_and_none_from_shared_memory(report: DemoReport) -> None:
    assert copies(report.first) == {"to_worker": 1, "from_worker": 1}
    for run in report.private:
        assert copies(run)["to_worker"] == 1
    for run in report.resident:
        assert copies(run)["to_worker"] == FROM_SHARED_MEMORY
        (photograph,) = [transfer for transfer in run.stats.transfers if transfer.direction == "to_worker"]
        assert photograph.payload_bytes == 600 * 400 * 3 * 4
        assert photograph.referenced_bytes == (0 if FROM_SHARED_MEMORY else photograph.payload_bytes)


def test_a_result_costs_one_copy_or_none_where_it_was_born_in_shared_memory(report: DemoReport) -> None:
    born = bool(preload_for(WorkerSpec(engine="graph"), "memfd"))
    for run in (*report.private[1:], *report.resident[1:]):  # by then the worker knows how much room it takes
        assert copies(run)["from_worker"] == (0 if born else 1)


def test_every_timed_run_did_all_the_work(report: DemoReport) -> None:
    assert len(report.private) == len(report.resident) == len(report.files) == RUNS
    for run in (report.first, *report.private, *report.resident):
        assert (run.stats.nodes_executed, run.stats.nodes_cached) == (5, 0)
        assert 0 < run.moving_s < run.total_s
    for through_files in report.files:
        assert min(through_files.write_s, through_files.save_s, through_files.read_s) > 0
        assert through_files.load_s >= 0, "a busy supervisor may hear of its start and its end at once"
        assert through_files.moving_s < through_files.total_s


def test_both_ways_give_the_same_picture_but_for_eight_bits(report: DemoReport) -> None:
    assert 0 < report.loss <= 1 / 255 + 1e-6


def test_the_result_is_the_photograph_at_twice_its_size_with_a_glow(report: DemoReport) -> None:
    assert tuple(report.image.shape) == (1, 800, 1200, 3)
    with Image.open(DATA / "coffee.jpg") as photograph:
        expected = np.asarray(photograph.convert("RGB").resize((1200, 800))).astype(float) / 255
    difference = np.abs(report.image[0].numpy() - expected)
    assert 0.01 < difference.mean() < 0.15


def test_the_two_workflows_hold_the_same_nodes() -> None:
    memory, files = (
        json.loads((DATA / name).read_text(encoding="utf-8"))
        for name in ("soft_glow.json", "soft_glow_files.json")
    )
    for node in ("2", "3", "4"):
        assert memory[node] == files[node]


def test_the_photograph_is_small_and_its_source_is_stated() -> None:
    assert (DATA / "coffee.jpg").stat().st_size < 150_000
    assert "CC0" in (DATA / "README.md").read_text(encoding="utf-8")


def test_the_tables_fit_a_terminal_of_eighty_columns(
    report: DemoReport, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_demo(report, tmp_path / "result.png")
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "2,880,000" in text
    assert "11,520,000" in text
    assert ("0 (reference)" in text) is not bool(FROM_SHARED_MEMORY)
    assert "on this machine, in this run" in text
    assert "…" not in text
    assert all(len(line) <= 82 for line in lines if not line.startswith("The result")), text


def test_the_command_writes_a_png_and_refuses_what_is_no_image(
    report: DemoReport, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def without_running(*, runs: int) -> DemoReport:
        asked.append(runs)
        return report

    monkeypatch.setattr(legion_shm.demo, "run_demo", without_running)
    assert main(["demo", "--output", str(tmp_path / "a.png"), "--runs", "3"]) == 0
    assert asked == [3]
    assert str(tmp_path / "a.png") in capsys.readouterr().out.replace("\n", "")
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (1200, 800), "RGB")
    for name in ("a.npy", "no/a.png", "-"):
        assert main(["demo", "--output", name]) == 2
        assert "--output" in capsys.readouterr().err
    assert asked == [3]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0.00"),
        (4.2e-7, "0.00042"),
        (9.96e-5, "0.100"),
        (1e-4, "0.10"),
        (0.0125, "12.50"),
        (2.0, "2,000.00"),
    ],
)
def test_a_time_too_short_for_two_decimals_gets_more(seconds: float, shown: str) -> None:
    assert legion_shm.demo._ms(seconds) == shown
