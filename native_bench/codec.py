"""What the value codec itself costs, without processes: encode and decode of typical values, in microseconds.

    python -m legion_shm.native_bench.codec                     figures of this checkout
    python -m legion_shm.native_bench.codec --against FOLDER    and ratios to another one's, run in turns

Owns the cases and the comparison. It is run by its path with either checkout first on the path, so it uses
nothing of Legion's but what every version of the codec has. Ratios are medians of those of neighbouring
turns. Blocks are plain memory here: the arena's own cost is not in these figures.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CASES", "Codec", "main"]

_ROOT = Path(__file__).resolve().parents[1]
_ROUND_S = 0.02
"""Short, so that both checkouts see the same machine."""

_TURNS = 40
_INLINE_MAX_BYTES = 65536

Figures = tuple[float, float]


def _tensor() -> Any:
    import torch

    return torch.rand(1, 512, 512, 3)


def _tensors() -> Any:
    import torch

    return [torch.rand(3) for _ in range(100)]


def _large_tensors() -> Any:
    import torch

    return [torch.rand(100, 100) for _ in range(100)]


def _primitives() -> Any:
    return [{"index": index, "pair": (index / 2, str(index)), "on": index % 2 == 0} for index in range(2000)]


def _conditioning() -> Any:
    import torch

    more = {"strength": 1.0, "area": (64, 64, 0, 0), "start_percent": 0.0}
    return [[torch.rand(1, 77, 768), {"pooled_output": torch.rand(1, 768), **more}] for _ in range(4)]


def _latent() -> Any:
    import torch

    return {"samples": torch.rand(1, 4, 64, 64), "batch_index": [0], "noise_mask": torch.rand(1, 64, 64)}


CASES: dict[str, Callable[[], Any]] = {
    "an int": lambda: 5,
    "one tensor, 3 MB": _tensor,
    "100 tensors, 12 bytes": _tensors,
    "100 tensors, 40 kB": _large_tensors,
    "10,000 primitives, nested": _primitives,
    "CONDITIONING of 4 entries": _conditioning,
    "LATENT with a mask": _latent,
}


class _Block:
    def __init__(self, handle: Any, address: int) -> None:
        self.handle, self.address = handle, address


class _Memory:
    """Blocks of plain memory, as the codec wants them; encoded again, they are written again."""

    inline_max_bytes = _INLINE_MAX_BYTES

    def __init__(self) -> None:
        self._blocks: list[Any] = []
        self._next = 0

    def start(self) -> None:
        self._next = 0

    def find(self, address: int, nbytes: int) -> None:
        return None

    def adopt(self, address: int, nbytes: int) -> None:
        return None

    def reserve(self, nbytes: int) -> _Block:
        from legion_shm.transport.handles import BlockHandle

        number, self._next = self._next, self._next + 1
        if number == len(self._blocks):
            self._blocks.append((ctypes.c_ubyte * nbytes)())
        memory = self._blocks[number]
        return _Block(BlockHandle(7, 0, number * 4096, nbytes, number), ctypes.addressof(memory))

    def discard(self, handle: Any) -> None:
        raise AssertionError("nothing fails here")

    def view(self, handle: Any) -> Any:
        return self._blocks[handle.generation]


def _per_call_us(call: Callable[[], object]) -> float:
    call()
    started = time.perf_counter()
    call()
    count = max(1, int(_ROUND_S / max(1e-9, time.perf_counter() - started)))
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count * 1e6


class Codec:
    """The codec of this process's path, ready to be timed."""

    def __init__(self) -> None:
        self._calls = {name: _calls(make()) for name, make in CASES.items()}

    def figures(self, name: str) -> Figures:
        """Encode and decode of a case, in microseconds."""
        encode, decode = self._calls[name]
        return _per_call_us(encode), _per_call_us(decode)


def _calls(value: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    from legion_shm.transport.codec import decode, encode

    memory: Any = _Memory()

    def write() -> Any:
        memory.start()
        return encode(value, memory)

    encoded = write()
    return write, lambda: decode(encoded.tree, encoded.blocks, memory)


class _Side:
    """A process with the codec of one checkout, which times a case whenever it is told to."""

    def __init__(self, checkout: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--inside"],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.times: dict[str, list[Figures]] = {name: [] for name in CASES}

    def time(self, name: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        encode, decode = json.loads(self._process.stdout.readline())
        self.times[name].append((encode, decode))

    def close(self) -> None:
        self._process.communicate(timeout=60)


def _answer() -> None:
    codec = Codec()
    for line in sys.stdin:
        print(json.dumps(codec.figures(line.rstrip("\n"))), flush=True)


def _show(sides: list[_Side]) -> str:
    head = ["case", "encode, us", "decode, us"]
    if len(sides) > 1:
        head += ["encode, times", "decode, times"]
    rows = [head]
    for name in CASES:
        columns = list(zip(*sides[0].times[name], strict=True))
        row = [name, *(f"{statistics.median(column):.1f}" for column in columns)]
        for part in (0, 1) if len(sides) > 1 else ():
            here, there = ([figures[part] for figures in side.times[name]] for side in sides)
            ratios = sorted(one / other for one, other in zip(here, there, strict=True))
            row.append(f"{statistics.median(ratios):.2f}")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m legion_shm.native_bench.codec",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--against", type=Path, help="another checkout of Legion, such as a git worktree")
    parser.add_argument("--turns", type=int, default=_TURNS, help="how often each case is timed")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        _answer()
        return
    checkouts = [_ROOT] if given.against is None else [_ROOT, given.against.resolve()]
    sides = [_Side(checkout) for checkout in checkouts]
    try:
        for number in range(given.turns):
            for name in CASES:
                for side in sides[:: -1 if number % 2 else 1]:
                    side.time(name)
        print(_show(sides))
    finally:
        for side in sides:
            side.close()


if __name__ == "__main__":
    main()
