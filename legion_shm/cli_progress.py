"""What a person sees of a job while it runs, and of its error afterwards: all of it on standard error.

Owns the progress bar (on a terminal only), the worker's log lines and the wording of errors. It waits for
nothing and decides nothing: events are handed to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from legion_shm.errors import InvalidWorkflow, JobFailed, LegionError, StartupError, WorkerLost
from legion_shm.events import (
    Event,
    EventsDropped,
    JobRetrying,
    JobStarted,
    LogEvent,
    NodeEvent,
    ProgressEvent,
)

__all__ = ["JobReporter", "error_document", "explain"]

_TAIL_LINES = 10


class JobReporter:
    """Shows one job's events. ``nodes``: how many nodes its workflow has; ``quiet``: only show errors."""

    def __init__(self, *, nodes: int, quiet: bool = False, console: Console | None = None) -> None:
        self._console = Console(stderr=True, soft_wrap=True) if console is None else console
        self._nodes = nodes
        self._quiet = quiet
        self._done = 0
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @contextlib.contextmanager
    def shown(self) -> Generator[JobReporter]:
        """While entered, the bar stands on the terminal, if there is one."""
        if self._quiet or not self._console.is_terminal or self._console.is_dumb_terminal:
            yield self
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        try:
            with self._progress:
                self._task = self._progress.add_task("starting a worker", total=self._nodes)
                yield self
        finally:
            self._progress.stop()  # a signal while it was being started would leave the cursor hidden

    def take(self, event: Event) -> None:
        """Show one event; kinds that it does not know are skipped."""
        if isinstance(event, LogEvent):
            self._log(event)
        elif isinstance(event, NodeEvent):
            if event.status == "started":
                self._bar(event.class_type, self._done)
            else:
                self._done += 1
                self._bar(None, self._done)
        elif isinstance(event, ProgressEvent):
            if event.total > 0:
                self._bar(None, self._done + min(1.0, max(0.0, event.value / event.total)))
        elif isinstance(event, JobStarted):
            self._done = 0
            self._bar(f"{event.engine} engine, worker {event.worker_id}", 0)
        elif isinstance(event, JobRetrying):
            self._line(f"attempt {event.attempt}: the worker {event.reason}; retrying")
        elif isinstance(event, EventsDropped):
            self._line(f"({event.count} events came too fast to be shown)")

    def _log(self, event: LogEvent) -> None:
        text = event.text.rstrip("\n")
        self._line(f"{event.level}: {text}" if event.stream == "log" and event.level else text)

    def _line(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False, emoji=False)

    def _bar(self, description: str | None, completed: float) -> None:
        if self._progress is not None and self._task is not None:
            changes: dict[str, Any] = {} if description is None else {"description": description}
            self._progress.update(self._task, completed=completed, **changes)


def explain(error: LegionError, *, verbose: bool) -> str:
    """An error as text for a person: what happened and where; with ``verbose`` the worker's traceback too."""
    traceback = error.traceback.strip() if isinstance(error, (JobFailed, StartupError)) else ""
    lines = [str(error)]
    if traceback and traceback in lines[0]:
        lines = [lines[0].replace(traceback, "").rstrip()]
    if isinstance(error, InvalidWorkflow):
        lines.extend(f"  {problem}" for problem in error.problems if problem not in lines[0])
    if isinstance(error, JobFailed):
        where = f"node {error.node_id} ({error.class_type})"
        if error.node_id is not None and error.node_id not in lines[0]:
            lines.append(f"in {where}")
        if verbose and error.inputs_summary:
            lines.append(f"Inputs of {where}:\n{error.inputs_summary.rstrip()}")
    if traceback:
        lines.append(
            f"Traceback in the worker:\n{traceback}" if verbose else "(-v shows the worker's traceback)"
        )
    if isinstance(error, (WorkerLost, StartupError)) and error.log_tail:
        tail = error.log_tail if verbose else error.log_tail[-_TAIL_LINES:]
        if not all(line in str(error) for line in tail):
            lines.append("The worker's last lines:\n" + "\n".join(tail))
    return "\n".join(lines)


def error_document(error: LegionError) -> dict[str, Any]:
    """An error as JSON: ``type``, ``message`` and whatever else its class carries."""
    document: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    for name, value in vars(error).items():
        if value is None or isinstance(value, (bool, int, float, str)):
            document[name] = value
        elif isinstance(value, tuple):
            document[name] = [str(item) for item in cast("tuple[object, ...]", value)]
    return document
