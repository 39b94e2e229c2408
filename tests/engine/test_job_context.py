from __future__ import annotations

import threading
from typing import cast

import pytest

from legion_shm import job_context
from legion_shm.errors import InvalidWorkflow, JobCancelled, LegionError
from legion_shm.job_context import JobContext, current_job, running


class Recording(JobContext):
    def __init__(self, job_id: str = "j1") -> None:
        super().__init__(job_id, {})
        self.seen: list[tuple[object, ...]] = []

    def report_progress(self, value: float, total: float, node_id: str | None) -> None:
        self.seen.append(("progress", value, total, node_id))

    def report_preview(self, image: object, node_id: str | None) -> None:
        self.seen.append(("preview", image, node_id))


def test_outside_of_a_job_there_is_no_current_job() -> None:
    with pytest.raises(LegionError, match="no job runs here"):
        current_job()


def test_the_running_job_is_the_current_one_and_is_gone_afterwards() -> None:
    job = JobContext("j1", {"input_1": 5})
    with running(job) as entered:
        assert entered is job
        assert current_job() is job
        assert current_job().inputs["input_1"] == 5
    with pytest.raises(LegionError):
        current_job()


def test_a_job_that_fails_leaves_room_for_the_next() -> None:
    with pytest.raises(RuntimeError), running(JobContext("j1", {})):
        raise RuntimeError
    with running(JobContext("j2", {})):
        assert current_job().job_id == "j2"


def test_all_threads_of_the_process_see_the_same_job() -> None:
    seen: list[str] = []
    with running(JobContext("j1", {})):
        thread = threading.Thread(target=lambda: seen.append(current_job().job_id))
        thread.start()
        thread.join(timeout=10)
    assert seen == ["j1"]


def test_a_second_job_at_the_same_time_is_refused_and_the_first_goes_on() -> None:
    with running(JobContext("j1", {})):
        with (
            pytest.raises(LegionError, match="job j2 cannot run: job j1 still runs"),
            running(JobContext("j2", {})),
        ):
            pass
        assert current_job().job_id == "j1"


def test_outputs_are_what_was_delivered_and_a_copy_of_it() -> None:
    job = JobContext("j1", {})
    job.deliver("output_1", None)
    job.deliver("output_2", 2)
    job.outputs.clear()
    assert job.outputs == {"output_1": None, "output_2": 2}


def test_a_name_delivered_twice_is_an_invalid_workflow_and_the_first_value_stays() -> None:
    job = JobContext("j1", {})
    job.deliver("mask", None)
    with pytest.raises(InvalidWorkflow, match="'mask' of job j1 is delivered twice"):
        job.deliver("mask", 2)
    assert job.outputs == {"mask": None}


@pytest.mark.parametrize("name", [None, "", 3, {}])
def test_an_output_whose_name_is_no_text_is_an_invalid_workflow(name: object) -> None:
    job = JobContext("j1", {})
    with pytest.raises(InvalidWorkflow, match="an output's name is non-empty text") as caught:
        job.deliver(cast("str", name), 1)
    assert caught.value.input_name == "name"
    assert job.outputs == {}


def test_a_cancelled_job_stops_at_its_next_check() -> None:
    job = Recording()
    job.check_cancelled()
    assert not job.cancelled
    job.cancel()
    assert job.cancelled
    for act in (
        job.check_cancelled,
        lambda: job.progress(1, 2),
        lambda: job.preview("image"),
    ):
        with pytest.raises(JobCancelled) as caught:
            act()
        assert caught.value.job_id == "j1"
    assert job.seen == []


def test_node_authors_functions_reach_the_running_job() -> None:
    job = Recording()
    with running(job):
        job_context.progress(1, 4)
        job_context.preview("image")
        job_context.check_cancelled()
        job.progress(2, 4, node_id="7")
        job.cancel()
        with pytest.raises(JobCancelled):
            job_context.check_cancelled()
        with pytest.raises(JobCancelled):
            job_context.progress(3, 4)
    assert job.seen == [("progress", 1, 4, None), ("preview", "image", None), ("progress", 2, 4, "7")]


def test_node_authors_functions_do_nothing_outside_of_a_job() -> None:
    job_context.progress(1, 4)
    job_context.preview("image")
    job_context.check_cancelled()


def test_a_plain_context_takes_progress_and_previews_without_a_reader() -> None:
    job = JobContext("j1", {})
    job.progress(1, 2)
    job.preview("image")
    assert job.identities == {}
