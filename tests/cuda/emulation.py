"""A GPU that is none: an emulated CUDA driver, loaded as the real one is, and CPU tensors for the GPU's.

In a process where `EmulatedDevices` stand for torch's, every tensor counts as one of the emulated GPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from legion_shm.transport.cuda_driver import DRIVER_VARIABLE, cuda_driver
from tests import needs

__all__ = ["UUID", "EmulatedDevices", "EmulatedGpu", "emulated_gpu"]

UUID = "6e3a1c58-90d2-4f7b-8a41-5d0c2b7f9e13"
SOURCE = Path(__file__).with_name("fake_cuda.c")
FOLDER = "FAKE_CUDA_DIR"
HIDDEN = "FAKE_CUDA_HIDDEN"
TORCH_REFUSES = "FAKE_CUDA_TORCH_REFUSES"

needs_compiler = [needs.linux, pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")]


@functools.cache
def _library() -> Path:
    built = Path(tempfile.mkdtemp(prefix="fake-cuda-")) / "libfakecuda.so"
    subprocess.run(
        ["cc", "-O1", "-shared", "-fPIC", "-o", built, SOURCE, "-lpthread"], check=True, timeout=60
    )
    return built


class EmulatedDevices:
    """CPU tensors count as the GPU's. ``used`` is whether this process uses it already."""

    def __init__(self, *, used: bool = True) -> None:
        self.used = used
        self.synchronized = 0

    def identify(self, device: Any) -> tuple[str, str] | None:
        assert device.type == "cpu"
        return "cuda", UUID

    def locate(self, kind: str, uuid: str) -> Any:
        import torch

        return torch.device("cpu") if (kind, uuid) == ("cuda", UUID) and HIDDEN not in os.environ else None

    def initialized(self) -> bool:
        return self.used

    def bytes_at(self, device: Any, address: int, nbytes: int) -> Any:
        import torch

        if TORCH_REFUSES in os.environ:
            raise RuntimeError("torch makes no tensor of it")
        return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)

    def synchronize(self, tensor: Any) -> None:
        self.synchronized += 1


class EmulatedGpu:
    """The emulated driver's folder, which all processes of a test share, and what it shows."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder, self.library = folder, library
        self.devices = EmulatedDevices()

    def use(self) -> None:
        """Let this process have a context on the device, as one that uses it has."""
        context = ctypes.c_void_p()
        driver = ctypes.CDLL(str(self.library))
        assert driver.cuInit(0) == 0
        assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0

    def fail(self, *lines: str) -> None:
        """``CALL CODE`` each: these calls fail from now on, in every process."""
        (self.folder / "fail").write_text("".join(f"{line}\n" for line in lines))

    def limit(self, nbytes: int) -> None:
        """What each process may allocate."""
        (self.folder / "limit").write_text(str(nbytes))

    def _named(self, start: str) -> list[str]:
        return sorted(path.name for path in self.folder.glob(f"{start}-*"))

    @property
    def allocations(self) -> list[str]:
        return self._named("memory")

    @property
    def opened(self) -> list[str]:
        """What is open in processes that live, or were killed."""
        return self._named("open")

    @property
    def contexts(self) -> list[int]:
        """The processes that ever had a context."""
        return [int(name.rpartition("-")[2]) for name in self._named("context")]

    @property
    def initialized(self) -> list[int]:
        """The processes that ever initialized the driver: their forks can't use it any more."""
        return [int(name.rpartition("-")[2]) for name in self._named("init")]

    @property
    def violations(self) -> str:
        path = self.folder / "violation"
        return path.read_text() if path.exists() else ""


@contextmanager
def emulated_gpu(folder: Path, *, used: bool = True) -> Generator[EmulatedGpu]:
    """The emulation for this process and those it starts; ``used``: this process has a context already."""
    from legion_shm.transport.torch_devices import use_devices

    library = folder / "libfakecuda.so"  # a file of its own: the same one would be loaded only once
    shutil.copy(_library(), library)
    gpu = EmulatedGpu(folder, library)
    (folder / "devices").write_text(uuid.UUID(UUID).hex + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        patch.setenv(DRIVER_VARIABLE, str(library))
        cuda_driver.cache_clear()
        gpu.devices.used = used
        if used:
            gpu.use()
        use_devices(gpu.devices)
        try:
            yield gpu
        finally:
            use_devices(None)
            cuda_driver.cache_clear()
