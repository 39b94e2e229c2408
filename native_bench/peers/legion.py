"""Legion itself, from API to API: `Supervisor.submit` with a tensor, the result's tensor back.

Settings: the defaults, but for ``idle_trim_s``: other ways take their turns in between, and an arena that is
given back meanwhile would be measured cold. The worker is of the graph engine with the nodes of
`worker_nodes`; one job is one exchange. All variants share one supervisor.

    legion            private memory on both sides: one copy each way
    legion-born       a tensor of `Supervisor.empty` there; back what the worker made with plain torch
    legion-resident   a tensor of `Supervisor.empty` there, the worker hands the same one back
    legion-forward    made by one worker, used by another, and on to us: two jobs
    legion-handle     as legion-resident, and nobody looks at it: the price of the handle alone
    legion-cuda       on a GPU on both sides, within its memory where that can be shared
    legion-cuda-host  the same through main memory
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from legion_shm.config import WorkerSpec
from legion_shm.errors import LegionError, PeerFailed
from legion_shm.native_bench import payload
from legion_shm.native_bench.payload import Device, Order
from legion_shm.native_bench.peers.base import TIMEOUT_S, Peer, Seen, Session
from legion_shm.native_bench.whole_path import hops_of
from legion_shm.supervisor.api import Supervisor
from legion_shm.supervisor.result import JobStats

__all__ = ["PEERS", "WORKER_NODES", "LegionPeer", "job_of", "spec_of"]

WORKER_NODES = "legion_shm.native_bench.worker_nodes"
_IDLE_TRIM_S = 600.0


def job_of(class_type: str) -> dict[str, dict[str, Any]]:
    """A workflow of one node between importer and exporter."""
    return {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "node": {"class_type": class_type, "inputs": {"value": ["in", 0]}},
        "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["node", 0]}},
    }


class _Shared:
    """One supervisor for all variants that are open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._supervisor: Supervisor | None = None

    def take(self) -> Supervisor:
        with self._lock:
            if self._supervisor is None:
                self._supervisor = Supervisor(idle_trim_s=_IDLE_TRIM_S)
            self._users += 1
            return self._supervisor

    def give_back(self) -> None:
        with self._lock:
            self._users -= 1
            supervisor = None
            if not self._users:
                supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.close()


_shared = _Shared()


def spec_of(number: int, *, gpu_arena: bool = True) -> WorkerSpec:
    """A worker with the nodes of `worker_nodes`; another number is another worker."""
    return WorkerSpec(
        engine="graph",
        node_modules=[WORKER_NODES],
        env={"LEGION_BENCH_WORKER": str(number)},
        gpu_arena="auto" if gpu_arena else "off",
    )


class _LegionSession(Session):
    """``resident``: what is sent lies in the arena. ``node``: what the worker does with it."""

    def __init__(self, *, resident: bool, private: bool, node: str, gpu_arena: bool = True) -> None:
        self._supervisor: Supervisor | None = _shared.take()
        self._resident, self._private = resident, private
        self._spec = spec_of(1, gpu_arena=gpu_arena)
        self._flow, self._spoil = job_of(node), job_of("BenchSpoil")
        self._spoiled = False
        self._stats: JobStats | None = None
        self._supervisor.warm_up(self._spec)

    def _run(self, flow: dict[str, Any], spec: WorkerSpec, *inputs: object) -> Any:
        supervisor = self._supervisor
        assert supervisor is not None, "closed"
        try:
            result = supervisor.submit(flow, inputs=inputs, spec=spec).result(timeout=TIMEOUT_S)
            self._stats = result.stats
            return result["output_1"]
        except (LegionError, TimeoutError) as error:
            raise PeerFailed(f"the job failed: {error}") from error

    def ready(self) -> None:
        self._run(job_of("BenchEmpty"), self._spec, 1)

    def prepare(self, order: Order) -> None:
        self._spoiled = order.corrupt
        self._run(job_of("BenchPrepare"), self._spec, {**order.plain(), "private": self._private})

    def make(self, order: Order) -> Any:
        if not self._resident:
            return payload.make(order)
        assert self._supervisor is not None, "closed"
        return payload.make(order, into=self._supervisor.empty(order.shape))

    def exchange(self, tensor: Any) -> Any:
        return self._run(self._spoil if self._spoiled else self._flow, self._spec, tensor)

    def hops(self) -> Mapping[str, float]:
        return {} if self._stats is None else hops_of(self._stats)

    def finish(self) -> Seen:
        return Seen(**self._run(job_of("BenchFinish"), self._spec, 1))

    def close(self) -> None:
        if self._supervisor is not None:
            self._supervisor = None
            _shared.give_back()


