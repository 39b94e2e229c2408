"""Shared memory in huge pages, where the kernel makes them of a memfd when asked to. Linux only.

Owns the filling of new files with them, and the proof that this kernel tells written pages from others when
they are huge. One entry of the page tables then stands for 512 pages: to map a block, to make it
copy-on-write and to look through it for writes takes a hundredth of the time. Not one of them is needed: what
could not be had is filled with ordinary pages, by whoever made the file.

    new file ── one page in each 2 MiB ── MADV_COLLAPSE ──▶ huge pages, cleared once and mapped whole
    ordinary pages, in use ── MADV_COLLAPSE ──▶ huge pages with the same bytes, for whoever maps them next

Where huge pages take longer than ordinary ones (the machine's memory is in pieces, or was given back to the
machine around it), nobody waits for them: what is left is condensed once it has been used.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import NamedTuple

from legion_shm.clock import monotonic_s
from legion_shm.transport.dirty import may_be_written
from legion_shm.transport.mappings import (
    HUGE_PAGE_BYTES,
    MADV_COLLAPSE,
    MADV_POPULATE_READ,
    MAP_NORESERVE,
    advise,
    map_file,
    unmap,
)

__all__ = ["condense", "fill_with_huge_pages", "huge_pages_problem"]

_NOT_THIS_ONE = (errno.EAGAIN, errno.EBUSY)


class _Patience(NamedTuple):
    """``step_bytes`` at a time, and no more once they take ``grace_s`` and ``s_per_byte`` longer."""

    step_bytes: int
    grace_s: float
    s_per_byte: float


_MAKING = _Patience(HUGE_PAGE_BYTES, 0.001, 0.4e-9)  # usual: 0.1 ms per MiB; ordinary pages: 0.25
_LATER = _Patience(8 * HUGE_PAGE_BYTES, 0.05, 2e-9)  # cold memory: 0.9 ms per MiB


def fill_with_huge_pages(fd: int, nbytes: int) -> tuple[int, int]:
    """Allocate a new memfd's memory in huge pages from its start on, while that is quick.

    The answer is what may be condensed later, from where to where: it has no memory yet, or ordinary pages.
    Raises OSError where memory is short.
    """
    whole = nbytes - nbytes % HUGE_PAGE_BYTES
    if not whole or huge_pages_problem():
        return whole, whole
    return _fill(fd, 0, whole, _MAKING)[0], whole


def condense(fd: int, start: int, end: int) -> int:
    """Put that part of a memfd's memory, in use or not, into huge pages: from where on to try it again.

    Both ends are those of huge pages. Takes 0.3 to 1 ms per MiB, from any thread.
    """
    return _fill(fd, start, end, _LATER)[0]


def huge_pages_problem() -> str:
    """Why shared memory here is in ordinary pages; empty where huge ones can be had. Takes 1 ms, once."""
    if _verdict:
        return _verdict[0]
    problem, lasting = _examine()
    if lasting:
        _verdict.append(problem)
    return problem


_verdict: list[str] = []


def _examine() -> tuple[str, bool]:
    """The problem, and whether it is one of this kernel and not of this moment."""
    if mmap.PAGESIZE != 4096:
        return f"pages of {mmap.PAGESIZE} bytes are as they are", True
    try:
        fd = os.memfd_create("legion-probe", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, HUGE_PAGE_BYTES)
            code = _fill(fd, 0, HUGE_PAGE_BYTES, _LATER)[1]
            if code:
                lasting = code not in (*_NOT_THIS_ONE, errno.ENOMEM)
                return f"the kernel makes none of a memfd (MADV_COLLAPSE: {os.strerror(code)})", lasting
            return _problem_of(fd), True
        finally:
            os.close(fd)
    except OSError as error:
        return str(error), False


def _problem_of(fd: int) -> str:
    private = map_file(HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | MAP_NORESERVE, fd)
    try:
        advise(private, HUGE_PAGE_BYTES, MADV_POPULATE_READ)
        if may_be_written(private, HUGE_PAGE_BYTES):
            # Before Linux 6.11: all would count as written, and be copied.
            return "the kernel does not tell which of them were written (/proc/self/pagemap)"
        ctypes.memset(private, 1, 1)
        if not may_be_written(private, HUGE_PAGE_BYTES):
            return "the kernel hides which of them were written (/proc/self/pagemap)"
    finally:
        unmap(private, HUGE_PAGE_BYTES)
    return ""


def _fill(fd: int, start: int, end: int, patience: _Patience) -> tuple[int, int]:
    """From where on there are others left, and the last errno."""
    started_s = monotonic_s()
    code = 0
    left: int | None = None
    address = map_file(end - start, mmap.MAP_SHARED, fd, start)
    try:
        for low in range(start, end, patience.step_bytes):
            high = min(low + patience.step_bytes, end)
            for page in range(low, high, HUGE_PAGE_BYTES):
                os.posix_fallocate(fd, page, mmap.PAGESIZE)  # of nothing at all the kernel makes no huge page
            code = advise(address + low - start, high - low, MADV_COLLAPSE)
            if code and left is None:
                left = low
            if code and code not in _NOT_THIS_ONE:
                break
            if monotonic_s() - started_s > patience.grace_s + (high - start) * patience.s_per_byte:
                left = high if left is None else left
                break
        return (end if left is None else left), code
    finally:
        unmap(address, end - start)
