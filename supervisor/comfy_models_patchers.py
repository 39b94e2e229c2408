"""Which of ComfyUI's objects are packages, and what a ModelPatcher carries beside one.

    ModelPatcher ── reduce_patcher ──▶ model, devices by role, patches ── rebuild_patcher ──▶ ModelPatcher

Owns that, and nothing of where packages are kept: `Models` is what it asks of their table.
"""

# ComfyUI's and torch's objects have no types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from legion_shm.supervisor import comfy_models_special as special
from legion_shm.supervisor.comfy_models_kinds import Fields, kind_of
from legion_shm.supervisor.comfy_models_parcels import Sent
from legion_shm.supervisor.comfy_models_plan import Adapter
from legion_shm.supervisor.comfy_models_state import at_rest_of, standing_in
from legion_shm.transport.residence import Residence

__all__ = ["ModelAdapter", "Models", "rebuild_patcher", "reduce_patcher"]

_PACKAGE_MIN_BYTES = 1 << 20
"""Torch modules below this are written out where they are met, unless they are the model of a patcher."""


class Models(Protocol):
    """The table of packages."""

    def parcel(self, target: Any, residence: Residence | None, sent: Sent, patchers: Sequence[Any]) -> str:
        """The key of an object's package, which joins ``sent``."""
        ...

    def patcher_of(self, model: Any) -> Any | None:
        """The first patcher that is known of a package's model, while it lives."""
        ...

    def note_patcher(self, model: Any, patcher: Any, *, made: bool = False) -> None:
        """The first one, unless one is known. One that was ``made`` by us is, and the table keeps it."""
        ...


def reduce_patcher(models: Models, patcher: Any) -> object:
    """A ModelPatcher: its class if not ComfyUI's own, its model, its devices, all that it carries."""
    kind = kind_of(patcher)
    text = bool(getattr(patcher, "is_clip", False))
    models.note_patcher(patcher.model, patcher)
    return Fields(
        {
            "__class__": None if kind in _core_patchers() else kind,
            "model": patcher.model,
            "load_device": special.role_of(patcher.load_device, "text" if text else "load"),
            "offload_device": special.role_of(patcher.offload_device, "text_offload" if text else "offload"),
            "size": patcher.model_size(),
            **special.patcher_attributes(patcher),
        }
    )


def rebuild_patcher(models: Models, state: Any) -> object:
    """What `reduce_patcher` wrote, as a patcher of the model that is here."""
    attributes: dict[str, Any] = dict(state)
    kind, model, load, offload, size = (
        attributes.pop(name) for name in ("__class__", "model", "load_device", "offload_device", "size")
    )
    base = _base_patcher(models, model, load, offload, size)
    patcher = base.clone()
    patcher.load_device = special.device_by_role(load)
    patcher.offload_device = special.device_by_role(offload)
    if kind is not None:
        if not issubclass(kind, _patcher_bases()):
            raise ValueError(f"{kind.__name__} is no ModelPatcher")
        patcher.__class__ = kind
    own: dict[str, Any] = vars(patcher)
    own.update(attributes)
    return patcher


def _base_patcher(models: Models, model: Any, load: str, offload: str, size: int) -> Any:
    """The patcher that all of one model descend from: they share what is patched into it just now."""
    known = models.patcher_of(model)
    if known is not None and known.model is model:
        return _bare(known)
    management: Any = sys.modules["comfy.model_patcher"]
    make = getattr(management, "CoreModelPatcher", management.ModelPatcher)
    special.blank_module(model)
    base = make(
        model,
        load_device=special.device_by_role(load),
        offload_device=special.device_by_role(offload),
        size=size,
    )
    model.device = base.offload_device
    models.note_patcher(model, base, made=True)
    return base


def _bare(patcher: Any) -> Any:
    """A clone without anything that the patcher carries, so that what arrives is all that its own has."""
    clone = patcher.clone()
    fresh = type(patcher)(patcher.model, patcher.load_device, patcher.offload_device, patcher.size)
    for name, item in special.patcher_attributes(fresh).items():
        setattr(clone, name, item)
    return clone


def _patcher_bases() -> tuple[type[Any], ...]:
    """ComfyUI's ModelPatcher; twice where a module has imported its file by another name, as 0.8.0's do."""
    modules: list[Any] = [sys.modules.get(name) for name in ("comfy.model_patcher", "model_patcher")]
    own = modules[0].__file__
    return tuple(module.ModelPatcher for module in modules if module is not None and module.__file__ == own)


def _core_patchers() -> tuple[type, ...]:
    management: Any = sys.modules["comfy.model_patcher"]
    names = ("ModelPatcher", "ModelPatcherDynamic", "CoreModelPatcher")
    return tuple(getattr(management, name) for name in names if hasattr(management, name))


class ModelAdapter(Adapter):
    """What the writer is told about ComfyUI's objects."""

    def __init__(
        self,
        models: Models,
        residence: Residence | None,
        sent: Sent,
        at_rest: Mapping[tuple[int, str], object] | None = None,
        *,
        inside: bool = False,
    ) -> None:
        """``inside``: of a torch module that is a package, whose own modules are part of it."""
        self._all, self._residence, self._sent = models, residence, sent
        self._at_rest = at_rest or {}
        self._inside = inside
        self._models: dict[int, list[Any]] = {}
        self._members: dict[int, tuple[Any, str]] = {}

    def package(self, value: Any) -> str | None:
        if isinstance(value, torch.nn.Module):
            if self._inside or id(value) in self._members:
                return None
            patchers = self._models.get(id(value))
            if patchers is None and _weight_bytes(value) < _PACKAGE_MIN_BYTES:
                return None
            key = self._all.parcel(value, self._residence, self._sent, patchers or ())
            with at_rest_of(value, patchers or ()) as at_rest:
                passing = standing_in(value, at_rest)
            modules: dict[str, Any] = dict(value.named_modules())
            for path, module in modules.items():
                if id(module) not in passing:
                    self._members.setdefault(id(module), (value, path))
            return key
        if hasattr(kind_of(value), "tokenize_with_weights"):
            return self._all.parcel(value, self._residence, self._sent, ())
        return None

    def special(self, value: Any) -> tuple[str, object] | None:
        if isinstance(value, _patcher_bases()):
            self._models.setdefault(id(value.model), []).append(value)
            return "patcher", reduce_patcher(self._all, value)
        if isinstance(value, torch.nn.Module):
            member = self._members.get(id(value))
            if member is not None and member[0] is not value:
                return "member", member
        return special.reduced(value)

    def attributes(self, value: Any, attributes: Mapping[str, object]) -> Mapping[str, object]:
        kept = special.lasting_attributes(attributes)
        if self._at_rest:
            known = id(value)
            changed = {name: self._at_rest[known, name] for name in kept if (known, name) in self._at_rest}
            if changed:
                return {**kept, **changed}
        return kept

    def parameter(self, module: Any, name: str, value: Any) -> Any:
        return self._at_rest.get((id(module), name), value) if self._at_rest else value


def _weight_bytes(module: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in (*module.parameters(), *module.buffers()))
