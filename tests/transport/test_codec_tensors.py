from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from legion_shm.errors import UnsupportedValue
from legion_shm.transport.arena import Arena
from legion_shm.transport.attachments import Attachments
from legion_shm.transport.codec import DevicePolicy, decode, encode, value_identity
from legion_shm.transport.handles import BlockHandle, new_arena_id
from legion_shm.transport.segment import Segment, attach_segment, create_segment
from tests import needs
from tests.transport.codec_values import (
    TENSOR_DTYPES,
    Sample,
    assert_same,
    assert_same_sharing,
    bits,
    round_trip,
    round_trip_both,
    values,
)
from tests.transport.fake_store import FakeBlock, FakeStore

untyped_torch: Any = torch  # for what its stubs don't know

pytestmark = [
    # torch warns, once each, of half complex, sparse layouts, nested and quantized tensors.
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested.*prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantize.*deprecated:UserWarning"),
]


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def sample(dtype: torch.dtype, count: int = 60) -> torch.Tensor:
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return raw.remainder(2).view(dtype) if dtype is torch.bool else raw.view(dtype)


# --- dtypes, shapes, strides ---------------------------------------------------------------------------


@pytest.mark.parametrize("inline_max_bytes", [0, 10_000], ids=["block", "inline"])
@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
def test_every_dtype_comes_back_bit_by_bit(dtype: torch.dtype, inline_max_bytes: int) -> None:
    tensor = sample(dtype)
    wide = tensor.reshape(3, 20)[:, 7]
    for part in (tensor, tensor.reshape(3, 4, 5).transpose(0, 2), tensor[::2], wide, tensor[:0], tensor[5]):
        assert_same(part, round_trip(part, FakeStore(inline_max_bytes=inline_max_bytes)))


TENSORS: dict[str, torch.Tensor] = {
    "0-d": torch.tensor(3.5),
    "empty": torch.empty(0),
    "empty with sizes": torch.empty(2, 0, 5),
    "transposed empty": torch.empty(0, 5).t(),
    "large empty": torch.empty(0, 2**40),
    "plain": torch.arange(100.0),
    "transposed": torch.arange(60).reshape(3, 4, 5).permute(2, 0, 1),
    "channels last": torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last),
    "one channel, channels last": torch.rand(2, 1, 8, 8).to(memory_format=torch.channels_last),
    "every other": torch.arange(100)[::2],
    "row": torch.arange(1000).reshape(10, 100)[3],
    "expanded": torch.arange(30.0).reshape(1, 30).expand(50, 30),
    "expanded scalar": torch.ones(1).expand(2**20, 2**20),
    "windows": torch.arange(100).unfold(0, 10, 1),
}


@pytest.mark.parametrize("inline_max_bytes", [0, 10_000], ids=["block", "inline"])
@pytest.mark.parametrize("name", TENSORS)
def test_shape_and_strides_are_kept(name: str, inline_max_bytes: int) -> None:
    tensor = TENSORS[name]
    got = round_trip(tensor, FakeStore(inline_max_bytes=inline_max_bytes))
    assert got.shape == tensor.shape
    assert got.stride() == tensor.stride()
    if name != "expanded scalar":
        assert_same(tensor, got)


def test_an_expanded_tensor_costs_what_it_holds(store: FakeStore) -> None:
    assert encode(TENSORS["expanded scalar"], store).stats.inline_bytes == 4
    assert encode(TENSORS["expanded"], store).stats.copied_bytes == 120


def test_a_tensor_that_would_drag_along_more_is_packed_in_its_own_order(store: FakeStore) -> None:
    image = torch.rand(1, 64, 64, 16).permute(0, 3, 1, 2)[:, :3]  # channels last, 3 of 16
    got, encoded = round_trip_both(image, store)
    assert_same(image, got)
    assert encoded.stats.copied_bytes == image.nbytes
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_packed_expansion_stays_one(store: FakeStore) -> None:
    column = torch.rand(100, 100)[:, 3:4].expand(100, 50)
    got, encoded = round_trip_both(column, store)
    assert_same(column, got)
    assert got.stride() == (1, 0)
    assert encoded.stats.copied_bytes == 400


