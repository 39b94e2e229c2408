"""torch's library beside Python: what is loaded when, and when it is left alone."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from legion_shm.supervisor import torch_library
from tests.system.support import REPO, run_script

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="zygotes are Linux's alone")

LOAD = """
import os, sys, threading
from legion_shm.supervisor.torch_library import torch_library_loading

def mapped():
    return "libtorch_cpu.so" in open("/proc/self/maps").read()

with torch_library_loading():
    pass
"""


def test_it_is_there_at_the_end_without_torch_and_torch_works_with_it() -> None:
    check = """
assert mapped() and "torch" not in sys.modules
assert threading.active_count() == 1
import torch
assert float((torch.ones(300, 300) @ torch.ones(300, 300)).sum()) == 300.0**3
assert sum("libtorch_cpu.so" in line and "r-xp" in line for line in open("/proc/self/maps")) == 1
"""
    done = run_script("-c", LOAD + check, cwd=REPO)
    assert done.returncode == 0, done.stderr


def test_it_is_left_to_torch_where_the_environment_asks_for_another_way() -> None:
    begin = "import os\nos.environ['TORCH_USE_RTLD_GLOBAL'] = '1'\n"
    done = run_script("-c", begin + LOAD + "assert not mapped()\n", cwd=REPO)
    assert done.returncode == 0, done.stderr


def test_torch_that_is_loaded_or_not_installed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert torch_library._folder() is None
    monkeypatch.delitem(sys.modules, "torch")
    assert torch_library._folder() is not None
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert torch_library._folder() is None


def test_a_library_that_cannot_be_loaded_is_torchs_to_complain_about(tmp_path: object) -> None:
    torch_library._load(str(tmp_path))
