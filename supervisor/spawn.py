"""Starting a worker process: multiprocessing's spawn, with an environment of its own.

Owns the process object and what it inherits: environment, output pipes, the death pipe's read end, the
descriptor socket. It knows nothing of jobs. It never imports torch: the child unpickles a class of
this module before its entry runs, and must not load torch before its environment is settled.

Three things differ from plain spawn (and are why a subclass is needed, rather than its arguments):

- the child gets its own environment at exec, so that LD_PRELOAD or GLIBC_TUNABLES act, while the
  parent's ``os.environ`` is never touched, not even for a moment;
- the parent's ``__main__`` is not imported again in the child: a plain script needs no main guard, a
  REPL and a notebook work, and ComfyUI's ``main.py`` does not start a second ComfyUI;
- another ``python_executable`` may be used.

``WorkerProcess`` derives from the class that ``torch.multiprocessing.get_context("spawn").Process`` is.

    parent                                   child (session and process group of its own)
    death pipe write end ──────────────────▶ read end: SIGKILL to the group when the parent is gone
    stdout, stderr read ends ◀────────────── descriptors 1 and 2, from exec on
    descriptor socket ─────────────────────▶ memfd segments
    begun pipe read end ◀─────────────────── the jobs that it has begun, whatever becomes of its messages
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import reduction, resource_tracker
from multiprocessing.context import SpawnProcess, set_spawning_popen
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from legion_shm.errors import StartupError
from legion_shm.supervisor.facilities import exit_descriptor
from legion_shm.supervisor.spawned import SpawnedWorker
from legion_shm.supervisor.worker_ends import PosixWorker, WorkerEnds, make_pipe
from legion_shm.supervisor.worker_env import with_preload, with_tunables, without_launch
from legion_shm.transport.born_build import library_path, preload_problem
from legion_shm.transport.channel import Endpoint

if TYPE_CHECKING:
    from legion_shm.config import WorkerSpec
    from legion_shm.transport.segment import SegmentKind

if TYPE_CHECKING or sys.platform != "win32":
    from multiprocessing.popen_spawn_posix import Popen as SpawnPopen
else:
    SpawnPopen = object  # spawn_windows launches there

__all__ = [
    "HostConfig",
    "Launch",
    "LaunchedProcess",
    "WorkerProcess",
    "current_dir",
    "environment_with",
    "launch_with",
    "preload_for",
    "spawn_worker",
    "start_process",
    "tell_ends",
    "worker_environment",
]


_NAME = "legion-"
_WNOHANG = getattr(os, "WNOHANG", 1)  # Windows lacks it, and what uses it


@dataclass(frozen=True)
class HostConfig:
    """What a worker process is told at its start; picklable, and unpicklable without torch.

    ``library`` is our native code's file, ``preloaded`` the same where the worker starts with it preloaded.
    """

    worker: str
    token: str = field(repr=False)
    endpoint: Endpoint
    job_identity: bytes = field(repr=False)
    control_identity: bytes = field(repr=False)
    arena: int
    arena_quota_bytes: int
    gpu_arena_quota_bytes: int
    arena_wait_s: float
    inline_max_bytes: int
    max_message_bytes: int
    heartbeat_interval_s: float
    lease_flush_s: float
    idle_trim_s: float
    segments: Literal["memfd", "portable"]
    engine: Literal["graph", "comfy"]
    node_modules: tuple[str, ...]
    codec_modules: tuple[str, ...]
    pickle_classes: tuple[str, ...]
    comfyui_path: str | None
    extra_args: tuple[str, ...]
    python_path: tuple[str, ...]
    parent_path: tuple[str, ...]
    death_fd: int = -1
    descriptor_fd: int = -1
    begun_fd: int = -1
    preloaded: str = ""
    library: str = ""


class _LegionPopen(SpawnPopen):
    """Spawn's launcher over subprocess.Popen; the protocol with ``spawn_main`` is multiprocessing's own."""

    _fds: list[int]  # multiprocessing's own list of what the child inherits
    finalizer: Any

    def __init__(self, process: LaunchedProcess) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting = threading.Lock()
        self.status_lost = False
        super().__init__(process)

    def _launch(self, process_obj: Any) -> None:
        launch: Launch = process_obj.launch
        process_obj.launch = None  # of this process only; the child needs none of it
        tracker_fd = cast("int", resource_tracker.getfd())  # starts the tracker if there is none
        payload = io.BytesIO()
        set_spawning_popen(self)
        try:
            preparation = {
                "name": process_obj.name,
                "authkey": process_obj.authkey,
                "dir": launch.working_dir,
                "orig_dir": launch.working_dir,
            }
            reduction.dump(preparation, payload)
            reduction.dump(process_obj, payload)
        finally:
            set_spawning_popen(None)
        with contextlib.ExitStack() as ours_on_failure, contextlib.ExitStack() as childs:
            sentinel, child_w = make_pipe(ours_on_failure, childs)
            child_r, parent_w = make_pipe(childs, ours_on_failure)
            self._process = subprocess.Popen(
                [
                    launch.executable,
                    *launch.flags,
                    "-c",
                    _program(launch, tracker_fd, child_r),
                    "--multiprocessing-fork",
                ],
                env=dict(launch.env),
                stdin=subprocess.DEVNULL,
                stdout=launch.stdout,
                stderr=launch.stderr,
                pass_fds=(*launch.pass_fds, *self._fds, tracker_fd, child_r, child_w),
                start_new_session=True,
            )
            self.pid = self._process.pid
            self.sentinel = sentinel
            with contextlib.suppress(BrokenPipeError), open(parent_w, "wb", closefd=False) as file:
                file.write(payload.getbuffer())
            childs.close()
            os.close(parent_w)
            ours_on_failure.pop_all()
        self.finalizer = None

    def poll(self, flag: int = _WNOHANG) -> int | None:
        """As multiprocessing's; 0 too where the program lets others hear of our child's end (SIGCHLD)."""
        process = self._process
        if process is None or not self._waiting.acquire(blocking=flag != _WNOHANG):
            return self.returncode
        try:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, flag)
                self.returncode = os.waitstatus_to_exitcode(status) if pid == self.pid else None
        except ChildProcessError:
            self.returncode, self.status_lost = 0, True
        finally:
            process.returncode = self.returncode
            self._waiting.release()
        return self.returncode

    def close(self) -> None:
        if self.sentinel >= 0:
            os.close(self.sentinel)
            self.sentinel = -1


def _program(launch: Launch, tracker_fd: int, pipe_fd: int) -> str:
    # "-c" puts the current folder first on sys.path, where a file of the user's could hide a library.
    return (
        "import sys; sys.path[:1] = [p for p in sys.path[:1] if p]; "
        f"sys.path.extend(p for p in {list(launch.own_path)!r} if p not in sys.path); "
        "from multiprocessing.spawn import spawn_main; "
        f"spawn_main(tracker_fd={tracker_fd}, pipe_handle={pipe_fd})"
    )


@dataclass(frozen=True)
class Launch:
    """What a process is executed with: of the parent's side only."""

    executable: str
    flags: tuple[str, ...]
    own_path: tuple[str, ...]
    env: Mapping[str, str]
    working_dir: str
    stdout: int
    stderr: int
    pass_fds: tuple[int, ...]


