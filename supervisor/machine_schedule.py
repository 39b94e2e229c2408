"""Which job goes to which worker, and how many workers there are.

Part of the machine: pure, time comes in as an argument. Rules 2 and 6 of machine.py.
"""

from __future__ import annotations

from itertools import islice

from legion_shm.ids import new_worker_id
from legion_shm.supervisor.machine_ladder import Ladder
from legion_shm.supervisor.machine_tables import Limits, Tables
from legion_shm.supervisor.state import JobRecord, PoolRecord, WorkerRecord
from legion_shm.supervisor.stimuli import SendJob, SpawnWorker

__all__ = ["Schedule"]

_TURN_S = 5.0
_TURN_STARTS = 4
"""A pool keeps the room that others wait for this long, and several times as long as their workers take to
start: handing it on costs such a start, and must not become the work itself."""


class Schedule:
    def __init__(self, tables: Tables, limits: Limits, ladder: Ladder) -> None:
        self._tables, self._limits, self._ladder = tables, limits, ladder
        self._numbers = 0

    def all_pools(self, first: PoolRecord | None, now: float) -> None:
        """After a worker became free, for its own pool first, or went: for whoever has waited longest."""
        if first is not None:
            self._make_way(first, now)
            self.pool(first, now)
        waiting = [pool for pool in self._tables.pools.values() if pool.queue]
        for pool in sorted(waiting, key=self._rank):
            self.pool(pool, now)
        for pool in self._tables.pools.values():
            if not pool.queue and len(self._tables.alive(pool)) < pool.target:
                self.pool(pool, now)

    def _rank(self, pool: PoolRecord) -> tuple[bool, float]:
        """Pools without any worker come first, by how long they have had none; then the oldest job's."""
        since_s = pool.starved_since_s
        return (since_s is None, self._tables.jobs[pool.queue[0]].submitted_s if since_s is None else since_s)

    def _make_way(self, pool: PoolRecord, now: float) -> None:
        """Stop a worker that is idle just now, though its pool has work, for one that has waited its turn."""
        workers = self._tables.workers.values()
        if not pool.queue or len(workers) < self._limits.max_workers:
            return
        if any(worker.state == "stopping" for worker in workers):
            return
        if not any(other is not pool and _turn_has_come(other, now) for other in self._tables.pools.values()):
            return
        idle = [w for w in self._tables.alive(pool) if w.state == "idle" and not w.remotes]
        if idle:
            idle[0].expected = True
            idle[0].reason = "it made room for another spec, whose turn had come"
            pool.target = max(0, pool.target - 1)
            self._ladder.ask_stop(idle[0], now)

    def pool(self, pool: PoolRecord, now: float) -> None:
        """Give a pool's jobs to its idle workers; start those that it needs and that there is room for."""
        if self._tables.closing:
            return
        starved_since_s, pool.starved_since_s = pool.starved_since_s, None
        alive = self._tables.alive(pool)
        for worker in alive:
            if not pool.queue:
                break
            if worker.state == "idle":
                self._send_next(worker, pool)
        starting = sum(1 for worker in alive if worker.state == "starting")
        waiting = len(pool.queue) - pool.pinned
        wanted = min(pool.max_workers, max(pool.target, len(alive) + max(0, waiting - starting)))
        if pool.given_up is not None:
            if now < pool.given_up_until_s:
                return
            pool.given_up = None
        while len(alive) < wanted and now >= pool.not_before_s:
            if len(self._tables.workers) >= self._limits.max_workers:
                self._evict_for(pool, now)
                if not alive and pool.queue:
                    pool.starved_since_s = now if starved_since_s is None else starved_since_s
                break
            self._numbers += 1
            worker = WorkerRecord(new_worker_id(self._numbers), pool.key, since_s=now, last_seen_s=now)
            self._tables.workers[worker.id] = worker
            pool.workers.append(worker.id)
            alive.append(worker)
            self._tables.order(SpawnWorker(worker.id, pool.key))
        pool.target = max(pool.target, sum(1 for worker in alive if not worker.expected))

    def _evict_for(self, pool: PoolRecord, now: float) -> None:
        """Make room by stopping the longest idle worker of a pool that has no work."""
        if any(w.state == "stopping" for w in self._tables.workers.values()):
            return
        idle = [
            w
            for w in self._tables.workers.values()
            if w.state == "idle"
            and w.pool != pool.key
            and not w.remotes
            and not self._tables.pools[w.pool].queue
        ]
        if not idle or not pool.queue:
            return
        victim = min(idle, key=lambda w: w.since_s)
        victim.expected = True
        victim.reason = "it made room for a worker of another spec"
        other = self._tables.pools[victim.pool]
        other.target = max(0, other.target - 1)
        self._ladder.ask_stop(victim, now)

    def _send_next(self, worker: WorkerRecord, pool: PoolRecord) -> None:
        """The first job in the queue that may run there; nearly always the first of all."""
        jobs = self._tables.jobs
        for place, job_id in enumerate(pool.queue if pool.pinned else islice(pool.queue, 1)):
            job = jobs[job_id]
            if job.only_worker in (None, worker.id):
                del pool.queue[place]
                pool.pinned -= job.only_worker is not None
                self._send(worker, job)
                return

    def _send(self, worker: WorkerRecord, job: JobRecord) -> None:
        worker.to("busy")
        worker.job = job.id
        job.to("running")
        job.worker = worker.id
        job.attempt += 1
        self._tables.order(SendJob(worker.id, job.id, job.attempt))


def _turn_has_come(pool: PoolRecord, now: float) -> bool:
    if pool.starved_since_s is None or not pool.queue:
        return False
    return now >= pool.starved_since_s + max(_TURN_S, _TURN_STARTS * pool.start_took_s)
