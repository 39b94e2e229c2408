"""What ComfyUI's own loaders were asked for: which call made which model, from which files.

    comfy.sd.load_diffusion_model(path) ──▶ MODEL
                      └──▶ Loaded: the loader's name, its arguments, the files as they were

Owns the loaders that are known, the watch over them, and calling one again. A watched loader is called as it
is and returns what it returns; only its call is noted, for as long as the model lives. It imports neither
torch nor ComfyUI.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

__all__ = [
    "FileMark",
    "Loaded",
    "call_loader",
    "check_file",
    "forget_loaded",
    "loaded_by",
    "mark_of",
    "watch_loaders",
]

_log = logging.getLogger("legion_shm.supervisor")

_WATCHED = "__legion_watched__"
_OWNERS = frozenset({"self", "cls"})
"""Arguments that say whose method a loader is."""

Part = tuple[Any, Any]
"""A torch module, and the patcher that its loader gave it or None."""


@dataclass(frozen=True)
class FileMark:
    """A file as it was: path, and what is another number once it was replaced or written."""

    path: str
    device: int
    inode: int
    nbytes: int
    changed_ns: int

    def as_state(self) -> list[Any]:
        return [self.path, self.device, self.inode, self.nbytes, self.changed_ns]


def mark_of(path: str) -> FileMark:
    """The file as it is now. Raises OSError."""
    found = os.stat(path)
    return FileMark(os.path.abspath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Loaded:
    """One torch module that a loader made. ``state``: what was looked at of it right then."""

    loader: str
    part: int
    arguments: Mapping[str, Any]
    files: tuple[FileMark, ...]
    state: object


@dataclass(frozen=True)
class _Loader:
    """``narrow`` changes the arguments so that no more than one part is loaded.

    In place of a module it may name the ``node`` whose class has the loader.
    """

    module: str
    name: str
    files: Callable[[Mapping[str, Any]], Sequence[str]]
    parts: Callable[[Any], Sequence[Part]]
    narrow: Callable[[Mapping[str, Any], int], Mapping[str, Any]] = lambda arguments, _part: arguments
    node: str = ""

    def owner(self) -> Any:
        """The module or class that has the loader; None where it isn't loaded."""
        found: Any = sys.modules.get(self.module)
        if self.node:
            return getattr(found, "NODE_CLASS_MAPPINGS", {}).get(self.node)
        for step in self.name.split(".")[:-1]:
            found = getattr(found, step, None)
        return found

    def attribute_of(self, owner: Any) -> Any:
        return None if owner is None else cast("dict[str, Any]", vars(owner)).get(self.attribute)

    def function(self) -> types.FunctionType | None:
        found = self.attribute_of(self.owner())
        function = getattr(found, "__func__", found)
        return function if isinstance(function, types.FunctionType) else None

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """What it makes of these arguments, without the one that says whose method it is."""
        owner, function = self.owner(), self.function()
        assert function is not None
        if isinstance(self.attribute_of(owner), classmethod):
            return function(owner, **arguments)
        return function(owner(), **arguments) if isinstance(owner, type) else function(**arguments)

    def watch(self, key: str) -> None:
        """Note what it makes from now on."""
        function, owner = self.function(), self.owner()
        if function is not None and not hasattr(function, _WATCHED):
            watched: Any = _watched(key, self, function)
            of_class = isinstance(self.attribute_of(owner), classmethod)
            setattr(owner, self.attribute, classmethod(watched) if of_class else watched)

    @property
    def attribute(self) -> str:
        return self.name.rpartition(".")[2]


def _path(name: str) -> Callable[[Mapping[str, Any]], Sequence[str]]:
    return lambda arguments: [arguments[name]]


def _file_of(folder: str, name: str) -> Callable[[Mapping[str, Any]], Sequence[str]]:
    def files(arguments: Mapping[str, Any]) -> Sequence[str]:
        path = _folder_paths().get_full_path(folder, arguments[name])
        if path is None:
            raise LookupError(f"it is no file of the folder {folder}")
        return [path]

    return files


