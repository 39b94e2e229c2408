"""Nodes that keep what they returned or were given, and write into it later: nobody else sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.graph_harness import engine_with, node, node_class
from tests.engine.writers import LARGE, NEVER_CACHED, SMALL, content, maker, reader, sparse

EXPORT = "LegionExporter"


def same(value: Any) -> Any:
    return value


def part_of_storage(tensor: Any) -> Any:
    return torch.empty(0).set_(tensor.untyped_storage(), 0, (SMALL,), (1,))


def memory_of(tensor: Any) -> Any:
    return np.asarray(memoryview(tensor.numpy()))


def large() -> Any:
    return torch.ones(LARGE)


def shared() -> Any:
    tensor: Any = large()
    return tensor.share_memory_()


from_dlpack: Any = vars(torch)["from_dlpack"]

KEEPERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "the tensor": (large, same, same),
    "a small tensor": (lambda: torch.ones(SMALL), same, same),
    "a view of it": (large, same, lambda t: t.view(2, -1)[1:]),
    "what it is a view of": (large, lambda t: t[1:], same),
    "a sibling view": (large, lambda t: t[1:], lambda t: t[:2]),
    "a detached tensor": (large, same, lambda t: t.detach()),
    "its array": (large, same, lambda t: t.numpy()),
    "the array it was made of": (lambda: np.ones(LARGE, np.float32), torch.from_numpy, same),
    "the buffer it was made of": (
        lambda: bytearray(LARGE),
        lambda b: torch.frombuffer(b, dtype=torch.uint8),
        lambda b: np.frombuffer(b, dtype=np.uint8),
    ),
    "its storage": (large, same, part_of_storage),
    "a tensor from dlpack": (large, same, from_dlpack),
    "a memory view": (large, same, memory_of),
    "shared memory": (shared, same, part_of_storage),
    "the list around it": (lambda: [large()], same, same),
    "the dict around it": (lambda: {"a": [torch.ones(SMALL)]}, same, lambda values: values["a"]),
    "an array": (lambda: np.ones(LARGE), same, same),
    "a view of an array": (lambda: np.ones(LARGE), lambda a: a[1:], same),
    "a sparse tensor's values": (sparse, same, lambda t: t.values()),
}
"""What a node keeps: what it makes, what of that it returns, and what of that it writes into later."""


def fill(value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            fill(item)
        value.append(7)
    elif not isinstance(value, int):
        value[...] = 77


@pytest.mark.parametrize(("make", "given", "own"), KEEPERS.values(), ids=KEEPERS)
def test_nobody_sees_what_a_node_writes_into_an_output_that_it_keeps(
    make: Callable[[], Any], given: Callable[[Any], Any], own: Callable[[Any], Any]
) -> None:
    kept: list[Any] = []
    calls: list[int] = []

    def keep() -> tuple[Any]:
        calls.append(1)
        made = make()
        kept.append(own(made))
        return (given(made),)

    seen: list[Any] = []
    pass_on = node_class(lambda value: (value,), required={"value": ("*",)})
    graph = {
        "kept": node("Keep"),
        "pass": node("Pass", value=["kept", 0]),
        "write": node("WriteKept", after=["pass", 0]),
        "read": node("Read", value=["pass", 0], after=["write", 0]),
        "out": node(EXPORT, input_1=["kept", 0], input_2=["pass", 0], input_3=["read", 0]),
    }

    def write_kept(after: object) -> tuple[int]:
        for value in kept:
            fill(value)
        return (0,)

    classes = {
        "Keep": node_class(keep),
        "Pass": pass_on,
        "WriteKept": node_class(write_kept, required={"after": ("*",)}, **NEVER_CACHED),
        "Read": reader(seen),
    }
    expected = content(given(make()))
    with engine_with(classes) as harness:
        for _ in range(3):
            outputs = harness.run(graph).outputs
            write_kept(None)
            assert content(outputs["output_1"]) == content(outputs["output_2"]) == expected
    assert seen == [expected] * 3
    assert len(calls) == 1, "what nobody could write into is kept"


@pytest.mark.parametrize("promised", [True, False])
def test_an_input_that_a_node_keeps_and_writes_later_is_its_own(promised: bool) -> None:
    kept: list[Any] = []

    def keep(value: Any) -> tuple[Any]:
        for tensor in kept:
            tensor.fill_(7.0)
        kept.append(value)
        return (value,)

    keeper = node_class(keep, required={"value": ("*",)}, **NEVER_CACHED)
    passing = node_class(lambda value: (value,), required={"value": ("*",)}, WRITES_SHARED=not promised)
    graph = {
        "made": node("Make"),
        "keep": node("Keep", value=["made", 0]),
        "pass": node("Pass", value=["keep", 0]),
        "out": node(EXPORT, input_1=["made", 0], input_2=["pass", 0]),
    }
    with engine_with({"Make": maker(lambda: torch.ones(LARGE)), "Keep": keeper, "Pass": passing}) as harness:
        results: list[Any] = [harness.run(graph).outputs for _ in range(3)]
    assert all(float(outputs[name].min()) == 1.0 for outputs in results for name in ("output_1", "output_2"))


def test_a_thread_that_a_node_leaves_behind_writes_into_its_own() -> None:
    go, done = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def run(value: Any) -> tuple[Any, Any]:
        fresh = torch.ones(LARGE)

        def later() -> None:
            go.wait(20)
            value.zero_()
            fresh.zero_()
            done.set()

        threads.append(threading.Thread(target=later))
        threads[-1].start()
        return value, fresh

    def wait(after: object) -> tuple[int]:
        go.set()
        assert done.wait(20)
        return (0,)

    starts = node_class(run, required={"value": ("*",)}, returns=("*", "*"))
    graph = {
        "made": node("Make"),
        "start": node("Start", value=["made", 0]),
        "wait": node("Wait", after=["start", 0]),
        "out": node(
            EXPORT, input_1=["made", 0], input_2=["start", 0], input_3=["start", 1], input_4=["wait", 0]
        ),
    }
    classes = {
        "Make": maker(lambda: torch.ones(LARGE)),
        "Start": starts,
        "Wait": node_class(wait, required={"after": ("*",)}),
    }
    with engine_with(classes) as harness:
        outputs = harness.run(graph).outputs
    threads[0].join(20)
    assert all(float(outputs[f"output_{n}"].min()) == 1.0 for n in (1, 2, 3))  # type: ignore[attr-defined]
