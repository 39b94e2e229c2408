"""The comfy engine: runs API-format workflows in a real ComfyUI, headless, in this process.

Owns one job at a time, from ComfyUI's validation through its executor and caches to the outcome. How
ComfyUI is brought up is `comfy_start`'s, what it says while it runs `comfy_job`'s, the wording of errors
`comfy_report`'s, what its caches find again `comfy_channels`' and `comfy_cache`'s. Nothing else in Legion
knows how ComfyUI works.

    prompt ──▶ validate_prompt (kept by digest) ──▶ PromptExecutor.execute ──▶ JobOutcome
                                                     │        ▲
                                  Relay ─▶ events ◀──┘        └── interrupt
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import logging
import os
import threading
import traceback
from collections import OrderedDict
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

from legion_shm import job_context
from legion_shm.clock import monotonic_s
from legion_shm.comfy_location import find_comfyui, not_found_message
from legion_shm.errors import ConfigError, JobCancelled, JobFailed, LegionError
from legion_shm.supervisor.comfy_cache import forget_spent_entries
from legion_shm.supervisor.comfy_channels import split_importers
from legion_shm.supervisor.comfy_job import ComfyJob
from legion_shm.supervisor.comfy_report import bad_slots, execution_failure, refuse_invalid
from legion_shm.supervisor.comfy_start import HeadlessComfy, start_headless
from legion_shm.supervisor.engine import EngineEvents, EngineInfo, JobOutcome, JobRequest
from legion_shm.supervisor.freeing import freeze
from legion_shm.supervisor.graph_problems import refuse
from legion_shm.workflow import Workflow, load_workflow

__all__ = ["ComfyEngine"]

_log = logging.getLogger(__name__)

_CLIENT = "legion"
"""ComfyUI tells its events only if there is a client to tell."""

_VALIDATED_KEPT = 64
_EARLY_KEPT = 1024
"""Interruptions of jobs that have not begun here; far more than can wait for one worker."""

_COLLECT_EVERY_S = 10.0
"""ComfyUI's own interval for collecting garbage between prompts."""


