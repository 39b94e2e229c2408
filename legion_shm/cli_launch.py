"""`legion launch`: executing a program with the allocator shim preloaded.

Owns the look at the program before it is executed, and its environment. Nothing of this process is left once
that has happened.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from legion_shm.supervisor.worker_env import launch_environment
from legion_shm.transport.born_build import library_path, preload_problem

__all__ = ["launch"]

_NOT_FOUND, _NOT_EXECUTABLE = 127, 126  # as shells have it
_SHEBANGS = 4  # Linux follows as many, one script to the next


def launch(command: Sequence[str]) -> int:
    """Execute ``command`` in place of this process. Returns, with an exit code, only where that can't be."""
    program = shutil.which(command[0])
    if program is None:
        found = os.path.exists(command[0])
        what = "is no program that you may execute" if found else "is not there, or not on the PATH"
        return _failed(f"{command[0]} {what}", _NOT_EXECUTABLE if found else _NOT_FOUND)
    library, reason = library_path()
    problem = reason if library is None else preload_problem(_executed(program))
    if library is None or problem:
        return _failed(
            f"tensors of {command[0]} can't be born in shared memory: {problem}\n"
            "Start it without `legion launch`: everything works all the same, with one copy of each tensor.",
            1,
        )
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them, and what is ignored stays so
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execve(program, list(command), launch_environment(os.environ, str(library)))
    except OSError as error:
        code = _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE
        return _failed(f"{program} could not be executed: {error.strerror}", code)


def _failed(text: str, code: int) -> int:
    click.echo(f"Error: {text}", err=True)
    return code


def _executed(program: str) -> str:
    """The program that the system executes for a script: the interpreter in its first line."""
    for _ in range(_SHEBANGS):
        try:
            with Path(program).open("rb") as file:
                head = file.readline(256)
        except OSError:
            break
        words = head[2:].split() if head.startswith(b"#!") else []
        if not words:
            break
        program = os.fsdecode(words[0])
    return program
