from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from legion_shm.errors import (
    DeadlineExceeded,
    JobCancelled,
    JobFailed,
    LegionError,
    StartupError,
    StartupTimeout,
    WorkerLost,
)
from legion_shm.events import TerminalState
from legion_shm.supervisor.machine import Limits, Machine
from legion_shm.supervisor.machine_restarts import quoted
from legion_shm.supervisor.state import (
    JOB_TABLE,
    WORKER_TABLE,
    IllegalTransition,
    JobRecord,
    WorkerRecord,
)
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

LIMITS = Limits(
    max_workers=4,
    heartbeat_timeout_s=1000.0,
    cancel_grace_s=5.0,
    stop_grace_s=3.0,
    term_grace_s=2.0,
    restart_budget=2,
    restart_backoff_s=0.5,
    restart_backoff_max_s=0.8,
    restart_reset_s=60.0,
)


class Driver:
    """A machine, a clock that is moved by hand, and short names for what can happen."""

    def __init__(self, **limits: Any) -> None:
        self.machine = Machine(replace(LIMITS, **limits))
        self.now = 100.0

    def do(self, stimulus: Stimulus) -> list[Action]:
        return self.machine.handle(stimulus, self.now)

    def pool(
        self,
        name: str = "p",
        *,
        max_workers: int = 1,
        startup_timeout_s: float = 50.0,
        idle_timeout_s: float | None = None,
        max_jobs_per_life: int | None = None,
        warm_spares: int = 0,
    ) -> None:
        limits = (max_workers, startup_timeout_s, idle_timeout_s, max_jobs_per_life, warm_spares)
        assert self.do(PoolDefined(name, *limits)) == []

    def submit(
        self, job: str, pool: str = "p", *, deadline_s: float | None = None, retries: int = 0
    ) -> list[Action]:
        return self.do(JobSubmitted(job, pool, deadline_s, retries))

    def ready(self, worker: str) -> list[Action]:
        return self.do(WorkerReady(worker))

    def done(self, worker: str, job: str, attempt: int = 1) -> list[Action]:
        return self.do(JobReplied(worker, job, attempt, "done", None))

    def dies(self, worker: str, *, code: int | None = -9, tail: tuple[str, ...] = ()) -> list[Action]:
        return self.do(WorkerExited(worker, code, "was killed by SIGKILL", tail))

    def refuses(self, worker: str, why: str = "no module named x") -> list[Action]:
        """The worker says why it can't start, and exits."""
        said = self.do(StartFailed(worker, StartupError(f"worker {worker}: {why}", traceback=why)))
        return said + self.do(WorkerExited(worker, 1, "exited with code 1", ()))

    def cancel(self, job: str) -> list[Action]:
        return self.do(CancelRequested(job))

    def later(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.do(Tick())

    def until_due(self) -> list[Action]:
        """Wait for the next deadline and handle it."""
        due = self.machine.next_deadline_s()
        assert due is not None
        self.now = max(self.now, due)
        return self.do(Tick())

    def running(self, job: str = "j", **options: Any) -> None:
        """A pool whose worker w1 runs a job."""
        self.pool()
        assert self.submit(job, **options) == [SpawnWorker("w1", "p")]
        assert self.ready("w1") == [SendJob("w1", job, 1)]


def resolution(actions: list[Action], job: str) -> ResolveJob:
    found = [action for action in actions if isinstance(action, ResolveJob) and action.job == job]
    assert len(found) == 1, f"{job} in {actions}"
    return found[0]


def ended(actions: list[Action], job: str, state: TerminalState, error: type[LegionError]) -> LegionError:
    resolved = resolution(actions, job)
    assert resolved.state == state
    assert type(resolved.error) is error
    assert resolved.error is not None
    return resolved.error


@pytest.fixture
def legion() -> Driver:
    return Driver()


# --- a job's straight way -----------------------------------------------------------------------------


def test_a_job_waits_for_its_worker_runs_and_is_done(legion: Driver) -> None:
    legion.pool()
    assert legion.submit("j") == [SpawnWorker("w1", "p")]
    assert legion.ready("w1") == [SendJob("w1", "j", 1)]
    assert legion.done("w1", "j") == [ResolveJob("j", "done", None)]
    assert legion.machine.jobs == {}


def test_a_warm_worker_is_used_again(legion: Driver) -> None:
    legion.running()
    legion.done("w1", "j")
    assert legion.submit("k") == [SendJob("w1", "k", 1)]
    assert legion.machine.workers["w1"].jobs_done == 1


def test_a_failed_job_keeps_its_error_and_its_worker(legion: Driver) -> None:
    legion.running()
    error = JobFailed("a node raised")
    assert legion.do(JobReplied("w1", "j", 1, "failed", error)) == [ResolveJob("j", "failed", error)]
    assert legion.submit("k") == [SendJob("w1", "k", 1)]


def test_a_pool_is_defined_once(legion: Driver) -> None:
    legion.running()
    legion.pool(max_workers=3)
    assert legion.machine.pools["p"].max_workers == 1


# --- 1: each accepted job is resolved exactly once ----------------------------------------------------


def test_a_reply_after_the_end_resolves_nothing_again(legion: Driver) -> None:
    legion.running()
    legion.done("w1", "j")
    assert legion.done("w1", "j") == []
    assert legion.cancel("j") == []
    assert legion.dies("w1") == []


def test_a_cancelled_job_that_finishes_all_the_same_is_cancelled_once(legion: Driver) -> None:
    legion.running()
    assert legion.cancel("j") == [Interrupt("w1", "j")]
    assert legion.cancel("j") == []
    actions = legion.done("w1", "j")
    assert ended(actions, "j", "cancelled", JobCancelled).args[0] == "job j was cancelled"
    assert legion.cancel("j") == []


def test_a_job_whose_worker_dies_while_it_is_cancelled_is_cancelled_and_not_lost(legion: Driver) -> None:
    legion.running(retries=3)
    legion.cancel("j")
    ended(legion.dies("w1"), "j", "cancelled", JobCancelled)


def test_a_job_that_passes_its_deadline_in_the_queue_is_resolved_there(legion: Driver) -> None:
    legion.running()
    assert legion.submit("k", deadline_s=legion.now + 10) == []
    assert legion.machine.next_deadline_s() == legion.now + 10
    assert legion.later(9.99) == []
    assert "while it waited" in str(ended(legion.later(0.01), "k", "failed", DeadlineExceeded))
    assert legion.done("w1", "j") == [ResolveJob("j", "done", None)]


def test_a_deadline_is_told_as_its_caller_gave_it(legion: Driver) -> None:
    legion.running()
    legion.do(JobSubmitted("k", "p", legion.now + 3599.9, 0, limit_s=3600.0))
    error = ended(legion.later(3600), "k", "failed", DeadlineExceeded)
    assert "its deadline_s = 3600 passed while it waited" in str(error)


def test_a_job_that_passes_its_deadline_while_it_runs_is_interrupted_and_failed(legion: Driver) -> None:
    legion.running(deadline_s=110.0)
    assert legion.until_due() == [Interrupt("w1", "j")]
    assert legion.cancel("j") == [], "it is being ended already"
    actions = legion.do(JobReplied("w1", "j", 1, "cancelled", JobCancelled("interrupted")))
    assert "while it ran" in str(ended(actions, "j", "failed", DeadlineExceeded))


def test_a_job_submitted_while_closing_is_cancelled_at_once(legion: Driver) -> None:
    legion.pool()
    legion.do(CloseRequested())
    actions = legion.submit("j")
    ended(actions, "j", "cancelled", JobCancelled)
    assert len(actions) == 1


def test_cancelling_a_queued_job_touches_no_worker(legion: Driver) -> None:
    legion.running()
    legion.submit("k")
    actions = legion.cancel("k")
    ended(actions, "k", "cancelled", JobCancelled)
    assert len(actions) == 1
    assert legion.done("w1", "j") == [ResolveJob("j", "done", None)]


def test_what_is_not_known_is_ignored(legion: Driver) -> None:
    legion.pool()
    for stimulus in (
        CancelRequested("nobody"),
        WorkerReady("w9"),
        WorkerExited("w9", 0, "exited", ()),
        HeartbeatSeen("w9"),
        StartFailed("w9", StartupError("x")),
    ):
        assert legion.do(stimulus) == []


# --- 2: one job at a time; replies that match ---------------------------------------------------------


def test_a_second_job_waits_until_the_worker_is_free(legion: Driver) -> None:
    legion.running()
    assert legion.submit("k") == []
    assert legion.done("w1", "j") == [ResolveJob("j", "done", None), SendJob("w1", "k", 1)]


def test_jobs_of_a_pool_run_in_the_order_of_their_submission(legion: Driver) -> None:
    legion.running()
    for job in "abc":
        legion.submit(job)
    sent = [legion.done("w1", job)[1] for job in ("j", "a", "b")]
    assert sent == [SendJob("w1", "a", 1), SendJob("w1", "b", 1), SendJob("w1", "c", 1)]


@pytest.mark.parametrize(
    "reply",
    [
        JobReplied("w1", "j", 2, "done", None),
        JobReplied("w1", "other", 1, "done", None),
        JobReplied("w2", "j", 1, "done", None),
        JobReplied("w9", "j", 1, "done", None),
    ],
    ids=["another attempt", "another job", "another worker", "unknown worker"],
)
def test_a_reply_that_does_not_match_is_counted_and_ignored(legion: Driver, reply: JobReplied) -> None:
    legion.pool(max_workers=2)
    legion.submit("j")
    legion.ready("w1")
    legion.do(WarmUpRequested("p", 2))
    legion.ready("w2")
    assert legion.do(reply) == []
    assert legion.machine.ignored_replies == 1
    assert legion.done("w1", "j") == [ResolveJob("j", "done", None)]


def test_a_reply_of_the_first_attempt_does_not_end_the_second(legion: Driver) -> None:
    legion.running(retries=1)
    legion.dies("w1")
    assert legion.ready("w2") == [SendJob("w2", "j", 2)]
    assert legion.done("w1", "j", 1) == []
    assert legion.done("w2", "j", 1) == []
    assert legion.machine.ignored_replies == 2
    assert legion.done("w2", "j", 2) == [ResolveJob("j", "done", None)]


def test_a_second_ready_changes_nothing(legion: Driver) -> None:
    legion.running()
    assert legion.ready("w1") == []
    assert legion.machine.workers["w1"].state == "busy"


# --- 3: lost, retried, poisoned -----------------------------------------------------------------------


def test_a_job_whose_worker_dies_is_lost_with_its_last_words(legion: Driver) -> None:
    legion.running()
    actions = legion.dies("w1", tail=("loading", "Segmentation fault"))
    assert actions == [ResolveJob("j", "lost", actions[0].error), SpawnWorker("w2", "p")]  # type: ignore[union-attr]
    error = ended(actions, "j", "lost", WorkerLost)
    assert isinstance(error, WorkerLost)
    assert (error.job_id, error.worker_id, error.exit_code) == ("j", "w1", -9)
    assert error.log_tail == ("loading", "Segmentation fault")
    assert error.signal_name == "SIGKILL"
    assert str(error).startswith("job j: worker w1 was lost in attempt 1: was killed by SIGKILL")
    assert str(error).endswith("\n  Segmentation fault")


def test_a_job_that_asked_for_retries_runs_again_before_those_behind_it(legion: Driver) -> None:
    legion.running(retries=1)
    legion.submit("behind")
    assert legion.dies("w1") == [RetryNoted("j", 1, "was killed by SIGKILL"), SpawnWorker("w2", "p")]
    assert legion.ready("w2") == [SendJob("w2", "j", 2)]
    ended(legion.dies("w2"), "j", "lost", WorkerLost)
    assert legion.ready("w3") == [SendJob("w3", "behind", 1)]


def test_a_job_that_has_cost_three_workers_is_not_tried_again(legion: Driver) -> None:
    legion.running(retries=100)
    assert RetryNoted("j", 1, "was killed by SIGKILL") in legion.dies("w1")
    legion.ready("w2")
    assert RetryNoted("j", 2, "was killed by SIGKILL") in legion.dies("w2")
    legion.ready("w3")
    assert "it has cost 3 workers" in str(ended(legion.dies("w3"), "j", "lost", WorkerLost))


def test_a_job_that_kills_its_worker_leaves_the_restart_budget_alone(legion: Driver) -> None:
    legion.running("j0")
    for number in range(1, 8):
        assert SpawnWorker(f"w{number + 1}", "p") in legion.dies(f"w{number}")
        legion.submit(f"j{number}")
        assert legion.ready(f"w{number + 1}") == [SendJob(f"w{number + 1}", f"j{number}", 1)]


def test_a_crash_after_a_request_to_stop_tells_of_the_crash(legion: Driver) -> None:
    legion.running()
    assert legion.do(StopRequested(None)) == []
    assert "was killed by SIGKILL" in str(ended(legion.dies("w1"), "j", "lost", WorkerLost))


# --- 4: the restart budget ----------------------------------------------------------------------------


def test_workers_that_die_without_a_job_are_replaced_ever_later_until_the_pool_is_given_up(
    legion: Driver,
) -> None:
    legion.pool()
    legion.submit("j")
    assert legion.dies("w1") == []
    assert legion.machine.next_deadline_s() == legion.now + 0.5
    assert legion.later(0.49) == []
    assert legion.until_due() == [SpawnWorker("w2", "p")]
    assert legion.dies("w2") == []
    assert legion.machine.next_deadline_s() == legion.now + 0.8, "doubled, and capped"
    assert legion.until_due() == [SpawnWorker("w3", "p")]
    error = ended(legion.dies("w3", tail=("no libcuda",)), "j", "failed", StartupError)
    assert "died 3 times in a row (restart_budget = 2); the last, w3: was killed by SIGKILL" in str(error)
    assert "no libcuda" in str(error)


def given_up(legion: Driver) -> None:
    legion.pool()
    legion.submit("first")
    for worker in ("w1", "w2"):
        legion.dies(worker)
        legion.until_due()
    ended(legion.dies("w3"), "first", "failed", StartupError)


def test_a_given_up_pool_says_so_at_once_to_each_new_job(legion: Driver) -> None:
    given_up(legion)
    first, second = (ended(legion.submit(job), job, "failed", StartupError) for job in ("a", "b"))
    assert str(first) == str(second)
    assert first is not second, "each caller has an error of its own to raise"
    assert legion.machine.next_deadline_s() is None


def test_a_given_up_pool_is_tried_again_after_a_while(legion: Driver) -> None:
    given_up(legion)
    assert legion.later(59.9) == []
    ended(legion.submit("early"), "early", "failed", StartupError)
    legion.now += 0.2
    assert legion.submit("late") == [SpawnWorker("w4", "p")]
    assert legion.ready("w4") == [SendJob("w4", "late", 1)]


def test_a_warm_up_or_a_stop_makes_a_given_up_pool_try_again(legion: Driver) -> None:
    given_up(legion)
    (refused,) = legion.submit("early")
    assert isinstance(refused, ResolveJob)
    assert "No worker was started: this spec was given up, and is tried again in 60 s" in str(refused.error)
    assert isinstance(legion.do(WarmUpRequested("p", 1))[0], SpawnWorker)


def test_a_stop_makes_a_given_up_pool_try_again_too(legion: Driver) -> None:
    given_up(legion)
    assert legion.do(StopRequested("p")) == []
    assert isinstance(legion.submit("later")[0], SpawnWorker)


def test_a_completed_job_renews_the_budget(legion: Driver) -> None:
    legion.pool()
    legion.do(WarmUpRequested("p", 1))
    for life in range(6):
        worker, following = f"w{2 * life + 1}", f"w{2 * life + 2}"
        assert legion.dies(worker) == []
        assert legion.until_due() == [SpawnWorker(following, "p")]
        legion.ready(following)
        assert legion.submit(f"j{life}") == [SendJob(following, f"j{life}", 1)]
        legion.done(following, f"j{life}")
        assert legion.dies(following) == [], "this one was idle"
        assert legion.until_due() == [SpawnWorker(f"w{2 * life + 3}", "p")]


def test_other_pools_are_not_touched_by_one_that_is_given_up(legion: Driver) -> None:
    given_up(legion)
    legion.pool("q")
    assert legion.submit("k", "q") == [SpawnWorker("w4", "q")]


def test_a_pool_that_is_given_up_while_a_worker_of_it_lives_goes_on_with_that_one(legion: Driver) -> None:
    legion.pool(max_workers=2)
    legion.submit("a")
    legion.ready("w1")
    assert legion.submit("b") == [SpawnWorker("w2", "p")]
    for worker in ("w2", "w3"):
        legion.dies(worker)
        legion.until_due()
    assert legion.dies("w4") == []
    assert legion.submit("c") == []
    assert legion.done("w1", "a") == [ResolveJob("a", "done", None), SendJob("w1", "b", 1)]
    actions = legion.dies("w1")
    ended(actions, "b", "lost", WorkerLost)
    ended(actions, "c", "failed", StartupError)


# --- 5: a start that failed with a reason -------------------------------------------------------------


def test_a_start_that_failed_with_a_reason_fails_the_waiting_jobs_with_it(legion: Driver) -> None:
    legion.pool()
    legion.submit("a")
    legion.submit("b")
    error = StartupError("worker w1 could not start: no module x", traceback="ImportError: x")
    assert legion.do(StartFailed("w1", error)) == [AskStop("w1")]
    actions = legion.do(WorkerExited("w1", 1, "exited with code 1", ("last words",)))
    assert [action.job for action in actions if isinstance(action, ResolveJob)] == ["a", "b"]
    seen = ended(actions, "a", "failed", StartupError)
    assert str(seen) == str(error)
    assert isinstance(seen, StartupError)
    assert seen.traceback == "ImportError: x"
    assert seen.log_tail == ("last words",), "what it wrote last, where it had not told itself"
    assert len(actions) == 2, "nothing is started again for nobody"


def test_the_next_job_tries_again_and_the_same_reason_gives_the_pool_up(legion: Driver) -> None:
    legion.pool()
    legion.submit("a")
    legion.refuses("w1")
    assert legion.submit("b") == [SpawnWorker("w2", "p")]
    ended(legion.refuses("w2"), "b", "failed", StartupError)
    ended(legion.submit("c"), "c", "failed", StartupError)


def test_another_reason_is_another_try(legion: Driver) -> None:
    legion.pool()
    for number in range(1, 6):
        assert legion.submit(f"j{number}") == [SpawnWorker(f"w{number}", "p")]
        ended(legion.refuses(f"w{number}", f"reason {number}"), f"j{number}", "failed", StartupError)


def test_a_start_that_worked_in_between_breaks_the_row(legion: Driver) -> None:
    legion.pool()
    legion.submit("a")
    legion.refuses("w1")
    legion.submit("b")
    legion.ready("w2")
    legion.do(StopRequested("p"))
    legion.done("w2", "b")
    legion.do(WorkerExited("w2", 0, "exited", ()))
    legion.submit("c")
    legion.refuses("w3")
    assert legion.submit("d") == [SpawnWorker("w4", "p")]


@pytest.mark.parametrize("why", ["could not be started: ENOENT", "was not ready in time"])
def test_a_reason_that_names_the_worker_is_the_same_reason_for_the_next_one(legion: Driver, why: str) -> None:
    legion.pool()
    for worker, job in (("w1", "a"), ("w2", "b")):
        assert legion.submit(job) == [SpawnWorker(worker, "p")]
        legion.do(StartFailed(worker, StartupError(f"worker {worker} {why}")))
        ended(legion.dies(worker), job, "failed", StartupError)
    ended(legion.submit("c"), "c", "failed", StartupError)


def test_a_worker_that_is_not_ready_in_time_is_ended_and_says_which_setting(legion: Driver) -> None:
    legion.pool(startup_timeout_s=30)
    legion.submit("j")
    assert legion.later(29.9) == []
    assert legion.later(0.1) == [SignalWorker("w1", "SIGTERM")]
    assert legion.ready("w1") == [], "too late"
    actions = legion.do(WorkerExited("w1", -15, "was killed by SIGTERM", ("downloading 93%",)))
    error = ended(actions, "j", "failed", StartupTimeout)
    assert "startup_timeout_s = 30" in str(error)
    assert isinstance(error, StartupTimeout)
    assert error.log_tail == ("downloading 93%",)


def test_a_refused_start_beside_a_living_worker_costs_no_job_and_is_repeated_ever_later(
    legion: Driver,
) -> None:
    legion.pool(max_workers=2)
    legion.submit("a")
    legion.ready("w1")
    assert legion.submit("b") == [SpawnWorker("w2", "p")]
    assert legion.refuses("w2", "out of memory: 1") == [AskStop("w2")]
    assert legion.until_due() == [SpawnWorker("w3", "p")]
    assert legion.now == 100.5
    assert legion.refuses("w3", "out of memory: 2") == [AskStop("w3")]
    assert legion.until_due() == [SpawnWorker("w4", "p")]
    assert legion.refuses("w4", "out of memory: 3") == [AskStop("w4")], "and then no more"
    assert legion.later(30) == []
    assert legion.done("w1", "a") == [ResolveJob("a", "done", None), SendJob("w1", "b", 1)]


# --- 6: cancellation and the ladder -------------------------------------------------------------------


def test_a_job_that_goes_on_after_the_grace_costs_its_worker(legion: Driver) -> None:
    legion.running()
    legion.submit("k")
    assert legion.cancel("j") == [Interrupt("w1", "j")]
    assert legion.later(4.9) == []
    assert legion.later(0.1) == [SignalWorker("w1", "SIGTERM")]
    assert legion.later(1.9) == []
    assert legion.later(0.1) == [SignalWorker("w1", "SIGKILL")]
    assert legion.later(1.0) == [SignalWorker("w1", "SIGKILL")], "as long as it is there"
    actions = legion.dies("w1")
    ended(actions, "j", "cancelled", JobCancelled)
    assert actions[1:] == [SpawnWorker("w2", "p")], "at once: it did not die by itself"
    assert legion.ready("w2") == [SendJob("w2", "k", 1)]


def test_a_job_that_answers_within_the_grace_leaves_its_worker(legion: Driver) -> None:
    legion.running()
    legion.cancel("j")
    legion.later(4.9)
    actions = legion.do(JobReplied("w1", "j", 1, "cancelled", JobCancelled("x")))
    ended(actions, "j", "cancelled", JobCancelled)
    assert legion.later(100) == []
    assert legion.submit("k") == [SendJob("w1", "k", 1)]


def test_a_reply_that_comes_after_the_grace_still_ends_the_job_but_not_the_ladder(legion: Driver) -> None:
    legion.running()
    legion.cancel("j")
    legion.later(5)
    actions = legion.done("w1", "j")
    ended(actions, "j", "cancelled", JobCancelled)
    assert actions[1:] == [SpawnWorker("w2", "p")]
    assert legion.submit("k") == [], "w1 takes no job any more"
    assert legion.later(2) == [SignalWorker("w1", "SIGKILL")]


def test_stopping_goes_up_the_ladder_ask_term_kill(legion: Driver) -> None:
    legion.running()
    legion.done("w1", "j")
    assert legion.do(StopRequested("p")) == [AskStop("w1")]
    assert legion.do(StopRequested("p")) == []
    assert legion.later(2.9) == []
    assert legion.later(0.1) == [SignalWorker("w1", "SIGTERM")]
    assert legion.later(2.0) == [SignalWorker("w1", "SIGKILL")]
    assert legion.dies("w1") == [], "it was meant to go, and nobody needs another"
    assert legion.machine.workers == {}


def test_a_busy_worker_is_stopped_after_its_job_and_not_replaced(legion: Driver) -> None:
    legion.pool(max_workers=2)
    legion.submit("a")
    legion.submit("b")
    legion.ready("w1")
    legion.ready("w2")
    assert legion.do(StopRequested(None)) == []
    assert legion.done("w1", "a") == [ResolveJob("a", "done", None), AskStop("w1")]
    assert legion.done("w2", "b") == [ResolveJob("b", "done", None), AskStop("w2")]
    assert legion.dies("w1") == []
    assert legion.dies("w2") == []
    assert legion.submit("c") == [SpawnWorker("w3", "p")], "jobs that come later start new ones"


def test_stopping_one_pool_leaves_the_others(legion: Driver) -> None:
    legion.running()
    legion.pool("q")
    legion.submit("k", "q")
    assert legion.do(StopRequested("q")) == [AskStop("w2")]
    assert legion.machine.workers["w1"].expected is False


def test_closing_cancels_every_job_and_asks_every_worker(legion: Driver) -> None:
    legion.running()
    legion.submit("waits")
    legion.pool("q")
    legion.submit("starts", "q")
    actions = legion.do(CloseRequested())
    assert Interrupt("w1", "j") in actions
    assert [a for a in actions if isinstance(a, AskStop)] == [AskStop("w1"), AskStop("w2")]
    for job in ("waits", "starts"):
        assert "closed" in str(ended(actions, job, "cancelled", JobCancelled))
    assert legion.later(3.0) == [SignalWorker("w1", "SIGTERM"), SignalWorker("w2", "SIGTERM")]
    ended(legion.dies("w1"), "j", "cancelled", JobCancelled)
    assert legion.dies("w2") == []
    assert legion.machine.next_deadline_s() is None


def test_nothing_is_started_while_closing(legion: Driver) -> None:
    legion.pool()
    legion.do(CloseRequested())
    assert legion.do(WarmUpRequested("p", 1)) == []
    assert legion.later(100) == []
    assert legion.machine.next_deadline_s() is None


def test_a_cancelled_job_on_a_worker_that_is_stopping_leaves_no_deadline_behind(legion: Driver) -> None:
    legion = Driver(cancel_grace_s=0.1)
    legion.running()
    legion.do(CloseRequested())
    legion.later(1.0)
    due = legion.machine.next_deadline_s()
    assert due is not None
    assert due > legion.now, "the loop would spin until the worker has ended"


# --- heartbeats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [True, False])
def test_a_worker_that_falls_silent_is_killed_outright(busy: bool) -> None:
    legion = Driver(heartbeat_timeout_s=20.0)
    legion.running()
    if not busy:
        legion.done("w1", "j")
    assert legion.later(15) == []
    legion.do(HeartbeatSeen("w1"))
    assert legion.later(15) == []
    assert legion.later(5) == [SignalWorker("w1", "SIGKILL")], "a stopped process takes no SIGTERM"
    actions = legion.dies("w1")
    if busy:
        assert "it hung: no heartbeat for heartbeat_timeout_s = 20" in str(
            ended(actions, "j", "lost", WorkerLost)
        )
    else:
        assert legion.machine.pools["p"].deaths == 1


def test_a_pool_given_up_over_hung_workers_says_that_they_hung() -> None:
    legion = Driver(heartbeat_timeout_s=20.0, restart_budget=0, max_workers=1)
    legion.running()
    legion.done("w1", "j")
    legion.until_due()
    legion.submit("k")
    assert "the last, w1: it hung" in str(ended(legion.dies("w1"), "k", "failed", StartupError))


def test_silence_proves_nothing_after_a_stall_of_our_own() -> None:
    legion = Driver(heartbeat_timeout_s=20.0)
    legion.running()
    legion.now += 500
    assert legion.do(Stalled()) == []
    assert legion.do(Tick()) == []
    assert legion.later(20) == [SignalWorker("w1", "SIGKILL")]


def test_a_reply_is_a_sign_of_life() -> None:
    legion = Driver(heartbeat_timeout_s=20.0)
    legion.running()
    legion.now += 19
    legion.done("w1", "j")
    assert legion.later(19) == []


def test_a_worker_that_starts_need_not_beat() -> None:
    legion = Driver(heartbeat_timeout_s=20.0)
    legion.pool(startup_timeout_s=500)
    legion.submit("j")
    assert legion.later(400) == []
    assert legion.ready("w1") == [SendJob("w1", "j", 1)]
    assert legion.later(19.9) == []


# --- how many workers ---------------------------------------------------------------------------------


def test_a_pool_grows_with_its_queue_up_to_its_maximum(legion: Driver) -> None:
    legion.pool(max_workers=2)
    assert legion.submit("a") == [SpawnWorker("w1", "p")]
    assert legion.submit("b") == [SpawnWorker("w2", "p")]
    assert legion.submit("c") == []


def test_a_worker_that_starts_is_counted_on(legion: Driver) -> None:
    legion.pool(max_workers=4)
    legion.do(WarmUpRequested("p", 1))
    assert legion.submit("a") == []
    assert legion.submit("b") == [SpawnWorker("w2", "p")]


def test_a_warm_up_starts_workers_and_a_larger_one_more(legion: Driver) -> None:
    legion.pool(max_workers=3)
    assert legion.do(WarmUpRequested("p", 2)) == [SpawnWorker("w1", "p"), SpawnWorker("w2", "p")]
    assert legion.do(WarmUpRequested("p", 1)) == []
    assert legion.do(WarmUpRequested("p", 9)) == [SpawnWorker("w3", "p")]


def test_all_pools_together_keep_to_the_limit() -> None:
    legion = Driver(max_workers=2)
    legion.pool("p", max_workers=5)
    legion.pool("q", max_workers=5)
    legion.submit("a", "p")
    legion.submit("b", "p")
    assert legion.submit("c", "q") == []
    assert legion.submit("d", "p") == []


def test_an_idle_worker_makes_room_for_another_pool() -> None:
    legion = Driver(max_workers=1)
    legion.running()
    legion.done("w1", "j")
    legion.pool("q")
    assert legion.submit("k", "q") == [AskStop("w1")]
    assert legion.submit("l", "q") == [], "one is enough"
    assert legion.dies("w1") == [SpawnWorker("w2", "q")]


def test_the_worker_that_was_idle_longest_makes_room() -> None:
    legion = Driver(max_workers=2)
    for worker, pool in (("w1", "p"), ("w2", "q")):
        legion.pool(pool)
        legion.submit(pool, pool)
        legion.ready(worker)
    legion.now += 1
    legion.done("w2", "q")
    legion.now += 1
    legion.done("w1", "p")
    legion.pool("r")
    assert legion.submit("k", "r") == [AskStop("w2")]


def test_a_pool_without_room_gets_it_as_soon_as_a_busy_worker_is_free() -> None:
    legion = Driver(max_workers=1)
    legion.running()
    legion.pool("q")
    assert legion.submit("k", "q") == []
    assert legion.done("w1", "j") == [ResolveJob("j", "done", None), AskStop("w1")]
    assert legion.dies("w1") == [SpawnWorker("w2", "q")]


def test_a_pool_without_room_gets_it_as_soon_as_a_starting_worker_is_idle() -> None:
    legion = Driver(max_workers=1)
    legion.pool("p")
    legion.do(WarmUpRequested("p", 1))
    legion.pool("q")
    assert legion.submit("k", "q") == []
    assert legion.ready("w1") == [AskStop("w1")]
    assert legion.dies("w1") == [SpawnWorker("w2", "q")]


def test_room_goes_to_the_job_that_has_waited_longest() -> None:
    legion = Driver(max_workers=1)
    legion.running()
    legion.done("w1", "j")
    legion.pool("q")
    legion.submit("first", "q")
    legion.now += 1
    assert legion.submit("second", "p") == []
    assert legion.dies("w1") == [SpawnWorker("w2", "q")]


def served_for(legion: Driver, seconds: int) -> list[Action]:
    """Pool p, whose worker w1 runs b0, gets a job a second, one more than it ends, for so long."""
    actions: list[Action] = []
    for number in range(seconds):
        legion.now += 1
        legion.submit(f"b{number + 1}")
        actions += legion.done("w1", f"b{number}")
    return actions


def test_a_pool_that_never_runs_dry_hands_its_place_on_when_another_has_waited_its_turn() -> None:
    legion = Driver(max_workers=1)
    legion.running("b0")
    legion.pool("q")
    assert legion.submit("patient", "q") == []
    assert AskStop("w1") not in served_for(legion, 4)
    legion.submit("last")
    legion.now += 2
    assert legion.done("w1", "b4") == [ResolveJob("b4", "done", None), AskStop("w1")]
    assert legion.dies("w1", code=0) == [SpawnWorker("w2", "q")]
    legion.now += 1
    assert legion.ready("w2") == [SendJob("w2", "patient", 1)]
    assert legion.done("w2", "patient") == [ResolveJob("patient", "done", None), AskStop("w2")]
    assert legion.dies("w2", code=0) == [SpawnWorker("w3", "p")]
    assert legion.ready("w3") == [SendJob("w3", "last", 1)]


def test_a_turn_is_several_starts_long() -> None:
    legion = Driver(max_workers=1)
    legion.pool("q")
    legion.submit("slow to start", "q")
    legion.now += 10
    legion.ready("w1")
    legion.pool("p")
    legion.submit("b0")
    legion.done("w1", "slow to start")
    legion.dies("w1", code=0)
    legion.ready("w2")
    legion.submit("patient", "q")
    for number in range(39):
        legion.now += 1
        legion.submit(f"b{number + 1}")
        assert AskStop("w2") not in legion.done("w2", f"b{number}")
    legion.now += 1
    legion.submit("last")
    assert AskStop("w2") in legion.done("w2", "b39"), "40 s are over, four starts of 10 s"


def test_a_waiting_job_that_was_cancelled_takes_no_place(legion: Driver) -> None:
    legion = Driver(max_workers=1)
    legion.running("b0")
    legion.pool("q")
    legion.submit("patient", "q")
    served_for(legion, 4)
    legion.cancel("patient")
    legion.now += 9
    legion.submit("more")
    assert legion.done("w1", "b4") == [ResolveJob("b4", "done", None), SendJob("w1", "more", 1)]


def test_an_idle_worker_ends_after_its_time_and_is_not_replaced(legion: Driver) -> None:
    legion.pool(idle_timeout_s=30.0)
    legion.submit("j")
    legion.ready("w1")
    legion.later(40)
    legion.done("w1", "j")
    assert legion.later(29) == []
    assert legion.later(1) == [AskStop("w1")]
    assert legion.dies("w1") == []
    assert legion.submit("k") == [SpawnWorker("w2", "p")]


def test_a_worker_that_has_run_its_share_of_jobs_is_replaced(legion: Driver) -> None:
    legion.pool(max_jobs_per_life=2)
    legion.submit("a")
    legion.ready("w1")
    legion.submit("b")
    legion.submit("c")
    assert legion.done("w1", "a") == [ResolveJob("a", "done", None), SendJob("w1", "b", 1)]
    assert legion.done("w1", "b") == [ResolveJob("b", "done", None), AskStop("w1"), SpawnWorker("w2", "p")]
    assert legion.ready("w2") == [SendJob("w2", "c", 1)]
    assert legion.dies("w1") == []


def test_a_worker_that_has_run_its_share_is_replaced_after_its_exit_where_there_is_no_room() -> None:
    legion = Driver(max_workers=1)
    legion.pool(max_jobs_per_life=1)
    legion.submit("a")
    legion.ready("w1")
    assert legion.done("w1", "a") == [ResolveJob("a", "done", None), AskStop("w1")]
    assert legion.dies("w1") == [SpawnWorker("w2", "p")]


def test_a_deadline_is_looked_for_among_the_few_jobs_that_have_one(legion: Driver) -> None:
    legion.running()
    for number in range(50):
        legion.submit(f"plain{number}")
    legion.submit("timed", deadline_s=legion.now + 7)
    assert legion.machine.next_deadline_s() == legion.now + 7
    legion.cancel("timed")
    assert legion.machine.next_deadline_s() == legion.now + LIMITS.heartbeat_timeout_s


# --- the tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", list(JOB_TABLE))
@pytest.mark.parametrize("state", list(JOB_TABLE))
def test_a_job_goes_only_where_its_table_says(state: Any, to: Any) -> None:
    job = JobRecord("j", "p", 0.0, None, 0, state=state)
    before = copy.copy(job)
    if to in JOB_TABLE[state]:
        job.to(to)
        assert job == replace(before, state=to)
    else:
        with pytest.raises(IllegalTransition, match=f"job j: {state} -> {to}"):
            job.to(to)
        assert job == before


@pytest.mark.parametrize("to", list(WORKER_TABLE))
@pytest.mark.parametrize("state", list(WORKER_TABLE))
def test_a_worker_goes_only_where_its_table_says(state: Any, to: Any) -> None:
    worker = WorkerRecord("w1", "p", 0.0, 0.0, state=state)
    before = copy.copy(worker)
    if to in WORKER_TABLE[state]:
        worker.to(to)
        assert worker == replace(before, state=to)
    else:
        with pytest.raises(IllegalTransition, match=f"worker w1: {state} -> {to}"):
            worker.to(to)
        assert worker == before


def test_every_way_a_job_can_go_ends_in_one_of_four_states() -> None:
    ends = {state for state, following in JOB_TABLE.items() if not following}
    assert ends == {"done", "failed", "cancelled", "lost"}
    assert all(following & ends for following in JOB_TABLE.values() if following)


def test_every_worker_can_be_seen_dead() -> None:
    assert all("dead" in following for state, following in WORKER_TABLE.items() if state != "dead")
    assert WORKER_TABLE["dead"] == frozenset()


def test_a_job_that_its_worker_had_not_begun_is_given_to_another_unasked() -> None:
    legion = Driver()
    legion.pool()
    legion.submit("j")
    legion.ready("w1")
    actions = legion.do(WorkerExited("w1", -9, "was killed by SIGKILL", (), begun=False))
    assert actions == [RetryNoted("j", 1, "was killed by SIGKILL"), SpawnWorker("w2", "p")]
    assert legion.ready("w2") == [SendJob("w2", "j", 2)]
    assert isinstance(legion.dies("w2")[0], ResolveJob), "it had begun, and asked for no retries"


def test_a_job_that_no_worker_lives_to_begin_is_poisoned_all_the_same() -> None:
    legion = Driver()
    legion.pool()
    legion.submit("j")
    for number in (1, 2):
        legion.ready(f"w{number}")
        legion.do(WorkerExited(f"w{number}", -9, "was killed by SIGKILL", (), begun=False))
    legion.ready("w3")
    actions = legion.do(WorkerExited("w3", -9, "was killed by SIGKILL", (), begun=False))
    assert isinstance(actions[0], ResolveJob)
    assert actions[0].state == "lost"
    assert "has cost 3 workers" in str(actions[0].error)


def test_of_a_crash_is_told_what_broke_and_where_without_the_other_threads() -> None:
    thread = ["Thread 0x01 (most recent call first):", *['  File "other.py", line 1 in run'] * 40, ""]
    current = ["Current thread 0x02 (most recent call first):", '  File "node.py", line 7 in go']
    told = quoted(("loading", "Fatal Python error: Segmentation fault", "", *thread, *current))
    assert told.splitlines()[1:] == [
        "  loading",
        "  Fatal Python error: Segmentation fault",
        f"  {current[0]}",
        f"  {current[1]}",
    ]
    assert quoted(("Fatal Python error: Aborted", "no more")).endswith("Aborted\n  no more")
    assert quoted(tuple(map(str, range(50)))).splitlines()[1:] == [f"  {n}" for n in range(30, 50)]
