"""Whether an object is still what it was when it was sent or received, and what it is at rest.

    loaded, patched model ── at_rest_of ──▶ what its parameters and attributes are while nothing is patched in
    object ── Seen ──▶ later: unchanged? written into?

Owns the cheap questions that stand for comparing all weights, and so the limits of what is noticed. It
changes nothing but for the time of `at_rest_of` and `ejected`.
"""

# ComfyUI's and torch's objects have no types here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Generator, Mapping, Sequence
from typing import Any, cast

import torch

from legion_shm.supervisor import comfy_models_special as special
from legion_shm.supervisor.comfy_models_kinds import kind_of
from legion_shm.supervisor.comfy_models_weights import imprint

__all__ = ["AtRest", "Seen", "at_rest_of", "ejected", "standing_in"]

AtRest = Mapping[tuple[int, str], object]
"""What an object holds at rest, where that is not what it holds now: by owner's id and attribute."""


@contextlib.contextmanager
def at_rest_of(target: Any, patchers: Sequence[Any]) -> Generator[AtRest, None, None]:
    """What the object holds while nothing is patched into it; injected code is taken out meanwhile."""
    with ejected(target, patchers) as mine:
        yield special.current_weights(target, mine)


@contextlib.contextmanager
def ejected(target: Any, patchers: Sequence[Any]) -> Generator[list[Any], None, None]:
    """Without the code that patchers have injected into the object just now: those given, and those loaded.

    All of these patchers are given. Clones share what injects, and what it remembers while it is injected.
    """
    management: Any = sys.modules["comfy.model_management"]
    loaded = [model.model for model in management.current_loaded_models]
    mine = [p for p in loaded if p is not None and p.model is target]
    known = {id(patcher) for patcher in mine}
    mine += [patcher for patcher in patchers if id(patcher) not in known]
    with contextlib.ExitStack() as stack:
        for patcher in mine:
            if getattr(patcher, "is_injected", False):
                stack.enter_context(patcher.use_ejected())
        yield mine


def standing_in(target: Any, at_rest: AtRest) -> set[int]:
    """The modules that are patched into a model just now, and are no part of it."""
    found: set[int] = set()
    for module in target.modules() if at_rest else ():
        for name, part in module.named_children():
            if (id(module), name) in at_rest:
                found.update(id(inner) for inner in part.modules())
    return found


class Seen:
    """An object and its tensors as they are now."""

    def __init__(self, target: Any, tensors: Sequence[torch.Tensor], at_rest: AtRest) -> None:
        self._tensors = [(weakref.ref(tensor), imprint(tensor)) for tensor in tensors]
        self._shape = _shape(target, at_rest)

    def tensors(self) -> list[torch.Tensor]:
        """Those that still live."""
        found = [reference() for reference, _ in self._tensors]
        return [tensor for tensor in found if tensor is not None]

    def unchanged(self, target: Any, at_rest: AtRest) -> bool:
        for reference, known in self._tensors:
            tensor = reference()
            if tensor is None or imprint(tensor) != known:
                return False
        return self._shape == _shape(target, at_rest)

    def written(self) -> bool:
        """Whether somebody has written into the tensors; not asked while one is on another device."""
        tensors = [(reference(), known) for reference, known in self._tensors]
        if any(tensor is None or not tensor.is_cpu for tensor, _ in tensors):
            return False
        return any(tensor is not None and imprint(tensor) != known for tensor, known in tensors)


def _shape(target: Any, at_rest: AtRest) -> list[object]:
    """What changes where somebody replaces a part of an object: identities and plain values, not contents."""
    found: list[object] = []
    modules = target.modules() if isinstance(target, torch.nn.Module) else (target,)
    for module in modules:
        known = id(module)
        found.append(known)
        own = cast("dict[str, object]", vars(module))
        for name, now in special.lasting_attributes(own).items():
            if name == "comfy_cast_weights":
                continue
            item = at_rest.get((known, name), now) if at_rest else now
            kind = kind_of(item)
            if name in ("_parameters", "_buffers", "_modules"):
                for key, part in cast("dict[str, object]", item).items():
                    found.append(id(at_rest.get((known, key), part) if at_rest else part))
            elif item is None or kind is int or kind is float or kind is str or kind is bool:
                found.append(item)
            else:
                found.append(id(item))
    return found
