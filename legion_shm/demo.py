"""`legion demo`: a workflow on a photograph in a worker process, measured as it runs.

Owns the runs and the table. All figures are of this machine and this run; none is kept or assumed.

    private   the photograph in the caller's own memory: one copy into shared memory
    resident  the photograph in shared memory already (`Supervisor.share`): no copy
    files     the same nodes between LoadImage and SaveImage: PNG files in a temporary folder

The result is born in shared memory where the worker can do that (`legion doctor` says; the first results
show it how much room they take), else it costs one copy: the table has what it was.

Each run's image differs in one pixel from those before, so that no node's result comes from the cache.
The ways take turns, so that what else the machine does meets all of them alike.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from legion_shm.cli_outputs import plan_output, write_output
from legion_shm.cli_values import read_image
from legion_shm.clock import monotonic_s
from legion_shm.events import NodeEvent

if TYPE_CHECKING:
    from legion_shm.config import WorkerSpec
    from legion_shm.supervisor.api import Supervisor
    from legion_shm.supervisor.job import Job
    from legion_shm.supervisor.result import JobStats, Result, Transfer

__all__ = ["DemoReport", "FileRun", "SharedRun", "print_demo", "run_demo"]

_TIMEOUT_S = 120.0
_IMAGES = 8  # of each way, in turns: enough that no cache of the last results knows one again
_HOPS = (
    ("encode_s", "photograph into shared memory"),
    ("queue_s", "wait for a worker (first: its start)"),
    ("to_worker_s", "message to the worker"),
    ("decode_s", "views made in the worker"),
    ("execute_s", "the nodes at work"),
    ("result_encode_s", "result into shared memory"),
    ("from_worker_s", "message from the worker"),
    ("result_decode_s", "views made here"),
)
_MOVING = ("encode_s", "to_worker_s", "decode_s", "result_encode_s", "from_worker_s", "result_decode_s")


@dataclass(frozen=True)
class SharedRun:
    """One job through shared memory. ``total_s``: from before submit until the result is in hand."""

    total_s: float
    stats: JobStats

    @property
    def moving_s(self) -> float:
        """What the image's way took, there and back, without queue and nodes."""
        return sum(float(getattr(self.stats, hop)) for hop in _MOVING)


@dataclass(frozen=True)
class FileRun:
    """One job through PNG files: ``write_s`` and ``read_s`` here, ``load_s`` and ``save_s`` in the worker."""

    total_s: float
    write_s: float
    load_s: float
    save_s: float
    read_s: float

    @property
    def moving_s(self) -> float:
        return self.write_s + self.load_s + self.save_s + self.read_s


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured. ``image``: the result, IMAGE ``[1,H,W,3]`` float32."""

    image: Any
    first: SharedRun
    private: tuple[SharedRun, ...]
    resident: tuple[SharedRun, ...]
    files: tuple[FileRun, ...]
    shapes: Mapping[tuple[str, str], tuple[int, ...]]
    loss: float
    """The largest difference of a value between the two ways' results; IMAGE values go from 0 to 1."""


