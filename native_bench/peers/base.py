"""What a way of moving tensors has to offer so that it can be measured: `Peer` and `Session`.

Owns the interface and `Responder`, the other process's part of it, which every way shares. What is inside
the timed window is the same for all:

    here                                        the other process
    order ──────────────── prepare ───────────▶ makes its answer, a fresh private tensor
    makes a fresh private tensor
    ┌ exchange ─── the tensor, as the way does ▶ takes it as a tensor, uses it, notes the time   ┐ timed
    └ uses the answer ◀── the answer, likewise ─                                                 ┘
    checks every byte; lets go
              ──────────────── finish ─────────▶ checks every byte, lets go

One-way is from the start here to the note there: both read the system-wide monotonic clock.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from legion_shm.native_bench import payload
from legion_shm.native_bench.machine import gpu_reason
from legion_shm.native_bench.payload import Content, Device, Order

__all__ = ["TIMEOUT_S", "Peer", "Responder", "Seen", "Session"]

TIMEOUT_S = 60.0
"""No exchange, nor a peer's start, takes longer than that; one that does has failed."""


@dataclass(frozen=True)
class Seen:
    """What the other process saw of one message: when it had been used, and what was wrong with it."""

    used_ns: int
    problem: str = ""


class Responder:
    """The other process's part. It holds what came until `finish`, as a program that works on it would."""

    def __init__(self) -> None:
        self._order: Order | None = None
        self._reply: Any = None
        self._held: Any = None
        self._used = self._used_ns = 0

    def prepare(self, order: Order) -> None:
        """Not timed: make the answer, in private memory of this process."""
        self._order = order
        self._reply = payload.make(order, reply=True)

    def take(self, tensor: Any) -> Any:
        """Timed: use what came, and give the answer."""
        order = self._order
        assert order is not None, "prepare comes first"
        self._used = payload.use(tensor, order.use)
        self._used_ns = time.monotonic_ns()
        self._held = tensor
        reply, self._reply = self._reply, None
        return reply

    def give(self) -> Any:
        """Timed: give the answer without having been sent anything."""
        reply, self._reply = self._reply, None
        return reply

    def finish(self) -> Seen:
        """Not timed: check what came, and let go of it."""
        order, held, self._held = self._order, self._held, None
        if order is None or held is None:
            return Seen(0, "nothing came")
        expected = payload.expected_use(order)
        problem = payload.problem_of(held, order)
        if not problem and expected is not None and expected != self._used:
            problem = "the contents changed between their use and the check"
        return Seen(self._used_ns, problem)


class Session(ABC):
    """A way that is open: its other process runs. Used by one thread."""

    @abstractmethod
    def ready(self) -> None:
        """Wait until the other process can answer. Raises PeerFailed."""

    @abstractmethod
    def prepare(self, order: Order) -> None:
        """Not timed: tell the other process what comes."""

    def make(self, order: Order) -> Any:
        """Not timed: the tensor to send; in fresh private memory unless the way is about something else."""
        return payload.make(order)

    @abstractmethod
    def exchange(self, tensor: Any) -> Any:
        """Timed: send a tensor, return the other process's answer as a tensor. Raises PeerFailed."""

    @abstractmethod
    def finish(self) -> Seen:
        """Not timed: let go of the last answer, and hear what the other process saw."""

    def hops(self) -> Mapping[str, float]:
        """Microseconds of the last exchange, by what it spent them on, where the way knows."""
        return {}

    def retire(self) -> None:  # noqa: B027 - nothing to tell is fine
        """Tell the other process to end, without waiting: `close` comes next, after others were told too."""

    @abstractmethod
    def close(self) -> None:
        """End the other process and remove whatever was made. Idempotent."""


class Peer(ABC):
    """One way of moving tensors. ``settings``: those that matter, for the report.

    ``package``: the distribution it needs beyond Legion's own dependencies, and whose version is reported.
    ``device``: where its tensors lie, on both sides.
    """

    name: str
    title: str
    settings: str
    kind: str = "peer"
    package: str | None = None
    module: str | None = None
    content: Content = "pattern"
    device: Device = "cpu"
    echoes: bool = False

    def missing(self) -> str:
        """Why this way can't run here; empty where it can."""
        if self.device != "cpu" and (reason := gpu_reason()):
            return reason
        if self.package is None:
            return ""
        name = self.module or self.package.replace("-", "_")
        try:
            found = importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):
            found = False
        return "" if found else f"the package {self.package} is not installed"

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package) if self.package else ""
        except importlib.metadata.PackageNotFoundError:
            return ""

    def unfit(self, shape: tuple[int, ...]) -> str:
        """Why tensors of this shape are not measured; empty where they are."""
        del shape
        return ""

    def uses(self, how: str) -> bool:
        """Whether this way is measured with the tensor used like that."""
        return how != "none"

    @abstractmethod
    def open(self, most_bytes: int) -> Session:
        """Start the other process; messages are of up to ``most_bytes``. Raises PeerFailed."""
