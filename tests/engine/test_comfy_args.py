"""The command line that a worker's ComfyUI is started with, on a stand-in for its parser."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pytest

from legion_shm.supervisor.comfy_args import GivenArguments, headless_arguments


def given(*arguments: str) -> GivenArguments:
    """A parser with the options that matter here, in the groups that ComfyUI has them in."""
    parser = argparse.ArgumentParser()
    for name in ("--temp-directory", "--database-url", "--output-directory"):
        parser.add_argument(name)
    parser.add_argument("--directml", type=int, nargs="?")
    vram = parser.add_mutually_exclusive_group()
    for name in ("--gpu-only", "--lowvram", "--novram", "--cpu"):
        vram.add_argument(name, action="store_true")
    return GivenArguments(parser, arguments)


def test_without_a_gpu_it_runs_on_the_cpu(tmp_path: Path) -> None:
    line = headless_arguments(given("--output-directory", "o"), temp=tmp_path, accelerator=False)
    assert line[:2] == ["--output-directory", "o"]
    assert line[-1] == "--cpu"
    assert "--cpu" not in headless_arguments(given(), temp=tmp_path, accelerator=True)


def test_without_a_gpu_what_would_exclude_the_cpu_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        line = headless_arguments(
            given("--lowvram", "--output-directory", "o"), temp=tmp_path, accelerator=False
        )
    assert "--lowvram" not in line
    assert line[-1] == "--cpu"
    assert ["--lowvram" in record.message for record in caplog.records] == [True]


def test_with_a_gpu_the_users_choice_stands(tmp_path: Path) -> None:
    line = headless_arguments(given("--lowvram"), temp=tmp_path, accelerator=True)
    assert line[0] == "--lowvram"
    assert "--cpu" not in line
