"""The CUDA driver: the few calls that memory shared between processes on one GPU takes.

Owns the loading of ``libcuda.so.1`` and every call into it, by ctypes: torch has none of these calls for
memory that is not its own, cuda-bindings and cupy would be dependencies of hundreds of MB for twenty
functions, and a driver that was emulated for tests loads the same way. It starts no context: what asks for
one gets the device's primary context, torch's own, and the calling thread's current context is after each
call what it was before.

Each failure is a `CudaError` with the call, the error's name and its text. Devices are told apart by UUID.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import sys
import threading
import uuid as uuids
from collections.abc import Generator
from typing import Any

from legion_shm.errors import CudaError

__all__ = [
    "DRIVER_VARIABLE",
    "HANDLE_BYTES",
    "CudaDevice",
    "CudaDriver",
    "cuda_driver",
    "ipc_problem",
    "plain_uuid",
]

DRIVER_VARIABLE = "LEGION_CUDA_DRIVER"
"""Names another library than the system's, such as an emulation for tests."""

HANDLE_BYTES = 64
"""Of an IPC handle of memory (CU_IPC_HANDLE_SIZE)."""

_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS: the one flag there is, and it must be given
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: waits for no work of the program's own
_NAMES = (
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetUuid",
    "cuDevicePrimaryCtxGetState",
    "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuIpcCloseMemHandle",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuGetErrorName",
    "cuGetErrorString",
)


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * HANDLE_BYTES)]


def plain_uuid(text: str) -> str:
    """A device's UUID as it is compared: torch and the driver's tools write it in several ways."""
    return text.lower().removeprefix("gpu-").removeprefix("mig-")


def ipc_problem() -> str:
    """Why this system has no shared memory of a GPU; empty where it may have. Asks no driver."""
    if os.environ.get(DRIVER_VARIABLE):
        return ""
    if sys.platform != "linux":
        return f"the CUDA driver shares memory between processes on Linux alone, and this is {sys.platform}"
    if "microsoft" in platform.uname().release.lower():
        return "the CUDA driver of WSL shares no memory between processes"
    return ""


@functools.cache
def cuda_driver() -> CudaDriver:
    """This process's driver. Raises CudaError, each time anew, where there is none."""
    problem = ipc_problem()
    if problem:
        raise CudaError(problem)
    return CudaDriver(os.environ.get(DRIVER_VARIABLE) or "libcuda.so.1")


class CudaDriver:
    """The library, loaded and initialized: that opens no context and takes no memory of a device."""

    def __init__(self, library: str) -> None:
        self._known: dict[int, CudaDevice] = {}
        try:
            self._library = ctypes.CDLL(library)
            for name in _NAMES:
                getattr(self._library, name).restype = ctypes.c_int
        except (OSError, AttributeError) as error:
            raise CudaError(f"the CUDA driver could not be loaded: {error}") from error
        self.call("cuInit", ctypes.c_uint(0))

    def call(self, name: str, *arguments: Any) -> None:
        """Call the driver. Raises CudaError for anything but success."""
        result = int(getattr(self._library, name)(*arguments))
        if result:
            raise CudaError(f"{name}: {self._error(result)}")

    def _error(self, result: int) -> str:
        words: list[str] = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            if not getattr(self._library, name)(ctypes.c_int(result), ctypes.byref(text)) and text.value:
                words.append(text.value.decode("utf-8", "replace"))
        return f"{': '.join(words) or 'unknown error'} ({result})"

    def version(self) -> str:
        number = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def device(self, uuid: str) -> CudaDevice:
        """The device of that UUID. Raises CudaError where this process has none."""
        wanted = plain_uuid(uuid)
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        for ordinal in range(count.value):
            device = self._device(ordinal)
            if wanted in self._uuids(device):
                return self._known.setdefault(device, CudaDevice(self, device))
        raise CudaError(f"this process has no device {uuid:.60} among its {count.value}")

    def _device(self, ordinal: int) -> int:
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        return device.value

    def _uuids(self, device: int) -> list[str]:
        """Its own UUID, and after that the whole GPU's, where it is an instance of one."""
        found: list[str] = []
        for name in ("cuDeviceGetUuid_v2", "cuDeviceGetUuid"):
            if hasattr(self._library, name):
                raw = (ctypes.c_ubyte * 16)()
                self.call(name, ctypes.byref(raw), ctypes.c_int(device))
                found.append(str(uuids.UUID(bytes=bytes(raw))))
        return found


