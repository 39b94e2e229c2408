"""`python -m legion_shm.native_bench`: the same as `legion bench`."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from legion_shm.native_bench.command import bench


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise SystemExit(128 + number)  # so that every way is closed on the way out


def main() -> int:
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code: object = bench.main(prog_name="python -m legion_shm.native_bench", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
