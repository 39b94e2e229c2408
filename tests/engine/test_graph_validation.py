from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from legion_shm.errors import InvalidWorkflow
from legion_shm.nodes.any_type import ANY
from legion_shm.supervisor.graph_protocol import parse_link, types_fit
from tests.engine.graph_harness import Harness, Prompt, engine_with, node, node_class

RAN: list[dict[str, object]] = []


def record(**inputs: object) -> tuple[()]:
    RAN.append(inputs)
    return ()


def sink(required: dict[str, Any] | None = None, **more: Any) -> type:
    return node_class(record, required=required, returns=(), output=True, **more)


class Lenient(dict[str, Any]):
    """As in node packs that take any number of inputs."""

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: str) -> Any:
        return ("*",)


def only_cats(image: str) -> bool | str:
    return True if image == "cat" else f"{image} is no cat"


async def slow_no(**inputs: object) -> bool:
    return False


CLASSES = {
    "Image": node_class(lambda: ("an image",), returns=("IMAGE",)),
    "Number": node_class(lambda: (5,), returns=("INT",)),
    "Two": node_class(lambda: (1, 2), returns=("INT", "FLOAT")),
    "Choice": node_class(lambda: ("a",), returns=(["a", "b"],)),
    "Anything": node_class(lambda: (1,), returns=(ANY,)),
    "Relay": node_class(lambda value=None: (value,), optional={"value": ("*",)}),
    "Scale": sink({"image": ("IMAGE",), "width": ("INT", {"min": 1, "max": 100}), "by": ("FLOAT",)}),
    "Text": sink({"text": ("STRING",), "flag": ("BOOLEAN",)}),
    "Pick": sink({"old": (["a", "b"],), "new": ("COMBO", {"options": ["x", "y"]})}),
    "PickLong": sink({"item": ([str(n) for n in range(50)],)}),
    "PickMany": sink({"items": ("COMBO", {"options": ["x", "y"], "multiselect": True})}),
    "Union": sink({"number": ("INT,FLOAT",)}),
    "Image2": sink({"image": ("IMAGE",)}),
    "TakesList": sink({"items": ("LIST",)}),
    "Optional": sink(optional={"image": ("IMAGE",), "width": ("INT", {"default": 7})}),
    "Lenient": node_class(record, optional=Lenient(), returns=(), output=True),
    "Cats": sink({"image": (["listed"],)}, VALIDATE_INPUTS=staticmethod(only_cats)),
    "Kwargs": sink(
        {"a": ("INT", {"max": 1}), "b": ("IMAGE",)},
        VALIDATE_INPUTS=staticmethod(lambda **inputs: inputs == {"a": 5, "b": None} or f"got {inputs}"),
    ),
    "Types": sink(
        {"a": ("IMAGE",)},
        VALIDATE_INPUTS=staticmethod(lambda input_types: input_types == {"a": "INT"} or f"got {input_types}"),
    ),
    "SlowNo": sink({"a": ("INT",)}, VALIDATE_INPUTS=staticmethod(slow_no)),
    "Broken": sink({"a": ("INT",)}, VALIDATE_INPUTS=staticmethod(lambda a: 1 / 0)),
    "BadTypes": type(
        "BadTypes",
        (),
        {"INPUT_TYPES": classmethod(lambda _cls: 5), "RETURN_TYPES": (), "FUNCTION": "run",
         "OUTPUT_NODE": True, "run": lambda _self: ()},
    ),
    "Dyn": node_class(record, hidden={"prompt": "DYNPROMPT"}, returns=(), output=True),
    "Raw": sink({"a": ("INT", {"rawLink": True})}),
    "Incomparable": sink({"a": ("THING", {"min": 1})}),
}  # fmt: skip


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    with engine_with(CLASSES) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    RAN.clear()


def problems(harness: Harness, prompt: Any) -> InvalidWorkflow:
    with pytest.raises(InvalidWorkflow) as caught:
        harness.run(prompt)
    assert RAN == []
    assert harness.events.nodes == []
    return caught.value


def test_a_right_prompt_runs_with_its_constants_converted(harness: Harness) -> None:
    harness.run(
        {
            "1": node("Image"),
            "2": node("Scale", image=["1", 0], width="42", by=2),
            "3": node("Text", text=5, flag=0),
        }
    )
    assert RAN == [{"image": "an image", "width": 42, "by": 2.0}, {"text": "5", "flag": False}]
    assert type(RAN[0]["by"]) is float


def test_a_converted_number_is_cut_and_not_rounded(harness: Harness) -> None:
    harness.run({"1": node("Image"), "2": node("Scale", image=["1", 0], width=2.9, by="1e1")})
    assert RAN == [{"image": "an image", "width": 2, "by": 10.0}]


