"""comfy-env's tensor path: its persistent subprocess worker, tensors through its shared-memory serializer.

Settings: ``SubprocessWorker`` with this interpreter (no environment to build, which concerns the start and
not transfers), ``call_module``; all else as it comes.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from legion_shm.errors import PeerFailed
from legion_shm.native_bench.payload import Order
from legion_shm.native_bench.peers.base import TIMEOUT_S, Peer, Responder, Seen, Session
from legion_shm.native_bench.peers.quiet import quiet_descriptors

__all__ = ["PEERS", "exchange", "finish", "prepare"]

_responder = Responder()


def prepare(plain: dict[str, Any]) -> bool:
    """In the worker."""
    _responder.prepare(Order.from_plain(plain))
    return True


def exchange(tensor: Any) -> Any:
    """In the worker."""
    return _responder.take(tensor)


def finish() -> dict[str, Any]:
    """In the worker."""
    return asdict(_responder.finish())


class _ComfyEnvSession(Session):
    def __init__(self) -> None:
        workers: Any = importlib.import_module("comfy_env.isolation.workers")
        root = Path(__file__).resolve().parents[2]
        package = importlib.import_module("legion_shm").__file__
        roots = [str(root), *([str(Path(package).resolve().parents[1])] if package else [])]
        self._worker: Any = workers.SubprocessWorker(
            sys.executable, sys_path=[*roots, *(path for path in sys.path if path)], name="legion-bench"
        )

    def _call(self, function: str, **arguments: Any) -> Any:
        try:
            return self._worker.call_module(__name__, function, timeout=TIMEOUT_S, **arguments)
        except Exception as error:
            raise PeerFailed(f"comfy-env: {type(error).__name__}: {error}") from error

    def ready(self) -> None:
        with quiet_descriptors():
            self.prepare(Order((1024,), "touch", 1, 2))

    def prepare(self, order: Order) -> None:
        self._call("prepare", plain=order.plain())

    def exchange(self, tensor: Any) -> Any:
        return self._call("exchange", tensor=tensor)

    def finish(self) -> Seen:
        return Seen(**self._call("finish"))

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            with quiet_descriptors():
                worker.shutdown()


class ComfyEnvPeer(Peer):
    name = "comfy-env"
    title = "comfy-env"
    settings = "SubprocessWorker with this interpreter, call_module"
    package = "comfy-env"

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        return _ComfyEnvSession()


PEERS: list[Peer] = [ComfyEnvPeer()]
