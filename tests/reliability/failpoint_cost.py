"""What a failpoint costs that is off, in nanoseconds: the look at a module's variable, beside an empty loop.

python -m tests.reliability.failpoint_cost
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from legion_shm import faults

_LOOKS = 200_000
_RUNS = 21


def look() -> None:
    for _ in range(_LOOKS):
        if faults.hit is not None:
            faults.hit("copy.half_done")


def nothing() -> None:
    for _ in range(_LOOKS):
        pass


def ns_each(work: Callable[[], None]) -> float:
    started_ns = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - started_ns) / _LOOKS


def main() -> None:
    assert faults.hit is None
    costs = [ns_each(look) - ns_each(nothing) for _ in range(_RUNS)]  # one after the other, in turn
    print(f"{statistics.median(costs):.1f} ns in the median of {_RUNS} runs, {max(costs):.1f} ns at worst")


if __name__ == "__main__":
    main()
