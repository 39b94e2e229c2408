"""Where LoadImage reads and SaveImage writes, and the rule that no name leads out of there.

Owns the process's two directories. It creates and opens nothing, and needs no torch.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "INPUT_VARIABLE",
    "OUTPUT_VARIABLE",
    "configure",
    "find_file",
    "input_directory",
    "inside",
    "output_directory",
]

INPUT_VARIABLE = "LEGION_INPUT_DIR"
OUTPUT_VARIABLE = "LEGION_OUTPUT_DIR"

_configured: dict[str, Path] = {}


def configure(
    *,
    input_directory: str | os.PathLike[str] | None = None,
    output_directory: str | os.PathLike[str] | None = None,
) -> None:
    """Set the directories; None means the environment's variable, else ``input`` and ``output`` here."""
    for name, value in (("input", input_directory), ("output", output_directory)):
        if value is None:
            _configured.pop(name, None)
        else:
            _configured[name] = Path(value)


def input_directory() -> Path:
    return _configured.get("input") or Path(os.environ.get(INPUT_VARIABLE) or "input")


def output_directory() -> Path:
    return _configured.get("output") or Path(os.environ.get(OUTPUT_VARIABLE) or "output")


def inside(directory: Path, name: str) -> Path:
    """The path of ``name`` in ``directory``; ValueError where it, its links resolved, lies outside."""
    try:
        base = Path(os.path.realpath(directory))
        path = Path(os.path.realpath(base / name))
    except ValueError as error:
        raise ValueError(f"{name!r} is no file name: {error}") from None
    if path != base and base not in path.parents:
        raise ValueError(f"{name!r} leads out of {directory}; name something inside of it")
    return path


def find_file(name: str) -> Path:
    """The file that an image name means: ``photo.png``, ``folder/photo.png``, or ``photo.png [output]``."""
    for mark, directory in ((" [input]", input_directory), (" [output]", output_directory)):
        if name.endswith(mark):
            return inside(directory(), name.removesuffix(mark))
    return inside(input_directory(), name)