def test_conjugate_and_negative_views_arrive_resolved(store: FakeStore) -> None:
    base = torch.randn(100, dtype=torch.complex64)
    sent = [base, base.conj(), base.conj().imag, base.to(torch.complex32).conj()]
    got = round_trip(sent, store)
    for ours, theirs in zip(sent, got, strict=True):
        assert not theirs.is_conj()
        assert not theirs.is_neg()
        assert bits(ours) == bits(theirs)


# --- classes and flags ---------------------------------------------------------------------------------


def test_leaves_and_parameters_stay_what_they_are() -> None:
    leaf = torch.rand(50, requires_grad=True)
    parameter = torch.nn.Parameter(torch.rand(50))
    frozen = torch.nn.Parameter(torch.rand(3).to(torch.float16), requires_grad=False)
    got = round_trip([leaf, parameter, frozen])
    assert_same([leaf, parameter, frozen], got)
    assert [tensor.is_leaf for tensor in got] == [True, True, True]


def test_what_was_made_in_inference_mode_arrives_as_an_ordinary_tensor(store: FakeStore) -> None:
    with torch.inference_mode():
        sent = [torch.rand(50), torch.rand(50, 50)[:, 1], torch.rand(2, 3)]
        parameter = torch.nn.Parameter(torch.rand(3))
    for got in (round_trip(sent, store), _decoded_in_inference_mode(sent)):
        assert_same(sent, got)
        for tensor in got:
            tensor.add_(1)
    assert_same(torch.nn.Parameter(parameter.clone()), round_trip(parameter))


def _decoded_in_inference_mode(value: object) -> Any:
    with torch.inference_mode():
        return round_trip(value)


def test_attributes_of_a_tensor_travel_with_it() -> None:
    tensor = torch.rand(3)
    tensor.origin = {"node": 3, "mask": tensor[:2]}  # type: ignore[attr-defined]
    got = round_trip([tensor, tensor])
    assert_same([tensor, tensor], got)
    assert got[0].origin["mask"].data_ptr() == got[0].data_ptr()


def test_attributes_of_many_tensors_are_not_mixed_up() -> None:
    tensors: list[Any] = [torch.zeros(1) for _ in range(50)]
    for number, tensor in enumerate(tensors):
        tensor.number = number
    assert [tensor.number for tensor in round_trip(tensors)] == list(range(50))


def test_sizes_dtypes_and_devices_travel() -> None:
    value = [torch.Size([2, 3]), torch.Size([]), torch.float8_e5m2, torch.qint8, torch.device("cuda", 1)]
    got = round_trip({"list": value, torch.bfloat16: {torch.device("cpu")}})
    assert_same({"list": value, torch.bfloat16: {torch.device("cpu")}}, got)


def test_a_tensor_can_be_a_key() -> None:
    tensor = torch.rand(3)
    got = round_trip([{tensor: "key", (1, tensor): "part"}, {tensor}, tensor])
    assert got[1] == {got[2]}
    assert list(got[0]) == [got[2], (1, got[2])]


def sparse_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = torch.zeros(6, 8)
        dense[1, 2] = dense[3, 4] = 5
        twice = torch.sparse_coo_tensor(torch.tensor([[1, 1], [2, 2]]), torch.tensor([1.0, 2.0]), (6, 8))
        return {
            "coo": dense.to_sparse(),
            "coo, not coalesced": twice,
            "coo with dense dimensions": torch.rand(4, 5, 6).to_sparse(1),
            "coo, empty": untyped_torch.sparse_coo_tensor(size=(3, 4)),
            "coo that requires grad": dense.to_sparse().requires_grad_(),
            "coo, parameter": torch.nn.Parameter(dense.to_sparse()),
            "csr": dense.to_sparse_csr(),
            "csc": dense.to_sparse_csc(),
            "bsr": dense.to_sparse_bsr((2, 2)),
            "bsc": dense.to_sparse_bsc((2, 2)),
            "csr, half": dense.half().to_sparse_csr(),
        }


