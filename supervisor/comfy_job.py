"""One job inside ComfyUI: what ComfyUI says while it runs, as events, and how it is interrupted.

Owns the current job's counts and its way to stop. ComfyUI speaks in three ways, and all end here:

    progress registry   start, update (with previews), finish   ─▶ node, progress, preview
    server.send_sync    execution_start, execution_cached, ...  ─▶ cached nodes, blocked executions
    a node's own calls  legion_shm.job_context                  ─▶ progress, preview

Nodes that a node expands into run under that node's id, for the workflow that was submitted has no others.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

from legion_shm import job_context
from legion_shm.errors import JobCancelled
from legion_shm.supervisor.engine import EngineEvents, JobRequest
from legion_shm.workflow import is_link

__all__ = ["ComfyJob", "Relay"]


class ComfyJob(job_context.JobContext):
    """The current job: what nodes see of it, and what it has done so far."""

    def __init__(self, request: JobRequest, events: EngineEvents, relay: Relay) -> None:
        super().__init__(request.job_id, request.inputs, identities=request.identities)
        self.prompt = request.prompt
        self.classes = {node_id: str(node.get("class_type")) for node_id, node in request.prompt.items()}
        self.events = events
        self.executed = 0
        self.cached: set[str] = set()
        self.blocked: Mapping[str, Any] | None = None
        self.running_node: str | None = None
        self._relay = relay
        self._stands_for: Mapping[str, str] = {}
        self._output_nodes: Sequence[str] = ()
        self._seen: set[str] = set()
        self._open: set[str] = set()

    def plan(self, output_nodes: Sequence[str], stands_for: Mapping[str, str]) -> None:
        """Say what will run: these output nodes, and added nodes, each for one of the workflow's."""
        self._output_nodes, self._stands_for = output_nodes, stands_for

    # --- what nodes ask of it -----------------------------------------------------------------------

    def check_cancelled(self) -> None:
        """Raise what is JobCancelled to a node's author and an interruption to ComfyUI."""
        if self.cancelled:
            raise self._relay.interruption(f"job {self.job_id} was cancelled", job_id=self.job_id)

    def report_progress(self, value: float, total: float, node_id: str | None) -> None:
        self.events.progress(self._node(node_id), value, total)

    def report_preview(self, image: object, node_id: str | None) -> None:
        self.events.preview(self._node(node_id), image)

    def _node(self, node_id: str | None) -> str | None:
        return self._relay.shown_node(node_id) or self.running_node

    # --- what ComfyUI says --------------------------------------------------------------------------

    def note_cached(self, kept: Collection[str]) -> None:
        """Tell, of the nodes that outputs are made from, those that are kept or needed for these alone."""
        runs, made_from = self._upstream(kept), self._upstream(())
        for node_id, class_type in self.classes.items():
            if node_id in made_from and node_id not in runs:
                self.cached.add(node_id)
                self.events.node(node_id, class_type, "cached")

    def _upstream(self, ends: Collection[str]) -> set[str]:
        """The output nodes and all that they are made from, but not past ``ends``, nor these themselves."""
        found: set[str] = set()
        stack = list(self._output_nodes)
        while stack:
            node_id = stack.pop()
            if node_id in found or node_id in ends:
                continue
            found.add(node_id)
            inputs = cast("Mapping[str, Any]", self.prompt[node_id]["inputs"])
            stack.extend(value[0] for value in inputs.values() if is_link(value))
        return found

    def note_started(self, node_id: str) -> None:
        """Once for each node, though ComfyUI starts one again whose lazy inputs have been made."""
        node_id = self._stands_for.get(node_id, node_id)
        if node_id not in self.classes:
            return
        self.running_node = node_id
        if node_id not in self._seen:
            self._seen.add(node_id)
            self._open.add(node_id)
            self.cached.discard(node_id)
            self.events.node(node_id, self.classes[node_id], "started")

    def note_finished(self, node_id: str) -> None:
        node_id = self._stands_for.get(node_id, node_id)
        if node_id in self._open:
            self._open.remove(node_id)
            self.executed += 1
            self.events.node(node_id, self.classes[node_id], "finished")


