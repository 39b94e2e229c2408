"""An accepted job as the supervisor keeps it until it has ended."""

from __future__ import annotations

from dataclasses import dataclass

from legion_shm.config import JobOptions
from legion_shm.supervisor.feed import JobFeed
from legion_shm.supervisor.result import Delivery
from legion_shm.transport.values import PackedValues

__all__ = ["JobTimes", "Submission"]


@dataclass
class JobTimes:
    """Monotonic seconds. ``sent_s``: of the last attempt."""

    submitted_s: float
    encoded_s: float
    sent_s: float = 0.0


@dataclass
class Submission:
    """All that is needed to send a job, as often as it takes."""

    job: str
    feed: JobFeed
    options: JobOptions
    pool: str
    workflow: bytes
    digest: bytes
    packed: PackedValues
    times: JobTimes
    warnings: tuple[str, ...] = ()
    worker: str | None = None
    delivery: Delivery | None = None
