"""Where POSIX ends the package still imports: nothing of it needs what Windows and macOS lack, until used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# What Windows has not. multiprocessing and others of the standard library look for some of these at their own
# import, so they are loaded first: it is this package's imports that are in question.
WITHOUT_POSIX = """
import sys, os, socket, signal, select, threading
import asyncio, multiprocessing.spawn, multiprocessing.context, multiprocessing.resource_tracker
import concurrent.futures, subprocess, tempfile, shutil, mmap, ctypes, logging, socketserver
import numpy, zmq, zmq.auth, zmq.auth.base, msgpack, psutil, yaml, pydantic, click, rich.table, PIL.Image
import zoneinfo, sysconfig, aiohttp
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
BLOCKED = ("fcntl", "pwd", "grp", "resource", "termios", "_posixshmem", "_posixsubprocess", "syslog", "pty")
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
for name in (*BLOCKED, "multiprocessing.popen_spawn_posix", "multiprocessing.popen_fork"):
    sys.modules.pop(name, None)
for module, names in (
    (os, ("fork", "killpg", "register_at_fork", "getuid", "geteuid", "WNOHANG", "O_CLOEXEC", "O_NOFOLLOW",
          "sched_getaffinity", "sysconf", "pidfd_open", "memfd_create", "posix_fallocate", "waitid",
          "getpgrp")),
    (socket, ("AF_UNIX", "CMSG_SPACE", "SCM_RIGHTS", "MSG_DONTWAIT")),
    (signal, ("SIGKILL", "SIGHUP", "SIGALRM", "SIGRTMIN", "pthread_sigmask", "sigtimedwait")),
    (select, ("poll",)),
    (mmap, ("PROT_READ", "PROT_WRITE", "MAP_PRIVATE", "MAP_SHARED")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
def socketpair():  # as the standard library makes one on Windows
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]
socket.socketpair = socketpair
"""

EVERY_MODULE = """
import importlib, pathlib, pkgutil, shlex, sysconfig, types
sys.platform = "win32"  # what is there instead is taken: the module below stands in for Windows' own
sys.modules["msvcrt"] = types.ModuleType("msvcrt")
import legion_shm
LINUX_ALONE = {f"legion_shm.transport.{name}" for name in ("segment_memfd", "mappings", "huge_pages")}
for package in ("legion_shm", "legion_shm.transport", "legion_shm.supervisor"):
    own = importlib.import_module(package).__path__[:1]  # a checkout without symbolic links adds its root
    for info in pkgutil.iter_modules(own, package + "."):
        if info.name not in LINUX_ALONE and not info.ispkg:
            importlib.import_module(info.name)
            print(info.name)
for name in legion_shm.__all__:
    getattr(legion_shm, name)
assert "legion_shm.supervisor.spawn_windows" in sys.modules
"""

PURE_PARTS = """
import pathlib, tempfile, types
sys.platform = "win32"
sys.modules["msvcrt"] = types.ModuleType("msvcrt")
from legion_shm.supervisor.machine import Machine
from legion_shm.supervisor.wake import Wake
from legion_shm.supervisor.commands import Commands
from legion_shm.supervisor.death_pipe import arm
from legion_shm.supervisor.facilities import launcher_in_words
from legion_shm.transport.channel import ClientChannel, ServerChannel, channel_kinds
arm(-1)  # there is no pipe: the job object ends the worker
print(*launcher_in_words(), sep="; ")
assert channel_kinds()["ipc"]
wake = Wake()
assert wake._pair is not None
wake.set()
server = ServerChannel("tcp", directory=pathlib.Path(tempfile.gettempdir()), max_bytes=1 << 20)
server.watch(wake.fd)
assert server.wait(5.0) == (False, [wake.fd])
wake.clear()
endpoint = server.admit([b"one"])
client = ClientChannel(endpoint, b"one", max_bytes=1 << 20)
client.send(b"hello")
while (frame := server.receive()) is None:
    server.wait(1.0)
print(frame)
server.unwatch(wake.fd)
wake.close()
client.close()
ClientChannel.terminate()
server.close()
"""


def run(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_where_posix_is_missing() -> None:
    imported = run("import torch, safetensors.torch" + WITHOUT_POSIX + EVERY_MODULE).split()
    assert "legion_shm.supervisor.host" in imported
    assert "legion_shm.supervisor.loop" in imported
    assert "legion_shm.cli" in imported


def test_the_loops_own_parts_work_where_posix_is_missing() -> None:
    printed = run(WITHOUT_POSIX + PURE_PARTS)
    assert "job object" in printed
    assert "(b'one', b'hello')" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="shows that the block above blocks")
def test_what_needs_posix_does_fail_there() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + "import legion_shm.transport.segment_memfd"],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "No module named 'fcntl'" in done.stderr
