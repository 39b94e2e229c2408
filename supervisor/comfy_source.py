"""Where the value codec learns of ComfyUI's live objects: MODEL, CLIP, VAE and their like.

Owns the meeting with the registry of codecs, and nothing of models: what they are made of is `comfy_models`',
which is loaded only where ComfyUI is. A process without ComfyUI takes a model as a `ModelReference`: it can
pass it on, and the weights stay where they are.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, cast

from legion_shm.transport.codec import VALUE_TYPES
from legion_shm.transport.codec_registry import ValueType
from legion_shm.transport.residence import current_residence

__all__ = ["ComfyObjects", "ModelReference", "install_comfy_models"]

_NAME = "comfy"
_LOADED = "comfy.model_management"


class ModelReference:
    """A model that another process sent, in a process without ComfyUI: to be handed on, in `inputs`."""

    __slots__ = ("__weakref__", "_state")

    def __init__(self, state: object) -> None:
        self._state = state

    def __repr__(self) -> str:
        return "<ModelReference: a ComfyUI model of another process>"


def _refer(state: Any) -> ModelReference:
    reference = ModelReference(state)
    residence = current_residence()
    if residence is not None:
        keys = [str(parcel[0]) for parcel in state[3]]
        weakref.finalize(reference, residence.forgotten.extend, keys).atexit = False
    return reference


_REFERENCE = ValueType(_NAME, ModelReference, lambda value: value._state, _refer)


class ComfyObjects:
    """A `CodecSource` for the classes that models are made of, by the allow-list of `comfy_models_names`."""

    def for_class(self, cls: type) -> ValueType | None:
        if cls is ModelReference:
            return _REFERENCE
        if _LOADED not in sys.modules:
            return None
        models = _models()
        names = models.NAMES
        if not names.allows(names.module_name(cls.__module__)):
            return None
        return cast("ValueType", models.OBJECT)

    def for_name(self, name: str) -> ValueType | None:
        if name != _NAME:
            return None
        return _REFERENCE if _LOADED not in sys.modules else cast("ValueType", _models().OBJECT)


def _models() -> Any:
    from legion_shm.supervisor import comfy_models

    return comfy_models


_installed: list[ComfyObjects] = []


def install_comfy_models() -> None:
    """Let this process send and receive ComfyUI's objects. Once is enough."""
    if not _installed:
        _installed.append(ComfyObjects())
        VALUE_TYPES.add_source(_installed[0])
