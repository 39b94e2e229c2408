"""Other packages' chatter while they start: kept off the terminal that shows the result."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator

__all__ = ["quiet_descriptors"]


@contextlib.contextmanager
def quiet_descriptors() -> Generator[None]:
    """Descriptors 1 and 2 lead nowhere meanwhile, and for good in processes that start inside."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    saved = {fd: os.dup(fd) for fd in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd in saved:
            os.dup2(nowhere, fd)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for fd, copy in saved.items():
            os.dup2(copy, fd)
            os.close(copy)
        os.close(nowhere)
