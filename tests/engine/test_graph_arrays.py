"""Arrays that nodes get to themselves: as they lie in memory, whatever their strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from legion_shm.errors import JobFailed
from tests.engine.graph_harness import engine_with, node, node_class

ARRAYS: dict[str, Callable[[], Any]] = {
    "broadcast": lambda: np.broadcast_to(np.float32(2), (1 << 20, 1 << 20)),
    "backwards": lambda: np.arange(24.0).reshape(4, 6)[::-1, ::-1],
    "overlapping": lambda: np.lib.stride_tricks.as_strided(np.arange(9), (4, 3), (8, 8)),
    "transposed": lambda: np.arange(6).reshape(2, 3).T,
    "read-only": lambda: np.frombuffer(b"abcd", np.uint8),
    "of times": lambda: np.array(["2026-01-01", "NaT"], "M8[s]"),
    "empty": lambda: np.zeros((0, 3)),
}

# Those are made dense, for they would drag along more than they show.
GAPPED: dict[str, Callable[[], Any]] = {
    "every thousandth": lambda: np.arange(4000.0)[::1000],
    "a field of records": lambda: np.zeros(3, [("a", "i4"), ("b", "f8")])["b"],
}

FLOW = {
    "in": node("LegionInput", name="value"),
    "look": node("Look", value=["in", 0]),
    "out": node("LegionOutput", name="value", value=["look", 0]),
}


def shown_to_a_node(value: Any) -> tuple[Any, Any]:
    """What a node gets of it, and what comes out where the node gives that on."""
    seen: list[Any] = []

    def look(value: Any) -> tuple[Any]:
        seen.append(value)
        return (value,)

    with engine_with({"Look": node_class(look, required={"value": ("*",)})}) as harness:
        outputs = harness.run(FLOW, {"value": value}).outputs
    return seen[0], outputs["value"]


@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS)
def test_an_array_reaches_a_node_as_it_lies_in_memory(make: Callable[[], Any]) -> None:
    kept = make()
    given, output = shown_to_a_node(kept)
    assert (given.shape, given.strides, given.dtype) == (kept.shape, kept.strides, kept.dtype)
    assert given.flags.writeable == kept.flags.writeable or not kept.size
    assert not np.shares_memory(given, kept)
    assert given[-1:].tobytes() == kept[-1:].tobytes()
    assert output is kept, "unwritten, it is the same one again"


@pytest.mark.parametrize("make", GAPPED.values(), ids=GAPPED)
def test_a_gapped_array_reaches_a_node_dense(make: Callable[[], Any]) -> None:
    kept = make()
    given, _ = shown_to_a_node(kept)
    assert given.flags.c_contiguous
    assert given.tobytes() == kept.tobytes()


@pytest.mark.parametrize(
    "refusal", [NotImplementedError("copy_"), RuntimeError("\"copy_kernel\" not implemented for 'UInt1'")]
)
def test_what_torch_cannot_copy_is_copied_by_bytes_whatever_torch_says(
    monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    """The one in newer releases, the other in torch 2.4."""

    def refuse(*_: object, **__: object) -> None:
        raise refusal

    kept = torch.arange(16)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "clone", refuse)
        given, _ = shown_to_a_node(kept)
    assert given.tolist() == list(range(16))
    assert given.data_ptr() != kept.data_ptr()


def test_a_copy_that_fails_otherwise_fails_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(torch.Tensor, "clone", fail)
    with pytest.raises(JobFailed, match="not enough memory"):
        shown_to_a_node(torch.arange(16))


@pytest.mark.parametrize("count", [16, 1 << 20])
@pytest.mark.parametrize("name", ["int1", "int4", "uint1", "uint7", "bits8", "float4_e2m1fn_x2"])
def test_a_tensor_of_a_dtype_that_torch_cannot_copy_reaches_a_node(name: str, count: int) -> None:
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip(f"this torch has no {name}")
    kept = torch.arange(count, dtype=torch.int64).to(torch.uint8).view(dtype)
    given, output = shown_to_a_node(kept)
    assert given.dtype is dtype
    assert given.data_ptr() != kept.data_ptr()
    assert torch.equal(given.view(torch.uint8), kept.view(torch.uint8))
    assert output.data_ptr() == kept.data_ptr()
