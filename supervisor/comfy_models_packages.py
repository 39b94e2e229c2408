"""Packages: the heavy parts of models (torch modules, tokenizers), sent once and known by a key from then on.

    module ── written once ──▶ plan + weights in shared memory, under a key
                                        └──▶ other processes: one module per key, built at its first use

Owns the table of packages of this process: those it made, for as long as their object lives, and those it
received, until they are forgotten or too many. A package whose object has changed since is written again
under another key. It knows which of ComfyUI's objects are packages, and what a patcher carries beside one.
"""

# ComfyUI's and torch's objects have no types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import sys
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgpack
import torch

from legion_shm.errors import UnsupportedValue
from legion_shm.supervisor import comfy_models_recipes as recipes
from legion_shm.supervisor import comfy_models_special as special
from legion_shm.supervisor.comfy_models_build import PlanReader
from legion_shm.supervisor.comfy_models_kinds import Fields, kind_of
from legion_shm.supervisor.comfy_models_names import Names
from legion_shm.supervisor.comfy_models_plan import Adapter, PlanWriter
from legion_shm.supervisor.comfy_models_state import Seen, at_rest_of, standing_in
from legion_shm.supervisor.comfy_models_weights import Placed, Weights, views
from legion_shm.transport.residence import Residence, weights_go, weights_way

__all__ = ["Parcel", "Sent", "Table", "pack_plan", "unpack_plan"]

_PACKAGE_MIN_BYTES = 1 << 20
"""Torch modules below this are written out where they are met, unless they are the model of a patcher."""

_RECEIVED_MAX = 32

Parcel = tuple[str, torch.Tensor, list[torch.Tensor]]
"""A package on the wire: its key, its plan, and the memory that its weights lie in."""


@dataclass
class _Package:
    key: str
    target: weakref.ref[Any]
    plan: torch.Tensor
    blobs: list[torch.Tensor]
    needs: tuple[str, ...]
    seen: Seen
    residence: weakref.ref[Any] | None
    patcher: weakref.ref[Any] | None = None
    kept: list[Any] = field(default_factory=list[Any])  # of a received one: the object, its first patcher


@dataclass
class Sent:
    """What one walk came upon: parcels in the order in which they can be built."""

    parcels: dict[str, Parcel] = field(default_factory=dict[str, Parcel])


