"""The zygote: a process that has imported what workers of one kind need, and forks them.

Owns its own life and the moment of each fork: what a fork must not share is taken from it here, before it
becomes a worker. It never runs a node, never loads a user's module, and never touches a GPU.

    exec ─▶ preload ─▶ fit? ─▶ serve ──Fork──▶ still as on disk? ─▶ fork ─▶ Forked, later Exited
                         │                       └─ not: Outdated    └─ child: serve returns what it is to be
                         └─ not: Unfit; perhaps it becomes the worker itself

The child returns from `serve` into the very entry that a spawned worker has, so it ends like one too. A child
that has ended stays a zombie until the supervisor says that it has no more use for its pid.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import os
import select
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import current_process
from typing import Any, Literal, cast

from legion_shm.supervisor import death_pipe, zygote_wire
from legion_shm.supervisor.freeing import forked, trim_heap
from legion_shm.supervisor.spawn import HostConfig, Launch, LaunchedProcess, tell_ends
from legion_shm.supervisor.worker_env import without_preload
from legion_shm.supervisor.zygote_wire import (
    Become,
    Exited,
    Fit,
    Fork,
    Forked,
    NotForked,
    Outdated,
    Reap,
    Unfit,
)

__all__ = ["ZygoteConfig", "ZygoteProcess", "serve"]

_SETTLE_WAIT_MS = 5_000  # a child has only to make a session of its own
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/davinci", "/dev/accel")


@dataclass(frozen=True)
class ZygoteConfig:
    """What a zygote is told at its start; picklable, and unpicklable without torch."""

    name: str
    engine: Literal["graph", "comfy"]
    python_path: tuple[str, ...]
    parent_path: tuple[str, ...]
    comfyui_path: str | None
    extra_args: tuple[str, ...]
    preloaded: str = ""
    death_fd: int = -1
    begun_fd: int = -1
    control_fd: int = -1


class ZygoteProcess(LaunchedProcess):
    """Starts as any worker's process does; what runs in it is a worker too, in each of its forks."""

    def __init__(self, config: ZygoteConfig, launch: Launch) -> None:
        super().__init__(config.name, launch)
        self.zygote_config = config

    def run(self) -> None:
        worker = serve(self.zygote_config)
        if worker is not None:
            from legion_shm.supervisor.host import main

            main(worker)


def serve(config: ZygoteConfig) -> HostConfig | None:
    """In a fork, and in a zygote that has to be a worker itself: which. None at the zygote's own end."""
    death_pipe.arm(config.death_fd)
    without_preload(os.environ, config.preloaded)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored by the program, it would be so here
    for stream in (sys.stdout, sys.stderr):
        cast("io.TextIOWrapper", stream).reconfigure(line_buffering=True, errors="backslashreplace")
    os.close(config.begun_fd)  # every spawned process gets one; a zygote begins no job
    control = socket.socket(fileno=config.control_fd)
    control.setblocking(True)
    started_s = time.monotonic()
    gc.disable()  # until the fork: what is never collected is never moved, and its pages stay shared
    loaded = _preload(config)
    trouble = loaded if isinstance(loaded, Unfit) else None
    if trouble is None:
        reason = _why_unfit()
        trouble = Unfit(reason, clean=True) if reason else None
    trim_heap()  # what imports left free would be every fork's
    zygote_wire.send_report(control, trouble or Fit(time.monotonic() - started_s))
    gc.freeze()
    return _Zygote(control, config, str if isinstance(loaded, Unfit) else loaded).run()


def _preload(config: ZygoteConfig) -> Unfit | Callable[[], str]:
    """Import what workers of this kind will, and how to ask whether it has changed since.

    What fails to load here is for a worker to say.
    """
    from legion_shm.supervisor.host import extend_path
    from legion_shm.supervisor.zygote_preload import NotToBePreloaded, preload

    extend_path(config.python_path, config.parent_path)
    try:
        return preload(config.engine, config.comfyui_path, config.extra_args)
    except NotToBePreloaded as reason:
        return Unfit(str(reason), clean=False)
    except BaseException as error:
        return Unfit(f"{type(error).__name__} while it imported: {error}"[:2000], clean=False)


