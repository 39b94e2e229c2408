"""Which job goes to which worker, and how many workers there are.

Part of the machine: pure, time comes in as an argument. Rules 2, 6 and 7 of machine.py.
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
        for pool in sorted(waiting, key=self._rank) if waiting else ():
            self.pool(pool, now)
        for pool in self._tables.pools.values():
            if pool is not first and not pool.queue and self.lacks_workers(pool):
                self.pool(pool, now)

    def lacks_workers(self, pool: PoolRecord) -> bool:
        alive = self._tables.alive(pool)
        if not pool.warm_spares:
            return len(alive) < pool.target
        return len(alive) < sum(self._wanted(pool, _busy(alive)))

    def _wanted(self, pool: PoolRecord, busy: int) -> tuple[int, int]:
        """How many workers should live: for jobs, now or as there were before; and how many spares beyond."""
        working = min(pool.max_workers, busy + len(pool.queue) - pool.pinned)
        for_jobs = max(working, min(pool.max_workers, pool.target))
        in_service = max(working, min(1, for_jobs))
        return for_jobs, max(0, in_service + pool.spares - for_jobs)

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
            self._tables.aim_lower(pool)
            self._ladder.ask_stop(idle[0], now)

    def pool(self, pool: PoolRecord, now: float) -> None:
        """Give a pool's jobs to its idle workers; start those that it needs and that there is room for."""
        if self._tables.closing:
            return
        starved_since_s, pool.starved_since_s = pool.starved_since_s, None
        alive = self._tables.alive(pool)
        busy = self.hand_out(pool, alive)
        if not (pool.queue or pool.warm_spares or pool.given_up) and len(alive) == pool.target:
            return  # as it nearly always is: neither more nor fewer are wanted
        for_jobs, spares = self._wanted(pool, busy)
        if pool.given_up is not None:
            if now < pool.given_up_until_s:
                return
            pool.given_up = None
        while len(alive) < for_jobs + spares and now >= pool.not_before_s:
            if len(self._tables.workers) >= self._limits.max_workers:
                if len(alive) < for_jobs:
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
        lasting = len([worker for worker in alive if not worker.expected])
        pool.target = max(pool.target, min(lasting, pool.max_workers))

    def hand_out(self, pool: PoolRecord, alive: list[WorkerRecord]) -> int:
        """Give a pool's jobs to those of its workers that idle: how many are busy then."""
        busy = _busy(alive)
        for worker in alive:
            if not pool.queue or busy >= pool.max_workers:
                break
            if worker.state == "idle" and self._send_next(worker, pool):
                busy += 1
        return busy

    def _evict_for(self, pool: PoolRecord, now: float) -> None:
        """Make room by stopping the longest idle worker of a pool that has no work for it."""
        if any(w.state == "stopping" for w in self._tables.workers.values()):
            return
        idle = [
            w
            for w in self._tables.workers.values()
            if w.state == "idle"
            and w.pool != pool.key
            and not w.remotes
            and not self._has_work_for_it(self._tables.pools[w.pool])
        ]
        if not idle or not pool.queue:
            return
        victim = min(idle, key=lambda w: w.since_s)
        victim.expected = True
        victim.reason = "it made room for a worker of another spec"
        other = self._tables.pools[victim.pool]
        self._tables.aim_lower(other)
        self._ladder.ask_stop(victim, now)

    def _has_work_for_it(self, pool: PoolRecord) -> bool:
        """Whether an idle worker of a pool will be given a job: not while as many run as may."""
        busy = sum(1 for worker in pool.workers if self._tables.workers[worker].state == "busy")
        return bool(pool.queue) and busy < pool.max_workers

    def _send_next(self, worker: WorkerRecord, pool: PoolRecord) -> bool:
        """The first job in the queue that may run there, nearly always the first; whether there was one."""
        jobs = self._tables.jobs
        for place, job_id in enumerate(pool.queue if pool.pinned else islice(pool.queue, 1)):
            job = jobs[job_id]
            if job.only_worker in (None, worker.id):
                del pool.queue[place]
                pool.pinned -= job.only_worker is not None
                self._send(worker, job)
                return True
        return False

    def _send(self, worker: WorkerRecord, job: JobRecord) -> None:
        worker.to("busy")
        worker.job = job.id
        job.to("running")
        job.worker = worker.id
        job.attempt += 1
        self._tables.order(SendJob(worker.id, job.id, job.attempt))


def _busy(workers: list[WorkerRecord]) -> int:
    return len([worker for worker in workers if worker.state == "busy"])


def _turn_has_come(pool: PoolRecord, now: float) -> bool:
    if pool.starved_since_s is None or not pool.queue:
        return False
    return now >= pool.starved_since_s + max(_TURN_S, _TURN_STARTS * pool.start_took_s)
