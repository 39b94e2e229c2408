"""The calls into the kernel by which files are mapped, which Python's mmap module does not offer. Linux only.

Owns the bindings and the choice of addresses: a mapping as large as a huge page lies so that the file's huge
pages can be mapped whole. It keeps nothing: who maps, unmaps.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from legion_shm.transport.handles import round_up

__all__ = [
    "HUGE_PAGE_BYTES",
    "MADV_COLLAPSE",
    "MADV_DONTNEED",
    "MADV_POPULATE_READ",
    "MADV_POPULATE_WRITE",
    "MAP_NORESERVE",
    "advise",
    "map_file",
    "map_over",
    "unmap",
]

HUGE_PAGE_BYTES = 2 * 1024 * 1024
"""What one entry of a page table's second level maps where pages have 4 KiB (x86-64, AArch64 as usual)."""

# <linux/mman.h>; the mmap module of Python 3.10 to 3.12 lacks these.
MAP_NORESERVE = 0x4000
MADV_DONTNEED = 4
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_NO_ACCESS = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_file(nbytes: int, flags: int, fd: int, offset: int = 0) -> int:
    """Map that part of a file for reading and writing: the address. Raises OSError."""
    if nbytes < HUGE_PAGE_BYTES:
        return _mmap(None, nbytes, _READ_WRITE, flags, fd, offset)
    nbytes = round_up(nbytes)
    room = nbytes + HUGE_PAGE_BYTES
    start = _mmap(None, room, _NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    address = start + (offset - start) % HUGE_PAGE_BYTES
    try:
        map_over(address, nbytes, flags, fd, offset)
    except BaseException:
        unmap(start, room)
        raise
    if address > start:
        unmap(start, address - start)
    unmap(address + nbytes, start + room - address - nbytes)
    return address


def map_over(address: int, nbytes: int, flags: int, fd: int, offset: int) -> None:
    """As `map_file`, in place of what is mapped at an address now."""
    _mmap(address, nbytes, _READ_WRITE, flags | _MAP_FIXED, fd, offset)


def unmap(address: int, nbytes: int) -> None:
    _libc.munmap(address, nbytes)


def advise(address: int, nbytes: int, advice: int) -> int:
    """``madvise``: 0, or the errno."""
    return 0 if _libc.madvise(address, nbytes, advice) == 0 else ctypes.get_errno()


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
    result: int | None = _libc.mmap(address, nbytes, protection, flags, fd, offset)
    if result is None or result == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {nbytes} bytes: {os.strerror(code)}")
    return result