def _why_unfit() -> str:
    """Why a fork of this process would not be safe; empty where it would.

    Asked with a rehearsal: at a fork libraries that know of forks end their threads (OpenBLAS does). Threads
    that are still there afterwards would be missing in a child, with whatever locks they hold.
    """
    try:
        with _fork_warnings_off():
            pid = os.fork()
    except OSError as error:
        return f"it cannot fork: {error}"
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    names = _thread_names()
    if len(names) > 1:
        return f"its imports left {len(names) - 1} more threads running ({', '.join(sorted(set(names)))})"
    device = _open_device()
    return f"its imports have opened a device ({device})" if device else _touched_accelerator()


def _thread_names() -> list[str]:
    names: list[str] = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm", encoding="utf-8") as file:
            names.append(file.read().strip())
    return names


def _open_device() -> str:
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.startswith(_DEVICES):
                return path
    return ""


def _touched_accelerator() -> str:
    torch = sys.modules.get("torch")
    for name in ("cuda", "xpu", "npu", "mlu"):
        ask = getattr(getattr(torch, name, None), "is_initialized", None)
        if ask is not None and ask():
            return f"its imports have initialized torch.{name}"
    return ""


@contextlib.contextmanager
def _fork_warnings_off() -> Any:
    """Newer Pythons warn of every fork with threads, also of those that end at it; who stays is looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class _Zygote:
    def __init__(self, control: socket.socket, config: ZygoteConfig, changed: Callable[[], str]) -> None:
        self._control, self._config, self._changed = control, config, changed
        self._children: dict[int, int] = {}  # pidfd to pid
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def run(self) -> HostConfig | None:
        while True:
            for fd, _ in self._poll.poll():  # however its supervisor ends, the death pipe ends this
                if fd != self._control.fileno():
                    self._ended(fd)
                    continue
                received = zygote_wire.receive_order(self._control)
                if received is None:
                    return None
                order, fds = received
                if isinstance(order, Reap):
                    self._reap(order.pid)
                    continue
                worker = self._fork(order, fds) if isinstance(order, Fork) else self._settle(order, fds)
                if worker is not None:
                    return worker

    # --- forks --------------------------------------------------------------------------------------

    def _fork(self, order: Fork, fds: list[int]) -> HostConfig | None:
        outdated = self._changed()
        if outdated:
            _close(fds)
            zygote_wire.send_report(self._control, Outdated(order.number, outdated[:2000]))
            return None
        try:
            extra = len(os.listdir("/proc/self/task")) - 1
            if extra:
                raise OSError(f"{extra} threads have come up in the zygote")
            sys.stdout.flush()
            sys.stderr.flush()
            settled_r, settled_w = os.pipe()
            with _fork_warnings_off():
                pid = os.fork()
        except OSError as error:
            _close(fds)
            zygote_wire.send_report(self._control, NotForked(order.number, str(error)))
            return None
        if pid == 0:
            os.close(settled_r)
            os.setsid()
            forked()
            worker = self._settle(order, fds)
            os.close(settled_w)
            return worker
        os.close(settled_w)
        _close(fds)
        pidfd = os.pidfd_open(pid)
        _wait_for_end(settled_r)  # until then a signal to its group would reach nobody
        os.close(settled_r)
        self._children[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        zygote_wire.send_report(self._control, Forked(order.number, pid), [pidfd])
        return None

    def _settle(self, order: Fork | Become, fds: Sequence[int]) -> HostConfig:
        """Be the worker from here on: with its own descriptors, and nothing of the zygote's."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(fds[0], 1)
        os.dup2(fds[1], 2)
        _close([*fds[:2], self._config.death_fd, *self._children])
        self._control.close()
        current_process().name = f"legion-{order.config.worker}"
        _reseed()
        gc.enable()
        # The paths are on sys.path already.
        return replace(tell_ends(order.config, fds), python_path=(), parent_path=())

    # --- ends ---------------------------------------------------------------------------------------

    def _ended(self, pidfd: int) -> None:
        """Say how it ended, and leave it unreaped: its pid must not name another process yet."""
        self._poll.unregister(pidfd)
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is None:
            return
        status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        zygote_wire.send_report(self._control, Exited(self._children[pidfd], status))

    def _reap(self, pid: int) -> None:
        for pidfd, known in list(self._children.items()):
            if known == pid:
                with contextlib.suppress(KeyError):
                    self._poll.unregister(pidfd)
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
                del self._children[pidfd]
                os.close(pidfd)


def _reseed() -> None:
    """Random streams of a fork's own, where a process of its own would have them.

    Python's ``random`` and ``tempfile`` and OpenSSL see to themselves; a GPU's generators do not exist yet.
    """
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()


def _wait_for_end(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, 0)
    poll.poll(_SETTLE_WAIT_MS)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
