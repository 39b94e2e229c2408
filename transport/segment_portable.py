"""Shared memory with a name, for systems without memfd: what `multiprocessing.shared_memory` is built on.

Owns the name (its creator unlinks it), the whole-segment mapping and the per-block private mappings.
It never registers with multiprocessing's resource tracker: before Python 3.13 the exit of any process
that merely attached would unlink a live segment. What a killed supervisor leaves behind is removed by its
`sweeper` (where names can be listed: Linux; on Windows a name ends with its last handle).

It has been run on Linux, and with a Python for Windows under Wine. It is written for macOS too and has not
been run there: nothing is imported that those lack, a system that refuses copy-on-write mappings of shared
memory (macOS does) gets a private copy of the block, and Windows gets named file mappings. Each live view
holds one file descriptor before Python 3.13.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import os
import re
import secrets
import sys
from threading import Lock
from typing import Any

from legion_shm.errors import InvalidHandle
from legion_shm.transport.dirty import may_be_written
from legion_shm.transport.handles import BLOCK_ALIGN, round_up
from legion_shm.transport.segment import BlockMapping, Segment, SegmentKind

__all__ = ["PortableSegment", "unlink_name"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,30}")
"""With its leading slash a name fits macOS's 31 characters; no separator can lead out of the name space."""


class _Memory:
    """An `mmap.mmap` with its address; unmapped when the last reference to this object goes."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self._export: Any = ctypes.c_char.from_buffer(mapped)
        self.address: int = ctypes.addressof(self._export)


class _PrivateMapping(BlockMapping):
    def __init__(self, memory: _Memory, nbytes: int, *, copied: bool) -> None:
        self._memory: _Memory | None = memory
        self._copied = copied
        self.address = memory.address
        self.nbytes = nbytes

    def dirty(self, start: int, nbytes: int) -> bool:
        return self._copied or may_be_written(self.address + start, nbytes)

    def release(self) -> None:
        self._memory = None


class PortableSegment(Segment):
    """A named region. Its creator unlinks the name in `close`; views stay valid after that."""

    kind: SegmentKind = "portable"

    def __init__(self, name: str, nbytes: int, fd: int, shared: mmap.mmap | None, *, creator: bool) -> None:
        self.nbytes = nbytes
        self._name = name
        self._fd = fd
        self._lock = Lock()
        self._shared = None if shared is None else _Memory(shared)
        self._creator_pid = os.getpid() if creator else None
        self._closed = False

    @classmethod
    def create(cls, nbytes: int, *, name_prefix: str) -> PortableSegment:
        name = f"{name_prefix}{secrets.token_hex(4)}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name_prefix!r} does not start a portable segment's name (at most 22 letters)")
        if sys.platform == "win32":
            return cls(name, nbytes, -1, _windows_create(name, nbytes), creator=True)
        fd = _posix().shm_open(f"/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600)
        try:
            os.ftruncate(fd, nbytes)
            if hasattr(os, "posix_fallocate"):
                # Without it, a full tmpfs would show as SIGBUS at the first touch of a page.
                os.posix_fallocate(fd, 0, nbytes)
        except BaseException:
            os.close(fd)
            unlink_name(name)
            raise
        return cls(name, nbytes, fd, None, creator=True)

    @classmethod
    def attach(cls, name: str, nbytes: int) -> PortableSegment:
        if not _NAME.fullmatch(name):
            raise InvalidHandle(f"{name!r} is not a portable segment's name")
        if nbytes <= 0 or nbytes % BLOCK_ALIGN:
            raise InvalidHandle(f"segment {name} cannot have {nbytes} bytes: not whole blocks")
        if sys.platform == "win32":
            return cls(name, nbytes, -1, _windows_attach(name, nbytes), creator=False)
        try:
            fd = _posix().shm_open(f"/{name}", os.O_RDWR, mode=0o600)
        except OSError as error:
            raise InvalidHandle(f"segment {name} cannot be attached: {error.strerror}") from error
        real = os.fstat(fd).st_size
        if real != round_up(nbytes, mmap.PAGESIZE):  # macOS rounds it up to whole pages
            os.close(fd)
            raise InvalidHandle(f"segment {name} is said to have {nbytes} bytes, and has {real}")
        return cls(name, nbytes, fd, None, creator=False)

    @property
    def descriptor(self) -> str:
        return self._name

    def shared_address(self) -> int:
        return self._shared_memory().address

    def shared_memory(self) -> object:
        return self._shared_memory()

    def _shared_memory(self) -> _Memory:
        with self._lock:
            if self._shared is None:
                self._check_open()
                self._shared = _Memory(mmap.mmap(self._fd, self.nbytes))
            return self._shared

    def prefault(self, offset: int, nbytes: int) -> None:
        """Left to the faults: no call for it is portable."""

    def map_block(self, offset: int, nbytes: int) -> BlockMapping:
        span = round_up(nbytes)
        if nbytes <= 0 or offset < 0 or offset % BLOCK_ALIGN or offset + span > self.nbytes:
            raise InvalidHandle(f"{nbytes} bytes at {offset} are no block of a segment of {self.nbytes}")
        with self._lock:
            self._check_open()
            try:
                mapped = self._map_private(offset, span)
            except OSError:
                mapped = None
        if mapped is None:
            mapped = mmap.mmap(-1, span)
            memory = _Memory(mapped)
            ctypes.memmove(memory.address, self.shared_address() + offset, span)
            return _PrivateMapping(memory, span, copied=True)
        return _PrivateMapping(_Memory(mapped), span, copied=False)

    def _map_private(self, offset: int, span: int) -> mmap.mmap:
        if sys.platform == "win32":
            return mmap.mmap(-1, span, tagname=self._name, access=mmap.ACCESS_COPY, offset=offset)
        if sys.version_info >= (3, 13):
            return mmap.mmap(self._fd, span, access=mmap.ACCESS_COPY, offset=offset, trackfd=False)
        return mmap.mmap(self._fd, span, access=mmap.ACCESS_COPY, offset=offset)

    def isolate(self, offset: int, nbytes: int) -> bool:
        """Always False: no portable call changes a mapping in place. The owner copies instead."""
        return False

    def rejoin(self, offset: int, nbytes: int) -> None:
        """Nothing to undo."""

    def isolated_clean(self, offset: int, nbytes: int) -> bool:
        """Always False: the owner's later writes would show to others, so its blocks are copied."""
        return False

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            fd, self._fd = self._fd, -1
            self._shared = None
        if fd >= 0:
            os.close(fd)
        if self._creator_pid == os.getpid():
            unlink_name(self._name)

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidHandle(f"segment {self._name} is closed")


