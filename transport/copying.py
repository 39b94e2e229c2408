"""Copying bytes between two addresses of this process, fast.

Large copies are shared by two threads, which is up to twice as fast where a processor is idle and memory is
faster than one of them. Where this process was told of the library of native code, its copy.c does that, and
loses nothing where it is not so; it can also write past the caches. Elsewhere a thread of Python's takes half
of a copy, which is slower where it does not pay. Whether to write past the caches, or to share, is decided by
what copies of about that size took here lately. This module knows nothing of tensors or blocks, and never
checks an address: its callers do.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from statistics import median
from threading import Lock

from legion_shm import faults
from legion_shm.helper_threads import HelperThreads

__all__ = ["SPLIT_MIN_BYTES", "Chooser", "copy_memory", "use_library"]

SPLIT_MIN_BYTES = 2 * 1024 * 1024
"""Below it, handing half to another thread costs more than it saves."""


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Helper:
    """One thread, busy with one copy at a time: a second caller copies alone instead of queueing."""

    def __init__(self) -> None:
        self._free = Lock()
        self._pool: HelperThreads | None = None
        self._cpus = _cpus()

    def start(self, dst: int, src: int, nbytes: int) -> Future[object] | None:
        """Begin a copy and take the helper, or None where it is not to be had."""
        if self._cpus < 2 or not self._free.acquire(blocking=False):
            return None
        try:
            if self._pool is None:
                self._pool = HelperThreads(1, thread_name_prefix="legion-copy")
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


class Chooser:
    """Whether the next large copy is to go the special way: by the medians of the last copies of each kind.

    Both ways are tried in turns at first, and later the one that is not chosen in each ``every``-th copy.
    The special way has to take less than ``at_most`` times as long as the plain one.
    """

    _LAST = 5

    def __init__(self, every: int = 12, at_most: float = 1.0) -> None:
        self._every = every
        self._at_most = at_most
        self._count = 0
        self._taken: tuple[deque[float], deque[float]] = (deque(maxlen=self._LAST), deque(maxlen=self._LAST))

    def special(self) -> bool:
        plain, special = self._taken
        self._count += 1
        if len(plain) < self._LAST or len(special) < self._LAST:
            return len(special) <= len(plain)
        return (median(special) < self._at_most * median(plain)) != (self._count % self._every == 0)

    def took(self, special: bool, nbytes: int, seconds: float) -> None:
        self._taken[special].append(seconds / nbytes)


_STREAMED_AT_MOST = 0.85
"""What was written past the caches is not there for the receiver, nor for whoever tells it: that must pay."""

_NEVER_CACHED_BITS = (64 * 1024 * 1024).bit_length()
"""Of copies from that size on nothing much is left in a cache, however they are made."""

_Native = Callable[[int, int, int, bool], object]  # as memmove, and whether to write past the caches
_native: _Native | None = None
_helper = _Helper()
_choosers: dict[int, Chooser] = {}  # by the size's bit length: where small copies lose, large ones may gain


def _renew_helper() -> None:
    global _helper
    _helper = _Helper()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_helper)


def use_library(path: str) -> bool:
    """Have large copies made by native/copy.c, in the library at ``path``, from now on.

    False, and nothing changed, where it can't be loaded.
    """
    global _native
    try:
        copy = ctypes.CDLL(path).legion_copy
    except (OSError, AttributeError):
        return False
    copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int)
    shared = int(_cpus() > 1)

    def native(dst: int, src: int, nbytes: int, streamed: bool) -> None:
        copy(dst, src, nbytes, shared, streamed)

    _native = native
    _choosers.clear()
    return True


def copy_memory(dst_address: int, src_address: int, nbytes: int) -> None:
    """Copy ``nbytes`` between two regions that don't overlap, without the GIL.

    From `SPLIT_MIN_BYTES` on the way is taken that has been the faster one lately, of two threads or one.
    """
    if faults.hit is not None:
        half = nbytes // 2
        ctypes.memmove(dst_address, src_address, half)
        faults.hit("copy.half_done")
        ctypes.memmove(dst_address + half, src_address + half, nbytes - half)
        return
    if nbytes < SPLIT_MIN_BYTES:
        ctypes.memmove(dst_address, src_address, nbytes)
        return
    started_s = time.perf_counter()
    chooser = _chooser_of(nbytes)
    special = chooser.special()
    if _native is not None:
        _native(dst_address, src_address, nbytes, special)
    elif not special or not _copy_by_two(dst_address, src_address, nbytes):
        special = False
        ctypes.memmove(dst_address, src_address, nbytes)
    chooser.took(special, nbytes, time.perf_counter() - started_s)


def _chooser_of(nbytes: int) -> Chooser:
    chooser = _choosers.get(nbytes.bit_length())
    if chooser is None:
        free = _native is None or nbytes.bit_length() >= _NEVER_CACHED_BITS
        chooser = Chooser(at_most=1.0 if free else _STREAMED_AT_MOST)
        _choosers[nbytes.bit_length()] = chooser
    return chooser


def _copy_by_two(dst_address: int, src_address: int, nbytes: int) -> bool:
    """Share the copy with the helper; False, and nothing done, where it is not to be had."""
    helper = _helper
    # The split is at a page of the destination, so that no two threads fault the same page in.
    half = nbytes // 2 - (dst_address + nbytes // 2) % mmap.PAGESIZE
    copying = helper.start(dst_address + half, src_address + half, nbytes - half)
    if copying is None:
        return False
    try:
        ctypes.memmove(dst_address, src_address, half)
    finally:
        helper.finish(copying)
    return True
