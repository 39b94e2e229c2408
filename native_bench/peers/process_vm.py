"""process_vm_readv: the receiver copies straight out of the sender's private memory. Linux only.

Settings: address and size over a Pipe; the receiver reads into a buffer that it keeps and has touched
before, on
two threads from 2 MiB on. The sender keeps the tensor until the exchange is over. ``PR_SET_PTRACER`` lets the
other process read where the kernel's yama restricts it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from legion_shm.native_bench.payload import as_tensor
from legion_shm.native_bench.peers.base import TIMEOUT_S, Peer, Session
from legion_shm.native_bench.peers.child import ChildSession, Link

__all__ = ["PEERS"]

_SPLIT_BYTES = 2 << 20
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _ReadLink(Link):
    def __init__(self, near: Connection, far: Connection, child: bool) -> None:
        self._ends = (near, far)
        self._connection = far if child else near
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.process_vm_readv.restype = ctypes.c_ssize_t
        self._libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
        self._buffer = bytearray(0)
        self._address = 0
        self._pool = ThreadPoolExecutor(1)
        self._pool.submit(int).result()
        self._sent: Any = None

    def send(self, tensor: Any) -> None:
        self._sent = tensor
        self._connection.send((os.getpid(), tensor.data_ptr(), tensor.nbytes, tuple(tensor.shape)))

    def receive(self) -> Any:
        if not self._connection.poll(TIMEOUT_S):
            raise TimeoutError(f"nothing came within {TIMEOUT_S:g} s")
        pid, source, nbytes, shape = self._connection.recv()
        if len(self._buffer) < nbytes:
            self._buffer = bytearray(nbytes)
            self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        half = nbytes // 8192 * 4096 if nbytes >= _SPLIT_BYTES else 0
        other = self._pool.submit(self._read, pid, source, 0, half) if half else None
        self._read(pid, source, half, nbytes - half)
        if other is not None:
            other.result(TIMEOUT_S)
        return as_tensor(self._buffer, shape)

    def _read(self, pid: int, source: int, start: int, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            here = _Span(self._address + start + done, nbytes - done)
            there = _Span(source + start + done, nbytes - done)
            count = self._libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
            if count <= 0:
                code = ctypes.get_errno()
                raise OSError(code, f"process_vm_readv: {os.strerror(code)}")
            done += count

    def release(self) -> None:
        self._sent = None

    def close(self) -> None:
        self._sent = None
        self._pool.shutdown()
        for connection in self._ends:
            connection.close()


class ProcessVmPeer(Peer):
    name = "process-vm-readv"
    title = "process_vm_readv, 2 threads"
    settings = "reads into a kept, warm buffer; two threads from 2 MiB; address over a Pipe"

    def missing(self) -> str:
        return "" if sys.platform == "linux" else "this system has no process_vm_readv"

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        return ChildSession(_ReadLink, multiprocessing.get_context("spawn").Pipe())


PEERS: list[Peer] = [ProcessVmPeer()]
