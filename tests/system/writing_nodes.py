"""Node classes that write into what they have, and that look; test_node_writes.py runs them in workers."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from typing import Any, ClassVar

NBYTES = 3 << 20  # far above what is worth a view


class _Node:
    FUNCTION = "run"
    CATEGORY = "test"
    RETURN_TYPES: tuple[str, ...] = ("*",)
    OPTIONS: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": cls.OPTIONS, "optional": {"value": ("*",), "after": ("*",)}}


class Make(_Node):
    """A tensor of ones, kept for later jobs; with ``kept`` by the node too, which writes into it then."""

    OPTIONS: ClassVar[dict[str, Any]] = {"kept": ("BOOLEAN",), "number": ("INT",)}
    _kept: ClassVar[list[Any]] = []

    def run(self, kept: bool, number: int, value: Any = None, after: object = None) -> tuple[Any]:
        import torch

        for tensor in self._kept:
            tensor.numpy().fill(-5.0)
        tensor = torch.ones(NBYTES // 4)
        if kept:
            self._kept.append(tensor)
        return (tensor,)


class WriteFrom(_Node):
    """Writes into its input, from its run number ``first`` on; gives it on, and how it is mapped."""

    RETURN_TYPES = ("*", "STRING")
    OPTIONS: ClassVar[dict[str, Any]] = {"how": ("STRING",), "first": ("INT",), "fails": ("BOOLEAN",)}

    def __init__(self) -> None:
        self._runs = 0

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:  # noqa: N802 - the protocol's name
        return float("nan")

    def run(
        self, how: str, first: int, fails: bool, value: Any = None, after: object = None
    ) -> tuple[Any, str]:
        mapped = mapping_of(value.data_ptr())
        if self._runs >= first:
            write(value, how)
        self._runs += 1
        if fails:
            raise ValueError("after the write")
        return value, mapped


class Look(_Node):
    """The digest of its input's bytes."""

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:  # noqa: N802 - the protocol's name
        return float("nan")

    def run(self, value: Any = None, after: object = None) -> tuple[str]:
        return (digest(value),)


def write(tensor: Any, how: str) -> None:
    if how == "torch":
        tensor.fill_(9.0)
    elif how == "numpy":
        tensor.numpy()[-1] = 9.0
    else:
        ctypes.memset(tensor.data_ptr(), 0x41, tensor.numel() * tensor.element_size())


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def mapping_of(address: int) -> str:
    """``private`` or ``shared`` memory of a segment, or ``other``."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "other"
    for line in lines:
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high and "memfd:" in line:
            return "private" if line.split()[1][3] == "p" else "shared"
    return "other"


NODE_CLASS_MAPPINGS = {"Make": Make, "WriteFrom": WriteFrom, "Look": Look}
