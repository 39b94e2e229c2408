"""Handing segments' file descriptors to another process over a Unix socket (SCM_RIGHTS).

Owns the header that goes with each descriptor, and every descriptor between its arrival and its
delivery. It does not own the socket, and does not look into the segments.

    header (little-endian, 32 bytes): magic b"LSEG", version u16, zero u16, arena u64, segment u32,
    zero u32, nbytes u64; exactly one descriptor with each
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import time

from legion_shm.errors import ProtocolError

__all__ = ["SegmentReceiver", "send_segment_fd"]

_HEADER = struct.Struct("<4sHHQIIQ")
_MAGIC = b"LSEG"
_VERSION = 1
_FD_BYTES = array.array("i").itemsize
# Room for more than one, so that a peer's surplus arrives here and is closed, instead of being cut off.
_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * _FD_BYTES) if hasattr(socket, "CMSG_SPACE") else 0


def send_segment_fd(
    sock: socket.socket, arena: int, segment: int, nbytes: int, fd: int, *, timeout_s: float = 5.0
) -> None:
    """Send one segment's descriptor; the sender keeps its own.

    ``sock``: AF_UNIX, SOCK_SEQPACKET or SOCK_STREAM. Raises TimeoutError where the peer has not made room
    within ``timeout_s``, OSError (BrokenPipeError, ...) where it is gone.
    """
    header = _HEADER.pack(_MAGIC, _VERSION, 0, arena, segment, 0, nbytes)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    deadline = time.monotonic() + timeout_s
    sent = 0
    while sent < len(header):
        try:
            sent += sock.sendmsg([header[sent:]], ancillary, socket.MSG_DONTWAIT)
            ancillary = []
        except BlockingIOError:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not _ready(sock, select.POLLOUT, remaining):
                raise TimeoutError(
                    f"segment {segment}: the peer took no descriptor for {timeout_s:g} s"
                ) from None


class SegmentReceiver:
    """The receiving end. Not thread-safe. `close` closes what has arrived in part, not the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = bytearray()
        self._fds: list[int] = []
        self.ended = False
        """The peer has closed its end; nothing more will come."""

    def wait(self, timeout_s: float) -> bool:
        """Whether `receive_pending` has something to read, within that time."""
        return _ready(self._sock, select.POLLIN, max(0.0, timeout_s))

    def receive_pending(self) -> list[tuple[int, int, int, int]]:
        """What has arrived: (arena, segment, nbytes, fd) each, without waiting.

        The descriptors are the caller's, close-on-exec. Anything malformed closes all of this call's
        descriptors and raises `ProtocolError`; the connection is of no use afterwards.
        """
        received: list[tuple[int, int, int, int]] = []
        try:
            while not self.ended and self._read():
                while len(self._data) >= _HEADER.size:
                    received.append(self._parse())
                if len(self._fds) > 1:
                    raise ProtocolError(f"{len(self._fds)} descriptors came with one segment")
            if self.ended and (self._data or self._fds):
                raise ProtocolError("the peer closed the segment socket in the middle of a message")
        except BaseException:
            for *_, fd in received:
                os.close(fd)
            self.close()
            raise
        return received

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
        self._data.clear()

    def _read(self) -> bool:
        flags = socket.MSG_DONTWAIT | getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        try:
            data, ancillary, out_flags, _ = self._sock.recvmsg(_HEADER.size, _ANCILLARY_BYTES, flags)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, ancillary, out_flags = b"", [], 0
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
        self._fds.extend(fds)
        for fd in fds:
            os.set_inheritable(fd, False)
        if out_flags & socket.MSG_CTRUNC:
            raise ProtocolError("a segment's descriptor was cut off; is the limit of open files reached?")
        if out_flags & socket.MSG_TRUNC:
            raise ProtocolError(f"a segment message is longer than {_HEADER.size} bytes")
        if not data:
            self.ended = True
            return False
        self._data += data
        return True

    def _parse(self) -> tuple[int, int, int, int]:
        magic, version, zero, arena, segment, zero2, nbytes = _HEADER.unpack(self._data[: _HEADER.size])
        if magic != _MAGIC or version != _VERSION or zero or zero2:
            raise ProtocolError(f"not a segment message: it starts with {bytes(self._data[:8])!r}")
        if len(self._fds) != 1:
            raise ProtocolError(f"segment {segment} came with {len(self._fds)} descriptors instead of one")
        if not nbytes:
            raise ProtocolError(f"segment {segment} came with no size")
        del self._data[: _HEADER.size]
        return arena, segment, nbytes, self._fds.pop()


def _ready(sock: socket.socket, event: int, timeout_s: float) -> bool:
    poll = select.poll()
    with contextlib.suppress(ValueError):  # a closed socket: the next call on it says so
        poll.register(sock, event)
    return bool(poll.poll(timeout_s * 1000))
