"""Where `legion` and ``python -m legion_shm`` begin: the command line, and Ctrl-C while it still loads.

Imports nothing of the package itself: loading the command line takes longer than anything else it does first.
"""

from __future__ import annotations

import signal
import sys

__all__ = ["main"]


def main() -> int:
    """Run `legion` with the arguments of this process; returns its exit code."""
    try:
        from legion_shm.cli import main as run
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return run()


if __name__ == "__main__":
    sys.exit(main())
