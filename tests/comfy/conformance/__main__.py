"""``python -m tests.comfy.conformance --comfyui PATH --python EXE``: the suite, and how it compares.

Ends with 0 if every test that ran against Legion passed, or fails against ComfyUI's own server as well.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from tests.comfy.conformance.runner import SuiteRun, run_suite, suite_problem


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.comfy.conformance", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI, with its tests")
    parser.add_argument("--python", type=Path, required=True, help="a Python with its packages and Legion's")
    parser.add_argument("--baseline", action="store_true", help="run it against ComfyUI's HTTP server, too")
    parser.add_argument("--only-baseline", action="store_true", help="not against Legion")
    parser.add_argument("--echo", action="store_true", help="show pytest's output")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="for each of the two runs")
    parser.add_argument("pytest_args", nargs="*", metavar="-- PYTEST_ARGUMENT")
    chosen = parser.parse_args()
    comfyui, python = chosen.comfyui.expanduser().resolve(), chosen.python.expanduser().absolute()
    problem = suite_problem(comfyui, python)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    runs: dict[str, SuiteRun] = {}
    for name, wanted in (
        ("ComfyUI's HTTP server", chosen.baseline or chosen.only_baseline),
        ("Legion worker", not chosen.only_baseline),
    ):
        if wanted:
            runs[name] = run_suite(
                comfyui,
                python,
                baseline=name != "Legion worker",
                pytest_args=chosen.pytest_args,
                timeout_s=chosen.timeout_s,
                echo=chosen.echo,
            )
            _show(name, runs[name])
    *others, last = runs.values()
    excused = {outcome.name for run in others for outcome in run.of("failed")}
    bad = [outcome for outcome in last.of("failed") if outcome.name not in excused]
    return 1 if bad or not last.of("passed") or last.exit_code not in (0, 1) else 0


def _show(name: str, run: SuiteRun) -> None:
    counts, took_s = run.counts(), sum(outcome.took_s for outcome in run.outcomes)
    ended = ", ".join(f"{counts[state]} {state}" for state in ("passed", "failed", "skipped"))
    print(f"{name}: {ended} in {took_s:.0f} s (exit code {run.exit_code})")
    without = sum(outcome.needs_no_server for outcome in run.of("passed"))
    print(f"  of those passed, {without} are unit tests that start no server")
    for outcome in run.of("failed"):
        print(f"  failed: {outcome.name}: {' '.join(outcome.reason.split())[:300]}")
    skipped = Counter((outcome.function, outcome.reason) for outcome in run.of("skipped"))
    for (function, reason), times in skipped.items():
        print(f"  skipped: {function}, {times} times: {reason}")
    if not run.outcomes:
        print(run.output[-4000:])


if __name__ == "__main__":
    sys.exit(main())
