"""Any graph of nodes that write into what they have: each sees what was returned, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.graph_harness import engine_with, node, node_class
from tests.engine.writers import LARGE, NEVER_CACHED, SMALL, WRITES, content, each_tensor

RETURNS = ("input", "view", "new", "buffer", "array", "first input", "pair", "none kept")


@st.composite
def behaviours(draw: Any) -> list[dict[str, Any]]:
    count = draw(st.integers(2, 6))
    return [
        {
            "sources": [draw(st.integers(0, number - 1)) for _ in range(draw(st.integers(1, 2)))]
            if number
            else [],
            "write": draw(st.sampled_from([None, *WRITES])),
            "from_run": draw(st.integers(0, 2)),
            "returns": draw(st.sampled_from(RETURNS)) if number else "new",
            "spoils": draw(st.booleans()),
            "cached": draw(st.booleans()),
            "elements": draw(st.sampled_from([SMALL, LARGE])),
        }
        for number in range(count)
    ]


class Actor:
    """Behaves as drawn; notes what it was given and what it returned, as bytes, at that moment."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.plan = plan
        self.runs = 0
        self.kept: list[Any] = []
        self.buffer = torch.zeros(plan["elements"])
        self.array = np.zeros(plan["elements"], np.float32)
        self.given: list[Any] = []
        self.returned: Any = None

    def run(self, **inputs: Any) -> tuple[Any]:
        self.given.append([content(inputs[name]) for name in sorted(inputs)])
        values = [inputs[name] for name in sorted(inputs)]
        if self.plan["spoils"]:
            for value in self.kept:
                each_tensor(value, lambda tensor: tensor.numpy().fill(-float(self.runs + 1)))
        if self.plan["write"] is not None and self.runs >= self.plan["from_run"]:
            for value in values:
                each_tensor(value, self.write)
        self.runs += 1
        result = self.result(values)
        self.kept += [] if self.plan["returns"] == "none kept" else [*values, result]
        self.returned = content(result)
        return (result,)

    def write(self, tensor: Any) -> None:
        if tensor.is_contiguous():
            WRITES[self.plan["write"]](tensor)
        else:
            tensor.fill_(9.0)

    def result(self, values: list[Any]) -> Any:
        how = self.plan["returns"]
        if how in ("new", "none kept") or not values:
            return torch.full((self.plan["elements"],), float(self.runs))
        if how == "buffer":
            self.buffer += 1
            return self.buffer
        if how == "array":
            self.array += 1
            return torch.from_numpy(self.array)
        if how == "first input":
            return self.kept[0] if self.kept else values[0]
        if how == "pair":
            return {"a": values[0], "b": [values[-1]]}
        first = values[0]
        while not isinstance(first, torch.Tensor):
            first = next(iter(first.values())) if isinstance(first, dict) else first[0]
        return first[1:] if how == "view" and first.numel() > 2 else first


@given(plans=behaviours())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_node_and_the_caller_see_what_each_node_returned_and_nothing_else(
    plans: list[dict[str, Any]],
) -> None:
    actors = [Actor(plan) for plan in plans]
    classes: dict[str, type] = {}
    graph: dict[str, Any] = {}
    for number, (plan, actor) in enumerate(zip(plans, actors, strict=True)):
        names = {f"value{n}": ("*",) for n in range(len(plan["sources"]))}
        extra = {} if plan["cached"] else NEVER_CACHED
        classes[f"Actor{number}"] = node_class(actor.run, required=names, **extra)
        links = {f"value{n}": [str(source), 0] for n, source in enumerate(plan["sources"])}
        graph[str(number)] = node(f"Actor{number}", **links)
    graph["out"] = node("LegionExporter", **{f"input_{n + 1}": [str(n), 0] for n in range(len(plans))})
    delivered: list[tuple[Any, Any]] = []
    with engine_with(classes) as harness:
        for _ in range(4):
            ran = [actor.runs for actor in actors]
            outputs = harness.run(graph).outputs
            for number, actor in enumerate(actors):
                assert content(outputs[f"output_{number + 1}"]) == actor.returned
                delivered.append((outputs[f"output_{number + 1}"], actor.returned))
                if actor.runs > ran[number]:
                    assert actor.given[-1] == [actors[source].returned for source in actor.plan["sources"]]
    assert all(content(value) == expected for value, expected in delivered)
