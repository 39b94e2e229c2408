"""One run from options to `Result`: opens the ways, takes turns, measures the limits, closes everything.

Owns the order of the parts and what is said about parts that are left out. Whatever interrupts it, the other
processes, segments and files of every way are gone when it returns.

    limits ─▶ ways opened ─▶ checks proved ─▶ sizes × uses, in turns ─▶ control ... ─▶ limits again ─▶ Result
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from legion_shm import __version__
from legion_shm.comfy_location import find_comfyui
from legion_shm.errors import BenchmarkError, ConfigError, ContentsDiffer, LegionError, PeerFailed
from legion_shm.native_bench.cuda_limits import measure_cuda_limits
from legion_shm.native_bench.goals import check_goals
from legion_shm.native_bench.limits import Limits, measure_limits, with_limits
from legion_shm.native_bench.machine import describe_machine, describe_packages, gpu_reason
from legion_shm.native_bench.measure import (
    Case,
    Sampled,
    Taken,
    close_cases,
    measure_size,
    open_cases,
    prove_check,
)
from legion_shm.native_bench.model import CaseInfo, Missing, Result, Row
from legion_shm.native_bench.payload import Use
from legion_shm.native_bench.peers import all_peers
from legion_shm.native_bench.peers.base import Peer
from legion_shm.native_bench.schedule import QUICK_SIZES, SIZES, Size, parse_sizes, rounds_for
from legion_shm.native_bench.summary import summarize
from legion_shm.native_bench.whole_path import OTHER

__all__ = ["Options", "choose_peers", "run"]

_MEMORY_SHARE = 12
"""A size is measured where so many tensors of it fit into the available memory."""

_QUICK_BUDGET_S = 3.0
_FULL_BUDGET_S = 60.0
_PROOF_SHAPE = (1, 64, 64, 3)
_PROOF_BYTES = 4 * 64 * 64 * 3


def _nothing(text: str) -> None:
    del text


@dataclass(frozen=True)
class Options:
    """What to measure. ``sizes``, ``peers``: None for all; ``rounds``: None for a number by size."""

    quick: bool = False
    sizes: str | None = None
    peers: Sequence[str] | None = None
    rounds: int | None = None
    comfyui: str | None = None
    comfyui_python: str | None = None
    show: Callable[[str], None] = field(default=_nothing, repr=False)


def choose_peers(names: Sequence[str] | None) -> list[Peer]:
    """The ways of these names (``legion`` alone stands for all of ours too). Raises BenchmarkError."""
    peers = all_peers()
    if names is None:
        return peers
    known = {peer.name for peer in peers}
    unknown = [name for name in names if name not in known and name != "ours"]
    if unknown:
        raise BenchmarkError(f"no way is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [peer for peer in peers if peer.name in names or ("ours" in names and peer.kind == "legion")]


def run(options: Options) -> Result:
    """Measure. Raises BenchmarkError where the options make no sense; later failures are in the result."""
    started_s = time.monotonic()
    wanted = options.sizes or (",".join(QUICK_SIZES) if options.quick else ",".join(s.label for s in SIZES))
    sizes = parse_sizes(wanted)
    peers = choose_peers(options.peers)
    if options.comfyui_python is not None and options.comfyui is None:
        raise BenchmarkError("--comfyui-python says what runs a ComfyUI: give --comfyui PATH as well")
    if options.comfyui is not None:
        try:
            find_comfyui(options.comfyui, os.environ)
        except ConfigError as error:
            raise BenchmarkError(str(error)) from error
    missing: list[Missing] = []

    def note(what: str, why: str) -> None:
        missing.append(Missing(what=what, why=why))

    machine = describe_machine()
    date = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    fitting = [size for size in sizes if _fits(size, note)]
    limits = Limits()
    reason = measure_limits(fitting, quick=options.quick, limits=limits, show=options.show)
    if reason:
        note("physical limits, and ratios to them", reason)
    limits.add(measure_cuda_limits(fitting, rounds=10 if options.quick else 30))
    rows: list[Row] = []
    cases: list[Case] = []
    proved: set[str] = set()
    with contextlib.ExitStack() as stack:
        cases = open_cases(peers, max([_PROOF_BYTES, *(size.nbytes for size in fitting)]), note, options.show)
        stack.callback(close_cases, cases)
        for case in cases:
            options.show(f"proving the checks of {case.peer.name}")
            try:
                prove_check(case, _PROOF_SHAPE)
                proved.add(case.peer.name)
            except (ContentsDiffer, PeerFailed) as error:
                case.failed = str(error)
                note(case.peer.name, str(error))
        for size in fitting:
            on_cpu = [case for case in cases if case.peer.device == "cpu"]
            for how in _uses(size, quick=options.quick):
                rows += _transfer_rows(_measure(on_cpu, size, how, options, note), size, how)
            on_gpu = [case for case in cases if case.peer.device == "cuda"]
            if on_gpu:
                rows += _transfer_rows(_measure(on_gpu, size, "read", options, note), size, "cuda")
    if options.peers is None or "ours" in options.peers or "legion" in options.peers:
        rows += _ours(options, note)
    if not reason:
        measure_limits(fitting, quick=options.quick, limits=limits, show=options.show)
    rows += limits.rows(fitting)
    rows = with_limits(rows)
    for what in _unmeasured(options):
        note(*what)
    return Result(
        version=__version__,
        date=date,
        quick=options.quick,
        duration_s=round(time.monotonic() - started_s, 1),
        settings=_settings(options, fitting),
        machine=machine,
        packages=describe_packages(peer.package for peer in peers if peer.package),
        cases=tuple(_info(case.peer, case.peer.name in proved) for case in cases),
        rows=tuple(rows),
        goals=check_goals(rows),
        not_measured=tuple(dict.fromkeys(missing)),
    )


def _unmeasured(options: Options) -> list[tuple[str, str]]:
    """What this run leaves out by its options or for want of hardware."""
    left: list[tuple[str, str]] = []
    if reason := gpu_reason():
        left.append(("transfers of tensors on a GPU", reason))
    if options.quick:
        left.append(("all sizes, reads of small tensors, more samples", "--quick was given"))
    if options.comfyui is None:
        left.append(("the whole path through ComfyUI", "give --comfyui PATH"))
    return left


def _ours(options: Options, note: Callable[[str, str], None]) -> list[Row]:
    """Everything that only Legion has, each part by itself: one that fails is noted, the others go on."""
    from legion_shm.native_bench import control, life, whole_path

    quick, show = options.quick, options.show
    size = next(each for each in SIZES if each.label == "25 MB")
    parts: dict[str, Callable[[], list[Row]]] = {
        "control round trip": lambda: control.measure_control(rounds=200 if quick else 1000, show=show),
        "worker starts": lambda: life.measure_starts(rounds=1 if quick else 5, size=size, show=show),
        "throughput": lambda: life.measure_throughput(
            size=size, rounds=2 if quick else 10, in_flights=(1, 4) if quick else (1, 4, 8), show=show
        ),
        "memory": lambda: life.measure_memory(size=size, show=show),
        "whole path": lambda: whole_path.measure_whole_path(
            rounds=5 if quick else 30,
            comfyui=options.comfyui,
            comfyui_python=options.comfyui_python,
            show=show,
        ),
    }
    rows: list[Row] = []
    for name, part in parts.items():
        try:
            rows += part()
        except (LegionError, OSError, TimeoutError) as error:
            note(name, f"{type(error).__name__}: {error}")
    return rows


def _uses(size: Size, *, quick: bool) -> tuple[Use, ...]:
    if quick and size.nbytes < 20 << 20:
        return ("touch", "none")
    return ("touch", "read", "none")


def _fits(size: Size, note: Callable[[str, str], None]) -> bool:
    import psutil

    available = psutil.virtual_memory().available
    if size.nbytes * _MEMORY_SHARE <= available:
        return True
    note(
        size.label,
        f"{_MEMORY_SHARE} tensors of that size need {size.nbytes * _MEMORY_SHARE >> 20} MiB; "
        f"{available >> 20} MiB of memory are available",
    )
    return False


def _measure(
    cases: list[Case], size: Size, how: Use, options: Options, note: Callable[[str, str], None]
) -> Sampled:
    present: list[Case] = []
    for case in cases:
        if case.failed or not case.peer.uses(how):
            continue
        unfit = case.peer.unfit(size.shape)
        if unfit:
            note(f"{case.peer.name}, {size.label}", unfit)
            continue
        present.append(case)
    return measure_size(
        present,
        size,
        how,
        rounds=rounds_for(size.nbytes, quick=options.quick, rounds=options.rounds),
        budget_s=_QUICK_BUDGET_S if options.quick else _FULL_BUDGET_S,
        note=note,
        show=options.show,
    )


def _transfer_rows(sampled: Sampled, size: Size, how: str) -> list[Row]:
    rows: list[Row] = []
    for name, taken in sampled.taken.items():
        if not taken:
            continue
        for metric, samples in (
            ("round_trip", [each.round_trip_us for each in taken]),
            ("one_way", [each.one_way_us for each in taken]),
        ):
            rows.append(
                Row.of(
                    "transfer",
                    name,
                    metric,
                    summarize(samples),
                    size_bytes=size.nbytes,
                    size=size.label,
                    use=how,
                )
            )
        rows += _hop_rows(name, taken, size, how)
    return rows


def _hop_rows(name: str, taken: Sequence[Taken], size: Size, how: str) -> list[Row]:
    """Where the round trips went; ``other``: the use of the answer, checks, hand-overs between threads."""
    if how not in ("touch", "cuda") or not taken[0].hops:
        return []
    samples: dict[str, list[float]] = {hop: [each.hops[hop] for each in taken] for hop in taken[0].hops}
    samples[OTHER] = [max(0.0, each.round_trip_us - sum(each.hops.values())) for each in taken]
    return [
        Row.of("hops", name, hop, summarize(values), size_bytes=size.nbytes, size=size.label, use=how)
        for hop, values in samples.items()
    ]


def _info(peer: Peer, proved: bool) -> CaseInfo:
    return CaseInfo(
        name=peer.name,
        title=peer.title,
        kind="legion" if peer.kind == "legion" else "peer",
        settings=peer.settings,
        package=peer.package or "",
        version=peer.version(),
        proved=proved,
    )


def _settings(options: Options, sizes: Sequence[Size]) -> dict[str, str]:
    return {
        "sizes": ", ".join(size.label for size in sizes),
        "rounds": "by size" if options.rounds is None else str(options.rounds),
        "order": "round robin over the ways, shuffled in each round from a fixed seed",
        "warm-up": "3 exchanges of each way and size, not counted",
        "payload": "fresh float32 tensors, private but for the arena ways, made outside of the window",
        "checks": "one word of each page inside the window, every byte outside of it, on both sides",
    }
