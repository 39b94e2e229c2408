from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from legion_shm.errors import InvalidWorkflow, JobFailed
from legion_shm.supervisor.graph_cache import encode_constant
from tests.engine.graph_harness import Harness, engine_with, node, node_class

EXPORT = "LegionExporter"


class Counted:
    """A node class that counts its runs and passes ``a`` on."""

    def __init__(self, **attributes: Any) -> None:
        self.runs = 0
        attributes.setdefault("optional", {"a": ("*",), "b": ("*",)})
        self.node_class = node_class(self._run, **attributes)

    def _run(self, **inputs: object) -> tuple[object]:
        self.runs += 1
        return (inputs.get("a"),)


def run_counts(counted: Counted, *prompts: dict[str, Any]) -> list[int]:
    """How often the class ran in each of the prompts."""
    counts: list[int] = []
    with engine_with({"Counted": counted.node_class, "Other": Counted().node_class}) as harness:
        for prompt in prompts:
            before = counted.runs
            harness.run({**prompt, "out": node(EXPORT, input_1=["1", 0])})
            counts.append(counted.runs - before)
    return counts


def test_an_equal_node_runs_once_and_its_value_is_delivered_again() -> None:
    counted = Counted()
    prompt = {"1": node("Counted", a=5), "2": node(EXPORT, input_1=["1", 0])}
    with engine_with({"Counted": counted.node_class}) as harness:
        first, second = harness.run(prompt), harness.run(prompt)
        assert first.outputs == second.outputs == {"output_1": 5}
        assert (first.executed, first.cached) == (2, 0)
        assert (second.executed, second.cached) == (1, 1)
        assert harness.events.nodes == [("1", "cached"), ("2", "started"), ("2", "finished")]
    assert counted.runs == 1


