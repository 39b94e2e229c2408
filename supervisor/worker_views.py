"""Copy-on-write views within a worker: the same pages once more, for a node that may write into them.

Owns these views and their end. They are no deliveries and have no leases: each keeps the memory alive that it
is a view of, and whoever asks for one sees to it that this is not written meanwhile. The main thread alone
calls it.

    memory of a received or a born tensor ── take ──▶ array ──▶ tensor of a node ── collected ──▶ tidy
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from legion_shm.errors import InvalidHandle
from legion_shm.transport.attachments import array_over
from legion_shm.transport.handles import BLOCK_ALIGN
from legion_shm.transport.segment import BlockMapping, Segment

__all__ = ["NodeViews"]

_ENDED_MAX_BYTES = 64 << 20
"""What has ended is looked through between jobs (25 MB: 0.1 to 0.4 ms), unless it keeps that much memory."""

Locate = Callable[[int, int], "tuple[Segment, int] | None"]
"""The segment that an address and so many bytes from it on lie in, and where; None for other memory."""


class NodeViews:
    """``locates``: where memory that can be viewed is found, asked in turn."""

    def __init__(self, *locates: Locate) -> None:
        self._locates = locates
        self._ended: deque[tuple[BlockMapping, object]] = deque()

    def take(self, address: int, nbytes: int, keep: object) -> Any:
        """A ctypes array over pages of its own with these bytes; None where they are in no segment."""
        for locate in self._locates:
            found = locate(address, nbytes)
            if found is not None:
                break
        else:
            return None
        if sum(mapping.nbytes for mapping, _ in tuple(self._ended)) >= _ENDED_MAX_BYTES:
            self.tidy()
        segment, offset = found
        if segment.kind != "memfd":
            return None  # nothing is gained where mapping may be copying
        into = offset % BLOCK_ALIGN
        try:
            mapping = segment.map_block(offset - into, into + nbytes)
        except (OSError, InvalidHandle):  # out of address ranges, or closed
            return None
        array = array_over(mapping.address + into, nbytes)
        # A finalizer may run in the middle of anything: it only appends.
        weakref.finalize(array, self._ended.append, (mapping, keep)).atexit = False
        return array

    def tidy(self) -> None:
        """Make the pages of ended views ready for the next, and let go of what they were views of."""
        while self._ended:
            try:
                mapping, keep = self._ended.popleft()
            except IndexError:
                return
            mapping.release()
            del keep
