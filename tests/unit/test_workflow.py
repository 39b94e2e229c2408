from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from legion_shm.channels import Channels, check_inputs, name_inputs, read_channels, unread_inputs
from legion_shm.errors import InvalidWorkflow
from legion_shm.workflow import is_link, load_workflow, pack_workflow
from legion_shm.workflow_cache import WorkflowCache

FLOW: dict[str, Any] = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "2": {
        "class_type": "ImageScale",
        "inputs": {"image": ["1", 0], "width": 512, "crop": "disabled", "ratio": 0.5},
    },
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}, "_meta": {"title": "Save"}},
}


def refused(source: Any) -> InvalidWorkflow:
    with pytest.raises(InvalidWorkflow) as caught:
        load_workflow(source)
    return caught.value


def node(class_type: object = "X", **inputs: object) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


# --- where it may come from ---------------------------------------------------------------------------


def test_a_workflow_may_be_a_mapping_text_or_a_file(tmp_path: Path) -> None:
    text = json.dumps(FLOW)
    path = tmp_path / "flow.json"
    path.write_text(text, encoding="utf-8")
    sources: list[Any] = [FLOW, MappingProxyType(FLOW), text, "\n " + text, path, str(path)]
    assert all(load_workflow(source) == FLOW for source in sources)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(FLOW), encoding="utf-8-sig")
    assert load_workflow(path) == FLOW


def test_what_the_prompt_route_takes_is_unwrapped() -> None:
    assert load_workflow({"prompt": FLOW, "client_id": "x"}) == FLOW
    assert load_workflow(json.dumps({"prompt": FLOW})) == FLOW


def test_a_node_may_be_called_prompt() -> None:
    flow = {"prompt": node("Text"), "class_type": node("Show", text=["prompt", 0])}
    assert load_workflow(flow) == flow
    assert load_workflow({"prompt": node("Text")}) == {"prompt": node("Text")}


def test_the_copy_is_the_callers_to_keep() -> None:
    original = copy.deepcopy(FLOW)
    loaded = load_workflow(original)
    original["2"]["inputs"]["image"][0] = "9"
    original["3"]["_meta"]["title"] = "changed"
    assert loaded == FLOW


def test_ids_become_text_and_tuples_lists() -> None:
    loaded = load_workflow({1: node("A"), "b": node("B", x=("1", 0), y=(1, (2, 3)))})  # type: ignore[dict-item]
    assert loaded == {"1": node("A"), "b": node("B", x=["1", 0], y=[1, [2, 3]])}
    linked = load_workflow({1: node("A"), 2: node("B", x=[1, 0], y=[7, 0])})  # type: ignore[dict-item]
    assert linked == {"1": node("A"), "2": node("B", x=["1", 0], y=[7, 0])}


def test_inputs_may_be_left_out_and_unknown_parts_of_a_node_are() -> None:
    loaded = load_workflow({"1": {"class_type": "A", "widgets_values": [object()]}})
    assert loaded == {"1": {"class_type": "A", "inputs": {}}}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (5, "a dict, a path or JSON text, not int"),
        (None, "not NoneType"),
        (b"{}", "not bytes"),
        ("{", "the workflow text is not valid JSON: line 1, column 2"),
        ('{"1":\n oops}', "line 2, column 2"),
        ("[1, 2]", "the workflow text: expected an object of nodes, got list"),
        ("", "the workflow is an empty text"),
        (" \n", "the workflow is an empty text"),
        ("{}", "the workflow text has no nodes"),
        ({}, "the workflow has no nodes"),
        ("no/such/file.json", f"cannot read the workflow file {str(Path('no/such/file.json'))!r}"),
        (Path("no/such/file.json"), "cannot read the workflow file"),
        ("with\0nul.json", "cannot read the workflow file"),
        ("x" * 5000, "cannot read the workflow file"),
        (".", "cannot read the workflow file"),
        ("[" * 100_000, "nested too deeply"),
        ('{"1": {"class_type": "A", "inputs": {"x": ' + "9" * 5000 + "}}}", "not valid JSON"),
        ({"nodes": [], "links": [], "version": 0.4}, "saved format; export it in the API format"),
    ],
)
def test_what_is_no_workflow_is_refused(source: Any, text: str) -> None:
    assert text in str(refused(source))


