"""Files: safetensors and .npy in /dev/shm, and PNG as LegionPower and ComfyUI's SaveImage write it.

Settings: one file per message in a private folder in /dev/shm (the temporary folder where there is none), its
name over a Pipe, removed by the receiver. safetensors: ``save_file`` and ``load_file`` (which maps the file).
.npy: ``numpy.save`` and ``numpy.load(mmap_mode="c")``. PNG: 8 bits, Pillow, compress level 4, one file per
image of the batch, of a photograph rather than of noise, which PNG could not compress; without LegionPower's
polling.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from legion_shm.native_bench.payload import Content, to_tensor
from legion_shm.native_bench.peers.base import TIMEOUT_S, Peer, Session
from legion_shm.native_bench.peers.child import ChildSession, Link

__all__ = ["PEERS"]

_PNG_LEVEL = 4


class _FileLink(Link):
    """Files are named by a count; each end has names of its own."""

    def __init__(self, folder: str, near: Connection, far: Connection, child: bool) -> None:
        self._folder, self._mark = Path(folder), "b" if child else "a"
        self._ends = (near, far)
        self._connection = far if child else near
        self._count = 0
        self._came: list[str] = []

    @abstractmethod
    def _write(self, stem: Path, tensor: Any) -> list[str]: ...

    @abstractmethod
    def _read(self, paths: list[str]) -> Any: ...

    def send(self, tensor: Any) -> None:
        self._count += 1
        self._connection.send(self._write(self._folder / f"{self._mark}{self._count}", tensor))

    def receive(self) -> Any:
        if not self._connection.poll(TIMEOUT_S):
            raise TimeoutError(f"nothing came within {TIMEOUT_S:g} s")
        self._came = self._connection.recv()
        return self._read(self._came)

    def release(self) -> None:
        came, self._came = self._came, []
        for path in came:
            os.unlink(path)

    def close(self) -> None:
        for connection in self._ends:
            connection.close()


class _SafetensorsLink(_FileLink):
    def _write(self, stem: Path, tensor: Any) -> list[str]:
        from safetensors.torch import save_file

        path = f"{stem}.safetensors"
        save_file({"tensor": tensor}, path)
        return [path]

    def _read(self, paths: list[str]) -> Any:
        from safetensors.torch import load_file

        return load_file(paths[0])["tensor"]


class _NpyLink(_FileLink):
    def _write(self, stem: Path, tensor: Any) -> list[str]:
        path = f"{stem}.npy"
        np.save(path, tensor.numpy())
        return [path]

    def _read(self, paths: list[str]) -> Any:
        return to_tensor(np.asarray(np.load(paths[0], mmap_mode="c")))


class _PngLink(_FileLink):
    def _write(self, stem: Path, tensor: Any) -> list[str]:
        from PIL import Image

        paths: list[str] = []
        for number, image in enumerate(tensor):
            pixels = np.clip(255.0 * image.numpy(), 0, 255).round().astype(np.uint8)
            paths.append(f"{stem}_{number}.png")
            Image.fromarray(pixels).save(paths[-1], compress_level=_PNG_LEVEL)
        return paths

    def _read(self, paths: list[str]) -> Any:
        from PIL import Image

        images: list[Any] = []
        for path in paths:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")).astype(np.float32) / 255.0)
        return to_tensor(np.stack(images))


class FilePeer(Peer):
    def __init__(
        self,
        name: str,
        title: str,
        settings: str,
        link: Callable[..., Link],
        *,
        content: Content = "pattern",
        package: str | None = None,
    ) -> None:
        self.name, self.title, self.settings, self._link = name, title, settings, link
        self.content: Content = content
        self.package = package
        self.module = "PIL" if package == "pillow" else None

    def unfit(self, shape: tuple[int, ...]) -> str:
        if self.content == "picture" and (len(shape) != 4 or shape[-1] != 3):
            return "PNG holds images; this is none"
        return ""

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        folder = tempfile.mkdtemp(prefix="legion-bench-", dir=where)
        ends = multiprocessing.get_context("spawn").Pipe()
        return ChildSession(
            self._link, (folder, *ends), on_close=lambda: shutil.rmtree(folder, ignore_errors=True)
        )


PEERS: list[Peer] = [
    FilePeer(
        "safetensors",
        "safetensors in /dev/shm",
        "save_file and load_file, a file per message, name over a Pipe",
        _SafetensorsLink,
        package="safetensors",
    ),
    FilePeer(
        "npy",
        ".npy in /dev/shm",
        "numpy.save and numpy.load(mmap_mode='c'), a file per message, name over a Pipe",
        _NpyLink,
    ),
    FilePeer(
        "png",
        "PNG files, level 4 (8 bits)",
        "Pillow, compress_level=4, a file per image in /dev/shm, of a photograph; no polling",
        _PngLink,
        content="picture",
        package="pillow",
    ),
]
