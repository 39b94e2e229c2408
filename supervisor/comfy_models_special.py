"""What is special about ComfyUI's own classes, and about others that its models are made of.

Owns what is left out of a model because it is about this process and this moment (where it is loaded, what is
patched into it just now), which device means what elsewhere, and the objects of other libraries that have a
text of their own. It never walks a model.
"""

from __future__ import annotations

import importlib
import io
import sys
import uuid
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from legion_shm.supervisor.comfy_models_kinds import kind_of

__all__ = [
    "PASSING",
    "blank_module",
    "current_weights",
    "device_by_role",
    "lasting_attributes",
    "patcher_attributes",
    "reduced",
    "restored",
    "role_of",
]

PASSING = frozenset(
    {
        "_free_methods",
        "_last_free_log_time",
        "_last_prepare_log_key",
        "_lowvram_pin",
        "_model_dtype",
        "_pin",
        "_pin_state",
        "_pins",
        "_prefetch",
        "_v",
        "_v_block",
        "_v_bias",
        "_v_signature",
        "_v_weight",
        "bias_function",
        "bias_lowvram_function",
        "comfy_force_cast_weights",
        "comfy_patched_weights",
        "dynamic_patchers",
        "dynamic_pins",
        "dynamic_vbars",
        "prev_comfy_cast_weights",
        "seed_key",
        "weight_function",
        "weight_lowvram_function",
    }
)
"""Attributes of modules and tensors that say how they are loaded here; the receiver loads for itself."""

_AT_REST: dict[str, object] = {
    "current_patcher": None,
    "current_weight_patches_uuid": None,
    "latent_shapes": None,
    "lowvram_patch_counter": 0,
    "model_loaded_weight_memory": 0,
    "model_lowvram": False,
    "model_offload_buffer_memory": 0,
}
"""The same, of a whole model: what they are while it is loaded nowhere."""

_MARKS = frozenset({"model_loaded_weight_memory", "options_default"})
_CLIP_OPTIONS = ("layer", "layer_idx", "return_projected_pooled")
_PATCHER_OWN = frozenset(
    {
        "backup",
        "backup_buffers",
        "cached_hook_patches",
        "current_hooks",
        "hook_backup",
        "is_injected",
        "load_device",
        "model",
        "non_dynamic_delegate_model",
        "object_patches_backup",
        "offload_device",
        "parent",
        "pinned",
        "size",
        "skip_injection",
    }
)


def patcher_attributes(patcher: Any) -> dict[str, object]:
    """What a ModelPatcher carries beside its model: patches, options, hooks, wrappers, injections."""
    own = cast("dict[str, object]", vars(patcher))
    return {name: item for name, item in own.items() if name not in _PATCHER_OWN and name not in PASSING}


def lasting_attributes(attributes: Mapping[str, object]) -> Mapping[str, object]:
    """An object's attributes without what is passing; for a model, those that it has at rest."""
    if PASSING.isdisjoint(attributes) and _MARKS.isdisjoint(attributes):
        return attributes
    kept = {name: item for name, item in attributes.items() if name not in PASSING}
    if "prev_comfy_cast_weights" in attributes:
        kept["comfy_cast_weights"] = attributes["prev_comfy_cast_weights"]
    for name, rest in _AT_REST.items():
        if name in kept:
            kept[name] = rest
    options = kept.get("options_default")
    if isinstance(options, tuple) and "execution_device" in kept:  # an SDClipModel between two encodings
        kept.update(zip(_CLIP_OPTIONS, cast("tuple[object, ...]", options), strict=False))
        kept["execution_device"] = None
    if "model_loaded_weight_memory" in kept:
        kept["device"] = None
    return kept


# --- devices --------------------------------------------------------------------------------------


def _management() -> Any:
    return sys.modules["comfy.model_management"]


_ROLES = {
    "load": "get_torch_device",
    "text": "text_encoder_device",
    "vae": "vae_device",
    "offload": "unet_offload_device",
    "text_offload": "text_encoder_offload_device",
    "vae_offload": "vae_offload_device",
    "between": "intermediate_device",
}


def role_of(device: Any, *roles: str) -> str:
    """Which of these roles a device plays in this process; ``host`` where it plays none and is the CPU."""
    management = _management()
    for role in roles:
        if getattr(management, _ROLES[role])() == device:
            return role
    return "host" if device.type == "cpu" else "load"


def device_by_role(role: str) -> Any:
    """The device of this process that plays it. ValueError for no role."""
    if role == "host":
        return torch.device("cpu")
    if role not in _ROLES:
        raise ValueError(f"no role of a device: {role!r:.40}")
    return getattr(_management(), _ROLES[role])()