def run_demo(*, runs: int = 9) -> DemoReport:
    """Run it all; takes some seconds. Raises LegionError where a job or the worker's start fails."""
    from legion_shm.config import WorkerSpec
    from legion_shm.supervisor.api import Supervisor

    photograph = _photograph()
    workflow = _workflow("soft_glow.json")
    with tempfile.TemporaryDirectory(prefix="legion-demo-") as folder:
        environment = {"LEGION_INPUT_DIR": folder, "LEGION_OUTPUT_DIR": folder}
        spec = WorkerSpec(engine="graph", env=environment)
        with Supervisor() as legion:
            first, result = _shared_run(legion, spec, workflow, photograph)
            image = result["output_1"]
            way = _FileWay(legion, spec, Path(folder))
            way.run(photograph)  # not timed: it loads what reading and writing PNG takes
            # Made beforehand: torch's threads spin for a while after their work, on the worker's processors.
            in_private = [_marked(photograph, 3 * number) for number in range(min(runs, _IMAGES))]
            in_shared = [
                legion.share(_marked(photograph, 3 * number + 1)) for number in range(min(runs, _IMAGES))
            ]
            for_files = [_marked(photograph, 3 * number + 2) for number in range(min(runs, _IMAGES))]
            private: list[SharedRun] = []
            resident: list[SharedRun] = []
            through_files: list[FileRun] = []
            for number in range(runs):
                which = number % _IMAGES
                private.append(_shared_run(legion, spec, workflow, in_private[which])[0])
                resident.append(_shared_run(legion, spec, workflow, in_shared[which])[0])
                through_files.append(way.run(for_files[which]))
            _, result = _shared_run(legion, spec, workflow, for_files[(runs - 1) % _IMAGES])
            loss = _largest_difference(result["output_1"], way.last)
    shapes = {
        ("to_worker", "input_1"): tuple(photograph.shape),
        ("from_worker", "output_1"): tuple(image.shape),
    }
    return DemoReport(image, first, tuple(private), tuple(resident), tuple(through_files), shapes, loss)


def _photograph() -> Any:
    with as_file(files("legion_shm") / "demo_data" / "coffee.jpg") as path:
        return read_image(path)


def _workflow(name: str) -> dict[str, Any]:
    text = (files("legion_shm") / "demo_data" / name).read_text(encoding="utf-8")
    return cast("dict[str, Any]", json.loads(text))