def test_a_file_with_a_fault_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"1": ')
    assert f"the workflow file {path} is not valid JSON" in str(refused(path))
    path.write_bytes(b'{"1": "\xff"}')
    assert repr(str(path)) in str(refused(str(path)))
    path.write_text("[]")
    assert f"the workflow file {path}: expected an object" in str(refused(path))


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    assert "larger than 64 MiB" in str(refused(path))


# --- nodes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (5, "expected an object with class_type and inputs, got int"),
        ([], "got list"),
        ({}, "class_type is missing or not text"),
        (node(""), "class_type is missing or not text"),
        (node(7), "class_type is missing or not text"),
        ({"class_type": "X", "inputs": []}, "inputs must be an object, got list"),
        ({"class_type": "X", "inputs": None}, "inputs must be an object, got NoneType"),
        ({"class_type": "X", "inputs": {5: 1}}, "input name 5 is not text"),
        ({"class_type": "X", "inputs": {}, "_meta": {"x": object()}}, "_meta: a object is not a JSON value"),
    ],
)
def test_a_malformed_node_is_named(bad: Any, text: str) -> None:
    error = refused({"1": node("A"), "7": bad})
    assert error.node_id == "7"
    assert str(error).startswith("node 7")
    assert text in str(error)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object(), "a object is not a JSON value"),
        (b"x", "a bytes is not a JSON value"),
        ({1, 2}, "a set is not a JSON value"),
        ([[{"a": 1j}]], "a complex is not a JSON value"),
        ({1: 2}, "an object's keys must be text"),
        (1 << 64, "does not fit into 64 bits"),
        (-(1 << 63) - 1, "does not fit into 64 bits"),
    ],
)
def test_a_value_that_is_not_json_is_refused_and_the_way_out_told(value: object, text: str) -> None:
    error = refused({"7": node("Blur", amount=value)})
    assert (error.node_id, error.input_name) == ("7", "amount")
    assert text in str(error)
    assert "pass others through `inputs`" in str(error)


def test_nesting_has_an_end() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    assert "more than 64 deep" in str(refused({"1": node(x=deep)}))
    ring: list[Any] = []
    ring.append(ring)
    assert "more than 64 deep" in str(refused({"1": node(x=ring)}))


def test_an_id_that_is_there_twice_is_refused() -> None:
    assert refused({1: node(), "1": node()}).node_id == "1"


# --- links --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [["1", 0], ["1", 3], ["x", 0.0]])
def test_a_link_is_a_node_and_a_slot(value: object) -> None:
    assert is_link(value)


@pytest.mark.parametrize(
    "value", [["1"], ["1", "0"], ["1", True], [1, 0], ["1", 0, 0], ("1", 0), "10", {"1": 0}, None, []]
)
def test_what_only_looks_like_a_link_is_a_value(value: object) -> None:
    assert not is_link(value)


def test_a_slot_that_came_as_a_float_becomes_a_number() -> None:
    slot = load_workflow({"1": node("A"), "2": node("B", x=["1", 2.0])})["2"]["inputs"]["x"][1]
    assert (slot, type(slot)) == (2, int)


@pytest.mark.parametrize("slot", [-1, 0.5, float("nan"), float("inf"), float("-inf")])
def test_what_is_no_slot_is_refused(slot: float) -> None:
    error = refused({"1": node("A"), "2": node("B", x=["1", slot])})
    assert (error.node_id, error.input_name) == ("2", "x")
    assert "is not the number of an output slot" in str(error)


def test_a_link_to_nowhere_is_refused() -> None:
    error = refused({"2": node("B", x=["1", 0])})
    assert (error.node_id, error.input_name) == ("2", "x")
    assert "node 2 (B), input x: links to node '1', which is not in the workflow" in str(error)


@pytest.mark.parametrize(
    ("kind", "slots"),
    [("LegionImporter", 13), ("LegionInput", 1), ("LegionExporter", 0), ("LegionOutput", 0)],
)
def test_a_link_to_an_output_that_our_nodes_lack_is_refused(kind: str, slots: int) -> None:
    source = node(kind, name="x", value=1)
    for slot in range(slots):
        load_workflow({"in": source, "b": node("B", x=["in", slot])})
    error = refused({"in": source, "b": node("B", x=["in", slots])})
    assert (error.node_id, error.input_name) == ("b", "x")
    assert f"node b (B), input x: it is linked to output {slots} of node in ({kind})" in str(error)