class Relay:
    """Stands where ComfyUI has its browser, for as long as the process lives."""

    def __init__(self, interrupt_processing: Callable[[bool], None], interruption: type[Exception]) -> None:
        """``interruption`` is the exception by which ComfyUI's nodes are stopped."""
        self.job: ComfyJob | None = None
        kinds = (JobCancelled, interruption)
        made = type("JobInterrupted", kinds, {"__module__": __name__})
        self.interruption = cast("type[JobCancelled]", made)
        self._interrupt_processing = interrupt_processing
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._registry: Any = None

    def interrupt(self) -> None:
        """Stop the current job, which was told so: by ComfyUI's flag, and where async nodes are awaited."""
        self._interrupt_processing(True)
        with self._lock:
            if self._loop is not None and self._task is not None:
                # Where a node runs this arrives after it, when the task has seen the flag and is done.
                with contextlib.suppress(RuntimeError):  # the loop was closed just now
                    self._loop.call_soon_threadsafe(self._task.cancel)

    # --- ComfyUI's prompt server --------------------------------------------------------------------

    def message(self, event: object, data: Any) -> None:
        """What would be sent to the browser."""
        job = self.job
        if job is None:
            return
        if event == "execution_start":
            if job.cancelled:
                self._interrupt_processing(True)  # just now ComfyUI cleared it, and an early one with it
        elif event == "execution_cached":
            job.note_cached(set(data["nodes"]))
        elif event == "execution_error" and data.get("exception_type") == "ExecutionBlocked":
            job.blocked = dict(data)  # ComfyUI goes on without the nodes behind it, and counts it a success

    # --- ComfyUI's progress registry ----------------------------------------------------------------

    def progress_handler(self, base: Any) -> Any:
        """A class to put in place of ``base``, the handler that keeps ComfyUI's page up to date.

        That one sends the state of all nodes at every step of each: 92 ms for a chain of 102 nodes.
        """
        relay = self

        class LegionProgressHandler(base):  # type: ignore[misc]  # ComfyUI's class is Any here
            def set_registry(self, registry: Any) -> None:
                base.set_registry(self, registry)
                relay._registry = registry

            def start_handler(self, node_id: str, *_more: object, **_named: object) -> None:
                if relay.job is not None:
                    relay.job.check_cancelled()  # again: a node before this one may have swallowed it
                    relay.job.note_started(node_id)

            def update_handler(
                self,
                node_id: str,
                value: float,
                max_value: float,
                state: object = None,
                prompt_id: object = None,
                image: Any = None,
                **_named: object,
            ) -> None:
                relay.updated(node_id, value, max_value, image)

            def finish_handler(self, node_id: str, *_more: object, **_named: object) -> None:
                if relay.job is not None:
                    relay.job.note_finished(node_id)

        return LegionProgressHandler

    def updated(self, node_id: str, value: float, total: float, image: Any) -> None:
        job = self.job
        if job is None:
            return
        job.check_cancelled()
        shown = self.shown_node(node_id)
        job.events.progress(shown, float(value), float(total))
        if image is not None:  # ("JPEG", PIL image, longest side to send)
            job.events.preview(shown, cast("Any", image)[1] if isinstance(image, tuple) else image)

    def shown_node(self, node_id: str | None) -> str | None:
        """The node of the submitted workflow that stands for ``node_id``, or for the caller's own node."""
        if node_id is None:
            context = importlib.import_module("comfy_execution.utils").get_executing_context()
            node_id = None if context is None else str(context.node_id)
        if node_id is None or self._registry is None:
            return node_id
        return str(self._registry.dynprompt.get_display_node_id(node_id))

    # --- ComfyUI's executor -------------------------------------------------------------------------

    def watch(self, execute_async: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the executor's coroutine, so that awaiting async nodes can be broken off."""

        async def watched(*args: Any, **named: Any) -> Any:
            with self._lock:
                self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
            try:
                return await execute_async(*args, **named)
            finally:
                with self._lock:
                    self._loop = self._task = None

        return watched

    @property
    def prompt_nodes(self) -> Any:
        """ComfyUI's DynamicPrompt of the job that ran last, with expanded nodes; None before the first."""
        return None if self._registry is None else self._registry.dynprompt
