from __future__ import annotations

import asyncio
import copy
import gc
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch

from legion_shm import job_context
from legion_shm.errors import InvalidWorkflow, JobCancelled, JobFailed, LegionError
from legion_shm.supervisor.engine import Engine
from legion_shm.supervisor.graph import GraphEngine
from tests.engine.graph_harness import Harness, Prompt, engine_with, node, node_class


def source(value: object, **attributes: Any) -> type:
    return node_class(lambda: (value,), **attributes)


def failing(error: BaseException) -> type:
    def run(**inputs: object) -> object:
        raise error

    return node_class(run, optional={"value": ("*",)}, returns=(), output=True)


ADD = node_class(lambda a, b: (a + b,), required={"a": ("*",), "b": ("*",)})
EXPORT = "LegionExporter"


def test_the_engine_is_an_engine() -> None:
    engine: Engine = GraphEngine()
    assert engine.name == "graph"


def test_start_says_what_it_loaded() -> None:
    with engine_with({"Add": ADD}) as harness:
        info = harness.engine.start()
        assert info.name == "graph"
        assert info.versions["torch"] == torch.__version__
        assert info.node_classes == len(harness.engine.node_classes)
        assert {"Add", "LoadImage", "LegionImporter"} <= set(harness.engine.node_classes)


def test_an_engine_that_was_not_started_says_so() -> None:
    with pytest.raises(LegionError, match="call start"):
        Harness(GraphEngine()).run({"1": node(EXPORT)})


def test_values_flow_along_links_and_nodes_report_in_order() -> None:
    with engine_with({"Add": ADD, "Two": source(2)}) as harness:
        outcome = harness.run(
            {
                "sum": node("Add", a=["two", 0], b=["more", 0]),
                "out": node(EXPORT, input_1=["sum", 0], input_2=["two", 0]),
                "more": node("Add", a=["two", 0], b=3),
                "two": node("Two"),
                "unused": node("Two"),
            }
        )
        assert outcome.outputs == {"output_1": 7, "output_2": 2}
        assert (outcome.executed, outcome.cached) == (4, 0)
        assert harness.events.nodes == [
            (name, status) for name in ("two", "more", "sum", "out") for status in ("started", "finished")
        ]


def test_a_chain_far_longer_than_pythons_recursion_limit_runs() -> None:
    count = 20 * sys.getrecursionlimit() // 10
    prompt: Prompt = {"0": node("Two")}
    prompt |= {str(n): node("Add", a=[str(n - 1), 0], b=1) for n in range(1, count)}
    prompt["out"] = node(EXPORT, input_1=[str(count - 1), 0])
    with engine_with({"Add": ADD, "Two": source(2)}) as harness:
        assert harness.run(prompt).outputs == {"output_1": count + 1}


def test_nodes_run_without_gradients() -> None:
    with engine_with({"Mode": node_class(lambda: (torch.is_grad_enabled(),))}) as harness:
        outcome = harness.run({"1": node("Mode"), "2": node(EXPORT, input_1=["1", 0])})
        assert outcome.outputs == {"output_1": False}
        assert torch.is_grad_enabled()


def test_hidden_inputs_are_filled_in() -> None:
    seen: list[dict[str, Any]] = []

    def look(**inputs: Any) -> tuple[()]:
        seen.append(copy.deepcopy(inputs))
        inputs["prompt"]["1"]["inputs"].clear()
        return ()

    hidden = {"prompt": "PROMPT", "me": "UNIQUE_ID", "png": "EXTRA_PNGINFO", "token": "AUTH_TOKEN_COMFY_ORG"}
    look_class = node_class(look, optional={"a": ("INT",)}, hidden=hidden, returns=(), output=True)
    with engine_with({"Look": look_class}) as harness:
        harness.run({"1": node("Look", a="5"), "2": node("Look", a=6)})
    assert [entry["me"] for entry in seen] == ["1", "2"]
    assert seen[0]["png"] is None
    assert seen[0]["token"] is None
    assert seen[1]["prompt"]["1"] == node("Look", a=5), "a node's change of its prompt was seen by another"


def test_a_node_that_changes_its_constants_changes_only_its_own() -> None:
    seen: list[object] = []

    def eat(values: dict[str, list[int]]) -> tuple[()]:
        seen.append(list(values["a"]))
        values["a"].clear()
        return ()

    eater = node_class(
        eat, required={"values": ("DICT",)}, returns=(), output=True, IS_CHANGED=lambda **_: float("nan")
    )
    prompt = {"1": node("Eater", values={"a": [1, 2]})}
    with engine_with({"Eater": eater}) as harness:
        harness.run(prompt)
        harness.run(prompt)
    assert seen == [[1, 2], [1, 2]]
    assert prompt["1"]["inputs"]["values"] == {"a": [1, 2]}


