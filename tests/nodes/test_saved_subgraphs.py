"""Subgraphs of saved workflows become the nodes inside of them."""

from __future__ import annotations

from typing import Any

import pytest

from legion_shm.errors import InvalidWorkflow
from tests.nodes.saved import Saved, convert

# --- subgraphs ----------------------------------------------------------------------------------------


def blur_twice() -> dict[str, Any]:
    """A subgraph: an image and a number in, through two samplers, an image out; and its input out again."""
    inner = Saved(link_objects=True)
    values = [1, "fixed", 2, "ddim", 0.5]
    inner.node(
        10,
        "Sampler",
        inputs={"image": ("IMAGE", 1), "steps": ("INT", 2, True)},
        widgets_values=values,
    )
    inner.node(
        11, "Sampler", inputs={"image": ("IMAGE", 3), "steps": ("INT", 4, True)}, widgets_values=values
    )
    inner.link(1, -10, 0, 10, 0)
    inner.link(2, -10, 1, 10, 1, "INT")
    inner.link(3, 10, 0, 11, 0)
    inner.link(4, -10, 1, 11, 1, "INT")
    inner.link(5, 11, 0, -20, 0)
    inner.link(6, -10, 0, -20, 1)
    return inner.document(
        id="sub-1",
        name="Blur twice",
        inputs=[
            {"id": "a", "name": "picture", "type": "IMAGE", "linkIds": [1, 6]},
            {"id": "b", "name": "steps", "type": "INT", "linkIds": [2, 4]},
        ],
        outputs=[
            {"id": "c", "name": "out", "type": "IMAGE", "linkIds": [5]},
            {"id": "d", "name": "same", "type": "IMAGE", "linkIds": [6]},
        ],
    )


def around(
    instance: dict[str, Any], *definitions: dict[str, Any], slot: int = 0
) -> dict[str, dict[str, Any]]:
    saved = Saved()
    saved.node(1, "Source")
    saved.node(2, "sub-1", **instance)
    saved.node(3, "Sink", inputs={"image": ("IMAGE", 8)})
    saved.node(4, "PrimitiveNode", widgets_values=[99, "fixed"], types="INT")
    saved.link(7, 1, 0, 2, 0)
    saved.link(8, 2, slot, 3, 0)
    saved.link(9, 4, 0, 2, 1, "INT")
    return convert(saved, definitions={"subgraphs": list(definitions)})


PICTURE = {"picture": ("IMAGE", 7)}
STEPS = {"steps": ("INT", None, True)}


def steps_of(made: dict[str, dict[str, Any]]) -> list[Any]:
    return [made[node_id]["inputs"]["steps"] for node_id in ("2:10", "2:11")]


def test_a_subgraph_is_replaced_by_its_nodes() -> None:
    made = around({"inputs": PICTURE | STEPS}, blur_twice())
    assert set(made) == {"1", "3", "2:10", "2:11"}
    assert made["2:10"]["inputs"]["image"] == ["1", 0]
    assert made["2:11"]["inputs"]["image"] == ["2:10", 0]
    assert made["3"]["inputs"] == {"image": ["2:11", 0]}
    assert steps_of(made) == [2, 2]


def test_an_output_of_a_subgraph_may_be_its_own_input() -> None:
    assert around({"inputs": PICTURE}, blur_twice(), slot=1)["3"]["inputs"] == {"image": ["1", 0]}


@pytest.mark.parametrize(
    ("instance", "expected"),
    [
        ({"widgets_values": [42]}, 42),
        ({"widgets_values": [42, "randomize"]}, 42),
        ({"widgets_values_named": {"steps": 43}, "widgets_values": [42]}, 43),
        ({"widgets_values": []}, 2),
        ({"widgets_values": [None]}, 2),
        ({"widgets_values": ["of", "another", "kind"]}, 2),
        ({"widgets_values": ["text"]}, 2),
        ({"widgets_values": [7, 8, 9]}, 2),
    ],
)
def test_a_subgraphs_own_widget_counts_before_the_inner_one(instance: dict[str, Any], expected: int) -> None:
    made = around({"inputs": PICTURE | STEPS, **instance}, blur_twice())
    assert steps_of(made) == [expected, expected]
    without_slot = around({"inputs": PICTURE, **instance}, blur_twice())
    assert steps_of(without_slot) == [expected, expected]


