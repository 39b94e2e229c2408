from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from legion_shm import __version__
from legion_shm.cli import main
from legion_shm.cli_progress import JobReporter, explain
from legion_shm.cli_run import Signalled
from legion_shm.errors import InvalidWorkflow, JobFailed, StartupError
from legion_shm.events import EventsDropped, JobStarted, LogEvent, NodeEvent, ProgressEvent
from legion_shm.supervisor.spawn import WorkerProcess
from tests import needs
from tests.system.support import gone

REPO = Path(__file__).resolve().parents[2]
WORKFLOWS = REPO / "examples" / "workflows"
PHOTOGRAPH = REPO / "legion_shm" / "demo_data" / "coffee.jpg"
TEST_NODES = ("--engine", "graph", "--node-module", "legion_shm.testing.nodes")

PASS = {
    "in": {"class_type": "LegionImporter", "inputs": {}},
    "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["in", 0]}},
}

Run = Callable[..., "Outcome"]


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


@pytest.fixture
def legion(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def flow(class_type: str, **inputs: object) -> str:
    """A workflow file: input_1 goes into the node's ``value``, its first output is output_1."""
    nodes = {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "node": {"class_type": class_type, "inputs": {"value": ["in", 0], **inputs}},
        "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["node", 0]}},
    }
    Path("flow.json").write_text(json.dumps(nodes), encoding="utf-8")
    return "flow.json"


# --- usage ----------------------------------------------------------------------------------------


def test_help_names_every_command_and_each_command_explains_itself(legion: Run) -> None:
    overview = legion("--help")
    assert overview.code == 0
    for command in ("run", "doctor", "demo"):
        assert f"\n  {command} " in overview.out
        explained = legion(command, "--help")
        assert explained.code == 0
        assert explained.out.startswith(f"Usage: legion {command}")
    assert "Examples:" in legion("run", "-h").out


def test_version_is_the_package_s(legion: Run) -> None:
    assert legion("--version").out == f"legion {__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    code = "from legion_shm.cli import main; import sys; main(['--help']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert not {"torch", "numpy", "zmq", "pydantic", "rich", "PIL"} & set(done.stdout.split())


BAD_USAGE = {
    "no command": ([], "Usage: legion"),
    "an unknown option": (["run", "upscale.json", "--nope"], "No such option"),
    "no such workflow": (["run", "nope.json"], "cannot read the workflow file 'nope.json'"),
    "no workflow": (["run", "broken.json"], "not valid JSON"),
    "an input without value": (["run", "upscale.json", "-i", "1"], "NAME=VALUE"),
    "an input twice": (["run", "upscale.json", "-i", "1=1", "-i", "input_1=2"], "input_1 is given twice"),
    "a missing image": (["run", "upscale.json", "-i", "1=photo.png"], "there is no file 'photo.png'"),
    "an input nobody reads": (["run", "upscale.json", "-i", "seed=1"], "no node of the workflow reads it"),
    "a thirteenth input": (["run", "upscale.json", "-i", "13=1"], "no node of the workflow reads it"),
    "a missing input": (["run", "blend.json", "-i", "image=1"], "the input 'strength' was not given"),
    "an output nobody makes": (["run", "upscale.json", "-o", "2=a.png"], "it delivers output_1"),
    "an output of an unknown kind": (["run", "upscale.json", "-o", "1=a.xyz"], "'.xyz' is not known"),
    "an output in no folder": (["run", "upscale.json", "-o", "1=no/a.png"], "there is no folder 'no'"),
    "two outputs in one file": (
        ["run", "two.json", "-o", "a=x.txt", "-o", "b=./x.txt"],
        "the file of a already",
    ),
    "an environment without value": (["run", "upscale.json", "-e", "HOME"], "NAME=VALUE"),
    "no time": (["run", "upscale.json", "--timeout", "0"], "--timeout"),
    "a folder that is no ComfyUI": (
        ["run", "upscale.json", "--engine", "comfy", "--comfyui", "."],
        "is not a ComfyUI: it lacks main.py",
    ),
}


@pytest.fixture
def workflow_files(tmp_path: Path) -> None:
    for name in ("upscale.json", "blend.json"):
        (tmp_path / name).write_bytes((WORKFLOWS / name).read_bytes())
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    two = {n: {"class_type": "LegionOutput", "inputs": {"name": n, "value": 1}} for n in ("a", "b")}
    (tmp_path / "two.json").write_text(json.dumps(two), encoding="utf-8")


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_is_refused_with_code_2_before_a_worker_starts(
    legion: Run, workflow_files: None, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[WorkerProcess] = []
    monkeypatch.setattr(WorkerProcess, "start", started.append)
    arguments, message = BAD_USAGE[case]
    outcome = legion(*arguments)
    assert outcome.code == 2, outcome
    assert started == []
    assert message in outcome.err
    assert outcome.out == ""


def test_refusals_are_told_as_json_too(legion: Run, workflow_files: None) -> None:
    outcome = legion("run", "upscale.json", "-i", "1=photo.png", "--json")
    assert outcome.code == 2
    assert outcome.document["state"] == "refused"
    assert "photo.png" in outcome.document["error"]["message"]


def test_standard_input_that_is_no_workflow_is_refused() -> None:
    from legion_shm import cli

    assert (
        "expected a JSON object" in CliRunner().invoke(cli._legion, ["run", "-"], input="upscale.json").output
    )


# --- jobs -----------------------------------------------------------------------------------------


def test_an_image_goes_in_and_comes_out_scaled(legion: Run, tmp_path: Path) -> None:
    outcome = legion(
        "run", WORKFLOWS / "upscale.json", "--input", f"1={PHOTOGRAPH}", "--input", "2=0.5",
        "--output", "1=small.png", "--engine", "graph",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert outcome.out == ""
    assert "output_1: tensor float32 1x200x300x3 -> small.png" in outcome.err
    from PIL import Image

    with Image.open(tmp_path / "small.png") as small, Image.open(PHOTOGRAPH) as large:
        assert small.size == (300, 200)
        reference = np.asarray(large.resize((300, 200), Image.Resampling.BOX)).astype(float)
        assert np.abs(np.asarray(small).astype(float) - reference).mean() < 12


def test_named_channels_tensors_and_the_json_document(legion: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(1).random((1, 96, 96, 3), dtype=np.float32))
    outcome = legion(
        "run", WORKFLOWS / "blend.json", "-i", "image=x.npy", "-i", "strength=0", "-o", "image=y.npy",
        "--engine", "graph", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    document = outcome.document
    assert (document["state"], document["engine"], document["error"]) == ("done", "graph", None)
    assert document["job"].startswith("j-")
    assert document["outputs"]["image"] == {
        "type": "tensor", "dtype": "float32", "shape": [1, 96, 96, 3], "bytes": 110592,
        "file": "y.npy", "files": ["y.npy"],
    }  # fmt: skip
    assert document["stats"]["nodes_executed"] == 5
    crossed = {
        (transfer["direction"], transfer["name"]): transfer for transfer in document["stats"]["transfers"]
    }
    assert crossed["to_worker", "image"]["copies"] == 1
    # Blended with itself at strength 0, an image is what it was.
    assert np.array_equal(np.load(tmp_path / "y.npy"), np.load(tmp_path / "x.npy"))


@needs.symlinks
def test_the_readme_s_first_command_does_what_it_says(legion: Run, tmp_path: Path) -> None:
    lines = (REPO / "README.md").read_text(encoding="utf-8").splitlines()
    command = next(line for line in lines if line.startswith("legion run ")).partition("#")[0].split()
    for folder in ("examples", "legion_shm"):
        (tmp_path / folder).symlink_to(REPO / folder)
    outcome = legion(*command[1:])
    assert outcome.code == 0, outcome
    assert "WARNING" not in outcome.err
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize("option", ["--node-module", "--node-modules", "-m"])
def test_node_classes_come_from_a_module_by_any_of_the_options_names(
    legion: Run, tmp_path: Path, option: str
) -> None:
    (tmp_path / "mine.py").write_text(
        "class Twice:\n"
        "    RETURN_TYPES, FUNCTION = ('INT',), 'run'\n"
        "    @classmethod\n"
        "    def INPUT_TYPES(cls): return {'required': {'value': ('INT', {})}}\n"
        "    def run(self, value): return (value * 2,)\n"
        "NODE_CLASS_MAPPINGS = {'Twice': Twice}\n"
    )
    run = ("run", flow("Twice"), "--engine", "graph", "--input", "1=21", "--json")
    outcome = legion(*run, option, "mine.py")
    assert (outcome.code, outcome.document["outputs"]["output_1"]["value"]) == (0, 42), outcome
    lacking = legion(*run)
    assert lacking.code == 1, lacking
    assert "no node class 'Twice' is loaded" in lacking.out
    assert "--node-module" in lacking.out
    assert "--engine comfy" in lacking.out


def test_lines_of_the_worker_go_to_standard_error_and_values_to_standard_output(legion: Run) -> None:
    workflow = flow("TestPrint", text="a line of the node", stream="stdout")
    outcome = legion("run", workflow, *TEST_NODES, "-i", '1={"a": [1, 2]}', "-o", "1=-")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out) == {"a": [1, 2]}
    assert "a line of the node" in outcome.err


def test_the_environment_reaches_the_worker_and_not_this_process_and_quiet_is_quiet(legion: Run) -> None:
    workflow = flow("TestEnviron", name="LEGION_TEST")
    outcome = legion("run", workflow, *TEST_NODES, "-e", "LEGION_TEST=a=b", "-o", "1=-", "--quiet", "--json")
    assert outcome.document["outputs"]["output_1"]["value"] == "a=b", outcome
    assert outcome.err == ""
    assert "LEGION_TEST" not in os.environ


def test_a_failing_node_is_named_with_code_1_and_verbose_shows_its_traceback(
    legion: Run, tmp_path: Path
) -> None:
    workflow = flow("TestRaise", kind="KeyError", text="what failed")
    outcome = legion("run", workflow, *TEST_NODES, "-i", "1=1", "-o", "1=a.json", "--verbose", "--json")
    assert outcome.code == 1
    assert "Error: node node (TestRaise)" in outcome.err
    assert "raise getattr(builtins, kind)(text)" in outcome.err
    assert not (tmp_path / "a.json").exists()
    assert outcome.document["state"] == "failed"
    error = outcome.document["error"]
    assert (error["type"], error["node_id"], error["class_type"]) == ("JobFailed", "node", "TestRaise")
    assert "what failed" in error["traceback"]


def test_a_job_past_its_time_out_ends_with_code_1(legion: Run) -> None:
    workflow = flow("TestSleep", seconds=60.0, cooperate=True)
    outcome = legion("run", workflow, *TEST_NODES, "-i", "1=1", "--timeout", "2", "--json")
    assert outcome.code == 1
    assert outcome.document["error"]["type"] == "DeadlineExceeded"


def test_a_lost_worker_ends_with_code_1_and_retries_survive_it(legion: Run, tmp_path: Path) -> None:
    workflow = flow("TestDieUntil", file=str(tmp_path / "deaths"), deaths=1)
    lost = legion("run", workflow, *TEST_NODES, "-i", "1=1", "--json")
    assert lost.code == 1
    assert (lost.document["state"], lost.document["error"]["type"]) == ("lost", "WorkerLost")
    (tmp_path / "deaths").unlink()
    survived = legion("run", workflow, *TEST_NODES, "-i", "1=1", "-o", "1=-", "--retries", "1")
    assert (survived.code, survived.out) == (0, "1\n")
    assert "attempt 1: the worker" in survived.err
    assert needs.KILLED in survived.err


def test_a_result_that_does_not_fit_its_file_fails_alone(legion: Run, tmp_path: Path) -> None:
    workflow = {
        name: {"class_type": "LegionOutput", "inputs": {"name": name, "value": value}}
        for name, value in (("text", "some text"), ("number", 3))
    }
    (tmp_path / "two.json").write_text(json.dumps(workflow), encoding="utf-8")
    outcome = legion(
        "run", "two.json", "--engine", "graph", "-o", "text=a.png", "-o", "number=b.txt", "--json"
    )
    assert outcome.code == 1, outcome
    assert outcome.document["state"] == "done"
    assert "a.png" in outcome.document["error"]["message"]
    assert sorted(os.listdir(tmp_path)) == ["b.txt", "two.json"]
    assert outcome.document["outputs"]["number"]["file"] == "b.txt"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("extra", [("--output", "1=-"), ("--json",)])
def test_a_full_standard_output_is_told_without_a_traceback(tmp_path: Path, extra: tuple[str, ...]) -> None:
    (tmp_path / "pass.json").write_text(json.dumps(PASS), encoding="utf-8")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "legion_shm.cli",
                "run",
                "pass.json",
                "--engine",
                "graph",
                "-i",
                "1=1",
                *extra,
            ],
            cwd=tmp_path,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1, done
    assert done.stderr.strip().splitlines()[-1].startswith("Error: cannot write to standard output: ")
    assert "Traceback" not in done.stderr


# --- signals --------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def wait_until(condition: Callable[[], object], what: str, within_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(0.01)


@needs.posix
def test_a_ctrl_c_while_the_command_line_loads_ends_it_without_a_traceback(tmp_path: Path) -> None:
    # Stands before the real click, which the command line imports first.
    (tmp_path / "click.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "legion_shm", "--version"],
        env={**environment(), "PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPO)))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(("module", "package"), [("torch", "torch"), ("PIL", "pillow"), ("click", "click")])
def test_a_package_that_is_missing_is_told_with_what_installs_it(
    tmp_path: Path, module: str, package: str
) -> None:
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError({module!r}, name={module!r})\n")
    done = subprocess.run(
        [sys.executable, "-m", "legion_shm", "demo", "--output", str(tmp_path / "out.png")],
        env={**environment(), "PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPO)))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"run `{sys.executable} -m pip install {package}`" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "legion_shm", "--version"],
        env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"legion {__version__}\n")


@needs.posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_worker_before_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    workflow = flow("TestGate", entered=str(tmp_path / "entered"), go=str(tmp_path / "go"))
    command = [
        sys.executable,
        "-m",
        "legion_shm.cli",
        "run",
        workflow,
        *TEST_NODES,
        "-i",
        "1=1",
        "-o",
        "1=a.json",
    ]
    with subprocess.Popen(
        [*command, "--json"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until((tmp_path / "entered").exists, "the node runs")
            children = psutil.Process(process.pid).children(recursive=True)
            workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            process.send_signal(number)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == code, err
    assert workers, "one, and the process that it was forked from where it was"
    assert all(gone(worker.pid) for worker in workers)
    assert json.loads(out)["state"] == "cancelled"
    assert "Interrupted" in err
    assert sorted(os.listdir(tmp_path)) == ["entered", "flow.json"]


# --- what is shown --------------------------------------------------------------------------------


def reporter(*, terminal: bool, **options: Any) -> tuple[JobReporter, Console]:
    console = Console(force_terminal=terminal, width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    return JobReporter(nodes=2, console=console, **options), console


def show(reporter: JobReporter) -> float:
    """Give it a job's events; how far the bar got, in nodes, before the last one."""
    with reporter.shown():
        reporter.take(JobStarted("j", 1, 0.0, "w1", "graph", 1))
        reporter.take(NodeEvent("j", 2, 0.0, "1", "LoadImage", "started"))
        reporter.take(NodeEvent("j", 3, 0.0, "1", "LoadImage", "finished"))
        reporter.take(NodeEvent("j", 4, 0.0, "2", "ImageBlur", "started"))
        reporter.take(ProgressEvent("j", 5, 0.0, "2", 1.0, 4.0))
        reporter.take(LogEvent("j", 6, 0.0, "stdout", "[bold]a line[/bold]"))
        reporter.take(LogEvent("j", 7, 0.0, "log", "careful", "WARNING", "x"))
        reporter.take(EventsDropped("j", 8, 0.0, 5))
        return reporter._progress.tasks[0].completed if reporter._progress is not None else -1.0


def test_a_terminal_gets_a_bar_and_lines_as_they_are() -> None:
    shown, console = reporter(terminal=True)
    assert show(shown) == 1.25
    text = console.export_text()
    assert "[bold]a line[/bold]" in text
    assert "WARNING: careful" in text
    assert "ImageBlur" in text
    console.file.close()


def test_the_cursor_comes_back_where_a_signal_came_while_the_bar_was_being_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.StringIO()
    shown = JobReporter(nodes=2, console=Console(force_terminal=True, width=100, file=written))

    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise Signalled(signal.SIGINT)

    monkeypatch.setattr("rich.live.Live.refresh", interrupted)
    with pytest.raises(Signalled), shown.shown():
        raise AssertionError("not reached")
    assert written.getvalue().rfind("\x1b[?25h") > written.getvalue().rfind("\x1b[?25l") >= 0


def test_without_a_terminal_there_are_lines_and_no_bar() -> None:
    shown, console = reporter(terminal=False)
    assert show(shown) == -1.0
    assert console.export_text().splitlines() == [
        "[bold]a line[/bold]",
        "WARNING: careful",
        "(5 events came too fast to be shown)",
    ]
    console.file.close()


def test_quiet_shows_nothing() -> None:
    shown, console = reporter(terminal=True, quiet=True)
    show(shown)
    assert console.export_text() == ""
    console.file.close()


def test_an_error_is_told_once_and_tracebacks_only_when_asked() -> None:
    trace = 'Traceback (most recent call last):\n  File "x.py"\nValueError: no'
    startup = StartupError(
        f"worker w1 could not start: no\n{trace}", traceback=trace, log_tail=("last words",)
    )
    assert "x.py" not in explain(startup, verbose=False)
    assert explain(startup, verbose=True).count("x.py") == 1
    assert "last words" in explain(startup, verbose=False)
    failed = JobFailed("it failed", node_id="7", class_type="Blur", traceback=trace)
    assert "node 7 (Blur)" in explain(failed, verbose=False)
    workflow = InvalidWorkflow("two things are wrong", problems=("first", "second"))
    assert explain(workflow, verbose=False).splitlines() == ["two things are wrong", "  first", "  second"]
