"""Handles of a GPU's memory in values: used for what they are, and refused for everything else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from legion_shm.errors import ArenaFull, InvalidHandle, ProtocolError
from legion_shm.supervisor.worker_gpu import WorkerGpu, check_introduced
from legion_shm.transport.codec import decode, encode
from legion_shm.transport.codec_types import DeviceBlock
from legion_shm.transport.codec_wire import pack_tree, unpack_tree
from legion_shm.transport.cuda_driver import HANDLE_BYTES
from legion_shm.transport.gpu_memory import GpuMemory, without_gpu
from legion_shm.transport.gpu_segment import PATTERN_BYTES, GpuSegment
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle
from legion_shm.transport.messages import GpuSegmentIntroduced
from tests.cuda.emulation import UUID, EmulatedGpu, emulated_gpu, needs_compiler
from tests.transport.fake_store import FakeStore

pytestmark = needs_compiler

ARENA = 5
FLOATS = 1 << 14


class GpuStore(FakeStore):
    """Both ends in one, with memory of the emulated GPU."""

    def __init__(self) -> None:
        super().__init__()
        ids = itertools.count(1)
        self.grown: list[int] = []
        self.refusing = False

        def grow(device: str, nbytes: int) -> tuple[int, GpuSegment]:
            self.grown.append(nbytes)
            if self.refusing:
                raise ArenaFull("not now")
            return next(ids), GpuSegment.create(device, nbytes)

        self.gpu = GpuMemory(arena_id=ARENA, quota_bytes=16 << 20, grow=grow, retired=lambda _: None)

    def device_block(self, kind: str, uuid: str, nbytes: int) -> DeviceBlock | None:  # type: ignore[override]
        return self.gpu.block(kind, uuid, nbytes)

    def discard(self, handle: BlockHandle) -> None:
        if not self.gpu.free(handle):
            super().discard(handle)

    def view(self, handle: BlockHandle) -> Any:
        return self.gpu.view(handle) if handle.arena == ARENA else super().view(handle)


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[EmulatedGpu]:
    with emulated_gpu(tmp_path) as gpu:
        yield gpu
        assert gpu.allocations == []


@pytest.fixture
def store(gpu: EmulatedGpu) -> Iterator[GpuStore]:
    store = GpuStore()
    yield store
    store.gpu.close()


def changed(tree: bytes, change: Any) -> bytes:
    """The tree with its buffers and tokens changed in place."""
    count, *rest = unpack_tree(tree, max_tokens=1000)
    buffers, tokens = rest[:count], rest[count:]
    change(buffers, tokens)
    return pack_tree(buffers, tokens)


def test_a_delivery_ends_when_it_has_been_copied_and_not_before(store: GpuStore, gpu: EmulatedGpu) -> None:
    sent = torch.rand(FLOATS)
    encoded = encode([sent, sent[10:]], store)
    assert [handle.arena for handle in encoded.blocks] == [ARENA]
    assert encoded.owned == (True,)
    assert encoded.stats.copies == 1
    synchronized = gpu.devices.synchronized
    assert synchronized == 1, "before anybody hears of it"
    got: Any = decode(encoded.tree, encoded.blocks, store)
    assert store.gpu.drain_released() == list(encoded.blocks), "though the value lives"
    assert gpu.devices.synchronized == synchronized + 1
    assert torch.equal(got[0], sent)
    assert got[1].untyped_storage().data_ptr() == got[0].untyped_storage().data_ptr()
    encoded.discard(store)
    assert store.gpu.blocks() == 0


def test_values_that_end_in_errors_end_their_deliveries_too(store: GpuStore, gpu: EmulatedGpu) -> None:
    encoded = encode([torch.rand(FLOATS), 1], store)
    cut = changed(encoded.tree, lambda buffers, tokens: tokens.pop())
    synchronized = gpu.devices.synchronized
    with pytest.raises(ProtocolError, match="ends in the middle"):
        decode(cut, encoded.blocks, store)
    assert gpu.devices.synchronized == synchronized + 1, "a copy had begun"
    assert store.gpu.drain_released() == list(encoded.blocks)


def test_what_fails_to_be_filled_is_given_back(store: GpuStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from legion_shm.transport import tensors

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tensors._TensorRegion, "copy_span_into", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        encode(torch.rand(FLOATS), store)
    assert store.gpu.blocks() == 0


def test_bytes_and_arrays_stay_in_main_memory(store: GpuStore) -> None:
    encoded = encode([b"x" * 5000, np.arange(5000)], store)
    assert {handle.arena for handle in encoded.blocks} == {7}


def test_a_tensor_of_the_cpu_can_not_lie_there(store: GpuStore) -> None:
    encoded = encode(torch.rand(FLOATS), store)
    with pytest.raises(InvalidHandle, match="is memory of"):
        decode(
            changed(encoded.tree, lambda buffers, tokens: tokens[0].__delitem__(slice(7, 9))),
            encoded.blocks,
            store,
        )
    assert store.gpu.drain_released() == list(encoded.blocks)


@pytest.mark.parametrize("value", [b"x" * 5000, "y" * 5000, bytearray(5000), np.arange(5000)], ids=type)
def test_nothing_but_a_tensor_can_lie_there(store: GpuStore, value: object) -> None:
    there = encode(torch.rand(FLOATS), store)
    encoded = encode(value, store)
    with pytest.raises(InvalidHandle, match="is memory of"):
        decode(encoded.tree, there.blocks, store)


def test_a_tensor_of_another_device_can_not_lie_there(store: GpuStore) -> None:
    encoded = encode(torch.rand(FLOATS), store)
    store.gpu._segments[ARENA, 1].device = "another"
    store.gpu._located["another"] = torch.device("cpu")
    with pytest.raises(InvalidHandle, match="another"):
        decode(encoded.tree, encoded.blocks, store)


def test_handles_are_checked_against_the_segment(store: GpuStore) -> None:
    encoded = encode(torch.rand(FLOATS), store)
    (handle,) = encoded.blocks
    for wrong in (
        replace(handle, segment=9),
        replace(handle, arena=6),
        replace(handle, offset=1 << 40),
        replace(handle, offset=handle.offset + 1),
        replace(handle, nbytes=1 << 40),
        replace(handle, offset=(1 << 64) - BLOCK_ALIGN),
    ):
        with pytest.raises(InvalidHandle):
            store.gpu.view(wrong)
    with pytest.raises(InvalidHandle):
        decode(
            changed(encoded.tree, lambda buffers, tokens: buffers[0].__setitem__(2, 1 << 40)),
            encoded.blocks,
            store,
        )
    assert set(store.gpu.drain_released()) <= {handle}


def test_an_offset_that_does_not_fit_the_dtype_is_copied_out_alone(store: GpuStore) -> None:
    sent = torch.arange(FLOATS, dtype=torch.uint8)
    encoded = encode([sent, sent[1:]], store)

    def as_halves(buffers: Any, tokens: Any) -> None:
        tokens[2][1], tokens[2][2] = "float16", [FLOATS // 2 - 1]

    got: Any = decode(changed(encoded.tree, as_halves), encoded.blocks, store)
    assert torch.equal(got[1].view(torch.uint8), sent[1 : FLOATS - 1])


def test_after_a_refusal_nobody_is_asked_for_a_while(
    store: GpuStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from legion_shm.transport import gpu_memory

    now = 100.0
    monkeypatch.setattr(gpu_memory, "monotonic_s", lambda: now)
    store.refusing = True
    assert store.device_block("cuda", UUID, 4096) is None
    asked = len(store.grown)
    store.refusing = False
    for later in (100.2, 100.4, 100.6, 100.8):
        now = later
        assert store.device_block("cuda", UUID, 4096) is None
    assert len(store.grown) == asked
    now = 101.1
    assert store.device_block("cuda", UUID, 4096) is not None


def test_who_encodes_may_say_that_a_device_is_not_to_be_used(store: GpuStore) -> None:
    for avoided, arena in ((frozenset({UUID}), 7), (frozenset({""}), 7), (frozenset({"other"}), ARENA)):
        with without_gpu(avoided):
            assert encode(torch.rand(FLOATS), store).blocks[0].arena == arena
    assert store.device_block("xpu", UUID, 4096) is None


GOOD = GpuSegmentIntroduced(9, 1, 1 << 21, UUID, b"h" * HANDLE_BYTES, b"p" * PATTERN_BYTES)


@pytest.mark.parametrize(
    "change",
    [
        {"nbytes": 0}, {"nbytes": -1}, {"device": ""}, {"device": "x" * 81}, {"handle": b""},
        {"handle": b"h" * 65}, {"pattern": b""}, {"pattern": b"p" * 33},
    ],
    ids=str,
)  # fmt: skip
def test_a_segment_that_can_not_be_one_breaks_the_protocol(change: dict[str, Any]) -> None:
    check_introduced(GOOD)
    with pytest.raises(ProtocolError, match="GpuSegmentIntroduced"):
        check_introduced(replace(GOOD, **change))


def test_a_worker_opens_nothing_before_a_block_of_it_is_delivered(gpu: EmulatedGpu) -> None:
    sent: list[Any] = []
    worker = WorkerGpu(
        arena_id=1,
        quota_bytes=1 << 20,
        generations=itertools.count(1),
        ask=lambda message: pytest.fail("nothing is asked"),
        send=sent.append,
        returned=lambda handle: None,
    )
    gpu.fail("cuInit 999")
    worker.introduce(GOOD)
    handle = BlockHandle(9, 1, 0, 4096, 1)
    assert worker.knows(handle)
    worker.drop(9, (1, 2))
    assert not worker.knows(handle)
    assert [(message.arena, message.segments) for message in sent] == [(9, (1,))]