SPARSE = sparse_tensors()


@pytest.mark.parametrize("inline_max_bytes", [0, 10_000], ids=["block", "inline"])
@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_tensor_comes_back_as_it_was(name: str, inline_max_bytes: int) -> None:
    tensor = SPARSE[name]
    got = round_trip([tensor, tensor], FakeStore(inline_max_bytes=inline_max_bytes))
    assert_same(tensor, got[0])
    assert got[0] is got[1]


class Mine(torch.Tensor):
    pass


def resized(nbytes: int) -> torch.Tensor:
    tensor = torch.rand(10)
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def with_grad() -> Any:
    tensor: Any = torch.rand(3, requires_grad=True)
    tensor.sum().backward()
    return tensor


def with_hook() -> Any:
    tensor: Any = torch.rand(3, requires_grad=True)
    tensor.register_hook(lambda grad: grad)
    return tensor


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.rand(3).as_subclass(Mine), "test_codec_tensors.Mine is a subclass of torch.Tensor"),
        (lambda: torch.rand(3, requires_grad=True) * 2, r"graph of gradients.*detach\(\)"),
        (with_grad, r"\.grad"),
        (with_hook, "hooks"),
        (lambda: torch.empty(3, device="meta"), "meta device"),
        (lambda: torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8), r"quantized.*dequantize\(\)"),
        (lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]), r"nested.*unbind\(\)"),
        (
            lambda: torch.nested.nested_tensor([torch.rand(2)], layout=torch.jagged),
            "subclass of torch.Tensor",
        ),
        (lambda: torch.rand(3).to_mkldnn(), r"to_dense\(\)"),
        (lambda: resized(0), "freed or resized"),
        (lambda: resized(39), "freed or resized"),
        (lambda: untyped_torch._efficientzerotensor((3,)), "no memory|can't be reached"),
        (lambda: torch.strided, "no codec"),
        (lambda: torch.ones(1).reshape((1,) * 65), "more than 64 dimensions"),
        (lambda: torch.empty(0).as_strided((0, 2**40, 2**40), (1, 1, 1)), "beyond all memory"),
    ],
)
def test_tensors_that_would_arrive_changed_are_refused_with_what_to_do(make: Any, says: str) -> None:
    if says.startswith("to_dense") and not untyped_torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no mkldnn")
    store = FakeStore()
    with pytest.raises(UnsupportedValue, match=says) as caught:
        encode({"samples": [torch.rand(1000), make()]}, store)
    assert caught.value.path == "value['samples'][1]"
    assert store.reserved == []


def test_a_tensor_inside_of_vmap_is_refused() -> None:
    def send(tensor: torch.Tensor) -> torch.Tensor:
        encode(tensor, FakeStore())
        return tensor

    with pytest.raises(UnsupportedValue, match="memory"):
        torch.vmap(send)(torch.rand(3, 3))


def test_the_default_device_does_not_matter() -> None:
    torch.set_default_device("meta")
    try:
        tensors = [torch.rand(n, device="cpu") for n in (3, 100, 0)]
        assert_same(tensors, round_trip([*tensors, tensors[1][50:]])[:3])
    finally:
        torch.set_default_device(None)


# --- sharing -------------------------------------------------------------------------------------------


def test_the_same_tensor_twice_is_one_tensor(store: FakeStore) -> None:
    tensor = torch.rand(1000)
    got, encoded = round_trip_both({"a": tensor, "b": [tensor]}, store)
    assert got["a"] is got["b"][0]
    assert encoded.stats.copies == 1


def test_overlapping_tensors_share_one_storage_and_cross_once(store: FakeStore) -> None:
    image = torch.rand(64, 64)
    sent = [image[:40], image[30:], image[:, 3], image.t(), image.view(torch.int32), image.numpy()]
    got, encoded = round_trip_both(sent, store)
    assert_same(sent, got)
    assert_same_sharing(sent, got)
    assert len({tensor.untyped_storage().data_ptr() for tensor in got[:5]}) == 1
    assert encoded.stats.copied_bytes == image.nbytes