class LaunchedProcess(SpawnProcess):
    """A spawned process that is executed as its ``launch`` says."""

    launch: Launch | None

    def __init__(self, name: str, launch: Launch | None) -> None:
        super().__init__(name=f"{_NAME}{name}")
        self.launch = launch

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - the hook that multiprocessing's contexts override
        return _LegionPopen(process_obj)

    @property
    def exitcode(self) -> int | None:
        code = super().exitcode
        return None if getattr(getattr(self, "_popen", None), "status_lost", False) else code

    def ended(self) -> bool:
        return super().exitcode is not None


class WorkerProcess(LaunchedProcess):
    """A process that runs the worker host."""

    def __init__(self, config: HostConfig, launch: Launch | None) -> None:
        super().__init__(config.worker, launch)
        self.host_config = config

    def run(self) -> None:
        from legion_shm.supervisor.host import main

        if sys.platform == "win32":
            from legion_shm.supervisor.spawn_windows import with_descriptors

            self.host_config = with_descriptors(self.host_config)
        main(self.host_config)


def _own_path(executable: str) -> tuple[str, ...]:
    """Where the child finds this very package, unless it is installed where any interpreter looks."""
    root = Path(__file__).resolve().parent.parent
    if (root / "legion_shm" / "__init__.py").is_file() and root.name not in (
        "site-packages",
        "dist-packages",
    ):
        return (str(root),)
    if executable == sys.executable:
        import legion_shm

        return (str(Path(legion_shm.__file__ or "").resolve().parent.parent),)
    return ()


