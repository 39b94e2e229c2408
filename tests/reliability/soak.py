"""A long day in short: jobs of mixed sizes, a random worker killed again and again, everything accounted for.

`make soak` runs ten thousand jobs; `test_load.py` a few hundred. Every result is checked element by element,
each job's end is counted, and what the processes hold is looked at throughout.

    python -m tests.reliability.soak [--jobs N] [--seconds N] [--kill-every N] [--seed N] [--segments KIND]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from legion_shm import Job, LegionError, Supervisor, WorkerLost
from legion_shm.testing import assert_nothing_left, snapshot
from tests.system.support import flow, spec

BIG_BYTES = 100_000_000
Kind = Literal["memfd", "portable"]
_IN_FLIGHT = 6
_SAMPLES_A_RUN = 40


@dataclass
class Report:
    jobs: int
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict[str, int])
    kills: int = 0
    kills_in_mid_job: int = 0
    wrong: list[str] = field(default_factory=list[str])
    payload_bytes: int = 0
    descriptors: list[int] = field(default_factory=list[int])
    segment_bytes: list[int] = field(default_factory=list[int])
    anonymous_kib: list[int] = field(default_factory=list[int])
    lost_after_kill_ms: list[float] = field(default_factory=list[float])

    def grown_kib(self) -> float:
        """RssAnon of the supervisor's process: the last quarter's median over the second's."""
        samples = self.anonymous_kib
        quarter = max(1, len(samples) // 4)
        return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter])

    def summary(self) -> dict[str, Any]:
        figures = asdict(self)
        for name in ("descriptors", "segment_bytes", "anonymous_kib"):
            values = figures.pop(name)
            figures[name] = {"first": values[0], "median": statistics.median(values), "most": max(values)}
        waits = figures.pop("lost_after_kill_ms")
        if waits:
            figures["lost_after_kill_ms"] = {"median": statistics.median(waits), "most": max(waits)}
        return {**figures, "grown_kib": self.grown_kib()}


class Soak:
    def __init__(
        self, jobs: int, *, kill_every: int, seed: int, segments: Kind, big_bytes: int, seconds: float
    ) -> None:
        self.report = Report(jobs)
        self._random = random.Random(seed)
        self._kill_every, self._big_bytes, self._seconds = kill_every, big_bytes, seconds
        self._pattern = torch.arange(big_bytes // 4 + 1, dtype=torch.float32).remainder_(8191.0)
        self._specs = [spec(env={"POOL": name}, max_workers=1) for name in ("a", "b")]
        self._legion = Supervisor(
            segments=segments,
            restart_backoff_s=0.01,
            restart_backoff_max_s=0.05,
            restart_budget=1000,
            arena_quota_bytes=4 << 30,
        )
        self._killed: dict[str, float] = {}

    def run(self) -> Report:
        started_s = time.monotonic()
        waiting: deque[tuple[Job, int, float]] = deque()
        outcomes: Counter[str] = Counter()
        every = max(1, self.report.jobs // _SAMPLES_A_RUN)
        try:
            for number in range(self.report.jobs):
                if time.monotonic() - started_s > self._seconds:
                    self.report.jobs = number
                    break
                elements, offset = self._size(number) // 4, float(number % 97)
                value = self._pattern[:elements] + offset
                on = self._random.choice(self._specs)
                job = self._legion.submit(flow("TestAdd"), inputs=[value], spec=on)
                waiting.append((job, elements, offset))
                self.report.payload_bytes += 2 * value.nbytes
                del value
                while len(waiting) >= _IN_FLIGHT:
                    outcomes[self._look(*waiting.popleft())] += 1
                if number % self._kill_every == self._kill_every - 1:
                    self._kill()
                if number % every == every - 1:
                    self._sample()
            while waiting:
                outcomes[self._look(*waiting.popleft())] += 1
        finally:
            self._legion.close()
        self.report.seconds = time.monotonic() - started_s
        self.report.outcomes = dict(outcomes)
        return self.report

    def _size(self, number: int) -> int:
        """Half of the jobs below 64 KiB, the others up to the largest, evenly by logarithm; some empty."""
        if number % 500 == 250:
            return self._big_bytes
        if self._random.random() < 0.02:
            return 0
        top = (
            16.0 if self._random.random() < 0.5 else torch.tensor(float(self._big_bytes)).log2().item() - 2.0
        )
        return int(2.0 ** self._random.uniform(2.0, top))

    def _look(self, job: Job, elements: int, offset: float) -> str:
        try:
            tensor = job.result(timeout=120)["output_1"]
        except WorkerLost as error:
            killed_s = self._killed.pop(error.worker_id or "", None)
            if killed_s is not None:
                ended_s = next(event.time_s for event in job.events() if event.terminal)
                self.report.lost_after_kill_ms.append((ended_s - killed_s) * 1000)
            elif "SIGKILL" not in str(error):
                self.report.wrong.append(str(error)[:200])
            return "lost"
        except (LegionError, TimeoutError) as error:
            self.report.wrong.append(f"{type(error).__name__}: {error}"[:200])
            return "failed"
        if not torch.equal(tensor, self._pattern[:elements] + (offset + 1.0)):
            self.report.wrong.append(f"{job.id}: {elements} elements came back wrong")
        return job.state

    def _kill(self) -> None:
        workers = [worker for worker in self._legion.workers() if worker.pid is not None]
        if not workers:
            return
        victim = self._random.choice(workers)
        self._killed[victim.id] = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid or 0, signal.SIGKILL)
        self.report.kills += 1
        self.report.kills_in_mid_job += victim.job_id is not None

    def _sample(self) -> None:
        gc.collect()
        self.report.descriptors.append(len(os.listdir("/proc/self/fd")))
        self.report.segment_bytes.append(sum(worker.arena_bytes for worker in self._legion.workers()))
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.report.anonymous_kib.append(int(status["RssAnon"].split()[0]))


def soak(
    jobs: int,
    *,
    kill_every: int = 100,
    seed: int = 1,
    segments: Kind = "memfd",
    big_bytes: int = BIG_BYTES,
    seconds: float = float("inf"),
) -> Report:
    """So many jobs, or as many as are done within ``seconds``."""
    options = {"seed": seed, "kill_every": kill_every, "big_bytes": big_bytes}
    report = Soak(jobs, **options, segments=segments, seconds=seconds).run()
    gc.collect()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("LEGION_SOAK_JOBS", "10000")))
    parser.add_argument("--kill-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--segments", default="memfd", choices=["memfd", "portable"])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long in any case")
    before, given = snapshot(), parser.parse_args()
    report = soak(**vars(given))
    print(json.dumps(report.summary(), indent=2), flush=True)
    assert_nothing_left(before)
    return 1 if report.wrong or sum(report.outcomes.values()) != report.jobs else 0


if __name__ == "__main__":
    sys.exit(main())
