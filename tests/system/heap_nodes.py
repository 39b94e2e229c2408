"""A node that leaves much of the C library's heap free; test_idle_heap.py runs it in a worker."""

from __future__ import annotations

from typing import Any, ClassVar

import psutil

from legion_shm.supervisor.freeing import IdleHeap


class LeaveFree:
    FUNCTION = "run"
    CATEGORY = "test"
    RETURN_TYPES = ("INT", "INT")
    kept: ClassVar[list[bytearray]] = []

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"value": ("*",)}}

    def run(self, value: Any) -> tuple[int, int]:
        """The process, and what of it is in memory once 80 MB are free between blocks that are not.

        To be ``"long"`` makes this worker take any job for one that took long, else none.
        """
        IdleHeap.LONG_JOB_S = 0.0 if value == "long" else float("inf")
        blocks = [bytearray(b"x" * 50_000) for _ in range(1600)]  # each too small to be mapped alone
        self.kept.extend(blocks[::100])
        del blocks
        process = psutil.Process()
        return process.pid, process.memory_info().rss


NODE_CLASS_MAPPINGS = {"LeaveFree": LeaveFree}
