"""Nodes in workers write into what they were given or keep: no node, no later job and no caller sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from legion_shm import JobFailed, Result, Supervisor
from tests import needs
from tests.system.support import Workflow, spec
from tests.system.writing_nodes import NBYTES, digest, write

MODULE = "tests.system.writing_nodes"
ONES = digest(torch.ones(NBYTES // 4))
HOWS = ["torch", "numpy", "C"]


@pytest.fixture(scope="module", params=needs.SEGMENT_KINDS)
def legion(request: pytest.FixtureRequest) -> Iterator[Supervisor]:
    with Supervisor(segments=request.param) as supervisor:
        yield supervisor


def finish(legion: Supervisor, workflow: Workflow, *inputs: Any) -> Result:
    return legion.submit(workflow, inputs=inputs, spec=spec(node_modules=[MODULE])).result(timeout=60)


def flow(
    source: str, how: str, *, first: int, fails: bool = False, number: int = 0, kept: bool = False
) -> Workflow:
    """A value is looked at, written into by a node, looked at again and delivered."""
    options = {"how": how, "first": first, "fails": fails}
    made = {"Make": {"kept": kept, "number": number}, "LegionImporter": {}}[source]
    return {
        "source": {"class_type": source, "inputs": made},
        "before": {"class_type": "Look", "inputs": {"value": ["source", 0]}},
        "write": {
            "class_type": "WriteFrom",
            "inputs": {**options, "value": ["source", 0], "after": ["before", 0]},
        },
        "after": {"class_type": "Look", "inputs": {"value": ["source", 0], "after": ["write", 0]}},
        "out": {
            "class_type": "LegionExporter",
            "inputs": {
                "input_1": ["before", 0],
                "input_2": ["after", 0],
                "input_3": ["source", 0],
                "input_4": ["write", 0],
                "input_5": ["write", 1],
            },
        },
    }


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("source", ["LegionImporter", "Make"])
def test_nobody_sees_what_a_node_writes_into_its_input_from_its_second_run_on(
    legion: Supervisor, source: str, how: str
) -> None:
    given = legion.share(torch.ones(NBYTES // 4))
    legion.free()  # the node's count begins anew
    for run in range(3):
        result = finish(legion, flow(source, how, first=1, number=HOWS.index(how)), given)
        assert result["output_1"] == result["output_2"] == digest(result["output_3"]) == digest(given) == ONES
        assert (digest(result["output_4"]) == ONES) == (run < 1)
        result["output_3"].zero_()


@pytest.mark.parametrize("how", HOWS)
def test_a_node_that_fails_after_a_write_has_changed_nothing(legion: Supervisor, how: str) -> None:
    given = legion.share(torch.ones(NBYTES // 4))
    for source in ("LegionImporter", "Make"):
        with pytest.raises(JobFailed, match="after the write"):
            finish(legion, flow(source, how, first=0, fails=True), given)
        result = finish(legion, flow(source, how, first=100), given)
        assert result["output_1"] == result["output_2"] == digest(given) == ONES


def test_an_output_that_a_node_keeps_and_writes_is_what_it_was_for_everybody_else(legion: Supervisor) -> None:
    results = [finish(legion, flow("Make", "C", first=100, number=number, kept=True)) for number in (11, 12)]
    again = finish(legion, flow("Make", "C", first=100, number=12, kept=True))
    for result in (*results, again):
        assert result["output_1"] == digest(result["output_3"]) == digest(result["output_4"]) == ONES
    legion.stop_workers()  # which ends what the node keeps


def test_an_unwritten_input_that_others_have_too_is_given_on_without_a_copy(legion: Supervisor) -> None:
    given = legion.share(torch.ones(NBYTES // 4))
    result = finish(legion, flow("LegionImporter", "C", first=100), given)
    assert digest(result["output_4"]) == ONES
    if legion._memory.kind == "memfd":
        assert result["output_5"] == "private", "a view of the pages that came"
        assert result.stats.copies == 0


@needs.linux
@pytest.mark.parametrize("how", HOWS)
def test_a_view_shows_what_is_in_its_block_after_an_earlier_view_of_it_was_written(how: str) -> None:
    with Supervisor() as legion:
        for number in range(20):  # more than there are mappings of a segment
            value = legion.share(torch.full((NBYTES // 4,), 10.0 + number))
            expected = digest(value)
            result = finish(legion, flow("LegionImporter", how, first=0), value)
            assert result["output_1"] == result["output_2"] == digest(result["output_3"]) == expected
            assert digest(result["output_4"]) != expected


@pytest.mark.parametrize("how", HOWS)
def test_a_callers_write_into_a_received_tensor_is_honoured_when_it_is_passed_on(
    legion: Supervisor, how: str
) -> None:
    received = finish(legion, flow("Make", "C", first=100))["output_3"]
    write(received, how)
    expected = digest(received)
    assert expected != ONES
    result = finish(legion, flow("LegionImporter", "C", first=100), received)
    assert result["output_1"] == result["output_2"] == digest(result["output_3"]) == expected
