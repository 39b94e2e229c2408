"""Weights by recipe: a torch module that a loader made goes as the loader's call, and is loaded there again.

    module ── loaded_by ──▶ loader, arguments, files ── recipe ──▶ plan ── load ──▶ module elsewhere

Owns when that is exact (files and module are as they were when it was loaded), and when it is cheaper. The
module alone goes this way: what a patcher carries beside it (LoRA, options, hooks) travels as always.
"""

# ComfyUI's and torch's objects have no types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch

from legion_shm.errors import UnsupportedValue
from legion_shm.supervisor import comfy_models_special as special
from legion_shm.supervisor.comfy_loaders import FileMark, call_loader, check_file, loaded_by
from legion_shm.supervisor.comfy_models_kinds import kind_of
from legion_shm.supervisor.comfy_models_names import Names
from legion_shm.supervisor.comfy_models_plan import Adapter, PlanWriter
from legion_shm.supervisor.comfy_models_state import AtRest
from legion_shm.transport.residence import Residence

__all__ = ["RECIPE", "State", "is_cheaper", "load", "recipe_of", "state_of"]

RECIPE = "recipe"
"""What the plan of such a module is called."""

_SPOT = 64
_DENSE = (torch.Tensor, torch.nn.Parameter)
_PLAIN = (type(None), bool, int, float, str)


class State:
    """What a module was like: its structure, plain attributes, and of each weight what is cheap to ask.

    Where the weights lie doesn't count, so that a model that was moved to a device and back is the same.
    """

    def __init__(self, target: Any, at_rest: AtRest) -> None:
        self._rows = list(_rows(target, at_rest))
        self.inference = torch.is_inference_mode_enabled()
        """Whether the loader ran in inference mode, as in a node: some weights then work in that alone."""

    def difference(self, target: Any, at_rest: AtRest) -> str:
        """The path of what is not as it was; empty where all is."""
        rows = list(_rows(target, at_rest))
        for known, now in zip(self._rows, rows, strict=False):
            if known[:2] != now[:2]:
                return str(now[0]) or "its structure"
            tensor = None if known[2] is None else known[2]()
            if tensor is not None and now[2] is not None and tensor is now[2]() and known[3] != now[3]:
                return str(now[0])
        return "" if len(rows) == len(self._rows) else "its structure"


def state_of(target: Any) -> State:
    """The state of a module that has just been loaded."""
    return State(target, {})


def _rows(target: Any, at_rest: AtRest) -> Iterator[tuple[str, object, Any, object]]:
    """Path, what has to be equal, and a tensor with the version that it keeps while it is the same one."""
    for path, module in _modules(target, at_rest, ""):
        own = cast("dict[str, Any]", vars(module))
        plain: dict[str, object] = {}
        for name, now in special.lasting_attributes(own).items():
            item = at_rest.get((id(module), name), now)
            if kind_of(item) in _PLAIN and name != "comfy_cast_weights":
                plain[name] = item
        yield path, (kind_of(module), plain), None, None
        for group in ("_parameters", "_buffers"):
            for name, now in own[group].items():
                tensor: Any = at_rest.get((id(module), name), now)
                if tensor is None:
                    continue
                equal = (group, tensor.dtype, tuple(tensor.shape), _sample(tensor))
                yield f"{path}.{name}", equal, weakref.ref(tensor), _version(tensor)


def _modules(module: Any, at_rest: AtRest, path: str) -> Iterator[tuple[str, Any]]:
    yield path, module
    for name, now in vars(module)["_modules"].items():
        child: Any = at_rest.get((id(module), name), now)
        if child is not None:
            yield from _modules(child, at_rest, f"{path}.{name}")


def _version(tensor: torch.Tensor) -> int | None:
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode
        return None


def _sample(tensor: torch.Tensor) -> bytes:
    """Bytes of its start, middle and end, wherever it lies."""
    nbytes = tensor.numel() * tensor.itemsize
    if tensor.is_meta or not nbytes or not tensor.is_contiguous() or type(tensor) not in _DENSE:
        return b""
    spots = [(0, nbytes)]
    if nbytes > 3 * _SPOT:
        spots = [(0, _SPOT), (nbytes // 2, _SPOT), (nbytes - _SPOT, _SPOT)]
    if tensor.is_cpu:
        address = tensor.data_ptr()
        return b"".join(ctypes.string_at(address + at, count) for at, count in spots)
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return torch.cat([flat[at : at + count] for at, count in spots]).cpu().numpy().tobytes()


# --- sending ------------------------------------------------------------------------------------------------


def is_cheaper(target: Any, residence: Residence) -> bool:
    """Whether a module that no block holds yet had better be loaded there: the rule of `models: auto`.

    By reference costs one copy into the arena, for all workers together. So a recipe is cheaper where the
    arena has no room for the weights, and where they lie on a device: each move would cost a copy again.
    """
    tensors = [*target.parameters(), *target.buffers()]
    if any(not tensor.is_cpu and not tensor.is_meta for tensor in tensors):
        return True
    nbytes: int = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    return nbytes > residence.room_bytes()


class _Call:
    """Stands for the module in its plan."""

    def __init__(self, state: object) -> None:
        self.state = state


class _Adapter(Adapter):
    def special(self, value: Any) -> tuple[str, object] | None:
        return (RECIPE, value.state) if isinstance(value, _Call) else None


def recipe_of(target: Any, at_rest: AtRest, names: Names) -> bytes:
    """The plan of a module by its loader's call. Raises LookupError, which says why there is none."""
    loaded = loaded_by(target)
    kind = kind_of(target).__qualname__
    if loaded is None:
        raise LookupError(
            f"{kind} was made by none of ComfyUI's loaders that can be asked again, or before Legion came"
        )
    for mark in loaded.files:
        check_file(mark)
    state = cast("State", loaded.state)
    where = state.difference(target, at_rest)
    if where:
        raise LookupError(f"{kind} is not what its file gives: {where.lstrip('.')} was changed since")
    files = [mark.as_state() for mark in loaded.files]
    call = _Call([loaded.loader, loaded.part, dict(loaded.arguments), files, state.inference])
    try:
        return PlanWriter(names, _Adapter()).write(call)
    except UnsupportedValue as error:
        raise LookupError(f"the loader was called with what can't be sent: {error}") from error


# --- receiving ----------------------------------------------------------------------------------------------


def load(state: Any) -> tuple[Any, Any]:
    """The module of a recipe, and the patcher that its loader made or None.

    Raises LookupError where this process can't load it, ValueError for a malformed state.
    """
    try:
        loader, part, arguments, files, inference = state
        marks = [FileMark(*mark) for mark in files]
        if not all(type(mark.path) is str for mark in marks) or type(part) is not int:
            raise ValueError("not a recipe")
        given = {name: item for name, item in arguments.items() if type(name) is str}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a recipe: {error}") from error
    with torch.inference_mode(mode=bool(inference)):
        return call_loader(loader, part, given, marks)
