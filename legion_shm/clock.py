"""The one clock: monotonic seconds, comparable between the processes of one machine.

Never the wall clock: it jumps. Code that decides takes the time as an argument; only the outermost
loops read it here.
"""

from __future__ import annotations

import time

__all__ = ["monotonic_s"]


def monotonic_s() -> float:
    """Seconds since an arbitrary point, the same point for every process since this machine's boot."""
    return time.monotonic()
