"""The preloaded allocator shim (native/born.c) as Python sees it: blocks that tensors were born in.

Owns the calls into the shim. It keeps no handles and no leases. A process has the shim if it was started with
it (LD_PRELOAD); otherwise `Shim.here` is None, and tensors are copied into the arena when they are sent.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass

from legion_shm.transport.segment import Segment

__all__ = ["SHIM_VERSION", "BornBlock", "BornNumbers", "Shim"]

SHIM_VERSION = 3

_ORPHANS_AT_ONCE = 256


class _Block(ctypes.Structure):
    _fields_ = (
        ("segment", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("wanted", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("held", ctypes.c_uint32),
        ("isolated", ctypes.c_uint32),
    )


class _Numbers(ctypes.Structure):
    _fields_ = (
        ("total_bytes", ctypes.c_uint64),
        ("live_bytes", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("missed_bytes", ctypes.c_uint64),
        ("missed_largest", ctypes.c_uint64),
    )


@dataclass(frozen=True, slots=True)
class BornBlock:
    """A live block: ``nbytes`` from ``start``, which is at ``offset`` of its segment."""

    segment: int
    offset: int
    nbytes: int
    start: int
    held: bool
    isolated: bool


@dataclass(frozen=True, slots=True)
class BornNumbers:
    """Bytes. ``missed_*``: what was asked for and did not fit since the last time these were read."""

    total_bytes: int
    live_bytes: int
    blocks: int
    missed_bytes: int
    missed_largest: int


class Shim:
    """The shim of this process. Its functions are thread-safe."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("find", "hold", "release", "isolate", "add", "remove", "reserve", "shut"):
            getattr(library, f"legion_born_{name}").restype = ctypes.c_int
        library.legion_born_find.argtypes = [ctypes.c_uint64, ctypes.POINTER(_Block)]
        library.legion_born_orphans.restype = ctypes.c_uint64
        library.legion_born_orphans.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_uint64]
        for name in ("hold", "release", "isolate", "remove", "reserve", "serve", "shut"):
            getattr(library, f"legion_born_{name}").argtypes = [ctypes.c_uint64]
        library.legion_born_serve.restype = None
        library.legion_born_add.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64]
        library.legion_born_numbers.restype = None
        library.legion_born_numbers.argtypes = [ctypes.POINTER(_Numbers)]

    @classmethod
    def here(cls) -> Shim | None:
        """The shim that this process was started with, or None."""
        try:
            library = ctypes.CDLL(None)
            version = library.legion_born_version
        except (AttributeError, OSError, TypeError):
            return None
        return cls(library) if version() == SHIM_VERSION else None

    def reserve(self, nbytes: int) -> bool:
        """Reserve addresses for all regions to come. False where there are none, or for a second time."""
        return int(self._library.legion_born_reserve(nbytes)) == 0

    def serve(self, from_bytes: int | None) -> None:
        """Serve allocations from this size on; none for None."""
        self._library.legion_born_serve((1 << 64) - 1 if from_bytes is None else from_bytes)

    def add(self, segment_id: int, segment: Segment) -> bool:
        """Let tensors be born in a segment of the own arena. False where it can't be mapped."""
        descriptor = segment.descriptor
        if not isinstance(descriptor, int):
            return False
        return int(self._library.legion_born_add(descriptor, segment.nbytes, segment_id)) == 0

    def remove(self, segment_id: int) -> bool:
        """Unmap a region. False, and nothing done, while a block in it is in use."""
        return int(self._library.legion_born_remove(segment_id)) == 0

    def shut(self, segment_id: int) -> None:
        """Let nothing more be born in a region; what lives there lives on."""
        self._library.legion_born_shut(segment_id)

    def find(self, address: int) -> BornBlock | None:
        """The live block that holds an address."""
        out = _Block()
        if self._library.legion_born_find(address, ctypes.byref(out)):
            return None
        return BornBlock(out.segment, out.offset, out.wanted, out.start, bool(out.held), bool(out.isolated))

    def hold(self, start: int) -> bool:
        """Keep a live block out of use until `release`, also when it is freed meanwhile."""
        return int(self._library.legion_born_hold(start)) == 0

    def release(self, start: int) -> bool:
        return int(self._library.legion_born_release(start)) == 0

    def orphans(self) -> list[int]:
        """The starts of blocks that were freed by their owner while they were held. Each is told once."""
        found: list[int] = []
        starts = (ctypes.c_uint64 * _ORPHANS_AT_ONCE)()
        while count := int(self._library.legion_born_orphans(starts, _ORPHANS_AT_ONCE)):
            found.extend(starts[:count])
        return found

    def isolate(self, start: int) -> None:
        """Make a block copy-on-write for this process, if it has not been freed. Raises OSError."""
        code = int(self._library.legion_born_isolate(start))
        if code and code != errno.ENOENT:
            raise OSError(code, f"a block could not be made copy-on-write: {os.strerror(code)}")

    def numbers(self) -> BornNumbers:
        out = _Numbers()
        self._library.legion_born_numbers(ctypes.byref(out))
        return BornNumbers(out.total_bytes, out.live_bytes, out.blocks, out.missed_bytes, out.missed_largest)