def test_ui_and_result_of_an_output_node_both_arrive() -> None:
    show = node_class(
        lambda text: {"ui": {"text": [text], "one": "x"}, "result": (text.upper(),)},
        required={"text": ("STRING",)},
        output=True,
    )
    quiet = node_class(lambda: {"ui": {}}, returns=(), output=True)
    with engine_with({"Show": show, "Quiet": quiet}) as harness:
        outcome = harness.run(
            {"1": node("Show", text="a"), "2": node(EXPORT, input_1=["1", 0]), "3": node("Quiet")}
        )
    assert outcome.ui == {"1": {"text": ["a"], "one": ["x"]}}
    assert outcome.outputs == {"output_1": "A"}


def test_a_list_output_makes_the_next_node_run_once_per_item_and_short_lists_repeat_their_last() -> None:
    many = node_class(
        lambda: ([1, 2, 3], [10, 20], 100), returns=("*",) * 3, OUTPUT_IS_LIST=(True, True, False)
    )
    add3 = node_class(lambda a, b, c: (a + b + c,), required={"a": ("*",), "b": ("*",), "c": ("*",)})
    whole = node_class(lambda a, k: ([a, k],), required={"a": ("*",), "k": ("INT",)}, INPUT_IS_LIST=True)
    with engine_with({"Many": many, "Add3": add3, "Whole": whole}) as harness:
        outcome = harness.run(
            {
                "1": node("Many"),
                "2": node("Add3", a=["1", 0], b=["1", 1], c=["1", 2]),
                "3": node("Whole", a=["2", 0], k=7),
                "4": node(EXPORT, input_1=["2", 0], input_2=["3", 0]),
            }
        )
    assert outcome.outputs == {"output_1": [111, 122, 123], "output_2": [[111, 122, 123], [7]]}


def test_a_list_output_of_several_calls_is_one_list() -> None:
    many = node_class(lambda: ([1, 2],), OUTPUT_IS_LIST=(True,))
    twice = node_class(lambda a: ((a, a * 10),), required={"a": ("*",)}, OUTPUT_IS_LIST=(True,))
    with engine_with({"Many": many, "Twice": twice}) as harness:
        outcome = harness.run(
            {"1": node("Many"), "2": node("Twice", a=["1", 0]), "3": node(EXPORT, input_1=["2", 0])}
        )
    assert outcome.outputs == {"output_1": [1, 10, 2, 20]}


def test_an_empty_list_makes_the_next_node_run_not_at_all() -> None:
    none = node_class(lambda: ([],), OUTPUT_IS_LIST=(True,))
    with engine_with({"None": none, "Add": ADD}) as harness:
        outcome = harness.run(
            {"1": node("None"), "2": node("Add", a=["1", 0], b=5), "3": node(EXPORT, input_1=["2", 0])}
        )
    assert outcome.outputs == {"output_1": []}


def test_async_functions_of_one_node_run_together() -> None:
    both = asyncio.Event()
    waiting: list[int] = []

    async def meet(a: int) -> tuple[int]:
        waiting.append(a)
        if len(waiting) == 2:
            both.set()
        await asyncio.wait_for(both.wait(), timeout=10)
        return (a * 2,)

    many = node_class(lambda: ([1, 2],), OUTPUT_IS_LIST=(True,))
    meeting = node_class(meet, required={"a": ("*",)}, is_async=True)
    with engine_with({"Many": many, "Meet": meeting}) as harness:
        outcome = harness.run(
            {"1": node("Many"), "2": node("Meet", a=["1", 0]), "3": node(EXPORT, input_1=["2", 0])}
        )
    assert outcome.outputs == {"output_1": [2, 4]}


def test_async_functions_of_one_job_share_a_loop_and_the_next_job_has_another() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def look() -> tuple[()]:
        loops.append(asyncio.get_running_loop())
        return ()

    looking = node_class(look, returns=(), output=True, is_async=True, IS_CHANGED=lambda **_: float("nan"))
    with engine_with({"Look": looking}) as harness:
        for _ in range(2):
            harness.run({"1": node("Look"), "2": node("Look")})
        assert loops[0] is loops[1]
        assert loops[1] is not loops[2]
        assert all(loop.is_closed() for loop in loops)