@pytest.mark.parametrize(
    ("flow", "ring"),
    [
        ({"1": node(x=["1", 0])}, "1 <- 1"),
        ({"1": node(x=["2", 0]), "2": node(x=["1", 0])}, "1 <- 2 <- 1"),
        (
            {"0": node(x=["1", 0]), "1": node(x=["2", 0]), "2": node(x=["3", 0]), "3": node(x=["1", 0])},
            "1 <- 2 <- 3 <- 1",
        ),
    ],
)
def test_a_cycle_is_refused_and_shown(flow: Any, ring: str) -> None:
    error = refused(flow)
    assert str(error) == f"the workflow's links form a cycle: {ring}"
    assert error.node_id is not None
    assert error.input_name == "x"


def test_a_diamond_is_no_cycle() -> None:
    flow = {
        "1": node(),
        "2": node(x=["1", 0]),
        "3": node(x=["1", 0], y=["2", 0]),
        "4": node(x=["3", 0], y=["2", 0]),
    }
    assert load_workflow(flow) == flow


def test_a_chain_may_be_long() -> None:
    flow = {str(n): node(x=[str(n + 1), 0]) for n in range(20_000)} | {"20000": node()}
    assert len(load_workflow(flow)) == 20_001


IDS = st.sampled_from("abcde")
LINKS = st.dictionaries(
    st.sampled_from("xy"), st.tuples(IDS, st.just(0)).map(list) | st.integers(0, 9), max_size=2
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(IDS, LINKS, min_size=1))
def test_what_is_accepted_can_be_put_in_an_order(graph: dict[str, dict[str, Any]]) -> None:
    flow = {key: node("X", **inputs) for key, inputs in graph.items()}
    sources = {key: {v[0] for v in inputs.values() if isinstance(v, list)} for key, inputs in graph.items()}
    placed: set[str] = set()
    while ready := {key for key in sources if key not in placed and sources[key] <= placed}:
        placed |= ready
    if placed == set(sources):
        assert load_workflow(flow) == flow
    else:
        refused(flow)


