"""Values on the command line: from what was typed, or a file, to what a job takes, and back.

Owns the kinds of files and their meaning, and that an output file is there whole or not at all. Raises
click's errors alone: UsageError for what can be known before a job runs, ClickException for a result
that does not fit its file. It knows neither jobs nor workflows.

    png, jpg, webp, bmp, tiff   IMAGE [B,H,W,3] float32 0..1      back: IMAGE or MASK [B,H,W], 8 bits
    npy                         tensor (numpy array where torch lacks the dtype)
    safetensors                 dict of tensors                   back: a tensor as "value", or a dict
    json, txt                   what it says                      back: as JSON, as text
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import click

__all__ = ["Destination", "describe", "is_array", "json_form", "plan_output", "read_image", "read_input", "write_output"]

Kind = Literal["image", "npy", "safetensors", "json", "txt"]

_KINDS: dict[str, Kind] = {
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
_IMAGE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {"compress_level": 4}),  # as ComfyUI's SaveImage
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"quality": 95}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
}
_WITHOUT_ALPHA = {"JPEG", "BMP"}
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
    if "\n" not in text and Path(text).suffix.lower() in _KINDS:
        if not os.path.lexists(text):
            raise click.UsageError(f"there is no file {text!r}; write 'str:{text}' if the text itself is meant")
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
    kind = _KINDS.get(path.suffix.lower())
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
    return ", ".join(_KINDS)


def _article(kind: Kind) -> str:
    return {"image": "an image", "json": "JSON", "txt": "text"}.get(kind, f"a .{kind} file")


def read_image(path: str | os.PathLike[str]) -> Any:
    """An image file as IMAGE ``[B,H,W,3]`` float32 0..1, upright (EXIF), without alpha, as LoadImage gives it.

    B is the number of frames of the first one's size. Raises OSError, ValueError or SyntaxError.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps, ImageSequence

    frames: list[Any] = []
    try:
        with Image.open(path) as opened:
            for frame in ImageSequence.Iterator(opened):
                upright = ImageOps.exif_transpose(frame)
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
    return torch.from_numpy(np.stack(frames))


def _read_npy(path: Path) -> Any:
    import numpy as np
    import torch

    array: Any = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays (.npz)")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return torch.from_numpy(native)
    except TypeError:  # a dtype that torch lacks: text, dates, structured
        return native


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(str(error)) from error


# --- out ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Destination:
    """Where an output goes: ``path`` is None for standard output, as JSON."""

    path: Path | None
    kind: Kind


