"""What the supervisor and a zygote say to each other, over the socket pair that ties them.

Owns the messages and their form: one packet each, with the descriptors that belong to it. It decides nothing.

    supervisor ─▶ Fork, Become (with a worker's descriptors), Reap        pickled: a parent to its own child
    zygote     ─▶ Fit, Unfit, Forked (with a pidfd), NotForked, Outdated, Exited    JSON, read strictly
"""

from __future__ import annotations

import array
import json
import os
import pickle
import socket
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TypeVar, cast

from legion_shm.errors import ProtocolError
from legion_shm.supervisor.spawn import HostConfig

__all__ = [
    "Become",
    "Exited",
    "Fit",
    "Fork",
    "Forked",
    "NotForked",
    "Order",
    "Outdated",
    "Reap",
    "Report",
    "Unfit",
    "receive_order",
    "receive_report",
    "send_order",
    "send_report",
]

_PACKET_BYTES = 1 << 18
_FDS_MAX = 8
_FD_BYTES = array.array("i").itemsize


@dataclass(frozen=True)
class Fork:
    """Fork a worker; the descriptors come with it, in the order of `WorkerEnds.theirs`."""

    number: int
    config: HostConfig


@dataclass(frozen=True)
class Become:
    """Be this worker yourself: for a zygote that must not fork."""

    config: HostConfig


@dataclass(frozen=True)
class Reap:
    """The supervisor needs this worker's pid no more; it stays taken until then."""

    pid: int


@dataclass(frozen=True)
class Fit:
    """Everything is loaded and forks are safe. ``loaded_s``: what the imports took."""

    loaded_s: float


@dataclass(frozen=True)
class Unfit:
    """It must not fork. ``clean``: it is as good a worker as any, and may become one."""

    reason: str
    clean: bool


@dataclass(frozen=True)
class Forked:
    number: int
    pid: int


@dataclass(frozen=True)
class NotForked:
    number: int
    error: str


@dataclass(frozen=True)
class Outdated:
    """It did not fork: what it loaded is another now, as ``reason`` says. It asks to be replaced."""

    number: int
    reason: str


@dataclass(frozen=True)
class Exited:
    """``status``: the exit code, negative for a signal."""

    pid: int
    status: int


Order = Fork | Become | Reap
Report = Fit | Unfit | Forked | NotForked | Outdated | Exited

_REPORTS: dict[str, tuple[type[Report], tuple[type, ...]]] = {
    "fit": (Fit, (float,)),
    "unfit": (Unfit, (str, bool)),
    "forked": (Forked, (int, int)),
    "not_forked": (NotForked, (int, str)),
    "outdated": (Outdated, (int, str)),
    "exited": (Exited, (int, int)),
}
_NAMES = {kind: name for name, (kind, _) in _REPORTS.items()}
_T = TypeVar("_T")


def send_order(sock: socket.socket, order: Order, fds: Sequence[int] = ()) -> None:
    """Raises OSError where the zygote is gone, or takes no more, or the order is too large for a packet."""
    _send(sock, pickle.dumps(order), fds)


def receive_order(sock: socket.socket) -> tuple[Order, list[int]] | None:
    """Waits; None when the supervisor has closed its end."""
    data, fds = _receive(sock)
    return (cast("Order", pickle.loads(data)), fds) if data else None


def send_report(sock: socket.socket, report: Report, fds: Sequence[int] = ()) -> None:
    _send(sock, json.dumps([_NAMES[type(report)], *astuple(report)]).encode(), fds)


def receive_report(sock: socket.socket) -> tuple[Report, list[int]] | None:
    """None when the zygote has closed its end. Raises BlockingIOError, ProtocolError, OSError."""
    data, fds = _receive(sock)
    if not data:
        return None
    try:
        return _read_report(data), fds
    except ProtocolError:
        for fd in fds:
            os.close(fd)
        raise


def _read_report(data: bytes) -> Report:
    try:
        fields: object = json.loads(data)
    except ValueError as error:
        raise ProtocolError(f"a zygote's report is not JSON: {error}") from None
    if not isinstance(fields, list) or not fields:
        raise ProtocolError("a zygote's report is not a list")
    name, *values = cast("list[object]", fields)
    if not isinstance(name, str) or name not in _REPORTS:
        raise ProtocolError("a zygote's report is of no known kind")
    make, kinds = _REPORTS[name]
    if tuple(type(value) for value in values) != kinds:
        raise ProtocolError(f"a zygote's report {name} has other fields than it should")
    return make(*values)  # type: ignore[arg-type]


def _send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    data, ancillary, flags, _ = sock.recvmsg(
        _PACKET_BYTES, socket.CMSG_SPACE(_FDS_MAX * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise ProtocolError("a packet between the supervisor and a zygote was cut off")
    return data, list(fds)
