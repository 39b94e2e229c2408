"""The one Supervisor of this process, which all Legion nodes share.

Owns its life: made on first use, closed with the process (or by `close_shared_supervisor`), made anew
where it was closed or has failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from legion_shm.config import WorkerSpec
from legion_shm.errors import LegionError, SupervisorClosed
from legion_shm.nodes.bridge import inherited_arguments, on_free_memory, wait_for
from legion_shm.nodes.folders import Folders, global_settings
from legion_shm.nodes.legion_yaml import Configuration

if TYPE_CHECKING:
    from legion_shm.supervisor.api import Supervisor
    from legion_shm.supervisor.job import Job

__all__ = [
    "PROBE",
    "close_shared_supervisor",
    "current_supervisor",
    "is_alive",
    "shared_supervisor",
    "spec_for",
    "submit",
    "warm_up",
]

PROBE: dict[str, Any] = {"probe": {"class_type": "LegionExporter", "inputs": {}}}
"""A workflow that does nothing: when it has run, its worker is ready."""

_lock = threading.Lock()
_shared: Supervisor | None = None
_owner = 0


def shared_supervisor() -> Supervisor:
    """The supervisor of this process. Raises ConfigError where ``config.yaml`` is wrong."""
    global _shared, _owner
    with _lock:
        if _shared is None or _owner != os.getpid():
            from legion_shm.supervisor.api import Supervisor

            settings = global_settings(Folders.current())
            if settings.log_level is not None:
                logging.getLogger("legion_shm").setLevel(settings.log_level)
            _shared, _owner = Supervisor(max_workers=settings.max_workers), os.getpid()
            on_free_memory(_free_workers)
        return _shared


def _free_workers() -> None:
    supervisor = current_supervisor()
    if supervisor is not None:
        with contextlib.suppress(SupervisorClosed):
            supervisor.free()


def close_shared_supervisor() -> None:
    """End all workers; the next use starts anew. The process's end does this by itself."""
    global _shared
    with _lock:
        closing, _shared = _shared, None
    if closing is not None:
        closing.close()


def submit(prompt: dict[str, Any], **options: Any) -> Job:
    """`Supervisor.submit`, once more with a new supervisor where the old one was closed or has failed."""
    try:
        return shared_supervisor().submit(prompt, **options)
    except SupervisorClosed:
        with contextlib.suppress(LegionError):
            close_shared_supervisor()
        return shared_supervisor().submit(prompt, **options)


def spec_for(configuration: Configuration) -> WorkerSpec:
    """The worker for a configuration. A worker of the ComfyUI around us finds its files where that does."""
    own = configuration.comfyui_path is None and configuration.engine != "graph"
    return configuration.worker_spec(
        startup_timeout_s=global_settings(Folders.current()).startup_timeout_s,
        inherited_args=inherited_arguments(configuration.extra_args) if own else (),
    )


def current_supervisor() -> Supervisor | None:
    """The supervisor, if one has been made."""
    with _lock:
        return _shared if _owner == os.getpid() else None


def is_alive(worker_id: str) -> bool:
    """Whether a worker runs that can still be given jobs."""
    supervisor = current_supervisor()
    try:
        workers = () if supervisor is None else supervisor.workers()
    except SupervisorClosed:
        return False
    return any(worker.id == worker_id and worker.state != "stopping" for worker in workers)


def warm_up(configuration: Configuration, *, wait: bool) -> None:
    """Start a worker of a configuration if none is there. ``wait``: until it is ready, or raise why not."""
    from legion_shm.supervisor.resolve import resolve_spec

    spec = resolve_spec(spec_for(configuration))
    if not wait:
        shared_supervisor().warm_up(spec)
        return
    ready = ("idle", "busy")
    if not any(
        worker.spec_key == spec.key and worker.state in ready for worker in shared_supervisor().workers()
    ):
        wait_for(submit(PROBE, spec=spec), nodes=len(PROBE))
