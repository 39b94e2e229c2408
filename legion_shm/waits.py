"""Waiting for another thread so that Ctrl-C is heard.

Owns the difference between systems: on POSIX a signal interrupts a wait, and its handler runs at once. On
Windows a waiting main thread hears nothing until the wait is over, so there it waits in slices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from legion_shm.clock import monotonic_s

__all__ = ["heard", "in_slices"]

_SLICE_S = 0.2
Wait = Callable[[float | None], bool]


def in_slices(wait: Wait, timeout_s: float | None) -> bool:
    """``wait(seconds)``, again and again, until it gives True or the time is over."""
    deadline_s = None if timeout_s is None else monotonic_s() + timeout_s
    while True:
        left_s = _SLICE_S if deadline_s is None else min(_SLICE_S, deadline_s - monotonic_s())
        if wait(max(0.0, left_s)):
            return True
        if deadline_s is not None and monotonic_s() >= deadline_s:
            return False


def _at_once(wait: Wait, timeout_s: float | None) -> bool:
    return wait(timeout_s)


heard: Callable[[Wait, float | None], bool] = in_slices if sys.platform == "win32" else _at_once
"""``heard(wait, timeout_s)`` is ``wait(timeout_s)``, during which a signal's handler can run."""