class Table:
    """The packages of one process. One walk or rebuilding at a time: hold ``lock``.

    With ``keeps``, as in a worker, what was received stays for the next job, until it is forgotten or too
    many; else it lives for as long as somebody uses it.
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        self.lock = threading.RLock()
        self.keeps = False
        self._weights: weakref.WeakKeyDictionary[Any, Weights] = weakref.WeakKeyDictionary()
        self._by_object: dict[int, _Package] = {}
        self._recipes: dict[int, _Package] = {}
        self._loaded: dict[int, Any] = {}  # patchers that loaders made just now, by their module
        self._by_key: dict[str, _Package] = {}
        self._received: OrderedDict[str, _Package] = OrderedDict()

    def weights(self, residence: Residence | None) -> Weights:
        if residence is None:
            return Weights()  # nothing lives on: each walk places anew
        return self._weights.setdefault(residence, Weights())

    # --- sending --------------------------------------------------------------------------------------------

    def parcel(self, target: Any, residence: Residence | None, sent: Sent, patchers: Sequence[Any]) -> str:
        """The key of an object's package, made now if it is new or changed; it joins ``sent``."""
        with at_rest_of(target, patchers) as at_rest:
            package = self._placed(target, residence, at_rest)
            if residence is not None and isinstance(target, torch.nn.Module):
                package = self._by_recipe(target, residence, at_rest, package) or package
            if package is None or not self._needs_met(package, residence, sent):
                package = self._make_or_recipe(target, residence, sent, at_rest)
        sent.parcels[package.key] = (package.key, package.plan, package.blobs)
        return package.key

    def _make_or_recipe(
        self, target: Any, residence: Residence | None, sent: Sent, at_rest: Mapping[tuple[int, str], object]
    ) -> _Package:
        """By reference; where that is refused and the caller leaves it to us, by recipe."""
        try:
            return self._make(target, residence, sent, at_rest)
        except UnsupportedValue:
            if weights_way() != "auto" or residence is None or not isinstance(target, torch.nn.Module):
                raise
            with weights_go("recipe"):
                try:
                    package = self._by_recipe(target, residence, at_rest, None)
                except UnsupportedValue:
                    package = None
            if package is None:
                raise
            return package

    def _needs_met(self, package: _Package, residence: Residence | None, sent: Sent) -> bool:
        """Whether the packages that it builds upon are still what they were; they join ``sent``."""
        for key in package.needs:
            needed = self._by_key.get(key)
            target = None if needed is None else needed.target()
            if target is None or self.parcel(target, residence, sent, ()) != key:
                return False
        return True

    def _placed(
        self, target: Any, residence: Residence | None, at_rest: Mapping[tuple[int, str], object]
    ) -> _Package | None:
        """The object's package, if there is one and the object is still what was placed."""
        package = self._by_object.get(id(target))
        if package is None or package.target() is not target or not _lives_in(package, residence):
            return None
        return package if package.seen.unchanged(target, at_rest) else None

    def _by_recipe(
        self,
        target: Any,
        residence: Residence,
        at_rest: Mapping[tuple[int, str], object],
        placed: _Package | None,
    ) -> _Package | None:
        """The package that has the loader's call in place of weights, where the caller wants that."""
        way = weights_way()
        if way == "reference" or (way == "auto" and (placed or not recipes.is_cheaper(target, residence))):
            return None
        try:
            plan = recipes.recipe_of(target, at_rest, self.names)
        except LookupError as error:
            if way == "auto":
                return None
            raise UnsupportedValue(
                f"models: recipe was asked for, and {error}; use models: auto or reference", path=""
            ) from error
        package = self._recipes.get(id(target))
        if package is None or package.target() is not target or not _lives_in(package, residence):
            package = _Package(
                key=uuid.uuid4().hex,
                target=weakref.ref(target),
                plan=_resident(pack_plan(plan, Placed([], [], 0)), residence),
                blobs=[],
                needs=(),
                seen=Seen(target, (), {}),
                residence=weakref.ref(residence),
            )
            self._note(target, package, self._recipes)
        return package

    def _make(
        self, target: Any, residence: Residence | None, sent: Sent, at_rest: Mapping[tuple[int, str], object]
    ) -> _Package:
        inside = isinstance(target, torch.nn.Module)
        adapter = ModelAdapter(self, residence, sent, at_rest, inside=inside)
        writer = PlanWriter(self.names, adapter, root=target)
        plan = writer.write(target)
        weights = self.weights(residence)
        placed = weights.place(writer.tensors, residence)
        package = _Package(
            key=uuid.uuid4().hex,
            target=weakref.ref(target),
            plan=_resident(pack_plan(plan, placed), residence),
            blobs=placed.blobs,
            needs=tuple(writer.packages),
            seen=Seen(target, writer.tensors, at_rest),
            residence=None if residence is None else weakref.ref(residence),
        )
        former = self._by_object.get(id(target))
        if former is not None and former.target() is target:
            self._let_go(former)
        self._note(target, package, self._by_object)
        return package

    def _note(self, target: Any, package: _Package, by_object: dict[int, _Package]) -> None:
        known = id(target)
        by_object[known] = package
        self._by_key[package.key] = package

        def forget() -> None:
            if by_object.get(known) is package:
                del by_object[known]
            self._by_key.pop(package.key, None)
            residence = None if package.residence is None else package.residence()
            if residence is not None:
                residence.forgotten.append(package.key)
            package.plan, package.blobs = torch.empty(0), []

        weakref.finalize(target, forget).atexit = False

    # --- receiving ------------------------------------------------------------------------------------------

    def receive(self, parcel: Parcel, residence: Residence | None, parcels: Mapping[str, Parcel]) -> Any:
        """The object of a package: the one that is here, else built now."""
        key, plan, blobs = parcel
        package = self._by_key.get(key)
        target = None if package is None else package.target()
        if package is not None and target is not None and package.kept and package.seen.written():
            self.forget((key,))  # what a node wrote into it is not what was sent
            target = None
        if target is not None:
            if key in self._received:
                self._received.move_to_end(key)
            return target
        payload, table = unpack_plan(plan.numpy().tobytes())
        weights = self.weights(residence)
        tensors = views(table, blobs, weights)
        needs: dict[str, None] = {}

        def needed(other: str) -> Any:
            needs[other] = None
            return self.receive(parcels[other], residence, parcels)

        reader = PlanReader(self.names, tensors, package=needed, special=self.rebuild)
        target = reader.read(payload)
        patcher = self._loaded.pop(id(target), None)
        if isinstance(target, torch.nn.Module) and not blobs:
            tensors = [*target.parameters(), *target.buffers()]
        with at_rest_of(target, () if patcher is None else (patcher,)) as at_rest:
            seen = Seen(target, tensors, at_rest)
        package = _Package(
            key=key,
            target=weakref.ref(target),
            plan=plan,
            blobs=blobs,
            needs=tuple(needs),
            seen=seen,
            residence=None if residence is None else weakref.ref(residence),
        )
        self._note(target, package, self._by_object)
        if patcher is not None:
            package.patcher = weakref.ref(patcher)
        if self.keeps:
            package.kept.append(target)
            if patcher is not None:
                package.kept.append(patcher)
            self._received[key] = package
        while len(self._received) > _RECEIVED_MAX:
            _, oldest = self._received.popitem(last=False)
            oldest.kept.clear()
        return target

    def forget(self, keys: Iterable[str] | None = None) -> list[Any]:
        """Let go of received packages (of all): what was kept of them."""
        keys = tuple(self._received) if keys is None else keys
        found: list[Any] = []
        for key in keys:
            package = self._received.pop(key, None)
            if package is not None:
                found.extend(package.kept[:1])
                package.kept.clear()
        return found

    def changed(self, modules: Iterable[Any] | None = None) -> None:
        """Take these modules, and those that they are part of, for changed: next time they are sent anew.

        All by default.
        """
        wanted = None if modules is None else {id(module) for module in modules}
        for by_object in (self._by_object, self._recipes):
            for known, package in tuple(by_object.items()):
                target = package.target()
                if wanted is None or target is None or _has_one_of(target, wanted):
                    del by_object[known]
                    self._let_go(package)
                    residence = None if package.residence is None else package.residence()
                    if residence is not None:
                        self.weights(residence).forget(package.seen.tensors())

    def _let_go(self, package: _Package) -> None:
        """Another is sent from now on: processes that have it are told, and its memory is free after them."""
        self._by_key.pop(package.key, None)
        residence = None if package.residence is None else package.residence()
        if residence is not None:
            residence.forgotten.append(package.key)
        package.plan, package.blobs = torch.empty(0), []

    # --- patchers -------------------------------------------------------------------------------------------

    def reduce_patcher(self, patcher: Any) -> object:
        """A ModelPatcher: its class if not ComfyUI's own, its model, its devices, all that it carries."""
        kind = kind_of(patcher)
        text = bool(getattr(patcher, "is_clip", False))
        package = self._by_object.get(id(patcher.model))
        if package is not None and package.patcher is None:
            package.patcher = weakref.ref(patcher)
        return Fields(
            {
                "__class__": None if kind in _core_patchers() else kind,
                "model": patcher.model,
                "load_device": special.role_of(patcher.load_device, "text" if text else "load"),
                "offload_device": special.role_of(
                    patcher.offload_device, "text_offload" if text else "offload"
                ),
                "size": patcher.model_size(),
                **special.patcher_attributes(patcher),
            }
        )

    def rebuild(self, name: str, state: Any) -> object:
        if name == "patcher":
            return self._rebuild_patcher(state)
        if name == "member":
            root, path = cast("tuple[Any, str]", state)
            return root.get_submodule(path)
        if name == recipes.RECIPE:
            module, patcher = recipes.load(state)
            if patcher is not None:
                self._loaded[id(module)] = patcher
            return module
        return special.restored(name, state)

    def _rebuild_patcher(self, state: Any) -> object:
        attributes: dict[str, Any] = dict(state)
        kind, model, load, offload, size = (
            attributes.pop(name) for name in ("__class__", "model", "load_device", "offload_device", "size")
        )
        base = self._base_patcher(model, load, offload, size)
        patcher = base.clone()
        patcher.load_device = special.device_by_role(load)
        patcher.offload_device = special.device_by_role(offload)
        if kind is not None:
            if not issubclass(kind, sys.modules["comfy.model_patcher"].ModelPatcher):
                raise ValueError(f"{kind.__name__} is no ModelPatcher")
            patcher.__class__ = kind
        own: dict[str, Any] = vars(patcher)
        own.update(attributes)
        return patcher

    def _base_patcher(self, model: Any, load: str, offload: str, size: int) -> Any:
        """The patcher that all of one model descend from: they share what is patched into it just now."""
        package = self._by_object.get(id(model))
        known = None if package is None or package.patcher is None else package.patcher()
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
        if package is not None:
            package.patcher = weakref.ref(base)
            if package.kept:
                package.kept.append(base)
        return base


