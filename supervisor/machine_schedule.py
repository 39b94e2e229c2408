"""Which job goes to which worker, and how many workers there are.

Part of the machine: pure, time comes in as an argument. Rule 2 of machine.py, and who makes room for whom.
"""

from __future__ import annotations

from legion_shm.ids import new_worker_id
from legion_shm.supervisor.machine_ladder import Ladder
from legion_shm.supervisor.machine_tables import Limits, Tables
from legion_shm.supervisor.state import JobRecord, PoolRecord, WorkerRecord
from legion_shm.supervisor.stimuli import SendJob, SpawnWorker

__all__ = ["Schedule"]


class Schedule:
    def __init__(self, tables: Tables, limits: Limits, ladder: Ladder) -> None:
        self._tables, self._limits, self._ladder = tables, limits, ladder
        self._numbers = 0

    def all_pools(self, first: PoolRecord | None, now: float) -> None:
        """After a worker became free, for its own pool first, or went: for whoever has waited longest."""
        if first is not None:
            self.pool(first, now)
        waiting = [pool for pool in self._tables.pools.values() if pool.queue]
        for pool in sorted(waiting, key=lambda pool: self._tables.jobs[pool.queue[0]].submitted_s):
            self.pool(pool, now)
        for pool in self._tables.pools.values():
            if not pool.queue and len(self._tables.alive(pool)) < pool.target:
                self.pool(pool, now)

    def pool(self, pool: PoolRecord, now: float) -> None:
        if self._tables.closing:
            return
        alive = self._tables.alive(pool)
        for worker in alive:
            if not pool.queue:
                break
            if worker.state == "idle":
                self._send(worker, self._tables.jobs[pool.queue.popleft()])
        starting = sum(1 for worker in alive if worker.state == "starting")
        wanted = min(pool.max_workers, max(pool.target, len(alive) + max(0, len(pool.queue) - starting)))
        if pool.given_up is not None:
            if now < pool.given_up_until_s:
                return
            pool.given_up = None
        while len(alive) < wanted and now >= pool.not_before_s:
            if len(self._tables.workers) >= self._limits.max_workers and not self._evict_for(pool, now):
                break
            if len(self._tables.workers) >= self._limits.max_workers:
                break
            self._numbers += 1
            worker = WorkerRecord(new_worker_id(self._numbers), pool.key, since_s=now, last_seen_s=now)
            self._tables.workers[worker.id] = worker
            pool.workers.append(worker.id)
            alive.append(worker)
            self._tables.order(SpawnWorker(worker.id, pool.key))
        pool.target = max(pool.target, sum(1 for worker in alive if not worker.expected))

    def _evict_for(self, pool: PoolRecord, now: float) -> bool:
        """Make room by stopping the longest idle worker of a pool that has no work."""
        if any(w.state == "stopping" for w in self._tables.workers.values()):
            return True
        idle = [
            w
            for w in self._tables.workers.values()
            if w.state == "idle" and w.pool != pool.key and not self._tables.pools[w.pool].queue
        ]
        if not idle or not pool.queue:
            return False
        victim = min(idle, key=lambda w: w.since_s)
        victim.expected = True
        victim.reason = "it made room for a worker of another spec"
        other = self._tables.pools[victim.pool]
        other.target = max(0, other.target - 1)
        self._ladder.ask_stop(victim, now)
        return True

    def _send(self, worker: WorkerRecord, job: JobRecord) -> None:
        worker.to("busy")
        worker.job = job.id
        job.to("running")
        job.worker = worker.id
        job.attempt += 1
        self._tables.order(SendJob(worker.id, job.id, job.attempt))
