"""The worker processes: starting them, talking to them, reading their output, seeing them end.

Owns the `WorkerIO` of every worker from the order to spawn it until its last line has been read, and
which socket identity and which descriptor belongs to which. It knows no jobs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial
from typing import cast

from legion_shm import faults
from legion_shm.config import SupervisorSettings, WorkerSpec
from legion_shm.errors import LegionError, StartupError
from legion_shm.supervisor.spawn import HostConfig, current_dir, preload_for, spawn_worker
from legion_shm.supervisor.spawned import SpawnedWorker
from legion_shm.supervisor.worker_io import WorkerIO
from legion_shm.supervisor.zygote import Request
from legion_shm.supervisor.zygotes import Zygotes
from legion_shm.transport.born_build import library_path
from legion_shm.transport.channel import ServerChannel
from legion_shm.transport.codec_plan import load_handlers
from legion_shm.transport.frames import encode_message
from legion_shm.transport.messages import (
    Message,
)
from legion_shm.transport.segment import SegmentKind, prepare_segments

__all__ = ["Post", "Processes"]

_log = logging.getLogger("legion_shm.supervisor")

_STATUS_LOOK_S = 0.01  # until the word about an exit has come from where it is known

Post = Callable[[Callable[[float], None]], None]
"""Have the loop call something, with the time, on its own thread."""


def _prepare(kind: SegmentKind) -> None:
    """What the first tensor needs, for which somebody waits, while its worker is being started."""
    prepare_segments(kind)
    load_handlers()


class Processes:
    """Used by the loop's thread alone; processes are started on a helper's."""

    def __init__(
        self,
        settings: SupervisorSettings,
        channel: ServerChannel,
        helpers: Executor,
        post: Post,
        adopted: Callable[[WorkerIO, float], None],
    ) -> None:
        """``adopted(worker, now)`` hears of each process that has come."""
        self.adopted = adopted
        self._settings, self._channel = settings, channel
        self._helpers, self._post = helpers, post
        self._zygotes = Zygotes(settings, channel, helpers, post)
        self._workers: dict[str, WorkerIO] = {}
        self._by_identity: dict[bytes, WorkerIO] = {}
        self._by_fd: dict[int, WorkerIO] = {}
        self._first = True

    def __iter__(self) -> Iterator[WorkerIO]:
        return iter(tuple(self._workers.values()))

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, worker_id: str) -> WorkerIO | None:
        return self._workers.get(worker_id)

    def __getitem__(self, worker_id: str) -> WorkerIO:
        return self._workers[worker_id]

    def of_identity(self, identity: bytes) -> WorkerIO | None:
        return self._by_identity.get(identity)

    # --- starting -----------------------------------------------------------------------------------

    def spawn(
        self,
        worker_id: str,
        spec: WorkerSpec,
        kind: SegmentKind,
        failed: Callable[[WorkerIO, StartupError, float], None],
        withdrawn: Callable[[WorkerIO, float], None],
    ) -> None:
        """Start a worker in the background.

        ``failed(worker, error, now)`` hears if no process comes, ``withdrawn(worker, now)`` if none is to
        come any more because the worker was signalled before.
        """
        settings = self._settings
        worker = WorkerIO(worker_id, spec, settings.log_tail_lines)
        worker.engine = spec.engine
        self._workers[worker.id] = worker
        if self._first:
            self._first = False
            with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
                self._helpers.submit(_prepare, kind)
        try:
            worker.endpoint = endpoint = self._channel.admit(worker.identities)
        except (LegionError, OSError) as error:
            text = f"worker {worker.id} could not be started: {error}"
            self._post(partial(failed, worker, StartupError(text, worker_id=worker.id)))
            return
        for identity in worker.identities:
            self._by_identity[identity] = worker
        same_python = spec.python_executable in (None, sys.executable)
        importable = _importable_path() if same_python and spec.engine == "graph" else ()
        config = HostConfig(
            worker=worker.id,
            token=worker.token,
            endpoint=endpoint,
            job_identity=worker.job_identity,
            control_identity=worker.control_identity,
            arena=worker.arena,
            arena_quota_bytes=settings.arena_quota_bytes,
            gpu_arena_quota_bytes=settings.gpu_arena_quota_bytes if spec.gpu_arena == "auto" else 0,
            arena_wait_s=settings.arena_wait_s,
            inline_max_bytes=settings.inline_max_bytes,
            max_message_bytes=settings.max_message_bytes,
            heartbeat_interval_s=settings.heartbeat_interval_s,
            lease_flush_s=settings.lease_flush_s,
            idle_trim_s=settings.idle_trim_s,
            segments=kind,
            engine="comfy" if spec.engine == "comfy" else "graph",
            node_modules=tuple(spec.node_modules),
            codec_modules=tuple(spec.codec_modules),
            pickle_classes=tuple(spec.pickle_classes),
            comfyui_path=spec.comfyui_path,
            extra_args=tuple(spec.extra_args),
            python_path=tuple(spec.python_path),
            parent_path=importable,
            preloaded=preload_for(spec, kind),
            library=str(library_path()[0] or ""),
        )

        def start() -> None:
            try:
                spawned = spawn_worker(
                    config, executable=spec.python_executable, env=spec.env, working_dir=spec.working_dir
                )
            except StartupError as error:
                self._post(partial(failed, worker, error))
            except BaseException as error:
                text = f"worker {worker.id} could not be started: {error!r}"
                self._post(partial(failed, worker, StartupError(text, worker_id=worker.id)))
            else:
                self._post(partial(self.adopt, worker, spawned))

        def execute() -> None:
            worker.withdraw = None
            try:
                self._helpers.submit(start)
            except RuntimeError as error:  # the interpreter is shutting down
                text = f"worker {worker.id} could not be started: {error}"
                self._post(partial(failed, worker, StartupError(text, worker_id=worker.id)))

        if not self._zygotes.wanted(spec):
            execute()
            return
        worker.withdraw = partial(self._zygotes.withdraw, worker)
        request = Request(worker, config, partial(self._forked, worker), execute, partial(withdrawn, worker))
        self._zygotes.request(request, spec)

    def _forked(self, worker: WorkerIO, spawned: SpawnedWorker) -> None:
        self._post(partial(self.adopt, worker, spawned))

    def adopt(self, worker: WorkerIO, spawned: SpawnedWorker, now: float) -> None:
        """The process is there; if it is not wanted any more, its end comes right after."""
        if faults.hit is not None:
            faults.hit("processes.after_spawn")
        worker.adopt(spawned)
        worker.withdraw = None
        for fd in (spawned.exit_fd, *worker.readers):
            self._by_fd[fd] = worker
            self._channel.watch(fd)
        if worker.kill_wanted:
            worker.signal("SIGKILL")
        else:
            self.adopted(worker, now)

    # --- talking ------------------------------------------------------------------------------------

    def send(self, worker: WorkerIO, message: Message, *, control: bool = False) -> None:
        """To the job socket, or the control socket. A worker that is gone is not an error: its end comes."""
        frame = encode_message(message, max_bytes=self._settings.max_message_bytes)
        if not self._channel.send(worker.control_identity if control else worker.job_identity, frame):
            _log.debug("worker %s is not there to take a %s", worker.id, type(message).__name__)

    # --- output and end -----------------------------------------------------------------------------

    def readable(self, fd: int) -> tuple[WorkerIO, bool] | None:
        """Whose descriptor it is and whether it says that the process has ended; None if no worker's."""
        if self._zygotes.readable(fd):
            return None
        worker = self._by_fd.get(fd)
        if worker is None or worker.spawned is None:
            return None
        ended = fd == worker.spawned.exit_fd
        if ended:
            self._unwatch(fd)
        return worker, ended

    def read_output(self, worker: WorkerIO) -> list[tuple[str, str]]:
        """(stream, line) of what it wrote since the last call; kept in its tail too."""
        lines = worker.read_lines()
        for fd, (_, reader) in worker.readers.items():
            if reader.ended:
                self._unwatch(fd)
        return [(str(stream), line) for stream, line in lines] if lines else []

    def exited(self, now: float) -> list[tuple[WorkerIO, int | None]]:
        """Workers whose time to speak is over, with their exit codes; None where nobody can tell it."""
        found: list[tuple[WorkerIO, int | None]] = []
        for worker in self._workers.values():
            if worker.gone_at_s is None or worker.spawned is None:
                continue
            due = now >= worker.gone_at_s
            if (due or worker.status_awaited) and worker.spawned.ended():
                found.append((worker, worker.spawned.exit_code()))
            elif due:
                worker.status_awaited = True  # of a fork its zygote's report, which wakes the loop
                worker.gone_at_s = now + _STATUS_LOOK_S
        return found

    def next_due_s(self) -> float | None:
        """When `exited` or `tend` has something to do next."""
        due_s = self._zygotes.next_due_s()
        for worker in self._workers.values():
            if worker.gone_at_s is not None and (due_s is None or worker.gone_at_s < due_s):
                due_s = worker.gone_at_s
        return due_s

    def tend(self, now: float) -> None:
        """End what is kept for later starts and has not been used for long."""
        self._zygotes.expire(now)

    def close(self) -> None:
        """After the last worker, and when no helper starts anything any more."""
        self._zygotes.close()

    def remove(self, worker: WorkerIO) -> None:
        """Forget a worker whose process has ended or never was; whatever it left behind is killed."""
        if worker.spawned is not None:
            for fd in (worker.spawned.exit_fd, *worker.readers):
                self._unwatch(fd)
            worker.spawned.close()
        if worker.endpoint is not None:
            self._channel.dismiss(worker.identities, worker.endpoint)
        for identity in worker.identities:
            self._by_identity.pop(identity, None)
        self._workers.pop(worker.id, None)

    def kill_all(self) -> None:
        """Without manners: for when the loop itself has failed."""
        for worker in tuple(self._workers.values()):
            worker.signal("SIGKILL")
            if worker.spawned is not None:
                worker.spawned.join(1.0)
            self.remove(worker)

    def _unwatch(self, fd: int) -> None:
        if self._by_fd.pop(fd, None) is not None:
            self._channel.unwatch(fd)


def _importable_path() -> tuple[str, ...]:
    """Where this program imports from, for workers that load its own node modules."""
    here = current_dir()
    entries = cast("list[object]", list(sys.path))  # which may hold anything
    return tuple(os.path.normpath(os.path.join(here, path)) for path in entries if isinstance(path, str))