@pytest.mark.parametrize(
    ("class_type", "inputs", "kind", "input_name"),
    [
        ("Scale", {"image": ["1", 0], "by": 1.0}, "required_input_missing", "width"),
        ("Scale", {"image": ["1", 0], "width": 0, "by": 1.0}, "value_smaller_than_min", "width"),
        ("Scale", {"image": ["1", 0], "width": 101, "by": 1.0}, "value_bigger_than_max", "width"),
        ("Scale", {"image": ["1", 0], "width": "wide", "by": 1.0}, "invalid_input_type", "width"),
        ("Scale", {"image": ["1", 0], "width": None, "by": 1.0}, "invalid_input_type", "width"),
        ("Scale", {"image": ["2", 0], "width": 1, "by": 1.0}, "return_type_mismatch", "image"),
        ("Scale", {"image": ["3", 0], "width": 1, "by": 1.0}, "return_type_mismatch", "image"),
        ("Scale", {"image": ["1", 1], "width": 1, "by": 1.0}, "bad_linked_input", "image"),
        ("Scale", {"image": ["1", -1], "width": 1, "by": 1.0}, "bad_linked_input", "image"),
        ("Scale", {"image": ["77", 0], "width": 1, "by": 1.0}, "bad_linked_input", "image"),
        ("Scale", {"image": ["1", 0, 0], "width": 1, "by": 1.0}, "bad_linked_input", "image"),
        ("Scale", {"image": ["1", "0"], "width": 1, "by": 1.0}, "bad_linked_input", "image"),
        ("Scale", {"image": ["1", 0.5], "width": 1, "by": 1.0}, "bad_linked_input", "image"),
        ("Scale", {"image": ["1", float("nan")], "width": 1, "by": 1.0}, "bad_linked_input", "image"),
        ("Scale", {"image": [[], {}], "width": 1, "by": 1.0}, "bad_linked_input", "image"),
        ("Pick", {"old": "c", "new": "x"}, "value_not_in_list", "old"),
        ("Pick", {"old": "a", "new": "z"}, "value_not_in_list", "new"),
        ("PickMany", {"items": {"__value__": ["x", "z"]}}, "value_not_in_list", "items"),
        ("Union", {"number": ["1", 0]}, "return_type_mismatch", "number"),
        ("Cats", {"image": "listed"}, "custom_validation_failed", "image"),
        ("SlowNo", {"a": 1}, "custom_validation_failed", "a"),
        ("Broken", {"a": 1}, "exception_during_validation", None),
        ("BadTypes", {}, "exception_during_validation", None),
        ("Dyn", {}, "unsupported_node", None),
        ("Raw", {"a": ["2", 0]}, "unsupported_node", "a"),
        ("Incomparable", {"a": "text"}, "exception_during_validation", "a"),
    ],
)
def test_a_wrong_input_is_named(
    harness: Harness, class_type: str, inputs: dict[str, object], kind: str, input_name: str | None
) -> None:
    prompt = {"1": node("Image"), "2": node("Number"), "3": node("Choice"), "9": node(class_type, **inputs)}
    error = problems(harness, prompt)
    assert error.node_id == "9"
    assert error.input_name == input_name
    assert len(error.problems) == 1
    assert f"node 9 ({class_type})" in error.problems[0]
    assert f": {kind}: " in error.problems[0]
    assert str(error) == error.problems[0]


def test_all_problems_of_all_nodes_are_told_at_once(harness: Harness) -> None:
    error = problems(
        harness,
        {
            "1": node("Number"),
            "2": node("Relay", value=["88", 0]),
            "3": node("Scale", image=["1", 0], width=1000),
            "4": node("Scale", image=["2", 0], width="x", by=1),
        },
    )
    assert [line.split(": ")[1] for line in error.problems] == [
        "required_input_missing",
        "return_type_mismatch",
        "value_bigger_than_max",
        "bad_linked_input",
        "invalid_input_type",
    ]
    assert (error.node_id, error.input_name) == ("3", "by")
    assert "5 problems" in str(error)
    assert all(line in str(error) for line in error.problems)


def test_a_workflow_of_many_faults_gives_a_bounded_text(harness: Harness) -> None:
    error = problems(harness, {str(n): node("Pick", old="n" * 10_000, new="x") for n in range(500)})
    assert error.problems[-1] == "and 400 more"
    assert len(str(error)) < 100_000


def test_a_missing_optional_input_is_left_out_and_no_default_is_filled_in(harness: Harness) -> None:
    harness.run({"1": node("Optional")})
    assert RAN == [{}]


def test_an_undeclared_constant_is_ignored_and_an_undeclared_link_is_passed_on(harness: Harness) -> None:
    harness.run({"1": node("Number"), "2": node("Optional", nonsense=5, extra=["1", 0])})
    assert RAN == [{"extra": 5}]


def test_a_class_may_declare_any_number_of_inputs(harness: Harness) -> None:
    harness.run({"1": node("Number"), "2": node("Lenient", a=["1", 0], b="text")})
    assert RAN == [{"a": 5, "b": "text"}]


def test_a_wrapped_list_is_a_value_and_no_link(harness: Harness) -> None:
    harness.run({"1": node("PickMany", items={"__value__": ["x", "y"]})})
    harness.run({"1": node("TakesList", items={"__value__": ["1", 0]})})
    assert RAN == [{"items": ["x", "y"]}, {"items": ["1", 0]}]


def test_a_long_list_of_choices_is_not_repeated_in_the_text(harness: Harness) -> None:
    assert "the 50 values of the list" in str(problems(harness, {"1": node("PickLong", item="fifty")}))


