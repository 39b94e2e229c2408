"""Which pages of a private mapping were written by this process, as the kernel's page tables say.

Owns the reading of `/proc/self/pagemap` (Documentation/admin-guide/mm/pagemap.rst). It never guesses:
where the file can't be read (a non-dumpable process, another system) every page counts as written.
"""

from __future__ import annotations

import mmap
import os
import sys

__all__ = ["may_be_written", "pagemap_readable"]

_ENTRY_BYTES = 8
# One 512 KiB read covers 256 MiB of memory; a larger span is scanned in steps and left at the first find.
_ENTRIES_PER_READ = 64 * 1024

_PRESENT, _SWAPPED, _FILE_BACKED = 0x80, 0x40, 0x20  # bits 63, 62 and 61, in the entry's top byte
_CLEAN = bytes(top for top in range(256) if not top & (_PRESENT | _SWAPPED) or top & _FILE_BACKED)
_TOP_BYTE = 7 if sys.byteorder == "little" else 0


def may_be_written(address: int, nbytes: int) -> bool:
    """Whether any page of that span of a private file mapping is a copy of our own; True if unknown.

    Scanning 25 MB takes 0.1 ms.
    """
    if nbytes <= 0:
        return False
    first = address // mmap.PAGESIZE
    end = (address + nbytes - 1) // mmap.PAGESIZE + 1
    try:
        # Opened each time (1 us): the open file shows the memory of who opened it, also after a fork.
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return True
    try:
        while first < end:
            count = min(end - first, _ENTRIES_PER_READ)
            entries = os.pread(fd, count * _ENTRY_BYTES, first * _ENTRY_BYTES)
            if len(entries) != count * _ENTRY_BYTES:
                return True
            if entries[_TOP_BYTE::_ENTRY_BYTES].translate(None, _CLEAN):
                return True
            first += count
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def pagemap_readable() -> bool:
    """Whether writes can be detected here at all."""
    try:
        os.close(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
    except (OSError, AttributeError):
        return False
    return True
