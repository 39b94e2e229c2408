"""The command line: `legion run`, `legion doctor`, `legion demo`.

Owns options, exit codes and signals. What a command does is in modules that load when it runs, so that
`legion --help` answers at once.

Exit codes: 0 done, 1 the job (or a check) failed, 2 bad usage, 130 interrupted (Ctrl-C), 143 terminated.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from legion_shm import __version__
from legion_shm.cli_values import Destination, describe, json_form, plan_output, read_input, write_output
from legion_shm.errors import ConfigError, InvalidWorkflow, LegionError, UnsupportedValue

if TYPE_CHECKING:
    from types import FrameType

    from legion_shm.config import WorkerSpec
    from legion_shm.supervisor.job import Result
    from legion_shm.workflow import Workflow

__all__ = ["main"]

_REFUSED = (ConfigError, InvalidWorkflow, UnsupportedValue)  # by submit: the caller's own mistakes
_CLOSING = {"cancel_grace_s": 1.0, "stop_grace_s": 2.0, "term_grace_s": 1.0}
"""A command's worker serves it alone: nobody else would gain from waiting longer."""


class _Signalled(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _signals_raise() -> Generator[None]:
    """SIGINT and SIGTERM raise `_Signalled` once; a second one ends the process, and its workers with it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise _Signalled(number)

    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        with _signals_raise():
            code: object = _legion.main(
                args=None if args is None else list(args), prog_name="legion", standalone_mode=False
            )
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except _Signalled as error:
        return 128 + error.number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails again
        return 1


@click.group(
    name="legion",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`legion COMMAND --help` explains a command. Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.",
)
@click.version_option(__version__, "-V", "--version", message="legion %(version)s")
def _legion() -> None:
    """Run ComfyUI workflows and node graphs in worker processes.

    Tensors cross to the worker and back through shared memory.
    """


def _pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """An option that is given as NAME=VALUE, any number of times."""
    pairs: dict[str, str] = {}
    prefix = {"inputs": "input_", "outputs": "output_"}.get(parameter.name or "", "")
    for text in values:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{text!r} is not of the form NAME=VALUE", context, parameter)
        if prefix and name.isascii() and name.isdigit():
            name = f"{prefix}{int(name)}"
        if name in pairs:
            raise click.BadParameter(f"{name} is given twice", context, parameter)
        pairs[name] = value
    return pairs


_RUN_EPILOG = """\b
Examples:
  legion run upscale.json --input 1=photo.png --output 1=large.png
  legion run blend.json --input image=photo.jpg --input strength=0.5 --output image=out.webp
  legion run nodes.json --node-module ./my_nodes.py --input 1=@x.npy --output 1=y.safetensors
  legion run stats.json --input 1=photo.png --output 1=- | jq .
  legion run flow.json --engine comfy --comfyui ~/ComfyUI --timeout 600 --json

\b
Values of --input:
  photo.png  .jpg .webp .bmp .tiff   an image: IMAGE [B,H,W,3], float32 from 0 to 1
  x.npy, x.safetensors               a tensor; a dict of tensors
  x.json, x.txt                      what the file holds
  @PATH                              the file, also where it could be taken for text
  0.5, true, null, [1,2], {"a":1}    JSON
  str:TEXT, json:TEXT                that kind, whatever it looks like
  anything else                      the text itself

\b
Files of --output, by extension:
  images                             IMAGE or MASK, 8 bits; a batch as out_00001.png, ...
  .npy, .safetensors                 a tensor; a tensor or a dict of tensors
  .json, .txt, or - for stdout       as JSON, as text, as a line of JSON
"""


@_legion.command("run", epilog=_RUN_EPILOG, short_help="Run a workflow and write its outputs.")
@click.argument("workflow", metavar="WORKFLOW.json")
@click.option(
    "--input", "-i", "inputs", multiple=True, callback=_pairs, metavar="NAME=VALUE",
    help="Give an input; a number N means the channel input_N.",
)  # fmt: skip
@click.option(
    "--output", "-o", "outputs", multiple=True, callback=_pairs, metavar="NAME=FILE",
    help="Write an output; a number N means the channel output_N.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["auto", "graph", "comfy"]), default="auto", show_default=True,
    help="auto: ComfyUI where one is found, else the graph engine.",
)  # fmt: skip
@click.option("--comfyui", metavar="PATH", help="The ComfyUI to use; else COMFYUI_PATH, else ~/ComfyUI.")
@click.option(
    "--node-module", "-m", "node_modules", multiple=True, metavar="MODULE",
    help="A module with NODE_CLASS_MAPPINGS: an importable name, a .py file or a folder (graph engine).",
)  # fmt: skip
@click.option(
    "--env", "-e", multiple=True, callback=_pairs, metavar="NAME=VALUE",
    help="An environment variable of the worker, set before it starts.",
)  # fmt: skip
@click.option("--python", metavar="EXE", help="Another Python for the worker, with legion_shm installed in it.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="End the job after this long.")
@click.option("--retries", type=click.IntRange(0, 100), default=0, help="Run again after a lost worker, this often.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document about the job on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no lines of the worker.")
@click.option("--verbose", "-v", is_flag=True, help="The worker's traceback and Legion's own log too.")
def _run(workflow: str, as_json: bool, quiet: bool, verbose: bool, timeout: float | None, **given: Any) -> int:
    """Run WORKFLOW.json (ComfyUI's API format; - reads it from stdin) in a worker process.

    Its LegionImporter, LegionInput, LegionExporter and LegionOutput nodes are where values enter and leave.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )
    document: dict[str, Any] = {"state": "refused", "engine": None, "job": None}
    document.update(outputs={}, ui={}, stats=None, error=None)
    try:
        with _usage_errors():
            prompt = _read_workflow(workflow)
            destinations = _plan_outputs(prompt, given["outputs"])
            values = _read_inputs(prompt, given["inputs"])
            spec = _worker_spec(given)
        code = _run_job(
            prompt, values, spec, destinations, document,
            deadline_s=timeout, retries=given["retries"], as_json=as_json, quiet=quiet, verbose=verbose,
        )  # fmt: skip
    except click.ClickException as error:
        document["error"] = document["error"] or {"type": "UsageError", "message": error.format_message()}
        if as_json:
            _print_document(document)
        raise
    except _Signalled as error:
        document["state"] = "cancelled"
        document["error"] = {"type": "Interrupted", "message": f"ended by {signal.Signals(error.number).name}"}
        if as_json:
            _print_document(document)
        else:
            click.echo("interrupted; the job was cancelled", err=True)
        raise
    if as_json:
        _print_document(document)
    return code


@contextlib.contextmanager
def _usage_errors() -> Generator[None]:
    try:
        yield
    except _REFUSED as error:
        raise click.UsageError(str(error)) from error


def _read_workflow(source: str) -> Workflow:
    from legion_shm.workflow import load_workflow

    if source == "-":
        text = sys.stdin.read().strip()
        if not text.startswith("{"):
            raise click.UsageError("standard input holds no workflow: expected a JSON object of nodes")
        return load_workflow(text)
    return load_workflow(Path(source))


def _plan_outputs(prompt: Workflow, outputs: Mapping[str, str]) -> dict[str, Destination]:
    from legion_shm.workflow import is_link, read_channels

    known = read_channels(prompt).outputs
    open_names = any(
        node["class_type"] == "LegionOutput" and is_link(node["inputs"].get("name")) for node in prompt.values()
    )
    destinations: dict[str, Destination] = {}
    files: dict[str, str] = {}
    for name, text in outputs.items():
        if name not in known and not open_names:
            raise click.UsageError(
                f"--output {name}: the workflow delivers no such output; it delivers {', '.join(known) or 'none'}"
            )
        try:
            destination = plan_output(text)
        except click.UsageError as error:
            raise click.UsageError(f"--output {name}: {error.message}") from None
        if destination.path is not None:
            other = files.setdefault(os.path.realpath(destination.path), name)
            if other != name:
                raise click.UsageError(f"--output {name}: {text!r} is the file of output {other} already")
        destinations[name] = destination
    return destinations


def _read_inputs(prompt: Workflow, inputs: Mapping[str, str]) -> dict[str, object]:
    from legion_shm.workflow import check_inputs, read_channels

    channels = read_channels(prompt)
    for name in check_inputs(channels, dict(inputs)):
        known = sorted(channels.inputs, key=lambda each: (len(each), each))
        raise click.UsageError(
            f"--input {name}: no node of the workflow reads it; inputs are {', '.join(known) or 'none'}"
        )
    values: dict[str, object] = {}
    for name, text in inputs.items():
        try:
            values[name] = read_input(text)
        except click.UsageError as error:
            raise click.UsageError(f"--input {name}: {error.message}") from None
    return values


def _worker_spec(given: Mapping[str, Any]) -> WorkerSpec:
    from legion_shm.config import WorkerSpec

    comfyui = given["comfyui"]
    return WorkerSpec(
        engine=given["engine"],
        comfyui_path=None if comfyui is None else os.path.expanduser(comfyui),
        node_modules=given["node_modules"],
        env=given["env"],
        python_executable=given["python"],
    )


def _run_job(
    prompt: Workflow,
    values: Mapping[str, object],
    spec: WorkerSpec,
    destinations: Mapping[str, Destination],
    document: dict[str, Any],
    *,
    deadline_s: float | None,
    retries: int,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    from legion_shm.cli_progress import JobReporter, error_document, explain
    from legion_shm.supervisor.api import Supervisor

    reporter = JobReporter(nodes=len(prompt), quiet=quiet)
    try:
        with _usage_errors():
            legion = Supervisor(**_CLOSING)
        with legion:
            with _usage_errors():
                job = legion.submit(prompt, inputs=values, spec=spec, deadline_s=deadline_s, retries=retries)
            document["job"] = job.id
            with reporter.shown():
                for event in job.events():
                    reporter.take(event)
            document["state"] = job.state
            result = job.result()
            document["engine"] = result.engine
            document["stats"] = {**asdict(result.stats), "copies": result.stats.copies}
            document["ui"] = _or_description(result.ui)
            return _write_outputs(result, destinations, document, as_json=as_json, quiet=quiet)
    except LegionError as error:
        document["error"] = error_document(error)
        if document["state"] == "refused":
            document["state"] = "failed"
        click.echo(f"Error: {explain(error, verbose=verbose)}", err=True)
        return 1


def _write_outputs(
    result: Result, destinations: Mapping[str, Destination], document: dict[str, Any], *, as_json: bool, quiet: bool
) -> int:
    """Write what can be written; each output that can't be is told of, and makes the exit code 1."""
    failures: list[str] = []
    for name in result:
        facts = describe(result[name])
        document["outputs"][name] = {**facts, "file": None, "files": []}
    for name, destination in destinations.items():
        if name not in result:
            failures.append(f"output {name} was not delivered; delivered were {', '.join(result) or 'none'}")
            continue
        try:
            if destination.path is None and as_json:
                document["outputs"][name]["value"] = json_form(result[name])
                continue
            files = [str(path) for path in write_output(result[name], destination)]
        except click.ClickException as error:
            failures.append(f"output {name}: {error.format_message()}")
            continue
        document["outputs"][name].update(files=files, file=files[0] if len(files) == 1 else None)
    if not as_json and not quiet:
        for name, entry in document["outputs"].items():
            if name not in destinations or entry["files"]:
                click.echo(_summary(name, entry), err=True)
    for failure in failures:
        click.echo(f"Error: {failure}", err=True)
    if failures:
        document["error"] = {"type": "OutputError", "message": "; ".join(failures)}
    return 1 if failures else 0


def _summary(name: str, entry: Mapping[str, Any]) -> str:
    what = str(entry["type"])
    if "shape" in entry:
        what += f" {entry['dtype']} {'x'.join(map(str, entry['shape'])) or 'scalar'}"
    elif "value" in entry:
        what += f" {entry['value']!r}"
    files = cast("list[str]", entry["files"])
    if not files:
        return f"{name}: {what} (not written; --output {name}=FILE writes it)"
    return f"{name}: {what} -> {files[0]}" + (f" to {files[-1]}" if len(files) > 1 else "")


def _or_description(value: object) -> object:
    try:
        return json_form(value)
    except click.ClickException:
        return describe(value)


def _print_document(document: Mapping[str, Any]) -> None:
    click.echo(json.dumps(document, ensure_ascii=False, indent=2))


@_legion.command("doctor", short_help="Say what this machine offers and what will be used.")
@click.option("--comfyui", metavar="PATH", help="Look for ComfyUI here; else in COMFYUI_PATH, else in ~/ComfyUI.")
@click.option("--check/--no-check", default=True, help="Send a tensor through a real worker. [default: check]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def _doctor(comfyui: str | None, check: bool, as_json: bool) -> int:
    """Say what this machine offers (shared memory, ZeroMQ, torch, GPUs, ComfyUI) and what will be used.

    The exit code is 0 if workflows can run here, 1 if not; the reasons are listed.
    """
    from legion_shm.doctor import examine, print_report

    with _usage_errors():
        report = examine(comfyui=None if comfyui is None else os.path.expanduser(comfyui), check=check)
    if as_json:
        click.echo(json.dumps(report.document(), ensure_ascii=False, indent=2))
    else:
        print_report(report)
    return 0 if report.usable else 1


@_legion.command("demo", short_help="Run a workflow on a photograph and show what crossed.")
@click.option(
    "--output", "-o", default="result.png", show_default=True, metavar="FILE.png", help="Where the result goes."
)
@click.option("--runs", type=click.IntRange(1, 100), default=9, show_default=True, help="Timed runs of each way.")
def _demo(output: str, runs: int) -> int:
    """Run a workflow on a photograph in a worker process, and show what crossed and how long it took.

    The same work through PNG files stands beside it. All figures are measured while you wait.
    """
    from legion_shm.demo import print_demo, run_demo

    try:
        destination = plan_output(output)
    except click.UsageError as error:
        raise click.UsageError(f"--output: {error.message}") from None
    if destination.kind != "image" or destination.path is None:
        raise click.UsageError(f"--output: {output!r} is not the name of an image file, such as result.png")
    try:
        report = run_demo(runs=runs)
    except LegionError as error:
        from legion_shm.cli_progress import explain

        click.echo(f"Error: {explain(error, verbose=True)}", err=True)
        return 1
    write_output(report.image, destination)
    print_demo(report, destination.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
