"""Waking a thread that waits in a poller: a descriptor that others can make readable.

Owns both ends. A pipe; on Windows, whose pollers take sockets alone, a pair of those.
"""

from __future__ import annotations

import os
import socket
import sys

__all__ = ["Wake"]

_READ_BYTES = 4096


class Wake:
    """``fd`` is readable from `set` until `clear`. `set` may be called by any thread, and never blocks."""

    def __init__(self, *, sockets: bool = sys.platform == "win32") -> None:
        self._pair: tuple[socket.socket, socket.socket] | None = None
        if sockets:
            self._pair = reader, writer = socket.socketpair()
            reader.setblocking(False)
            writer.setblocking(False)
            self.fd, self._writer = reader.fileno(), writer.fileno()
        else:
            self.fd, self._writer = os.pipe()
            os.set_blocking(self.fd, False)
            os.set_blocking(self._writer, False)

    def set(self) -> None:
        try:
            if self._pair is None:
                os.write(self._writer, b"\0")
            else:
                self._pair[1].send(b"\0")
        except BlockingIOError:
            return  # it has enough wake-ups to read

    def clear(self) -> None:
        try:
            if self._pair is None:
                os.read(self.fd, _READ_BYTES)
            else:
                self._pair[0].recv(_READ_BYTES)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Both ends. Nobody may call `set` any more."""
        if self._pair is None:
            os.close(self.fd)
            os.close(self._writer)
        else:
            for end in self._pair:
                end.close()
