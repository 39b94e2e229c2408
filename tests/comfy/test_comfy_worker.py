"""A real ComfyUI in a worker process, driven through the embedding API."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from legion_shm import (
    InvalidWorkflow,
    JobCancelled,
    JobFailed,
    NodeEvent,
    PreviewEvent,
    ProgressEvent,
    StartupError,
    Supervisor,
    WorkerSpec,
)
from tests.comfy.conftest import RealComfyUI, chain

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(300)]

_WAIT_S = 120


@pytest.fixture(scope="module")
def legion() -> Iterator[Supervisor]:
    with Supervisor() as supervisor:
        yield supervisor


def test_an_image_goes_through_comfyui_and_comes_back(legion: Supervisor, spec: WorkerSpec) -> None:
    image = torch.rand(2, 256, 256, 3)
    result = legion.submit(chain("ImageInvert"), inputs=[image], spec=spec).result(timeout=_WAIT_S)
    assert torch.equal(result["output_1"], 1.0 - image)
    assert result.stats.engine == "comfy"
    assert [transfer.copies for transfer in result.stats.transfers] == [1, 1]


def test_what_comfyui_says_arrives_as_events(legion: Supervisor, spec: WorkerSpec) -> None:
    job = legion.submit(chain("ProbeSampler"), inputs=[torch.rand(1, 64, 64, 3)], spec=spec)
    job.result(timeout=_WAIT_S)
    events = list(job.events())
    assert [event.status for event in events if isinstance(event, NodeEvent)] == ["started", "finished"] * 3
    steps = [event for event in events if isinstance(event, ProgressEvent)]
    assert (steps[-1].node_id, steps[-1].value, steps[-1].total) == ("1", 3.0, 3.0)
    assert {(event.node_id, event.format) for event in events if isinstance(event, PreviewEvent)} == {
        ("1", "JPEG")
    }


def test_output_nodes_report_what_they_saved(legion: Supervisor, spec: WorkerSpec) -> None:
    prompt = chain("ImageInvert")
    prompt["3"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    result = legion.submit(prompt, inputs=[torch.rand(1, 8, 8, 3)], spec=spec).result(timeout=_WAIT_S)
    (told,) = result.ui["3"]["images"]
    assert told["type"] == "temp"
    assert Path(result.folders["temp"], told["subfolder"], told["filename"]).is_file()


def test_targets_and_extra_data_are_comfyuis_own(
    legion: Supervisor, spec: WorkerSpec, comfyui: RealComfyUI
) -> None:
    prompt = chain("ProbeFail")
    prompt["3"] = {"class_type": "SaveImage", "inputs": {"images": ["0", 0], "filename_prefix": "told"}}
    result = legion.submit(
        prompt,
        inputs=[torch.rand(1, 8, 8, 3)],
        spec=spec,
        targets=["3"],
        extra_data={"extra_pnginfo": {"about": {"of": "tests"}}},
    ).result(timeout=_WAIT_S)
    assert not result
    (told,) = result.ui["3"]["images"]
    assert Path(result.folders["output"]) == comfyui.base / "output"
    with Image.open(Path(result.folders["output"], told["filename"])) as picture:
        assert json.loads(picture.info["about"]) == {"of": "tests"}


def test_free_that_waits_says_what_came_back(legion: Supervisor, spec: WorkerSpec) -> None:
    big = {"width": 2000, "height": 2000, "batch_size": 1, "color": 5}
    prompt = chain("ImageInvert")
    prompt["0"] = {"class_type": "EmptyImage", "inputs": big}
    prompt["2"] = {"class_type": "PreviewImage", "inputs": {"images": ["0", 0]}}
    legion.submit(prompt, spec=spec).result(timeout=_WAIT_S)
    (freed,) = legion.free(spec, wait_s=30)
    assert freed.host_bytes > 40_000_000, "the 48 MB of the image"


def test_a_failing_node_is_told_and_the_worker_goes_on(legion: Supervisor, spec: WorkerSpec) -> None:
    image = torch.rand(1, 8, 8, 3)
    with pytest.raises(JobFailed, match="no image of 1 suits me") as failed:
        legion.submit(chain("ProbeFail"), inputs=[image], spec=spec).result(timeout=_WAIT_S)
    assert failed.value.node_id == "1"
    assert "legion_probe" in failed.value.traceback
    assert failed.value.inputs_summary == "image: Tensor[1,8,8,3] float32 cpu"
    with pytest.raises(InvalidWorkflow, match="NoSuchNode"):
        legion.submit(chain("NoSuchNode"), inputs=[image], spec=spec).result(timeout=_WAIT_S)
    result = legion.submit(chain("ImageInvert"), inputs=[image], spec=spec).result(timeout=_WAIT_S)
    assert torch.equal(result["output_1"], 1.0 - image)
    assert len(legion.workers()) == 1


def test_cancel_reaches_the_running_node(legion: Supervisor, spec: WorkerSpec) -> None:
    job = legion.submit(chain("ProbeSlow"), inputs=[torch.rand(1, 8, 8, 3)], spec=spec)
    running = threading.Event()

    def watch() -> None:
        for event in job.events():
            if isinstance(event, ProgressEvent):
                running.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert running.wait(_WAIT_S)
    worker = legion.workers()[0].pid
    job.cancel()
    with pytest.raises(JobCancelled):
        job.result(timeout=3)
    watcher.join(_WAIT_S)
    assert legion.workers()[0].pid == worker, "the worker had to be ended"


def test_the_second_job_finds_its_nodes_cached(legion: Supervisor, spec: WorkerSpec) -> None:
    image = legion.share(torch.rand(1, 32, 32, 3))
    first = legion.submit(chain("ImageInvert"), inputs=[image], spec=spec).result(timeout=_WAIT_S)
    second = legion.submit(chain("ImageInvert"), inputs=[image], spec=spec).result(timeout=_WAIT_S)
    assert torch.equal(first["output_1"], second["output_1"])
    assert (second.stats.nodes_executed, second.stats.nodes_cached) == (1, 2)


def test_arguments_that_comfyui_refuses_are_told(legion: Supervisor, spec: WorkerSpec) -> None:
    wrong = spec.model_copy(update={"extra_args": ("--no-such-argument",)})
    with pytest.raises(StartupError, match="unrecognized arguments: --no-such-argument"):
        legion.submit(chain("ImageInvert"), inputs=[1], spec=wrong).result(timeout=_WAIT_S)
