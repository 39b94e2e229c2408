"""How workers are ended: what is waited for, and the ladder ask, SIGTERM, SIGKILL.

Part of the machine: pure, time comes in as an argument. Who is late, silent or idle for too long is judged
here; rule 8 of machine.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from legion_shm.errors import StartupTimeout
from legion_shm.supervisor.machine_tables import Limits, Tables
from legion_shm.supervisor.state import WorkerRecord
from legion_shm.supervisor.stimuli import AskStop, SignalWorker

__all__ = ["Ladder"]


class Ladder:
    def __init__(self, tables: Tables, limits: Limits) -> None:
        self._tables, self._limits = tables, limits

    def deadlines(self, worker: WorkerRecord) -> Iterable[float]:
        pool = self._tables.pools[worker.pool]
        if worker.stage_until_s is not None:
            yield worker.stage_until_s
        if worker.interrupt_until_s is not None and worker.stage == "none":
            yield worker.interrupt_until_s  # a worker on the ladder is past this
        if worker.state == "starting":
            yield worker.since_s + pool.startup_timeout_s
        elif worker.stage == "none":
            yield worker.last_seen_s + self._limits.heartbeat_timeout_s
        idle_until_s = self._idle_until_s(worker)
        if idle_until_s is not None:
            yield idle_until_s

    def _idle_until_s(self, worker: WorkerRecord) -> float | None:
        """When an idle worker has been so for too long. A spare is not idle while others of its pool work."""
        pool = self._tables.pools[worker.pool]
        if worker.state != "idle" or pool.idle_timeout_s is None or worker.remotes:
            return None
        since_s = worker.since_s
        if pool.warm_spares:
            if not self._tables.works(pool):
                since_s = max(since_s, pool.worked_s)
            elif self._tables.idle(pool) <= pool.warm_spares:
                return None
        return since_s + pool.idle_timeout_s

    def judge(self, worker: WorkerRecord, now: float) -> None:
        pool = self._tables.pools[worker.pool]
        if worker.stage_until_s is not None and now >= worker.stage_until_s:
            self._climb(worker, now)
            return
        if worker.stage != "none":
            return
        if worker.interrupt_until_s is not None and now >= worker.interrupt_until_s:
            worker.interrupt_until_s = None
            worker.expected = True
            worker.reason = "its job did not end within cancel_grace_s of being cancelled"
            worker.to("stopping")
            self._signal(worker, "SIGTERM", now)
        elif worker.state == "starting" and now >= worker.since_s + pool.startup_timeout_s:
            worker.start_error = StartupTimeout(
                f"worker {worker.id} was not ready within startup_timeout_s = {pool.startup_timeout_s:g}; "
                "raise that setting of its WorkerSpec if it only needs longer",
                worker_id=worker.id,
            )
            worker.to("stopping")
            self._signal(worker, "SIGTERM", now)
        elif (
            worker.state in ("idle", "busy") and now >= worker.last_seen_s + self._limits.heartbeat_timeout_s
        ):
            timeout_s = self._limits.heartbeat_timeout_s
            worker.reason = f"it hung: no heartbeat for heartbeat_timeout_s = {timeout_s:g}, and was ended"
            worker.to("stopping")
            self._signal(worker, "SIGKILL", now)  # a stopped process does not take SIGTERM
        elif (idle_until_s := self._idle_until_s(worker)) is not None and now >= idle_until_s:
            worker.expected = True
            worker.reason = "it was idle for idle_timeout_s"
            self._tables.aim_lower(pool)
            if not self._tables.works(pool):
                pool.spares = 0
            self.ask_stop(worker, now)

    def ask_stop(self, worker: WorkerRecord, now: float) -> None:
        if worker.stage != "none":
            return
        if worker.state != "stopping":
            worker.to("stopping")
        worker.stage = "asked"
        worker.stage_until_s = now + self._limits.stop_grace_s
        self._tables.order(AskStop(worker.id))

    def _climb(self, worker: WorkerRecord, now: float) -> None:
        self._signal(worker, "SIGKILL" if worker.stage in ("terminated", "killed") else "SIGTERM", now)

    def _signal(self, worker: WorkerRecord, signal: str, now: float) -> None:
        if signal == "SIGTERM":
            worker.stage = "terminated"
            worker.stage_until_s = now + self._limits.term_grace_s
            self._tables.order(SignalWorker(worker.id, "SIGTERM"))
        else:
            worker.stage = "killed"
            worker.stage_until_s = now + 1.0  # again, should the first have met a process about to exec
            self._tables.order(SignalWorker(worker.id, "SIGKILL"))
