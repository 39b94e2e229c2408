"""ComfyUI's live objects as values: MODEL, CLIP, VAE, CONTROL_NET and whatever is made of the same classes.

    object ── a plan of it, packages for its torch modules ──▶ blocks ──▶ the same kind of object elsewhere

Owns the state that crosses for such an object, and the versions that must be equal. Which classes go this way
is `comfy_source`'s, how objects are written and built `comfy_models_plan`'s and `comfy_models_build`'s, and
what is sent once only `comfy_models_packages`'.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from typing import Any, cast

import torch

from legion_shm.errors import UnsupportedValue
from legion_shm.supervisor.comfy_loaders import forget_loaded
from legion_shm.supervisor.comfy_models_build import PlanReader
from legion_shm.supervisor.comfy_models_names import Names
from legion_shm.supervisor.comfy_models_packages import Table
from legion_shm.supervisor.comfy_models_parcels import Parcel, Sent, pack_plan, unpack_plan
from legion_shm.supervisor.comfy_models_patchers import ModelAdapter
from legion_shm.supervisor.comfy_models_plan import PlanWriter
from legion_shm.supervisor.comfy_models_weights import views
from legion_shm.transport.codec_registry import ValueType
from legion_shm.transport.codec_wire import Refusal
from legion_shm.transport.residence import current_residence

__all__ = ["NAMES", "OBJECT", "TABLE", "allow_models_of", "models_changed", "rebuild", "reduce"]

NAMES = Names()
TABLE = Table(NAMES)


def allow_models_of(*packages: str) -> None:
    """Let models hold objects and functions of these packages too; ``custom_nodes/PACK`` for a node pack.

    To be called on both sides. Whoever can send this process a value can then make blank instances of the
    packages' classes and have their functions called by ComfyUI.
    """
    NAMES.allow(*packages)


def models_changed(*values: object) -> None:
    """Say that weights of these models were written in a way that is not noticed by itself.

    ``values``: MODEL, CLIP, VAE and their like, or torch modules. The next time that one is sent, all its
    weights are copied. docs/models.md says what is noticed. Raises TypeError for what holds no torch module.
    """
    modules: list[Any] = []
    for value in values:
        found = _modules_in(value, 3)
        if not found:
            raise TypeError(f"there is no torch module in a {type(value).__name__}")
        modules.extend(found)
    with TABLE.lock:
        TABLE.changed(modules)
    for module in modules:
        forget_loaded(module)


def _modules_in(value: object, depth: int) -> list[Any]:
    if isinstance(value, torch.nn.Module):
        return [value]
    found: list[Any] = []
    for item in cast("dict[str, object]", getattr(value, "__dict__", {})).values() if depth else ():
        found.extend(_modules_in(item, depth - 1))
    return found


def _versions() -> list[str]:
    try:
        version = str(importlib.import_module("comfyui_version").__version__)
    except ImportError:
        version = "unknown"
    return [version, str(torch.__version__)]


def reduce(value: Any) -> object:
    """The state of a live object: versions, plan, the memory of its weights, packages.

    Raises Refusal with the path inside of the object, and what the arena raises.
    """
    residence = current_residence()
    with TABLE.lock:
        sent = Sent()
        adapter = ModelAdapter(TABLE, residence, sent)
        writer = PlanWriter(NAMES, adapter)
        try:
            with contextlib.closing(adapter):
                plan = writer.write(value)
        except UnsupportedValue as error:
            refusal = Refusal(str(error))
            refusal.add_step(error.path)
            raise refusal from error
        placed = TABLE.weights(residence).place(writer.tensors, residence)
        parcels = [(key, plan_, list(blobs)) for key, plan_, blobs in sent.parcels.values()]
        return (_versions(), pack_plan(plan, placed), placed.blobs, parcels)


def rebuild(state: Any) -> object:
    """The object that `reduce` wrote.

    Raises ValueError for a malformed state, UnsupportedValue for what this process hasn't.
    """
    residence = current_residence()
    versions, payload, blobs, sent = state
    mine = _versions()
    if versions[0] != mine[0]:
        raise UnsupportedValue(
            f"it comes from ComfyUI {versions[0]}, and this process runs {mine[0]}; models cross between "
            "equal versions only",
            path="",
        )
    parcels: Mapping[str, Parcel] = {key: (key, plan, blobs_) for key, plan, blobs_ in sent}
    with TABLE.lock:
        plan, table = unpack_plan(payload)
        reader = PlanReader(
            NAMES,
            views(table, blobs, TABLE.weights(residence)),
            package=lambda key: TABLE.receive(parcels[key], residence, parcels),
            special=TABLE.rebuild,
        )
        try:
            return reader.read(plan)
        except LookupError as error:
            raise UnsupportedValue(str(error), path="") from error


OBJECT = ValueType("comfy", object, reduce, rebuild, hashable=False)
"""How all of them cross."""
