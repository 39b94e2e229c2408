"""One region of a GPU's memory that processes share: made by the supervisor's process, opened by a worker
once.

Owns the region in this process, and the proof that it is the one that was meant: behind the bytes for blocks
lies a pattern that its maker wrote, and that whoever opens it reads first. It lends nothing and copies no
payload.

    supervisor:  GpuSegment.create ── cuMemAlloc, pattern, IPC handle ──▶ described by `GpuSegmentIntroduced`
    worker:      GpuSegment.open   ◀── cuIpcOpenMemHandle, pattern read ──

A block in it is never viewed as main memory: `map_block` refuses.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import weakref
from typing import Any

from legion_shm import faults
from legion_shm.errors import ArenaFull, CudaError, InvalidHandle
from legion_shm.transport.cuda_driver import CudaDevice, cuda_driver
from legion_shm.transport.handles import BLOCK_ALIGN, round_up
from legion_shm.transport.segment import BlockMapping, Segment

__all__ = ["PATTERN_BYTES", "GpuSegment"]

_log = logging.getLogger("legion_shm.gpu")

PATTERN_BYTES = 32
_GRANULE_BYTES = 2 << 20  # the driver hands memory out by this, and an IPC handle opens nothing smaller


class _Region:
    """Memory of a device, mapped in this process; it goes with the last reference to this object."""

    def __init__(self, device: CudaDevice, address: int, *, owned: bool) -> None:
        self.address = address
        self.tensor: Any = None
        self.lock = threading.Lock()
        weakref.finalize(self, _let_go, device, address, owned, os.getpid()).atexit = False


def _let_go(device: CudaDevice, address: int, owned: bool, process: int) -> None:
    if process != os.getpid():
        return  # a forked child has no context, and the memory is its parent's
    try:
        if owned:
            device.free(address)
        else:
            device.close(address)
    except CudaError as error:  # the process's end gives it back too
        _log.debug("memory of a GPU was not given back: %s", error)


class GpuSegment(Segment):
    """A segment in a device's memory. ``device``: its UUID, as torch writes it.

    ``handle`` and ``pattern`` are what another process opens and checks it by.
    """

    def __init__(self, device: str, nbytes: int, handle: bytes, pattern: bytes, region: _Region) -> None:
        self.device, self.nbytes, self.handle, self.pattern = device, nbytes, handle, pattern
        self._region: _Region | None = region

    @classmethod
    def create(cls, device: str, nbytes: int) -> GpuSegment:
        """A new region for blocks of at least ``nbytes`` in all. Only where this process uses the device
        already.

        Raises ArenaFull with the reason why there is none.
        """
        try:
            driver = cuda_driver().device(device)
            in_use = driver.is_open
        except CudaError as error:
            raise ArenaFull(f"no shared memory on GPU {device}: {error}") from None
        if not in_use:
            raise ArenaFull(f"the supervisor's process does not use GPU {device} yet")
        whole = cls.whole_bytes(nbytes)
        usable = whole - BLOCK_ALIGN
        address = 0
        try:
            if faults.hit is not None:
                faults.hit("gpu.create")
            address = driver.allocate(whole)
            pattern = secrets.token_bytes(PATTERN_BYTES)
            handle = driver.export(address)
            driver.write(address + usable, pattern)
        except OSError as error:
            if address:
                _let_go(driver, address, True, os.getpid())
            raise ArenaFull(f"no shared memory of {nbytes} bytes on GPU {device}: {error}") from error
        return cls(device, usable, handle, pattern, _Region(driver, address, owned=True))

    @staticmethod
    def whole_bytes(nbytes: int) -> int:
        """What a segment for blocks of that many bytes takes of the device, with the page of its pattern."""
        return round_up(nbytes + BLOCK_ALIGN, _GRANULE_BYTES)

    @classmethod
    def open(cls, device: str, nbytes: int, handle: bytes, pattern: bytes) -> GpuSegment:
        """The region that another process made and described. Raises CudaError where this is not it."""
        driver = cuda_driver().device(device)
        address = driver.open(handle)
        try:
            if faults.hit is not None:
                faults.hit("gpu.opened")
            if driver.read(address + nbytes, len(pattern)) != pattern:
                raise CudaError("what was opened is not the memory that was shared: its pattern is another")
        except OSError:
            _let_go(driver, address, False, os.getpid())
            raise
        return cls(device, nbytes, handle, pattern, _Region(driver, address, owned=False))

    def again(self) -> GpuSegment:
        """The same region, to be closed by somebody else."""
        return GpuSegment(self.device, self.nbytes, self.handle, self.pattern, self._held())

    @property
    def descriptor(self) -> int | str:
        raise InvalidHandle("a segment of a GPU's memory has no descriptor: it is introduced by a message")

    def shared_address(self) -> int:
        return self._held().address

    def shared_memory(self) -> object:
        return self._held()

    def tensor(self, devices: Any, device: Any) -> Any:
        """All bytes for blocks as one tensor of ``devices``; made once."""
        region = self._held()
        with region.lock:
            if region.tensor is None:
                region.tensor = devices.bytes_at(device, region.address, self.nbytes)
            return region.tensor

    def read_into(self, target: int, offset: int, nbytes: int) -> None:
        """Copy to main memory at ``target``."""
        region = self._held()
        cuda_driver().device(self.device).read_into(target, region.address + offset, nbytes)

    def prefault(self, offset: int, nbytes: int) -> None:
        """Nothing to do: a GPU's memory is there when it was allocated."""

    def map_block(self, offset: int, nbytes: int) -> BlockMapping:
        raise InvalidHandle("a block of a GPU's memory can't be mapped as main memory")

    def isolate(self, offset: int, nbytes: int) -> bool:
        return False

    def rejoin(self, offset: int, nbytes: int) -> None:
        """Nothing to undo."""

    def isolated_clean(self, offset: int, nbytes: int) -> bool:
        return False

    def close(self) -> None:
        self._region = None

    def _held(self) -> _Region:
        if self._region is None:
            raise InvalidHandle("this segment of a GPU's memory is closed")
        return self._region