def test_validate_inputs_replaces_the_checks_of_what_it_names(harness: Harness) -> None:
    harness.run({"1": node("Cats", image="cat")})
    assert RAN == [{"image": "cat"}]


def test_validate_inputs_with_kwargs_gets_all_constants_and_none_for_links(harness: Harness) -> None:
    harness.run({"1": node("Image"), "2": node("Kwargs", a="5", b=["1", 0])})
    assert RAN == [{"a": 5, "b": "an image"}]


def test_validate_inputs_with_input_types_takes_over_the_type_check(harness: Harness) -> None:
    harness.run({"1": node("Number"), "2": node("Types", a=["1", 0])})
    assert RAN == [{"a": 5}]


def test_the_text_of_validate_inputs_reaches_the_error(harness: Harness) -> None:
    error = problems(harness, {"1": node("Cats", image="dog")})
    assert "dog is no cat" in str(error)
    assert "image='dog'" in str(error)


def test_a_wildcard_output_fits_every_input(harness: Harness) -> None:
    harness.run({"1": node("Anything"), "2": node("Image2", image=["1", 0])})
    assert RAN == [{"image": 1}]


def test_a_prompt_without_an_output_node_is_refused(harness: Harness) -> None:
    assert "prompt_no_outputs" in str(problems(harness, {"1": node("Image")}))
    assert "prompt_no_outputs" in str(problems(harness, {}))


def test_an_unknown_class_is_refused_even_where_nothing_needs_it(harness: Harness) -> None:
    error = problems(harness, {"1": node("Text", text="", flag=True), "2": node("NoSuchNode")})
    assert error.node_id == "2"
    assert "'NoSuchNode'" in str(error)


def test_a_faulty_node_that_no_output_needs_is_no_fault(harness: Harness) -> None:
    harness.run({"1": node("Text", text="", flag=True), "2": node("Scale2Nothing") | {"class_type": "Relay"}})
    assert len(RAN) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        {"1": "node"},
        {"1": {}},
        {"1": {"class_type": 5, "inputs": {}}},
        {"1": {"class_type": "Text", "inputs": [1]}},
        {5: {"class_type": "Text", "inputs": {}}},
    ],
)
def test_what_is_no_prompt_is_an_invalid_workflow(harness: Harness, prompt: Any) -> None:
    problems(harness, prompt)


def test_a_node_without_inputs_may_leave_them_out(harness: Harness) -> None:
    harness.run({"1": {"class_type": "Optional"}})
    assert RAN == [{}]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_cycle_is_named_and_does_not_hang(harness: Harness, length: int) -> None:
    prompt: Prompt = {str(n): node("Relay", value=[str((n + 1) % length), 0]) for n in range(length)}
    prompt["out"] = node("Image2", image=["0", 0])
    error = problems(harness, prompt)
    assert "dependency_cycle" in str(error)
    assert error.node_id in prompt


def test_a_cycle_that_no_output_needs_is_no_fault(harness: Harness) -> None:
    harness.run({"1": node("Relay", value=["1", 0]), "2": node("Optional")})
    assert RAN == [{}]


def test_the_prompt_that_was_given_is_not_changed(harness: Harness) -> None:
    prompt = {"1": node("Image"), "2": node("Scale", image=["1", 0], width="42", by={"__value__": 2})}
    before = copy.deepcopy(prompt)
    harness.run(prompt)
    assert prompt == before


def test_a_prompt_too_deep_to_copy_is_refused(harness: Harness) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in str(problems(harness, {"1": node("Optional", nonsense=deep)}))


class NodePackAny(str):
    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False


@pytest.mark.parametrize(
    ("given", "wanted", "fit"),
    [
        ("IMAGE", "IMAGE", True),
        ("IMAGE", "MASK", False),
        ("*", "IMAGE", True),
        ("IMAGE", "*", True),
        ("INT,FLOAT", "FLOAT,STRING", True),
        ("INT, FLOAT", "FLOAT", True),
        ("INT,FLOAT", "STRING", False),
        ("INT", "STRING,*", True),
        (NodePackAny("*"), "IMAGE", True),
        ("IMAGE", NodePackAny("*"), True),
        (["a"], NodePackAny("x"), True),
        (["a"], ["a"], True),
        (["a"], ["b"], False),
        (["a"], "COMBO", True),
        ("COMBO", ["a"], False),
        (["a"], "*", True),
        (["a"], "STRING", False),
        (ANY, "IMAGE", True),
        ("IMAGE", ANY, True),
        (ANY, ["a"], True),
    ],
)
def test_types_fit_as_in_comfyui(given: object, wanted: object, fit: bool) -> None:
    assert types_fit(given, wanted) is fit


def test_a_link_is_a_pair_of_a_node_id_and_a_slot() -> None:
    link = parse_link(["3", 1.0])
    assert link is not None
    assert (link.node_id, link.slot, type(link.slot)) == ("3", 1, int)
    for value in (["3", True], [3, 0], ["3"], "30", {"3": 0}, ["3", float("inf")]):
        assert parse_link(value) is None