class ComfyEngine:
    """Implements `Engine`. One per process, for ComfyUI is one per process, and it cannot be started twice.

    ``comfyui_path`` is the folder with ComfyUI's `main.py`; None looks in the usual places. ``extra_args``
    are ComfyUI's command line arguments.
    """

    def __init__(self, *, comfyui_path: str | None = None, extra_args: tuple[str, ...] = ()) -> None:
        self._path = comfyui_path
        self._extra_args = tuple(extra_args)
        self._comfy: HeadlessComfy | None = None
        self._validated: OrderedDict[bytes, tuple[Workflow, list[str]]] = OrderedDict()
        self._lock = threading.Lock()
        self._current: ComfyJob | None = None
        self._early: OrderedDict[str, None] = OrderedDict()
        self._collected_s = 0.0

    @property
    def name(self) -> str:
        return "comfy"

    def start(self) -> EngineInfo:
        """Bring up ComfyUI with its core, extra and custom nodes, and the Legion nodes.

        Raises ConfigError for a path that is no ComfyUI or arguments that it refuses, StartupError where it
        ends itself, and whatever its own start raises.
        """
        if self._comfy is not None:
            raise LegionError("ComfyUI has been started in this process already; start() is called once")
        found = find_comfyui(self._path, os.environ)
        if found is None:
            raise ConfigError(not_found_message(), key="comfyui_path")
        with _nothing_collected():
            comfy = start_headless(Path(os.path.abspath(found.path)), self._extra_args)
        self._comfy = comfy
        self._models().keeps = True
        return EngineInfo(
            name=self.name, versions=comfy.versions, node_classes=len(comfy.nodes.NODE_CLASS_MAPPINGS)
        )

    def execute(self, request: JobRequest, events: EngineEvents) -> JobOutcome:
        """Run one job on the calling thread, as `Engine.execute` says.

        Outputs are inference tensors where ComfyUI made them. Raises InvalidWorkflow for all that ComfyUI's
        validation finds, also where it would leave out the faulty outputs and run the others.
        """
        comfy = self._started()
        job = ComfyJob(request, events, comfy.relay)
        with job_context.running(job):
            self._begin(job)
            try:
                return self._run(comfy, job, request)
            finally:
                self._end(comfy, request)

    def interrupt(self, job_id: str) -> None:
        with self._lock:
            job = self._current
            if job is not None and job.job_id == job_id:
                job.cancel()
                self._started().relay.interrupt()
                return
            self._early[job_id] = None
            while len(self._early) > _EARLY_KEPT:
                self._early.popitem(last=False)

    def free(self) -> None:
        """Unload all models, drop what ComfyUI's caches hold and give the GPU's memory back."""
        comfy = self._started()
        self._validated.clear()
        comfy.model_management.unload_all_models()
        self._models().forget()
        comfy.executor.reset()
        self._collect(comfy)

    def forget(self, keys: tuple[str, ...]) -> None:
        """Drop these models of the supervisor's process, with all that ComfyUI's caches made of them."""
        comfy = self._started()
        gone = {id(model) for model in self._models().forget(keys)}
        if not gone:
            return
        loaded = comfy.model_management.current_loaded_models
        for entry in [entry for entry in loaded if entry.model is not None and id(entry.model.model) in gone]:
            entry.model_unload()
            loaded.remove(entry)
        comfy.executor.reset()
        self._collect(comfy)

    @staticmethod
    def _models() -> Any:
        """The models that this worker has been sent."""
        from legion_shm.supervisor.comfy_models import TABLE

        return TABLE

    def close(self) -> None:
        comfy, self._comfy = self._comfy, None
        if comfy is not None:
            comfy.close()

    # --- one job ------------------------------------------------------------------------------------

    def _started(self) -> HeadlessComfy:
        if self._comfy is None:
            raise LegionError("the comfy engine is not running; call start() first")
        return self._comfy

    def _begin(self, job: ComfyJob) -> None:
        with self._lock:
            self._current = job
            if self._early.pop(job.job_id, self) is None:
                job.cancel()

    def _end(self, comfy: HeadlessComfy, request: JobRequest) -> None:
        with self._lock:
            self._current = None
            self._early.pop(request.job_id, None)
        comfy.relay.job = None
        self._let_go(comfy, request)
        if monotonic_s() - self._collected_s > _COLLECT_EVERY_S:
            self._collect(comfy)

    def _let_go(self, comfy: HeadlessComfy, request: JobRequest) -> None:
        """Keep nothing of the job but what a later one can find again."""
        executor, prompt = comfy.executor, comfy.relay.prompt_nodes
        executor.status_messages = []
        executor.history_result = {}
        if prompt is None:
            return
        try:
            forget_spent_entries(executor.caches, prompt, comfy.nodes.NODE_CLASS_MAPPINGS, request.inputs)
        except Exception:  # a cache of a new kind: what was spent goes when the next prompt comes
            _log.warning("ComfyUI's cache could not be tidied after job %s", request.job_id, exc_info=True)

    def _collect(self, comfy: HeadlessComfy) -> None:
        gc.collect()
        comfy.model_management.soft_empty_cache()
        comfy.restore_hooked_functions()
        self._collected_s = monotonic_s()

    def _run(self, comfy: HeadlessComfy, job: ComfyJob, request: JobRequest) -> JobOutcome:
        _stop_if_cancelled(job)
        prompt, outputs = self._validate(comfy, request)
        job.plan(outputs, split_importers(prompt, request.inputs))
        _stop_if_cancelled(job)
        comfy.relay.job = job
        comfy.server.last_prompt_id = job.job_id
        executor = comfy.executor
        executor.success = True  # ComfyUI sets it only when a node has run
        try:
            extra_data = {**request.extra_data, "client_id": _CLIENT}
            executor.execute(prompt, job.job_id, extra_data, outputs)
        except asyncio.CancelledError:
            _stop_if_cancelled(job)
            raise _broken_off(job, "asyncio.CancelledError", "") from None
        except JobCancelled:
            _stop_if_cancelled(job)
            raise
        except BaseException as error:  # ComfyUI catches most of what nodes raise; this came past it
            _stop_if_cancelled(job)
            raise _broken_off(job, type(error).__name__, str(error)) from None
        _stop_if_cancelled(job)
        self._check_messages(job, executor, request.extra_data)
        history = cast("Mapping[str, Any]", getattr(executor, "history_result", None) or {})
        return JobOutcome(
            outputs=job.outputs,
            ui={str(node_id): dict(shown) for node_id, shown in history.get("outputs", {}).items()},
            executed=job.executed,
            cached=len(job.cached),
            folders=comfy.folders(),
        )

    def _check_messages(self, job: ComfyJob, executor: Any, extra_data: Mapping[str, object]) -> None:
        """Raise how the prompt ended, if it did not end well."""
        for event, data in executor.status_messages:
            if event == "execution_interrupted":
                where = f"{data.get('node_id')} ({data.get('node_type')})"
                raise JobCancelled(f"node {where} interrupted job {job.job_id}", job_id=job.job_id)
            if event == "execution_error":
                raise execution_failure(job.job_id, data, extra_data)
        if job.blocked is not None:
            raise execution_failure(job.job_id, job.blocked, extra_data)
        if not executor.success:
            text = f"ComfyUI did not finish job {job.job_id}, and did not say why"
            raise JobFailed(text, job_id=job.job_id)

    # --- validation ---------------------------------------------------------------------------------

    def _validate(self, comfy: HeadlessComfy, request: JobRequest) -> tuple[Workflow, list[str]]:
        """A prompt of this job's own, for ComfyUI writes into it, and the output nodes to run."""
        kept = self._validated.get(request.prompt_digest)
        if kept is None:
            prompt = load_workflow(request.prompt)
            kept = prompt, _validated_outputs(comfy, request.job_id, prompt)
            self._validated[request.prompt_digest] = kept
            if len(self._validated) > _VALIDATED_KEPT:
                self._validated.popitem(last=False)
        self._validated.move_to_end(request.prompt_digest)
        prompt, outputs = kept
        return cast("Workflow", _copied(prompt)), list(outputs)