def test_everything_behind_a_kept_node_counts_as_cached() -> None:
    counted = Counted()
    prompt = {
        "1": node("Counted", a=5),
        "2": node("Counted", a=["1", 0]),
        "3": node("Counted", a=["2", 0]),
        "4": node(EXPORT, input_1=["3", 0]),
    }
    with engine_with({"Counted": counted.node_class}) as harness:
        harness.run(prompt)
        outcome = harness.run(prompt)
        assert (outcome.executed, outcome.cached) == (1, 3)
        assert harness.events.with_status("cached") == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 5}, {"a": 6}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": 1}, {"a": True}),
        ({"a": "1"}, {"a": 1}),
        ({"a": 5}, {"b": 5}),
        ({"a": {"x": 1}}, {"a": {"x": 2}}),
        ({"a": {"__value__": [1, [2]]}}, {"a": {"__value__": [1, 2]}}),
    ],
)
def test_a_changed_constant_makes_a_node_run_again(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert run_counts(Counted(), {"1": node("Counted", **first)}, {"1": node("Counted", **second)}) == [1, 1]


def test_a_change_upstream_makes_a_node_run_again() -> None:
    prompts = [{"0": node("Other", a=a), "1": node("Counted", a=["0", 0])} for a in (1, 1, 2)]
    assert run_counts(Counted(), *prompts) == [1, 0, 1]


def test_another_slot_of_the_same_node_is_another_input() -> None:
    two = node_class(lambda: (1, 2), returns=("*", "*"))
    counted = Counted()
    with engine_with({"Counted": counted.node_class, "Two": two}) as harness:
        for slot in (0, 1, 1):
            outcome = harness.run(
                {"1": node("Two"), "2": node("Counted", a=["1", slot]), "3": node(EXPORT, input_1=["2", 0])}
            )
            assert outcome.outputs == {"output_1": slot + 1}
    assert counted.runs == 2


def test_a_node_is_found_again_under_another_id() -> None:
    counted = Counted()
    with engine_with({"Counted": counted.node_class}) as harness:
        harness.run({"1": node("Counted", a=5), "2": node(EXPORT, input_1=["1", 0])})
        harness.run({"x": node("Counted", a=5), "y": node(EXPORT, input_1=["x", 0])})
        twins = {"x": node("Counted", a=7), "y": node("Counted", a=7)}
        outcome = harness.run({**twins, "z": node(EXPORT, input_1=["x", 0], input_2=["y", 0])})
        assert outcome.outputs == {"output_1": 7, "output_2": 7}
        assert (outcome.executed, outcome.cached) == (2, 1)
    assert counted.runs == 2


@pytest.mark.parametrize(
    "attributes", [{"hidden": {"me": "UNIQUE_ID"}}, {"NOT_IDEMPOTENT": True}, {"output": True}]
)
def test_a_node_that_depends_on_its_id_is_not_found_under_another(attributes: dict[str, Any]) -> None:
    counted = Counted(**attributes)
    with engine_with({"Counted": counted.node_class}) as harness:
        twins = {"1": node("Counted", a=7), "2": node("Counted", a=7)}
        prompt = {**twins, "z": node(EXPORT, input_1=["1", 0], input_2=["2", 0])}
        harness.run(prompt)
        assert counted.runs == 2
        harness.run(prompt)
        assert counted.runs == 2


def test_only_what_the_last_prompt_used_stays() -> None:
    one, other = {"1": node("Counted", a=1)}, {"1": node("Counted", a=2)}
    assert run_counts(Counted(), one, one, other, one) == [1, 0, 1, 1]


def test_a_kept_output_node_reports_its_ui_again() -> None:
    show = node_class(lambda: {"ui": {"text": ["hello"]}}, returns=(), output=True)
    with engine_with({"Show": show}) as harness:
        harness.run({"1": node("Show")})
        outcome = harness.run({"1": node("Show")})
        assert outcome.ui == {"1": {"text": ["hello"]}}
        assert (outcome.executed, outcome.cached) == (0, 1)


@pytest.mark.parametrize(
    ("is_changed", "counts"),
    [
        (lambda **_: "same", [1, 0]),
        (lambda **_: float("nan"), [1, 1]),
        (lambda **_: object(), [1, 1]),
        (lambda **_: 1 / 0, [1, 1]),
    ],
)
def test_is_changed_decides_whether_a_node_runs_again(
    is_changed: Callable[..., object], counts: list[int]
) -> None:
    counted = Counted(IS_CHANGED=staticmethod(is_changed))
    prompt = {"1": node("Counted", a=5)}
    assert run_counts(counted, prompt, prompt) == counts


def test_is_changed_sees_constants_and_none_for_links() -> None:
    seen: list[dict[str, object]] = []

    async def is_changed(**inputs: object) -> str:
        seen.append(inputs)
        return str(len(seen))

    counted = Counted(IS_CHANGED=staticmethod(is_changed), hidden={"me": "UNIQUE_ID"})
    prompt = {"0": node("Other", a=1), "1": node("Counted", a=["0", 0], b=3)}
    assert run_counts(counted, prompt, prompt) == [1, 1]
    assert seen == [{"a": None, "b": 3, "me": "1"}] * 2


def test_nobody_asks_a_node_for_changes_whose_outputs_go_into_nothing_that_is_kept() -> None:
    asked: list[str] = []

    def is_changed(**_: object) -> str:
        asked.append("never kept")
        return "same"

    passing = Counted(IS_CHANGED=staticmethod(is_changed), KEEP_OUTPUTS=False)
    prompt = {"1": node("Counted", a=5)}
    assert run_counts(passing, prompt, prompt) == [1, 1]
    assert asked == []


def test_a_slot_that_says_what_it_is_speaks_for_its_node() -> None:
    asked: list[str] = []

    def is_changed(**_: object) -> str:
        asked.append("never kept")
        return "same"

    def signatures(**_: object) -> list[bytes | None]:
        return [b"the same", None]

    source = node_class(
        lambda: ("value", "other"),
        IS_CHANGED=staticmethod(is_changed),
        OUTPUT_SIGNATURES=staticmethod(signatures),
        KEEP_OUTPUTS=False,
        returns=("*", "*"),
    )
    keeping = Counted()
    with engine_with({"Source": source, "Keeping": keeping.node_class}) as harness:
        for slot, runs, times_asked in ((0, 1, 0), (1, 2, 2)):
            prompt = {"0": node("Source"), "1": node("Keeping", a=["0", slot])}
            prompt["out"] = node(EXPORT, input_1=["1", 0])
            harness.run(prompt)
            harness.run(prompt)
            assert (keeping.runs, len(asked)) == (runs, times_asked)


@pytest.mark.parametrize("between", [1, 2, 3])
def test_a_kept_node_counts_by_what_the_never_kept_nodes_before_it_are_made_of(between: int) -> None:
    now = ["first"]
    source = node_class(
        lambda: (now[0],), IS_CHANGED=staticmethod(lambda **_: now[0]), KEEP_OUTPUTS=False, returns=("*",)
    )
    passing, keeping = Counted(KEEP_OUTPUTS=False), Counted()
    prompt: dict[str, Any] = {"0": node("Source")}
    for number in range(between):
        prompt[str(number + 1)] = node("Passing", a=[str(number), 0])
    prompt["kept"] = node("Keeping", a=[str(between), 0])
    prompt["out"] = node(EXPORT, input_1=["kept", 0])
    classes = {"Source": source, "Passing": passing.node_class, "Keeping": keeping.node_class}
    with engine_with(classes) as harness:
        assert harness.run(prompt).outputs == {"output_1": "first"}
        assert harness.run(prompt).outputs == {"output_1": "first"}
        assert keeping.runs == 1
        now[0] = "second"
        assert harness.run(prompt).outputs == {"output_1": "second"}
        assert keeping.runs == 2


def importer_prompt() -> dict[str, Any]:
    return {
        "in": node("LegionImporter"),
        "1": node("Counted", a=["in", 0]),
        "2": node("Counted", a=["in", 1]),
        "out": node(EXPORT, input_1=["1", 0], input_2=["2", 0]),
    }


def counted_runs(counted: Counted, harness: Harness, inputs: dict[str, object], *ids: bytes | None) -> int:
    before = counted.runs
    identities = {f"input_{n}": identity for n, identity in enumerate(ids, start=1)}
    outcome = harness.run(importer_prompt(), inputs, identities)
    assert outcome.outputs == {f"output_{n}": inputs.get(f"input_{n}") for n in (1, 2)}
    return counted.runs - before


def test_each_input_of_a_job_counts_by_its_own_identity() -> None:
    counted = Counted()
    with engine_with({"Counted": counted.node_class}) as harness:
        assert counted_runs(counted, harness, {"input_1": "a", "input_2": "b"}, b"A", b"B") == 2
        assert counted_runs(counted, harness, {"input_1": "a", "input_2": "b"}, b"A", b"B") == 0
        assert counted_runs(counted, harness, {"input_1": "a", "input_2": "c"}, b"A", b"C") == 1
        assert counted_runs(counted, harness, {"input_1": "a"}, b"A") == 1
        assert counted_runs(counted, harness, {"input_1": "a"}, b"A") == 0


def test_two_inputs_of_equal_identity_are_one_value() -> None:
    counted = Counted()
    with engine_with({"Counted": counted.node_class}) as harness:
        assert counted_runs(counted, harness, {"input_1": "a", "input_2": "a"}, b"A", b"A") == 1


def test_what_comes_from_an_input_without_identity_runs_again_and_is_not_kept() -> None:
    counted = Counted()
    with engine_with({"Counted": counted.node_class}) as harness:
        for _ in range(2):
            tensor = torch.zeros(4)
            gone = weakref.ref(tensor)
            outcome = harness.run(
                importer_prompt(), {"input_1": tensor, "input_2": "b"}, {"input_1": None, "input_2": b"B"}
            )
            del outcome, tensor
            gc.collect()
            assert gone() is None, "the engine holds a value that can never be given again"
    assert counted.runs == 3


def test_an_input_is_not_held_by_its_importer() -> None:
    length = node_class(lambda a: (len(a),), required={"a": ("*",)})
    prompt = {
        "in": node("LegionImporter"),
        "1": node("Len", a=["in", 0]),
        "out": node(EXPORT, input_1=["1", 0]),
    }
    with engine_with({"Len": length}) as harness:
        tensor = torch.zeros(4)
        gone = weakref.ref(tensor)
        assert harness.run(prompt, {"input_1": tensor}, {"input_1": b"T"}).outputs == {"output_1": 4}
        del tensor
        gc.collect()
        assert gone() is None
        assert harness.run(prompt, {"input_1": None}, {"input_1": b"T"}).outputs == {"output_1": 4}


def test_values_are_let_go_when_their_last_reader_has_run() -> None:
    alive: list[weakref.ref[Any]] = []
    seen: list[bool] = []

    def make(a: object = None) -> tuple[torch.Tensor]:
        gc.collect()
        seen.append(any(ref() is not None for ref in alive[:-1]))
        tensor = torch.zeros(4)
        alive.append(weakref.ref(tensor))
        return (tensor,)

    maker = node_class(make, optional={"a": ("*",)}, IS_CHANGED=lambda **_: float("nan"))
    prompt = {"0": node("Make"), **{str(n): node("Make", a=[str(n - 1), 0]) for n in range(1, 5)}}
    prompt["out"] = node(EXPORT, input_1=["4", 0])
    with engine_with({"Make": maker}) as harness:
        harness.run(prompt)
    assert seen == [False] * 5


def test_what_ran_before_a_failure_is_kept() -> None:
    counted = Counted()
    wanted = [True]

    def fail(a: object) -> tuple[()]:
        if wanted:
            raise ValueError
        return ()

    failing = node_class(fail, required={"a": ("*",)}, returns=(), output=True)
    prompt = {"1": node("Counted", a=5), "2": node("Fail", a=["1", 0])}
    with engine_with({"Counted": counted.node_class, "Fail": failing}) as harness:
        with pytest.raises(JobFailed):
            harness.run(prompt)
        wanted.clear()
        outcome = harness.run(prompt)
        assert (outcome.executed, outcome.cached) == (1, 1)
    assert counted.runs == 1


def test_free_drops_values_objects_and_plans() -> None:
    counted = Counted()
    prompt = {"1": node("Counted", a=5), "2": node(EXPORT, input_1=["1", 0])}
    with engine_with({"Counted": counted.node_class}) as harness:
        harness.run(prompt)
        harness.engine.free()
        harness.run(prompt)
    assert counted.runs == 2


def test_free_during_a_job_waits_for_its_end() -> None:
    counted = Counted()
    prompt = {
        "1": node("Counted", a=5),
        "2": node("Counted", a=["1", 0]),
        "3": node(EXPORT, input_1=["2", 0]),
    }
    with engine_with({"Counted": counted.node_class}) as harness:
        harness.events.on_node = lambda node_id, status: harness.engine.free() if node_id == "1" else None
        assert harness.run(prompt).outputs == {"output_1": 5}
        harness.events.on_node = None
        harness.run(prompt)
    assert counted.runs == 4


def test_a_prompt_is_validated_once_by_its_digest_and_a_refused_one_again() -> None:
    asked: list[int] = []
    answer: list[object] = [True]

    def validate(a: int) -> object:
        asked.append(a)
        return answer[0]

    shown = node_class(
        lambda a: (),
        required={"a": ("INT",)},
        returns=(),
        output=True,
        VALIDATE_INPUTS=staticmethod(validate),
    )
    with engine_with({"Shown": shown}) as harness:
        harness.run({"1": node("Shown", a=1)})
        harness.run({"1": node("Shown", a=1)})
        assert asked == [1]
        answer[0] = "no"
        for _ in range(2):
            with pytest.raises(InvalidWorkflow):
                harness.run({"1": node("Shown", a=2)})
        assert asked == [1, 2, 2]
        answer[0] = True
        for a in range(100, 200):
            harness.run({"1": node("Shown", a=a)})
        harness.run({"1": node("Shown", a=1)})
        assert asked[-1] == 1, "plans are kept without bound"


def test_equal_constants_have_equal_bytes_and_others_have_not() -> None:
    values: list[object] = [
        None, True, False, 0, 1, -1, 0.0, 1.0, -0.0, "", "0", "None", b"", b"0", [], [[]], [0], [0, 1],
        [[0], 1], [0, [1]], {}, {"a": 1}, {"a": 1, "b": 2}, {"a": {"b": 2}}, ["a", 1, "b", 2], 10**400,
        "ab", ["a", "b"], float("inf"),
    ]  # fmt: skip
    encoded = [encode_constant(value) for value in values]
    assert None not in encoded
    assert len(set(encoded)) == len(values)
    assert encode_constant({"a": 1, "b": 2}) == encode_constant({"b": 2, "a": 1})
    assert encode_constant((1, 2)) == encode_constant([1, 2])


@pytest.mark.parametrize("value", [float("nan"), object(), [float("nan")], {"a": object()}, torch.zeros(1)])
def test_what_equals_nothing_has_no_bytes(value: object) -> None:
    assert encode_constant(value) is None
