"""Ways whose two ends are alike: a `Link` in each of two processes, and a child of our own at the far one.

Owns the child (spawned, tied to this process's life, deaf to Ctrl-C because we end it) and the pipe for
orders beside the link, which carries nothing inside the timed window. It moves no payload.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from legion_shm.errors import PeerFailed
from legion_shm.native_bench.payload import Order
from legion_shm.native_bench.peers.base import TIMEOUT_S, Responder, Seen, Session

__all__ = ["ChildSession", "Link", "blocked_interrupts", "die_with_parent"]

_STOP_S = 3.0


class Link(ABC):
    """One end. Both ends are made by the same function, once in each process."""

    @abstractmethod
    def send(self, tensor: Any) -> None: ...

    @abstractmethod
    def receive(self) -> Any:
        """The tensor that came, valid until `release`. Raises TimeoutError."""

    @abstractmethod
    def release(self) -> None:
        """What `receive` gave is used no more; not timed."""

    @abstractmethod
    def close(self) -> None:
        """Give back what this end made. Idempotent."""


class ChildSession(Session):
    """A child process runs ``make_link(*arguments, True)``, this one ``make_link(*arguments, False)``.

    ``make_link`` and ``arguments`` must survive the context's pickling. ``on_close`` runs last of all.
    """

    def __init__(
        self,
        make_link: Callable[..., Link],
        arguments: tuple[Any, ...],
        *,
        context: Any = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._on_close = on_close
        self._link: Link | None = None
        self._make_link, self._arguments = make_link, arguments
        context = context or multiprocessing.get_context("spawn")
        self._control, theirs = cast("tuple[Connection, Connection]", context.Pipe())
        self._process: Any = context.Process(target=_serve, args=(make_link, arguments, theirs), daemon=True)
        try:
            with blocked_interrupts():
                self._process.start()
        except BaseException:
            self._process = None
            self.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def ready(self) -> None:
        self._link = self._make_link(*self._arguments, False)
        self._answer()

    def prepare(self, order: Order) -> None:
        self._ask("prepare", order)

    def exchange(self, tensor: Any) -> Any:
        link = self._link
        assert link is not None, "ready comes first"
        try:
            link.send(tensor)
            return link.receive()
        except Exception as error:  # each way has errors of its own
            raise PeerFailed(f"the exchange failed: {error!r}; {self._last_words()}") from error

    def finish(self) -> Seen:
        if self._link is not None:
            self._link.release()
        return cast("Seen", self._ask("finish", None))

    def retire(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._control.send(("close", None))

    def close(self) -> None:
        self.retire()
        process, self._process = self._process, None
        try:
            if process is not None:
                process.join(_STOP_S)
                if process.is_alive():
                    process.kill()
                    process.join(_STOP_S)
                process.close()
        finally:
            self._control.close()
            link, self._link = self._link, None
            if link is not None:
                link.close()
            on_close, self._on_close = self._on_close, None
            if on_close is not None:
                on_close()

    def _ask(self, command: str, argument: object) -> Any:
        try:
            self._control.send((command, argument))
        except OSError as error:
            raise PeerFailed(f"the other process is gone: {error!r}") from error
        return self._answer()

    def _answer(self) -> Any:
        try:
            if not self._control.poll(TIMEOUT_S):
                raise PeerFailed(f"the other process has not answered within {TIMEOUT_S:g} s")
            kind, value = self._control.recv()
        except (EOFError, OSError) as error:
            raise PeerFailed(f"the other process is gone: {error!r}") from error
        if kind == "failed":
            raise PeerFailed(f"the other process failed:\n{value}")
        return value

    def _last_words(self) -> str:
        try:
            if self._control.poll(0):
                kind, value = self._control.recv()
                return str(value) if kind == "failed" else "the other process says nothing"
        except (EOFError, OSError):
            return "the other process is gone"
        return "the other process says nothing"


def _serve(make_link: Callable[..., Link], arguments: tuple[Any, ...], control: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    import torch  # before the answer that this process is ready

    del torch
    link: Link | None = None
    responder = Responder()
    try:
        link = make_link(*arguments, True)
        control.send(("ready", None))
        while True:
            command, order = control.recv()
            if command == "prepare":
                responder.prepare(order)
                control.send(("prepared", None))
                link.send(responder.take(link.receive()))
            elif command == "finish":
                seen = responder.finish()
                link.release()
                control.send(("seen", seen))
            else:
                return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except BaseException:
        control.send(("failed", traceback.format_exc()))
    finally:
        if link is not None:
            link.close()


@contextlib.contextmanager
def blocked_interrupts() -> Generator[None]:
    """What starts inside never sees Ctrl-C, which a terminal sends to children too: we end them ourselves.

    Nor does Ctrl-C end the start half-way, which would leave the child waiting for the rest of its orders:
    one that comes meanwhile counts when the block is left. (A mask alone is this thread's; another may take
    the signal, and Python then interrupts this one.)
    """
    came: list[int] = []
    here = threading.current_thread() is threading.main_thread()  # no other is interrupted
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if here else None
    masks = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if here:
            signal.signal(signal.SIGINT, handler if handler is not None else signal.default_int_handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def die_with_parent() -> None:
    """However the parent ended, and whatever this process waits for."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True, name="bench-parent").start()
