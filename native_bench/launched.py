"""What `legion launch` gains: `python -m legion_shm.native_bench.launched`.

Owns two runs of one program, one of them under it, that take turns, and the comparison. The program makes a
fresh tensor with torch, sends it through a graph worker that uses one word of each page and gives it back,
and uses it again; the contents are checked outside of the window. It is no way beside the others, for a
program is launched as a whole.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from typing import Any, cast

import click

from legion_shm.errors import BenchmarkError, ContentsDiffer
from legion_shm.native_bench import payload
from legion_shm.native_bench.payload import Order
from legion_shm.native_bench.summary import Summary, summarize

__all__ = ["main"]

_WARM_UP = 5
_WAYS: dict[str, tuple[str, ...]] = {"plain": (), "launched": ("-m", "legion_shm.cli", "launch", "--")}
_IDLE_TRIM_S = 600.0  # the other program takes its turns in between


@click.command(short_help="Compare a program with the same one under `legion launch`.")
@click.option("--sizes", default="3,25,100", show_default=True, help="Sizes of the tensor in MiB.")
@click.option("--rounds", type=click.IntRange(1), default=60, show_default=True, help="Turns of each.")
@click.option("--child", is_flag=True, hidden=True)
def main(sizes: str, rounds: int, child: bool) -> None:
    """Send fresh tensors through a worker and back, with and without `legion launch`, in turns."""
    if child:
        _serve()
        return
    with contextlib.ExitStack() as stack:
        programs = {name: stack.enter_context(_program(prefix)) for name, prefix in _WAYS.items()}
        for mib in (int(part) for part in sizes.split(",")):
            _report(mib, _measure(programs, mib, rounds))


def _measure(
    programs: dict[str, subprocess.Popen[str]], mib: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    shuffled = random.Random(4)
    for number in range(_WARM_UP + rounds):
        for name in shuffled.sample(list(programs), len(programs)):
            turn = _ask(programs[name], {"mib": mib, "seed": 2 * number + 1})
            if number >= _WARM_UP:
                taken[name].append(turn)
    return taken


def _report(mib: int, taken: dict[str, list[dict[str, float]]]) -> None:
    for what in ("exchange_ms", "make_and_exchange_ms"):
        figures = {name: summarize([turn[what] for turn in turns]) for name, turns in taken.items()}
        print(f"{mib:4d} MiB  {what:21s} {_line(figures)}")
    copied = {name: sum(turn["copies"] for turn in turns) / len(turns) for name, turns in taken.items()}
    print(f"{mib:4d} MiB  copies per job        {'   '.join(f'{n} {v:.2f}' for n, v in copied.items())}")


def _line(figures: dict[str, Summary]) -> str:
    parts = [f"{name} {figure.median:.2f} (p99 {figure.p99:.1f})" for name, figure in figures.items()]
    ratio = figures["plain"].median / figures["launched"].median
    return "   ".join([*parts, f"ratio {ratio:.2f}"])


@contextlib.contextmanager
def _program(prefix: Sequence[str]) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "legion_shm.native_bench.launched", "--child"]
    with subprocess.Popen(
        [sys.executable, *prefix, *command] if prefix else command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
            assert process.stdin is not None, "asked for"
            process.stdin.close()
            process.wait(timeout=30)
        finally:
            process.kill()


def _ask(process: subprocess.Popen[str], turn: dict[str, int]) -> dict[str, float]:
    assert process.stdin is not None, "asked for"
    assert process.stdout is not None, "asked for"
    process.stdin.write(json.dumps(turn) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise BenchmarkError("a measured program has ended")
    return cast("dict[str, float]", json.loads(answer))


def _serve() -> None:
    """The measured program: a turn for each line."""
    from legion_shm.native_bench.peers.legion import job_of, spec_of
    from legion_shm.supervisor.api import Supervisor

    spec = spec_of(1)
    with Supervisor(idle_trim_s=_IDLE_TRIM_S) as legion:
        prepare, flow, finish = job_of("BenchPrepare"), job_of("BenchPassOn"), job_of("BenchFinish")

        def run(workflow: dict[str, Any], value: object) -> Any:
            return legion.submit(workflow, inputs=[value], spec=spec).result(timeout=60)

        for line in sys.stdin:
            turn = json.loads(line)
            order = Order((turn["mib"], 512, 512), "touch", turn["seed"], turn["seed"])
            run(prepare, {**order.plain(), "private": False})
            begun_ns = time.monotonic_ns()
            tensor = payload.make(order)
            started_ns = time.monotonic_ns()
            result = run(flow, tensor)
            got = payload.use(result["output_1"], "touch")
            ended_ns = time.monotonic_ns()
            problem = payload.problem_of(result["output_1"], order, reply=True)
            seen = run(finish, 1)["output_1"]
            if problem or seen["problem"] or got != payload.expected_use(order):
                raise ContentsDiffer(f"{order.nbytes} bytes: {problem or seen['problem'] or 'wrong sum'}")
            copies = result.stats.copies
            del result, tensor
            print(
                json.dumps(
                    {
                        "exchange_ms": (ended_ns - started_ns) / 1e6,
                        "make_and_exchange_ms": (ended_ns - begun_ns) / 1e6,
                        "copies": copies,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
