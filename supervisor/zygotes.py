"""The zygotes of a supervisor: which worker comes from which, and how long each is kept.

Owns what makes two workers of one kind, the reasons why some kinds have no zygote, and the end of those that
nobody has used for a while. One zygote serves one kind: what is fixed when a process is executed, or read
while it imports, must be equal (interpreter, environment, folder, import paths, engine, ComfyUI's arguments).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

from legion_shm.clock import monotonic_s
from legion_shm.config import SupervisorSettings, WorkerSpec
from legion_shm.errors import StartupError
from legion_shm.supervisor.facilities import has_pidfd
from legion_shm.supervisor.spawn import (
    current_dir,
    launch_with,
    start_process,
    worker_environment,
)
from legion_shm.supervisor.worker_ends import PosixWorker, WorkerEnds
from legion_shm.supervisor.worker_io import WorkerIO
from legion_shm.supervisor.zygote import Request, Zygote
from legion_shm.supervisor.zygote_child import ZygoteConfig, ZygoteProcess
from legion_shm.transport.channel import ServerChannel

__all__ = ["Zygotes", "zygotes_supported"]

_log = logging.getLogger("legion_shm.supervisor")

_UNUSED_MAX = 3  # zygotes without a worker; one more, and the longest unused is ended
_REASONS_MAX = 256


@dataclass(frozen=True)
class _Kind:
    engine: str
    executable: str
    env: tuple[tuple[str, str], ...]
    working_dir: str
    python_path: tuple[str, ...]
    parent_path: tuple[str, ...]
    comfyui_path: str | None
    extra_args: tuple[str, ...]
    preloaded: str


def zygotes_supported() -> str:
    """Why this system has none; empty where it can."""
    if not sys.platform.startswith("linux"):
        return "only Linux has process descriptors and safe forks"
    if not has_pidfd():
        return "process descriptors are missing, or left out on purpose"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return f"this kernel or Python has no process descriptors: {error}"
    return ""


class Zygotes:
    """Used by the loop's thread alone; zygotes are started on a helper's."""

    def __init__(
        self,
        settings: SupervisorSettings,
        channel: ServerChannel,
        helpers: Executor,
        post: Callable[[Callable[[float], None]], None],
    ) -> None:
        self._settings, self._channel, self._helpers, self._post = settings, channel, helpers, post
        self._on = settings.zygote == "auto" and not zygotes_supported()
        self._by_kind: dict[_Kind, Zygote] = {}
        self._all: list[Zygote] = []
        self._watched: dict[int, Zygote] = {}
        self._unfit: dict[_Kind, str] = {}
        self._numbers = 0

    def wanted(self, spec: WorkerSpec) -> bool:
        return self._on and spec.zygote == "auto"

    def request(self, request: Request, spec: WorkerSpec) -> None:
        """Have a worker forked, once its zygote is there; or executed, where that is not to be."""
        config = request.config
        kind = _Kind(
            engine=config.engine,
            executable=spec.python_executable or sys.executable,
            env=tuple(sorted(worker_environment(spec.env, config.preloaded).items())),
            working_dir=spec.working_dir or current_dir(),
            python_path=config.python_path,
            parent_path=config.parent_path,
            comfyui_path=config.comfyui_path,
            extra_args=config.extra_args,
            preloaded=config.preloaded,
        )
        self._ask(kind, request)
        self._watch()

    def _ask(self, kind: _Kind, request: Request) -> None:
        if kind in self._unfit:
            request.give_up()
            return
        now, zygote = monotonic_s(), self._by_kind.get(kind)
        if zygote is None or zygote.state == "outdated":
            zygote = self._start(kind, now)
        zygote.ask(request, now)

    def withdraw(self, worker: WorkerIO) -> None:
        """Take a worker back that waits for its process, if it has not been ordered yet."""
        for zygote in self._all:
            request = zygote.withdraw(worker, monotonic_s())
            if request is not None:
                worker.withdraw = None
                self._post(request.withdrawn)
                return

    # --- their life ---------------------------------------------------------------------------------

    def _start(self, kind: _Kind, now: float) -> Zygote:
        self._make_room()
        self._numbers += 1
        name = f"zygote-{self._numbers}"
        zygote = Zygote(name, partial(self._told_unfit, kind), partial(self._ask, kind), now)
        self._by_kind[kind] = zygote
        self._all.append(zygote)

        def start() -> None:
            try:
                spawned = _spawn_zygote(zygote.name, kind)
            except BaseException as error:
                self._post(partial(self._not_started, zygote, error))
            else:
                self._post(partial(self._started, zygote, spawned))

        try:
            self._helpers.submit(start)
        except RuntimeError as error:  # the interpreter is shutting down
            self._post(partial(self._not_started, zygote, error))
        return zygote

    def _make_room(self) -> None:
        unused = [zygote for zygote in self._all if not zygote.in_use and zygote.state == "fit"]
        for zygote in sorted(unused, key=lambda zygote: zygote.last_used_s)[: len(unused) - _UNUSED_MAX + 1]:
            zygote.kill()

    def _started(self, zygote: Zygote, spawned: PosixWorker, now: float) -> None:
        zygote.started(spawned)
        self._watch()

    def _not_started(self, zygote: Zygote, error: BaseException, now: float) -> None:
        _log.debug("zygote %s could not be started: %s", zygote.name, error)
        zygote.never_started()
        self._watch()

    def _told_unfit(self, kind: _Kind, reason: str) -> None:
        _log.info(
            "workers of the %s engine are started one by one, without a zygote: %s", kind.engine, reason
        )
        while len(self._unfit) >= _REASONS_MAX:
            del self._unfit[next(iter(self._unfit))]
        self._unfit[kind] = reason

    # --- the loop's ---------------------------------------------------------------------------------

    def readable(self, fd: int) -> bool:
        """Whether the descriptor was a zygote's."""
        zygote = self._watched.get(fd)
        if zygote is None:
            return False
        zygote.readable(fd, monotonic_s())
        self._watch()
        return True

    def next_due_s(self) -> float | None:
        return min((time_s for _, time_s in self._ends()), default=None)

    def expire(self, now: float) -> None:
        """End those that nobody has used for ``zygote_idle_s``, and those that do not answer."""
        for zygote, time_s in tuple(self._ends()):
            if now >= time_s:
                zygote.kill()

    def _ends(self) -> Iterator[tuple[Zygote, float]]:
        for zygote in self._all:
            answer_due_s = zygote.answer_due_s()
            if zygote.kill_wanted:
                continue
            if answer_due_s is not None:
                yield zygote, answer_due_s
            elif zygote.state == "fit" and not zygote.in_use:
                yield zygote, zygote.last_used_s + self._settings.zygote_idle_s
            elif zygote.state == "outdated" and not zygote.in_use:
                yield zygote, zygote.last_used_s

    def close(self) -> None:
        """End them all. The workers are gone by now, or end with us."""
        for zygote in self._all:
            zygote.close()
        self._watch()

    def _watch(self) -> None:
        """Watch what there is to watch, and forget the zygotes that have ended."""
        self._all = [zygote for zygote in self._all if zygote.state != "ended"]
        self._by_kind = {
            kind: zygote for kind, zygote in self._by_kind.items() if zygote.state in ("starting", "fit")
        }
        now_there = {fd: zygote for zygote in self._all for fd in zygote.fds}
        for fd in self._watched.keys() - now_there.keys():
            self._channel.unwatch(fd)
        for fd in now_there.keys() - self._watched.keys():
            self._channel.watch(fd)
        self._watched = now_there


def _spawn_zygote(name: str, kind: _Kind) -> PosixWorker:
    try:
        ends = WorkerEnds(descriptors=True)
    except OSError as error:
        raise StartupError(f"{name} could not be started: {error}", worker_id=name) from error
    launch = launch_with(ends, executable=kind.executable, env=dict(kind.env), working_dir=kind.working_dir)
    config = ZygoteConfig(
        name=name,
        engine="comfy" if kind.engine == "comfy" else "graph",
        python_path=kind.python_path,
        parent_path=kind.parent_path,
        comfyui_path=kind.comfyui_path,
        extra_args=kind.extra_args,
        preloaded=kind.preloaded,
    )
    _, _, death_fd, begun_fd, control_fd = ends.theirs
    config = replace(config, death_fd=death_fd, begun_fd=begun_fd, control_fd=control_fd)
    return start_process(ends, ZygoteProcess(config, launch))
