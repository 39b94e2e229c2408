"""One zygote, as the loop sees it: its process, the workers asked of it, the workers it has forked.

Owns the talk with one zygote process from its start to its end, and what happens to a worker that waits for
it when it says no, hangs or dies: that worker is executed as ever. The loop's thread alone uses it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from legion_shm.clock import monotonic_s
from legion_shm.errors import ProtocolError
from legion_shm.supervisor.spawn import HostConfig
from legion_shm.supervisor.spawned import SIGKILL
from legion_shm.supervisor.worker_ends import PosixWorker, WorkerEnds
from legion_shm.supervisor.worker_io import LineReader, WorkerIO
from legion_shm.supervisor.zygote_wire import (
    Become,
    Exited,
    Fit,
    Fork,
    Forked,
    NotForked,
    Outdated,
    Reap,
    Report,
    Unfit,
    receive_report,
    send_order,
)

__all__ = ["ForkedProcess", "Request", "Zygote"]

_log = logging.getLogger("legion_shm.supervisor")

_ANSWER_WAIT_S = 10.0  # a fork takes some 10 ms; a zygote that does not answer is ended
_STATUS_WAIT_S = 1.0  # for the zygote's word on a worker whose pidfd says that it has ended
_TAIL_LINES = 50

State = Literal["starting", "fit", "unfit", "outdated", "became", "ended"]


@dataclass
class Request:
    """A worker that somebody wants. Exactly one of the three is called, once.

    ``plain`` has it executed; ``withdrawn`` says that it was taken back, and no process came.
    """

    worker: WorkerIO
    config: HostConfig
    adopt: Callable[[PosixWorker], None]
    plain: Callable[[], None]
    withdrawn: Callable[[float], None]
    ends: WorkerEnds | None = None
    asked_s: float = 0.0

    def take_back(self) -> None:
        """A child that was forked all the same ends with its death pipe."""
        if self.ends is not None:
            self.ends.close()
            self.ends = None

    def give_up(self) -> None:
        """Have it executed instead."""
        self.take_back()
        self.plain()


class ForkedProcess:
    """A worker's process, which is the zygote's child and not ours: the zygote tells how it ended."""

    def __init__(self, zygote: Zygote, pid: int, exit_fd: int) -> None:
        self._zygote, self._pid, self._exit_fd = zygote, pid, exit_fd
        self._ended_s: float | None = None
        self.exitcode: int | None = None

    def ended(self) -> bool:
        """Also where the zygote has died, or does not answer, and nobody can say how it ended."""
        if self.exitcode is not None:
            return True
        if not _readable(self._exit_fd, 0.0):
            return False
        if self._ended_s is None:
            self._ended_s = monotonic_s()
        return self._zygote.state == "ended" or monotonic_s() >= self._ended_s + _STATUS_WAIT_S

    def join(self, timeout: float | None = None) -> None:
        _readable(self._exit_fd, timeout)

    def close(self) -> None:
        """The zygote may reap it: its pid is needed no more."""
        self._zygote.reap(self._pid)


def _readable(fd: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


@dataclass
class Zygote:
    """``told_unfit(reason)`` hears once why workers of this kind are not to come from a zygote.

    ``ask_another`` gets the requests that came too late: what this one has loaded is no longer what is there.
    """

    name: str
    told_unfit: Callable[[str], None]
    ask_another: Callable[[Request], None]
    last_used_s: float
    state: State = "starting"
    spawned: PosixWorker | None = None
    children: dict[int, ForkedProcess] = field(default_factory=dict[int, ForkedProcess])
    tail: deque[str] = field(default_factory=lambda: deque[str](maxlen=_TAIL_LINES))
    kill_wanted: bool = False
    _waiting: list[Request] = field(default_factory=list[Request])
    _asked: dict[int, Request] = field(default_factory=dict[int, Request])
    _numbers: int = 0
    _readers: dict[int, LineReader] = field(default_factory=dict[int, LineReader])

    @property
    def fds(self) -> tuple[int, ...]:
        """What the loop watches for it."""
        if self.spawned is None:
            return ()
        control = () if self.spawned.descriptors is None else (self.spawned.descriptors.fileno(),)
        ended = () if self.state == "became" else (self.spawned.exit_fd,)
        return (*control, *ended, *(fd for fd, reader in self._readers.items() if not reader.ended))

    @property
    def in_use(self) -> bool:
        return bool(self.children or self._waiting or self._asked)

    def started(self, spawned: PosixWorker) -> None:
        self.spawned = spawned
        self._readers = {fd: LineReader(fd) for fd in (spawned.stdout, spawned.stderr)}
        if self.kill_wanted:
            self.kill()

    # --- workers wanted -----------------------------------------------------------------------------

    def ask(self, request: Request, now: float) -> None:
        self.last_used_s = now
        if self.state == "starting":
            self._waiting.append(request)
        elif self.state == "fit":
            self._order(request, now)
        elif self.state == "outdated":
            self.ask_another(request)
        else:
            request.give_up()

    def _order(self, request: Request, now: float, *, become: bool = False) -> None:
        assert self.spawned is not None
        assert self.spawned.descriptors is not None
        self._numbers += 1
        try:
            request.ends = WorkerEnds(descriptors=request.config.segments == "memfd")
            order = Become(request.config) if become else Fork(self._numbers, request.config)
            send_order(self.spawned.descriptors, order, request.ends.theirs)
        except OSError as error:
            _log.debug("zygote %s takes no order: %s", self.name, error)
            request.give_up()
            return
        request.ends.close_childs()
        request.asked_s = now
        if become:
            self._became(request)
        else:
            self._asked[self._numbers] = request

    def withdraw(self, worker: WorkerIO, now: float) -> Request | None:
        """Forget a worker that is not there yet. One that is being forked comes, and is killed then."""
        for request in self._waiting:
            if request.worker is worker:
                self._waiting.remove(request)
                if self.state == "starting" and not self._waiting:
                    self.kill()  # its imports may be what hangs
                return request
        for request in self._asked.values():
            if request.worker is worker and now >= request.asked_s + _STATUS_WAIT_S:
                self.kill()
        return None

    # --- what it says -------------------------------------------------------------------------------

    def readable(self, fd: int, now: float) -> None:
        """One of `fds` is readable."""
        if fd in self._readers:
            self._read_lines(fd)
            return
        self._read_reports(now)  # its last words come before its end; with them it may have been let go of
        if self.spawned is not None and fd == self.spawned.exit_fd:
            self._died()

    def _read_lines(self, fd: int) -> None:
        for line in self._readers[fd].read():
            self.tail.append(line)
            _log.debug("zygote %s: %s", self.name, line)

    def _read_reports(self, now: float) -> None:
        control = None if self.spawned is None else self.spawned.descriptors
        try:
            while control is not None and control.fileno() >= 0:
                received = receive_report(control)
                if received is None:
                    if self.state == "became":
                        self.close()
                    else:
                        self.kill()
                    return
                self._take(*received, now)
        except BlockingIOError:
            return
        except (ProtocolError, OSError) as error:
            _log.error("zygote %s is ended: %s", self.name, error)
            self.kill()

    def _take(self, report: Report, fds: list[int], now: float) -> None:
        if isinstance(report, Forked):
            self._forked(report, fds)
            return
        for fd in fds:
            os.close(fd)
        if isinstance(report, Exited):
            child = self.children.get(report.pid)
            if child is not None:
                child.exitcode = report.status
        elif isinstance(report, Fit):
            _log.debug("zygote %s is ready after %.2f s of imports", self.name, report.loaded_s)
            self.state = "fit"
            self._flush(now)
        elif isinstance(report, Unfit):
            self.state = "unfit"
            self.told_unfit(report.reason)
            if report.clean and self._waiting:
                self._order(self._waiting.pop(0), now, become=True)
            self._flush(now)
            if self.state == "unfit":
                self.kill()
        else:
            request = self._asked.pop(report.number, None)
            if isinstance(report, Outdated) and request is not None:
                _log.info("zygote %s is replaced: %s", self.name, report.reason)
                self.state = "outdated"
                request.take_back()
                self.ask_another(request)
            elif isinstance(report, NotForked) and request is not None:
                _log.warning("zygote %s could not fork: %s", self.name, report.error)
                request.give_up()

    def _flush(self, now: float) -> None:
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            self.ask(request, now)

    def _forked(self, report: Forked, fds: list[int]) -> None:
        if len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise ProtocolError(f"{len(fds)} descriptors came with a forked worker")
        request = self._asked.pop(report.number, None)
        if request is None or request.ends is None:
            os.close(fds[0])
            raise ProtocolError("it forked a worker that nobody had asked for")
        process = ForkedProcess(self, report.pid, fds[0])
        self.children[report.pid] = process
        self._hand_over(request, request.ends.spawned(process, report.pid, fds[0]))

    def _became(self, request: Request) -> None:
        """The process itself is a worker now. Our ends of the zygote stay until it has let go of its own."""
        zygote = self.spawned
        assert zygote is not None
        assert request.ends is not None
        self.state = "became"
        self._hand_over(request, request.ends.spawned(zygote.process, zygote.pid, zygote.exit_fd))

    def _hand_over(self, request: Request, spawned: PosixWorker) -> None:
        for fd in self._readers:
            self._read_lines(fd)
        request.worker.tail.extend(self.tail)  # what its imports wrote is part of its start
        request.adopt(spawned)

    # --- its end ------------------------------------------------------------------------------------

    def reap(self, pid: int) -> None:
        self.last_used_s = monotonic_s()
        if self.children.pop(pid, None) is None or self.spawned is None or self.spawned.descriptors is None:
            return
        with contextlib.suppress(OSError):  # it has died, and its children are init's to reap
            send_order(self.spawned.descriptors, Reap(pid))

    def answer_due_s(self) -> float | None:
        """When the oldest unanswered order has been so for too long."""
        if not self._asked:
            return None
        return min(request.asked_s for request in self._asked.values()) + _ANSWER_WAIT_S

    def kill(self) -> None:
        """Its workers go on. What follows comes with its end."""
        self.kill_wanted = True
        if self.spawned is not None and self.state not in ("became", "ended"):
            self.spawned.signal_group(SIGKILL)

    def _died(self) -> None:
        starting, code = self.state == "starting", self.spawned.exit_code() if self.spawned else None
        for fd in self._readers:
            self._read_lines(fd)
        if starting and not self.kill_wanted:
            self.told_unfit(f"it ended with code {code} while it imported")
        elif not self.kill_wanted:
            _log.warning("zygote %s has died with code %s; its workers go on", self.name, code)
        self.close()

    def never_started(self) -> None:
        self.state = "ended"
        self._give_up_all()

    def close(self) -> None:
        """Free everything of it; it is killed if it lives, unless it has become a worker."""
        became, self.state = self.state == "became", "ended"
        spawned, self.spawned = self.spawned, None
        if spawned is not None:
            if became:
                spawned.let_go()
            else:
                spawned.close()
        self._give_up_all()

    def _give_up_all(self) -> None:
        requests = [*self._waiting, *self._asked.values()]
        self._waiting, self._asked = [], {}
        for request in requests:
            request.give_up()