def test_neighbours_in_one_storage_cross_in_blocks_of_their_own(store: FakeStore) -> None:
    base = torch.rand(1000)
    encoded = encode([base[:300], base[600:]], store)
    assert len(encoded.blocks) == 2
    assert encoded.stats.copied_bytes == 700 * 4


def test_columns_that_only_interleave_are_packed(store: FakeStore) -> None:
    image = torch.rand(100, 100, 3)
    got, encoded = round_trip_both(list(image.unbind(-1)), store)
    assert_same(list(image.unbind(-1)), got)
    assert encoded.stats.copied_bytes == image.nbytes


def test_a_wide_view_inside_of_what_crosses_anyway_costs_nothing(store: FakeStore) -> None:
    base = torch.rand(50, 10)
    sent = [base[:, :6], base[:40, 7]]
    got, encoded = round_trip_both(sent, store)
    assert_same(sent, got)
    assert encoded.stats.copies == 1


def test_wide_views_that_do_overlap_keep_sharing(store: FakeStore) -> None:
    base = torch.rand(100, 100)
    sent = [base[:, 2:5], base[:, 4:8]]
    got = round_trip(sent, store)
    got[0][7, 2] = 77
    assert got[1][7, 0] == 77


def test_equal_wide_views_are_packed_together(store: FakeStore) -> None:
    base = torch.rand(100, 100)
    got, encoded = round_trip_both([base[:, 5], base[:, 5]], store)
    assert got[0] is not got[1]
    got[0][3] = 77
    assert got[1][3] == 77
    assert encoded.stats.copied_bytes == 400


def test_many_wide_views_do_not_take_forever(store: FakeStore) -> None:
    base = torch.rand(500, 500)
    sent = [base[:, i] for i in range(0, 500, 2)]
    assert_same(sent, round_trip(sent, store))


def test_shared_tensors_stay_aligned(store: FakeStore) -> None:
    raw = torch.zeros(1000, dtype=torch.uint8)
    sent = [raw[4:84].view(torch.int32), raw[8:808].view(torch.float64)]
    got = round_trip(sent, store)
    assert [tensor.data_ptr() % tensor.itemsize for tensor in got] == [0, 0]
    assert_same_sharing(sent, got)


def test_a_received_tensor_is_written_without_a_copy_and_outlived_by_its_views(store: FakeStore) -> None:
    got, encoded = round_trip_both(torch.zeros(1000), store)
    got[0] = 1
    assert store.payload(encoded.blocks[0])[:4] == np.float32(1).tobytes()
    rest = got[500:].numpy()
    del got
    assert store.released == []
    del rest
    assert store.released == store.viewed


def test_a_received_tensor_goes_on_by_reference_whatever_its_strides(store: FakeStore) -> None:
    image = round_trip(torch.rand(64, 64, 3), store)
    for part in (image, image[10:20], image.permute(2, 0, 1), image[..., 0]):
        got, encoded = round_trip_both(part, store)
        assert_same(part, got)
        assert encoded.stats.copies == 0
        assert encoded.owned == (False,)


def test_a_conjugate_of_a_received_tensor_is_copied(store: FakeStore) -> None:
    received = round_trip(torch.randn(100, dtype=torch.complex64), store)
    got, encoded = round_trip_both(received.conj(), store)
    assert bits(got) == bits(received.conj())
    assert encoded.owned == (True,)


# --- devices -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeDevices:
    """Says that host memory is the memory of one device, which a process has or hasn't."""

    here: bool = True

    def identify(self, device: torch.device) -> tuple[str, str] | None:
        assert device.type == "cpu"
        return "fake", "GPU-1234"

    def locate(self, kind: str, uuid: str) -> torch.device | None:
        return torch.device("cpu") if self.here and (kind, uuid) == ("fake", "GPU-1234") else None