class _ForwardSession(_LegionSession):
    """A second worker makes the tensor."""

    def __init__(self) -> None:
        super().__init__(resident=False, private=False, node="BenchPassOn")
        self._maker = spec_of(2)
        self._produce = job_of("BenchProduce")
        assert self._supervisor is not None, "just taken"
        self._supervisor.warm_up(self._maker)

    def ready(self) -> None:
        super().ready()
        self._run(job_of("BenchEmpty"), self._maker, 1)

    def prepare(self, order: Order) -> None:
        super().prepare(order)
        self._run(job_of("BenchPrepare"), self._maker, {**order.plain(), "private": False, "corrupt": False})

    def make(self, order: Order) -> Any:
        return None

    def exchange(self, tensor: Any) -> Any:
        return super().exchange(self._run(self._produce, self._maker, 1))

    def hops(self) -> Mapping[str, float]:
        return {}  # two jobs


class LegionPeer(Peer):
    kind = "legion"

    def __init__(
        self,
        name: str,
        title: str,
        settings: str,
        *,
        resident: bool = False,
        private: bool = False,
        node: str = "BenchExchange",
        handle_only: bool = False,
        device: Device = "cpu",
        gpu_arena: bool = True,
    ) -> None:
        self._gpu_arena = gpu_arena
        self.name, self.title, self.settings = name, title, settings
        self._resident, self._private, self._node = resident, private, node
        self._handle_only, self.device = handle_only, device
        self.echoes = node == "BenchPassOn"
        self.package, self.module = "legion-shm", "legion_shm"

    def uses(self, how: str) -> bool:
        return (how == "none") == self._handle_only

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        if self.name == "legion-forward":
            return _ForwardSession()
        return _LegionSession(
            resident=self._resident, private=self._private, node=self._node, gpu_arena=self._gpu_arena
        )


_API = "Supervisor.submit to Job.result through a graph worker, defaults but idle_trim_s; "

PEERS: list[Peer] = [
    LegionPeer("legion", "Legion, private memory", _API + "private memory on both sides", private=True),
    LegionPeer(
        "legion-born",
        "Legion, arena there, worker-born back",
        _API + "Supervisor.empty there; back a tensor that the worker made with plain torch",
        resident=True,
    ),
    LegionPeer(
        "legion-resident",
        "Legion, arena-resident",
        _API + "Supervisor.empty there; the worker hands the same tensor back",
        resident=True,
        node="BenchPassOn",
    ),
    LegionPeer(
        "legion-forward",
        "Legion, worker to worker to us",
        _API + "two jobs: one worker's output is another's input and comes back",
        node="BenchPassOn",
    ),
    LegionPeer(
        "legion-handle",
        "Legion, handle alone",
        _API + "as arena-resident, and the tensor is looked at by nobody",
        resident=True,
        node="BenchPassOn",
        handle_only=True,
    ),
    LegionPeer(
        "legion-cuda",
        "Legion, on a GPU",
        _API + "a tensor of the GPU there, another one back, within the GPU's memory where it can be shared",
        private=True,
        device="cuda",
    ),
    LegionPeer(
        "legion-cuda-host",
        "Legion, on a GPU, through main memory",
        _API + "gpu_arena: off; a tensor of the GPU there, another one back",
        private=True,
        device="cuda",
        gpu_arena=False,
    ),
]
