from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from legion_shm.errors import ForkedError, InvalidHandle
from legion_shm.transport.arena import Arena, Block
from legion_shm.transport.attachments import Attachments
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle
from legion_shm.transport.segment import Segment, SegmentKind, attach_segment, create_segment
from tests import needs

PAGE = BLOCK_ALIGN
ARENA = 77


class Pair:
    """An owner's arena, and a receiver that has attached its segments, in one process."""

    def __init__(self, kind: SegmentKind) -> None:
        self.kind: SegmentKind = kind
        self.receiver = Attachments()
        self.own = Attachments()
        self.arena = Arena(arena_id=ARENA, grow=self._grow, quota_bytes=1 << 28, full_wait_s=0.0)
        self._segments = 0

    def _grow(self, nbytes: int) -> tuple[int, Segment]:
        segment = create_segment(self.kind, nbytes, name_prefix="legion-test-")
        number = self._segments
        self._segments += 1
        self.own.add(ARENA, number, segment)
        self.receiver.add(ARENA, number, attached_again(segment))
        return number, segment

    def publish(self, content: np.ndarray[Any, Any]) -> BlockHandle:
        block = self.arena.reserve(content.nbytes)
        ctypes.memmove(block.address, content.ctypes.data, content.nbytes)
        return block.handle

    def close(self) -> None:
        self.arena.close()
        self.receiver.close()
        self.own.close()


def attached_again(segment: Segment) -> Segment:
    descriptor = segment.descriptor
    return attach_segment(
        segment.kind, os.dup(descriptor) if isinstance(descriptor, int) else descriptor, segment.nbytes
    )


