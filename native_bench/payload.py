"""What is sent: tensors whose every byte is known from a number, made fresh and checked on both sides.

Owns the contents. Every page begins with a stamp that depends on the number and on the page, so using one
word
of each page (`use`) already proves that all pages have come; the rest of the page is one block of noise that
all share, compared byte by byte outside of the timed window (`problem_of`). It sends nothing and reads no
clock.

numpy does the work, because its loops run on the calling thread: torch's own threads would go on spinning for
a while afterwards, on the processors that the next measurement needs. On a GPU torch does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "PAGE_BYTES",
    "Device",
    "Order",
    "Use",
    "as_tensor",
    "expected_use",
    "make",
    "problem_of",
    "to_tensor",
    "use",
    "use_by_torch",
]

PAGE_BYTES = 4096
Use = Literal["touch", "read", "none"]
"""``touch``: one word of each page; ``read``: every byte; ``none``: the tensor is only taken in hand."""

Content = Literal["pattern", "picture"]

Device = Literal["cpu", "cuda"]
"""``cuda``: the first GPU that the process sees."""

_PAGE_WORDS = PAGE_BYTES // 8
_BLOCK_WORDS = 1 << 17
_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_PICTURE_SIDE = 64

Words = npt.NDArray[np.uint64]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Order:
    """One message there and one back. ``shape``: of float32 tensors, both ways; seeds make their contents.

    ``corrupt``: the other side is to answer with one byte changed, which must be found here.
    """

    shape: tuple[int, ...]
    use: Use
    seed: int
    reply_seed: int
    content: Content = "pattern"
    corrupt: bool = False
    device: Device = "cpu"

    @property
    def nbytes(self) -> int:
        count = 4
        for side in self.shape:
            count *= side
        return count

    def plain(self) -> dict[str, Any]:
        """As a dict of plain values, for peers that carry nothing else."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Order:
        plain: Any = {**values, "shape": tuple(values["shape"])}
        return cls(**plain)


def make(order: Order, *, reply: bool = False, into: Any = None) -> Any:
    """A fresh private float32 tensor of the order's shape and contents (those of the reply, if asked).

    ``into``: an uninitialized tensor of the CPU to fill instead. On a GPU all is there when this returns.
    """
    import torch

    tensor: Any = torch.empty(order.shape, dtype=torch.float32) if into is None else into
    seed = order.reply_seed if reply else order.seed
    if order.content == "picture":
        _fill_picture(tensor.numpy(), seed)
    else:
        _fill_pattern(_words(tensor), seed)
    if reply and order.corrupt:
        tensor.numpy().reshape(-1).view(np.uint8)[-1] ^= 0x55
    if order.device == "cpu":
        return tensor
    placed = tensor.to(order.device)
    getattr(torch, order.device).synchronize()
    return placed


def use(tensor: Any, how: Use) -> int:
    """Use the tensor as the order says; the number is `expected_use`'s where all has come."""
    if how == "none":
        return 0
    if not tensor.is_cpu:
        return use_by_torch(tensor, how)
    words = _words(tensor)
    return int((words[::_PAGE_WORDS] if how == "touch" else words).sum(dtype=np.uint64))


def use_by_torch(tensor: Any, how: Use) -> int:
    """As `use`, by torch on the tensor's own device; it has been done when this returns."""
    import torch

    words = tensor.reshape(-1).view(torch.int64)
    return int((words[::_PAGE_WORDS] if how == "touch" else words).sum()) & _MASK


