"""Work handed to helper threads, where a thread may not be startable.

Owns one promise that `ThreadPoolExecutor` does not give: work that `submit` refused is never done. The
executor queues it before it starts a thread, so after "can't start new thread" the next thread that does
start would do it, when its caller has long done without.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, ParamSpec, TypeVar

__all__ = ["HelperThreads"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Work(Generic[_T]):
    def __init__(self, work: Callable[[], _T]) -> None:
        self.work: Callable[[], _T] | None = work

    def __call__(self) -> _T:
        work = self.work
        if work is None:
            raise RuntimeError("this work was refused")
        return work()


class HelperThreads(ThreadPoolExecutor):
    """As its base, but for work that was refused."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """RuntimeError where no thread can be started, or none is to be any more: ``fn`` never runs then."""
        work = _Work(lambda: fn(*args, **kwargs))
        try:
            return super().submit(work)
        except BaseException:
            work.work = None
            raise
