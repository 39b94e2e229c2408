"""Saved workflows become what ComfyUI's page would export."""

from __future__ import annotations

import random
from typing import Any

import pytest

from legion_shm.errors import InvalidWorkflow
from legion_shm.nodes.saved_format import convert_saved_workflow, is_saved_format
from legion_shm.nodes.saved_widgets import choose_variants
from tests.nodes.saved import Saved, convert, inputs, lookup

# --- the two formats ----------------------------------------------------------------------------------


def test_the_saved_format_is_told_from_the_api_format() -> None:
    assert is_saved_format({"nodes": [], "links": []})
    assert is_saved_format({"nodes": [], "version": 1})
    assert not is_saved_format({"1": {"class_type": "A", "inputs": {}}})
    assert not is_saved_format({"nodes": {"class_type": "A"}, "links": {"class_type": "B"}})


def test_links_and_titles_are_carried_over() -> None:
    saved = Saved()
    saved.node(1, "Source", outputs=3)
    saved.node(2, "Sink", inputs={"image": ("IMAGE", 7)}, title="the end")
    saved.link(7, 1, 2, 2, 0)
    assert convert_saved_workflow(saved.document(), lookup) == {
        "1": {"class_type": "Source", "inputs": {}, "_meta": {"title": "Source"}},
        "2": {"class_type": "Sink", "inputs": {"image": ["1", 2]}, "_meta": {"title": "the end"}},
    }


@pytest.mark.parametrize("objects", [False, True])
def test_links_may_be_lists_with_holes_or_objects(objects: bool) -> None:
    saved = Saved(link_objects=objects)
    saved.node(1, "Source")
    saved.node(2, "Sink", inputs={"image": ("IMAGE", 7)})
    saved.links.append(None)
    saved.link(7, 1, 0, 2, 0)
    assert convert(saved)["2"]["inputs"] == {"image": ["1", 0]}


# --- widgets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_type", "values", "expected"),
    [
        (
            "Sampler",
            [5, "randomize", 30, "ddim", 0.5],
            {"seed": 5, "steps": 30, "sampler": "ddim", "denoise": 0.5},
        ),
        ("Sampler", [5, 30, "ddim", 0.5], {"seed": 5, "steps": 30, "sampler": "ddim", "denoise": 0.5}),
        ("Sampler", [5, "fixed"], {"seed": 5, "steps": 20, "sampler": "euler", "denoise": 1.0}),
        ("Sampler", [], {"seed": 0, "steps": 20, "sampler": "euler", "denoise": 1.0}),
        ("Sampler", None, {"seed": 0, "steps": 20, "sampler": "euler", "denoise": 1.0}),
        (
            "Sampler",
            [5, "fixed", 30, "ddim", 0.5, "added", "by a script"],
            {"seed": 5, "steps": 30, "sampler": "ddim", "denoise": 0.5},
        ),
        (
            "Sampler",
            {"seed": 5, "steps": 30, "preview": {"x": 1}},
            {"seed": 5, "steps": 30, "sampler": "euler", "denoise": 1.0},
        ),
        ("Loader", ["b.png", "image", "alpha"], {"image": "b.png", "channel": "alpha"}),
        ("Loader", ["b.png", "alpha"], {"image": "b.png", "channel": "alpha"}),
        ("Loader", ["b.png", "image"], {"image": "b.png", "channel": "image"}),
        ("Two", [0.5], {"three": 0.5}),
        ("Combo", ["mp3", "128k", "song"], {"format": "mp3", "format.quality": "128k", "name": "song"}),
        ("Combo", ["flac", "song"], {"format": "flac", "name": "song"}),
        ("Picky", ["b", "fixed", "", 3], {"choice": "b", "n": 3}),
        ("Picky", ["b", 3], {"choice": "b", "n": 3}),
    ],
)
def test_widget_values_find_their_inputs(class_type: str, values: Any, expected: dict[str, Any]) -> None:
    assert inputs(class_type, values) == expected


