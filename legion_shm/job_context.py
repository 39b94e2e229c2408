"""What a node can reach of the job that runs it: its inputs, where its outputs go, cancellation, progress.

Owns the process's one current job. It never starts, ends or schedules a job, and knows no engine: an
engine makes a `JobContext` per job, enters `running` and lets the nodes run.

    engine ── running(job) ──▶ current_job() ◀── LegionImporter, LegionInput   read .originals
                                             ◀── LegionExporter, LegionOutput  call .deliver_as_is
                                             ◀── any node                      progress(), check_cancelled(),
                                                                               .inputs, .deliver

A process runs one job at a time, and the nodes of a job may use threads of their own, so the current
job is the process's and not the thread's.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import cast

from legion_shm.errors import InvalidWorkflow, JobCancelled, LegionError

__all__ = ["JobContext", "check_cancelled", "current_job", "preview", "progress", "running"]


class JobContext:
    """One running job, as its nodes see it.

    Usable as it is in tests of nodes; an engine overrides `report_progress`, `report_preview` and, where
    it has another way of being interrupted, `check_cancelled`. All methods may be called from any thread.

    ``identities`` says of each input what a cache may key on (see `JobRequest.identities`); an input
    without an entry counts as one that can never be given again.
    """

    def __init__(
        self,
        job_id: str,
        inputs: Mapping[str, object],
        *,
        identities: Mapping[str, bytes | None] | None = None,
    ) -> None:
        self.job_id = job_id
        self.inputs: Mapping[str, object] = inputs
        self.identities: Mapping[str, bytes | None] = {} if identities is None else identities
        self.originals: Mapping[str, object] = inputs
        """The inputs for nodes of ours, which write into none: an engine may give copies by ``inputs``."""
        self._outputs: dict[str, object] = {}
        self._lock = threading.Lock()
        self._cancelled = False

    @property
    def outputs(self) -> dict[str, object]:
        """What was delivered so far, by name: a copy."""
        with self._lock:
            return dict(self._outputs)

    def deliver(self, name: str, value: object) -> None:
        """Make ``value`` the job's output ``name``; a name given twice, or no text, is InvalidWorkflow."""
        self.deliver_as_is(name, value)

    def deliver_as_is(self, name: str, value: object) -> None:
        """As `deliver`, for nodes of ours: an engine may copy what other nodes deliver."""
        if not isinstance(cast("object", name), str) or not name:
            raise InvalidWorkflow(
                f"an output's name is non-empty text, not {name!r:.60}; give the node that has it one",
                input_name="name",
            )
        with self._lock:
            if name in self._outputs:
                raise InvalidWorkflow(
                    f"output {name!r} of job {self.job_id} is delivered twice; let one node deliver it, "
                    f"or use other names (delivered so far: {', '.join(sorted(self._outputs))})"
                )
            self._outputs[name] = value

    def cancel(self) -> None:
        """Make the next `check_cancelled` raise; nothing undoes it."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def check_cancelled(self) -> None:
        """Raise JobCancelled when the job was cancelled."""
        if self._cancelled:
            raise JobCancelled(f"job {self.job_id} was cancelled", job_id=self.job_id)

    def progress(self, value: float, total: float, *, node_id: str | None = None) -> None:
        """Say that a node is at ``value`` of ``total``; raises JobCancelled when the job was cancelled.

        ``node_id`` None means the node that runs now.
        """
        self.check_cancelled()
        self.report_progress(value, total, node_id)

    def preview(self, image: object, *, node_id: str | None = None) -> None:
        """Show an intermediate image: a PIL image, or a torch IMAGE ``[B,H,W,C]`` float 0..1."""
        self.check_cancelled()
        self.report_preview(image, node_id)

    def report_progress(self, value: float, total: float, node_id: str | None) -> None:
        """For engines to override: where progress goes. Here it goes nowhere."""

    def report_preview(self, image: object, node_id: str | None) -> None:
        """For engines to override: where previews go. Here they go nowhere."""


_lock = threading.Lock()
_current: JobContext | None = None


def current_job() -> JobContext:
    """The job that this process runs now; LegionError when it runs none."""
    job = _current
    if job is None:
        raise LegionError(
            "no job runs here: the Legion importer, exporter, input and output nodes work inside a workflow "
            "that a Legion worker runs; submit the workflow to a Supervisor"
        )
    return job


class running:  # noqa: N801 - used as a function; as a generator it would take three times as long
    """Make ``job`` the process's current job for the body; LegionError when another one runs."""

    __slots__ = ("_job",)

    def __init__(self, job: JobContext) -> None:
        self._job = job

    def __enter__(self) -> JobContext:
        global _current
        job = self._job
        with _lock:
            if _current is not None:
                raise LegionError(
                    f"job {job.job_id} cannot run: job {_current.job_id} still runs in this process"
                )
            _current = job
        return job

    def __exit__(self, *exception: object) -> None:
        global _current
        with _lock:
            _current = None


def progress(value: float, total: float) -> None:
    """For node authors: report progress of the running node, and stop here when the job was cancelled.

    Does nothing outside of a job, so a node that calls it also works elsewhere.
    """
    job = _current
    if job is not None:
        job.progress(value, total)


def preview(image: object) -> None:
    """For node authors: show an intermediate image of the running node. Does nothing outside of a job."""
    job = _current
    if job is not None:
        job.preview(image)


def check_cancelled() -> None:
    """For node authors: raise JobCancelled when the job was cancelled. Does nothing outside of a job."""
    job = _current
    if job is not None:
        job.check_cancelled()
