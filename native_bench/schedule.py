"""What is measured in which order: sizes, rounds, and turns.

Owns the plan, as pure functions of numbers: it measures nothing. In each round every way has at most one
turn,
in an order that is shuffled anew (from a fixed seed), so that whatever else the machine does meets all alike
and no way always follows the same other one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from legion_shm.errors import BenchmarkError
from legion_shm.native_bench.payload import PAGE_BYTES, Order, Use

__all__ = ["QUICK_SIZES", "SIZES", "Size", "parse_sizes", "rounds_for", "strides", "turns"]


@dataclass(frozen=True)
class Size:
    """``shape``: of float32 tensors. ``label``: how tables call it, ``what``: what has that size."""

    label: str
    shape: tuple[int, ...]
    what: str

    @property
    def nbytes(self) -> int:
        return Order(self.shape, "touch", 0, 0).nbytes


SIZES: tuple[Size, ...] = (
    Size("4 KB", (1024,), "a page"),
    Size("64 KB", (1, 4, 64, 64), "latent of a 512x512 image, 4 channels"),
    Size("3 MB", (1, 512, 512, 3), "512x512 image"),
    Size("25 MB", (1, 1080, 1920, 3), "1080p image"),
    Size("100 MB", (4, 1080, 1920, 3), "4 1080p images"),
    Size("400 MB", (16, 1080, 1920, 3), "16 1080p images"),
)
QUICK_SIZES = ("4 KB", "3 MB", "25 MB")

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "KB": 1 << 10, "KIB": 1 << 10, "M": 1 << 20, "MB": 1 << 20,
          "MIB": 1 << 20, "G": 1 << 30, "GB": 1 << 30, "GIB": 1 << 30}  # fmt: skip


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Comma-separated: labels of `SIZES` (``25MB``), or any other number of KB, MB, GB (of 1024).

    Others are rounded up to whole pages and sent as ``[n]``. Raises BenchmarkError.
    """
    known = {size.label.replace(" ", ""): size for size in SIZES}
    sizes: list[Size] = []
    for part in text.split(","):
        word = part.replace(" ", "").upper()
        if word in known or f"{word}B" in known:
            sizes.append(known.get(word) or known[f"{word}B"])
            continue
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Z]*)", word)
        if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
            raise BenchmarkError(f"{part.strip()!r} is no size; write 64KB, 25MB, ... ({', '.join(known)})")
        nbytes = -(-int(float(match[1]) * _UNITS[match[2]]) // PAGE_BYTES) * PAGE_BYTES
        sizes.append(Size(part.strip(), (nbytes // 4,), "a tensor of that size"))
    return tuple(dict.fromkeys(sizes))


def rounds_for(nbytes: int, *, quick: bool, rounds: int | None = None) -> int:
    """How many rounds a size gets: more where they are cheap. ``rounds``: as asked for."""
    if rounds is not None:
        return rounds
    table = ((1 << 20, 60, 300), (8 << 20, 25, 150), (32 << 20, 9, 60), (128 << 20, 5, 20))
    for most, few, many in table:
        if nbytes <= most:
            return few if quick else many
    return 3 if quick else 8


def strides(costs: Mapping[str, float], *, share: float = 4.0, most: int = 8) -> dict[str, int]:
    """In which rounds each way has a turn: every one (1), every second (2), ...

    ``costs``: seconds of one turn. A way that takes more than ``share`` times the middle one is measured more
    rarely, so that it doesn't take the time that more samples of all others need; its count is reported.
    """
    if not costs:
        return {}
    ordered = sorted(costs.values())
    middle = max(ordered[len(ordered) // 2], 1e-9)
    return {name: max(1, min(most, int(cost / (share * middle)))) for name, cost in costs.items()}


def turns(names: Sequence[str], every: Mapping[str, int], rounds: int, seed: int) -> Iterator[list[str]]:
    """Round by round, whose turn it is, in order. Every way is in the first three rounds."""
    shuffler = random.Random(seed)
    for number in range(rounds):
        present = [name for name in names if number < 3 or number % every.get(name, 1) == 0]
        shuffler.shuffle(present)
        yield present


def uses_of(what: str) -> tuple[Use, ...]:
    """The ways of using a tensor that a run measures: ``touch``, ``read`` or both."""
    return ("touch", "read") if what == "both" else ("read",) if what == "read" else ("touch",)
