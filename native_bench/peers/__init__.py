"""The ways of moving a tensor between two processes that are compared: each in a file of its own.

Owns the list. A way is a `Peer`; whatever it needs is imported when it is opened.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from legion_shm.native_bench.peers.base import Peer

__all__ = ["MODULES", "all_peers"]

MODULES: Sequence[str] = (
    "legion",
    "transport_alone",
    "torch_queue",
    "pipe",
    "shared_memory",
    "zeromq",
    "files",
    "process_vm",
    "iceoryx",
    "ray_actor",
    "isolate",
    "comfy_env_worker",
)


def all_peers() -> list[Peer]:
    """Every peer, whether or not it can run here, in the order of the report."""
    peers: list[Peer] = []
    for name in MODULES:
        module = importlib.import_module(f"legion_shm.native_bench.peers.{name}")
        peers.extend(module.PEERS)
    return peers