def test_a_task_that_a_node_left_behind_ends_with_the_job() -> None:
    left: list[asyncio.Task[None]] = []

    async def leave() -> tuple[()]:
        left.append(asyncio.create_task(asyncio.sleep(60)))
        return ()

    with engine_with({"Leave": node_class(leave, returns=(), output=True, is_async=True)}) as harness:
        harness.run({"1": node("Leave")})
        assert left[0].cancelled()


def test_a_failing_async_function_ends_the_others() -> None:
    ended: list[str] = []

    async def run(a: int) -> tuple[int]:
        if a == 1:
            raise ValueError("one")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("two")
        return (a,)

    many = node_class(lambda: ([1, 2],), OUTPUT_IS_LIST=(True,))
    with engine_with(
        {"Many": many, "Run": node_class(run, required={"a": ("*",)}, is_async=True)}
    ) as harness:
        with pytest.raises(JobFailed, match="one"):
            harness.run(
                {"1": node("Many"), "2": node("Run", a=["1", 0]), "3": node(EXPORT, input_1=["2", 0])}
            )
        assert ended == ["two"]


def test_a_node_keeps_its_object_while_it_stays_in_the_prompts() -> None:
    class Counter:
        RETURN_TYPES = ("INT",)
        FUNCTION = "count"

        def __init__(self) -> None:
            self.calls = 0

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, object]:  # noqa: N802 - the protocol's name
            return {"required": {}}

        @classmethod
        def IS_CHANGED(cls) -> float:  # noqa: N802 - the protocol's name
            return float("nan")

        def count(self) -> tuple[int]:
            self.calls += 1
            return (self.calls,)

    prompt = {
        "1": node("Counter"),
        "2": node("Counter"),
        "3": node(EXPORT, input_1=["1", 0], input_2=["2", 0]),
    }
    with engine_with({"Counter": Counter, "Two": source(2)}) as harness:
        assert harness.run(prompt).outputs == {"output_1": 1, "output_2": 1}
        assert harness.run(prompt).outputs == {"output_1": 2, "output_2": 2}
        harness.run({"1": node("Two"), "3": node(EXPORT, input_1=["1", 0])})
        assert harness.run(prompt).outputs == {"output_1": 1, "output_2": 1}


def test_a_node_that_raises_fails_the_job_and_tells_everything() -> None:
    image = torch.zeros(1, 4, 5, 3)

    def run(image: object, text: str, more: object) -> object:
        raise ValueError(f"cannot do {text}")

    bad = node_class(
        run, required={"image": ("IMAGE",), "text": ("STRING",), "more": ("*",)}, returns=("IMAGE",)
    )
    classes = {"Bad": bad, "Source": source(image, returns=("IMAGE",))}
    with engine_with(classes) as harness:
        with pytest.raises(JobFailed) as caught:
            harness.run(
                {
                    "1": node("Source"),
                    "7": node("Bad", image=["1", 0], text="x" * 1000, more={"k": [1, 2]}),
                    "9": node(EXPORT, input_1=["7", 0]),
                },
                job_id="j5",
            )
        error = caught.value
        assert (error.job_id, error.node_id, error.class_type) == ("j5", "7", "Bad")
        assert error.exception_type == "ValueError"
        assert error.exception_message == "cannot do " + "x" * 1000
        assert "node 7 (Bad) of job j5 failed: ValueError: cannot do x" in str(error)
        assert "in run" in error.traceback
        assert error.traceback.rstrip().endswith("x")
        lines = dict(line.split(": ", 1) for line in error.inputs_summary.splitlines())
        assert lines["image"] == "Tensor[1,4,5,3] float32 cpu"
        assert lines["text"].startswith("str of 1000: 'xxx")
        assert len(lines["text"]) < 200
        assert lines["more"] == "dict of 1: 'k': list of 2: 1, 2"
        assert harness.events.nodes[-1] == ("7", "started")
        again = harness.run({"1": node("Source"), "2": node(EXPORT, input_1=["1", 0])})
        assert torch.equal(again.outputs["output_1"], image)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error", [SystemExit(3), RecursionError(), asyncio.CancelledError(), JobCancelled("not ours")]
)
def test_whatever_a_node_raises_is_the_jobs_failure_and_not_the_workers(error: BaseException) -> None:
    with engine_with({"Bad": failing(error)}) as harness:
        with pytest.raises(JobFailed) as caught:
            harness.run({"1": node("Bad")})
        assert caught.value.exception_type.endswith(type(error).__qualname__)
        assert harness.run({"1": node(EXPORT)}).outputs == {}


