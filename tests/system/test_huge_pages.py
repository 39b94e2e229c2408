"""Segments whose memory was not at hand in huge pages get them once a job has used them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from legion_shm import Supervisor
from legion_shm.transport.segment import Segment, attach_segment
from tests import needs
from tests.system.support import run, wait_for

if sys.platform == "linux":
    from legion_shm.transport import huge_pages, segment_memfd

    PROBLEM = huge_pages.huge_pages_problem()
else:
    PROBLEM = "not Linux"

pytestmark = [needs.linux, pytest.mark.skipif(bool(PROBLEM), reason=f"no huge pages: {PROBLEM}")]


def huge_bytes(segment: Segment) -> int:
    """How much of it a new reader maps in huge pages."""
    assert isinstance(segment.descriptor, int)
    reader = attach_segment("memfd", os.dup(segment.descriptor), segment.nbytes)
    address = reader.map_block(0, segment.nbytes).address
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(part, 16) for part in words[0].split("-"))
            inside = start <= address < end
        elif inside and words[0] == "ShmemPmdMapped:":
            reader.close()
            return int(words[1]) * 1024
    raise AssertionError("it is not mapped")


def test_memory_that_is_slow_to_be_had_in_huge_pages_gets_them_after_its_first_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huge_pages, "_LATER", huge_pages._LATER._replace(grace_s=60.0))  # on a busy machine
    tried: list[int] = []

    def condense(fd: int, start: int, end: int) -> int:
        tried.append(huge_pages.condense(fd, start, end))
        return tried[-1]

    monkeypatch.setattr(segment_memfd, "condense", condense)
    tensor = torch.arange(4 << 20, dtype=torch.int32)
    with Supervisor(segments="memfd") as legion:
        run(legion, "TestPass", 1)  # the worker is there
        seconds = iter(range(0, 10_000, 5))
        with monkeypatch.context() as slow:
            slow.setattr(huge_pages, "monotonic_s", lambda: float(next(seconds)))
            shared = legion.share(tensor)
        (segment,) = legion._memory._segments[legion._memory.arena_id].values()
        assert segment.nbytes == 16 << 20
        assert huge_bytes(segment) <= 2 << 20

        assert legion._memory.ordinary
        assert not tried
        assert torch.equal(run(legion, "TestPass", shared), tensor)
        wait_for(lambda: tried, "it has been tried")
        if tried[0] == segment.nbytes:  # the machine had enough of them
            assert huge_bytes(segment) == segment.nbytes
        assert torch.equal(shared, tensor)
        assert torch.equal(run(legion, "TestPass", shared), tensor)
