"""Packages: the heavy parts of models (torch modules, tokenizers), sent once and known by a key from then on.

    module ── written once ──▶ plan + weights in shared memory, under a key
                                        └──▶ other processes: one module per key, built at its first use

Owns the table of packages of this process: those it made, for as long as their object lives, and those it
received, until they are forgotten or too many. A package whose object has changed since is written again
under another key. Which of ComfyUI's objects are packages is `comfy_models_patchers`', and their form on the
wire `comfy_models_parcels`'.
"""

# ComfyUI's and torch's objects have no types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from legion_shm.errors import UnsupportedValue
from legion_shm.supervisor import comfy_models_recipes as recipes
from legion_shm.supervisor import comfy_models_special as special
from legion_shm.supervisor.comfy_models_build import PlanReader
from legion_shm.supervisor.comfy_models_names import Names
from legion_shm.supervisor.comfy_models_parcels import Parcel, Sent, pack_plan, resident, unpack_plan
from legion_shm.supervisor.comfy_models_patchers import ModelAdapter, rebuild_patcher
from legion_shm.supervisor.comfy_models_plan import PlanWriter
from legion_shm.supervisor.comfy_models_state import Seen, at_rest_of
from legion_shm.supervisor.comfy_models_weights import Placed, Weights, views
from legion_shm.transport.residence import Residence, weights_go, weights_way

__all__ = ["Table"]

_RECEIVED_MAX = 32


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
    received: bool = False
    kept: list[Any] = field(default_factory=list[Any])  # of a received one: the object, its first patcher


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
                plan=resident(pack_plan(plan, Placed([], [], 0)), residence),
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
        with contextlib.closing(adapter):
            plan = writer.write(target)
        weights = self.weights(residence)
        placed = weights.place(writer.tensors, residence)
        package = _Package(
            key=uuid.uuid4().hex,
            target=weakref.ref(target),
            plan=resident(pack_plan(plan, placed), residence),
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
            received=True,
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

    def patcher_of(self, model: Any) -> Any | None:
        package = self._by_object.get(id(model))
        return None if package is None or package.patcher is None else package.patcher()

    def note_patcher(self, model: Any, patcher: Any, *, made: bool = False) -> None:
        package = self._by_object.get(id(model))
        if package is not None and (made or package.patcher is None):
            package.patcher = weakref.ref(patcher)
            if made and package.kept:
                package.kept.append(patcher)

    def received(self, model: Any) -> bool:
        package = self._by_object.get(id(model))
        return package is not None and package.received

    def again(self, model: Any) -> Any:
        """See `Models.again`. What is written into the weights of one is written into the other's."""
        with self.lock:
            package = self._by_object.get(id(model))
            if package is None or package.target() is not model:
                raise LookupError("it has changed since it arrived")
            payload, table = unpack_plan(package.plan.numpy().tobytes())

            def needed(key: str) -> Any:
                other = self._by_key.get(key)
                found = None if other is None else other.target()
                if found is None:
                    raise LookupError("a part of it is gone")
                return found

            residence = None if package.residence is None else package.residence()
            tensors = views(table, package.blobs, self.weights(residence))
            target = PlanReader(self.names, tensors, package=needed, special=self.rebuild).read(payload)
            self._loaded.pop(id(target), None)
            return target

    def rebuild(self, name: str, state: Any) -> object:
        if name == "patcher":
            return rebuild_patcher(self, state)
        if name == "member":
            root, path = cast("tuple[Any, str]", state)
            return root.get_submodule(path)
        if name == recipes.RECIPE:
            module, patcher = recipes.load(state)
            if patcher is not None:
                self._loaded[id(module)] = patcher
            return module
        return special.restored(name, state)


def _has_one_of(target: Any, wanted: set[int]) -> bool:
    if id(target) in wanted:
        return True
    modules = target.modules() if isinstance(target, torch.nn.Module) else ()
    return any(id(module) in wanted for module in modules)


def _lives_in(package: _Package, residence: Residence | None) -> bool:
    return (None if package.residence is None else package.residence()) is residence
