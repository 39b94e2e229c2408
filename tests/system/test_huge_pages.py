"""Segments whose memory was not at hand in huge pages get them once a job has used them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from legion_shm import Supervisor
from tests import needs
from tests.system.support import run, wait_for

if sys.platform == "linux":
    from legion_shm.transport import huge_pages

    PROBLEM = huge_pages.huge_pages_problem()
else:
    PROBLEM = "not Linux"

pytestmark = [needs.linux, pytest.mark.skipif(bool(PROBLEM), reason=f"no huge pages: {PROBLEM}")]


def huge_and_all_bytes() -> tuple[int, int]:
    """Of Legion's shared memory that this process maps: what is mapped in huge pages, and all."""
    huge = total = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            inside = "memfd:legion-" in line and "rw-s" in line
        elif inside and words[0] == "Size:":
            total += int(words[1]) * 1024
        elif inside and words[0] == "ShmemPmdMapped:":
            huge += int(words[1]) * 1024
    return huge, total


def test_memory_that_is_slow_to_be_had_in_huge_pages_gets_them_after_its_first_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = torch.arange(4 << 20, dtype=torch.int32)
    with Supervisor(segments="memfd") as legion:
        run(legion, "TestPass", 1)  # the worker is there
        seconds = iter(range(0, 10_000, 5))
        with monkeypatch.context() as slow:
            slow.setattr(huge_pages, "monotonic_s", lambda: float(next(seconds)))
            shared = legion.share(tensor)
        assert legion._memory.ordinary
        huge, total = huge_and_all_bytes()
        assert huge < total
        assert torch.equal(run(legion, "TestPass", shared), tensor)
        wait_for(lambda: not legion._memory.ordinary, "the helper has begun")

        def all_huge() -> bool:
            assert torch.equal(legion.share(tensor), tensor)  # whoever maps them anew has them
            huge, total = huge_and_all_bytes()
            return total > 0 and huge >= total - (2 << 20)

        wait_for(all_huge, "the memory is in huge pages")
        assert torch.equal(shared, tensor)
        assert torch.equal(run(legion, "TestPass", shared), tensor)
