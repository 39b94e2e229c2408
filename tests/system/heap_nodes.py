"""A node that leaves much of the C library's heap free; test_idle_heap.py runs it in a worker."""

from __future__ import annotations

from typing import Any, ClassVar

import psutil


class LeaveFree:
    FUNCTION = "run"
    CATEGORY = "test"
    RETURN_TYPES = ("INT", "INT")
    kept: ClassVar[list[bytearray]] = []

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"value": ("*",)}}

    def run(self, value: Any) -> tuple[int, int]:
        """The process, and what of it is in memory once 80 MB are free between blocks that are not."""
        blocks = [bytearray(b"x" * 50_000) for _ in range(1600)]  # each too small to be mapped alone
        self.kept.extend(blocks[::100])
        del blocks
        process = psutil.Process()
        return process.pid, process.memory_info().rss


NODE_CLASS_MAPPINGS = {"LeaveFree": LeaveFree}
