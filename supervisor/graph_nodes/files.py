"""LoadImage, SaveImage and PreviewImage.

Owns the way between image files and IMAGE tensors. It reads only from the input directory (or, marked
``[output]``, from the output directory) and writes only PNG files into the output directory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, PngImagePlugin

from legion_shm import job_context
from legion_shm.supervisor.graph_nodes import directories
from legion_shm.supervisor.graph_nodes.pictures import to_picture, to_pixels

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "LoadImage", "PreviewImage", "SaveImage"]

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_COMPRESS_LEVEL = 4
_NAMES_TRIED = 1000
"""How many taken counters are passed over: as many writers at once would be needed to run out."""


class LoadImage:
    """An image file as IMAGE ``[B,H,W,3]`` float32 0..1 and MASK ``[B,H,W]``, which is 1 - alpha.

    A file without alpha has a mask of 64x64 zeros, as in ComfyUI.
    """

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load_image"
    WRITES_SHARED = False
    CATEGORY = "image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        folder = directories.input_directory()
        names: list[str] = []
        if folder.is_dir():
            names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file())
        return {"required": {"image": (names, {"image_upload": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:  # noqa: N802 - the protocol's name
        try:
            found = directories.find_file(image).is_file()
        except ValueError as error:
            return str(error)
        return found or f"there is no image file {image!r} in {directories.input_directory()}"

    @classmethod
    def IS_CHANGED(cls, image: str) -> str:  # noqa: N802 - the protocol's name
        return hashlib.sha256(directories.find_file(image).read_bytes()).hexdigest()

    def load_image(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
        images: list[torch.Tensor] = []
        masks: list[torch.Tensor] = []
        size: tuple[int, int] | None = None
        opened: Image.Image = Image.open(directories.find_file(image))
        with opened:
            for frame in _frames(opened):
                size = size or frame.size
                if frame.size != size:
                    continue
                pixels, mask = _to_tensors(frame)
                images.append(pixels)
                masks.append(mask)
        if len({mask.shape for mask in masks}) > 1:
            masks = [
                m if m.shape == p.shape[:2] else torch.zeros(p.shape[:2])
                for p, m in zip(images, masks, strict=True)
            ]
        return torch.stack(images), torch.stack(masks)


def _frames(opened: Image.Image) -> Iterator[Image.Image]:
    for index in range(int(getattr(opened, "n_frames", 1))):
        opened.seek(index)
        yield ImageOps.exif_transpose(opened)


def _to_tensors(frame: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    if frame.mode.startswith("I"):
        grey = to_pixels(frame, full=65535.0).clamp(0, 1)
        return grey.expand(-1, -1, 3), torch.zeros((64, 64))
    if "transparency" in frame.info:
        frame = frame.convert("RGBA")
    mask = torch.zeros((64, 64))
    if "A" in frame.getbands():
        mask = 1.0 - to_pixels(frame.getchannel("A"))[..., 0]
    return to_pixels(frame.convert("RGB")), mask


class SaveImage:
    """Writes each image of a batch as ``<prefix>_00001_.png``, counting on from the files that are there."""

    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "save_images"
    WRITES_SHARED = False
    OUTPUT_NODE = True
    CATEGORY = "image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {
            "required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(
        self,
        images: torch.Tensor,
        filename_prefix: str = "ComfyUI",
        prompt: Mapping[str, object] | None = None,
        extra_pnginfo: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        root = directories.output_directory()
        prefix = _fill_in(filename_prefix, width=int(images.shape[2]), height=int(images.shape[1]))
        folder = directories.inside(root, os.path.dirname(os.path.normpath(prefix)))
        stem = os.path.basename(os.path.normpath(prefix))
        if directories.inside(folder, stem) == folder:
            raise ValueError(f"filename_prefix {filename_prefix!r} names no file; end it in a name")
        folder.mkdir(parents=True, exist_ok=True)
        metadata = PngImagePlugin.PngInfo()
        for key, value in {"prompt": prompt, **(extra_pnginfo or {})}.items():
            if value is not None:
                metadata.add_text(key, json.dumps(value, default=str))
        subfolder = os.path.relpath(folder, os.path.realpath(root))
        saved: list[dict[str, str]] = []
        counter = _next_counter(folder, stem)
        for index, image in enumerate(images):
            job_context.check_cancelled()
            buffer = io.BytesIO()
            to_picture(image).save(buffer, format="PNG", pnginfo=metadata, compress_level=_COMPRESS_LEVEL)
            name, counter = _write_new(folder, stem.replace("%batch_num%", str(index)), counter, buffer)
            saved.append(
                {"filename": name, "subfolder": "" if subfolder == "." else subfolder, "type": "output"}
            )
        return {"ui": {"images": saved}, "result": (images,)}


def _fill_in(prefix: str, *, width: int, height: int) -> str:
    if "%" not in prefix:
        return prefix
    now = time.localtime()
    values = {
        "width": str(width),
        "height": str(height),
        "year": str(now.tm_year),
        "month": f"{now.tm_mon:02}",
        "day": f"{now.tm_mday:02}",
        "hour": f"{now.tm_hour:02}",
        "minute": f"{now.tm_min:02}",
        "second": f"{now.tm_sec:02}",
    }
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", value)
    return prefix


def _next_counter(folder: Path, stem: str) -> int:
    start = f"{os.path.normcase(stem)}_"
    counters = [0]
    for name in os.listdir(folder):
        if os.path.normcase(name).startswith(start):
            digits = name[len(start) :].split(".")[0].split("_")[0]
            if digits.isdecimal():
                counters.append(int(digits))
    return max(counters) + 1


def _write_new(folder: Path, stem: str, counter: int, buffer: io.BytesIO) -> tuple[str, int]:
    """Write under the first free counter from ``counter``; gives the name and the counter after it."""
    for number in range(counter, counter + _NAMES_TRIED):
        name = f"{stem}_{number:05}_.png"
        try:
            with open(folder / name, "xb") as file:
                file.write(buffer.getbuffer())
        except FileExistsError:
            continue
        return name, number + 1
    raise FileExistsError(f"{folder} has no free name {stem}_{counter:05}_.png or after; use another prefix")


class PreviewImage:
    """Sends the images as previews of the job. ComfyUI's writes temporary files; this one writes none."""

    RETURN_TYPES = ()
    FUNCTION = "preview_images"
    WRITES_SHARED = False
    OUTPUT_NODE = True
    CATEGORY = "image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {"images": ("IMAGE",)}}

    @classmethod
    def IS_CHANGED(cls, images: object) -> float:  # noqa: N802 - the protocol's name
        return float("nan")

    def preview_images(self, images: torch.Tensor) -> tuple[()]:
        job_context.preview(images)
        return ()


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "LoadImage": LoadImage,
    "PreviewImage": PreviewImage,
    "SaveImage": SaveImage,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "LoadImage": "Load Image",
    "PreviewImage": "Preview Image",
    "SaveImage": "Save Image",
}
