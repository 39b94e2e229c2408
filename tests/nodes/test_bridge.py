"""What connects the nodes to the ComfyUI around them, with stand-ins for the parts of it that they look at.

The real thing is in test_in_comfyui.py; here is what needs no server.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from legion_shm.errors import JobCancelled
from legion_shm.nodes import bridge
from legion_shm.nodes.folders import Folders
from legion_shm.nodes.shared_supervisor import shared_supervisor
from tests.nodes.support import GRAPH_YAML, call, config, flow, text
from tests.system.support import wait_for


class Interrupted(Exception):
    pass


class FakeComfy:
    """The flag of `comfy.model_management`, the bars of `comfy.utils`, and the prompt that runs."""

    def __init__(self) -> None:
        self.flag = False
        self.bars: list[Any] = []
        self.server = SimpleNamespace(last_prompt_id="p1")
        comfy = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total, self.current = total, 0
                self.updates: list[tuple[float, float, object]] = []
                comfy.bars.append(self)

            def update_absolute(self, value: int, total: int, preview: object = None) -> None:
                self.current = value
                self.updates.append((value, total, preview))
                comfy.check()

        self.modules = {
            "comfy.model_management": SimpleNamespace(
                throw_exception_if_processing_interrupted=self.check,
                interrupt_current_processing=self.interrupt,
            ),
            "comfy.utils": SimpleNamespace(ProgressBar=ProgressBar),
            "server": SimpleNamespace(PromptServer=SimpleNamespace(instance=self.server)),
        }

    def check(self) -> None:
        if self.flag:
            self.flag = False
            raise Interrupted

    def interrupt(self, value: bool = True) -> None:
        self.flag = value


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeComfy]:
    fake = FakeComfy()
    for name, module in fake.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield fake
    assert not fake.flag, "an interruption was left over"


def run(prompt: dict[str, Any], *, asynch: bool = False) -> Any:
    yaml = GRAPH_YAML + f"  asynch: {str(asynch).lower()}\n"
    return call("LegionMaster", legion_config=config(yaml), workflow_text=text(prompt), input_1=1)


def test_progress_and_previews_move_the_bar_of_the_node_that_waits(comfy: FakeComfy) -> None:
    run(flow())  # so that the worker is warm
    comfy.bars.clear()
    prompt = flow("TestProgress", steps=4)
    prompt["first"] = {"class_type": "TestSleep", "inputs": {"seconds": 0.2, "value": ["in", 0]}}
    prompt["node"]["inputs"]["value"] = ["first", 0]
    prompt["last"] = {"class_type": "TestSleep", "inputs": {"seconds": 0.1, "value": ["node", 0]}}
    prompt["out"]["inputs"]["input_1"] = ["last", 0]
    run(prompt)
    (bar,) = comfy.bars
    values = [value for value, _, _ in bar.updates]
    assert values == sorted(values)
    assert 200 <= values[-1] <= bar.total == 500
    formats = {preview[0] for _, _, preview in bar.updates if preview is not None}
    assert formats == {"JPEG"}


def test_a_short_job_shows_no_bar(comfy: FakeComfy) -> None:
    for _ in range(2):
        comfy.bars.clear()
        run(flow())
    assert comfy.bars == []


def test_an_interruption_ends_the_wait_and_cancels_the_job(comfy: FakeComfy) -> None:
    run(flow())  # so that all events but the end come before the interruption

    def look() -> None:
        wait_for(lambda: [w for w in shared_supervisor().workers() if w.state == "busy"], "the job runs")
        comfy.interrupt()

    thread = threading.Thread(target=look)
    thread.start()
    begun_s = time.monotonic()
    with pytest.raises(Interrupted):
        run(flow("TestSleep", seconds=30, cooperate=True))
    assert time.monotonic() - begun_s < 10
    thread.join(10)
    assert run(flow())[1] == 1


def test_a_background_job_is_cancelled_though_another_node_saw_the_interruption(comfy: FakeComfy) -> None:
    campaign, *_ = run(flow("TestSleep", seconds=60, cooperate=True), asynch=True)
    wait_for(lambda: campaign.status == "running", "it runs")
    management: Any = sys.modules["comfy.model_management"]
    management.interrupt_current_processing()
    with pytest.raises(Interrupted):
        comfy.check()
    with pytest.raises(JobCancelled):
        call("LegionJoin", legion_campaign=campaign)


def test_an_interruption_of_another_prompt_leaves_a_background_job_alone(comfy: FakeComfy) -> None:
    campaign, *_ = run(flow("TestSleep", seconds=0.5, cooperate=True), asynch=True)
    comfy.server.last_prompt_id = "p2"
    management: Any = sys.modules["comfy.model_management"]
    management.interrupt_current_processing()
    with pytest.raises(Interrupted):
        comfy.check()
    management.interrupt_current_processing(False)
    assert call("LegionJoin", legion_campaign=campaign)[0] == 1


def test_the_wish_to_free_memory_reaches_the_workers_once_each_time(comfy: FakeComfy) -> None:
    asked = list[int]()
    wishes = [{"unload_models": True}, {}, {"free_memory": True}]
    comfy.server.prompt_queue = SimpleNamespace(get_flags=lambda reset=True: wishes.pop(0))
    for _ in range(2):  # a second supervisor of the same process
        bridge.on_free_memory(lambda: asked.append(len(wishes)))
    flags = comfy.server.prompt_queue.get_flags
    assert [flags(), flags(reset=True), flags()] == [{"unload_models": True}, {}, {"free_memory": True}]
    assert asked == [2, 0]


def test_workers_that_can_not_be_told_to_free_memory_do_not_end_comfyuis_thread(
    comfy: FakeComfy, caplog: pytest.LogCaptureFixture
) -> None:
    comfy.server.prompt_queue = SimpleNamespace(get_flags=lambda: {"free_memory": True})
    bridge.on_free_memory(lambda: next(iter(())))
    assert comfy.server.prompt_queue.get_flags() == {"free_memory": True}
    assert "not told to free memory" in caplog.text


def test_a_worker_previews_as_the_comfyui_around_it_unless_its_own_arguments_say_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def previews_by(method: str, *own: str) -> dict[str, object]:
        args = SimpleNamespace(preview_method=SimpleNamespace(value=method))
        monkeypatch.setitem(sys.modules, "comfy.cli_args", SimpleNamespace(args=args))
        return bridge.forwarded_data(own)

    assert previews_by("auto") == {"preview_method": "auto"}
    assert previews_by("none") == {}
    assert previews_by("auto", "--preview-method", "taesd") == {}
    assert previews_by("auto", "--preview-method=taesd") == {}


def test_log_lines_of_the_worker_come_to_our_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "legion_shm.worker"):
        run(flow("TestPrint", text="hello from there"))
    assert any("[worker] hello from there" in message for message in caplog.messages)


def test_a_worker_finds_its_files_where_the_comfyui_around_us_does(monkeypatch: pytest.MonkeyPatch) -> None:
    args = SimpleNamespace(
        base_directory="/base",
        extra_model_paths_config=[["a.yaml", "b.yaml"], ["c.yaml"]],
        input_directory=None,
        output_directory="/out",
        port=8188,
    )
    monkeypatch.setitem(sys.modules, "comfy.cli_args", SimpleNamespace(args=args))
    assert bridge.inherited_arguments(()) == (
        *("--base-directory", "/base"),
        *("--extra-model-paths-config", "a.yaml", "b.yaml"),
        *("--extra-model-paths-config", "c.yaml"),
        *("--output-directory", "/out"),
    )
    own = ("--output-directory", "/own", "--base-directory=/mine")
    assert "/out" not in bridge.inherited_arguments(own)
    assert "/base" not in bridge.inherited_arguments(own)


def test_the_folders_are_those_of_the_comfyui_around_us(monkeypatch: pytest.MonkeyPatch) -> None:
    paths: Any = ModuleType("folder_paths")
    paths.base_path, paths.get_user_directory = "/comfy", lambda: "/users"
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    folders = Folders.current()
    assert folders.comfyui is not None
    assert (folders.user.as_posix(), folders.comfyui.as_posix()) == ("/users/default", "/comfy")
