"""The ZeroMQ channel: a ROUTER in the supervisor, DEALERs in the workers. The one place that imports zmq.

Moves opaque frames between identities; messages.py gives them meaning. An identity is an unguessable
name that the supervisor gave to one socket of one worker; frames of any other are dropped and counted.

Two kinds with one behaviour: ``ipc`` sockets in the runtime directory, where the kernel's peer
credentials keep other users out, and loopback ``tcp`` with CURVE, where the worker's key does.
Sockets are used by one thread each, the one that runs the loop around them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import zmq
from zmq.auth.base import Authenticator

from legion_shm.clock import monotonic_s
from legion_shm.errors import ProtocolError, StartupError

__all__ = ["ChannelKind", "ClientChannel", "Endpoint", "ServerChannel", "channel_kinds", "check_descriptors"]

ChannelKind = Literal["ipc", "tcp"]

_HIGH_WATER = 10_000  # frames; a peer that lets this many wait is not reading any more
_SEND_TIMEOUT_MS = 30_000
_RECEIVE_MAX_MS = 1 << 30  # of what ZeroMQ takes, which is an int: 12 days
_LINGER_MS = 1_000  # a worker's last words may take this long to leave
_DESCRIPTORS = 24  # a context with its bound ROUTER takes 10 to 12, the rest of a supervisor 4, a worker 6
# Plain numbers: pyzmq's flags are enums, whose operators cost more than what they are used for.
_POLLIN, _NOBLOCK, _MORE = int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_MAX_SLACK = 4096  # ours is the exact limit; ZeroMQ's own, which drops silently, stands behind it


def channel_kinds() -> dict[str, str]:
    """Channel kinds to the reason why one can't be used here, empty where it can."""
    return {
        "ipc": "" if zmq.has("ipc") and sys.platform != "win32" else "ZeroMQ has no ipc transport here",
        "tcp": "" if zmq.has("curve") else "ZeroMQ was built without CURVE",
    }


@dataclass(frozen=True)
class Endpoint:
    """What a worker needs to connect. The keys are empty for ipc. Never logged: it holds a secret."""

    address: str
    server_key: bytes = b""
    client_key: bytes = b""
    client_secret: bytes = b""

    def __repr__(self) -> str:
        return f"Endpoint({self.address!r})"


def check_descriptors() -> None:
    """StartupError unless some more files can be opened: libzmq aborts the process where it gets none."""
    free: list[int] = []
    try:
        while len(free) < _DESCRIPTORS:
            free.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        raise StartupError(
            f"the supervisor needs {_DESCRIPTORS} open files and this process can open {len(free)} more "
            f"({error.strerror}); raise its limit (ulimit -n)"
        ) from error
    finally:
        for fd in free:
            os.close(fd)


