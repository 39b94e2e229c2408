"""What the tests of writes share: ways to write, nodes that read and write, values as their bytes."""

from __future__ import annotations

import ctypes
import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from legion_shm.supervisor.graph_writes import VIEW_MIN_BYTES
from tests.engine.graph_harness import node_class

NEVER_CACHED: dict[str, Any] = {"IS_CHANGED": lambda **_: float("nan")}
SMALL, LARGE = 16, VIEW_MIN_BYTES // 2  # float32: one far below what is worth a view, one above


def write_by_torch(tensor: Any) -> None:
    tensor.fill_(9.0)


def write_by_numpy(tensor: Any) -> None:
    tensor.numpy()[...] = 9.0


def write_by_c(tensor: Any) -> None:
    ctypes.memset(tensor.data_ptr(), 0x41, tensor.numel() * tensor.element_size())


def write_one_element(tensor: Any) -> None:
    tensor.view(-1)[-1:].numpy()[0] = 9.0


WRITES: dict[str, Callable[[Any], None]] = {
    "torch": write_by_torch,
    "numpy": write_by_numpy,
    "C": write_by_c,
    "one element": write_one_element,
}


def reader(seen: list[Any]) -> type:
    """A node that notes what it sees; ``after`` makes it run after another."""

    def read(value: Any, after: object = None) -> tuple[Any]:
        seen.append(content(value))
        return (0,)

    return node_class(read, required={"value": ("*",)}, optional={"after": ("*",)}, **NEVER_CACHED)


def writer(write: Callable[[Any], None], *, from_run: int = 0, **attributes: Any) -> type:
    runs: list[int] = []

    def run(value: Any, after: object = None) -> tuple[Any]:
        runs.append(1)
        if len(runs) > from_run:
            each_tensor(value, write)
        return (value,)

    return node_class(
        run, required={"value": ("*",)}, optional={"after": ("*",)}, **{**NEVER_CACHED, **attributes}
    )


def each_tensor(value: Any, act: Callable[[Any], None]) -> None:
    if isinstance(value, torch.Tensor):
        act(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            each_tensor(item, act)
    elif isinstance(value, (list, tuple, deque)):
        for item in value:
            each_tensor(item, act)


def content(value: Any) -> Any:
    """The value with the bytes of its tensors in their place."""
    if isinstance(value, torch.Tensor):
        dense = (value.to_dense() if value.layout is not torch.strided else value).resolve_conj()
        return tuple(dense.shape), hashlib.sha256(dense.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return {key: content(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [content(item) for item in value]
    return bytes(value) if isinstance(value, bytearray) else value


def maker(make: Callable[[], Any], **attributes: Any) -> type:
    return node_class(lambda: (make(),), **attributes)


def sparse() -> torch.Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([[0, 3], [1, 2]]), torch.ones(2), (4, 4), check_invariants=True
    ).coalesce()
