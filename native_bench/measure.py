"""One exchange, and many of them in turns: the timed window and the checks around it.

Owns the clock. Garbage is collected between rounds, not within (in this process; the others are what they
are). A way that fails, or whose contents differ, is left out from then on with its reason; the others go on.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field

from legion_shm.errors import ContentsDiffer, LegionError, PeerFailed
from legion_shm.native_bench import payload
from legion_shm.native_bench.payload import Order, Use
from legion_shm.native_bench.peers.base import Peer, Session
from legion_shm.native_bench.schedule import Size, strides, turns

__all__ = ["Case", "Sampled", "Taken", "exchange_once", "measure_size", "open_cases", "prove_check"]

_WARM_UP = 3
_SEED = 4


@dataclass
class Case:
    """A way that is open, and why it was given up, if it was."""

    peer: Peer
    session: Session
    failed: str = ""


@dataclass(frozen=True)
class Taken:
    """One exchange, in microseconds."""

    round_trip_us: float
    one_way_us: float
    hops: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass
class Sampled:
    """All exchanges of one size and use, by way; ``stopped``: the time was up before the rounds."""

    taken: dict[str, list[Taken]] = field(default_factory=dict[str, list[Taken]])
    rounds: int = 0
    stopped: bool = False


def open_cases(
    peers: list[Peer], most_bytes: int, note: Callable[[str, str], None], show: Callable[[str], None]
) -> list[Case]:
    """Open what can be opened; the other processes start side by side. ``note(name, why)``: what can't."""
    opened: list[Case] = []
    try:
        for peer in peers:
            show(f"starting {peer.name}")
            reason = peer.missing()
            if reason:
                note(peer.name, reason)
                continue
            try:
                opened.append(Case(peer, peer.open(most_bytes)))
            except (LegionError, OSError, ImportError, RuntimeError) as error:
                note(peer.name, f"could not be opened: {_first_lines(error)}")
        ready: list[Case] = []
        for case in opened:
            show(f"waiting for {case.peer.name}")
            try:
                case.session.ready()
                ready.append(case)
            except (LegionError, OSError, ImportError, RuntimeError) as error:
                note(case.peer.name, f"did not start: {_first_lines(error)}")
                case.session.close()
        return ready
    except BaseException:
        close_cases(opened)
        raise


def close_cases(cases: list[Case]) -> None:
    """Close all, whatever happens to one of them; the first trouble is raised at the end."""
    with contextlib.ExitStack() as stack:
        for case in cases:
            stack.callback(case.session.close)
        for case in cases:
            case.session.retire()


def exchange_once(case: Case, order: Order) -> Taken:
    """One checked exchange. Raises ContentsDiffer, PeerFailed."""
    session = case.session
    session.prepare(order)
    tensor = session.make(order)
    started_ns = time.monotonic_ns()
    reply = session.exchange(tensor)
    got = payload.use(reply, order.use)
    ended_ns = time.monotonic_ns()
    hops = session.hops()
    expected = payload.expected_use(order, reply=True)
    problem = payload.problem_of(reply, order, reply=True)
    if not problem and expected is not None and got != expected:
        problem = "the contents changed between their use and the check"
    del reply, tensor
    seen = session.finish()
    if problem or seen.problem:
        where = "here" if problem else "in the other process"
        raise ContentsDiffer(f"{case.peer.name}, {order.nbytes} bytes, {where}: {problem or seen.problem}")
    return Taken((ended_ns - started_ns) / 1000, (seen.used_ns - started_ns) / 1000, hops)


def order_for(peer: Peer, shape: tuple[int, ...], how: Use, number: int, *, corrupt: bool = False) -> Order:
    seed = 2 * number + 1
    reply_seed = seed if peer.echoes else seed + 1
    return Order(shape, how, seed, reply_seed, peer.content, corrupt, peer.device)


def prove_check(case: Case, shape: tuple[int, ...]) -> None:
    """The answer with one wrong byte must be found out. Raises ContentsDiffer where it is not."""
    how: Use = "touch" if case.peer.uses("touch") else "none"
    try:
        exchange_once(case, order_for(case.peer, shape, how, 999_983, corrupt=True))
    except ContentsDiffer:
        return
    raise ContentsDiffer(f"{case.peer.name}: a changed byte was not noticed; its checks prove nothing")


def measure_size(
    cases: list[Case],
    size: Size,
    how: Use,
    *,
    rounds: int,
    budget_s: float,
    note: Callable[[str, str], None],
    show: Callable[[str], None],
) -> Sampled:
    """Rounds over all cases, the first few not counted. ``budget_s``: no new round begins after that."""
    sampled = Sampled({case.peer.name: [] for case in cases})
    costs: dict[str, list[float]] = defaultdict(list)
    counter = iter(range(1, 1 << 30))

    def turn(case: Case, *, count: bool) -> None:
        begun_s = time.monotonic()
        try:
            taken = exchange_once(case, order_for(case.peer, size.shape, how, next(counter)))
        except (ContentsDiffer, PeerFailed, MemoryError) as error:
            case.failed = _first_lines(error)
            sampled.taken.pop(case.peer.name, None)
            note(case.peer.name, f"{size.label}, {how}: {case.failed}")
            return
        costs[case.peer.name].append(time.monotonic() - begun_s)
        if count:
            sampled.taken[case.peer.name].append(taken)

    started_s = time.monotonic()
    names = [case.peer.name for case in cases]
    by_name = {case.peer.name: case for case in cases}
    with _no_collection():
        for number in range(_WARM_UP):
            show(f"{size.label}, {how}: warm-up {number + 1} of {_WARM_UP}")
            for case in cases:
                if not case.failed and (number == 0 or costs[case.peer.name][0] < budget_s / 20):
                    turn(case, count=False)
            gc.collect()
        every = strides(_middle(costs))
        for number, present in enumerate(turns(names, every, rounds, _SEED)):
            if number >= 3 and time.monotonic() - started_s > budget_s:
                sampled.stopped = True
                break
            show(f"{size.label}, {how}: round {number + 1} of {rounds}")
            for name in present:
                if not by_name[name].failed:
                    turn(by_name[name], count=True)
            gc.collect(0)
            sampled.rounds = number + 1
    return sampled


def _middle(costs: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: sorted(times)[len(times) // 2] for name, times in costs.items() if times}


@contextlib.contextmanager
def _no_collection() -> Generator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _first_lines(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    lines = text.splitlines()
    return text if len(lines) <= 2 else f"{lines[0]} ... {lines[-1]}"