class _KnownKeys:
    """The CURVE keys that may connect: the protocol of pyzmq's credentials providers."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    def callback(self, domain: str, key: bytes) -> bool:
        del domain
        return key in self.keys


class _Yield:
    """Gives up the processor after a frame was handed to ZeroMQ.

    Its thread has been woken, often on this very processor though another idles (a virtual one that halts
    counts as taken), and would wait there until we have nothing more to do.

    Where that gave the processor to others for long, this one is busy, and nothing is given up for a while.
    """

    LONG_S = 0.0003
    REST_S = 5.0

    def __init__(self, give_up: Callable[[], object]) -> None:
        self._give_up = give_up
        self._not_before_s = 0.0

    def __call__(self) -> None:
        started_s = monotonic_s()
        if started_s < self._not_before_s:
            return
        self._give_up()
        ended_s = monotonic_s()
        if ended_s - started_s > self.LONG_S:
            self._not_before_s = ended_s + self.REST_S


_LEAVES_S = 0.0001 if hasattr(os, "sched_yield") else 0.0  # on Windows it might be the clock's next tick
_yield = _Yield(getattr(os, "sched_yield", lambda: None))


class ServerChannel:
    """The supervisor's end. ``dropped`` counts frames of unknown identities and ill-formed ones."""

    def __init__(
        self,
        kind: ChannelKind,
        *,
        directory: Path,
        max_bytes: int,
        current_directory: Callable[[], Path] | None = None,
    ) -> None:
        """``current_directory()`` is asked for each worker: another one where the first was removed."""
        self.kind = kind
        self._current_directory = current_directory or (lambda: directory)
        self._files, self._address = 0, ""
        self.dropped = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._auth: Authenticator | None = None
        self._zap: zmq.Socket[bytes] | None = None
        self._known = _KnownKeys()
        self._identities: set[bytes] = set()
        self._file: Path | None = None
        self._poller = zmq.Poller()
        try:
            self._socket = self._context.socket(zmq.ROUTER)
        except zmq.ZMQError as error:
            self._context.term()
            raise StartupError(f"the supervisor has no socket: {error}") from error
        try:
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes + _MAX_SLACK)
            self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
            self._socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
            self._socket.setsockopt(zmq.LINGER, 0)
            if kind == "ipc":
                with contextlib.suppress(zmq.ZMQError):  # built without it: the directory's mode is the lock
                    self._socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
                self._server_key = b""
                self._bind(directory)
            else:
                self._server_key = self._start_curve()
                port = self._socket.bind_to_random_port("tcp://127.0.0.1")
                self._address = f"tcp://127.0.0.1:{port}"
        except zmq.ZMQError as error:
            self.close()
            raise StartupError(f"the supervisor's {kind} socket could not be made: {error}") from error
        except BaseException:
            self.close()
            raise
        self._poller.register(self._socket, zmq.POLLIN)

    def _bind(self, directory: Path) -> None:
        self._files += 1
        path = directory / ("control" if self._files == 1 else f"control{self._files}")
        address = f"ipc://{path}"
        self._socket.bind(address)
        self._address, self._file = address, path

    def _bind_where_it_is_gone(self) -> None:
        """Those that are connected stay so; others could not reach a socket whose file was removed."""
        directory = self._current_directory()
        if self._file is not None and self._file.parent == directory and self._file.exists():
            return
        try:
            self._bind(directory)
        except zmq.ZMQError as error:
            raise StartupError(f"the supervisor's socket could not be made again: {error}") from error

    def _start_curve(self) -> bytes:
        self._auth = Authenticator(self._context)
        self._auth.start()
        self._auth.configure_curve_callback(domain="*", credentials_provider=self._known)
        public, secret = zmq.curve_keypair()
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        zap: Any = cast("Any", self._auth).zap_socket
        self._zap = zap
        self._poller.register(zap, zmq.POLLIN)
        return public

    @property
    def address(self) -> str:
        return self._address

    def admit(self, identities: Iterable[bytes]) -> Endpoint:
        """Let a worker's sockets of these identities connect; the endpoint is for that worker alone.

        Raises ConfigError, OSError or StartupError where the socket's file is gone and can't be made again.
        """
        if self.kind == "ipc":
            self._bind_where_it_is_gone()
            self._identities.update(identities)
            return Endpoint(self._address)
        self._identities.update(identities)
        public, secret = zmq.curve_keypair()
        self._known.keys.add(public)
        return Endpoint(self._address, self._server_key, public, secret)

    def dismiss(self, identities: Iterable[bytes], endpoint: Endpoint) -> None:
        """Drop whatever comes from these from now on."""
        self._identities.difference_update(identities)
        self._known.keys.discard(endpoint.client_key)

    def watch(self, fd: int) -> None:
        """Let `wait` report this descriptor when it becomes readable."""
        self._poller.register(fd, zmq.POLLIN)

    def unwatch(self, fd: int) -> None:
        self._poller.unregister(fd)

    def wait(self, timeout_s: float) -> tuple[bool, list[int]]:
        """Wait for frames or watched descriptors: (frames may be there, readable descriptors)."""
        ready = self._poller.poll(max(0, int(timeout_s * 1000 + 0.999)))
        frames, fds = False, list[int]()
        for item, _ in ready:
            if isinstance(item, int):
                fds.append(item)
            elif item is self._socket:
                frames = True
            else:
                self._authenticate()
        return frames, fds

    def _authenticate(self) -> None:
        auth, zap = self._auth, self._zap
        if auth is None or zap is None:
            return
        while zap.poll(0):
            # A coroutine that awaits nothing: the callback above answers at once.
            step = cast("Any", auth.handle_zap_message(zap.recv_multipart()))
            try:
                step.send(None)
            except StopIteration:
                continue

    def receive(self, *, waits: bool = False) -> tuple[bytes, bytes] | None:
        """The next (identity, frame) of a known identity, or None when none waits. Never blocks.

        ``waits``: `wait` has just said that one does.
        """
        socket = self._socket
        while waits or int(socket.get(zmq.EVENTS)) & _POLLIN:  # an Again raised costs ten times this
            waits = False
            try:
                identity = socket.recv(_NOBLOCK)
            except zmq.Again:
                continue
            frame = socket.recv(_NOBLOCK)  # a ROUTER puts the identity in front of one part at least
            whole = True
            while socket.get(zmq.RCVMORE):
                whole = False
                socket.recv(_NOBLOCK)
            if whole and identity in self._identities:
                return identity, frame
            self.dropped += 1
        return None

    def send(self, identity: bytes, frame: bytes) -> bool:
        """Send without blocking. False when the peer is gone or has stopped reading."""
        try:
            # Copied, whatever its size: pyzmq's way without a copy starts a thread that never ends.
            self._socket.send(identity, _MORE, copy=True)
            self._socket.send(frame, _NOBLOCK, copy=True)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        _yield()
        return True

    def close(self) -> None:
        if self._auth is not None:
            self._auth.stop()
            self._auth = self._zap = None
        self._socket.close(linger=0)
        self._context.term()
        if self._file is not None:
            self._file.unlink(missing_ok=True)  # libzmq leaves it
            self._file = None


