"""ComfyUI's own execution tests, run against a Legion worker instead of ComfyUI's HTTP server."""

from __future__ import annotations

import pytest

from tests.comfy.conformance.runner import run_suite, suite_problem
from tests.comfy.conftest import RealComfyUI

_SUITE_TIMEOUT_S = 900.0

pytestmark = [pytest.mark.comfyui, pytest.mark.slow, pytest.mark.timeout(_SUITE_TIMEOUT_S + 60)]

_SKIPPED = "tests HTTP itself"
_SKIPPED_BY_THE_SUITE = "test_preview_method."
"""They look for a server, with a model of several gigabytes, that somebody else has started."""


def test_comfyuis_own_execution_tests_pass_with_a_worker_in_place_of_the_server(comfyui: RealComfyUI) -> None:
    problem = suite_problem(comfyui.path, comfyui.python)
    if problem:
        pytest.skip(problem)
    # The checks of time are for a machine that does nothing else.
    run = run_suite(
        comfyui.path, comfyui.python, timeout_s=_SUITE_TIMEOUT_S, pytest_args=["--skip-timing-checks"]
    )
    assert [f"{outcome.name}: {outcome.reason}" for outcome in run.of("failed")] == []
    assert run.exit_code == 0, run.output[-4000:]
    skipped = [outcome for outcome in run.of("skipped") if not outcome.reason.startswith(_SKIPPED)]
    assert [outcome.name for outcome in skipped if not outcome.name.startswith(_SKIPPED_BY_THE_SUITE)] == []
    assert sum(not outcome.needs_no_server for outcome in run.of("passed")) > 150