def _validated_outputs(comfy: HeadlessComfy, job_id: str, prompt: Workflow) -> list[str]:
    """Run ComfyUI's validation, which turns constants into their inputs' types, on ``prompt`` itself."""
    classes = cast("Mapping[str, Any]", comfy.nodes.NODE_CLASS_MAPPINGS)
    refuse(bad_slots(prompt, classes))
    validate = comfy.execution.validate_prompt
    arguments = {"prompt_id": job_id, "prompt": prompt, "partial_execution_list": None}
    taken = inspect.signature(validate).parameters
    answer: Any = validate(**{name: value for name, value in arguments.items() if name in taken})
    if inspect.isawaitable(answer):
        answer = asyncio.run(_awaited(answer))
    _, error, outputs, node_errors = answer
    refuse_invalid(error, node_errors or {}, prompt, classes, comfy.not_loaded)
    return sorted(outputs, key=list(prompt).index)  # ComfyUI gives a set's order, another one in each process


@contextlib.contextmanager
def _nothing_collected() -> Generator[None, None, None]:
    """For a start, which makes a million objects that stay: 4.3 s instead of 5.8 s, and 16 MB more.

    Later collections pass these objects over too, and take 0.2 ms instead of 300.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        freeze()
    finally:
        if enabled:
            gc.enable()


async def _awaited(answer: Any) -> Any:
    return await answer


def _copied(value: object) -> object:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in cast("dict[object, object]", value).items()}
    if isinstance(value, list):
        return [_copied(item) for item in cast("list[object]", value)]
    return value


def _stop_if_cancelled(job: ComfyJob) -> None:
    if job.cancelled:
        raise JobCancelled(f"job {job.job_id} was cancelled", job_id=job.job_id)


def _broken_off(job: ComfyJob, kind: str, message: str) -> JobFailed:
    """What ended the executor itself. Made where it is caught, for it tells of the traceback."""
    node_id = job.running_node
    where = "ComfyUI's executor" if node_id is None else f"node {node_id} ({job.classes[node_id]})"
    return JobFailed(
        f"{where} ended job {job.job_id}: {kind}{': ' if message else ''}{message}",
        job_id=job.job_id,
        node_id=node_id,
        class_type=None if node_id is None else job.classes[node_id],
        exception_type=kind,
        exception_message=message,
        traceback=traceback.format_exc(),
    )