class ClientChannel:
    """One socket of a worker. Contexts are shared within a process."""

    def __init__(self, endpoint: Endpoint, identity: bytes, *, max_bytes: int) -> None:
        self._socket: zmq.Socket[bytes] = _process_context().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes + _MAX_SLACK)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        self._socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        self._socket.setsockopt(zmq.SNDTIMEO, _SEND_TIMEOUT_MS)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        if endpoint.server_key:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, endpoint.server_key)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, endpoint.client_key)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, endpoint.client_secret)
        self._socket.connect(endpoint.address)
        self._poller: zmq.Poller | None = None
        self._timeout_ms = -1

    def watch(self, fd: int) -> None:
        """Let `receive` return early when this descriptor becomes readable."""
        if self._poller is None:
            self._poller = zmq.Poller()
            self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(fd, zmq.POLLIN)

    def send(self, frame: bytes) -> None:
        """Send, waiting a bounded time for room. Raises ProtocolError when the supervisor stopped reading."""
        try:
            self._socket.send(frame, 0, copy=True)
        except zmq.Again:
            raise ProtocolError("the supervisor has stopped reading this worker's messages") from None
        _yield()

    @staticmethod
    def let_leave() -> None:
        """Leave the processor to ZeroMQ's thread for a moment, before work that would keep it for long."""
        if _LEAVES_S:
            time.sleep(_LEAVES_S)

    def receive(self, timeout_s: float | None) -> bytes | None:
        """The next frame; None after the timeout, or days, or when a watched descriptor became readable."""
        timeout_ms = -1 if timeout_s is None else max(0, int(min(timeout_s * 1000 + 0.999, _RECEIVE_MAX_MS)))
        try:
            if self._poller is not None:
                self._poller.poll(timeout_ms)
                return self._socket.recv(_NOBLOCK)
            if timeout_ms != self._timeout_ms:
                self._socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
                self._timeout_ms = timeout_ms
            return self._socket.recv()
        except zmq.Again:
            return None

    def close(self) -> None:
        self._socket.close()

    @staticmethod
    def terminate() -> None:
        """End this process's context, once all its sockets are closed and their last frames are gone."""
        _process_context().term()


def _process_context() -> zmq.Context[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = cast("Any", zmq.Context).instance()
    return context
