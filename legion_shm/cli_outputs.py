"""A job's outputs as files: each is there whole or not at all.

Owns what can be known of a destination before the job runs (UsageError), the writing, and the refusal of
a value that does not fit its file (ClickException). It knows neither jobs nor workflows.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click

from legion_shm.cli_values import FILE_KINDS, FileKind, is_array, json_form, name_of, tensor_of

__all__ = ["Destination", "plan_output", "write_output"]

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


@dataclass(frozen=True)
class Destination:
    """Where an output goes: ``path`` is None for standard output, as JSON."""

    path: Path | None
    kind: FileKind


def plan_output(text: str) -> Destination:
    """Where ``text`` leads, checked as far as it can be before there is a value."""
    if text == "-":
        return Destination(None, "json")
    path = Path(text)
    kind = FILE_KINDS.get(path.suffix.lower())
    if kind is None:
        raise click.UsageError(
            f"{text!r}: the extension {path.suffix!r} is not known; known are {', '.join(FILE_KINDS)}, "
            "or - for standard output"
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
                part.write_text(
                    json.dumps(json_form(value), ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
                )
            else:
                part.write_text(_text_form(value), encoding="utf-8", newline="")
    except click.ClickException as error:
        raise click.ClickException(f"{path}: {error.message}") from None
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror or error}") from error
    return [path]


def _unfit(message: str) -> click.ClickException:
    return click.ClickException(message)


@contextlib.contextmanager
def _replacing(path: Path) -> Generator[Path]:
    """A name beside the target to write to, moved onto it when that went well. Links are followed."""
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{secrets.token_hex(6)}.part")
    try:
        with open(part, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield part
        os.chmod(part, mode)  # safetensors makes a file of its own, for this user alone
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _write_images(value: object, path: Path) -> list[Path]:
    pictures = list(_pictures(value))
    if not pictures:
        raise _unfit("the batch is empty, there is no image to write")
    paths = [path]
    if len(pictures) > 1:
        paths = [
            path.with_name(f"{path.stem}_{number:05}{path.suffix}") for number in range(1, len(pictures) + 1)
        ]
    name, options = _IMAGE_FORMATS[path.suffix.lower()]
    for picture, target in zip(pictures, paths, strict=True):
        opaque = picture.convert("RGB") if picture.mode == "RGBA" and name in _WITHOUT_ALPHA else picture
        with _replacing(target) as part, open(part, "wb") as file:
            opaque.save(file, format=name, **options)
    return paths


def _pictures(value: object) -> Iterator[Any]:
    """8-bit PIL images of an IMAGE, a MASK, a single ``[H,W]`` plane, or a list of those."""
    from PIL import Image

    if isinstance(value, (list, tuple)):
        for item in cast("Sequence[object]", value):
            yield from _pictures(item)
        return
    if not is_array(value):
        raise _unfit(f"{name_of(value)} is not an image; write it as .json, .txt or .safetensors")
    planes = _bytes_of(value)
    shape = tuple(planes.shape)
    if planes.ndim == 2:
        planes = planes[None]
    if planes.ndim == 4 and shape[3] == 1:
        planes = planes[..., 0]
    if not (planes.ndim == 3 or (planes.ndim == 4 and shape[3] in (3, 4))):
        raise _unfit(
            f"a tensor of shape {list(shape)} is not an image: expected IMAGE [B,H,W,C] with 1, 3 or 4 "
            "channels or MASK [B,H,W]; write it as .npy or .safetensors"
        )
    if 0 in planes.shape[1:3]:
        raise _unfit(f"an image of shape {list(shape)} has no pixels")
    for plane in planes:
        yield Image.fromarray(plane)


def _bytes_of(value: Any) -> Any:
    """A tensor's or array's values as uint8: floats from 0..1, rounded; not-a-number becomes 0."""
    import numpy as np

    floating: bool = hasattr(value, "is_floating_point") and value.is_floating_point()
    try:
        array = _numpy(value.float() if floating else value)
    except TypeError as error:
        raise _unfit(f"{name_of(value)} is not an image: {error}") from None
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind != "f":
        raise _unfit(f"{name_of(value)} is not an image of floats from 0 to 1; write it as .npy")
    scaled = np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0).clip(0.0, 1.0) * 255.0
    return np.rint(scaled).astype(np.uint8)


def _numpy(value: Any) -> Any:
    """A torch tensor as a numpy array; TypeError where numpy lacks the dtype. Arrays as they are."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return cast("Any", value)
    return value.detach().cpu().resolve_conj().resolve_neg().numpy()


def _write_npy(value: object, part: Path) -> None:
    import numpy as np

    try:
        array = _numpy(value) if is_array(value) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise _unfit(f"{name_of(value)} does not fit into .npy ({error}); write it as .safetensors") from None
    if array.dtype.hasobject:
        raise _unfit(f"{name_of(value)} does not fit into .npy; write it as .json or .safetensors")
    with open(part, "wb") as file:
        np.save(file, array, allow_pickle=False)


def _write_safetensors(value: object, part: Path) -> None:
    from safetensors import torch as safetensors_torch

    named = isinstance(value, Mapping)
    items = cast("Mapping[object, object]", value) if named else {"value": value}
    tensors: dict[str, Any] = {}
    for key, item in items.items():
        tensor = _tensor(item)
        if tensor is None or not isinstance(key, str):
            where = f"its item {key!r} is {name_of(item)}" if named else f"it is {name_of(value)}"
            raise _unfit(f".safetensors holds a tensor or a dict of tensors by name, but {where}")
        # A copy of each: the format refuses tensors that share memory.
        tensors[key] = tensor.detach().cpu().contiguous().clone()
    try:
        cast("Any", safetensors_torch).save_file(tensors, part)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _unfit(f"does not fit into .safetensors: {error}") from None


def _tensor(value: object) -> Any | None:
    import numpy as np

    if not is_array(value):
        return None
    return tensor_of(np.ascontiguousarray(cast("Any", value))) if isinstance(value, np.ndarray) else value


def _text_form(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)) or value is None:
        return f"{value}\n"
    return json.dumps(json_form(value), ensure_ascii=False, indent=2) + "\n"