def test_a_device_tensor_crosses_through_one_host_copy_and_keeps_what_it_shares(store: FakeStore) -> None:
    base = torch.rand(100, 100)
    sent = [base, base[10:20].t(), base[:, 3], torch.rand(500, 9)[:, 2], torch.rand(3), torch.empty(0, 3)]
    policy = DevicePolicy(resolver=FakeDevices())
    encoded = encode(sent, store, devices=policy)
    got: Any = decode(encoded.tree, encoded.blocks, store, devices=policy)
    assert_same(sent, got)
    assert_same_sharing(sent, got)
    assert encoded.stats.copies == 2


def test_a_device_tensor_is_never_looked_up_by_its_address(store: FakeStore) -> None:
    received = round_trip(torch.rand(1000), store)
    encoded = encode(received, store, devices=DevicePolicy(resolver=FakeDevices()))
    assert encoded.owned == (True,)


def test_a_tensor_of_an_absent_device_is_refused_by_path_unless_the_cpu_will_do(store: FakeStore) -> None:
    sent = {"images": [torch.rand(3), torch.rand(1000)]}
    encoded = encode(sent, store, devices=DevicePolicy(resolver=FakeDevices()))
    absent = FakeDevices(here=False)
    with pytest.raises(UnsupportedValue, match=r"fake device GPU-1234.*allow_cpu") as caught:
        decode(encoded.tree, encoded.blocks, store, devices=DevicePolicy(resolver=absent), path="output_1")
    assert caught.value.path == "output_1['images'][0]"
    assert store.released == list(encoded.blocks)
    policy = DevicePolicy(allow_cpu=True, resolver=absent)
    got = decode(encoded.tree, encoded.blocks, store, devices=policy)
    assert_same(sent, got)


def test_torchs_own_devices_are_the_default(store: FakeStore) -> None:
    encoded = encode(torch.rand(3), store, devices=DevicePolicy(resolver=FakeDevices()))
    with pytest.raises(UnsupportedValue, match="fake device"):
        decode(encoded.tree, encoded.blocks, store)


class FakeCuda:
    """As much of torch.cuda as naming devices takes."""

    in_use = False
    asked = 0

    @classmethod
    def is_initialized(cls) -> bool:
        return cls.in_use

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 2

    @classmethod
    def get_device_properties(cls, index: int) -> Any:
        cls.asked += 1
        return type("Properties", (), {"uuid": f"GPU-{index}"})


def test_cuda_devices_are_matched_by_uuid_not_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from legion_shm.transport.torch_devices import TorchDevices

    monkeypatch.setattr(torch, "cuda", FakeCuda)
    devices = TorchDevices()
    assert devices.identify(torch.device("cuda", 1)) == ("cuda", "GPU-1")
    assert devices.locate("cuda", "GPU-1") == torch.device("cuda", 1)
    assert devices.locate("cuda", "GPU-7") is None
    assert devices.locate("abacus", "GPU-1") is None
    assert devices.identify(torch.device("cpu")) is None
    with pytest.raises(LookupError, match="xla"):
        devices.identify(torch.device("xla", 0))


def test_cuda_devices_in_use_are_asked_for_their_ids_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from legion_shm.transport.torch_devices import TorchDevices

    monkeypatch.setattr(torch, "cuda", FakeCuda)
    monkeypatch.setattr(FakeCuda, "in_use", True)
    devices = TorchDevices()
    asked: list[int] = []
    for _ in range(3):
        assert devices.identify(torch.device("cuda", 1)) == ("cuda", "GPU-1")
        assert devices.locate("cuda", "GPU-1") == torch.device("cuda", 1)
        asked.append(FakeCuda.asked)
    assert asked[0] == asked[2]


# --- any nesting of everything -------------------------------------------------------------------------


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(values())
def test_any_nesting_comes_back_identical_in_value_class_and_sharing(given_value: Sample) -> None:
    store = FakeStore()
    got = round_trip(given_value.value, store)
    assert_same(given_value.value, got)
    assert_same_sharing(given_value.value, got)
    # And once more, now that much of it lies in blocks.
    again, encoded = round_trip_both(got, store)
    assert_same(given_value.value, again)
    assert_same_sharing(given_value.value, again)
    assert len(set(encoded.blocks)) == len(encoded.blocks)