def test_a_primitive_outside_reaches_the_nodes_inside() -> None:
    made = around({"inputs": PICTURE | {"steps": ("INT", 9, True)}, "widgets_values": [42]}, blur_twice())
    assert steps_of(made) == [99, 99]


def test_two_instances_have_nodes_of_their_own() -> None:
    saved = Saved()
    saved.node(1, "Source")
    saved.node(2, "sub-1", inputs={"picture": ("IMAGE", 1)}, widgets_values=[5])
    saved.node(3, "sub-1", inputs={"picture": ("IMAGE", 2)}, widgets_values=[6])
    saved.node(4, "Sink", inputs={"image": ("IMAGE", 3)})
    saved.link(1, 1, 0, 2, 0)
    saved.link(2, 2, 0, 3, 0)
    saved.link(3, 3, 0, 4, 0)
    made = convert(saved, definitions={"subgraphs": [blur_twice()]})
    assert set(made) == {"1", "4", "2:10", "2:11", "3:10", "3:11"}
    assert made["3:10"]["inputs"]["image"] == ["2:11", 0]
    assert (made["2:10"]["inputs"]["steps"], made["3:10"]["inputs"]["steps"]) == (5, 6)


def test_subgraphs_within_subgraphs_are_followed_in_and_out() -> None:
    outer = Saved(link_objects=True)
    outer.node(20, "sub-1", inputs={"picture": ("IMAGE", 1), "steps": ("INT", 3, True)}, outputs=2)
    outer.link(1, -10, 0, 20, 0)
    outer.link(2, 20, 0, -20, 0)
    outer.link(3, -10, 1, 20, 1, "INT")
    wrapper = outer.document(
        id="sub-2",
        name="Wrapped",
        inputs=[
            {"name": "in", "type": "IMAGE", "linkIds": [1]},
            {"name": "count", "type": "INT", "linkIds": [3]},
        ],
        outputs=[{"name": "out", "type": "IMAGE", "linkIds": [2]}],
    )
    saved = Saved()
    saved.node(1, "Source")
    saved.node(2, "sub-2", inputs={"in": ("IMAGE", 7)}, widgets_values=[42])
    saved.node(3, "Sink", inputs={"image": ("IMAGE", 8)})
    saved.link(7, 1, 0, 2, 0)
    saved.link(8, 2, 0, 3, 0)
    made = convert(saved, definitions={"subgraphs": [blur_twice(), wrapper]})
    assert set(made) == {"1", "3", "2:20:10", "2:20:11"}
    assert made["2:20:10"]["inputs"]["image"] == ["1", 0]
    assert made["2:20:10"]["inputs"]["steps"] == 42
    assert made["3"]["inputs"] == {"image": ["2:20:11", 0]}


def test_a_muted_or_bypassed_subgraph_is_left_out_as_a_node_would_be() -> None:
    muted = around({"inputs": PICTURE | STEPS, "mode": 2}, blur_twice())
    assert muted["3"]["inputs"] == {}
    bypassed = around({"inputs": PICTURE | STEPS, "mode": 4}, blur_twice())
    assert bypassed["3"]["inputs"] == {"image": ["1", 0]}
    assert set(muted) == set(bypassed) == {"1", "3"}


def test_a_subgraph_in_itself_is_an_error() -> None:
    inner = Saved(link_objects=True)
    inner.node(10, "sub-1")
    with pytest.raises(InvalidWorkflow, match="contain themselves"):
        around({}, inner.document(id="sub-1", name="Itself", inputs=[], outputs=[]))
