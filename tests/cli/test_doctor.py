from __future__ import annotations

import errno
import json
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import legion_shm.transport.channel
import legion_shm.transport.runtime_dir
import legion_shm.transport.segment
from legion_shm import __version__
from legion_shm.cli import main
from legion_shm.doctor import Level, Report, examine, print_report
from tests import needs


@pytest.fixture(autouse=True)
def no_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)


def facts(report: Report) -> dict[str, str]:
    return {fact.name: fact.value for fact in report.facts}


def levels(report: Report) -> dict[str, str]:
    return {fact.name: fact.level for fact in report.facts}


def failing(number: int) -> Any:
    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_sound_machine_passes_and_a_tensor_makes_the_round_trip(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["usable"] is True
    assert document["problems"] == []
    told = {fact["name"]: fact["value"] for fact in document["facts"]}
    assert told["legion-shm"] == __version__
    assert told["a 1 MiB tensor through a worker, engine=graph"].startswith(
        "came back whole; copies: 1 on the way there"
    )
    assert told["engine for engine=auto"] == "graph"
    assert "no ComfyUI was found" in told["found"]
    for name in (
        "torch",
        "libzmq",
        "memory",
        "GPU",
        *(() if needs.WINDOWS else ("pagemap", "open files (RLIMIT_NOFILE)", "transport ipc")),
    ):
        assert told[name]


def test_a_person_gets_a_list_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.add("Machine", "system", "Linux")
    report.add("Machine", "memory", "little", "note")
    print_report(report)
    sound = capsys.readouterr().out
    assert "Workflows can run here." in sound
    assert "✓  system" in sound
    assert "!  memory" in sound
    report.add("ZeroMQ", "transport", "[none] can be used", "problem")
    print_report(report)
    assert "Workflows cannot run here:\n  transport: [none] can be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "function", "reason"),
    [
        (legion_shm.transport.segment, "supported_kinds", "segment kind: none can be used"),
        (legion_shm.transport.channel, "channel_kinds", "transport: none can be used"),
    ],
)
def test_without_shared_memory_or_channel_the_exit_code_is_1_with_the_reason(
    module: Any,
    function: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kinds: Mapping[str, str] = dict.fromkeys(getattr(module, function)(), "forbidden here")
    monkeypatch.setattr(module, function, lambda: kinds)
    assert main(["doctor", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == [reason]
    assert any(fact["value"] == "no: forbidden here" for fact in document["facts"])


@needs.symlinks
def test_an_unsafe_runtime_directory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="legion-") as folder:  # short, for sockets' paths are
        link = Path(folder) / "link"
        link.symlink_to(folder)
        monkeypatch.setattr(legion_shm.transport.runtime_dir, "default_base", lambda: link)
        report = examine(check=False)
    assert not report.usable
    assert "is a symbolic link" in report.problems[0]


@needs.linux
def test_a_machine_without_memfd_uses_portable_segments_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", failing(errno.ENOSYS))
    report = examine()
    assert report.usable, report.problems
    assert levels(report)["memfd"] == levels(report)["seals"] == "note"
    assert "Function not implemented" in facts(report)["memfd"]
    assert facts(report)["shared memory"].startswith("portable segments")
    assert facts(report)["a 1 MiB tensor through a worker, engine=graph"].startswith("came back whole")


@needs.posix
def test_a_worker_that_cannot_start_is_a_problem_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from legion_shm.supervisor.spawn import WorkerProcess
    from legion_shm.supervisor.zygote_child import ZygoteProcess

    for kind in (WorkerProcess, ZygoteProcess):
        monkeypatch.setattr(kind, "start", failing(errno.EAGAIN))
    report = examine()
    assert not report.usable
    assert "Resource temporarily unavailable" in report.problems[0]


def test_a_broken_torch_is_told_and_does_not_end_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", failing(errno.EIO))
    report = examine(check=False)
    assert not report.usable
    assert "engine for engine=auto" in facts(report)


def test_a_comfyui_is_told_with_its_version_and_is_what_auto_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "there"
    (path / "comfy").mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (path / name).touch()
    (path / "comfyui_version.py").write_text('__version__ = "9.8.7"', encoding="utf-8")
    report = examine(comfyui=str(path), check=False)
    assert facts(report)["found"] == f"{path}, version 9.8.7 (given)"
    assert facts(report)["engine for engine=auto"] == f"comfy ({path})"
    assert main(["doctor", "--no-check", "--comfyui", str(tmp_path)]) == 2
    assert "is not a ComfyUI" in capsys.readouterr().err


@needs.linux
def test_looking_leaves_the_signal_mask_as_it_was() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    report = examine(check=False)
    assert facts(report)["death pipe (F_SETSIG)"].startswith("yes")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def make_comfyui(path: Path) -> Path:
    (path / "comfy").mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (path / name).touch()
    return path


def test_a_variable_that_leads_to_no_comfyui_is_told_when_another_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_comfyui(tmp_path / "ComfyUI")
    assert "COMFYUI_PATH" not in facts(examine(check=False))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "misspelt"))
    report = examine(check=False)
    assert facts(report)["found"].startswith(str(home))
    assert "misspelt, but there is no such folder" in facts(report)["COMFYUI_PATH"]
    assert levels(report)["COMFYUI_PATH"] == "note"
    monkeypatch.setenv("COMFYUI_PATH", str(make_comfyui(tmp_path / "right")))
    assert "COMFYUI_PATH" not in facts(examine(check=False))


def test_a_comfyui_that_does_not_run_is_in_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    cases: tuple[tuple[Level, bool], ...] = (("ok", False), ("note", True))
    for level, told in cases:
        report = Report()
        report.add("Check", "a 1 MiB tensor through a worker, engine=comfy", "StartupError", level)
        print_report(report)
        assert ("not in ComfyUI" in capsys.readouterr().out) == told
