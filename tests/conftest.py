"""After every test: no child process, descriptor, thread, shared memory or runtime folder is left behind."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from legion_shm.testing.leaks import Snapshot, assert_nothing_left, snapshot


def supervisors_open() -> bool:
    api = sys.modules.get("legion_shm.supervisor.api")
    return api is not None and bool(api._open)


def check(before: Snapshot) -> None:
    if snapshot().left_since(before):
        gc.collect()  # what only a reference cycle keeps is no leak
        assert_nothing_left(before, within_s=5)


@pytest.fixture(autouse=True, scope="module")
def nothing_left_by_the_module() -> Iterator[None]:
    """For modules whose tests share a supervisor."""
    before = snapshot()
    yield
    check(before)


@pytest.fixture(autouse=True)
def nothing_left(nothing_left_by_the_module: None) -> Iterator[None]:
    shared = supervisors_open()
    before = snapshot()
    yield
    if not shared and not supervisors_open():
        check(before)
