from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from legion_shm.helper_threads import HelperThreads
from legion_shm.transport import copying
from legion_shm.transport.born_build import library_path
from legion_shm.transport.copying import SPLIT_MIN_BYTES, Chooser, copy_memory, use_library
from tests import needs

LIBRARY, _WHY_NOT = library_path()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"there is no native code here: {_WHY_NOT}")


@pytest.fixture(autouse=True)
def nothing_known_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that was told of no library."""
    monkeypatch.setattr(copying, "_choosers", {})
    monkeypatch.setattr(copying, "_native", None)


@pytest.fixture(params=["Python's helper", pytest.param("native code", marks=needs_library)])
def either_way(request: pytest.FixtureRequest) -> str:
    if request.param == "native code":
        assert use_library(str(LIBRARY))
    return str(request.param)


def buffers(nbytes: int) -> tuple[ctypes.Array[ctypes.c_ubyte], bytes]:
    content = (os.urandom(4096) * (nbytes // 4096 + 1))[:nbytes]
    return (ctypes.c_ubyte * (nbytes + 64))(), content


def copied(nbytes: int, shift: int = 0) -> bool:
    target, content = buffers(nbytes)
    source = ctypes.create_string_buffer(content, nbytes)
    copy_memory(ctypes.addressof(target) + shift, ctypes.addressof(source), nbytes)
    return bytes(target) == bytes(shift) + content + bytes(64 - shift)


@pytest.mark.parametrize("shift", [0, 1, 63])
@pytest.mark.parametrize(
    "nbytes", [0, 1, 4097, SPLIT_MIN_BYTES - 1, SPLIT_MIN_BYTES, 5 * SPLIT_MIN_BYTES + 7]
)
def test_every_byte_arrives_and_none_beside(either_way: str, nbytes: int, shift: int) -> None:
    assert copied(nbytes, shift)


def test_a_large_copy_is_shared_with_the_helper_and_a_small_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares: list[int] = []
    real = copying._Helper.start

    def start(self: copying._Helper, dst: int, src: int, nbytes: int) -> Future[object] | None:
        assert dst % 4096 == 0
        shares.append(nbytes)
        return real(self, dst, src, nbytes)

    monkeypatch.setattr(copying._Helper, "start", start)
    assert copied(SPLIT_MIN_BYTES - 1)
    assert shares == []
    assert copied(4 * SPLIT_MIN_BYTES)
    assert len(shares) == 1
    assert abs(shares[0] - 2 * SPLIT_MIN_BYTES) <= 4096


def test_without_a_helper_the_caller_copies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = copying._Helper()
    alone._cpus = 1
    monkeypatch.setattr(copying, "_helper", alone)
    assert copied(4 * SPLIT_MIN_BYTES)
    assert alone._pool is None

    ended = copying._Helper()
    ended._cpus = 2
    ended._pool = HelperThreads(1)
    ended._pool.shutdown()
    monkeypatch.setattr(copying, "_helper", ended)
    assert copied(4 * SPLIT_MIN_BYTES)
    assert copied(4 * SPLIT_MIN_BYTES)


def test_many_threads_copy_at_once(either_way: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(copied, [2 * SPLIT_MIN_BYTES + n for n in range(24)]))


def test_an_interrupt_waits_for_the_helpers_half(monkeypatch: pytest.MonkeyPatch) -> None:
    helper = copying._Helper()
    helper._cpus = 2
    monkeypatch.setattr(copying, "_helper", helper)
    copying_: Future[object] = Future()
    helper._free.acquire()
    interrupts = iter([KeyboardInterrupt(), None])

    def exception(timeout: float | None = None) -> BaseException | None:
        interrupt = next(interrupts)
        if interrupt is not None:
            raise interrupt
        copying_.set_result(None)
        return None

    monkeypatch.setattr(copying_, "exception", exception)
    with pytest.raises(KeyboardInterrupt):
        helper.finish(copying_)
    assert copying_.done()
    assert not helper._free.locked()


@needs.fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_copies_with_a_helper_of_its_own(either_way: str) -> None:
    assert copied(2 * SPLIT_MIN_BYTES)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if copied(2 * SPLIT_MIN_BYTES) else 1
            if either_way == "native code" and len(os.listdir("/proc/self/task")) != 2:
                code = 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _chosen(chooser: Chooser, seconds_of: dict[bool, float], copies: int) -> list[bool]:
    chosen: list[bool] = []
    for _ in range(copies):
        two = chooser.special()
        chooser.took(two, 1000, seconds_of[two])
        chosen.append(two)
    return chosen


def test_the_faster_way_to_copy_is_taken_and_the_other_is_tried_again_now_and_then() -> None:
    chosen = _chosen(Chooser(every=24), {False: 1.0, True: 2.0}, 10 + 240)
    assert set(chosen[:10]) == {True, False}
    assert chosen[10:].count(True) == 10


def test_what_costs_others_something_is_chosen_only_where_it_gains_enough() -> None:
    chooser = Chooser(every=1000, at_most=0.85)
    assert not any(_chosen(chooser, {False: 1.0, True: 0.9}, 40)[10:])
    assert _chosen(chooser, {False: 1.2, True: 0.9}, 2000)[-1]


@needs_library
def test_streaming_has_to_gain_and_a_second_thread_has_not() -> None:
    assert copied(SPLIT_MIN_BYTES)
    assert [each._at_most for each in copying._choosers.values()] == [1.0]
    assert use_library(str(LIBRARY))
    assert copying._choosers == {}, "what Python's helper took says nothing of native code"
    assert copied(SPLIT_MIN_BYTES)
    assert [each._at_most for each in copying._choosers.values()] == [copying._STREAMED_AT_MOST]
    assert copying._chooser_of((64 << 20) - 1)._at_most == copying._STREAMED_AT_MOST
    assert copying._chooser_of(64 << 20)._at_most == 1.0, "more than caches hold"


def test_each_size_has_a_choice_of_its_own() -> None:
    for nbytes in (SPLIT_MIN_BYTES, 4 * SPLIT_MIN_BYTES, 4 * SPLIT_MIN_BYTES + 1):
        assert copied(nbytes)
    assert len(copying._choosers) == 2


def test_when_two_threads_become_the_faster_way_copies_are_shared_again() -> None:
    chooser = Chooser(every=8)
    _chosen(chooser, {False: 1.0, True: 2.0}, 40)
    later = _chosen(chooser, {False: 1.0, True: 0.5}, 100)
    assert later[-40:].count(True) > 30


def test_a_copy_that_found_no_thread_is_not_done_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was done alone by then, and its memory may be another's."""
    helper = copying._Helper()
    helper._cpus = 2
    source, target = ctypes.create_string_buffer(b"stale", 8), ctypes.create_string_buffer(8)

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert helper.start(ctypes.addressof(target), ctypes.addressof(source), 8) is None
    other = ctypes.create_string_buffer(8)
    copying_ = helper.start(ctypes.addressof(other), ctypes.addressof(source), 8)
    assert copying_ is not None
    helper.finish(copying_)
    assert other.value == b"stale"
    assert target.value == b""


