"""The graph engine: runs API-format workflows of ComfyUI node classes in this process, without ComfyUI.

Owns one job at a time: its order, its events, its cancellation and how it ends. What a class declares is
read by `graph_protocol`, what may run is decided by `graph_validation`, how a function is called by
`graph_call`, what is kept by `graph_cache`.

    prompt ──▶ validate (kept by digest) ──▶ sign ──▶ which nodes must run ──▶ run, in order ──▶ JobOutcome
                                               ▲                                  │
                                               └────────── GraphCache ◀───────────┘

Left out, and refused with a clear text: subgraph expansion, DYNPROMPT, raw links and comfy_api (V3) nodes.
Left out, and harmless: lazy inputs; every linked input is evaluated. Torch is loaded by `start`, not by
importing this module.
"""

from __future__ import annotations

import copy
import logging
import os
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

from legion_shm import job_context
from legion_shm.errors import InvalidWorkflow, JobCancelled, LegionError
from legion_shm.supervisor.engine import EngineEvents, EngineInfo, JobOutcome, JobRequest
from legion_shm.supervisor.graph_cache import GraphCache, Signature, sign_plan
from legion_shm.supervisor.graph_call import AsyncRunner, BadResult, NodeResult, call_broadcast, read_results
from legion_shm.supervisor.graph_images import check_images
from legion_shm.supervisor.graph_modules import load_node_classes
from legion_shm.supervisor.graph_protocol import NodeClass, PlannedNode
from legion_shm.supervisor.graph_report import node_failure
from legion_shm.supervisor.graph_validation import Plan, hidden_value, validate_prompt
from legion_shm.supervisor.graph_writes import Loan, PrivateViews, detached, private_copy

__all__ = ["BUILTIN_MODULES", "GraphEngine"]

_log = logging.getLogger(__name__)

BUILTIN_MODULES = ("legion_shm.supervisor.graph_nodes", "legion_shm.nodes")
"""Loaded by name, because the Legion nodes live in a layer above this one."""

_EARLY_KEPT = 1024
"""Interruptions of jobs that have not begun here; far more than can wait for one worker."""


class GraphEngine:
    """Implements `Engine`. Not to be shared: one per process, as nodes see one current job per process.

    ``node_modules`` are importable names, paths of .py files or paths of package directories, each with
    NODE_CLASS_MAPPINGS. ``input_directory`` is where LoadImage reads, ``output_directory`` where SaveImage
    writes; by default the environment's LEGION_INPUT_DIR and LEGION_OUTPUT_DIR, else ``input`` and
    ``output`` in the current directory. ``views``: where nodes' copy-on-write views of shared memory come
    from; without it they get copies.
    """

    def __init__(
        self,
        node_modules: Sequence[str | os.PathLike[str]] = (),
        *,
        input_directory: str | os.PathLike[str] | None = None,
        output_directory: str | os.PathLike[str] | None = None,
        views: PrivateViews | None = None,
    ) -> None:
        self._node_modules = tuple(node_modules)
        self._input_directory = input_directory
        self._output_directory = output_directory
        self._views = views
        self._classes: dict[str, NodeClass] = {}
        self._cache = GraphCache()
        self._runner = AsyncRunner()
        self._lock = threading.Lock()
        self._current: _GraphJob | None = None
        self._early: OrderedDict[str, None] = OrderedDict()
        self._free_asked = False
        self._no_grad: AbstractContextManager[object] | None = None

    @property
    def name(self) -> str:
        return "graph"

    @property
    def node_classes(self) -> Mapping[str, NodeClass]:
        """The node classes by name; empty before `start`."""
        return dict(self._classes)

    def start(self) -> EngineInfo:
        """Load torch and the node modules. ConfigError for a module without node classes."""
        import torch

        from legion_shm.supervisor.graph_nodes import directories

        # Not inference mode, as ComfyUI has it: tensors made there do not tell when they are written into.
        self._no_grad = cast("AbstractContextManager[object]", torch.no_grad())  # of one job at a time

        directories.configure(input_directory=self._input_directory, output_directory=self._output_directory)
        self._classes = load_node_classes(self._node_modules, BUILTIN_MODULES)
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        return EngineInfo(name=self.name, versions=versions, node_classes=len(self._classes))

    def execute(self, request: JobRequest, events: EngineEvents) -> JobOutcome:
        if self._no_grad is None:
            raise LegionError("the graph engine has not been started; call start() first")
        job = _GraphJob(request, events)
        call: _Call = partial(call_broadcast, runner=self._runner, check=job.check_cancelled)
        with job_context.running(job):
            self._begin(job)
            try:
                with self._no_grad:
                    plan = self._plan(request, call)
                    return _Run(self._cache, call, job, events, self._views, plan).outcome()
            finally:
                self._end()

    def interrupt(self, job_id: str) -> None:
        with self._lock:
            if self._current is not None and self._current.job_id == job_id:
                self._current.cancel()
                return
            self._early[job_id] = None
            while len(self._early) > _EARLY_KEPT:
                self._early.popitem(last=False)

    def free(self) -> None:
        """Drop all caches: now, or at the end of the job that runs."""
        with self._lock:
            if self._current is not None:
                self._free_asked = True
                return
        self._cache.clear()

    def forget(self, keys: tuple[str, ...]) -> None:
        """Models are kept by the comfy engine alone."""

    def close(self) -> None:
        self.free()

    def _begin(self, job: _GraphJob) -> None:
        with self._lock:
            if job.job_id in self._early:
                del self._early[job.job_id]
                job.cancel()
            self._current = job
        try:
            job.check_cancelled()
        except JobCancelled:
            self._end()
            raise

    def _end(self) -> None:
        with self._lock:
            self._current = None
            free, self._free_asked = self._free_asked, False
        if free:
            self._cache.clear()
        self._runner.close()

    def _plan(self, request: JobRequest, call: _Call) -> Plan:
        return self._cache.plan(
            request.prompt_digest, lambda: validate_prompt(request.prompt, self._classes, call)
        )