def plan_output(text: str) -> Destination:
    """Where ``text`` leads, checked as far as it can be before there is a value."""
    if text == "-":
        return Destination(None, "json")
    path = Path(text)
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise click.UsageError(
            f"{text!r}: the extension {path.suffix!r} is not known; known are {_known()}, or - for standard output"
        )
    folder = path.parent
    if not folder.is_dir():
        raise click.UsageError(f"{text!r}: there is no folder {str(folder)!r}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise click.UsageError(f"{text!r}: the folder {str(folder)!r} can't be written to")
    if path.exists() and not path.is_file():
        raise click.UsageError(f"{text!r} is there already and is not a file")
    return Destination(path, kind)


def write_output(value: object, destination: Destination) -> list[Path]:
    """Write a value; gives the files, several for a batch of images (``out_00001.png``, ...).

    Each file is written beside its place first and then moved there.
    """
    path = destination.path
    if path is None:
        click.echo(json.dumps(json_form(value), ensure_ascii=False))
        return []
    try:
        if destination.kind == "image":
            return _write_images(value, path)
        with _replacing(path) as part:
            if destination.kind == "npy":
                _write_npy(value, part)
            elif destination.kind == "safetensors":
                _write_safetensors(value, part)
            elif destination.kind == "json":
                part.write_text(json.dumps(json_form(value), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            else:
                part.write_text(_text_form(value), encoding="utf-8", newline="")
    except _Unfit as error:
        raise click.ClickException(f"{path}: {error}") from None
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror or error}") from error
    return [path]


class _Unfit(Exception):
    """The value can't be written in that format."""


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside the target to write to, moved onto it when that went well. Links are followed."""
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{secrets.token_hex(6)}.part")
    try:
        yield part
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _write_images(value: object, path: Path) -> list[Path]:
    pictures = list(_pictures(value))
    if not pictures:
        raise _Unfit("the batch is empty, there is no image to write")
    paths = [path]
    if len(pictures) > 1:
        paths = [path.with_name(f"{path.stem}_{number:05}{path.suffix}") for number in range(1, len(pictures) + 1)]
    name, options = _IMAGE_FORMATS[path.suffix.lower()]
    for picture, target in zip(pictures, paths, strict=True):
        if picture.mode == "RGBA" and name in _WITHOUT_ALPHA:
            picture = picture.convert("RGB")
        with _replacing(target) as part, open(part, "wb") as file:
            picture.save(file, format=name, **options)
    return paths


def _pictures(value: object) -> Iterator[Any]:
    """8-bit PIL images of an IMAGE, a MASK, a single ``[H,W]`` plane, or a list of those."""
    from PIL import Image

    if isinstance(value, (list, tuple)):
        for item in cast("Sequence[object]", value):
            yield from _pictures(item)
        return
    if not is_array(value):
        raise _Unfit(f"{_name(value)} is not an image; write it as .json, .txt or .safetensors")
    planes = _bytes_of(value)
    shape = tuple(planes.shape)
    if planes.ndim == 2:
        planes = planes[None]
    if planes.ndim == 4 and shape[3] == 1:
        planes = planes[..., 0]
    if not (planes.ndim == 3 or (planes.ndim == 4 and shape[3] in (3, 4))):
        raise _Unfit(
            f"a tensor of shape {list(shape)} is not an image: expected IMAGE [B,H,W,C] with 1, 3 or 4 channels "
            "or MASK [B,H,W]; write it as .npy or .safetensors"
        )
    if 0 in planes.shape[1:3]:
        raise _Unfit(f"an image of shape {list(shape)} has no pixels")
    for plane in planes:
        yield Image.fromarray(plane)


def _bytes_of(value: Any) -> Any:
    """A tensor's or array's values as uint8: floats from 0..1, rounded; not-a-number becomes 0."""
    import numpy as np

    try:
        array = _numpy(value if isinstance(value, np.ndarray) or not value.is_floating_point() else value.float())
    except TypeError as error:
        raise _Unfit(f"{_name(value)} is not an image: {error}") from None
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind != "f":
        raise _Unfit(f"{_name(value)} is not an image: expected floats from 0 to 1; write it as .npy")
    scaled = np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0).clip(0.0, 1.0) * 255.0
    return np.rint(scaled).astype(np.uint8)


def _numpy(value: Any) -> Any:
    """A torch tensor as a numpy array; TypeError where numpy lacks the dtype. Arrays as they are."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return value
    return value.detach().cpu().resolve_conj().resolve_neg().numpy()


def _write_npy(value: object, part: Path) -> None:
    import numpy as np

    try:
        array = _numpy(value) if is_array(value) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise _Unfit(f"{_name(value)} does not fit into .npy ({error}); write it as .safetensors") from None
    if array.dtype.hasobject:
        raise _Unfit(f"{_name(value)} does not fit into .npy; write it as .json or .safetensors")
    with open(part, "wb") as file:
        np.save(file, array, allow_pickle=False)


def _write_safetensors(value: object, part: Path) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    items = cast("Mapping[object, object]", value) if isinstance(value, Mapping) else {"value": value}
    tensors: dict[str, Any] = {}
    for key, item in items.items():
        tensor: Any = item
        if isinstance(item, np.ndarray):
            try:
                tensor = torch.from_numpy(np.ascontiguousarray(item))
            except TypeError:
                tensor = None
        if not isinstance(tensor, torch.Tensor) or not isinstance(key, str):
            where = f"its item {key!r} is {_name(item)}" if isinstance(value, Mapping) else f"it is {_name(value)}"
            raise _Unfit(f".safetensors holds a tensor or a dict of tensors by name, but {where}")
        # A copy of each: the format refuses tensors that share memory.
        tensors[key] = tensor.detach().cpu().contiguous().clone()
    try:
        save_file(tensors, part)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _Unfit(f"does not fit into .safetensors: {error}") from None


def _text_form(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)) or value is None:
        return f"{value}\n"
    return json.dumps(json_form(value), ensure_ascii=False, indent=2) + "\n"


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
                f"{_name(value)} is too large for JSON; write it as .npy, .safetensors or an image"
            )
        if not array.dtype.is_complex if hasattr(array.dtype, "is_complex") else array.dtype.kind in "biufUM":
            return json_form(array.tolist())
    if isinstance(value, Mapping):
        return {str(key): json_form(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_form(item) for item in cast("Sequence[object]", value)]
    raise click.ClickException(f"{_name(value)} has no form in JSON; write it as .npy or .safetensors")


# --- both -----------------------------------------------------------------------------------------


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
        sequence = list(cast("Sequence[object]", value))
        return {
            "type": type(value).__name__,
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


def _name(value: object) -> str:
    if is_array(value):
        facts = describe(value)
        return f"a {facts['type']} of {facts['dtype']} {facts['shape']}"
    return f"a {type(value).__name__}"
