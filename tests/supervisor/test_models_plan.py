"""Plans of live objects, without ComfyUI: what is written, what is rebuilt, and what is refused."""

from __future__ import annotations

import contextlib
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from legion_shm.errors import UnsupportedValue
from legion_shm.supervisor.comfy_models_build import PlanReader
from legion_shm.supervisor.comfy_models_format import Tag
from legion_shm.supervisor.comfy_models_names import Names
from legion_shm.supervisor.comfy_models_plan import Adapter, PlanWriter
from legion_shm.supervisor.comfy_models_weights import Weights, views

_SOURCE = """
import torch

class Plain:
    pass

class Slotted:
    __slots__ = ("x",)

def named(x):
    return x + 1

def closure(factor):
    def scaled(x, offset=1):
        return x * factor + offset
    return scaled

def counting():
    def count(n):
        return 0 if n == 0 else 1 + count(n - 1)
    return count

def class_in_function(base, factor):
    class Made(base):
        scale = factor
        def forward(self, x):
            return super().forward(x) * self.scale * factor
        @property
        def twice(self):
            return 2 * self.scale
    return Made
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A module that models may use, from a file, as a node pack is."""
    folder = tmp_path_factory.mktemp("pack")
    (folder / "legion_test_pack.py").write_text(_SOURCE)
    sys.path.insert(0, str(folder))
    try:
        import importlib

        yield importlib.import_module("legion_test_pack")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("legion_test_pack", None)


@pytest.fixture
def names() -> Names:
    return Names(("legion_test_pack", "torch.nn"))


def crossed(names: Names, value: Any) -> Any:
    """The value, written and read again."""
    writer = PlanWriter(names, Adapter())
    plan = writer.write(value)
    placed = Weights().place(writer.tensors, None)
    return reader(names, views(placed.table, placed.blobs)).read(plan)


def reader(names: Names, tensors: Any = ()) -> PlanReader:
    def nothing(*arguments: object) -> object:
        raise LookupError(f"nothing of {arguments}")

    return PlanReader(names, tensors, package=nothing, special=nothing)


def plan_of(token: Any) -> bytes:
    payload: bytes = msgpack.packb(token)
    return payload


def test_plain_values_keep_their_types_and_identities(names: Names) -> None:
    inner = [1, 2]
    value = {
        "a": (inner, inner),
        3: {4, 5},
        (1, "x"): OrderedDict(b=None),
        "big": 1 << 80,
        "c": 1 + 2j,
        "d": torch.float16,
        "s": torch.Size([1, 2]),
        "r": range(1, 9, 2),
    }
    found = crossed(names, value)
    assert found == value
    assert found["a"][0] is found["a"][1]
    assert type(found[1, "x"]) is OrderedDict
    assert found["d"] is torch.float16
    assert type(found["s"]) is torch.Size


def test_a_list_may_hold_itself(names: Names) -> None:
    value: list[Any] = [1]
    value.append(value)
    found = crossed(names, value)
    assert found[1] is found


def test_a_torch_module_computes_the_same(names: Names) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.SiLU()).eval()
    found = crossed(names, module)
    image = torch.rand(1, 3, 8, 8)
    assert torch.equal(found(image), module(image))
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert not found.training


def test_tied_parameters_stay_tied(names: Names) -> None:
    first = torch.nn.Linear(3, 3)
    second = torch.nn.Linear(3, 3)
    second.weight = first.weight
    found = crossed(names, torch.nn.ModuleList([first, second]))
    assert found[0].weight is found[1].weight
    assert isinstance(found[0].weight, torch.nn.Parameter)


def test_functions_are_found_by_name_and_closures_by_their_code(names: Names, pack: Any) -> None:
    found = crossed(names, {"named": pack.named, "closure": pack.closure(3)})
    assert found["named"] is pack.named
    assert found["closure"](2) == 7
    assert found["closure"](2, offset=0) == 6


def test_a_function_may_close_over_itself(names: Names, pack: Any) -> None:
    assert crossed(names, pack.counting())(5) == 5


def test_a_class_made_in_a_function_is_made_again(names: Names, pack: Any) -> None:
    kind = pack.class_in_function(torch.nn.Identity, 3)
    found = crossed(names, kind())
    assert type(found).__mro__[1:] == kind.__mro__[1:]
    assert found(torch.ones(1)).item() == 9
    assert found.twice == 6


def test_objects_are_their_attributes_and_no_constructor_runs(names: Names, pack: Any) -> None:
    value, slotted = pack.Plain(), pack.Slotted()
    value.x, value.me, slotted.x = torch.arange(3), value, [1]
    found = crossed(names, [value, slotted])
    assert type(found[0]) is pack.Plain
    assert torch.equal(found[0].x, value.x)
    assert found[0].me is found[0]
    assert found[1].x == [1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Path("x"),
        lambda: sys.stdout,
        lambda: iter([1]),
        lambda: torch.load,
        lambda: eval,
        lambda: types,
        lambda: OrderedDict.__init__,
        lambda: lambda x: x,
        lambda: torch.eye(3).to_sparse(),
    ],
)
def test_what_is_not_allowed_is_refused_with_its_path(names: Names, make: Any) -> None:
    with pytest.raises(UnsupportedValue) as refused:
        PlanWriter(names, Adapter()).write({"a": [make()]})
    assert refused.value.path.startswith("['a'][0]")


