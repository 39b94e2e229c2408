"""ComfyUI's own server under `legion launch`: COMFYUI_PATH says which, COMFYUI_PYTHON what runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from legion_shm.supervisor.worker_env import LAUNCHED
from legion_shm.transport.born_build import library_path
from tests.comfy.launched import prompt_for, shown_by, start
from tests.nodes.comfy_server import COMFYUI, PYTHON, ComfyServer

_, LACKING = library_path()
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(COMFYUI is None, reason="COMFYUI_PATH says no ComfyUI"),
    pytest.mark.skipif(bool(LACKING), reason=f"tensors cannot be born in arenas here: {LACKING}"),
    pytest.mark.timeout(300),
]

_TRIES = 10
"""The arena has no room for an image of a size until a few have been sent."""


@pytest.fixture(scope="module")
def launched(
    tmp_path_factory: pytest.TempPathFactory, nothing_left_by_the_module: None
) -> Iterator[ComfyServer]:
    server = start(Path(COMFYUI or "."), PYTHON, tmp_path_factory.mktemp("launched"), launched=True)
    yield server
    server.stop()


def test_a_master_s_image_goes_to_a_worker_and_back_with_the_right_contents(launched: ComfyServer) -> None:
    for seed in (1, 2):
        seen = shown_by(launched, prompt_for(seed, height=256, width=320, invert=True))
        assert seen["launched"]
        assert seen["same"]
        assert seen["inverted"]


def test_the_server_s_own_images_go_to_workers_without_a_copy(launched: ComfyServer) -> None:
    copies: list[int] = []
    for seed in range(_TRIES):
        seen = shown_by(launched, prompt_for(100 + seed, height=1080, width=1920))
        assert seen["same"]
        copies.append(seen["copies"]["to_worker"])
        if copies[-1] == 0:
            break
    assert copies[-1] == 0, copies


def test_the_launched_server_s_workers_are_not_launched_programs(launched: ComfyServer) -> None:
    assert LAUNCHED in psutil.Process(launched.process.pid).environ()
    workers = launched.workers()
    assert workers
    for worker in workers:
        assert LAUNCHED not in worker.environ()