# --- what is patched into a model just now ----------------------------------------------------------


def current_weights(root: Any, patchers: list[Any]) -> dict[tuple[int, str], object]:
    """What a model holds when nothing is patched into it, where that differs: by owner's id and attribute."""
    found: dict[tuple[int, str], object] = {}
    for patcher in patchers:
        for key, item in getattr(patcher, "hook_backup", {}).items():
            found[_owner(root, key)] = item[0]
        for key, item in patcher.backup.items():
            found[_owner(root, key)] = item.weight
        for key, item in getattr(patcher, "backup_buffers", {}).items():
            found[_owner(root, key)] = item
        for key, item in patcher.object_patches_backup.items():
            found[_owner(root, key)] = item
    return found


def _owner(root: Any, key: str) -> tuple[int, str]:
    *path, name = key.split(".")
    for step in path:
        root = getattr(root, step)
    return id(root), name


def blank_module(module: Any) -> None:
    """A model that has just been built is loaded nowhere."""
    for name, rest in _AT_REST.items():
        if hasattr(module, name):
            setattr(module, name, rest)


# --- objects that have a text of their own ----------------------------------------------------------

_refs: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_ref_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _hook_ref_name(value: Any) -> str:
    """Hooks are equal where they share this object, so it stays one object, whichever way it comes."""
    name = _ref_names.setdefault(value, uuid.uuid4().hex)
    _refs[name] = value
    return name


def _hook_ref(name: str) -> Any:
    found = _refs.get(name)
    if found is None:
        found = sys.modules["comfy.hooks"]._HookRef()
        _refs[name] = found
        _ref_names[found] = name
    return found


def _device(text: str) -> Any:
    return (
        torch.device("cpu")
        if text == "cpu"
        else device_by_role("load")
        if text == "load"
        else torch.device(text)
    )


def _library(name: str) -> Any:
    return importlib.import_module(name)


def _tokenizer(text: str) -> Any:
    return _library("tokenizers").Tokenizer.from_str(text)


def _added_token(state: dict[str, Any]) -> Any:
    return _library("tokenizers").AddedToken(**state)


def _sentence_pieces(payload: bytes) -> Any:
    return _library("sentencepiece").SentencePieceProcessor(model_proto=payload)


def _bytes_io(state: tuple[bytes, int]) -> Any:
    made = io.BytesIO(state[0])
    made.seek(state[1])
    return made


def _pattern(state: tuple[str, str, int]) -> Any:
    library, pattern, flags = state
    if library not in ("re", "regex"):
        raise ValueError(f"no library of patterns: {library!r:.40}")
    return _library(library).compile(pattern, flags)


_REDUCE: dict[tuple[str, str], tuple[str, Callable[[Any], object]]] = {
    ("torch", "device"): ("device", lambda value: value.type if value.type in ("cpu", "meta") else "load"),
    ("uuid", "UUID"): ("uuid", lambda value: value.bytes),
    ("re", "Pattern"): ("pattern", lambda value: ("re", value.pattern, value.flags)),
    ("_regex", "Pattern"): ("pattern", lambda value: ("regex", value.pattern, value.flags)),
    ("regex._regex", "Pattern"): ("pattern", lambda value: ("regex", value.pattern, value.flags)),
    ("tokenizers", "Tokenizer"): ("tokenizer", lambda value: value.to_str()),
    ("tokenizers", "AddedToken"): (
        "added_token",
        lambda value: {
            name: getattr(value, name)
            for name in ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        },
    ),
    ("sentencepiece", "SentencePieceProcessor"): ("pieces", lambda value: value.serialized_model_proto()),
    ("_io", "BytesIO"): ("bytes_io", lambda value: (value.getvalue(), value.tell())),
    ("comfy.hooks", "_HookRef"): ("hook_ref", _hook_ref_name),
}
_RESTORE: dict[str, Callable[[Any], object]] = {
    "device": _device,
    "uuid": lambda payload: uuid.UUID(bytes=payload),
    "pattern": _pattern,
    "tokenizer": _tokenizer,
    "added_token": _added_token,
    "pieces": _sentence_pieces,
    "bytes_io": _bytes_io,
    "hook_ref": _hook_ref,
}


def reduced(value: Any) -> tuple[str, object] | None:
    """The name and the state of an object of another library that has a text of its own."""
    kind = kind_of(value)
    known = _REDUCE.get((kind.__module__, kind.__qualname__))
    return None if known is None else (known[0], known[1](value))


def restored(name: str, state: Any) -> object:
    """The object again. ValueError for an unknown name, and what its library raises for another state."""
    if name not in _RESTORE:
        raise ValueError(f"nothing is called {name!r:.40}")
    return _RESTORE[name](state)
