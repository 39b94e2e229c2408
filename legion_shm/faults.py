"""The hook by which tests put a fault in its exact place. Off, it is one look at a module's variable.

Owns that variable. The places call it so, and nowhere else is anything of it paid for:

    if faults.hit is not None:
        faults.hit("arena.after_reserve")

What can happen at a place, and the list of all places, are in `legion_shm.testing.failpoints`, which is
loaded only where the environment variable LEGION_FAILPOINTS asks for it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

__all__ = ["VARIABLE", "arm_from_environment", "hit"]

VARIABLE = "LEGION_FAILPOINTS"

hit: Callable[[str], None] | None = None


def arm_from_environment() -> None:
    """Called once by each process that is a worker, or makes a supervisor."""
    text = os.environ.get(VARIABLE)
    if text:
        importlib.import_module("legion_shm.testing.failpoints").arm(text)