def _has_one_of(target: Any, wanted: set[int]) -> bool:
    if id(target) in wanted:
        return True
    modules = target.modules() if isinstance(target, torch.nn.Module) else ()
    return any(id(module) in wanted for module in modules)


def _bare(patcher: Any) -> Any:
    """A clone without anything that the patcher carries, so that what arrives is all that its own has."""
    clone = patcher.clone()
    fresh = type(patcher)(patcher.model, patcher.load_device, patcher.offload_device, patcher.size)
    for name, item in special.patcher_attributes(fresh).items():
        setattr(clone, name, item)
    return clone


def _core_patchers() -> tuple[type, ...]:
    management: Any = sys.modules["comfy.model_patcher"]
    names = ("ModelPatcher", "ModelPatcherDynamic", "CoreModelPatcher")
    return tuple(getattr(management, name) for name in names if hasattr(management, name))


class ModelAdapter(Adapter):
    """What the writer is told about ComfyUI's objects."""

    def __init__(
        self,
        table: Table,
        residence: Residence | None,
        sent: Sent,
        at_rest: Mapping[tuple[int, str], object] | None = None,
        *,
        inside: bool = False,
    ) -> None:
        """``inside``: of a torch module that is a package, whose own modules are part of it."""
        self._table, self._residence, self._sent = table, residence, sent
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
            key = self._table.parcel(value, self._residence, self._sent, patchers or ())
            with at_rest_of(value, patchers or ()) as at_rest:
                passing = standing_in(value, at_rest)
            modules: dict[str, Any] = dict(value.named_modules())
            for path, module in modules.items():
                if id(module) not in passing:
                    self._members.setdefault(id(module), (value, path))
            return key
        if hasattr(kind_of(value), "tokenize_with_weights"):
            return self._table.parcel(value, self._residence, self._sent, ())
        return None

    def special(self, value: Any) -> tuple[str, object] | None:
        management: Any = sys.modules["comfy.model_patcher"]
        if isinstance(value, management.ModelPatcher):
            self._models.setdefault(id(value.model), []).append(value)
            return "patcher", self._table.reduce_patcher(value)
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


def _lives_in(package: _Package, residence: Residence | None) -> bool:
    return (None if package.residence is None else package.residence()) is residence


def pack_plan(plan: bytes, placed: Placed) -> bytes:
    payload: bytes = msgpack.packb([plan, placed.table])
    return payload


def unpack_plan(payload: bytes) -> tuple[bytes, list[list[Any]]]:
    try:
        plan, table = msgpack.unpackb(payload)
    except Exception as error:
        raise ValueError(f"not a package: {error}") from error
    return plan, table


def _resident(payload: bytes, residence: Residence | None) -> torch.Tensor:
    with torch.inference_mode(mode=False):
        if residence is None:
            return torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        blob = torch.frombuffer(residence.resident_buffer(len(payload)), dtype=torch.uint8)
        blob.numpy()[:] = memoryview(payload)
        return blob
