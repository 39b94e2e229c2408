from __future__ import annotations

import re
import select
import signal
import socket
import threading
from collections.abc import Sequence

import pytest

from legion_shm.errors import BenchmarkError, ContentsDiffer
from legion_shm.native_bench.machine import gpu_reason
from legion_shm.native_bench.measure import (
    close_cases,
    exchange_once,
    measure_size,
    open_cases,
    order_for,
    prove_check,
)
from legion_shm.native_bench.payload import Order, Use, expected_use, make, problem_of, use, use_by_torch
from legion_shm.native_bench.peers import all_peers, base
from legion_shm.native_bench.peers.base import Peer, Responder, Seen, Session
from legion_shm.native_bench.peers.child import blocked_interrupts
from legion_shm.native_bench.run import choose_peers
from legion_shm.native_bench.schedule import Size
from tests import needs
from tests.system.support import REPO, run_script

IMAGE = (1, 64, 64, 3)
LOCAL = ("pipe", "zeromq", "pickle5-zeromq", "safetensors", "npy", "png")
NOT_EVERYWHERE = ("shared-memory", "process-vm-readv")


def no_note(what: str, why: str) -> None:
    raise AssertionError(f"{what}: {why}")


def carry(names: Sequence[str]) -> None:
    """Two good exchanges of each way, and a spoiled one that must be noticed."""
    peers = choose_peers(names)
    cases = open_cases(peers, 1 << 20, no_note, lambda text: None)
    try:
        assert len(cases) == len(peers) > 0
        for case in cases:
            how: Use = "touch" if case.peer.uses("touch") else "none"
            for number in range(2):
                shape = (1024,) if not case.peer.unfit((1024,)) else IMAGE
                taken = exchange_once(case, order_for(case.peer, shape, how, number))
                assert 0 < taken.one_way_us < taken.round_trip_us
            prove_check(case, IMAGE)
    finally:
        close_cases(cases)


def test_every_way_carries_a_tensor_there_and_back_and_finds_a_spoiled_answer() -> None:
    some = [peer.name for peer in choose_peers(NOT_EVERYWHERE) if not peer.missing()]
    assert needs.WINDOWS or "shared-memory" in some
    ours = [peer.name for peer in choose_peers(["ours"]) if not peer.missing()]
    assert len(ours) >= (5 if needs.WINDOWS else 6), "without descriptors legion-transport is not there"
    carry([*LOCAL, *some, *ours])


@pytest.mark.skipif(needs.WINDOWS, reason="Windows has no signal for one thread")
@pytest.mark.parametrize("by_another_thread", [False, True])
def test_ctrl_c_while_a_process_starts_counts_once_it_has_started(by_another_thread: bool) -> None:
    """Half started, a child would print a traceback. Any thread may be the one that takes the signal."""
    idle = threading.Event()
    other = threading.Thread(target=idle.wait)
    other.start()
    taker = (other if by_another_thread else threading.main_thread()).ident
    assert taker is not None
    started = False
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno())

    def start() -> None:
        nonlocal started
        with blocked_interrupts():
            signal.pthread_kill(taker, signal.SIGINT)
            if not by_another_thread:
                assert signal.SIGINT in signal.sigpending()
            else:
                assert select.select([heard], [], [], 20)[0], "the other thread did not take the signal"
            started = True

    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert started
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.set_wakeup_fd(before)
        heard.close()
        told.close()
        idle.set()
        other.join()


needs_gpu = pytest.mark.skipif(bool(gpu_reason()), reason="needs a CUDA device that torch can use")


@needs_gpu
def test_every_way_for_tensors_of_a_gpu_does_so_there() -> None:
    on_gpu = [peer.name for peer in all_peers() if peer.device == "cuda"]
    assert len(on_gpu) == 3
    code = "from tests.bench.test_peers import carry\n"
    code += f"if __name__ == '__main__': carry({on_gpu})"
    done = run_script("-c", code, cwd=REPO, within_s=120)
    assert done.returncode == 0, done.stderr


def test_ways_for_a_gpu_say_why_they_are_not_measured_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "gpu_reason", lambda: "no CUDA device")
    assert {peer.missing() for peer in all_peers() if peer.device == "cuda"} == {"no CUDA device"}
    lacking = {peer.name for peer in choose_peers(["ours"]) if peer.device == "cpu" and peer.missing()}
    assert lacking == ({"legion-transport"} if needs.WINDOWS else set())