def _attribute(name: str, patcher: str = "") -> Callable[[Any], Part]:
    return lambda made: (getattr(made, name, None), getattr(made, patcher, None) if patcher else None)


def _model(made: Any) -> Part:
    return made.model, made


_CLIP = _attribute("cond_stage_model", "patcher")
_VAE = _attribute("first_stage_model", "patcher")
_WRAPPED = _attribute("model", "patcher")
_OF_CHECKPOINT = (_model, _CLIP, _VAE, _WRAPPED)
_OUTPUTS = ("output_model", "output_clip", "output_vae", "output_clipvision")


def _checkpoint_parts(made: Any) -> Sequence[Part]:
    return [
        (None, None) if item is None else read(item) for read, item in zip(_OF_CHECKPOINT, made, strict=False)
    ]


def _checkpoint_part(arguments: Mapping[str, Any], part: int) -> Mapping[str, Any]:
    return {**arguments, **{name: number == part for number, name in enumerate(_OUTPUTS)}}


def _one(read: Callable[[Any], Part]) -> Callable[[Any], Sequence[Part]]:
    return lambda made: [read(made)]


_LOADERS: dict[str, _Loader] = {
    f"{loader.module}.{loader.name}": loader
    for loader in (
        _Loader(
            "comfy.sd",
            "load_checkpoint_guess_config",
            _path("ckpt_path"),
            _checkpoint_parts,
            _checkpoint_part,
        ),
        _Loader("comfy.sd", "load_diffusion_model", _path("unet_path"), _one(_model)),
        _Loader("comfy.sd", "load_clip", lambda arguments: arguments["ckpt_paths"], _one(_CLIP)),
        _Loader("comfy.sd", "load_style_model", _path("ckpt_path"), _one(_attribute("model"))),
        _Loader(
            "comfy.controlnet",
            "load_controlnet",
            _path("ckpt_path"),
            _one(_attribute("control_model", "control_model_wrapped")),
        ),
        _Loader("comfy.clip_vision", "load", _path("ckpt_path"), _one(_WRAPPED)),
        _Loader("comfy.sd", "load_gligen", _path("ckpt_path"), _one(_model)),
        _Loader("nodes", "VAELoader.load_vae", _file_of("vae", "vae_name"), lambda made: [_VAE(made[0])]),
        _Loader(
            "nodes",
            "UpscaleModelLoader.execute",
            _file_of("upscale_models", "model_name"),
            lambda made: [_WRAPPED(made.args[0])],
            node="UpscaleModelLoader",
        ),
    )
}
"""By their names on the wire."""

_loaded: weakref.WeakKeyDictionary[Any, Loaded] = weakref.WeakKeyDictionary()


def loaded_by(module: Any) -> Loaded | None:
    """How this torch module was loaded, if a watched loader made it."""
    return _loaded.get(module)


def forget_loaded(module: Any) -> None:
    """This module is no longer what its loader made."""
    _loaded.pop(module, None)


def watch_loaders() -> None:
    """Note from now on what the loaders of the ComfyUI in this process make. Once is enough."""
    for key, loader in _LOADERS.items():
        loader.watch(key)


