"""The embedding API: `Supervisor`, the one object that a program holds.

Owns the checks at the door, the encoding of inputs in the caller's thread, and closing. What happens to a
job after that is the loop's and the machine's.

    submit: workflow checked ─▶ options checked ─▶ inputs encoded ─▶ handed to the loop ─▶ Job
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from legion_shm import faults
from legion_shm.channels import check_inputs, missing_inputs, name_inputs, unread_inputs
from legion_shm.clock import monotonic_s
from legion_shm.config import JobOptions, SupervisorSettings, WorkerSpec
from legion_shm.errors import (
    ConfigError,
    ForkedError,
    LegionError,
    MessageTooLarge,
    QueueFull,
    SupervisorClosed,
    UnsupportedValue,
)
from legion_shm.events import JobQueued
from legion_shm.ids import new_job_id
from legion_shm.supervisor.feed import JobFeed
from legion_shm.supervisor.freeing import FreedMemory
from legion_shm.supervisor.job import Job
from legion_shm.supervisor.loop import Loop
from legion_shm.supervisor.remote import RemoteHandle
from legion_shm.supervisor.resolve import resolve_spec
from legion_shm.supervisor.state import WorkerInfo
from legion_shm.supervisor.stimuli import CancelRequested, StopRequested, WarmUpRequested
from legion_shm.supervisor.submission import JobTimes, Submission
from legion_shm.transport.born_build import library_path
from legion_shm.transport.channel import ChannelKind, ServerChannel, channel_kinds, check_descriptors
from legion_shm.transport.copying import use_library
from legion_shm.transport.runtime_dir import RuntimeDir, sweep_stale
from legion_shm.transport.segment import SegmentKind, supported_kinds
from legion_shm.transport.values import EXTRA_DATA, PackedValues
from legion_shm.workflow import limited_to, load_workflow
from legion_shm.workflow_cache import WorkflowCache

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from legion_shm.config import JobKeywords
    from legion_shm.keywords import SettingsKeywords

__all__ = ["Supervisor"]

_log = logging.getLogger("legion_shm.supervisor")

_SNAPSHOT_WAIT_S = 5.0
_LOOK_S = 0.2  # how often who waits for workers looks whether they live
_CLOSE_SLACK_S = 10.0
_FRAME_SLACK_BYTES = 4096
_RESOLVED_FOR_S = 1.0
_RECENT_SPECS = 256

_open: weakref.WeakSet[Supervisor] = weakref.WeakSet()


class _RecentSpec(NamedTuple):
    """Holds the spec, so that no other can have its identity."""

    spec: WorkerSpec
    plain: JobOptions  # of a job that asks for this spec and nothing else
    pool: str
    until_s: float


class Supervisor:
    """Runs workflows in worker processes. Thread-safe: one serves a whole program.

    ``settings``, or keywords of `SupervisorSettings`, set its limits. Use it as a context manager, or call
    `close`; workers end with it, and with the program however that ends.

        with Supervisor() as legion:
            result = legion.submit("workflow.json", inputs=[image]).result(timeout=60)
    """

    def __init__(
        self, settings: SupervisorSettings | None = None, **overrides: Unpack[SettingsKeywords]
    ) -> None:
        if settings is None:
            settings = SupervisorSettings(**overrides)
        elif not isinstance(cast("object", settings), SupervisorSettings):
            raise ConfigError(
                f"settings: expected SupervisorSettings or keywords, got {type(settings).__name__}",
                key="settings",
            )
        elif overrides:
            settings = SupervisorSettings(**cast("SettingsKeywords", {**settings.model_dump(), **overrides}))
        self.settings = settings
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may close or submit in the midst of a submit
        self._closed = False
        self._pending = 0
        self._pools: dict[str, WorkerSpec] = {}
        self._workflows = WorkflowCache()
        self._default_spec = WorkerSpec()
        self._recent: dict[int, _RecentSpec] = {}
        base = Path(settings.runtime_dir) if settings.runtime_dir is not None else None
        faults.arm_from_environment()
        check_descriptors()
        segments, channel = _choose_segments(settings), _choose_channel(settings)
        library, _ = library_path()  # compiled here, once per machine, and not on the loop's thread
        if library is not None:
            use_library(str(library))
        sweep_stale(base)
        with contextlib.ExitStack() as on_failure:
            directory = on_failure.enter_context(RuntimeDir.create(base))
            server = ServerChannel(
                channel,
                directory=directory.path,
                max_bytes=settings.max_message_bytes,
                current_directory=directory.current,
            )
            on_failure.callback(server.close)
            loop = Loop(settings, server, directory, segments=segments)
            on_failure.callback(loop.abandon)
            loop.start()
            on_failure.pop_all()
        self._directory, self._channel, self._loop, self._memory = directory, server, loop, loop.memory
        _open.add(self)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Supervisor:
        """A supervisor with the settings in a YAML file. Raises ConfigError naming the key or the line."""
        return cls(SupervisorSettings.from_yaml(path))

    # --- jobs ---------------------------------------------------------------------------------------

    def submit(
        self,
        workflow: Mapping[str, Any] | str | os.PathLike[str],
        *,
        inputs: Mapping[str, object] | Sequence[object] | None = None,
        **options: Unpack[JobKeywords],
    ) -> Job:
        """Hand in a job; the inputs may be changed as soon as this returns.

        ``workflow``: API format, as a dict, a path or JSON text. ``inputs``: a sequence fills the channels
        ``input_1``, ``input_2``, ...; a mapping names them. Options are those of `JobOptions`: ``spec``,
        ``deadline_s``, ``retries``, ``allow_cpu``, ``targets``, ``extra_data``, ``remote``.

        Raises InvalidWorkflow, UnsupportedValue (with the path inside the inputs), ConfigError, QueueFull,
        MessageTooLarge, ArenaFull (after a bounded wait for shared memory), SupervisorClosed.
        """
        self._check_open()
        submitted_s = monotonic_s()
        if options.get("spec") is None:
            options["spec"] = self._default_spec
        checked = self._checked(options)
        if checked.targets is not None:
            workflow = limited_to(load_workflow(workflow), checked.targets)
        prepared = self._workflows.prepare(workflow)
        values = name_inputs(inputs)
        unread = check_inputs(prepared.channels, values)
        warnings = (*unread_inputs(unread), *missing_inputs(prepared.linked, values))
        for text in warnings:
            _log.warning("%s; inputs given: %s", text, ", ".join(values) or "none")
        pool = self._pool_of(checked.spec, submitted_s)
        self._take_place()
        try:
            if checked.extra_data:
                values[EXTRA_DATA] = dict(checked.extra_data)
            packed = self._memory.pack(
                values,
                tuple(checked.spec.pickle_classes),
                checked.spec.models,
                pool=pool,
                gpu=checked.spec.gpu_arena == "auto",
            )
            try:
                worker = _only_worker(packed)
            except UnsupportedValue:
                self._memory.discard_values(packed.values)
                raise
            size = len(prepared.data) + sum([len(note.tree) for note in packed.values]) + _FRAME_SLACK_BYTES
            if size > self.settings.max_message_bytes:
                self._memory.discard_values(packed.values)
                raise MessageTooLarge(
                    f"the job would take a message of about {size} bytes, over max_message_bytes = "
                    f"{self.settings.max_message_bytes}; raise that setting, or pass large values as tensors"
                )
        except BaseException:
            self._give_place()
            raise
        encoded_s = monotonic_s()
        feed = JobFeed(
            new_job_id(),
            history=self.settings.event_history,
            on_end=self._give_place,
            first=(JobQueued, (), encoded_s),
        )
        submission = Submission(
            job=feed.job_id,
            feed=feed,
            options=checked,
            pool=pool,
            workflow=prepared.data,
            digest=prepared.digest,
            packed=packed,
            times=JobTimes(submitted_s, encoded_s),
            warnings=warnings,
            worker=worker,
        )
        with self._lock:
            if self._closed:
                self._memory.discard_values(packed.values)
                self._pending -= 1
                raise SupervisorClosed("the supervisor was closed during submit; nothing was sent")
            self._loop.submit(submission)
        return Job(feed, self._cancel)

    async def asubmit(
        self,
        workflow: Mapping[str, Any] | str | os.PathLike[str],
        *,
        inputs: Mapping[str, object] | Sequence[object] | None = None,
        **options: Unpack[JobKeywords],
    ) -> Job:
        """`submit` for coroutines: reads, checks and copies in a thread, so the event loop never waits.

        Whoever is cancelled in the midst of it gets no `Job`: then the job is cancelled too.
        """
        jobs: list[Job] = []
        given_up = threading.Event()

        def submit() -> Job:
            job = self.submit(workflow, inputs=inputs, **options)
            jobs.append(job)
            if given_up.is_set():
                job.cancel()
            return job

        try:
            return await asyncio.to_thread(submit)
        except asyncio.CancelledError:
            given_up.set()  # one of the two sees what the other did, perhaps both
            for job in jobs:
                job.cancel()
            raise

    def _cancel(self, job: str) -> None:
        self._loop.stimulate(CancelRequested(job))

    def _take_place(self) -> None:
        with self._lock:
            if self._pending >= self.settings.max_queue:
                raise QueueFull(
                    f"max_queue = {self.settings.max_queue} jobs have not ended; wait, or raise it"
                )
            self._pending += 1

    def _give_place(self) -> None:
        with self._lock:
            self._pending -= 1

    def _checked(self, options: JobKeywords) -> JobOptions:
        if len(options) == 1:
            recent = self._recent.get(id(options.get("spec")))
            if recent is not None and recent.spec is options.get("spec"):
                return recent.plain
        return JobOptions(**cast("dict[str, Any]", options))

    def _pool_of(self, spec: WorkerSpec, now: float) -> str:
        """The pool of a spec as it was written; looked up in the file system once a second at most."""
        recent = self._recent.get(id(spec))
        if recent is not None and recent.spec is spec and now < recent.until_s:
            return recent.pool
        pool = self._pool(resolve_spec(spec))
        if len(self._recent) >= _RECENT_SPECS:
            self._recent.clear()
        self._recent[id(spec)] = _RecentSpec(spec, JobOptions(spec=spec), pool, now + _RESOLVED_FOR_S)
        return pool

    def _pool(self, spec: WorkerSpec) -> str:
        key = spec.key
        if key not in self._pools:
            self._loop.define(key, spec)  # before others find it: their job must come after it
            self._pools[key] = spec
        return key

    # --- tensors --------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A new, uninitialized CPU tensor in shared memory: submitting it copies nothing.

        Fill it, then submit it; it goes by handle alone for as long as it is not written again. A write
        after a submit is seen by nobody else, and honoured by a copy at the next one. ``dtype`` defaults to
        torch's default dtype. Raises ArenaFull.
        """
        self._check_open()
        from legion_shm.transport.resident import resident_tensor

        return resident_tensor(self._memory.resident_buffer, shape, dtype)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor in shared memory, contiguous, on the CPU: copied once, submitted for free."""
        if not hasattr(tensor, "untyped_storage"):
            raise UnsupportedValue(f"share: a {type(tensor).__name__} is not a torch tensor", path="tensor")
        if tensor.is_quantized:
            raise UnsupportedValue(
                "share: this tensor is quantized; share .dequantize(), or .int_repr()", path="tensor"
            )
        shared = self.empty(tuple(tensor.shape), tensor.dtype)
        shared.copy_(tensor.detach())
        return shared

    # --- workers --------------------------------------------------------------------------------------

    def workers(self) -> tuple[WorkerInfo, ...]:
        """A snapshot of the workers that live now."""
        self._check_open()
        return self._loop.snapshot(_SNAPSHOT_WAIT_S)

    def warm_up(self, spec: WorkerSpec | None = None, *, workers: int = 1) -> None:
        """Start workers of a spec now, in the background, so that the first job need not wait for it.

        ``workers``: how many there are to be, those that run already among them. Raises ConfigError for more
        than ``max_workers`` of the spec or of the supervisor allows.
        """
        self._check_open()
        if type(workers) is not int or workers < 1:
            raise ConfigError(f"workers: expected a whole number from 1 on, got {workers!r}", key="workers")
        resolved = resolve_spec(WorkerSpec() if spec is None else spec)
        for most, whose in ((resolved.max_workers, "worker spec"), (self.settings.max_workers, "supervisor")):
            if workers > most:
                raise ConfigError(
                    f"workers: {workers} were asked for, but max_workers of the {whose} is {most}: raise "
                    f"max_workers there, or ask for {most}",
                    key="max_workers",
                )
        self._loop.stimulate(WarmUpRequested(self._pool(resolved), workers))

    def free(self, spec: WorkerSpec | None = None, *, wait_s: float | None = None) -> tuple[FreedMemory, ...]:
        """Have workers (of a spec, or all) drop their caches and models once they are idle.

        ``wait_s``: wait for that, for so many seconds at most, and give what came back, a `FreedMemory` for
        each worker; without it this returns at once, with nothing. Raises TimeoutError.
        """
        self._check_open()
        freeing = self._loop.free(None if spec is None else self._pool(resolve_spec(spec)))
        if wait_s is None:
            return ()
        deadline_s = monotonic_s() + wait_s
        while not freeing.wait(min(_LOOK_S, max(deadline_s - monotonic_s(), 0.0))):
            freeing.forget_all_but({worker.id for worker in self.workers()})
            if monotonic_s() >= deadline_s:
                raise TimeoutError(f"free: not done within {wait_s:g} s; a worker runs a job still")
        return freeing.freed

    def stop_workers(self, spec: WorkerSpec | None = None) -> None:
        """End workers (of a spec, or all) once their job is done; jobs that come later start new ones."""
        self._check_open()
        self._loop.stimulate(StopRequested(None if spec is None else self._pool(resolve_spec(spec))))

    # --- the end --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel what runs, end the workers, free everything. Delivered tensors stay valid. Idempotent."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            first = not self._closed
            self._closed = True
        if first:
            self._loop.request_close()
        if self._loop.on_loop():
            return
        settings = self.settings
        ladder_s = settings.stop_grace_s + settings.term_grace_s + _CLOSE_SLACK_S
        if not self._loop.join(ladder_s):
            raise LegionError(
                f"the supervisor could not be closed within {ladder_s:g} s; a worker would not end"
            )
        _open.discard(self)

    def __enter__(self) -> Supervisor:
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Supervisor:
        return self.__enter__()

    async def __aexit__(self, *exception: object) -> None:
        """`close` in a thread: the event loop goes on, whatever the workers take to end."""
        await asyncio.to_thread(self.close)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and hasattr(self, "_loop") and os.getpid() == self._pid:
            self._loop.request_close()  # first, for a warning may be an error
            warnings.warn(
                "a Supervisor was dropped without close(); its workers are ended",
                ResourceWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"<Supervisor {'closed' if self._closed else 'open'}, {len(self._pools)} worker specs>"

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"this Supervisor belongs to process {self._pid}; a forked child must make its own"
            )
        if self._closed:
            raise SupervisorClosed("this Supervisor has been closed; make a new one")
        if self._loop.fault is not None:
            raise SupervisorClosed(f"this Supervisor has failed: {self._loop.fault!r}")


def _only_worker(packed: PackedValues) -> str | None:
    """The worker whose objects are among the inputs."""
    if not packed.noted:
        return None
    handles = [item for item in packed.noted if isinstance(item, RemoteHandle)]
    workers = {handle.worker_id for handle in handles}
    if len(workers) > 1:
        raise UnsupportedValue(
            f"the inputs hold handles of objects in several workers: {', '.join(map(repr, handles))}; "
            "a job runs in one",
            path="inputs",
        )
    return workers.pop() if workers else None


def _choose_channel(settings: SupervisorSettings) -> ChannelKind:
    kinds = channel_kinds()
    wanted = settings.channel
    if wanted == "auto":
        return "ipc" if not kinds["ipc"] else "tcp"
    if kinds[wanted]:
        raise ConfigError(f"channel: {wanted} can't be used: {kinds[wanted]}", key="channel")
    return wanted


def _choose_segments(settings: SupervisorSettings) -> SegmentKind:
    kinds = supported_kinds()
    wanted = settings.segments
    if wanted == "auto":
        return "memfd" if not kinds["memfd"] else "portable"
    if kinds[wanted]:
        raise ConfigError(f"segments: {wanted} can't be used: {kinds[wanted]}", key="segments")
    return wanted


def _close_all() -> None:
    for supervisor in list(_open):
        with contextlib.suppress(LegionError):
            supervisor.close()


atexit.register(_close_all)