def test_a_function_that_is_not_in_its_modules_source_is_refused(names: Names, pack: Any) -> None:
    space: dict[str, Any] = vars(pack)
    exec("def planted(x):\n    def inner(y): return y + 41\n    return inner", space)
    with pytest.raises(UnsupportedValue, match="not in the source"):
        PlanWriter(names, Adapter()).write(pack.planted(1))


@pytest.mark.parametrize(
    "token",
    [
        [Tag.NAMED, "os", "system"],
        [Tag.NAMED, "builtins", "eval"],
        [Tag.NAMED, "builtins", "__import__"],
        [Tag.NAMED, "torch", "load"],
        [Tag.NAMED, "torch", "from_file"],
        [Tag.NAMED, "torch.nn.modules.linear", "math.sqrt"],
        [Tag.NAMED, "torch.nn.modules.linear", "torch.load"],
        [Tag.NAMED, "legion_test_pack", "torch.load"],
        [Tag.MODULE, "os"],
        [Tag.MODULE, "torch"],
        [Tag.CODE, "legion_test_pack", "0" * 32, "f", "f", None, None, [], []],
        [Tag.CODE, "os", "0" * 32, "f", "f", None, None, [], []],
        [Tag.CLASS, "os", "X", "X", [[Tag.NAMED, "builtins", "object"]], []],
        [Tag.PACKAGE, "no such key"],
        [Tag.DTYPE, "load"],
    ],
)
def test_a_plan_can_name_nothing_that_is_not_allowed(names: Names, pack: Any, token: Any) -> None:
    with pytest.raises(LookupError):
        reader(names).read(plan_of(token))


@pytest.mark.parametrize(
    "token",
    [
        [99],
        [],
        [Tag.REF, 0],
        [Tag.TUPLE, [Tag.REF, 0]],
        [Tag.TENSOR, 0, []],
        [Tag.OBJECT, 1, []],
        [Tag.OBJECT, [Tag.NAMED, "builtins", "int"], ["real", 1]],
        [Tag.TORCH_MODULE, [Tag.NAMED, "builtins", "object"], True, [], [], [], [], []],
        [Tag.METHOD, 1, 2],
        [Tag.DICT, 1],
        [Tag.DICT, [Tag.LIST], 1],
        [Tag.NDARRAY, "|O", [1], b"12345678"],
    ],
)
def test_a_malformed_plan_is_a_value_error(names: Names, token: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any text
        reader(names).read(plan_of(token))


_TOKENS = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=30,
)


@settings(max_examples=400, deadline=None)
@given(token=_TOKENS)
def test_nothing_but_value_and_lookup_errors_come_of_garbage(token: Any) -> None:
    names = Names(("torch.nn",))
    with contextlib.suppress(ValueError, LookupError):
        reader(names, [torch.zeros(1)]).read(plan_of(token))


def test_tensors_lie_in_one_block_and_are_found_there_again() -> None:
    weights = Weights()
    memory = _Memory()
    tensors = [torch.randn(100, 100), torch.randn(3000).half(), torch.zeros(0, 4), torch.tensor(2.0)]
    first = weights.place(tensors, memory)
    second = weights.place(tensors, memory)
    assert memory.reserved == [first.blobs[0].numel()]
    assert second.copied_bytes == 0
    assert second.blobs[0] is first.blobs[0]
    for made, tensor in zip(views(second.table, second.blobs), tensors, strict=True):
        assert made.dtype == tensor.dtype
        assert torch.equal(made, tensor)


def test_a_tensor_that_was_written_is_placed_again() -> None:
    weights = Weights()
    memory = _Memory()
    tensor = torch.randn(10_000)
    weights.place([tensor], memory)
    tensor.data[0] = 5.0
    placed = weights.place([tensor], memory)
    assert len(memory.reserved) == 2
    assert views(placed.table, placed.blobs)[0][0] == 5.0


def test_a_block_is_let_go_with_its_last_tensor() -> None:
    weights = Weights()
    memory = _Memory()
    tensors = [torch.randn(10_000), torch.randn(10_000)]
    weights.place(tensors, memory)
    del tensors[0]
    assert len(weights) == 1
    tensors.clear()
    assert len(weights) == 0


def test_strides_are_kept_where_that_costs_no_more() -> None:
    dense = torch.randn(2, 30, 40, 50).to(memory_format=torch.channels_last)
    wide = torch.randn(64, 4096)[:, ::64]
    placed = Weights().place([dense, wide], None)
    first, second = views(placed.table, placed.blobs)
    assert first.stride() == dense.stride()
    assert second.is_contiguous()
    assert torch.equal(first, dense)
    assert torch.equal(second, wide)


@pytest.mark.parametrize(
    "row",
    [
        [0, 90, "float32", [4], [1], 0],
        [0, -4, "float32", [1], [1], 0],
        [0, 0, "float32", [4], [-1], 0],
        [0, 0, "float32", [4, 4], [1], 0],
        [0, 0, "no_such", [1], [1], 0],
        [None, b"12", "float32", [1], [1], 0],
    ],
)
def test_a_table_that_points_outside_of_its_block_is_refused(row: list[Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any text
        views([row], [torch.zeros(100, dtype=torch.uint8)])


class _Memory:
    """Shared memory that is not shared."""

    def __init__(self) -> None:
        from collections import deque

        self.reserved: list[int] = []
        self.forgotten: deque[str] = deque()

    def resident_buffer(self, nbytes: int) -> Any:
        import ctypes

        self.reserved.append(nbytes)
        return (ctypes.c_ubyte * nbytes)()

    def room_bytes(self) -> int:
        return 1 << 30
