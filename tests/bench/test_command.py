from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import legion_shm.native_bench.run
from legion_shm.cli import main
from legion_shm.native_bench.model import read_result, write_result
from tests import needs
from tests.bench.canned import canned

REPO = Path(__file__).resolve().parents[2]
TINY = ("--quick", "--sizes", "4KB,64KB", "--rounds", "3", "--peers", "legion-resident,pipe,zeromq")


def test_a_tiny_run_measures_writes_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, table = tmp_path / "result.json", tmp_path / "result.csv"
    assert main(["bench", *TINY, "--json", str(result), "--csv", str(table)]) == 0
    shown = capsys.readouterr().out
    assert "legion-resident" in shown
    read = read_result(result)
    assert {case.name for case in read.cases if case.proved} == {"legion-resident", "pipe", "zeromq"}
    assert {row.n for row in read.rows if row.section == "transfer"} == {3}
    assert all(row.n > 0 and row.median >= 0 for row in read.rows)
    assert table.read_text().count("\n") == len(read.rows) + 1
    missing = {each.what for each in read.not_measured}
    assert "transfers of tensors on a GPU" in missing or "GPU" in " ".join(missing)
    text = result.read_text()
    for private in (platform.node(), str(Path.home()), str(tmp_path)):
        assert private not in text


def test_a_planted_regression_gives_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, slow = tmp_path / "old.json", tmp_path / "slow.json"
    write_result(canned(), old)
    write_result(canned(slower=2.0), slow)
    assert main(["bench", "--from", str(slow), "--compare", str(old)]) == 1
    assert "slower" in capsys.readouterr().out
    assert main(["bench", "--from", str(old), "--compare", str(old)]) == 0


def test_markdown_alone_is_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(canned(), tmp_path / "r.json")
    assert main(["bench", "--from", str(tmp_path / "r.json"), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("### Legion SHM 1.2.3")


def test_the_list_names_every_way_and_whether_it_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "pickle5-zeromq" in shown
    assert "legion-forward" in shown
    assert "…" not in shown


@pytest.mark.parametrize(
    "given",
    [
        ("--peers", "telegraph"),
        ("--sizes", "huge"),
        ("--compare", "/nowhere.json"),
        ("--json", "/nowhere/result.json"),
        ("--csv", "/nowhere/result.csv"),
        ("--html", "/nowhere/page.html"),
        ("--json", str(Path(__file__).parent)),
        ("--comfyui", "/nowhere/ComfyUI"),
    ],
)
def test_bad_usage_is_exit_code_2_and_measures_nothing(
    given: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("it began to measure")

    monkeypatch.setattr(legion_shm.native_bench.run, "describe_machine", measured)
    assert main(["bench", *given]) == 2
    assert given[1] in capsys.readouterr().err


@needs.posix
def test_ctrl_c_leaves_no_process_and_no_file_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path)}
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.exists() else set()
    command = [sys.executable, "-m", "legion_shm.native_bench", "--sizes", "3MB", "--rounds", "100000"]
    command += ["--peers", "legion,shared-memory,npy,zeromq,torch-file-system"]
    running = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        process = psutil.Process(running.pid)
        deadline_s = time.monotonic() + 60
        busy: list[psutil.Process] = []
        while time.monotonic() < deadline_s and running.poll() is None:
            busy = process.children(recursive=True)
            if len(busy) >= 7 and any(
                path.name.startswith("legion-bench-") for path in set(shared.iterdir()) - before
            ):
                break
            time.sleep(0.02)
        assert len(busy) >= 7, running.stdout.read() if running.stdout else ""
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to children too
        output, _ = running.communicate(timeout=60)
    finally:
        if running.poll() is None:
            running.kill()
            running.communicate()
    assert running.returncode == 130, output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(busy, timeout=5)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
    # Others on this machine have memory there too: the way's own folder, its segments, torch's with our pids.
    pids = "|".join(str(each) for each in (running.pid, *(child.pid for child in busy)))
    ours = re.compile(rf"legion-bench-|psm_|torch_({pids})_")
    left = [path for path in set(shared.iterdir()) - before if ours.match(path.name)]
    assert left == []
    assert list(tmp_path.iterdir()) == []
