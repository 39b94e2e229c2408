"""Copying bytes between two addresses of this process, fast.

Owns the one helper thread that takes half of a large copy. It knows nothing of tensors or blocks, and
never checks an address: its callers do.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from threading import Lock

from legion_shm import faults

__all__ = ["SPLIT_MIN_BYTES", "copy_memory"]

SPLIT_MIN_BYTES = 2 * 1024 * 1024
"""Below it, handing half to another thread costs more than it saves."""


class _Helper:
    """One thread, busy with one copy at a time: a second caller copies alone instead of queueing."""

    def __init__(self) -> None:
        self._free = Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def start(self, dst: int, src: int, nbytes: int) -> Future[object] | None:
        """Begin a copy and take the helper, or None where it is not to be had."""
        if self._cpus < 2 or not self._free.acquire(blocking=False):
            return None
        try:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="legion-copy")
            return self._pool.submit(ctypes.memmove, dst, src, nbytes)
        except RuntimeError:  # the interpreter is shutting down, or no thread can be started
            self._free.release()
            return None

    def finish(self, copying: Future[object]) -> None:
        """Wait until the copy is done, whatever interrupts: its memory may be freed right afterwards."""
        interrupted: BaseException | None = None
        try:
            while not copying.done():
                try:
                    copying.exception(timeout=60.0)
                except FutureTimeoutError:
                    continue
                except BaseException as error:
                    interrupted = error
        finally:
            self._free.release()
        if interrupted is not None:
            raise interrupted


_helper = _Helper()


def _renew_helper() -> None:
    global _helper
    _helper = _Helper()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_helper)


def copy_memory(dst_address: int, src_address: int, nbytes: int) -> None:
    """Copy ``nbytes`` between two regions that don't overlap, without the GIL.

    From `SPLIT_MIN_BYTES` on two threads share the work, where this process may use two processors.
    """
    if faults.hit is not None:
        half = nbytes // 2
        ctypes.memmove(dst_address, src_address, half)
        faults.hit("copy.half_done")
        ctypes.memmove(dst_address + half, src_address + half, nbytes - half)
        return
    helper = _helper
    half = 0
    copying = None
    if nbytes >= SPLIT_MIN_BYTES:
        # The split is at a page of the destination, so that no two threads fault the same page in.
        half = nbytes // 2 - (dst_address + nbytes // 2) % mmap.PAGESIZE
        copying = helper.start(dst_address + half, src_address + half, nbytes - half)
    if copying is None:
        ctypes.memmove(dst_address, src_address, nbytes)
        return
    try:
        ctypes.memmove(dst_address, src_address, half)
    finally:
        helper.finish(copying)
