"""The goals that Legion has set itself, held against a result: met, missed, or not measured.

Owns the goals and the arithmetic. Pure: rows in, `Goal` out. Times are medians of round trips with one word
of each page used; factors are between medians of the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from legion_shm.native_bench.model import Goal, Row
from legion_shm.native_bench.summary import ratio

__all__ = ["check_goals"]

_KB64, _MB3, _MB25 = 65536, 512 * 512 * 3 * 4, 1080 * 1920 * 3 * 4
_SIZES = (
    ("4 KB", 4096),
    ("64 KB", _KB64),
    ("3 MB", _MB3),
    ("25 MB", _MB25),
    ("100 MB", 4 * _MB25),
    ("400 MB", 16 * _MB25),
)
_PRIVATE_MS = (0.2, 0.2, 0.7, 3.0, 12.0, 46.0)
_ARENA_MS = (0.15, 0.15, 0.25, 0.45, 1.1, 3.0)
_FACTORS = (
    ("torch-file-system", 10.0),
    ("torch-file-descriptor", 10.0),
    ("comfy-env", 12.0),
    ("pyisolate", 12.0),
    ("png", 200.0),
)
_OURS = "legion"
_HANDLE_MS = 0.15
_MEMCPY_FACTOR = 1.3
_CONTROL_FACTOR = 5.0
_HELD_FACTOR = 1.25
_START_S = 0.3


class _Figures:
    def __init__(self, rows: Sequence[Row]) -> None:
        self._medians = {row.key: row.median for row in rows}
        self.peers = sorted(
            {row.case for row in rows if row.section == "transfer" and not row.case.startswith(_OURS)}
        )

    def transfer(self, case: str, nbytes: int, use: str = "touch") -> float | None:
        return self._medians.get(("transfer", case, "round_trip", nbytes, use))

    def get(self, section: str, case: str, metric: str, nbytes: int = 0) -> float | None:
        return self._medians.get((section, case, metric, nbytes, ""))


def check_goals(rows: Sequence[Row]) -> tuple[Goal, ...]:
    """Every goal, in the order of importance; those whose figures are missing too."""
    figures = _Figures(rows)
    goals: list[Goal] = []
    for (label, nbytes), wanted in zip(_SIZES, _PRIVATE_MS, strict=True):
        goals.append(_at_most(f"private tensor, {label}", figures.transfer(_OURS, nbytes), wanted))
    for (label, nbytes), wanted in zip(_SIZES, _ARENA_MS, strict=True):
        for case, words in (
            ("legion-resident", "arena-resident"),
            ("legion-born", "arena there, worker-born back"),
        ):
            goals.append(_at_most(f"{words}, {label}", figures.transfer(case, nbytes), wanted))
    goals += _ahead(figures)
    goals += _factors(figures)
    for label, nbytes in _SIZES[3:]:
        copies = [figures.get("limit", f"copy_warm_{threads}", "time", nbytes) for threads in (1, 2)]
        copy = min((each for each in copies if each is not None), default=None)
        value = ratio(figures.transfer(_OURS, nbytes), None if copy is None else 2 * copy)
        goals.append(
            _factor_at_most(f"private over two warm memcpys (1 or 2 threads), {label}", value, _MEMCPY_FACTOR)
        )
    handles = [figures.transfer("legion-handle", nbytes, "none") for _, nbytes in _SIZES]
    known = [value for value in handles if value is not None]
    goals.append(_at_most("handle alone, any size", max(known) if known else None, _HANDLE_MS))
    job, bare = (figures.get("control", case, "round_trip") for case in ("empty-job", "zeromq-bare"))
    goals.append(_factor_at_most("empty job over a bare ZeroMQ ping-pong", ratio(job, bare), _CONTROL_FACTOR))
    held = figures.get("memory", "held-over-live", "ratio")
    goals.append(_factor_at_most("shared memory held over the most in use", held, _HELD_FACTOR))
    left = figures.get("memory", "left-after-idle", "bytes")
    goals.append(
        _goal("shared memory left after idling", "0 MB", left, "{:.1f} MB", lambda value: value == 0)
    )
    first = ratio(
        figures.get("start", "first_transfer", "time", _MB25),
        figures.get("limit", "copy_fresh_memfd", "time", _MB25),
    )
    goals.append(_factor_at_most("first 25 MB to a new worker over a fresh memfd copy", first, 1.0))
    started = figures.get("start", "replacement", "time")
    soon = f"<= {_START_S:g} s"
    goals.append(
        _goal("replacement worker, start to result", soon, started, "{:.3g} s", lambda v: v <= _START_S, 1e-6)
    )
    return tuple(goals)


def _ahead(figures: _Figures) -> list[Goal]:
    goals: list[Goal] = []
    for label, nbytes in _SIZES[2:]:
        ours = figures.transfer(_OURS, nbytes)
        others = {name: figures.transfer(name, nbytes) for name in figures.peers}
        known = {name: value for name, value in others.items() if value is not None}
        if ours is None or not known:
            goals.append(
                Goal(goal=f"ahead of every other way, {label}", wanted="> 1x the best", measured="", met=None)
            )
            continue
        best = min(known, key=lambda name: known[name])
        factor = known[best] / ours
        goals.append(
            Goal(
                goal=f"ahead of every other way, {label}",
                wanted="> 1x the best",
                measured=f"{factor:.2f}x {best}, of {len(known)} ways",
                met=factor > 1,
            )
        )
    return goals


def _factors(figures: _Figures) -> list[Goal]:
    ours = figures.transfer(_OURS, _MB25)
    others = {name: figures.transfer(name, _MB25) for name in figures.peers}
    known = {name: value for name, value in others.items() if value is not None}
    goals: list[Goal] = []
    best = min(known, key=lambda name: known[name]) if known else None
    resident = figures.transfer("legion-resident", _MB25)
    for words, value, wanted in (("private", ours, 2.0), ("arena-resident", resident, 10.0)):
        factor = ratio(known[best], value) if best else None
        name = f"{words} against the best other way, 25 MB"
        goals.append(_factor_at_least(name, factor, wanted, f" {best}" if best else ""))
    for name, wanted in _FACTORS:
        goals.append(
            _factor_at_least(f"private against {name}, 25 MB", ratio(others.get(name), ours), wanted)
        )
    return goals


def _at_most(name: str, median_us: float | None, wanted_ms: float) -> Goal:
    return _goal(name, f"<= {wanted_ms:g} ms", median_us, "{:.3g} ms", lambda value: value <= wanted_ms, 1e-3)


def _factor_at_most(name: str, value: float | None, wanted: float) -> Goal:
    return _goal(name, f"<= {wanted:g}x", value, "{:.2f}x", lambda factor: factor <= wanted)


def _factor_at_least(name: str, value: float | None, wanted: float, words: str = "") -> Goal:
    return _goal(name, f">= {wanted:g}x", value, "{:.2f}x" + words, lambda factor: factor >= wanted)


def _goal(
    name: str,
    wanted: str,
    value: float | None,
    form: str,
    is_met: Callable[[float], bool],
    scale: float = 1.0,
) -> Goal:
    if value is None:
        return Goal(goal=name, wanted=wanted, measured="", met=None)
    return Goal(goal=name, wanted=wanted, measured=form.format(value * scale), met=is_met(value * scale))
