"""A package on the wire: a key, a plan, and the memory that its weights lie in.

Owns the form of these three. What becomes a package, and who has it, is `comfy_models_packages`'.
"""

# ComfyUI's and torch's objects have no types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgpack
import torch

from legion_shm.supervisor.comfy_models_weights import Placed
from legion_shm.transport.residence import Residence

__all__ = ["Parcel", "Sent", "pack_plan", "resident", "unpack_plan"]

Parcel = tuple[str, torch.Tensor, list[torch.Tensor]]
"""A package on the wire: its key, its plan, and the memory that its weights lie in."""


@dataclass
class Sent:
    """What one walk came upon: parcels in the order in which they can be built."""

    parcels: dict[str, Parcel] = field(default_factory=dict[str, Parcel])


def pack_plan(plan: bytes, placed: Placed) -> bytes:
    payload: bytes = msgpack.packb([plan, placed.table])
    return payload


def unpack_plan(payload: bytes) -> tuple[bytes, list[list[Any]]]:
    try:
        plan, table = msgpack.unpackb(payload)
    except Exception as error:
        raise ValueError(f"not a package: {error}") from error
    return plan, table


def resident(payload: bytes, residence: Residence | None) -> torch.Tensor:
    """A plan in memory that others map."""
    with torch.inference_mode(mode=False):
        if residence is None:
            return torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        blob = torch.frombuffer(residence.resident_buffer(len(payload)), dtype=torch.uint8)
        blob.numpy()[:] = memoryview(payload)
        return blob