def test_named_values_go_before_positions() -> None:
    named = {"seed": 9, "steps": 1, "sampler": "ddim", "denoise": 0.1}
    assert inputs("Sampler", [5, "fixed", 30, "euler", 0.5], widgets_values_named=named) == named


def test_a_widget_of_a_type_that_is_not_known_is_told_by_its_slot() -> None:
    assert inputs("Custom", ["points", 3], inputs={"curve": ("CURVE_EDITOR", None, True)}) == {
        "curve": "points",
        "n": 3,
    }
    assert inputs("Custom", [3]) == {"n": 3}


def test_a_list_as_a_value_is_wrapped_so_that_it_is_no_link() -> None:
    assert inputs("Points", [["1", 0]])["points"] == {"__value__": ["1", 0]}


def test_a_link_goes_before_the_value_of_the_widget_it_replaces() -> None:
    saved = Saved()
    saved.node(1, "Source", types="INT")
    saved.node(2, "Sampler", inputs={"steps": ("INT", 7, True)}, widgets_values=[5, "fixed", 30, "ddim", 0.5])
    saved.link(7, 1, 0, 2, 0, "INT")
    assert convert(saved)["2"]["inputs"] == {"seed": 5, "steps": ["1", 0], "sampler": "ddim", "denoise": 0.5}


def test_variants_of_a_prompt_are_chosen_and_its_comments_left_out() -> None:
    first, last = random.Random(), random.Random()
    first.choice = lambda seq: seq[0]  # type: ignore[method-assign]
    last.choice = lambda seq: seq[-1]  # type: ignore[method-assign]
    text = "a {red|{dark|light} blue|} car // not this\n/* nor\nthis */ \\{x\\|y\\} (1\\)"
    assert choose_variants(text, first) == "a red car \n {x|y} (1\\)"
    assert choose_variants("a {red|{dark|light} blue} car", last) == "a light blue car"
    assert choose_variants("plain, (text:1.2)", first) == "plain, (text:1.2)"
    assert choose_variants("open {a|b", last) == "open b"
    assert choose_variants("\\", first) == "\\"
    assert inputs("Text", ["{one|one} // gone"])["text"] == "one "


# --- nodes that only the page has ---------------------------------------------------------------------


def test_reroutes_and_notes_are_left_out_and_links_go_on_through_them() -> None:
    saved = Saved()
    saved.node(1, "Source")
    saved.node(2, "Reroute", inputs={"": ("*", 1)}, types="*")
    saved.node(3, "Reroute", inputs={"": ("*", 2)}, types="*")
    saved.node(4, "Sink", inputs={"image": ("IMAGE", 3)})
    saved.node(5, "Note", widgets_values=["hello"])
    saved.node(6, "MarkdownNote", widgets_values=["# hello"])
    saved.node(7, "Sink", inputs={"image": ("IMAGE", 4)})
    saved.node(8, "Reroute", inputs={"": ("*", None)}, types="*")
    for number, (origin, target) in enumerate([(1, 2), (2, 3), (3, 4), (8, 7)], 1):
        saved.link(number, origin, 0, target, 0)
    made = convert(saved)
    assert set(made) == {"1", "4", "7"}
    assert made["4"]["inputs"] == {"image": ["1", 0]}
    assert made["7"]["inputs"] == {}


def test_a_primitive_gives_its_value_also_through_a_reroute() -> None:
    saved = Saved()
    saved.node(1, "PrimitiveNode", widgets_values=[77, "increment"], types="INT")
    saved.node(2, "Reroute", inputs={"": ("*", 1)}, types="INT")
    values = [5, "fixed", 30, "ddim", 0.5]
    saved.node(
        3, "Sampler", inputs={"seed": ("INT", 2, True), "steps": ("INT", 3, True)}, widgets_values=values
    )
    saved.link(1, 1, 0, 2, 0, "INT")
    saved.link(2, 2, 0, 3, 0, "INT")
    saved.link(3, 1, 0, 3, 1, "INT")
    assert convert(saved)["3"]["inputs"] == {"seed": 77, "steps": 77, "sampler": "ddim", "denoise": 0.5}