def _interpreter_flags() -> tuple[str, ...]:
    return tuple(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]


def current_dir() -> str:
    """This process's folder, or the root where that has been removed under it."""
    try:
        return os.getcwd()
    except OSError:
        return os.path.abspath(os.sep)


def environment_with(env: Mapping[str, str]) -> dict[str, str]:
    """This process's environment and ``env`` over it; other threads may be changing the former."""
    ours = {name: os.environ.get(name) for name in list(os.environ)}
    return {**{name: value for name, value in ours.items() if value is not None}, **env}


def worker_environment(env: Mapping[str, str], preload: str = "") -> dict[str, str]:
    """All that a worker with ``env`` in its spec is executed with; ``preload`` as `preload_for` gives it."""
    own = environment_with(env)
    if library_path()[0] is None:
        own = with_tunables(own)
    without_launch(own)
    return with_preload(own, preload) if preload else own


def preload_for(spec: WorkerSpec, segments: SegmentKind) -> str:
    """The allocator shim for workers of a spec; empty where they are to start without it."""
    if spec.born_in_arena == "off" or segments != "memfd":
        return ""
    library, _ = library_path()
    if library is None or preload_problem(spec.python_executable or sys.executable):
        return ""
    return str(library)


def tell_ends(config: HostConfig, theirs: Sequence[int]) -> HostConfig:
    """The worker's settings with the descriptors by which it knows its ends."""
    death_fd, begun_fd = theirs[2:4]
    return replace(
        config, death_fd=death_fd, begun_fd=begun_fd, descriptor_fd=theirs[4] if len(theirs) > 4 else -1
    )


def launch_with(
    ends: WorkerEnds, *, executable: str | None, env: Mapping[str, str], working_dir: str | None
) -> Launch:
    """How to execute a Python with a whole environment ``env``, with the child's ends."""
    executable = executable or sys.executable
    same = executable == sys.executable
    return Launch(
        executable=executable,
        flags=_interpreter_flags() if same else (),
        own_path=_own_path(executable),
        env=env,
        working_dir=working_dir or current_dir(),
        stdout=ends.theirs[0],
        stderr=ends.theirs[1],
        pass_fds=ends.theirs[2:],
    )


def start_process(ends: WorkerEnds, process: LaunchedProcess) -> PosixWorker:
    """Start a process that knows its ends. Raises StartupError, and closes the ends, where that fails."""
    executable = "" if process.launch is None else process.launch.executable
    try:
        process.start()
        pid = process.pid or 0
        return ends.spawned(process, pid, exit_descriptor(pid, process.join))
    except (OSError, AssertionError, ValueError, subprocess.SubprocessError) as error:
        ends.close()
        raise _not_started(process.name.removeprefix(_NAME), executable, error) from error
    except BaseException:
        ends.close()
        raise


def _not_started(worker: str, executable: str | None, error: Exception) -> StartupError:
    return StartupError(
        f"worker {worker}: the process could not be started with {executable or sys.executable}: {error}",
        worker_id=worker,
    )


def spawn_worker(
    config: HostConfig, *, executable: str | None, env: Mapping[str, str], working_dir: str | None
) -> SpawnedWorker:
    """Start a worker process. Raises StartupError when the process can't even be started.

    ``env`` is laid over this process's environment, for the child alone.
    """
    if sys.platform == "win32":
        from legion_shm.supervisor.spawn_windows import start_worker

        same = executable in (None, sys.executable)
        return start_worker(
            config,
            executable=executable or sys.executable,
            flags=_interpreter_flags() if same else (),
            own_path=_own_path(executable or sys.executable),
            env=environment_with(env),
            working_dir=working_dir or current_dir(),
        )
    try:
        ends = WorkerEnds(descriptors=config.segments == "memfd")
    except OSError as error:
        raise _not_started(config.worker, executable, error) from error
    launch = launch_with(
        ends, executable=executable, env=worker_environment(env, config.preloaded), working_dir=working_dir
    )
    return start_process(ends, WorkerProcess(tell_ends(config, ends.theirs), launch))
