"""What a test needs of the system that it runs on, as marks; the summary quotes each reason."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

import pytest

WINDOWS = sys.platform == "win32"

posix = pytest.mark.skipif(WINDOWS, reason="needs POSIX: signals, groups, descriptors, modes of files")
fork = pytest.mark.skipif(WINDOWS, reason="needs os.fork")
rlimits = pytest.mark.skipif(WINDOWS, reason="needs POSIX resource limits")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: memfd, /proc, pidfd")

SEGMENT_KINDS = [pytest.param("memfd", marks=linux), "portable"]


def _makes_symlinks() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "link"
        try:
            link.symlink_to(folder)
        except OSError:
            return False
        return link.is_symlink()


symlinks = pytest.mark.skipif(not _makes_symlinks(), reason="needs symbolic links, which cannot be made here")

KILL = signal.SIGTERM if WINDOWS else signal.SIGKILL
"""What ends a process at once, by os.kill; on Windows that is TerminateProcess, with this as exit code."""
KILLED = "exited with code 15" if WINDOWS else "SIGKILL"
"""What is said of a process that was ended so."""
