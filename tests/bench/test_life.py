"""The benchmark's first transfer to a new worker, and which Python its way through ComfyUI runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import legion_shm.supervisor.api
from legion_shm.cli import main
from legion_shm.config import WorkerSpec
from legion_shm.errors import StartupError
from legion_shm.native_bench import run as run_module
from legion_shm.native_bench.goals import check_goals
from legion_shm.native_bench.life import measure_starts
from legion_shm.native_bench.model import Row
from legion_shm.native_bench.run import Options
from legion_shm.native_bench.schedule import parse_sizes
from legion_shm.native_bench.summary import summarize
from legion_shm.native_bench.whole_path import measure_whole_path
from tests import needs
from tests.bench.canned import MB25, around, canned


@needs.posix
def test_the_first_transfer_is_a_part_of_the_first_job_and_has_the_tensor_s_size() -> None:
    (size,) = parse_sizes("64KB")
    shown: list[str] = []
    rows = {row.case: row for row in measure_starts(rounds=1, size=size, show=shown.append)}
    assert list(rows) == ["python-torch", "cold", "first_use", "first_transfer", "following", "replacement"]
    assert 0 < rows["first_transfer"].median < rows["first_use"].median
    for name, row in rows.items():
        assert (row.section, row.metric, row.n) == ("start", "time", 1)
        assert row.size_bytes == (size.nbytes if name.startswith("first_") else 0)
    assert shown == ["worker starts: 1 of 1"]


@pytest.mark.parametrize(("transfer_us", "met"), [(900.0, True), (1100.0, False)])
def test_the_first_transfer_is_held_to_a_copy_into_a_fresh_memfd(transfer_us: float, met: bool) -> None:
    sized: dict[str, Any] = {"size_bytes": MB25, "size": "25 MB"}
    rows = [
        Row.of("start", "first_transfer", "time", summarize(around(transfer_us)), **sized),
        Row.of("start", "first_use", "time", summarize(around(9e6)), **sized),  # is not what counts
        Row.of("limit", "copy_fresh_memfd", "time", summarize(around(1000.0)), **sized),
    ]
    (goal,) = [goal for goal in check_goals(rows) if goal.goal.startswith("first 25 MB")]
    assert goal.met is met


class _NoWorkers:
    """A Supervisor whose jobs all fail; it keeps the specs that they were for."""

    specs: list[WorkerSpec]

    def __enter__(self) -> _NoWorkers:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def submit(self, _flow: object, *, inputs: object, spec: WorkerSpec) -> object:
        del inputs
        self.specs.append(spec)
        if spec.engine == "comfy":
            raise StartupError("as far as this test goes", worker_id="none")
        return self

    def result(self, timeout: float) -> Any:
        del timeout
        return self

    def stop_workers(self, _spec: WorkerSpec) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name == "stats":
            return self
        if name.endswith("_s"):
            return 0.0
        raise AttributeError(name)


def test_the_python_given_for_comfyui_runs_comfyui_and_not_the_graph_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _NoWorkers.specs = []
    monkeypatch.setattr(legion_shm.supervisor.api, "Supervisor", _NoWorkers)
    with pytest.raises(StartupError, match="as far as"):
        measure_whole_path(rounds=1, comfyui="/there", comfyui_python="/its/python", show=lambda text: None)
    graph, comfy = _NoWorkers.specs[0], _NoWorkers.specs[-1]
    assert (graph.engine, graph.python_executable) == ("graph", None)
    assert (comfy.engine, comfy.comfyui_path, comfy.python_executable) == ("comfy", "/there", "/its/python")


def test_the_command_hands_both_options_for_comfyui_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Options] = []

    def instead(options: Options) -> Any:
        seen.append(options)
        return canned()

    monkeypatch.setattr(run_module, "run", instead)
    where, exe = str(tmp_path), "/its/python"
    assert main(["bench", "-q", "--comfyui", where, "--comfyui-python", exe]) == 0
    assert (seen[0].comfyui, seen[0].comfyui_python) == (where, exe)
    assert main(["bench", "-q"]) == 0
    assert (seen[1].comfyui, seen[1].comfyui_python) == (None, None)
    capsys.readouterr()


def test_a_python_for_comfyui_without_a_comfyui_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "-q", "--comfyui-python", "/its/python"]) == 2
    assert "--comfyui PATH" in capsys.readouterr().err
