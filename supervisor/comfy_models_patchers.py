"""Which of ComfyUI's objects are packages, and what a ModelPatcher carries beside one.

    ModelPatcher ── reduce_patcher ──▶ model, devices by role, patches ── rebuild_patcher ──▶ ModelPatcher

Owns that, and nothing of where packages are kept: `Models` is what it asks of their table.
"""

# ComfyUI's and torch's objects have no types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from legion_shm.errors import UnsupportedValue
from legion_shm.supervisor import comfy_models_special as special
from legion_shm.supervisor.comfy_models_kinds import Fields, kind_of
from legion_shm.supervisor.comfy_models_parcels import Sent
from legion_shm.supervisor.comfy_models_plan import Adapter
from legion_shm.supervisor.comfy_models_state import at_rest_of, ejected, standing_in
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

    def received(self, model: Any) -> bool:
        """Whether a package's model came from another process, and not from this one in the first place."""
        ...

    def again(self, model: Any) -> Any:
        """A received model built once more, on the same weights. Raises LookupError where that can't be."""
        ...


_RELOAD = "cached_patcher_init"
"""Where a patcher of newer versions has the call that loads its model once more: function, arguments."""


class Reload:
    """Builds a received model once more, in place of the call that loaded it where it came from.

    ComfyUI asks for that where a model is needed beside itself: under a patcher without dynamic VRAM (hooks,
    torch.compile), and for further GPUs. ``sent`` is the call that the sender had, for whom it goes on to.
    """

    def __init__(self, models: Models, model: Any, load: str, offload: str, size: int, sent: object) -> None:
        self._models, self._model, self._roles, self._size = models, model, (load, offload), size
        self.sent = sent

    def __call__(self, *, disable_dynamic: bool = False) -> Any:
        """A patcher of a module of its own. Raises UnsupportedValue where the model can't be built again."""
        try:
            twin = self._models.again(self._model)
        except LookupError as error:
            raise UnsupportedValue(
                "ComfyUI wants this model a second time, for what its dynamic VRAM or one GPU can't do, and "
                f"{error}; load it by a node of this workflow, or start this ComfyUI with "
                "--disable-dynamic-vram",
                path="",
            ) from error
        return _new_patcher(twin, *self._roles, self._size, dynamic=not disable_dynamic)


def _reload(models: Models, known: Any, state: tuple[Any, str, str, int], sent: object) -> object:
    """The call for a patcher that arrives: of the loader that loaded the model here, else of our own."""
    here = getattr(known, _RELOAD, None)
    if here is not None and not isinstance(here[0], Reload):
        return here
    return (Reload(models, *state, sent), ()) if models.received(state[0]) else sent


def reduce_patcher(models: Models, patcher: Any) -> object:
    """A ModelPatcher: its class if not ComfyUI's own, its model, its devices, all that it carries."""
    attributes = special.patcher_attributes(patcher)
    reload: Any = attributes.get(_RELOAD)
    if reload is not None and isinstance(reload[0], Reload):
        attributes[_RELOAD] = reload[0].sent
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
            **attributes,
        }
    )


def rebuild_patcher(models: Models, state: Any) -> object:
    """What `reduce_patcher` wrote, as a patcher of the model that is here."""
    attributes: dict[str, Any] = dict(state)
    kind, model, load, offload, size = (
        attributes.pop(name) for name in ("__class__", "model", "load_device", "offload_device", "size")
    )
    known = models.patcher_of(model)
    if known is None or known.model is not model:
        known = _new_patcher(model, load, offload, size)
        models.note_patcher(model, known, made=True)
    patcher = _bare(known).clone()
    patcher.load_device = special.device_by_role(load)
    patcher.offload_device = special.device_by_role(offload)
    if kind is not None:
        if not issubclass(kind, _patcher_bases()):
            raise ValueError(f"{kind.__name__} is no ModelPatcher")
        patcher.__class__ = kind
    own: dict[str, Any] = vars(patcher)
    if _RELOAD in own:
        attributes[_RELOAD] = _reload(models, known, (model, load, offload, size), attributes.get(_RELOAD))
    own.update(attributes)
    return patcher


def _new_patcher(model: Any, load: str, offload: str, size: int, *, dynamic: bool = True) -> Any:
    """The first patcher of a model that has just been built; all others are its clones, and share what is
    patched into the model just now."""
    management: Any = sys.modules["comfy.model_patcher"]
    make = (
        getattr(management, "CoreModelPatcher", management.ModelPatcher)
        if dynamic
        else management.ModelPatcher
    )
    special.blank_module(model)
    made = make(
        model,
        load_device=special.device_by_role(load),
        offload_device=special.device_by_role(offload),
        size=size,
    )
    model.device = made.offload_device
    return made


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
        self._ejected = contextlib.ExitStack()
        self._models: dict[int, list[Any]] = {}
        self._members: dict[int, tuple[Any, str]] = {}

    def close(self) -> None:
        """The walk is over: what injects code into the models that it met does so again."""
        self._ejected.close()

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
            if id(value.model) not in self._models or getattr(value, "is_injected", False):
                self._ejected.enter_context(ejected(value.model, (value,)))
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