@pytest.fixture(params=needs.SEGMENT_KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(request.param)
    yield pair
    pair.close()


@pytest.fixture
def memfd() -> Iterator[Pair]:
    pair = Pair("memfd")
    yield pair
    pair.close()


def floats(first: float, count: int = 4 * PAGE) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.arange(first, first + count, dtype=np.float32)


def tensor_of(array: Any) -> torch.Tensor:
    return torch.frombuffer(array, dtype=torch.float32)


# --- views --------------------------------------------------------------------------------------------


def test_a_view_holds_what_was_published_and_is_writable(pair: Pair) -> None:
    handle = pair.publish(floats(1))
    tensor = tensor_of(pair.receiver.view(handle))
    assert torch.equal(tensor, torch.from_numpy(floats(1)))
    tensor.zero_()
    assert tensor.sum() == 0


def test_a_write_into_one_delivery_shows_in_no_other(pair: Pair) -> None:
    handle = pair.publish(floats(1))
    first = tensor_of(pair.receiver.view(handle))
    second = tensor_of(pair.receiver.view(handle))
    owners = tensor_of(pair.own.view(handle))
    first.fill_(-1)
    second[0] = -2
    later = tensor_of(pair.receiver.view(handle))
    assert torch.equal(owners, torch.from_numpy(floats(1)))
    assert torch.equal(later, torch.from_numpy(floats(1)))
    assert second[1] == 2
    assert first[0] == -1


def test_each_delivery_ends_once_when_its_last_buffer_is_gone(pair: Pair) -> None:
    handle = pair.publish(floats(1))
    first = pair.receiver.view(handle)
    second = pair.receiver.view(handle)
    assert pair.receiver.live_views() == 2
    assert pair.receiver.drain_released() == []
    del first
    assert pair.receiver.drain_released() == [handle]
    assert pair.receiver.drain_released() == []
    del second
    assert pair.receiver.drain_released() == [handle]
    assert pair.receiver.live_views() == 0


@pytest.mark.parametrize(
    "keep",
    [
        lambda tensor: tensor.detach(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy()[::2].T,
        lambda tensor: tensor[3:5],
        lambda tensor: tensor.view(torch.int32),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: memoryview(tensor.numpy()),
        lambda tensor: torch.from_numpy(tensor.numpy()),
        torch.nn.Parameter,
    ],
    ids=[
        "detach",
        "numpy",
        "numpy_view",
        "slice",
        "dtype_view",
        "storage",
        "memoryview",
        "round",
        "parameter",
    ],
)
def test_whatever_still_uses_the_buffer_keeps_the_delivery(pair: Pair, keep: Any) -> None:
    handle = pair.publish(floats(1))
    tensor = tensor_of(pair.receiver.view(handle))
    kept = keep(tensor)
    del tensor
    gc.collect()
    assert pair.receiver.drain_released() == []
    del kept
    gc.collect()
    assert pair.receiver.drain_released() == [handle]


def test_a_reused_block_shows_its_new_content_after_a_dirty_view_was_released(pair: Pair) -> None:
    addresses = set[int]()
    for turn in range(4):
        handle = pair.publish(floats(turn))
        tensor = tensor_of(pair.receiver.view(handle))
        assert torch.equal(tensor, torch.from_numpy(floats(turn)))
        addresses.add(tensor.data_ptr())
        if turn % 2:
            tensor.fill_(-5)
        del tensor
        assert pair.receiver.drain_released() == [handle]
        pair.arena.free(handle)
    if pair.kind == "memfd":
        assert len(addresses) == 1


def test_views_outlive_their_segments_and_attachments(pair: Pair) -> None:
    handle = pair.publish(floats(1))
    tensor = tensor_of(pair.receiver.view(handle))
    other = tensor_of(pair.receiver.view(handle))
    pair.close()
    assert torch.equal(tensor, torch.from_numpy(floats(1)))
    tensor.mul_(2)
    del other
    assert pair.receiver.drain_released() == [], "after close nobody is told"
    pair.receiver = Attachments()
    gc.collect()
    assert torch.equal(tensor, torch.from_numpy(floats(1)) * 2)


def test_a_bogus_handle_is_refused_before_memory_is_touched(pair: Pair) -> None:
    handle = pair.publish(floats(1))
    for bogus in (
        BlockHandle(ARENA + 1, 0, 0, 1, 1),
        BlockHandle(ARENA, 9, 0, 1, 1),
        BlockHandle(ARENA, 0, 0, 1 << 40, 1),
        BlockHandle(ARENA, 0, 1 << 40, 1, 1),
        BlockHandle(ARENA, 0, 8, 1, 1),
    ):
        with pytest.raises(InvalidHandle):
            pair.receiver.view(bogus)
    assert pair.receiver.live_views() == 0
    pair.receiver.view(handle)


def test_an_unknown_segment_is_asked_for_once_within_a_deadline(pair: Pair) -> None:
    handle = pair.publish(floats(1))
    asked: list[float] = []

    def on_missing(missing: BlockHandle, deadline: float) -> None:
        asked.append(deadline)
        if missing == handle:
            late.add(ARENA, 0, attached_again(segment))

    segment = create_segment(pair.kind, 1 << 20, name_prefix="legion-test-")
    late = Attachments(on_missing=on_missing, missing_wait_s=4.0)
    late.view(handle)
    late.view(handle)
    assert len(asked) == 1
    with pytest.raises(InvalidHandle, match="not attached"):
        late.view(BlockHandle(ARENA, 1, 0, 1, 1))
    assert len(asked) == 2
    late.close()
    segment.close()


@needs.linux
def test_a_segment_is_added_once_and_dropped_by_arena_or_by_id(memfd: Pair) -> None:
    attachments = Attachments()
    segments = [create_segment("memfd", PAGE, name_prefix="legion-test-") for _ in range(4)]
    for arena, number, segment in zip((1, 1, 1, 2), (0, 1, 2, 0), segments, strict=True):
        attachments.add(arena, number, segment)
    with pytest.raises(InvalidHandle, match="already"):
        attachments.add(1, 0, segments[0])
    attachments.drop(1, 1)
    assert [attachments.knows(1, n) for n in range(3)] == [True, False, True]
    attachments.drop(1)
    attachments.drop(1)
    assert not attachments.knows(1, 0)
    assert attachments.knows(2, 0)
    attachments.close()
    for segment in segments:
        with pytest.raises(InvalidHandle, match="closed"):
            _ = segment.descriptor


# --- find ---------------------------------------------------------------------------------------------


@needs.linux
def test_a_clean_view_and_any_part_of_it_is_found(pair: Pair) -> None:
    handles = [pair.publish(floats(n)) for n in range(5)]
    tensors = [tensor_of(pair.receiver.view(handle)) for handle in handles]
    for handle, tensor in zip(handles, tensors, strict=True):
        assert pair.receiver.find(tensor.data_ptr(), tensor.nbytes) == (handle, 0)
        part = tensor[7:100]
        assert pair.receiver.find(part.data_ptr(), part.nbytes) == (handle, 28)


def test_memory_that_is_no_view_is_not_found(pair: Pair) -> None:
    assert pair.receiver.find(0x1000, 8) is None
    tensor = tensor_of(pair.receiver.view(pair.publish(floats(1))))
    private = torch.zeros(8)
    assert pair.receiver.find(private.data_ptr(), 32) is None
    assert pair.receiver.find(tensor.data_ptr() - 4, 8) is None
    assert pair.receiver.find(tensor.data_ptr(), tensor.nbytes + 1) is None
    assert pair.receiver.find(tensor.data_ptr(), 0) is None


@needs.linux
@pytest.mark.parametrize(
    "write",
    [
        lambda tensor: tensor[9000:9001].fill_(0),
        lambda tensor: np.copyto(tensor.numpy()[9000:9001], 0),
        lambda tensor: tensor.detach().numpy().__setitem__(9000, 0),
        lambda tensor: torch.add(tensor, 1, out=tensor),
    ],
    ids=["torch", "numpy", "detached_numpy", "out"],
)
def test_a_written_view_is_no_longer_found(pair: Pair, write: Any) -> None:
    handle = pair.publish(floats(1))
    tensor = tensor_of(pair.receiver.view(handle))
    untouched = tensor_of(pair.receiver.view(handle))
    write(tensor)
    assert pair.receiver.find(tensor.data_ptr(), tensor.nbytes) is None
    assert pair.receiver.find(untouched.data_ptr(), untouched.nbytes) == (handle, 0)


@needs.linux
def test_the_unwritten_part_of_a_written_view_is_still_found(pair: Pair) -> None:
    handle = pair.publish(floats(1))
    tensor = tensor_of(pair.receiver.view(handle))
    tensor[0] = 5
    tail = tensor[PAGE:]
    assert pair.receiver.find(tail.data_ptr(), tail.nbytes) == (handle, 4 * PAGE)


def test_where_writes_cannot_be_seen_nothing_is_found(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = tensor_of(pair.receiver.view(pair.publish(floats(1))))

    def refused(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refused)
    assert pair.receiver.find(tensor.data_ptr(), tensor.nbytes) is None


def test_a_dead_view_is_not_found_even_before_it_is_drained(pair: Pair) -> None:
    handle = pair.publish(floats(1))
    tensor = tensor_of(pair.receiver.view(handle))
    address, nbytes = tensor.data_ptr(), tensor.nbytes
    del tensor
    assert pair.receiver.find(address, nbytes) is None
    assert pair.receiver.drain_released() == [handle]


@needs.linux
def test_many_views_come_and_go_in_any_order(memfd: Pair) -> None:
    handles = [memfd.publish(floats(n, 1000)) for n in range(60)]
    tensors = {n: tensor_of(memfd.receiver.view(handle)) for n, handle in enumerate(handles)}
    gone: list[BlockHandle] = []
    for n in sorted(tensors, key=lambda n: n * 37 % 61):
        del tensors[n]
        gone.append(handles[n])
        assert all(memfd.receiver.find(t.data_ptr(), t.nbytes) == (handles[k], 0) for k, t in tensors.items())
    assert memfd.receiver.drain_released() == gone
    assert memfd.receiver.live_views() == 0


# --- the owner's own tensors --------------------------------------------------------------------------


def adopted(pair: Pair, gone: list[BlockHandle]) -> tuple[Block, torch.Tensor]:
    block = pair.arena.reserve(4 * PAGE)
    return block, tensor_of(pair.own.adopt_owned(block.handle, block.address, gone.append))


@needs.linux
def test_an_adopted_block_is_found_until_written_after_isolation(memfd: Pair) -> None:
    gone: list[BlockHandle] = []
    block, tensor = adopted(memfd, gone)
    tensor.fill_(1)
    assert memfd.own.find(tensor.data_ptr(), tensor.nbytes) == (block.handle, 0)
    received = tensor_of(memfd.receiver.view(block.handle))
    assert memfd.arena.isolate(block.handle)
    assert memfd.own.find(tensor.data_ptr(), tensor.nbytes) == (block.handle, 0)
    tensor[0] = 2
    assert memfd.own.find(tensor.data_ptr(), tensor.nbytes) is None
    assert received[0] == 1
    memfd.arena.rejoin(block.handle)
    assert tensor[0] == 1
    assert memfd.own.find(tensor.data_ptr(), tensor.nbytes) == (block.handle, 0)


def test_an_adopted_block_is_given_back_by_drain_and_not_by_the_finalizer(pair: Pair) -> None:
    gone: list[BlockHandle] = []
    block, tensor = adopted(pair, gone)
    view = tensor.numpy()
    del tensor
    assert pair.own.drain_released() == []
    del view
    gc.collect()
    assert gone == []
    assert pair.own.live_views() == 0
    assert gone == []
    assert pair.own.drain_released() == []
    assert gone == [block.handle]


def test_an_adopted_block_is_not_found_where_it_cannot_be_isolated() -> None:
    pair = Pair("portable")
    _, tensor = adopted(pair, [])
    assert pair.own.find(tensor.data_ptr(), tensor.nbytes) is None
    pair.close()


def test_an_adopted_tensor_outlives_arena_and_attachments(pair: Pair) -> None:
    gone: list[BlockHandle] = []
    block, tensor = adopted(pair, gone)
    tensor.fill_(3)
    del block
    pair.close()
    pair.own.find(tensor.data_ptr(), tensor.nbytes)
    tensor.add_(1)
    assert tensor.sum() == 4 * tensor.numel()


def test_a_block_is_adopted_once_and_only_where_it_is(pair: Pair) -> None:
    block, tensor = adopted(pair, [])
    with pytest.raises(InvalidHandle, match="in use"):
        pair.own.adopt_owned(block.handle, block.address, lambda _: None)
    with pytest.raises(InvalidHandle, match="not at address"):
        pair.own.adopt_owned(block.handle, block.address + PAGE, lambda _: None)
    assert pair.own.live_views() == 1
    del tensor


# --- threads and forks --------------------------------------------------------------------------------


@needs.linux
def test_many_threads_view_write_find_and_release(memfd: Pair) -> None:
    handles = [memfd.publish(floats(n, 3000)) for n in range(6)]
    expected = [torch.from_numpy(floats(n, 3000)) for n in range(6)]
    released: list[BlockHandle] = []
    lock = threading.Lock()

    def work(seed: int) -> int:
        wrong = 0
        for turn in range(80):
            n = (seed * 31 + turn) % 6
            tensor = tensor_of(memfd.receiver.view(handles[n]))
            wrong += not torch.equal(tensor, expected[n])
            wrong += memfd.receiver.find(tensor.data_ptr(), tensor.nbytes) != (handles[n], 0)
            if turn % 3 == 0:
                tensor.fill_(seed)
                wrong += memfd.receiver.find(tensor.data_ptr(), tensor.nbytes) is not None
                wrong += bool((tensor != seed).any())
            del tensor
            if turn % 5 == 0:
                drained = memfd.receiver.drain_released()
                with lock:
                    released.extend(drained)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0
    released.extend(memfd.receiver.drain_released())
    assert len(released) == 8 * 80
    assert memfd.receiver.live_views() == 0


@needs.fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_reads_its_views_but_cannot_use_the_attachments(memfd: Pair) -> None:
    handle = memfd.publish(floats(1))
    array = memfd.receiver.view(handle)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            bytes(array)
            memfd.receiver.find(ctypes.addressof(array), 1)
        except ForkedError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    array[0] = 1
