"""After every test with a supervisor: no process, descriptor, thread, shared memory or folder is left."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from legion_shm.testing.leaks import Snapshot, assert_nothing_left, snapshot

WITHOUT_SUPERVISOR = {"engine", "packaging", "transport"}  # folders of tests; what these open is their own


def has_supervisor(request: pytest.FixtureRequest) -> bool:
    return request.path.parent.name not in WITHOUT_SUPERVISOR


def supervisor_is_open() -> bool:
    api = sys.modules.get("legion_shm.supervisor.api")
    return api is not None and bool(api._open)


def check(before: Snapshot) -> None:
    if snapshot().left_since(before):
        gc.collect()  # what only a reference cycle keeps is no leak
        assert_nothing_left(before, within_s=5)


@pytest.fixture(autouse=True, scope="module")
def nothing_left_by_the_module(request: pytest.FixtureRequest) -> Iterator[None]:
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
