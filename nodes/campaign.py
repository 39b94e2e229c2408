"""What a LEGION_CAMPAIGN is: one run of a workflow in a worker, or a worker that was warmed up.

Owns the handle that Master, Join, Join All, Warmupper and Release hand on. Any number of nodes may wait for
one campaign, one after the other or at once; its outputs stay for as long as the handle does.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from legion_shm.errors import LegionError
from legion_shm.ids import new_job_id
from legion_shm.nodes.bridge import wait_for
from legion_shm.nodes.importer import CHANNELS
from legion_shm.nodes.legion_yaml import Configuration
from legion_shm.nodes.shared_supervisor import is_alive

if TYPE_CHECKING:
    from legion_shm.supervisor.job import Job

__all__ = ["Campaign", "count_spent", "numbered_outputs", "remember", "wait_for_all"]


_log = logging.getLogger("legion_shm.nodes")


class Campaign:
    """``job`` runs a workflow of ``nodes`` nodes; without one it has ``outputs``, or none."""

    def __init__(
        self,
        configuration: Configuration,
        *,
        job: Job | None = None,
        nodes: int = 0,
        outputs: Mapping[str, object] | None = None,
    ) -> None:
        self.configuration = configuration
        self.job = job
        self.id = new_job_id() if job is None else job.id
        self._nodes = nodes
        self._outputs = outputs
        self._held_by: str | None = None

    @property
    def status(self) -> str:
        """A job's (queued, running, done, failed, cancelled, lost), or ``dry run``, or ``warmed up``."""
        if self.job is not None:
            return self.job.state
        return "warmed up" if self._outputs is None else "dry run"

    @property
    def is_spent(self) -> bool:
        """Whether it went wrong, or gave out handles of objects whose worker has ended since."""
        if self.status in ("failed", "cancelled", "lost"):
            return True
        return self._held_by is not None and not is_alive(self._held_by)

    def wait(self) -> Mapping[str, object]:
        """Wait for the end and give the outputs by name, or raise the job's error.

        As the node that runs now: shows progress on it, and cancels the job when the user interrupts it.
        """
        if self.job is not None:
            result = wait_for(self.job, nodes=self._nodes)
            if result.has_handles:
                self._held_by = result.stats.worker_id
            return result
        if self._outputs is None:
            raise LegionError(
                "this campaign comes from a Legion: Warmupper, which runs no workflow; connect the "
                "legion_campaign of a Legion: Master"
            )
        return self._outputs

    def cancel(self) -> None:
        if self.job is not None:
            self.job.cancel()

    def __repr__(self) -> str:
        return f"<Campaign {self.id} {self.status}>"


def numbered_outputs(outputs: Mapping[str, object], channels: int = CHANNELS) -> tuple[object, ...]:
    """``output_1`` to ``output_N`` in order; None for those that the worker did not deliver."""
    return tuple(outputs.get(f"output_{n}") for n in range(1, channels + 1))


_given: dict[str, weakref.WeakSet[Campaign]] = {}
_spent: dict[str, int] = {}
_lock = threading.Lock()


def remember(node_id: str | None, campaign: Campaign) -> None:
    """Note a campaign that a Master node gave out: one of several, where it ran for each item of a list."""
    if node_id is not None:
        with _lock:
            _given.setdefault(node_id, weakref.WeakSet()).add(campaign)


def count_spent(node_id: str | None) -> int:
    """How many campaigns of a Master node can't be used again, for its IS_CHANGED.

    ComfyUI keeps what a Master gave out, and would give a failed campaign, or a handle of an object whose
    worker is gone, out for ever.
    """
    if node_id is None:
        return 0
    with _lock:
        given = list(_given.get(node_id, ()))
    spent = [campaign for campaign in given if campaign.is_spent]
    with _lock:
        for campaign in spent:
            _given[node_id].discard(campaign)
        _spent[node_id] = _spent.get(node_id, 0) + len(spent)
        return _spent[node_id]


def wait_for_all(campaigns: Sequence[Campaign]) -> None:
    """Wait for the end of each; then raise the error of the first that failed. Interrupted: cancels all.

    A campaign that was only warmed up has nothing to wait for.
    """
    failures: list[tuple[Campaign, LegionError]] = []
    try:
        for campaign in campaigns:
            if campaign.status == "warmed up":
                continue
            try:
                campaign.wait()
            except LegionError as error:
                failures.append((campaign, error))
    except BaseException:
        for campaign in campaigns:
            campaign.cancel()
        raise
    if failures:
        first, reason = failures[0]
        if len(failures) > 1:
            others = ", ".join(f"{other.id} ({other.status})" for other, _ in failures[1:])
            _log.error("Legion: besides campaign %s these went wrong: %s", first.id, others)
        raise reason
