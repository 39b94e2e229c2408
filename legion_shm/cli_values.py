"""Values on the command line: from what was typed, or a file, to what a job takes; their form in JSON.

Owns the kinds of files and their meaning; `cli_outputs` writes them. Raises click's errors alone. It knows
neither jobs nor workflows.

    png, jpg, webp, bmp, tiff   IMAGE [B,H,W,3] float32 0..1      back: IMAGE or MASK [B,H,W], 8 bits
    npy                         tensor (numpy array where torch lacks the dtype)
    safetensors                 dict of tensors                   back: a tensor as "value", or a dict
    json, txt                   what it says                      back: as JSON, as text
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import click

__all__ = [
    "FILE_KINDS",
    "FileKind",
    "describe",
    "is_array",
    "json_form",
    "name_of",
    "read_image",
    "read_input",
    "tensor_of",
]

FileKind = Literal["image", "npy", "safetensors", "json", "txt"]

FILE_KINDS: dict[str, FileKind] = {
    ".png": "image",
    ".jpg": "image",
    ".jpeg": "image",
    ".webp": "image",
    ".bmp": "image",
    ".tif": "image",
    ".tiff": "image",
    ".npy": "npy",
    ".safetensors": "safetensors",
    ".json": "json",
    ".txt": "txt",
}
_JSON_ELEMENTS_MAX = 1_000_000
"""Elements of one tensor in JSON: some 20 MB of text, beyond which nobody reads it."""
_SHOWN_ITEMS = 50
_SHOWN_TEXT = 1000


# --- in -------------------------------------------------------------------------------------------


def read_input(text: str) -> object:
    """The value that ``text`` stands for.

    In this order: ``str:...`` and ``json:...`` are what they say; ``@path`` is a file; a name with the
    extension of a known kind is a file; what parses as JSON is that; anything else is the text itself.
    """
    if text.startswith("str:"):
        return text[len("str:") :]
    if text.startswith("json:"):
        try:
            return _parse_json(text[len("json:") :])
        except ValueError as error:
            raise click.UsageError(f"not valid JSON: {error}") from None
    if text.startswith("@"):
        return _read_file(Path(text[1:]))
    if "\n" not in text and Path(text).suffix.lower() in FILE_KINDS:
        if not os.path.lexists(text):
            raise click.UsageError(
                f"there is no file {text!r}; write 'str:{text}' if the text itself is meant"
            )
        return _read_file(Path(text))
    try:
        return _parse_json(text)
    except ValueError:
        return text


def _parse_json(text: str) -> object:
    """Raises ValueError; NaN and Infinity are no JSON."""

    def refuse(name: str) -> object:
        raise ValueError(f"{name} is not JSON")

    try:
        value: object = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _read_file(path: Path) -> object:
    kind = FILE_KINDS.get(path.suffix.lower())
    if kind is None:
        raise click.UsageError(f"{path}: the extension {path.suffix!r} is not known; known are {_known()}")
    if not path.exists():
        raise click.UsageError(f"there is no file {str(path)!r}")
    if not path.is_file():
        raise click.UsageError(f"{path} is not a file")
    try:
        if kind == "image":
            return read_image(path)
        if kind == "npy":
            return _read_npy(path)
        if kind == "safetensors":
            return _read_safetensors(path)
        text = path.read_text(encoding="utf-8")
        return _parse_json(text) if kind == "json" else text
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise click.UsageError(f"cannot read {path} as {_article(kind)}: {error}") from error


def _known() -> str:
    return ", ".join(FILE_KINDS)


def _article(kind: FileKind) -> str:
    return {"image": "an image", "json": "JSON", "txt": "text"}.get(kind, f"a .{kind} file")


def read_image(path: str | os.PathLike[str]) -> Any:
    """An image file as IMAGE ``[B,H,W,3]`` float32 0..1: upright (EXIF), without alpha, as LoadImage's.

    B is the number of frames of the first one's size. Raises OSError, ValueError or SyntaxError.
    """
    import numpy as np
    from PIL import Image, ImageOps, ImageSequence

    frames: list[Any] = []
    try:
        with cast("Any", Image.open(path)) as opened:
            for frame in cast("Iterator[Any]", ImageSequence.Iterator(opened)):
                upright: Any = ImageOps.exif_transpose(frame)
                if upright.mode.startswith("I"):  # 16 bits, which Pillow also hands out as 32
                    grey = np.asarray(upright).astype(np.float32) / 65535.0
                    pixels = np.stack([grey.clip(0.0, 1.0)] * 3, axis=-1)
                elif upright.mode == "F":
                    pixels = np.stack([np.asarray(upright).astype(np.float32)] * 3, axis=-1)
                else:
                    pixels = np.asarray(upright.convert("RGB")).astype(np.float32) / 255.0
                if not frames or frames[0].shape == pixels.shape:
                    frames.append(pixels)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    return tensor_of(np.stack(frames))


def _read_npy(path: Path) -> Any:
    import numpy as np

    try:
        array: Any = np.load(path, allow_pickle=False)
    except ValueError as error:  # numpy takes any other file for a pickle, and advises to load it
        if "pickle" not in str(error):
            raise
        raise ValueError("it is none, or holds Python objects, which are not read") from error
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays (.npz)")
    native: Any = cast("Any", array).astype(cast("Any", array).dtype.newbyteorder("="), copy=False)
    tensor = tensor_of(native)
    return native if tensor is None else tensor


def tensor_of(array: Any) -> Any | None:
    """A numpy array as a tensor over the same memory; None where torch lacks the dtype (text, dates, ...)."""
    import torch as torch_module

    torch = cast("Any", torch_module)
    try:
        return torch.from_numpy(array)
    except TypeError:
        return None


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors import torch as safetensors_torch

    try:
        return dict(cast("Any", safetensors_torch).load_file(path))
    except SafetensorError as error:
        raise ValueError(str(error)) from error


# --- what a value is ----------------------------------------------------------------------------


def json_form(value: object) -> object:
    """A value as JSON knows it: tensors as nested lists, numbers that JSON lacks as null.

    Raises ClickException for what has no such form.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_array(value):
        array = cast("Any", value)
        if math.prod(array.shape) > _JSON_ELEMENTS_MAX:
            raise click.ClickException(
                f"{name_of(value)} is too large for JSON; write it as .npy, .safetensors or an image"
            )
        complex_torch = getattr(array.dtype, "is_complex", False)
        if not complex_torch and getattr(array.dtype, "kind", "f") in "biufU":
            return json_form(array.tolist())
    if isinstance(value, Mapping):
        return {str(key): json_form(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_form(item) for item in cast("Iterable[object]", value)]
    raise click.ClickException(f"{name_of(value)} has no form in JSON; write it as .npy or .safetensors")


def is_array(value: object) -> bool:
    """Whether it is a torch tensor or a numpy array; imports neither."""
    return type(value).__module__.partition(".")[0] in ("torch", "numpy") and hasattr(value, "dtype")


def describe(value: object) -> dict[str, Any]:
    """What a value is, in a few words of JSON: type, dtype, shape, bytes; short values themselves."""
    if is_array(value):
        array = cast("Any", value)
        return {
            "type": "tensor" if type(value).__module__.startswith("torch") else "array",
            "dtype": str(array.dtype).removeprefix("torch."),
            "shape": [int(side) for side in array.shape],
            "bytes": int(array.nbytes),
        }
    if isinstance(value, Mapping):
        items = list(cast("Mapping[object, object]", value).items())
        return {
            "type": "dict",
            "length": len(items),
            "items": {str(key): describe(item) for key, item in items[:_SHOWN_ITEMS]},
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        sequence = list(cast("Iterable[object]", value))
        return {
            "type": type(cast("object", value)).__name__,
            "length": len(sequence),
            "items": [describe(item) for item in sequence[:_SHOWN_ITEMS]],
        }
    if isinstance(value, str):
        return {"type": "str", "length": len(value), "value": value[:_SHOWN_TEXT]}
    if value is None or isinstance(value, (bool, int, float)):
        return {"type": type(value).__name__, "value": json_form(value)}
    if isinstance(value, (bytes, bytearray)):
        return {"type": type(value).__name__, "length": len(value)}
    return {"type": type(value).__name__}


def name_of(value: object) -> str:
    """What to call a value in a message: "a tensor of float32 [1, 2]", "a dict"."""
    if is_array(value):
        facts = describe(value)
        return f"a {facts['type']} of {facts['dtype']} {facts['shape']}"
    return f"a {type(value).__name__}"