def expected_use(order: Order, *, reply: bool = False) -> int | None:
    """What `use` of the right contents gives; None where only the full check can tell."""
    if order.content == "picture":
        return None
    count = order.nbytes // 8
    seed = order.reply_seed if reply else order.seed
    if order.use == "none":
        return 0
    stamped = int(_stamps(-(-count // _PAGE_WORDS), seed).sum(dtype=np.uint64))
    if order.use == "touch":
        return stamped
    whole, rest = divmod(count, _BLOCK_WORDS)
    return (_noise_sum(_BLOCK_WORDS) * whole + _noise_sum(rest) + stamped) & _MASK


def to_tensor(array: Any) -> Any:
    """A tensor over a numpy array's memory."""
    import torch

    from_numpy: Any = torch.from_numpy  # whose stub is unknown in part
    return from_numpy(array)


def as_tensor(buffer: Any, shape: Sequence[int]) -> Any:
    """A float32 tensor over the first bytes of any buffer."""
    return to_tensor(np.frombuffer(buffer, np.float32, math.prod(shape)).reshape(shape))


def problem_of(tensor: Any, order: Order, *, reply: bool = False) -> str:
    """What is wrong with a tensor that has come, empty where every byte is as it was sent."""
    seed = order.reply_seed if reply else order.seed
    if tuple(tensor.shape) != order.shape or str(tensor.dtype) != "torch.float32":
        return f"expected float32 {order.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
    if tensor.device.type != order.device:
        return f"expected a tensor on {order.device}, got one on {tensor.device}"
    tensor = tensor.cpu()
    if order.content == "picture":
        return _picture_problem(tensor.numpy(), seed)
    words = _words(tensor)
    pages = -(-words.size // _PAGE_WORDS)
    if not np.array_equal(words[::_PAGE_WORDS], _stamps(pages, seed)):
        return "pages are missing, or of another message"
    noise, expected = _noise(), np.empty(_BLOCK_WORDS, np.uint64)
    for start in range(0, words.size, _BLOCK_WORDS):
        part = words[start : start + _BLOCK_WORDS]
        np.copyto(expected[: part.size], noise[: part.size])
        expected[: part.size : _PAGE_WORDS] = part[::_PAGE_WORDS]
        if not np.array_equal(part, expected[: part.size]):
            return f"bytes {start * 8} to {(start + part.size) * 8} differ from what was sent"
    return ""


def _words(tensor: Any) -> Any:
    return tensor.numpy().reshape(-1).view(np.uint64)


@lru_cache(maxsize=1)
def _noise() -> Words:
    """One MiB of float32 values from 0 to 1, as words; the stamped ones are 0."""
    generator = np.random.default_rng(20240607)
    words: Words = _words(to_tensor(generator.random(_BLOCK_WORDS * 2, dtype=np.float32)))
    words[::_PAGE_WORDS] = 0
    return words


@lru_cache(maxsize=64)
def _noise_sum(count: int) -> int:
    return int(_noise()[:count].sum(dtype=np.uint64))


def _stamps(pages: int, seed: int) -> Words:
    first = np.uint64((seed * _STEP) & (_MASK >> 1))
    stamps: Words = np.arange(1, pages + 1, dtype=np.uint64) + first
    return stamps


def _fill_pattern(words: Words, seed: int) -> None:
    noise = _noise()
    for start in range(0, words.size, _BLOCK_WORDS):
        part = words[start : start + _BLOCK_WORDS]
        np.copyto(part, noise[: part.size])
    words[::_PAGE_WORDS] = _stamps(-(-words.size // _PAGE_WORDS), seed)


@lru_cache(maxsize=2)
def _photograph(height: int, width: int) -> Pixels:
    """The demo's photograph in that size: what PNG makes of noise would be no fair measure."""
    from importlib.resources import as_file, files

    from PIL import Image

    with as_file(files("legion_shm") / "demo_data" / "coffee.jpg") as path, Image.open(path) as picture:
        resized: Any = picture.convert("RGB").resize((width, height))
    return np.asarray(resized, dtype=np.uint8)


def _marks(frame: int, seed: int) -> npt.NDArray[np.uint8]:
    """A square of one colour in each frame's corner says which message it is of."""
    number = (seed * 31 + frame * 7) % (1 << 24)
    return np.array([number & 255, (number >> 8) & 255, number >> 16], dtype=np.uint8)


def _fill_picture(images: npt.NDArray[np.float32], seed: int) -> None:
    photograph = _photograph(images.shape[1], images.shape[2]).astype(np.float32) / 255
    for frame, image in enumerate(images):
        image[...] = photograph
        image[:_PICTURE_SIDE, :_PICTURE_SIDE] = _marks(frame, seed).astype(np.float32) / 255


def _picture_problem(images: npt.NDArray[np.float32], seed: int) -> str:
    for frame, image in enumerate(images):
        expected = _photograph(images.shape[1], images.shape[2]).copy()
        expected[:_PICTURE_SIDE, :_PICTURE_SIDE] = _marks(frame, seed)
        if not np.array_equal(np.rint(image * 255).astype(np.uint8), expected):
            return f"frame {frame} is not the picture that was sent"
    return ""
