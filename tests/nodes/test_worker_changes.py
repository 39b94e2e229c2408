"""Whether the nodes of a worker's workflow count as changed, as the master's classes say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from legion_shm.nodes.worker_changes import answers_of


class Reads:
    content = "one"

    @classmethod
    def IS_CHANGED(cls, file: str, scale: object = None) -> str:  # noqa: N802 - the protocol's name
        return f"{file} {cls.content} {scale}"


class Draws:
    @classmethod
    def IS_CHANGED(cls) -> float:  # noqa: N802 - the protocol's name
        return float("nan")


class Silent:
    pass


class Broken:
    @classmethod
    def IS_CHANGED(cls, hidden: object) -> str:  # noqa: N802 - the protocol's name
        return "never"


class Base:
    @classmethod
    def GET_SCHEMA(cls) -> None: ...  # noqa: N802 - the protocol's name

    @classmethod
    def IS_CHANGED(cls) -> float:  # noqa: N802 - the protocol's name
        return float("nan")

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> str:
        raise NotImplementedError


Base.__module__ = "comfy_api.latest"


class NewSilent(Base):
    pass


class NewReads(Base):
    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        return f"{inputs['file']} {Reads.content}"


CLASSES: dict[str, Any] = {
    each.__name__: each for each in (Reads, Draws, Silent, Broken, NewSilent, NewReads)
}


def answers(*nodes: tuple[str, dict[str, Any]], own: tuple[str, ...] = ()) -> str | float:
    prompt = {str(n): {"class_type": kind, "inputs": inputs} for n, (kind, inputs) in enumerate(nodes)}
    return answers_of(prompt, CLASSES, {name: CLASSES[name] for name in own})


@pytest.mark.parametrize("kind", ["Reads", "NewReads"])
def test_a_node_that_reads_another_content_changes_the_answer(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    flow: tuple[tuple[str, dict[str, Any]], ...] = (
        ("Silent", {}),
        (kind, {"file": "a", "scale": ["0", 0]}),
    )
    first = answers(*flow)
    assert first == answers(*flow) != answers(("Silent", {}), (kind, {"file": "b"}))
    monkeypatch.setattr(Reads, "content", "two")
    assert answers(*flow) != first


def test_a_node_that_draws_counts_as_changed_each_time() -> None:
    answer = answers(("Reads", {"file": "a"}), ("Draws", {}))
    assert isinstance(answer, float)
    assert math.isnan(answer)


def test_nodes_that_say_nothing_and_our_own_change_nothing() -> None:
    assert answers(("Silent", {}), ("NewSilent", {}), ("NotHere", {})) == ""
    assert answers(("Draws", {}), own=("Draws",)) == ""


def test_a_node_whose_answer_can_not_be_had_counts_as_unchanged() -> None:
    assert answers(("Broken", {})) == answers(("Broken", {}))
