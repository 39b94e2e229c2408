"""Where `legion` and ``python -m legion_shm`` begin: the command line, and what ends it while it still loads.

Imports nothing of the package itself: loading the command line takes longer than anything else it does first.
"""

from __future__ import annotations

import signal
import sys

__all__ = ["main"]

_PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "zmq": "pyzmq"}  # by module, where the names differ
_REQUIRED = {"click", "msgpack", "numpy", "psutil", "pydantic", "rich", "safetensors", "torch", *_PACKAGES}


def main() -> int:
    """Run `legion` with the arguments of this process; returns its exit code."""
    try:
        from legion_shm.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _REQUIRED:
            raise
        package = _PACKAGES.get(module, module)
        sys.stderr.write(
            f"Error: Legion needs the package {package}, which this Python lacks; "
            f"run `{sys.executable} -m pip install {package}`\n"
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