_Call = Callable[[Callable[..., object], Mapping[str, Sequence[object]], bool], list[object]]


def _folders() -> dict[str, str]:
    """Where the files are that output nodes tell of, by their type."""
    from legion_shm.supervisor.graph_nodes.directories import input_directory, output_directory

    return {"input": os.path.abspath(input_directory()), "output": os.path.abspath(output_directory())}


class _GraphJob(job_context.JobContext):
    """The current job: passes progress and previews on, naming the node that runs."""

    def __init__(self, request: JobRequest, events: EngineEvents) -> None:
        super().__init__(request.job_id, request.inputs, identities=request.identities)
        self._events = events
        self.extra_data = request.extra_data
        self.node_id: str | None = None
        self.inputs = _Copies(request.inputs)

    @property
    def outputs(self) -> dict[str, object]:
        copies: dict[str, object] = private_copy(self.delivered)
        return copies

    @property
    def delivered(self) -> dict[str, object]:
        """The outputs themselves, which no node may get."""
        return super().outputs

    def deliver(self, name: str, value: object) -> None:
        super().deliver(name, private_copy(value))

    def report_progress(self, value: float, total: float, node_id: str | None) -> None:
        self._events.progress(node_id if node_id is not None else self.node_id, value, total)

    def report_preview(self, image: object, node_id: str | None) -> None:
        self._events.preview(node_id if node_id is not None else self.node_id, image)


