"""Whatever happens, in whatever order: no job is lost sight of, no worker is left, the loop never spins."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from legion_shm.errors import JobCancelled, JobFailed, LegionError, StartupError
from legion_shm.events import TerminalState
from legion_shm.supervisor.machine import POISON_DEATHS, Limits, Machine
from legion_shm.supervisor.stimuli import (
    Action,
    AskStop,
    CancelRequested,
    CloseRequested,
    HeartbeatSeen,
    Interrupt,
    JobReplied,
    JobSubmitted,
    PoolDefined,
    ResolveJob,
    RetryNoted,
    SendJob,
    SignalWorker,
    SpawnWorker,
    Stalled,
    StartFailed,
    Stimulus,
    StopRequested,
    Tick,
    WarmUpRequested,
    WorkerExited,
    WorkerReady,
)

POOLS = {
    "plain": PoolDefined("plain", 2, 20.0, None, None),
    "short": PoolDefined("short", 1, 5.0, 8.0, None),
    "brief": PoolDefined("brief", 3, 20.0, None, 2),
    "spared": PoolDefined("spared", 1, 20.0, 8.0, 3, 1),
}
MAX_WORKERS = 2
LIMITS = Limits(
    max_workers=MAX_WORKERS,
    heartbeat_timeout_s=15.0,
    cancel_grace_s=2.0,
    stop_grace_s=3.0,
    term_grace_s=0.0,
    restart_budget=1,
    restart_backoff_s=0.5,
    restart_backoff_max_s=4.0,
    restart_reset_s=30.0,
)
OUTCOMES: dict[TerminalState, LegionError | None] = {
    "done": None,
    "failed": JobFailed("a node raised"),
    "cancelled": JobCancelled("interrupted"),
}


class World(RuleBasedStateMachine):
    """The machine, and a model of what the loop, the workers and the callers saw of it."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(LIMITS)
        self.now = 1000.0
        self.numbers = 0
        self.accepted: dict[str, int] = {}  # job to its retries
        self.resolved: Counter[str] = Counter()
        self.cancelled: set[str] = set()
        self.timed: set[str] = set()
        self.living: dict[str, str] = {}  # worker to its pool
        self.runs: dict[str, tuple[str, int]] = {}  # worker to the job and attempt it was sent
        self.sent: list[tuple[str, str, int]] = []
        self.killed: set[str] = set()
        self.asked: set[str] = set()
        self.job_deaths: Counter[str] = Counter()
        self.given_up_until: dict[str, float] = {}
        self.closing = False
        for pool in POOLS.values():
            self.do(pool)

    # --- what the loop would see --------------------------------------------------------------------

    def do(self, stimulus: Stimulus) -> list[Action]:
        actions = self.machine.handle(stimulus, self.now)
        for action in actions:
            self.check(action)
        return actions

    def check(self, action: Action) -> None:
        if isinstance(action, SpawnWorker):
            assert not self.closing, "a worker is started while closing"
            pool = self.machine.pools[action.pool]
            assert pool.given_up is None, "a worker of a given up pool is started"
            assert action.worker not in self.living
            self.living[action.worker] = action.pool
        elif isinstance(action, SendJob):
            assert action.worker not in self.runs, "two jobs on a worker"
            assert action.worker not in self.asked | self.killed, "a job for a worker that is to end"
            assert self.living[action.worker] == self.machine.jobs[action.job].pool
            assert not self.resolved[action.job]
            self.runs[action.worker] = (action.job, action.attempt)
            self.sent.append((action.worker, action.job, action.attempt))
        elif isinstance(action, ResolveJob):
            assert action.job in self.accepted
            self.resolved[action.job] += 1
            assert self.resolved[action.job] == 1, "resolved twice"
            assert (action.error is None) == (action.state == "done")
            if action.state == "lost":
                assert self.job_deaths[action.job] == min(self.accepted[action.job] + 1, POISON_DEATHS)
        elif isinstance(action, RetryNoted):
            assert not self.resolved[action.job]
            assert not self.closing
            assert action.attempt <= self.accepted[action.job]
        elif isinstance(action, Interrupt):
            assert self.runs[action.worker][0] == action.job
        elif isinstance(action, AskStop):
            assert action.worker in self.living
            assert action.worker not in self.asked, "asked twice"
            self.asked.add(action.worker)
        else:
            assert isinstance(action, SignalWorker)
            assert action.worker in self.living
            assert action.signal == "SIGKILL" or action.worker not in self.killed, "down the ladder"
            self.killed.add(action.worker)

    def pick(self, data: st.DataObject, among: list[str]) -> str:
        return data.draw(st.sampled_from(among))

    # --- callers --------------------------------------------------------------------------------------

    @rule(pools=st.lists(st.sampled_from(list(POOLS)), min_size=1, max_size=4), retries=st.integers(0, 5))
    def submit_several(self, pools: list[str], retries: int) -> None:
        for pool in pools:
            self.submit(pool, None, retries)

    @rule(
        pool=st.sampled_from(list(POOLS)),
        deadline_s=st.none() | st.floats(0.0, 20.0),
        retries=st.integers(0, 5),
    )
    def submit_one(self, pool: str, deadline_s: float | None, retries: int) -> None:
        self.submit(pool, deadline_s, retries)

    def submit(self, pool: str, deadline_s: float | None, retries: int) -> None:
        self.numbers += 1
        job = f"j{self.numbers}"
        self.accepted[job] = retries
        if deadline_s is not None:
            self.timed.add(job)
        self.do(JobSubmitted(job, pool, None if deadline_s is None else self.now + deadline_s, retries))

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = self.pick(data, sorted(self.accepted))
        self.cancelled.add(job)
        self.do(CancelRequested(job))

    @rule(
        wish=st.builds(WarmUpRequested, st.sampled_from(list(POOLS)), st.integers(1, 4))
        | st.builds(StopRequested, st.none() | st.sampled_from(list(POOLS)))
    )
    def warm_up_or_stop(self, wish: Stimulus) -> None:
        self.do(wish)

    @precondition(lambda self: len(self.accepted) > 25)
    @rule()
    def close(self) -> None:
        self.closing = True
        self.do(CloseRequested())

    # --- workers --------------------------------------------------------------------------------------

    @precondition(lambda self: self.living)
    @rule()
    def whoever_starts_is_ready(self) -> None:
        for worker in sorted(self.living):
            if self.machine.workers[worker].state == "starting":
                self.do(WorkerReady(worker))

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def a_ready_comes_at_any_time(self, data: st.DataObject) -> None:
        self.do(WorkerReady(self.pick(data, sorted(self.living))))

    @precondition(lambda self: self.runs)
    @rule()
    def all_that_runs_is_done(self) -> None:
        for worker, (job, attempt) in sorted(self.runs.items()):
            del self.runs[worker]
            self.do(JobReplied(worker, job, attempt, "done", None))

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), outcome=st.sampled_from(list(OUTCOMES)))
    def a_worker_replies(self, data: st.DataObject, outcome: TerminalState) -> None:
        worker = self.pick(data, sorted(self.runs))
        job, attempt = self.runs.pop(worker)
        self.do(JobReplied(worker, job, attempt, outcome, OUTCOMES[outcome]))
        assert self.resolved[job] == 1

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), shift=st.integers(-1, 1), outcome=st.sampled_from(list(OUTCOMES)))
    def a_reply_comes_late_or_twice_or_wrong(
        self, data: st.DataObject, shift: int, outcome: TerminalState
    ) -> None:
        worker, job, attempt = data.draw(st.sampled_from(self.sent))
        if self.runs.get(worker) == (job, attempt + shift):
            return
        ignored = self.machine.ignored_replies
        assert self.do(JobReplied(worker, job, attempt + shift, outcome, OUTCOMES[outcome])) == []
        assert self.machine.ignored_replies == ignored + 1

    @precondition(lambda self: self.living)
    @rule(data=st.data(), code=st.sampled_from([0, 1, -9, -11, None]))
    def a_worker_exits(self, data: st.DataObject, code: int | None) -> None:
        self.exits(self.pick(data, sorted(self.living)), code)

    @precondition(lambda self: self.asked | self.killed)
    @rule()
    def whoever_was_told_to_exits(self) -> None:
        for worker in sorted(self.asked | self.killed):
            self.exits(worker, 0)

    def exits(self, worker: str, code: int | None) -> None:
        del self.living[worker]
        self.killed.discard(worker)
        self.asked.discard(worker)
        ran = self.runs.pop(worker, None)
        if ran is not None:
            self.job_deaths[ran[0]] += 1
        self.do(WorkerExited(worker, code, f"exited with code {code}", ("last line",)))
        assert self.do(WorkerExited(worker, code, "again", ())) == []

    @precondition(lambda self: self.living)
    @rule(data=st.data(), why=st.sampled_from("ab"))
    def a_worker_cannot_start(self, data: st.DataObject, why: str) -> None:
        starting = [w for w in self.living if self.machine.workers[w].state in ("starting", "stopping")]
        if starting:
            worker = self.pick(data, sorted(starting))
            self.do(StartFailed(worker, StartupError(why, worker_id=worker, traceback=why)))

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def a_heart_beats(self, data: st.DataObject) -> None:
        assert self.do(HeartbeatSeen(self.pick(data, sorted(self.living)))) == []

    # --- time -----------------------------------------------------------------------------------------

    @rule(seconds=st.floats(0.0, 2.0) | st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tick()

    @rule()
    def the_next_deadline_comes(self) -> None:
        due = self.machine.next_deadline_s()
        if due is not None:
            self.now = max(self.now, due)
            self.tick()
            assert self.machine.next_deadline_s() != due or due > self.now or self.acted

    @rule(seconds=st.floats(0.0, 60.0))
    def the_supervisor_stalls(self, seconds: float) -> None:
        self.now += seconds
        assert self.do(Stalled()) == []

    def tick(self) -> None:
        actions = self.do(Tick())
        self.acted = bool(actions)
        due = self.machine.next_deadline_s()
        assert actions or due is None or due > self.now, "a tick that did nothing is due again at once"

    # --- always ---------------------------------------------------------------------------------------

    @invariant()
    def every_accepted_job_is_either_kept_or_resolved(self) -> None:
        assert set(self.machine.jobs) == {job for job in self.accepted if not self.resolved[job]}

    @invariant()
    def what_waits_is_queued_and_what_runs_has_a_worker(self) -> None:
        queued = [job for pool in self.machine.pools.values() for job in pool.queue]
        assert len(queued) == len(set(queued))
        assert set(queued) == {job.id for job in self.machine.jobs.values() if job.state == "queued"}
        running = {w.job: w.id for w in self.machine.workers.values() if w.job is not None}
        assert running == {job: worker for worker, (job, _) in self.runs.items()}
        assert set(running) == {job.id for job in self.machine.jobs.values() if job.state != "queued"}

    @invariant()
    def the_workers_are_those_that_were_started_and_have_not_ended(self) -> None:
        assert {w.id: w.pool for w in self.machine.workers.values()} == self.living
        assert len(self.living) <= MAX_WORKERS
        for name, pool in POOLS.items():
            ids = self.machine.pools[name].workers
            assert sorted(ids) == sorted(w for w, p in self.living.items() if p == name)
            alive = [w for w in ids if self.machine.workers[w].state != "stopping"]
            assert len(alive) <= pool.max_workers + pool.warm_spares
            assert sum(1 for w in alive if self.machine.workers[w].state == "busy") <= pool.max_workers

    @invariant()
    def whoever_waits_has_something_to_wait_for(self) -> None:
        """No job waits while a worker idles that may run it, or while nothing is on its way at all."""
        for pool in self.machine.pools.values():
            if pool.queue:
                states = [self.machine.workers[w].state for w in pool.workers]
                assert "idle" not in states or states.count("busy") == pool.max_workers
                assert self.machine.workers or self.machine.next_deadline_s() is not None

    @invariant()
    def room_is_made_for_whoever_waits(self) -> None:
        """No worker idles while a pool that has none waits, unless another one is making room already."""
        for pool in self.machine.pools.values():
            alone = not [w for w in pool.workers if self.machine.workers[w].state != "stopping"]
            if pool.queue and alone and not pool.not_before_s and pool.given_up is None:
                states = {worker.state for worker in self.machine.workers.values()}
                assert "stopping" in states or "idle" not in states

    @invariant()
    def whoever_is_closing_is_on_the_ladder(self) -> None:
        if self.closing:
            assert set(self.living) <= self.asked | self.killed
            assert all(w.stage_until_s is not None for w in self.machine.workers.values())

    def teardown(self) -> None:
        """However it stands: closing ends everything, by time and exits alone."""
        self.closing = True
        self.do(CloseRequested())
        assert not any(pool.queue for pool in self.machine.pools.values())
        for _ in range(2 * MAX_WORKERS + 4):
            due = self.machine.next_deadline_s()
            if due is None:
                break
            self.now = max(self.now, due)
            self.tick()
        assert self.killed == set(self.living), "the ladder reaches everyone"
        for worker in sorted(self.living):
            self.exits(worker, -9)
        assert self.machine.workers == {}
        assert self.machine.jobs == {}
        assert self.machine.next_deadline_s() is None
        assert all(self.resolved[job] == 1 for job in self.accepted)


TestWorld = World.TestCase
TestWorld.settings = settings(
    max_examples=100,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
