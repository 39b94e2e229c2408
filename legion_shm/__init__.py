"""Legion SHM: headless ComfyUI workers that exchange tensors through shared memory.

The names below load on first use, so that ``import legion_shm`` brings in neither torch nor ZeroMQ.
A name's own module holds its documentation.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from legion_shm.config import JobOptions, SupervisorSettings, WorkerSpec
    from legion_shm.errors import (
        ArenaFull,
        ConfigError,
        DeadlineExceeded,
        ForkedError,
        InvalidHandle,
        InvalidWorkflow,
        JobCancelled,
        JobError,
        JobFailed,
        LegionError,
        MessageTooLarge,
        ProtocolError,
        QueueFull,
        StaleHandle,
        StartupError,
        StartupTimeout,
        SupervisorClosed,
        UnsupportedValue,
        WorkerLost,
    )
    from legion_shm.events import (
        Event,
        EventsDropped,
        JobEnded,
        JobQueued,
        JobRetrying,
        JobStarted,
        LogEvent,
        NodeEvent,
        PreviewEvent,
        ProgressEvent,
    )
    from legion_shm.job_context import check_cancelled, current_job, progress
    from legion_shm.supervisor.api import Supervisor
    from legion_shm.supervisor.freeing import FreedMemory
    from legion_shm.supervisor.job import Job
    from legion_shm.supervisor.remote import RemoteHandle
    from legion_shm.supervisor.result import JobStats, Result, Transfer
    from legion_shm.supervisor.state import WorkerInfo
    from legion_shm.transport.codec_registry import ValueType, register_codec
    from legion_shm.workflow import load_workflow

__version__ = "0.1.0"

if not Path(__file__).with_name("nodes").joinpath("__init__.py").is_file():
    # A checkout whose symlinks became text files (Windows) or empty folders (an archive packed for ComfyUI's
    # registry): the folders that they name lie beside this one.
    __path__.append(str(Path(__file__).resolve().parents[1]))

__all__ = [
    "ArenaFull",
    "ConfigError",
    "DeadlineExceeded",
    "Event",
    "EventsDropped",
    "ForkedError",
    "FreedMemory",
    "InvalidHandle",
    "InvalidWorkflow",
    "Job",
    "JobCancelled",
    "JobEnded",
    "JobError",
    "JobFailed",
    "JobOptions",
    "JobQueued",
    "JobRetrying",
    "JobStarted",
    "JobStats",
    "LegionError",
    "LogEvent",
    "MessageTooLarge",
    "NodeEvent",
    "PreviewEvent",
    "ProgressEvent",
    "ProtocolError",
    "QueueFull",
    "RemoteHandle",
    "Result",
    "StaleHandle",
    "StartupError",
    "StartupTimeout",
    "Supervisor",
    "SupervisorClosed",
    "SupervisorSettings",
    "Transfer",
    "UnsupportedValue",
    "ValueType",
    "WorkerInfo",
    "WorkerLost",
    "WorkerSpec",
    "check_cancelled",
    "current_job",
    "load_workflow",
    "progress",
    "register_codec",
]

_MODULES = {
    "legion_shm.config": ("JobOptions", "SupervisorSettings", "WorkerSpec"),
    "legion_shm.errors": (
        "ArenaFull",
        "ConfigError",
        "DeadlineExceeded",
        "ForkedError",
        "InvalidHandle",
        "InvalidWorkflow",
        "JobCancelled",
        "JobError",
        "JobFailed",
        "LegionError",
        "MessageTooLarge",
        "ProtocolError",
        "QueueFull",
        "StaleHandle",
        "StartupError",
        "StartupTimeout",
        "SupervisorClosed",
        "UnsupportedValue",
        "WorkerLost",
    ),
    "legion_shm.events": (
        "Event",
        "EventsDropped",
        "JobEnded",
        "JobQueued",
        "JobRetrying",
        "JobStarted",
        "LogEvent",
        "NodeEvent",
        "PreviewEvent",
        "ProgressEvent",
    ),
    "legion_shm.job_context": ("check_cancelled", "current_job", "progress"),
    "legion_shm.supervisor.api": ("Supervisor",),
    "legion_shm.supervisor.freeing": ("FreedMemory",),
    "legion_shm.supervisor.job": ("Job",),
    "legion_shm.supervisor.remote": ("RemoteHandle",),
    "legion_shm.supervisor.result": ("JobStats", "Result", "Transfer"),
    "legion_shm.supervisor.state": ("WorkerInfo",),
    "legion_shm.transport.codec_registry": ("ValueType", "register_codec"),
    "legion_shm.workflow": ("load_workflow",),
}
_EXPORTS = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