def test_a_muted_node_is_left_out_with_the_links_from_it() -> None:
    saved = Saved()
    saved.node(1, "Source", mode=2)
    saved.node(2, "Sink", inputs={"image": ("IMAGE", 1)})
    saved.link(1, 1, 0, 2, 0)
    assert convert(saved) == {"2": {"class_type": "Sink", "inputs": {}}}


def test_a_bypassed_node_gives_on_the_input_that_fits() -> None:
    saved = Saved()
    saved.node(1, "Source", types="MASK")
    saved.node(2, "Source")
    saved.node(
        3,
        "Two",
        mode=4,
        inputs={"two": ("MASK", 1), "one": ("IMAGE", 2)},
        outputs=2,
    )
    saved.node(4, "Sink", inputs={"image": ("IMAGE", 3)})
    saved.node(5, "Sampler", inputs={"model": ("MODEL", 4)}, widgets_values=[1, "fixed", 2, "ddim", 0.5])
    saved.link(1, 1, 0, 3, 0, "MASK")
    saved.link(2, 2, 0, 3, 1)
    saved.link(3, 3, 0, 4, 0)
    saved.link(4, 3, 1, 5, 0, "MODEL")
    made = convert(saved)
    assert "3" not in made
    assert made["4"]["inputs"] == {"image": ["2", 0]}
    assert "model" not in made["5"]["inputs"]


def test_bypassed_nodes_in_a_row_are_all_passed() -> None:
    saved = Saved()
    saved.node(1, "Source")
    for number in (2, 3):
        saved.node(number, "Sink", mode=4, inputs={"image": ("IMAGE", number - 1)})
        saved.link(number - 1, number - 1, 0, number, 0)
    saved.node(4, "Sink", inputs={"image": ("IMAGE", 3)})
    saved.link(3, 3, 0, 4, 0)
    assert convert(saved)["4"]["inputs"] == {"image": ["1", 0]}


# --- what cannot be converted -------------------------------------------------------------------------


def broken(**fields: Any) -> Saved:
    saved = Saved()
    saved.node(1, "Source")
    saved.node(2, "Sink", **fields)
    return saved


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        (broken(inputs={"image": ("IMAGE", 5)}), "link 5 that is not there"),
        (broken(widgets_values="text"), r"node 2 \(Sink\): its widgets_values"),
        (Saved(), "no nodes that run"),
    ],
)
def test_a_broken_file_is_an_error_that_says_where(saved: Saved, says: str) -> None:
    with pytest.raises(InvalidWorkflow, match=says):
        convert(saved)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("Unheard", r"node 1 \(Unheard\): there is no node class 'Unheard'"),
        ("GetNode", "resolved by the page alone"),
        ("workflow>mine", "group nodes"),
        ("8b66c757-fe2f-4184-91f3-479a19deb565", "no node class"),
    ],
)
def test_a_class_that_is_not_known_is_named(kind: str, says: str) -> None:
    saved = Saved()
    saved.node(1, kind)
    with pytest.raises(InvalidWorkflow, match=says) as caught:
        convert(saved)
    assert caught.value.node_id == "1"


def test_a_link_from_nowhere_and_a_broken_link_are_errors() -> None:
    saved = broken(inputs={"image": ("IMAGE", 5)})
    saved.link(5, 44, 0, 2, 0)
    with pytest.raises(InvalidWorkflow, match="comes from node 44, which is not there"):
        convert(saved)
    saved.links = [[1, 2]]
    with pytest.raises(InvalidWorkflow, match="a link is broken"):
        convert(saved)


def test_links_in_a_circle_of_reroutes_are_an_error() -> None:
    saved = Saved()
    saved.node(1, "Reroute", inputs={"": ("*", 2)})
    saved.node(2, "Reroute", inputs={"": ("*", 1)})
    saved.node(3, "Sink", inputs={"image": ("IMAGE", 3)})
    saved.link(1, 1, 0, 2, 0)
    saved.link(2, 2, 0, 1, 0)
    saved.link(3, 1, 0, 3, 0)
    with pytest.raises(InvalidWorkflow, match="circle"):
        convert(saved)
