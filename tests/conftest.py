"""After every test with a supervisor: no process, descriptor, thread, shared memory or folder is left."""

from __future__ import annotations

import gc
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

from legion_shm.testing.leaks import Snapshot, assert_nothing_left, snapshot

# Folders of tests that start no supervisor; what they open is their own.
WITHOUT_SUPERVISOR = {"docs", "engine", "packaging", "supervisor", "transport", "unit"}


def has_supervisor(request: pytest.FixtureRequest) -> bool:
    return request.path.parent.name not in WITHOUT_SUPERVISOR


def supervisor_is_open() -> bool:
    api = sys.modules.get("legion_shm.supervisor.api")
    return api is not None and bool(api._open)


def check(before: Snapshot) -> None:
    if snapshot().left_since(before):
        gc.collect()  # what only a reference cycle keeps is no leak
        assert_nothing_left(before, within_s=5)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Shells start background jobs so, and children inherit it: then no program would end at Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def own_runtime_directory() -> Iterator[None]:
    """What other programs of this user leave in theirs is not looked at, nor swept."""
    folder = tempfile.mkdtemp(prefix="lr-")  # short, for sockets' paths are
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def nothing_left_by_the_module(request: pytest.FixtureRequest, own_runtime_directory: None) -> Iterator[None]:
    """For modules whose tests share a supervisor."""
    before = snapshot()
    yield
    if has_supervisor(request):
        check(before)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, nothing_left_by_the_module: None) -> Iterator[None]:
    shared = supervisor_is_open()
    before = snapshot()
    yield
    if has_supervisor(request) and not shared and not supervisor_is_open():
        check(before)
