"""Shared memory in huge pages, where the kernel makes them of a memfd when asked to. Linux only.

Owns the filling of new files with them, and the proof that this kernel tells written pages from others when
they are huge. One entry of the page tables then stands for 512 pages: to map a block, to make it
copy-on-write and to look through it for writes takes a hundredth of the time. Not one of them is needed: what
could not be had is filled with ordinary pages, by whoever made the file.

    new file ── one page in each 2 MiB ── MADV_COLLAPSE ──▶ huge pages, cleared once and mapped whole
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os

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

__all__ = ["fill_with_huge_pages", "huge_pages_problem"]

_STEP_BYTES = 8 * HUGE_PAGE_BYTES
_GRACE_S = 0.02
_SLOWEST_S_PER_BYTE = 1.5e-9
"""1.5 ms per MiB; 0.1 are usual, 0.25 by ordinary pages. Memory in pieces has to be put together first."""

_NOT_THIS_ONE = (errno.EAGAIN, errno.EBUSY)


def fill_with_huge_pages(fd: int, nbytes: int) -> int:
    """Allocate a new memfd's memory in huge pages, as far as there are any: so many bytes were tried.

    What it leaves has no memory, or ordinary pages. Raises OSError where memory is short.
    """
    whole = nbytes - nbytes % HUGE_PAGE_BYTES
    if not whole or huge_pages_problem():
        return 0
    return _fill(fd, whole)[0]


@functools.cache
def huge_pages_problem() -> str:
    """Why shared memory here is in ordinary pages; empty where huge ones can be had. Takes 1 ms, once."""
    if mmap.PAGESIZE != 4096:
        return f"pages of {mmap.PAGESIZE} bytes are as they are"
    try:
        fd = os.memfd_create("legion-probe", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, HUGE_PAGE_BYTES)
            return _problem_of(fd)
        finally:
            os.close(fd)
    except OSError as error:
        return str(error)


def _problem_of(fd: int) -> str:
    _, code = _fill(fd, HUGE_PAGE_BYTES)
    if code:
        return f"the kernel makes none of a memfd (MADV_COLLAPSE: {os.strerror(code)})"
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


def _fill(fd: int, nbytes: int) -> tuple[int, int]:
    """How far it came, and the last errno."""
    started_s = monotonic_s()
    code = 0
    address = map_file(nbytes, mmap.MAP_SHARED, fd)
    try:
        for start in range(0, nbytes, _STEP_BYTES):
            end = min(start + _STEP_BYTES, nbytes)
            for page in range(start, end, HUGE_PAGE_BYTES):
                os.posix_fallocate(fd, page, mmap.PAGESIZE)  # of nothing at all the kernel makes no huge page
            code = advise(address + start, end - start, MADV_COLLAPSE)
            took_s = monotonic_s() - started_s
            if (code and code not in _NOT_THIS_ONE) or took_s > _GRACE_S + end * _SLOWEST_S_PER_BYTE:
                return end, code
        return nbytes, code
    finally:
        unmap(address, nbytes)
