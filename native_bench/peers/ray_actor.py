"""Ray: an actor that takes a numpy array and gives one back, through Ray's object store.

Settings: a local Ray of its own, 2 CPUs, an object store of six times the largest message, no dashboard;
``ray.put`` and the reference as argument; the actor sees the array in the store without a copy. Arrays that
come out of the store are read-only, so a tensor over one is made of numpy's pointer.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from typing import Any, cast

from legion_shm.errors import PeerFailed
from legion_shm.native_bench.payload import Order, to_tensor
from legion_shm.native_bench.peers.base import TIMEOUT_S, Peer, Responder, Seen, Session
from legion_shm.native_bench.peers.quiet import quiet_descriptors

__all__ = ["PEERS"]

_STORE_LEAST = 256 << 20


class _Answerer:
    """What the actor is. It is given numpy arrays, for those are what Ray shares."""

    def __init__(self) -> None:
        self._responder = Responder()

    def ready(self) -> bool:
        import torch

        return torch.tensor([1]).numel() == 1

    def prepare(self, order: Order) -> None:
        self._responder.prepare(order)

    def exchange(self, array: Any) -> Any:
        return self._responder.take(_tensor(array)).numpy()

    def finish(self) -> Seen:
        return self._responder.finish()


def _tensor(array: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of read-only memory; nobody writes
        return to_tensor(array)


class _RaySession(Session):
    def __init__(self, most_bytes: int) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray: Any = importlib.import_module("ray")
        self._ray: Any = ray
        with quiet_descriptors():
            self._start(most_bytes)

    def _start(self, most_bytes: int) -> None:
        ray = self._ray
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=max(_STORE_LEAST, 6 * most_bytes),
            configure_logging=False,
        )
        try:
            self._actor: Any = ray.remote(num_cpus=1)(_Answerer).remote()
        except BaseException:
            self.close()
            raise

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference, timeout=TIMEOUT_S)
        except Exception as error:
            raise PeerFailed(f"Ray: {type(error).__name__}: {error}") from error

    def ready(self) -> None:
        with quiet_descriptors():
            self._get(self._actor.ready.remote())

    def prepare(self, order: Order) -> None:
        self._get(self._actor.prepare.remote(order))

    def exchange(self, tensor: Any) -> Any:
        reference = self._ray.put(tensor.numpy())
        return _tensor(self._get(self._actor.exchange.remote(reference)))

    def finish(self) -> Seen:
        return cast("Seen", self._get(self._actor.finish.remote()))

    def close(self) -> None:
        ray, self._ray = self._ray, None
        if ray is not None:
            with contextlib.suppress(Exception), quiet_descriptors():
                ray.shutdown()


class RayPeer(Peer):
    name = "ray"
    title = "Ray, put, actor, get"
    settings = "local Ray, 2 CPUs, numpy arrays through the object store, ray.put and a reference"
    package = "ray"

    def open(self, most_bytes: int) -> Session:
        return _RaySession(most_bytes)


PEERS: list[Peer] = [RayPeer()]
