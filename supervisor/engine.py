"""What a worker's engine is, whichever one it runs: the interface between the worker host and an engine.

Owns the types that pass between them. It never touches sockets, shared memory or processes, so an
engine can be run and tested in any process.

    host ── JobRequest, EngineEvents ──▶ engine ── node, progress, preview ──▶ host ── messages ──▶ supervisor
         ◀────────── JobOutcome ────────
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from legion_shm.transport.values import FOLDERS

__all__ = ["Engine", "EngineEvents", "EngineInfo", "JobOutcome", "JobRequest", "NodeStatus", "Prompt"]

Prompt = Mapping[str, Mapping[str, object]]
"""An API-format workflow: node id to ``{"class_type": str, "inputs": {...}}``."""

NodeStatus = Literal["started", "finished", "cached"]


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself when it is ready. ``versions`` maps a part's name to its version."""

    name: str
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    node_classes: int = 0


@dataclass(frozen=True)
class JobRequest:
    """One job for an engine.

    ``prompt_digest`` is equal for equal workflows, so that an engine can keep what it validated.
    ``identities`` says of each input what a cache may key on: equal bytes mean an equal value; None
    means that this very value can never be given again, so nothing made from it is worth keeping.
    ``extra_data`` is what ComfyUI calls so: what hidden inputs such as EXTRA_PNGINFO are filled from.
    """

    job_id: str
    prompt: Prompt
    prompt_digest: bytes
    inputs: Mapping[str, object]
    identities: Mapping[str, bytes | None]
    extra_data: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True)
class JobOutcome:
    """What a job made: ``outputs`` by channel name, ``ui`` as output nodes reported it, by node id.

    ``folders``: where files are that ``ui`` says to be of a type (``input``, ``output``, ``temp``).
    """

    outputs: Mapping[str, object]
    ui: Mapping[str, Mapping[str, object]]
    executed: int
    cached: int
    folders: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def report(self) -> Mapping[str, Mapping[str, object]]:
        """What goes back besides the outputs; folders only with something that may lie in them."""
        return {**self.ui, FOLDERS: self.folders} if self.ui and self.folders else self.ui


class EngineEvents(Protocol):
    """Where an engine reports while a job runs. Every method may be called from any thread."""

    def node(self, node_id: str, class_type: str, status: NodeStatus) -> None: ...

    def progress(self, node_id: str | None, value: float, total: float) -> None: ...

    def preview(self, node_id: str | None, image: object) -> None:
        """``image``: a PIL image, or a torch IMAGE ``[B,H,W,C]`` float 0..1."""
        ...


class Engine(Protocol):
    """Runs API-format workflows in this process, one at a time."""

    @property
    def name(self) -> str: ...

    def start(self) -> EngineInfo:
        """Load what is needed to run jobs; raises whatever a broken node module raises."""
        ...

    def execute(self, request: JobRequest, events: EngineEvents) -> JobOutcome:
        """Run one job on the calling thread.

        Raises InvalidWorkflow (before any node ran), JobFailed, or JobCancelled after `interrupt`.
        Whatever it raises, the next call starts clean.
        """
        ...

    def interrupt(self, job_id: str) -> None:
        """Make `execute` of that job raise JobCancelled soon. Any thread; no effect on other jobs."""
        ...

    def free(self) -> None:
        """Drop caches (and models, where the engine has any)."""
        ...

    def forget(self, keys: tuple[str, ...]) -> None:
        """Drop what is kept of these models of the supervisor's process: they are gone there."""
        ...

    def close(self) -> None: ...