def test_an_exception_of_a_package_is_named_in_full() -> None:
    with engine_with({"Bad": failing(subprocess.CalledProcessError(1, "x"))}) as harness:
        with pytest.raises(JobFailed) as caught:
            harness.run({"1": node("Bad")})
        assert caught.value.exception_type == "subprocess.CalledProcessError"


class Hostile(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


class HostileValue:
    def __getattr__(self, name: str) -> object:
        raise RuntimeError("no")


def test_values_and_exceptions_that_cannot_be_shown_are_told_of_all_the_same() -> None:
    with engine_with({"Bad": failing(Hostile()), "Value": source(HostileValue())}) as harness:
        with pytest.raises(JobFailed) as caught:
            harness.run({"0": node("Value"), "1": node("Bad", value=["0", 0])})
        assert caught.value.exception_type.endswith("Hostile")
        assert caught.value.inputs_summary.startswith("value: <HostileValue")


def test_a_failure_has_a_bounded_text() -> None:
    huge = [["x" * 10_000] * 1000] * 1000
    with engine_with({"Bad": failing(ValueError("y" * 1_000_000)), "Value": source(huge)}) as harness:
        with pytest.raises(JobFailed) as caught:
            harness.run({"0": node("Value"), "1": node("Bad", value=["0", 0])})
        error = caught.value
        texts = str(error) + error.exception_message + error.traceback + error.inputs_summary
        assert len(texts) < 60_000


def test_a_failure_keeps_none_of_the_jobs_values_alive() -> None:
    alive: list[weakref.ref[Any]] = []

    def make() -> tuple[torch.Tensor]:
        tensor = torch.zeros(10)
        alive.append(weakref.ref(tensor))
        return (tensor,)

    def fail(value: object) -> object:
        raise ValueError("x")

    maker = node_class(make, IS_CHANGED=lambda **_: float("nan"))
    bad = node_class(fail, required={"value": ("*",)}, returns=(), output=True)
    with engine_with({"Make": maker, "Bad": bad}) as harness:
        with pytest.raises(JobFailed) as caught:
            harness.run({"0": node("Make"), "1": node("Bad", value=["0", 0])})
        gc.collect()
        assert alive[0]() is None, caught.value


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ("word", "it returned str instead of a tuple of 2 outputs"),
        (None, "it returned NoneType instead of a tuple of 2 outputs"),
        ((1,), "it returned 1 outputs, but RETURN_TYPES declares 2"),
        ((1, 2, 3), "it returned 3 outputs, but RETURN_TYPES declares 2"),
        ({"result": 5}, "it returned int instead of a tuple"),
        ({"ui": 5, "result": (1, 2)}, "its 'ui' is int, not a dict"),
        ({"expand": {}, "result": (1, 2)}, "subgraph"),
        ({"ui": {}}, "gave no outputs"),
        ((1, 5), "output 1 is a list by OUTPUT_IS_LIST, but it returned int there"),
        ((1, "abc"), "output 1 is a list by OUTPUT_IS_LIST, but it returned str there"),
    ],
)
def test_a_result_that_is_not_what_the_class_declares_fails_clearly(returned: object, text: str) -> None:
    wrong = node_class(lambda: returned, returns=("*", "*"), OUTPUT_IS_LIST=(False, True))
    with engine_with({"Wrong": wrong}) as harness, pytest.raises(JobFailed) as caught:
        harness.run({"1": node("Wrong"), "2": node(EXPORT, input_1=["1", 0])})
    assert text in caught.value.exception_message


def test_a_forgotten_comma_is_guessed() -> None:
    with (
        engine_with({"Wrong": node_class(lambda: torch.zeros(1))}) as harness,
        pytest.raises(JobFailed) as caught,
    ):
        harness.run({"1": node("Wrong"), "2": node(EXPORT, input_1=["1", 0])})
    assert "is a comma missing" in caught.value.exception_message


def test_an_invalid_workflow_found_by_a_node_stays_one_and_names_the_node() -> None:
    with engine_with({}) as harness, pytest.raises(InvalidWorkflow) as caught:
        harness.run(
            {"1": node("LegionInput", name="seed"), "2": node(EXPORT, input_1=["1", 0])}, {"other": 1}
        )
    assert caught.value.node_id == "1"
    assert "'seed'" in str(caught.value)
    assert "other" in str(caught.value)


