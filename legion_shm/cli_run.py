"""`legion run`: one workflow through one worker, from the checked options to the written files.

Owns the order: what can be known to be wrong is refused before a worker starts; then the job runs; then the
outputs are written. Options and signals are `cli`'s, values and files `cli_values`' and `cli_outputs`'.

    options ─▶ workflow, destinations, inputs, spec ─▶ Supervisor ─▶ outputs ─▶ exit code (and document)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from legion_shm.cli_outputs import Destination, plan_output, write_output
from legion_shm.cli_values import describe, json_form, read_input
from legion_shm.errors import ConfigError, InvalidWorkflow, LegionError, UnsupportedValue

if TYPE_CHECKING:
    from legion_shm.config import WorkerSpec
    from legion_shm.supervisor.result import Result
    from legion_shm.workflow import Workflow

__all__ = ["RunOptions", "Signalled", "run_workflow", "usage_errors"]

_REFUSED = (ConfigError, InvalidWorkflow, UnsupportedValue)  # the caller's own mistakes
_CANCEL_GRACE_S = 1.0
_STOP_GRACE_S = 1.0
_TERM_GRACE_S = 1.0  # shorter than the library's: a command's worker serves nobody else


class Signalled(BaseException):
    """SIGINT or SIGTERM came: what runs is to be undone, and the process to end with 128 + ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class RunOptions:
    """What was asked for. ``workflow`` is a path or ``-``; ``inputs`` and ``outputs`` are by channel name."""

    workflow: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    engine: Literal["auto", "graph", "comfy"] = "auto"
    comfyui: str | None = None
    node_modules: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    python: str | None = None
    timeout_s: float | None = None
    retries: int = 0
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False


@contextlib.contextmanager
def usage_errors() -> Generator[None]:
    """What the library refuses as the caller's own mistake becomes click's UsageError."""
    try:
        yield
    except _REFUSED as error:
        raise click.UsageError(str(error)) from error


def run_workflow(options: RunOptions) -> int:
    """Run it and return the exit code, 0 or 1. Bad usage raises click's UsageError, a signal `Signalled`."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
    )
    document: dict[str, Any] = {"state": "refused", "job": None, "engine": None}
    document.update(outputs={}, ui={}, stats=None, error=None)
    try:
        return _run(options, document)
    except click.ClickException as error:
        document["error"] = {"type": "UsageError", "message": error.format_message()}
        raise
    except Signalled as error:
        message = f"ended by {signal.Signals(error.number).name}"
        document["state"] = "cancelled"
        document["error"] = {"type": "Interrupted", "message": message}
        click.echo(f"Interrupted: {message}", err=True)
        raise
    finally:
        if options.as_json:
            click.echo(json.dumps(document, ensure_ascii=False, indent=2))


def _run(options: RunOptions, document: dict[str, Any]) -> int:
    with usage_errors():
        prompt = _read_workflow(options.workflow)
        destinations = _plan_outputs(prompt, options.outputs)
        values = _read_inputs(prompt, options.inputs)
        spec = _worker_spec(options)
    from legion_shm.cli_progress import JobReporter, error_document, explain
    from legion_shm.supervisor.api import Supervisor

    reporter = JobReporter(nodes=len(prompt), quiet=options.quiet)
    try:
        with usage_errors():
            legion = Supervisor(
                cancel_grace_s=_CANCEL_GRACE_S, stop_grace_s=_STOP_GRACE_S, term_grace_s=_TERM_GRACE_S
            )
        with legion:
            with usage_errors():
                job = legion.submit(
                    prompt,
                    inputs=values,
                    spec=spec,
                    deadline_s=options.timeout_s,
                    retries=options.retries,
                )
            document.update(job=job.id, state="failed")
            with reporter.shown():
                for event in job.events():
                    reporter.take(event)
            document["state"] = job.state
            result = job.result()
            document.update(
                engine=result.engine,
                stats={**asdict(result.stats), "copies": result.stats.copies},
                ui=_ui_form(result.ui),
            )
            return _write_outputs(result, destinations, document, options)
    except LegionError as error:
        document["error"] = error_document(error)
        if document["state"] == "refused":
            document["state"] = "failed"
        click.echo(f"Error: {explain(error, verbose=options.verbose)}", err=True)
        return 1


def _read_workflow(source: str) -> Workflow:
    from legion_shm.workflow import load_workflow

    if source == "-":
        text = sys.stdin.read().strip()
        if not text.startswith("{"):
            raise click.UsageError("standard input holds no workflow: expected a JSON object of nodes")
        return load_workflow(text)
    return load_workflow(Path(source))


def _plan_outputs(prompt: Workflow, outputs: Mapping[str, str]) -> dict[str, Destination]:
    from legion_shm.channels import read_channels
    from legion_shm.workflow import is_link

    known = read_channels(prompt).outputs
    open_names = any(
        node["class_type"] == "LegionOutput" and is_link(node["inputs"].get("name"))
        for node in prompt.values()
    )
    destinations: dict[str, Destination] = {}
    owners: dict[str, str] = {}
    for name, text in outputs.items():
        if name not in known and not open_names:
            raise click.UsageError(
                f"--output {name}: the workflow delivers no such output; "
                f"it delivers {', '.join(known) or 'none'}"
            )
        try:
            destination = plan_output(text)
        except click.UsageError as error:
            raise click.UsageError(f"--output {name}: {error.message}") from None
        if destination.path is not None:
            other = owners.setdefault(os.path.realpath(destination.path), name)
            if other != name:
                raise click.UsageError(f"--output {name}: {text!r} is the file of {other} already")
        destinations[name] = destination
    return destinations


def _read_inputs(prompt: Workflow, inputs: Mapping[str, str]) -> dict[str, object]:
    from legion_shm.channels import check_inputs, read_channels

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


def _worker_spec(options: RunOptions) -> WorkerSpec:
    from legion_shm.config import WorkerSpec

    return WorkerSpec(
        engine=options.engine,
        comfyui_path=None if options.comfyui is None else os.path.expanduser(options.comfyui),
        node_modules=options.node_modules,
        env=options.env,
        python_executable=options.python,
    )


def _write_outputs(
    result: Result, destinations: Mapping[str, Destination], document: dict[str, Any], options: RunOptions
) -> int:
    """Write what can be written; each output that can't be is told of, and makes the exit code 1."""
    failures: list[str] = []
    entries: dict[str, dict[str, Any]] = document["outputs"]
    for name in result:
        entries[name] = {**describe(result[name]), "file": None, "files": []}
    for name, destination in destinations.items():
        if name not in result:
            failures.append(f"output {name} was not delivered; delivered: {', '.join(result) or 'none'}")
            continue
        try:
            if destination.path is None and options.as_json:
                entries[name]["value"] = json_form(result[name])
                continue
            files = [str(path) for path in write_output(result[name], destination)]
        except click.ClickException as error:
            failures.append(f"output {name}: {error.format_message()}")
            continue
        entries[name].update(files=files, file=files[0] if len(files) == 1 else None)
    if not options.as_json and not options.quiet:
        for name, entry in entries.items():
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


def _ui_form(ui: Mapping[str, Any]) -> object:
    try:
        return json_form(ui)
    except click.ClickException:  # a node may report anything
        return describe(ui)