def _posix() -> Any:
    """The extension module under `multiprocessing.shared_memory`; not on Windows."""
    return importlib.import_module("_posixshmem")


def unlink_name(name: str) -> bool:
    """Remove a segment's name, if it is there; memory that is mapped stays. Windows has nothing to remove."""
    if sys.platform != "win32":
        with contextlib.suppress(FileNotFoundError):
            _posix().shm_unlink(f"/{name}")
            return True
    return False


if sys.platform == "win32":

    def _windows_create(name: str, nbytes: int) -> mmap.mmap:
        import _winapi

        mapped = mmap.mmap(-1, nbytes, tagname=name)
        if _winapi.GetLastError() == 183:  # ERROR_ALREADY_EXISTS
            mapped.close()
            raise FileExistsError(f"a file mapping {name} exists already")
        return mapped

    def _windows_attach(name: str, nbytes: int) -> mmap.mmap:
        import _winapi

        try:
            # Opened by name first: mmap alone would make a new mapping where none of that name exists.
            handle = _winapi.OpenFileMapping(_winapi.FILE_MAP_READ, False, name)
        except OSError as error:
            raise InvalidHandle(f"segment {name} cannot be attached: {error}") from error
        try:
            address = _winapi.MapViewOfFile(handle, _winapi.FILE_MAP_READ, 0, 0, 0)
            real = _winapi.VirtualQuerySize(address)
            if hasattr(_winapi, "UnmapViewOfFile"):  # Python 3.12 and later
                _winapi.UnmapViewOfFile(address)
            if real != nbytes:
                raise InvalidHandle(f"segment {name} is said to have {nbytes} bytes, and has {real}")
            return mmap.mmap(-1, nbytes, tagname=name)
        finally:
            _winapi.CloseHandle(handle)
