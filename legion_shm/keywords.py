"""The keywords of `WorkerSpec` and of `Supervisor`, for type checkers: what may be given, not what is kept.

Owns the two lists alone; `config` checks the values and says what each means.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

__all__ = ["SettingsKeywords", "WorkerKeywords"]

_Path = str | os.PathLike[str]


class WorkerKeywords(TypedDict, total=False):
    """Paths may be `os.PathLike`, and one module, folder or argument string stand for a list."""

    engine: Literal["auto", "graph", "comfy"]
    node_modules: _Path | Sequence[_Path]
    codec_modules: _Path | Sequence[_Path]
    pickle_classes: str | Sequence[str]
    env: Mapping[str, str | int | float] | None
    python_path: _Path | Sequence[_Path]
    python_executable: _Path | None
    working_dir: _Path | None
    comfyui_path: _Path | None
    extra_args: str | Sequence[str] | None
    max_workers: int
    warm_spares: int
    startup_timeout_s: float
    idle_timeout_s: float | None
    max_jobs_per_life: int | None
    zygote: Literal["auto", "off"]
    born_in_arena: Literal["auto", "off"]
    gpu_arena: Literal["auto", "off"]
    models: Literal["auto", "reference", "recipe"]


class SettingsKeywords(TypedDict, total=False):
    """Those of `SupervisorSettings`."""

    max_workers: int
    max_queue: int
    arena_quota_bytes: int
    gpu_arena_quota_bytes: int
    arena_wait_s: float
    inline_max_bytes: int
    max_message_bytes: int
    heartbeat_interval_s: float
    heartbeat_timeout_s: float
    cancel_grace_s: float
    stop_grace_s: float
    term_grace_s: float
    restart_budget: int
    restart_backoff_s: float
    restart_backoff_max_s: float
    restart_reset_s: float
    event_history: int
    log_tail_lines: int
    lease_flush_s: float
    idle_trim_s: float
    zygote: Literal["auto", "off"]
    zygote_idle_s: float
    channel: Literal["auto", "ipc", "tcp"]
    segments: Literal["auto", "memfd", "portable"]
    runtime_dir: _Path | None