# --- native code ---------------------------------------------------------------------------------------


@needs_library
def test_native_code_makes_the_large_copies_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_library(str(LIBRARY))
    sizes: list[int] = []
    real = copying._native
    assert real is not None

    def native(dst: int, src: int, nbytes: int, streamed: bool) -> None:
        sizes.append(nbytes)
        real(dst, src, nbytes, streamed)

    monkeypatch.setattr(copying, "_native", native)
    assert copied(SPLIT_MIN_BYTES - 1)
    assert copied(3 * SPLIT_MIN_BYTES)
    assert sizes == [3 * SPLIT_MIN_BYTES]


@needs_library
@pytest.mark.parametrize("nbytes", [0, 1, 130, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, (5 << 18) + 3])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("streamed", [0, 1])
@pytest.mark.parametrize("shifts", [(0, 0), (1, 0), (0, 7), (63, 63)])
def test_native_code_copies_any_size_and_says_whether_it_had_the_helper(
    nbytes: int, shared: int, streamed: int, shifts: tuple[int, int]
) -> None:
    library = ctypes.CDLL(str(LIBRARY))
    to, since = shifts
    target, content = buffers(nbytes)
    source = ctypes.create_string_buffer(bytes(since) + content, since + nbytes + 1)
    addresses = (
        ctypes.c_void_p(ctypes.addressof(target) + to),
        ctypes.c_void_p(ctypes.addressof(source) + since),
    )
    assert library.legion_copy(*addresses, ctypes.c_size_t(nbytes), shared, streamed) == shared
    assert bytes(target) == bytes(to) + content + bytes(64 - to)


@needs_library
def test_who_finds_the_native_helper_busy_copies_alone() -> None:
    library = ctypes.CDLL(str(LIBRARY))
    nbytes = 64 << 20

    def work(number: int) -> set[int]:
        source, target = (ctypes.create_string_buffer(nbytes) for _ in range(2))
        ctypes.memset(source, number, nbytes)
        helped: set[int] = set()
        for _ in range(4):
            ctypes.memset(target, 0, nbytes)
            helped.add(library.legion_copy(target, source, ctypes.c_size_t(nbytes), 1, number % 2))
            assert ctypes.string_at(target, nbytes) == bytes([number]) * nbytes
        return helped

    with ThreadPoolExecutor(3) as pool:
        assert set().union(*pool.map(work, (1, 2, 3))) == {0, 1}


@needs_library
def test_a_program_of_one_processor_does_not_ask_for_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_cpus", lambda: 1)
    asked: list[int] = []

    class Library:
        @staticmethod
        def legion_copy(dst: int, src: int, nbytes: int, shared: int, streamed: int) -> int:
            asked.append(shared)
            ctypes.memmove(dst, src, nbytes)
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda path: Library)
    assert use_library("some.so")
    assert copied(SPLIT_MIN_BYTES)
    assert asked == [0]


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_a_library_that_can_not_be_loaded_changes_nothing(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "some.so"
    if content is not None:
        path.write_bytes(content)
    assert not use_library(str(path))
    assert copying._native is None
    assert copied(2 * SPLIT_MIN_BYTES)