def _watched(key: str, loader: _Loader, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load(*given: Any, **named: Any) -> Any:
        noted: tuple[Mapping[str, Any], tuple[FileMark, ...]] | None = None
        try:
            bound = signature.bind(*given, **named)
            bound.apply_defaults()
            arguments = {name: _copied(item) for name, item in bound.arguments.items() if name not in _OWNERS}
            noted = arguments, tuple(mark_of(path) for path in loader.files(arguments))
        except Exception as error:  # it goes by reference then; the loader says what is wrong with the call
            _log.debug("a call of %s can't be repeated elsewhere: %r", key, error)
        made = original(*given, **named)
        if noted is not None:
            try:
                _note(key, loader, made, *noted)
            except Exception as error:
                _log.debug("what %s made can't be made elsewhere: %r", key, error)
        return made

    setattr(load, _WATCHED, True)
    return load


def _note(
    key: str, loader: _Loader, made: Any, arguments: Mapping[str, Any], files: tuple[FileMark, ...]
) -> None:
    from legion_shm.supervisor.comfy_models_recipes import state_of

    if files != tuple(mark_of(mark.path) for mark in files):
        return  # written while it was read
    for part, (module, _) in enumerate(loader.parts(made)):
        if module is not None:
            _loaded[module] = Loaded(key, part, arguments, files, state_of(module))


_PLAIN = (type(None), bool, int, float, str)


def _copied(value: Any) -> Any:
    """Plain data, as it is at the time of the call. Raises TypeError for anything else."""
    kind = cast("type[object]", type(value))
    if kind in _PLAIN:
        return value
    if kind in (list, tuple):
        copies = [_copied(item) for item in cast("Sequence[Any]", value)]
        return copies if kind is list else tuple(copies)
    if kind is dict:
        items = cast("Mapping[Any, Any]", value).items()
        return {_copied(key): _copied(item) for key, item in items}
    if (kind.__module__, kind.__qualname__) in (("torch", "dtype"), ("comfy.sd", "CLIPType")):
        return value
    raise TypeError(f"{kind.__module__}.{kind.__qualname__} is not plain data")


# --- calling one again ----------------------------------------------------------------------------------


def call_loader(
    key: str, part: int, arguments: Mapping[str, Any], files: Sequence[FileMark]
) -> tuple[Any, Any]:
    """The torch module and its patcher, or None, loaded here by the same call.

    Raises LookupError, which says why, for what this process can't or may not load.
    """
    loader = _LOADERS.get(key)
    function = None if loader is None else loader.function()
    if loader is None or function is None:
        raise LookupError(f"this process has no loader {key!r:.60}")
    try:
        paths = [os.path.abspath(path) for path in loader.files(arguments)]
    except (LookupError, TypeError) as error:
        raise LookupError(f"its files are not found here: {error}") from None
    if paths != [mark.path for mark in files]:
        raise LookupError(f"{key} would read {paths} here, and not {[mark.path for mark in files]}")
    for mark in files:
        check_file(mark)
    narrowed = loader.narrow(arguments, part)
    known = inspect.signature(function).parameters
    if not set(narrowed) <= set(known):
        raise LookupError(f"the loader {key} takes other arguments here: both sides need one ComfyUI")
    try:
        made = loader.call(narrowed)
        parts = loader.parts(made)
        module, patcher = parts[part] if 0 <= part < len(parts) else (None, None)
    except Exception as error:
        raise LookupError(f"{key} failed here with {paths}: {error!r:.300}") from error
    if module is None:
        raise LookupError(f"{key} gave no such model here of {paths}")
    return module, patcher


def check_file(mark: FileMark) -> None:
    """LookupError where the file is not the one that was marked, or lies outside of all model folders."""
    advice = "send the model by reference (WorkerSpec(models='reference'))"
    path = os.path.abspath(mark.path)  # links in those folders are their owner's wish
    if not any(path.startswith(folder + os.sep) for folder in _model_folders()):
        raise LookupError(
            f"{mark.path} is in none of the model folders of this ComfyUI; give the worker the same folders "
            f"(extra_args: --extra-model-paths-config, --base-directory), or {advice}"
        )
    try:
        now = mark_of(mark.path)
    except OSError as error:
        raise LookupError(f"{mark.path} can't be read: {error}; {advice}") from None
    if now != mark:
        raise LookupError(
            f"{mark.path} has changed since the model was loaded from it; load it again, or {advice}"
        )


def _folder_paths() -> Any:
    found: Any = sys.modules.get("folder_paths")
    if found is None:
        raise LookupError("there is no ComfyUI in this process")
    return found


def _model_folders() -> Iterator[str]:
    for name, (paths, _) in _folder_paths().folder_names_and_paths.items():
        if name != "custom_nodes":
            yield from map(os.path.abspath, paths)
