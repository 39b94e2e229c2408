"""The driver's calls: errors in its own words, contexts left as they were, memory shared and proved."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from legion_shm.doctor import Report, _gpu_arena
from legion_shm.errors import ArenaFull, CudaError, InvalidHandle
from legion_shm.transport import cuda_driver as module
from legion_shm.transport.cuda_driver import HANDLE_BYTES, CudaDriver, cuda_driver, ipc_problem, plain_uuid
from legion_shm.transport.gpu_probe import probe
from legion_shm.transport.gpu_segment import PATTERN_BYTES, GpuSegment
from legion_shm.transport.handles import BLOCK_ALIGN
from tests.cuda.emulation import HIDDEN, UUID, EmulatedGpu, emulated_gpu, needs_compiler

pytestmark = needs_compiler

MIB = 1 << 20


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[EmulatedGpu]:
    with emulated_gpu(tmp_path) as gpu:
        yield gpu
        assert gpu.allocations == []


def test_a_failure_names_the_call_the_error_and_its_text(gpu: EmulatedGpu) -> None:
    device = cuda_driver().device(UUID)
    with pytest.raises(CudaError, match=r"^cuMemFree_v2: CUDA_ERROR_INVALID_VALUE: invalid argument \(1\)$"):
        device.free(1 << 20)
    gpu.fail("cuMemAlloc_v2 999")
    with pytest.raises(CudaError, match=r"^cuMemAlloc_v2: unknown error \(999\)$"):
        device.allocate(1)


def test_no_driver_is_an_error_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(module.DRIVER_VARIABLE, str(tmp_path / "libnone.so"))
    cuda_driver.cache_clear()
    for _ in range(2):
        with pytest.raises(CudaError, match="could not be loaded"):
            cuda_driver()


def test_a_library_that_lacks_a_call_is_no_driver() -> None:
    with pytest.raises(CudaError, match="cuInit"):
        CudaDriver("libc.so.6")


@pytest.mark.parametrize(
    ("system", "release", "words"),
    [
        ("win32", "10", "Linux alone"),
        ("darwin", "24", "Linux alone"),
        ("linux", "5.15.90.1-microsoft-standard-WSL2", "WSL"),
        ("linux", "6.18.0", ""),
    ],
)
def test_systems_whose_drivers_share_no_memory_are_not_asked(
    monkeypatch: pytest.MonkeyPatch, system: str, release: str, words: str
) -> None:
    monkeypatch.delenv(module.DRIVER_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "uname", lambda: type("Uname", (), {"release": release}))
    problem = ipc_problem()
    assert words in problem
    assert bool(problem) == bool(words)


def test_devices_are_found_by_uuid_however_it_is_written(gpu: EmulatedGpu) -> None:
    driver = cuda_driver()
    assert driver.version() == "12.4"
    for text in (UUID, UUID.upper(), f"GPU-{UUID}"):
        assert driver.device(text) is driver.device(UUID)
        assert plain_uuid(text) == UUID
    with pytest.raises(CudaError, match="no device"):
        driver.device("0" + UUID[1:])


def test_the_threads_current_context_stays_what_it_was(gpu: EmulatedGpu) -> None:
    library = ctypes.CDLL(str(gpu.library))
    seen: list[Any] = []

    def current() -> Any:
        context = ctypes.c_void_p()
        assert library.cuCtxGetCurrent(ctypes.byref(context)) == 0
        return context.value

    def work() -> None:
        device = cuda_driver().device(UUID)
        seen.append(current())
        address = device.allocate(4096)
        seen.append(current())
        device.write(address, b"abc")
        assert device.read(address, 3) == b"abc"
        with pytest.raises(CudaError):
            device.read(address + 4096, 1)
        device.free(address)
        seen.append(current())

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [None] * 6


def test_no_context_is_opened_to_ask_whether_there_is_one(tmp_path: Path) -> None:
    with emulated_gpu(tmp_path, used=False) as gpu:
        assert not cuda_driver().device(UUID).is_open
        with pytest.raises(ArenaFull, match="does not use GPU"):
            GpuSegment.create(UUID, MIB)
        assert gpu.contexts == []
        gpu.use()
        assert cuda_driver().device(UUID).is_open


def test_a_segment_has_room_for_all_that_was_asked_and_its_pattern_behind_it(gpu: EmulatedGpu) -> None:
    segment = GpuSegment.create(UUID, 2 * MIB)
    assert segment.nbytes == 4 * MIB - BLOCK_ALIGN
    assert GpuSegment.whole_bytes(segment.nbytes) == 4 * MIB
    device = cuda_driver().device(UUID)
    assert device.read(segment.shared_address() + segment.nbytes, PATTERN_BYTES) == segment.pattern
    assert len(segment.handle) == HANDLE_BYTES
    again = segment.again()
    segment.close()
    assert gpu.allocations, "who has it by another name keeps it"
    assert again.shared_address()
    again.close()
    assert gpu.allocations == []
    with pytest.raises(InvalidHandle, match="closed"):
        segment.shared_address()


def test_a_block_of_it_is_never_mapped_as_main_memory(gpu: EmulatedGpu) -> None:
    segment = GpuSegment.create(UUID, MIB)
    with pytest.raises(InvalidHandle, match="main memory"):
        segment.map_block(0, 4096)
    with pytest.raises(InvalidHandle):
        _ = segment.descriptor
    assert not segment.isolate(0, 4096)
    assert not segment.isolated_clean(0, 4096)
    segment.close()


@pytest.mark.parametrize("call", ["cuIpcGetMemHandle", "cuMemcpyHtoDAsync_v2", "cuStreamCreate"])
def test_what_could_not_be_shared_is_freed_at_once(gpu: EmulatedGpu, call: str) -> None:
    gpu.fail(f"{call} 801")
    with pytest.raises(ArenaFull, match=call) as caught:
        GpuSegment.create(UUID, MIB)
    assert gpu.allocations == [], "though somebody keeps the error"
    assert isinstance(caught.value.__cause__, CudaError)


def test_a_forked_child_gives_nothing_of_its_parents_back(gpu: EmulatedGpu) -> None:
    segment = GpuSegment.create(UUID, MIB)
    child = os.fork()
    if child == 0:
        segment.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert gpu.allocations
    segment.close()


def test_a_handle_of_another_length_is_not_given_to_the_driver(gpu: EmulatedGpu) -> None:
    with pytest.raises(CudaError, match="64 bytes"):
        GpuSegment.open(UUID, MIB, b"x" * 63, b"p" * PATTERN_BYTES)


def test_a_child_process_reads_and_writes_what_is_shared(gpu: EmulatedGpu) -> None:
    said = probe(UUID)
    assert "opened by another process" in said
    assert "12.4" in said


def test_doctor_tells_whether_a_devices_memory_can_be_shared(
    gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report()
    _gpu_arena(report, "GPU 0", UUID)
    gpu.fail("cuIpcOpenMemHandle_v2 corrupt")
    _gpu_arena(report, "GPU 1", UUID)
    gpu.fail("cuIpcGetMemHandle 801")
    _gpu_arena(report, "GPU 2", UUID)
    gpu.fail()
    monkeypatch.setenv(HIDDEN, "1")
    _gpu_arena(report, "GPU 3", UUID)
    assert [fact.name for fact in report.facts] == [f"GPU {number}, arena" for number in range(4)]
    assert [fact.level for fact in report.facts] == ["ok", "note", "note", "note"]
    texts = [fact.value for fact in report.facts]
    assert texts[0].startswith("yes")
    assert "its pattern is another" in texts[1]
    assert "CUDA_ERROR_NOT_SUPPORTED" in texts[2]
    assert "no device" in texts[3]
    assert report.usable