KEYS = st.sampled_from(["1", "class_type", "inputs", "prompt", "nodes", "links", "_meta"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(ANYTHING)
def test_anything_at_all_is_either_a_workflow_or_invalid(source: Any) -> None:
    for given_as in (source, {"1": source}, {"1": {"class_type": "X", "inputs": source}}):
        try:
            flow = load_workflow(given_as)
        except InvalidWorkflow:
            continue
        data, _ = pack_workflow(flow)
        assert pack_workflow(json.loads(data.decode("utf-8", "surrogatepass")))[0] == data
        read_channels_or_refuse(flow)


def read_channels_or_refuse(flow: Any) -> None:
    try:
        read_channels(flow)
    except InvalidWorkflow:
        return


# --- channels -----------------------------------------------------------------------------------------


def channels(**nodes: dict[str, Any]) -> Channels:
    return read_channels(load_workflow({"src": node("Any"), **nodes}))


def test_a_workflow_without_our_nodes_has_no_channels() -> None:
    assert read_channels(load_workflow(FLOW)) == Channels(frozenset(), {}, {}, False)


def test_an_exporter_reads_any_of_twelve_inputs_and_an_importer_delivers_what_is_wired() -> None:
    found = channels(
        e=node("LegionImporter", data_exchange_root="x"),
        i=node("LegionExporter", input_1=["src", 0], input_12=["src", 1], data_exchange_root=["e", 12]),
    )
    assert found.inputs == frozenset(f"input_{n}" for n in range(1, 13))
    assert found.outputs == {"output_1": "i", "output_12": "i"}
    assert found.required == {}


def test_named_channels_are_read_and_those_without_a_default_required() -> None:
    found = channels(
        a=node("LegionInput", name="image"),
        b=node("LegionInput", name="strength", default=0.5),
        c=node("LegionInput", name="image"),
        d=node("LegionOutput", name="mask", value=["src", 0]),
    )
    assert found.inputs == {"image", "strength"}
    assert found.required == {"image": "a"}
    assert found.outputs == {"mask": "d"}
    assert not found.open_inputs


def test_a_name_that_comes_over_a_link_is_not_known_here() -> None:
    found = channels(a=node("LegionInput", name=["src", 0]), b=node("LegionOutput", name=["src", 0], value=1))
    assert found == Channels(frozenset(), {}, {}, True)


@pytest.mark.parametrize(
    ("nodes", "name"),
    [
        ({"a": node("LegionExporter", input_2=1), "b": node("LegionExporter", input_2=1)}, "output_2"),
        ({"a": node("LegionOutput", name="x", value=1), "b": node("LegionOutput", name="x", value=1)}, "x"),
        (
            {"a": node("LegionExporter", input_3=1), "b": node("LegionOutput", name="output_3", value=1)},
            "output_3",
        ),
    ],
)
def test_an_output_that_two_nodes_deliver_is_refused(nodes: Any, name: str) -> None:
    with pytest.raises(
        InvalidWorkflow, match=f"the output '{name}' is delivered by node a already"
    ) as caught:
        channels(**nodes)
    assert caught.value.node_id == "b"


@pytest.mark.parametrize("given", [{}, {"name": ""}, {"name": None}])
@pytest.mark.parametrize("kind", ["LegionInput", "LegionOutput"])
def test_a_channel_without_a_name_is_refused(kind: str, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidWorkflow, match="a channel's name is non-empty text") as caught:
        channels(a=node(kind, **given, value=1))
    assert (caught.value.node_id, caught.value.input_name) == ("a", "name")


def test_an_output_without_a_value_is_refused() -> None:
    with pytest.raises(InvalidWorkflow, match=r"node a \(LegionOutput\), input value") as caught:
        channels(a=node("LegionOutput", name="x"))
    assert (caught.value.node_id, caught.value.input_name) == ("a", "value")


@pytest.mark.parametrize("number", ["0", "13", "01", "999999", "٣", "9" * 5000])
def test_an_exporter_has_twelve_numbered_channels(number: str) -> None:
    with pytest.raises(InvalidWorkflow, match="there are 12 numbered channels; use LegionOutput for more"):
        channels(a=node("LegionExporter", **{f"input_{number}": 1}))


@pytest.mark.parametrize("name", ["input_", "input_²", "input_x", "inputs", "data_exchange_root", "input_1x"])
def test_an_exporters_other_inputs_are_no_channels(name: str) -> None:
    assert channels(a=node("LegionExporter", **{name: 1})).outputs == {}


# --- inputs -------------------------------------------------------------------------------------------


def test_a_sequence_fills_the_numbered_channels_and_a_mapping_names_its_own() -> None:
    assert name_inputs(None) == {}
    assert name_inputs(["a", None]) == name_inputs(("a", None)) == {"input_1": "a", "input_2": None}
    given_as = {"image": 1, "input_3": 2}
    named = name_inputs(given_as)
    assert named == given_as
    assert named is not given_as


@pytest.mark.parametrize("inputs", ["text", 5, {1, 2}, b"x", iter([1]), {5: 1}, {"": 1}, {None: 1}])
def test_inputs_of_another_form_are_refused(inputs: Any) -> None:
    with pytest.raises(InvalidWorkflow, match=r"must be a list, a tuple or a mapping|non-empty text"):
        name_inputs(inputs)


def test_a_bare_value_is_told_how_to_be_given() -> None:
    with pytest.raises(InvalidWorkflow, match=r"for a single value write inputs=\[value\]"):
        name_inputs(5)  # type: ignore[arg-type]


def test_inputs_that_nobody_reads_are_named_and_required_ones_asked_for() -> None:
    found = channels(a=node("LegionInput", name="image"), b=node("LegionInput", name="x", default=1))
    assert check_inputs(found, {"image": 1}) == ()
    assert check_inputs(found, {"image": 1, "x": 2, "typo": 3, "y": 4}) == ("typo", "y")
    with pytest.raises(InvalidWorkflow, match="the input 'image' was not given; given: typo, x") as caught:
        check_inputs(found, {"x": 1, "typo": 1})
    assert (caught.value.node_id, caught.value.input_name) == ("a", "name")


def test_inputs_that_nobody_reads_are_told_of_in_one_sentence() -> None:
    assert unread_inputs(()) == ()
    assert unread_inputs(("a",)) == ("input 'a' is read by no node of the workflow",)
    assert unread_inputs(("a", "b")) == ("inputs 'a', 'b' are read by no node of the workflow",)


def test_with_a_name_over_a_link_every_input_may_be_read() -> None:
    assert check_inputs(channels(a=node("LegionInput", name=["src", 0])), {"anything": 1}) == ()


# --- packing ------------------------------------------------------------------------------------------


def test_equal_workflows_have_equal_digests_and_others_have_not() -> None:
    data, digest = pack_workflow(load_workflow(FLOW))
    assert json.loads(data) == FLOW
    assert len(digest) == 16
    assert pack_workflow(load_workflow(json.dumps(FLOW, indent=4))) == (data, digest)
    changes: list[Callable[[Any], object]] = [
        lambda flow: flow["2"]["inputs"].update(width=513),
        lambda flow: flow["2"].update(class_type="Y"),
        lambda flow: flow.pop("3"),
        lambda flow: flow["2"]["inputs"].update(ratio=0.25),
    ]
    for change in changes:
        other = copy.deepcopy(FLOW)
        change(other)
        assert pack_workflow(load_workflow(other))[1] != digest


def test_any_text_can_be_packed() -> None:
    flow = load_workflow({"1": node("Text", text="caf\u00e9 \ud800 \U0001f600")})
    data, _ = pack_workflow(flow)
    assert json.loads(data.decode("utf-8", "surrogatepass")) == flow


def test_a_workflow_prepared_before_is_found_by_what_it_says_and_not_by_which_object_it_is() -> None:
    cache = WorkflowCache(entries=2)
    first = cache.prepare({"1": {"class_type": "LegionInput", "inputs": {"name": "a", "default": 1}}})
    again = cache.prepare({"1": {"class_type": "LegionInput", "inputs": {"name": "a", "default": 1}}})
    assert again is first
    changing: dict[str, Any] = {"1": {"class_type": "LegionInput", "inputs": {"name": "a", "default": 1}}}
    for default in (True, 1.0, "1", [1], None):
        changing["1"]["inputs"]["default"] = default
        other = cache.prepare(changing)
        assert other.digest == pack_workflow(load_workflow(changing))[1]
        assert other.digest != first.digest
    assert cache.prepare('{"1": {"class_type": "A"}}').data == cache.prepare({"1": {"class_type": "A"}}).data


def test_a_workflow_that_is_refused_is_refused_each_time() -> None:
    cache = WorkflowCache()
    for _ in range(2):
        with pytest.raises(InvalidWorkflow, match="is not in the workflow"):
            cache.prepare({"1": {"class_type": "A", "inputs": {"x": ["2", 0]}}})
    with pytest.raises(InvalidWorkflow, match="is not a JSON value"):
        cache.prepare({"1": {"class_type": "A", "inputs": {"x": object()}}})


def test_no_more_than_so_many_workflows_are_kept_and_the_oldest_goes_first() -> None:
    cache = WorkflowCache(entries=3)
    workflows = [{"1": {"class_type": f"Node{number}", "inputs": {}}} for number in range(5)]
    first = [cache.prepare(workflow) for workflow in workflows]
    assert len(cache._kept) == 3
    again = [cache.prepare(workflow) for workflow in reversed(workflows[2:])]
    assert all(one is other for one, other in zip(again, reversed(first[2:]), strict=True))
    assert cache.prepare(workflows[0]) is not first[0]


def test_a_huge_workflow_is_not_kept() -> None:
    cache = WorkflowCache(max_bytes=1000)
    text = "{" + " " * 2000 + '"1": {"class_type": "Node"}}'
    for source in ({"1": {"class_type": "Node", "inputs": {"text": "x" * 2000}}}, text):
        assert cache.prepare(source) is not cache.prepare(source)
    assert not cache._kept


def test_equal_texts_are_equal_whether_or_not_they_are_one_object() -> None:
    cache, one = WorkflowCache(), "some text"

    def workflow(first: str, second: str) -> dict[str, Any]:
        return {"1": {"class_type": "Node", "inputs": {"a": first, "b": second}}}

    assert cache.prepare(workflow(one, one)) is cache.prepare(workflow(one, one[:4] + one[4:]))


def test_a_file_that_is_no_text_is_refused_with_what_to_give_instead(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InvalidWorkflow, match=r"picture\.png' is not UTF-8 text.*Export \(API\)"):
        load_workflow(path)
