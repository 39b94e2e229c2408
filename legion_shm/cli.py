"""The command line: `legion run`, `legion launch`, `legion doctor`, `legion demo`, `legion bench`.

Owns options, exit codes and signals. What a command does is in modules that load when it runs, so that
`legion --help` answers at once.

Exit codes: 0 done, 1 the job (or a check) failed, 2 bad usage, 130 interrupted (Ctrl-C), 143 terminated.
Those of `legion launch` are the launched program's own; 126 and 127 where that can't be executed or found.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import click

from legion_shm import __version__
from legion_shm.cli_outputs import plan_output, write_output
from legion_shm.cli_run import RunOptions, Signalled, run_workflow, usage_errors
from legion_shm.errors import LegionError
from legion_shm.native_bench.command import bench

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["main"]

_CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EIO, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})


@contextlib.contextmanager
def _signals_raise() -> Generator[None]:
    """SIGINT and SIGTERM raise `Signalled` once; a second one ends the process, and its workers with it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise Signalled(number)

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
    except Signalled as error:
        return 128 + error.number
    except BrokenPipeError:
        _give_up_stdout()
        return 1
    except OSError as error:
        if error.errno not in _CANNOT_WRITE or error.filename is not None:
            raise
        click.echo(f"Error: cannot write to standard output: {error.strerror}", err=True)
        _give_up_stdout()
        return 1


def _give_up_stdout() -> None:
    """Else the flush at exit fails again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(
    name="legion",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`legion COMMAND --help` explains a command. "
    "Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.",
    invoke_without_command=True,
)
@click.version_option(__version__, "-V", "--version", message="legion %(version)s")
@click.pass_context
def _legion(context: click.Context) -> None:
    """Run ComfyUI workflows and node graphs in worker processes.

    Tensors cross to the worker and back through shared memory.
    """
    if context.invoked_subcommand is None:  # what click does of itself depends on its release
        click.echo(context.get_help(), err=True)
        context.exit(2)


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
  legion run upscale.json --input 1=photo.png --input 2=1.5 --output 1=large.png
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
    "--node-module", "--node-modules", "-m", "node_modules", multiple=True, metavar="MODULE",
    help="A module with NODE_CLASS_MAPPINGS: an importable name, a .py file or a folder (graph engine).",
)  # fmt: skip
@click.option(
    "--env", "-e", multiple=True, callback=_pairs, metavar="NAME=VALUE",
    help="An environment variable of the worker, set before it starts.",
)  # fmt: skip
@click.option(
    "--python", metavar="EXE", help="Another Python for the worker, with legion_shm installed in it."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="End the job after this long.",
)
@click.option(
    "--retries", type=click.IntRange(0, 100), default=0, help="Run again after a lost worker, this often."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document about the job on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no lines of the worker.")
@click.option("--verbose", "-v", is_flag=True, help="The worker's traceback and Legion's own log too.")
def _run(timeout: float | None, **given: Any) -> int:
    """Run WORKFLOW.json (ComfyUI's API format; - reads it from stdin) in a worker process.

    Its LegionImporter, LegionInput, LegionExporter and LegionOutput nodes are where values enter and leave.
    """
    return run_workflow(RunOptions(timeout_s=timeout, **given))


_LAUNCH_EPILOG = """\b
Examples:
  legion launch -- python main.py --listen
  legion launch -- ./run.sh

The program is executed in place of this command: same process, signals, exit code, standard input.
"""


@_legion.command(
    "launch",
    epilog=_LAUNCH_EPILOG,
    short_help="Start a program whose tensors go to workers without a copy.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- PROGRAM [ARGS]...")
def _launch(command: tuple[str, ...]) -> int:
    """Start PROGRAM so that the large tensors it makes lie in shared memory from the start.

    The supervisor in it (of ComfyUI with the Legion nodes, or of your own script) then sends them to its
    workers by handle alone. A program without a supervisor runs as it always does. Needs Linux with glibc;
    what does not fit, or was not made by torch on the CPU, is copied once, as it is without this command.
    """
    from legion_shm.cli_launch import launch

    return launch(command)


@_legion.command("doctor", short_help="Say what this machine offers and what will be used.")
@click.option(
    "--comfyui", metavar="PATH", help="Look for ComfyUI here; else in COMFYUI_PATH, else in ~/ComfyUI."
)
@click.option(
    "--check/--no-check", default=True, help="Send a tensor through a real worker. [default: check]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def _doctor(comfyui: str | None, check: bool, as_json: bool) -> int:
    """Say what this machine offers (shared memory, ZeroMQ, torch, GPUs, ComfyUI) and what will be used.

    The exit code is 0 if workflows can run here, 1 if not; the reasons are listed.
    """
    from legion_shm.doctor import examine, print_report

    with usage_errors():
        report = examine(comfyui=None if comfyui is None else os.path.expanduser(comfyui), check=check)
    if as_json:
        click.echo(json.dumps(report.document(), ensure_ascii=False, indent=2))
    else:
        print_report(report)
    return 0 if report.usable else 1


@_legion.command("demo", short_help="Run a workflow on a photograph and show what crossed.")
@click.option(
    "--output",
    "-o",
    default="result.png",
    show_default=True,
    metavar="FILE.png",
    help="Where the result goes.",
)
@click.option(
    "--runs", type=click.IntRange(1, 100), default=9, show_default=True, help="Timed runs of each way."
)
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


_legion.add_command(bench)

if __name__ == "__main__":
    sys.exit(main())
