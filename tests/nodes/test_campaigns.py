"""Runs in the background, joins, and the life of workers, with workers of the graph engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from legion_shm.errors import JobCancelled, JobFailed, LegionError, StartupError
from legion_shm.nodes.shared_supervisor import shared_supervisor
from tests.nodes.support import ASYNC_YAML, GRAPH_YAML, call, config, flow, image, invert, master, text
from tests.system.support import Gate, gone, in_threads, pid_of, wait_for

# --- background ---------------------------------------------------------------------------------------


def test_an_async_master_returns_at_once_and_join_gives_the_outputs(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    campaign, *outputs = master(gate.flow(), 5, yaml=ASYNC_YAML)
    assert all("Join Campaign" in str(output) for output in outputs)
    gate.entered()
    assert campaign.status == "running"
    gate.open()
    assert call("LegionJoin", legion_campaign=campaign)[0] == 5
    assert call("LegionJoin", legion_campaign=campaign)[0] == 5


def test_several_joins_wait_for_one_campaign_at_once(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    campaign, *_ = master(gate.flow(), 5, yaml=ASYNC_YAML)
    gate.entered()
    results: list[Any] = [None] * 4

    def join(number: int) -> None:
        if number == 3:
            gate.open()
            results[number] = call("LegionJoinAll", campaign_1=campaign)[0].wait()["output_1"]
        else:
            results[number] = call("LegionJoin", legion_campaign=campaign)[0]

    in_threads(4, join)
    assert results == [5] * 4


def test_two_campaigns_on_two_workers_overlap_and_join_all_gets_both(tmp_path: Path) -> None:
    gates = [Gate(tmp_path, name) for name in ("one", "two")]
    campaigns = []
    for port, gate in zip((8200, 8201), gates, strict=True):
        yaml = ASYNC_YAML.replace("type: graph\n", f"type: graph\n  port: {port}\n")
        campaigns.append(master(gate.flow(), port, yaml=yaml)[0])
    for gate in gates:
        gate.entered()
    assert [campaign.status for campaign in campaigns] == ["running", "running"]
    for gate in gates:
        gate.open()
    one, two, *rest = call("LegionJoinAll", campaign_1=campaigns[0], campaign_2=campaigns[1])
    assert [one, two, *rest] == [*campaigns, None, None]
    assert [call("LegionJoin", legion_campaign=campaign)[0] for campaign in (one, two)] == [8200, 8201]


def test_join_all_waits_for_all_before_it_raises_the_first_error() -> None:
    bad, *_ = master(flow("TestRaise", text="first"), 1, yaml=ASYNC_YAML)
    slow, *_ = master(flow("TestSleep", seconds=0.2), 1, yaml=ASYNC_YAML)
    with pytest.raises(JobFailed, match="first"):
        call("LegionJoinAll", campaign_1=bad, campaign_3=slow)
    assert slow.status == "done"


def test_join_of_a_cancelled_campaign_returns_with_that_error(tmp_path: Path) -> None:
    campaign, *_ = master(flow("TestSleep", seconds=60, cooperate=True), 1, yaml=ASYNC_YAML)
    wait_for(lambda: campaign.status == "running", "it runs")
    campaign.cancel()
    for _ in range(2):
        with pytest.raises(JobCancelled):
            call("LegionJoin", legion_campaign=campaign)
    with pytest.raises(JobCancelled):
        call("LegionJoinAll", campaign_1=campaign)


def test_join_of_a_warmed_up_campaign_says_what_to_connect() -> None:
    (campaign,) = call("LegionWarmup", legion_config=config())
    with pytest.raises(LegionError, match="Warmupper"):
        call("LegionJoin", legion_campaign=campaign)


# --- workers ------------------------------------------------------------------------------------------


def workers(configuration: Any) -> list[Any]:
    from legion_shm.nodes.shared_supervisor import spec_for
    from legion_shm.supervisor.resolve import resolve_spec

    key = resolve_spec(spec_for(configuration)).key
    return [worker for worker in shared_supervisor().workers() if worker.spec_key == key]


def test_equal_configurations_share_a_worker_and_others_do_not() -> None:
    yamls = [GRAPH_YAML + f'    WHO: "{who}"\n' for who in ("a", "a", "b")]
    ids = []
    for yaml in yamls:
        assert master(flow(), 1, yaml=yaml)[1] == 1
        (worker,) = workers(config(yaml))
        ids.append(worker.id)
    assert ids[0] == ids[1] != ids[2]


def test_the_warmupper_waits_until_the_worker_is_ready_and_the_master_uses_it() -> None:
    yaml = GRAPH_YAML + '    WHO: "warm"\n'
    (campaign,) = call("LegionWarmup", legion_config=config(yaml))
    (worker,) = workers(config(yaml))
    assert worker.state == "idle"
    call("LegionMaster3", legion_campaign=campaign, workflow_text=text(flow()), input_1=1)
    assert [one.id for one in workers(config(yaml))] == [worker.id]


def test_the_warmupper_in_the_background_does_not_wait() -> None:
    yaml = GRAPH_YAML + '    WHO: "background"\n'
    call("LegionWarmup", legion_config=config(yaml), wait=False)
    (worker,) = workers(config(yaml))
    assert worker.state in ("starting", "idle")
    wait_for(lambda: workers(config(yaml))[0].state == "idle", "it is ready")


def test_the_warmupper_that_waits_raises_why_the_worker_cannot_start() -> None:
    with pytest.raises(StartupError, match=r"no\.such\.module"):
        call(
            "LegionWarmup",
            legion_config=config("comfyui.type: graph\nexecution.node_modules: no.such.module"),
        )


def test_release_ends_the_worker_and_says_how_much_memory_came_back() -> None:
    yaml = GRAPH_YAML + '    WHO: "released"\n'
    master(invert(), image(), yaml=yaml)
    (worker,) = workers(config(yaml))
    others = {one.id for one in shared_supervisor().workers()} - {worker.id}
    done = call("LegionRelease", legion_config=config(yaml), after="later")
    after, report, mib = done["result"]
    assert after == "later"
    assert mib > 10, "a process with torch in it"
    assert report == done["ui"]["text"][0] == f"1 worker ended, {mib:,.0f} MiB of memory came back"
    wait_for(lambda: gone(pid_of(worker)), "the process is gone")
    assert {one.id for one in shared_supervisor().workers()} == others
    assert "no such worker" in call("LegionRelease", legion_config=config(yaml))["result"][1]
    assert master(flow(), 1, yaml=yaml)[1] == 1


def test_release_can_free_what_a_worker_keeps_and_leave_it_running() -> None:
    campaign, *_ = master(invert(), image(1024, 1024))
    (worker,) = workers(config())
    done = call("LegionRelease", legion_campaign=campaign, what="free its models and caches")
    assert done["result"][1].startswith("1 worker emptied")
    assert [one.id for one in workers(config())] == [worker.id]


def test_release_waits_for_a_running_job_and_gives_up_after_its_timeout(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    yaml = ASYNC_YAML.replace("OMP", 'WHO: "busy"\n    OMP')
    campaign, *_ = master(gate.flow(), 5, yaml=yaml)
    gate.entered()
    with pytest.raises(LegionError, match="run jobs still"):
        call("LegionRelease", legion_campaign=campaign, timeout=0.2)
    gate.open()
    assert call("LegionJoin", legion_campaign=campaign)[0] == 5


def test_release_of_all_ends_all() -> None:
    assert master(flow(), 1)[1] == 1
    assert "ended" in call("LegionRelease")["result"][1]
    assert shared_supervisor().workers() == ()