class CudaDevice:
    """One device's primary context, as far as its memory is shared. Usable from any thread.

    The context is retained at the first use, and opened then if nobody in this process has: ask `is_open`
    first.
    """

    def __init__(self, driver: CudaDriver, device: int) -> None:
        self._driver, self._device = driver, device
        self._context: ctypes.c_void_p | None = None  # one for the life of the process, as torch has it
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether this process has a context on the device already."""
        flags, active = ctypes.c_uint(), ctypes.c_int()
        call = self._driver.call
        call(
            "cuDevicePrimaryCtxGetState",
            ctypes.c_int(self._device),
            ctypes.byref(flags),
            ctypes.byref(active),
        )
        return bool(active.value)

    def retain(self) -> ctypes.c_void_p:
        """The context, which is this process's for good from now on."""
        with self._lock:
            if self._context is None:
                context = ctypes.c_void_p()
                self._driver.call(
                    "cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(self._device)
                )
                self._context = context
            return self._context

    @contextlib.contextmanager
    def _current(self) -> Generator[None, None, None]:
        call = self._driver.call
        call("cuCtxPushCurrent_v2", self.retain())
        try:
            yield
        finally:
            call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def allocate(self, nbytes: int) -> int:
        """The address of new memory on the device; its contents are whatever was there."""
        address = ctypes.c_uint64()
        with self._current():
            self._driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def free(self, address: int) -> None:
        """Give memory of `allocate` back. May wait for work on the device."""
        with self._current():
            self._driver.call("cuMemFree_v2", ctypes.c_uint64(address))

    def export(self, address: int) -> bytes:
        """What another process opens that memory by: `HANDLE_BYTES` bytes."""
        handle = _Handle()
        with self._current():
            self._driver.call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(memoryview(handle))

    def open(self, handle: bytes) -> int:
        """The address here of memory that another process exported."""
        if len(handle) != HANDLE_BYTES:
            raise CudaError(f"an IPC handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        address = ctypes.c_uint64()
        with self._current():
            self._driver.call(
                "cuIpcOpenMemHandle_v2",
                ctypes.byref(address),
                _Handle.from_buffer_copy(handle),
                ctypes.c_uint(_LAZY_PEER_ACCESS),
            )
        return address.value

    def close(self, address: int) -> None:
        """Undo `open`."""
        with self._current():
            self._driver.call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def write(self, address: int, data: bytes) -> None:
        """Copy from the host to the device; it is there when this returns."""
        with self._current(), self._stream() as stream:
            self._driver.call(
                "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)), stream
            )

    def read(self, address: int, nbytes: int) -> bytes:
        """Copy from the device to the host."""
        data = ctypes.create_string_buffer(nbytes)
        self.read_into(ctypes.addressof(data), address, nbytes)
        return data.raw

    def read_into(self, target: int, address: int, nbytes: int) -> None:
        """Copy from the device to host memory at ``target``."""
        with self._current(), self._stream() as stream:
            self._driver.call(
                "cuMemcpyDtoHAsync_v2",
                ctypes.c_void_p(target),
                ctypes.c_uint64(address),
                ctypes.c_size_t(nbytes),
                stream,
            )

    @contextlib.contextmanager
    def _stream(self) -> Generator[ctypes.c_void_p, None, None]:
        """A stream of its own, which waits for nobody's work; done with its work at the end."""
        call = self._driver.call
        stream = ctypes.c_void_p()
        call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        try:
            yield stream
            call("cuStreamSynchronize", stream)
        finally:
            call("cuStreamDestroy_v2", stream)