def test_progress_and_previews_name_the_running_node() -> None:
    def run(a: int) -> tuple[int]:
        job_context.progress(a, 10)
        job_context.preview("picture")
        job_context.current_job().progress(1, 2, node_id="other")
        return (a,)

    with engine_with({"Run": node_class(run, required={"a": ("INT",)})}) as harness:
        harness.run({"5": node("Run", a=3), "6": node(EXPORT, input_1=["5", 0])})
        assert harness.events.progressed == [("5", 3, 10), ("other", 1, 2)]
        assert harness.events.previewed == [("5", "picture")]


def test_interrupting_between_nodes_stops_before_the_next() -> None:
    with engine_with({"Two": source(2), "Add": ADD}) as harness:

        def on_node(node_id: str, status: str) -> None:
            if (node_id, status) == ("1", "finished"):
                harness.engine.interrupt("j1")

        harness.events.on_node = on_node
        prompt = {"1": node("Two"), "2": node("Add", a=["1", 0], b=1), "3": node(EXPORT, input_1=["2", 0])}
        with pytest.raises(JobCancelled) as caught:
            harness.run(prompt, job_id="j1")
        assert caught.value.job_id == "j1"
        assert harness.events.nodes == [("1", "started"), ("1", "finished")]
        assert harness.run(prompt, job_id="j2").outputs == {"output_1": 3}


@pytest.mark.parametrize("check", [job_context.check_cancelled, lambda: job_context.progress(1, 2)])
def test_interrupting_from_another_thread_stops_a_node_that_checks(check: Any) -> None:
    started = threading.Event()

    def loop() -> tuple[()]:
        started.set()
        for _ in iter(int, 1):
            check()
        return ()

    with engine_with({"Loop": node_class(loop, returns=(), output=True)}) as harness:

        def interrupt() -> None:
            assert started.wait(10)
            harness.engine.interrupt("other")
            harness.engine.interrupt("j1")

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(JobCancelled, match="in node 1"):
            harness.run({"1": node("Loop")}, job_id="j1")
        thread.join(timeout=10)


def test_a_node_that_turns_the_interruption_into_another_error_is_still_cancelled() -> None:
    def run() -> tuple[()]:
        job = job_context.current_job()
        job.cancel()
        try:
            job.check_cancelled()
        except JobCancelled as error:
            raise RuntimeError("sampler stopped") from error
        return ()

    with (
        engine_with({"Run": node_class(run, returns=(), output=True)}) as harness,
        pytest.raises(JobCancelled),
    ):
        harness.run({"1": node("Run")})


def test_interrupting_the_last_node_cancels_the_job() -> None:
    def run() -> tuple[()]:
        job_context.current_job().cancel()
        return ()

    with (
        engine_with({"Run": node_class(run, returns=(), output=True)}) as harness,
        pytest.raises(JobCancelled),
    ):
        harness.run({"1": node("Run")})


def test_interrupting_stops_a_node_that_awaits() -> None:
    started = threading.Event()

    async def wait() -> tuple[()]:
        started.set()
        await asyncio.sleep(60)
        return ()

    with engine_with({"Wait": node_class(wait, returns=(), output=True, is_async=True)}) as harness:

        def interrupt() -> None:
            assert started.wait(10)
            harness.engine.interrupt("j1")

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(JobCancelled):
            harness.run({"1": node("Wait")}, job_id="j1")
        thread.join(timeout=10)


def test_an_interruption_that_comes_before_the_job_is_not_lost_and_hits_no_other() -> None:
    with engine_with({"Two": source(2)}) as harness:
        prompt = {"1": node("Two"), "2": node(EXPORT, input_1=["1", 0])}
        harness.engine.interrupt("j2")
        assert harness.run(prompt, job_id="j1").outputs == {"output_1": 2}
        with pytest.raises(JobCancelled) as caught:
            harness.run(prompt, job_id="j2")
        assert caught.value.job_id == "j2"
        assert harness.events.nodes == []
        assert harness.run(prompt, job_id="j3").outputs == {"output_1": 2}


def test_interruptions_of_jobs_that_never_come_are_forgotten_in_the_end() -> None:
    with engine_with({"Two": source(2)}) as harness:
        for number in range(5000):
            harness.engine.interrupt(f"never-{number}")
        prompt = {"1": node("Two"), "2": node(EXPORT, input_1=["1", 0])}
        assert harness.run(prompt, job_id="never-0").outputs == {"output_1": 2}
        with pytest.raises(JobCancelled):
            harness.run(prompt, job_id="never-4999")


def test_importing_the_engine_loads_no_torch() -> None:
    code = "import sys, legion_shm.supervisor.graph; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
