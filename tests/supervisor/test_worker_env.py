from __future__ import annotations

import platform
from pathlib import Path

import pytest

from legion_shm.supervisor import spawn, worker_env
from legion_shm.supervisor.spawn import worker_environment
from legion_shm.supervisor.worker_env import with_tunables

THRESHOLD = "glibc.cpu.x86_non_temporal_threshold"


@pytest.fixture(autouse=True)
def glibc_on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(worker_env, "runs_on_glibc", lambda: True)


def test_the_threshold_joins_the_tunables_that_are_there() -> None:
    assert with_tunables({"A": "1"}) == {"A": "1", "GLIBC_TUNABLES": f"{THRESHOLD}=0x200000"}
    other = "glibc.malloc.check=1"
    assert with_tunables({"GLIBC_TUNABLES": other})["GLIBC_TUNABLES"] == f"{other}:{THRESHOLD}=0x200000"


def test_a_threshold_of_the_users_stays() -> None:
    env = {"GLIBC_TUNABLES": f"{THRESHOLD}=0x400000:glibc.malloc.check=1"}
    assert with_tunables(env) == env
    once = with_tunables({})
    assert with_tunables(once) == once


@pytest.mark.parametrize(("machine", "libc"), [("aarch64", True), ("x86_64", False)])
def test_elsewhere_nothing_is_added(monkeypatch: pytest.MonkeyPatch, machine: str, libc: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(worker_env, "runs_on_glibc", lambda: libc)
    assert with_tunables({"A": "1"}) == {"A": "1"}


@pytest.mark.parametrize("library", [Path("/some/born.so"), None])
def test_workers_get_it_only_where_there_is_no_native_code_to_copy(
    monkeypatch: pytest.MonkeyPatch, library: Path | None
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(spawn, "library_path", lambda: (library, ""))
    assert (THRESHOLD in worker_environment({}).get("GLIBC_TUNABLES", "")) == (library is None)