# --- the real arena ------------------------------------------------------------------------------------


class ArenaStore:
    """A process's store made of the real parts, as supervisor and worker put them together."""

    inline_max_bytes = 4096

    def __init__(self) -> None:
        self.attachments = Attachments()
        self.arena = Arena(arena_id=new_arena_id(), grow=self._grow, quota_bytes=2**26)
        self._segments: list[Segment] = []
        self.discarded = 0

    def _grow(self, nbytes: int) -> tuple[int, Segment]:
        segment = create_segment("memfd", nbytes, name_prefix=f"legion-t{os.getpid()}-")
        number = len(self._segments)
        descriptor = os.dup(segment.descriptor) if isinstance(segment.descriptor, int) else segment.descriptor
        self.attachments.add(self.arena.arena_id, number, attach_segment("memfd", descriptor, nbytes))
        self._segments.append(segment)
        return number, segment

    def reserve(self, nbytes: int) -> FakeBlock:
        block = self.arena.reserve(nbytes)
        return FakeBlock(block.handle, block.address)

    def discard(self, handle: BlockHandle) -> None:
        self.discarded += 1
        self.arena.free(handle)

    def view(self, handle: BlockHandle) -> Any:
        return self.attachments.view(handle)

    def adopt(self, address: int, nbytes: int) -> None:
        return None

    def device_block(self, kind: str, uuid: str, nbytes: int) -> None:
        return None

    def find(self, address: int, nbytes: int) -> tuple[BlockHandle, int] | None:
        return self.attachments.find(address, nbytes)

    def close(self) -> None:
        self.attachments.close()
        self.arena.close()


@pytest.fixture
def real() -> Iterator[ArenaStore]:
    store = ArenaStore()
    yield store
    store.close()


@needs.linux
def test_values_cross_the_real_arena_by_copy_then_by_reference_then_by_copy_when_written(
    real: ArenaStore,
) -> None:
    image = torch.rand(1, 64, 64, 3)
    sent = {"samples": image, "mask": image[..., 0], "raw": np.arange(5000), "small": torch.rand(3)}
    first = encode(sent, real)
    assert first.stats.copies == 2
    got: Any = decode(first.tree, first.blocks, real)
    assert_same(sent, got)
    assert_same_sharing(sent, got)

    second = encode(got, real)
    assert second.stats.copies == 0
    assert set(second.blocks) == set(first.blocks)
    assert value_identity(second.tree, second.blocks, second.owned) is not None

    got["samples"][0, 0, 0, 0] = 77
    again: Any = decode(second.tree, second.blocks, real)
    assert_same(sent, again)
    third = encode(got, real)
    assert third.stats.copies == 1
    assert third.stats.referenced_bytes == 5000 * 8
    written: Any = decode(third.tree, third.blocks, real)
    assert written["samples"][0, 0, 0, 0] == 77
    assert written["mask"][0, 0, 0] == 77
    third.discard(real)
    assert real.discarded == 1

    delivered = [*first.blocks, *second.blocks, *third.blocks]
    del got, again, written, first, second, third
    gc.collect()
    released = real.attachments.drain_released()
    assert sorted(map(str, released)) == sorted(map(str, delivered))
    assert real.attachments.live_views() == 0


def test_a_warning_that_torch_gives_once_loses_no_value_where_warnings_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make: Any = torch.sparse_coo_tensor
    warned: list[bool] = []

    def warn_once(*arguments: Any, **options: Any) -> torch.Tensor:
        if not warned:
            warned.append(True)
            warnings.warn("invariants are not checked", UserWarning, stacklevel=1)
        made: torch.Tensor = make(*arguments, **options)
        return made

    sent = torch.eye(3).to_sparse()
    monkeypatch.setattr(torch, "sparse_coo_tensor", warn_once)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = round_trip(sent)
    assert warned
    assert torch.equal(back.to_dense(), torch.eye(3))