class _Copies(Mapping[str, object]):
    """The job's inputs for whoever asks the job for them: a new copy each time."""

    def __init__(self, originals: Mapping[str, object]) -> None:
        self._originals = originals

    def __getitem__(self, name: str) -> object:
        return private_copy(self._originals[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._originals)

    def __len__(self) -> int:
        return len(self._originals)


class _Run:
    """One job's walk over its plan."""

    def __init__(
        self,
        cache: GraphCache,
        call: _Call,
        job: _GraphJob,
        events: EngineEvents,
        views: PrivateViews | None,
        plan: Plan,
    ) -> None:
        self._cache = cache
        self._call = call
        self._job = job
        self._events = events
        self._views = views
        self._plan = plan
        self._results: dict[str, NodeResult] = {}
        self._readers: dict[str, int] = {}
        self._ui: dict[str, Mapping[str, object]] = {}

    def outcome(self) -> JobOutcome:
        plan, cache = self._plan, self._cache
        signatures = sign_plan(plan, self._fingerprint)
        cache.begin(plan, signatures)
        to_run = self._choose(signatures)
        executed = 0
        if len(to_run) < len(plan.nodes):
            for node_id, node in plan.nodes.items():
                if node_id not in to_run:
                    self._events.node(node_id, node.class_type, "cached")
        for node_id in to_run:
            node = plan.nodes[node_id]
            self._job.check_cancelled()
            signature = signatures.get(node_id)
            twin = None if signature is None else cache.find(signature)
            if twin is not None:
                self._let_go(node)
                self._events.node(node_id, node.class_type, "cached")
            else:
                twin = self._run_node(node)
                if signature is not None:
                    cache.store(node, signature, twin)
                executed += 1
            self._note_ui(node_id, twin)
            if self._readers.get(node_id):
                self._results[node_id] = twin
            twin = None  # so that what its only reader gets is in nobody else's hands
        self._job.check_cancelled()
        return JobOutcome(
            outputs=self._job.delivered,
            ui=self._ui,
            executed=executed,
            cached=len(plan.nodes) - executed,
            folders=_folders() if self._ui else {},
        )

    def _choose(self, signatures: Mapping[str, Signature]) -> list[str]:
        """The nodes that must run: the outputs that are not kept, and whatever those need."""
        plan = self._plan
        if not len(self._cache):
            self._readers = dict(plan.readers)
            return list(plan.nodes)
        chosen: set[str] = set()
        seen: set[str] = set()
        stack = [node_id for node_id, node in plan.nodes.items() if node.is_output]
        while stack:
            node_id = stack.pop()
            if node_id in seen:
                continue
            seen.add(node_id)
            signature = signatures.get(node_id)
            kept = None if signature is None else self._cache.find(signature)
            if kept is not None:
                self._results[node_id] = kept
                self._note_ui(node_id, kept)
                continue
            chosen.add(node_id)
            for source in plan.nodes[node_id].links.values():
                self._readers[source.node_id] = self._readers.get(source.node_id, 0) + 1
                stack.append(source.node_id)
        return [node_id for node_id in plan.nodes if node_id in chosen]

    def _note_ui(self, node_id: str, result: NodeResult) -> None:
        if result.ui:
            self._ui[node_id] = dict(result.ui)

    def _let_go(self, node: PlannedNode) -> None:
        """This node has what it reads: drop what no later one does, so that its memory can be used again."""
        for link in node.links.values():
            self._readers[link.node_id] -= 1
            if not self._readers[link.node_id]:
                self._results.pop(link.node_id, None)

    def _run_node(self, node: PlannedNode) -> NodeResult:
        self._job.node_id = node.node_id
        self._events.node(node.node_id, node.class_type, "started")
        inputs: dict[str, Sequence[object]] = {}
        loan: Loan | None = None
        failure: LegionError
        try:
            inputs = self._linked(node)
            if node.writes_shared:
                loan = Loan(cast("dict[str, Any]", inputs), self._views)
                inputs = loan.values
            if node.constants or node.hidden:
                inputs |= self._given(node)
            if node.is_builtin:
                check_images(node.node_class, inputs)
            node_object = self._cache.node_object(node)
            function: Callable[..., object] = getattr(node_object, str(node.node_class.FUNCTION))
            result = read_results(self._call(function, inputs, node.input_is_list), node.node_class)
            if loan is not None:
                inputs = {}
                _settle(result, loan)
        except BaseException as error:  # whatever a node raises, the worker goes on
            failure = self._failure(error, node, inputs)
        else:
            self._events.node(node.node_id, node.class_type, "finished")
            return result
        finally:
            self._job.node_id = None
        # Raised out here and after letting go, so that the error carries no frame that holds tensors.
        inputs, loan = {}, None
        self._results.clear()
        try:
            raise failure
        finally:
            del failure  # else the error and this frame would keep each other, and the job's inputs, alive

    def _failure(
        self, error: BaseException, node: PlannedNode, inputs: Mapping[str, Sequence[object]]
    ) -> LegionError:
        if self._job.cancelled:
            return JobCancelled(
                f"job {self._job.job_id} was cancelled in node {node.node_id} ({node.class_type})",
                job_id=self._job.job_id,
            )
        if isinstance(error, InvalidWorkflow):
            text = f"node {node.node_id} ({node.class_type}): {error}"
            return InvalidWorkflow(
                text, node_id=error.node_id or node.node_id, input_name=error.input_name, problems=(text,)
            )
        failure = node_failure(
            error,
            job_id=self._job.job_id,
            node_id=node.node_id,
            class_type=node.class_type,
            inputs=inputs,
        )
        _log.debug("%s\n%s", failure, failure.traceback)
        return failure

    def _linked(self, node: PlannedNode) -> dict[str, Sequence[object]]:
        """What comes by links, and is let go of here where no later node reads it."""
        inputs: dict[str, Sequence[object]] = {}
        for name, link in node.links.items():
            outputs = self._results[link.node_id].outputs
            if outputs is None:
                source = self._plan.nodes[link.node_id]
                raise BadResult(
                    f"input {name!r} is linked to node {source.node_id} ({source.class_type}), which gave no "
                    "outputs: its function returned a dict without 'result'"
                )
            inputs[name] = outputs[link.slot]
        self._let_go(node)
        return inputs

    def _given(self, node: PlannedNode) -> dict[str, Sequence[object]]:
        """What comes from the prompt and from the job."""
        inputs = _constants(node)
        for name, kind in node.hidden.items():
            inputs[name] = (hidden_value(kind, node.node_id, self._plan.prompt, self._job.extra_data),)
        return inputs

    def _fingerprint(self, node: PlannedNode, function: str) -> object:
        inputs = _constants(node)
        for name in node.links:
            inputs[name] = (None,)
        for name, kind in node.hidden.items():
            inputs[name] = (hidden_value(kind, node.node_id, {}),)
        target = cast("Callable[..., object]", getattr(node.node_class, function))
        return self._call(target, inputs, node.input_is_list)


def _settle(result: NodeResult, loan: Loan) -> None:
    """Make what a node returned, and now holds itself at most, what is kept of it."""
    returned: list[Any] = [result.outputs]
    result.outputs = None
    (result.outputs,) = loan.settle(returned)
    if result.ui:
        result.ui = detached(result.ui)


def _constants(node: PlannedNode) -> dict[str, Sequence[object]]:
    """The node's constants, copied where a node could change the prompt through them."""
    return {
        name: (value if isinstance(value, (str, int, float, bool, type(None))) else copy.deepcopy(value),)
        for name, value in node.constants.items()
    }
