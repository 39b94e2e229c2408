"""What a GPU's own copies take, in the same run: the limits of transfers between processes.

Owns the measuring, by torch, on the first GPU that this process sees. Each figure is from the call to the
end of the copy on the device.

    cuda_copy                         from the GPU's memory to the GPU's memory
    cuda_read                         using what came: a sum over all of it
    cuda_down_pinned, cuda_up_pinned  to and from host memory that the driver has locked
    cuda_down_pageable, cuda_up_pageable   to and from ordinary host memory, warm
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from legion_shm.native_bench import payload
from legion_shm.native_bench.machine import gpu_reason
from legion_shm.native_bench.schedule import Size

__all__ = ["measure_cuda_limits"]

_WARM_UP = 3


def measure_cuda_limits(sizes: Sequence[Size], *, rounds: int) -> dict[tuple[str, int], list[float]]:
    """Microseconds by name and bytes; nothing where there is no GPU."""
    if gpu_reason():
        return {}
    samples: dict[tuple[str, int], list[float]] = {}
    for size in sizes:
        copies = _copies(size.nbytes)
        for number in range(_WARM_UP + rounds):
            for name, copy in copies.items():
                took_us = _timed(copy)
                if number >= _WARM_UP:
                    samples.setdefault((name, size.nbytes), []).append(took_us)
    return samples


def _copies(nbytes: int) -> dict[str, Callable[[], object]]:
    import torch

    here = torch.zeros(nbytes // 4, dtype=torch.float32, device="cuda")
    there = torch.zeros_like(here)
    pageable = torch.zeros(nbytes // 4, dtype=torch.float32)
    pinned = pageable.pin_memory()
    return {
        "cuda_copy": lambda: there.copy_(here),
        "cuda_read": lambda: payload.use_by_torch(here, "read"),
        "cuda_down_pinned": lambda: pinned.copy_(here, non_blocking=True),
        "cuda_up_pinned": lambda: there.copy_(pinned, non_blocking=True),
        "cuda_down_pageable": lambda: pageable.copy_(here),
        "cuda_up_pageable": lambda: there.copy_(pageable),
    }


def _timed(work: Callable[[], Any]) -> float:
    import torch

    torch.cuda.synchronize()
    started_ns = time.monotonic_ns()
    work()
    torch.cuda.synchronize()
    return (time.monotonic_ns() - started_ns) / 1000
