"""One region of shared memory as this process holds it: the interface, and which kinds there are.

Owns the choice of the kind and the check that the machine has the memory. The kinds themselves are
`segment_memfd` (Linux) and `segment_portable` (everywhere else). Both pass one
conformance suite.

    owner:     create_segment ─▶ shared_address() ── writes ──▶ the pages
    receiver:  attach_segment ─▶ map_block()      ◀── reads ──  the same pages, copy-on-write
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import Literal

from legion_shm import faults
from legion_shm.errors import ArenaFull, InvalidHandle
from legion_shm.transport.handles import BLOCK_ALIGN

__all__ = [
    "BlockMapping",
    "Segment",
    "SegmentKind",
    "attach_segment",
    "available_memory_bytes",
    "create_segment",
    "prepare_segments",
    "supported_kinds",
]

SegmentKind = Literal["memfd", "portable"]

_SHORTAGE = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)


class BlockMapping(ABC):
    """A copy-on-write view of the whole pages of one block, which nobody else in this process views.

    The memory stays mapped while this object lives, whatever becomes of its segment.
    """

    address: int
    nbytes: int

    @abstractmethod
    def dirty(self, start: int, nbytes: int) -> bool:
        """Whether any page of that span was written here; True where that can't be known."""

    @abstractmethod
    def release(self) -> None:
        """Forget what was written here. Nothing may read the view any more. Idempotent."""


class Segment(ABC):
    """One region of shared memory, attached in this process. Thread-safe.

    One in a GPU's memory (`gpu_segment`) is none of these kinds, and only its allocation is as theirs.
    """

    kind: SegmentKind
    nbytes: int

    @property
    @abstractmethod
    def descriptor(self) -> int | str:
        """What another process attaches it by: the fd (owned by this object) or the name."""

    @abstractmethod
    def shared_address(self) -> int:
        """The address of the owner's shared mapping, for reading and writing; made on first use."""

    @abstractmethod
    def shared_memory(self) -> object:
        """What keeps that mapping alive beyond `close`, for as long as it is referred to."""

    @abstractmethod
    def prefault(self, offset: int, nbytes: int) -> None:
        """Owner: map these pages for writing now, where that is cheaper than fault by fault."""

    @abstractmethod
    def map_block(self, offset: int, nbytes: int) -> BlockMapping:
        """A copy-on-write view; `InvalidHandle` where the span is not in the segment, or it is closed."""

    @abstractmethod
    def isolate(self, offset: int, nbytes: int) -> bool:
        """Owner: make this span of the shared mapping copy-on-write, in place.

        False where this kind (or the system, now) can't; the mapping is then shared as before.
        """

    @abstractmethod
    def rejoin(self, offset: int, nbytes: int) -> None:
        """Owner: undo `isolate`; what was written since is dropped."""

    @property
    def cold(self) -> bool:
        """Owner: whether `rejoin` left pages that have to be mapped again before they are used."""
        return False

    def warm(self) -> None:  # noqa: B027 - most kinds have nothing to do
        """Owner: map them now, from any thread; who reserves them meanwhile does it otherwise."""

    @property
    def ordinary(self) -> bool:
        """Maker: whether it has ordinary pages that might be huge ones."""
        return False

    def condense(self) -> bool:
        """Maker: make huge pages of some of them (0.2 s at most), while everybody goes on using them.

        False where any was refused: it is in use for the moment, or the machine has no huge pages now.
        """
        return True

    @abstractmethod
    def isolated_clean(self, offset: int, nbytes: int) -> bool:
        """Owner: whether the shared mapping still shows what others see and can be isolated."""

    @abstractmethod
    def close(self) -> None:
        """Close the descriptor. Mappings live on until their last view is gone. Idempotent."""


def create_segment(kind: SegmentKind, nbytes: int, *, name_prefix: str) -> Segment:
    """A new segment whose pages are all allocated, so that a shortage is this call's `ArenaFull`.

    ``nbytes``: a multiple of `BLOCK_ALIGN`. ``name_prefix`` starts the name, where the kind has one.
    """
    if nbytes <= 0 or nbytes % BLOCK_ALIGN:
        raise ValueError(f"a segment's size is a positive multiple of {BLOCK_ALIGN}, not {nbytes}")
    available = available_memory_bytes()
    if available is not None and nbytes > available:
        # Allocating it all the same would not fail: the kernel's OOM killer would end some process.
        raise ArenaFull(f"a segment of {nbytes} bytes: the machine has {available} bytes of memory left")
    try:
        if faults.hit is not None:
            faults.hit("segment.create")
        if kind == "memfd":
            from legion_shm.transport.segment_memfd import MemfdSegment

            return MemfdSegment.create(nbytes, name_prefix=name_prefix)
        from legion_shm.transport.segment_portable import PortableSegment

        return PortableSegment.create(nbytes, name_prefix=name_prefix)
    except OSError as error:
        if error.errno in _SHORTAGE:
            raise ArenaFull(f"no {nbytes} bytes of shared memory are left: {error.strerror}") from error
        raise


def attach_segment(kind: SegmentKind, descriptor: int | str, nbytes: int) -> Segment:
    """A segment that another process described. A descriptor that is not what it claims: `InvalidHandle`.

    A file descriptor belongs to this call from its start on, and is closed also where the call fails.
    """
    if kind == "memfd":
        from legion_shm.transport.segment_memfd import MemfdSegment

        if not isinstance(descriptor, int):
            raise InvalidHandle(f"a memfd segment comes as a file descriptor, not as {descriptor!r}")
        return MemfdSegment.attach(descriptor, nbytes)
    from legion_shm.transport.segment_portable import PortableSegment

    if not isinstance(descriptor, str):
        raise InvalidHandle(f"a portable segment comes as a name, not as {descriptor!r}")
    return PortableSegment.attach(descriptor, nbytes)


def prepare_segments(kind: SegmentKind) -> None:
    """Learn now what the first segment would learn about this machine (1 ms)."""
    if kind == "memfd":
        from legion_shm.transport.huge_pages import huge_pages_problem

        huge_pages_problem()


def supported_kinds() -> dict[str, str]:
    """Kind -> the empty string where it works here, else the reason why it does not."""
    reasons: dict[str, str] = {}
    for kind in ("memfd", "portable"):
        try:
            create_segment(kind, BLOCK_ALIGN, name_prefix="legion-probe-").close()
            reasons[kind] = ""
        except (OSError, AttributeError, ImportError, ArenaFull) as error:
            reasons[kind] = str(error) or type(error).__name__
    return reasons


def available_memory_bytes() -> int | None:
    """Memory that can still be had without pushing anyone out: free plus swap, within the cgroup.

    None where the system does not say (anything but Linux).
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = sum(int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree")) * 1024
    except (OSError, KeyError, ValueError):
        return None
    headroom = _cgroup_headroom_bytes()
    return free if headroom is None else min(free, headroom)


def _cgroup_headroom_bytes() -> int | None:
    """What this process's own version 2 cgroup still allows; its file cache counts as free."""
    try:
        with open("/proc/self/cgroup", encoding="ascii") as file:
            path = next(line.rstrip("\n")[3:] for line in file if line.startswith("0::"))
        root = f"/sys/fs/cgroup{path.rstrip('/')}"
        with open(f"{root}/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        if limit == "max":
            return None
        with open(f"{root}/memory.current", encoding="ascii") as file:
            used = int(file.read())
        with open(f"{root}/memory.stat", encoding="ascii") as file:
            stat = dict(line.split() for line in file)
        cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        return max(0, int(limit) - used + cache)
    except (OSError, StopIteration, ValueError):
        return None