def _marked(image: Any, number: int) -> Any:
    """A copy whose first pixel's red and green say a number, in steps that survive 8 bits."""
    copy = image.clone()
    copy[0, 0, 0, 0] = (number % 256) / 255.0
    copy[0, 0, 0, 1] = (number // 256 % 256) / 255.0
    return copy


def _largest_difference(one: Any, other: Any) -> float:
    return float((one.clamp(0.0, 1.0) - other).abs().max())


def _shared_run(
    legion: Supervisor, spec: WorkerSpec, workflow: Mapping[str, Any], image: Any
) -> tuple[SharedRun, Result]:
    started_s = monotonic_s()
    result = legion.submit(workflow, inputs=[image], spec=spec).result(timeout=_TIMEOUT_S)
    return SharedRun(monotonic_s() - started_s, result.stats), result


class _FileWay:
    """The same work with files in between, as one would do it without shared memory."""

    def __init__(self, legion: Supervisor, spec: WorkerSpec, folder: Path) -> None:
        self._legion, self._spec, self._folder = legion, spec, folder
        self._workflow = _workflow("soft_glow_files.json")
        self._source = folder / str(self._workflow["1"]["inputs"]["image"])
        self.last: Any = None

    def run(self, image: Any) -> FileRun:
        started_s = monotonic_s()
        write_output(image, plan_output(str(self._source)))
        written_s = monotonic_s()
        job = self._legion.submit(self._workflow, spec=self._spec)
        result = job.result(timeout=_TIMEOUT_S)
        saved = result.ui["5"]["images"][0]
        target = self._folder / saved["subfolder"] / saved["filename"]
        done_s = monotonic_s()
        self.last = read_image(target)
        read_s = monotonic_s()
        times = _node_times(job)
        target.unlink()
        return FileRun(
            total_s=read_s - started_s,
            write_s=written_s - started_s,
            load_s=times["LoadImage"],
            save_s=times["SaveImage"],
            read_s=read_s - done_s,
        )


def _node_times(job: Job) -> dict[str, float]:
    """From each node's start to its end, by class, as the supervisor took note of them."""
    started: dict[str, float] = {}
    times: dict[str, float] = {}
    for event in job.events():
        if isinstance(event, NodeEvent):
            if event.status == "started":
                started[event.node_id] = event.time_s
            elif event.node_id in started:
                times[event.class_type] = event.time_s - started[event.node_id]
    return times


# --- for a person ---------------------------------------------------------------------------------


def print_demo(report: DemoReport, path: Path) -> None:
    """Print what crossed, how long it took and how that compares, on standard output."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for table in (_crossing_table(report), _hop_table(report), _comparison_table(report)):
        console.print(table)
        console.print()
    console.print(_closing_words(report), markup=False)
    console.print(f"The result is in {path}", markup=False)


def _table(title: str, columns: Sequence[str], left: int = 1) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None)
    table.pad_edge = False
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    return table


def _crossing_table(report: DemoReport) -> Any:
    table = _table("What crossed", ("photograph in", "channel", "shape", "bytes", "copies"), left=2)
    for title, run in (("private memory", report.private[-1]), ("shared memory", report.resident[-1])):
        for transfer in run.stats.transfers:
            if transfer.payload_bytes:
                shape = report.shapes.get((transfer.direction, transfer.name), ())
                table.add_row(
                    title,
                    f"{transfer.name} {transfer.direction.replace('_', ' ')}",
                    "x".join(map(str, shape)),
                    f"{transfer.payload_bytes:,}",
                    f"{transfer.copies}{_way(transfer)}",
                )
    return table


def _way(transfer: Transfer) -> str:
    if transfer.inline_bytes == transfer.payload_bytes:
        return " (in message)"
    return " (reference)" if transfer.referenced_bytes == transfer.payload_bytes else ""


def _hop_table(report: DemoReport) -> Any:
    table = _table(
        "How long each hop took, in ms", ("photograph in", "first job", "private memory", "shared memory")
    )
    for hop, text in _HOPS:
        table.add_row(
            text,
            _ms(getattr(report.first.stats, hop)),
            _ms(_median_of(report.private, hop)),
            _ms(_median_of(report.resident, hop)),
        )
    table.add_row(
        "whole job",
        _ms(report.first.total_s),
        _ms(_total(report.private)),
        _ms(_total(report.resident)),
        style="bold",
    )
    return table


def _comparison_table(report: DemoReport) -> Any:
    table = _table(
        "The same nodes in the same worker, through PNG files, in ms",
        ("", "moving images", "ratio", "whole job", "ratio"),
    )
    rows = (
        ("PNG files", report.files),
        ("shared memory", report.private),
        ("shared memory, photograph in it", report.resident),
    )
    files_moving_s, files_total_s = _moving(report.files), _total(report.files)
    for text, runs in rows:
        moving_s, total_s = _moving(runs), _total(runs)
        table.add_row(
            text,
            _ms(moving_s), f"{files_moving_s / moving_s:.1f}" if runs is not report.files else "",
            _ms(total_s), f"{files_total_s / total_s:.1f}" if runs is not report.files else "",
        )  # fmt: skip
    return table


def _closing_words(report: DemoReport) -> str:
    write_s, load_s, save_s, read_s = (
        statistics.median(getattr(run, name) for run in report.files)
        for name in ("write_s", "load_s", "save_s", "read_s")
    )
    return (
        f"Through PNG: {_ms(write_s)} ms to write the photograph, {_ms(load_s)} to load it in the worker,\n"
        f"{_ms(save_s)} to save the result there, {_ms(read_s)} to read it here.\n"
        f"PNG's 8 bits moved a value by up to {report.loss:.4f} of 1; shared memory changes none.\n"
        f"Medians of {len(report.private)} warm runs each, on this machine, in this run."
    )


def _moving(runs: Sequence[SharedRun] | Sequence[FileRun]) -> float:
    return statistics.median(run.moving_s for run in runs)


def _total(runs: Sequence[SharedRun] | Sequence[FileRun]) -> float:
    return statistics.median(run.total_s for run in runs)


def _median_of(runs: Sequence[SharedRun], hop: str) -> float:
    return statistics.median(float(getattr(run.stats, hop)) for run in runs)


def _ms(seconds: float) -> str:
    """Milliseconds with two decimals, or more where the first two digits come later: 0.00042, never 0.00."""
    milliseconds = 1e3 * seconds
    if not 0 < milliseconds < 0.1:
        return f"{milliseconds:,.2f}"
    return f"{milliseconds:.{1 - math.floor(math.log10(milliseconds))}f}"