@pytest.mark.parametrize("how", ["touch", "read", "none"])
def test_torch_sums_on_a_device_what_numpy_sums_here(how: Use) -> None:
    for seed in (1, 2, 1 << 40):
        order = Order((1, 64, 80, 3), how, seed, seed)
        tensor = make(order)
        assert how == "none" or use_by_torch(tensor, how) == use(tensor, how) == expected_use(order)


def test_a_tensor_that_came_on_another_device_is_found_out() -> None:
    order = Order(IMAGE, "touch", 1, 1, device="cuda")
    here = make(Order(IMAGE, "touch", 1, 1))
    assert problem_of(here, order) == "expected a tensor on cuda, got one on cpu"


def test_torch_s_queues_do_so_too() -> None:
    # In a process of its own: torch keeps a manager process and a thread for as long as its user lives.
    names = ["torch-file-system", *(() if needs.WINDOWS else ("torch-file-descriptor",))]
    code = "from tests.bench.test_peers import carry\n"
    code += f"if __name__ == '__main__': carry({names})"
    done = run_script("-c", code, cwd=REPO)
    assert done.returncode == 0, done.stderr


def test_names_are_unique_and_every_way_says_its_settings() -> None:
    peers = all_peers()
    assert len({peer.name for peer in peers}) == len(peers)
    assert all(re.fullmatch(r"[a-z0-9-]+", peer.name) and len(peer.settings) > 20 for peer in peers)


def test_ours_stands_for_all_of_ours_and_unknown_names_are_refused() -> None:
    chosen = choose_peers(["ours", "pipe"])
    assert {peer.kind for peer in chosen if peer.name != "pipe"} == {"legion"}
    assert len(chosen) == 9
    with pytest.raises(BenchmarkError, match="telegraph"):
        choose_peers(["telegraph"])


class _Direct(Session):
    """Both ends in this process; ``fault`` is what goes wrong."""

    def __init__(self, fault: str = "") -> None:
        self._responder, self._fault = Responder(), fault

    def ready(self) -> None:
        pass

    def prepare(self, order: Order) -> None:
        self._responder.prepare(order)

    def exchange(self, tensor: object) -> object:
        if self._fault == "there":
            tensor = make(Order(IMAGE, "touch", 999, 999))
        reply = self._responder.take(tensor)
        return make(Order(IMAGE, "touch", 999, 999)) if self._fault == "back" else reply

    def finish(self) -> Seen:
        return self._responder.finish()

    def close(self) -> None:
        pass


class _DirectPeer(Peer):
    settings = "in this process"

    def __init__(self, name: str, fault: str = "", missing: str = "") -> None:
        self.name, self.title, self.fault, self._missing = name, name, fault, missing

    def missing(self) -> str:
        return self._missing

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        return _Direct(self.fault)


@pytest.mark.parametrize(("fault", "where"), [("there", "in the other process"), ("back", "here")])
def test_contents_that_differ_are_found_on_the_side_where_they_arrive(fault: str, where: str) -> None:
    (case,) = open_cases([_DirectPeer("direct", fault)], 1 << 20, no_note, lambda text: None)
    with pytest.raises(ContentsDiffer, match=where):
        exchange_once(case, order_for(case.peer, IMAGE, "touch", 1))


def test_a_way_that_fails_is_left_out_with_its_reason_and_the_others_go_on() -> None:
    notes: list[tuple[str, str]] = []
    peers: list[Peer] = [
        _DirectPeer("good"),
        _DirectPeer("bad", "back"),
        _DirectPeer("absent", missing="not here"),
    ]
    cases = open_cases(peers, 1 << 20, lambda *note: notes.append(note), lambda text: None)
    sampled = measure_size(
        cases, Size("48 KB", IMAGE, ""), "touch", rounds=6, budget_s=20,
        note=lambda *note: notes.append(note), show=lambda text: None,
    )  # fmt: skip
    assert {name: len(taken) for name, taken in sampled.taken.items()} == {"good": 6}
    assert [name for name, _ in notes] == ["absent", "bad"]


def test_time_that_is_up_ends_the_rounds_but_leaves_three() -> None:
    cases = open_cases([_DirectPeer("good")], 1 << 20, no_note, lambda text: None)
    sampled = measure_size(
        cases,
        Size("48 KB", IMAGE, ""),
        "touch",
        rounds=500,
        budget_s=1e-6,
        note=no_note,
        show=lambda text: None,
    )
    assert sampled.stopped
    assert len(sampled.taken["good"]) == 3
