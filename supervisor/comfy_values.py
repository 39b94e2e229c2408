"""ComfyUI's own classes as values: which of them cross, found by name in whichever ComfyUI is loaded.

Owns the allow-list. Classes on it cross by their fields; functions of ComfyUI's own modules by name (what
a sampler, a latent operation or a hook refers to), and those made inside of a function with what they close
over, if the receiver's ComfyUI has the very same code. It imports nothing of ComfyUI: a process that has none
loaded refuses these values by name. Models are not among them.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Iterator
from typing import Any, cast

from legion_shm.errors import UnsupportedValue
from legion_shm.transport.codec import VALUE_TYPES, ValueType
from legion_shm.transport.codec_objects import find_class, plain_type

__all__ = ["ComfyValues", "install_comfy_values"]

_PACKAGES = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "node_helpers")

_VALUE_MODULES = (
    "comfy.hooks",
    "comfy.nested_tensor",
    "comfy.weight_adapter",
    "comfy_api.input",
    "comfy_api.input_impl",
    "comfy_api.latest._input",
    "comfy_api.latest._input_impl",
    "comfy_api.latest._util",
    "comfy_api.util",
)
"""Modules and packages that define values and nothing that holds a resource."""

_CLASSES = {
    ("comfy.clip_vision", "Output"),
    ("comfy.ldm.trellis2.vae", "SparseTensor"),
    ("comfy.ldm.trellis2.vae", "VarLenTensor"),
    ("comfy.samplers", "KSAMPLER"),
    ("comfy_extras.nodes_hunyuan3d", "VOXEL"),
    ("comfy_extras.nodes_hunyuan3d", "MESH"),
}
_BASES = {("comfy.samplers", "KSAMPLER")}
_NOISE = ("comfy_extras.nodes_custom_sampler", "Noise_")
_MODULE_CLASSES = {("torch.nn.modules.module", "Module")}

_BY_NAME, _BY_PATH = "comfy", "comfy-path"
_FUNCTION = "comfy:function"
_LOCALS = ".<locals>."


def install_comfy_values() -> None:
    """Make ComfyUI's values known to this process's registry; once is enough, twice does nothing more."""
    global _installed
    if not _installed:
        _installed = True
        VALUE_TYPES.add_source(ComfyValues())


_installed = False


class ComfyValues:
    """A `CodecSource` for the classes of the allow-list and for functions of ComfyUI's modules."""

    def for_class(self, cls: type) -> ValueType | None:
        if cls is types.FunctionType:
            return _FUNCTIONS
        module = _public_name(cls.__module__)
        if not _allowed(module, cls):
            return None
        kind = _BY_NAME if cls.__module__ == module else _BY_PATH
        return plain_type(f"{kind}:{module}:{cls.__qualname__}", cls)

    def for_name(self, name: str) -> ValueType | None:
        if name == _FUNCTION:
            return _FUNCTIONS
        parts = name.split(":")
        if len(parts) != 3 or parts[0] not in (_BY_NAME, _BY_PATH):
            return None
        kind, public, qualname = parts
        reason: LookupError | None = None
        # A module of extra nodes may be loaded twice, by its name and by its path, with two classes.
        for module in sorted(
            _modules(public), key=lambda module: (module.__name__ == public) != (kind == _BY_NAME)
        ):
            try:
                cls = find_class(module.__name__, qualname)
            except LookupError as error:
                reason = error
                continue
            if _allowed(public, cls):
                return plain_type(name, cls)
        raise reason or LookupError(f"its module {public} is not loaded; the class is one of ComfyUI's")


def _public_name(module: str) -> str:
    """ComfyUI loads extra nodes by their paths: a class of theirs is of module /any/where/comfy_extras/x."""
    head, found, tail = module.replace("\\", "/").rpartition("/comfy_extras/")
    return f"comfy_extras.{tail.replace('/', '.')}" if found and head else module


def _modules(public: str) -> Iterator[types.ModuleType]:
    """Every loaded module of that public name; one of ComfyUI's packages, or none."""
    if public.partition(".")[0] not in _PACKAGES:
        return
    for key in (public, *(key for key in tuple(sys.modules) if _is_path_of(key, public))):
        module = sys.modules.get(key)
        if isinstance(module, types.ModuleType) and _public_name(module.__name__) == public:
            yield module


def _is_path_of(key: str, public: str) -> bool:
    return "comfy_extras" in key and key != public and _public_name(key) == public


def _allowed(module: str, cls: type) -> bool:
    if module.partition(".")[0] not in _PACKAGES:
        return False
    bases = {(_public_name(base.__module__), base.__qualname__) for base in cls.__mro__}
    if bases & _MODULE_CLASSES:
        return False
    return (
        (module, cls.__qualname__) in _CLASSES
        or any(module == known or module.startswith(f"{known}.") for known in _VALUE_MODULES)
        or bool(bases & _BASES)
        or (module == _NOISE[0] and cls.__qualname__.startswith(_NOISE[1]))
    )


# --- functions -----------------------------------------------------------------------------------------


def _reduce_function(function: types.FunctionType) -> object:
    module = _public_name(function.__module__ or "")
    qualname = function.__qualname__
    shown = f"function {module}.{qualname}"
    if module.partition(".")[0] not in _PACKAGES:
        raise UnsupportedValue(f"{shown} is not one of ComfyUI's own; functions can't be sent")
    if _LOCALS not in qualname:
        if not any(_named(place, qualname) is function for place in _modules(module)):
            raise UnsupportedValue(f"{shown} is not what its module has by that name, so it can't be sent")
        return (module, qualname, None)
    if not any(_inner_code(place, qualname, _digest(function.__code__)) for place in _modules(module)):
        raise UnsupportedValue(f"{shown} can't be found again in its module, so it can't be sent")
    try:
        cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    except ValueError:
        raise UnsupportedValue(f"{shown} closes over a variable that has no value yet") from None
    state = (_digest(function.__code__), cells, function.__defaults__, function.__kwdefaults__)
    return (module, qualname, state)


def _rebuild_function(state: object) -> object:
    module, qualname, inner = _checked(state, 3)
    if type(module) is not str or type(qualname) is not str:
        raise ValueError("its name is not a text")
    if inner is None:
        for place in _modules(module):
            found = _named(place, qualname)
            if found is not None:
                return found
        raise UnsupportedValue(f"function {module}.{qualname} is not in the ComfyUI of this process")
    digest, cells, defaults, named = _checked(inner, 4)
    held = _checked(cells)
    if type(defaults) not in (tuple, type(None)):
        raise ValueError("its defaults are not a tuple")
    if type(named) not in (dict, type(None)):
        raise ValueError("its defaults are not named")
    for place in _modules(module):
        code = _inner_code(place, qualname, digest)
        if code is not None and len(code.co_freevars) == len(held):
            closure = tuple(types.CellType(cell) for cell in held)
            function = types.FunctionType(code, vars(place), code.co_name, defaults, closure)
            function.__kwdefaults__ = named
            function.__qualname__, function.__module__ = qualname, place.__name__
            return function
    raise UnsupportedValue(
        f"function {module}.{qualname} is not the same in the ComfyUI of this process; both processes need "
        "the same version of ComfyUI and of Python"
    )


def _checked(state: object, count: int | None = None) -> tuple[Any, ...]:
    items = cast("tuple[Any, ...]", state)
    if type(state) is not tuple or count not in (None, len(items)):
        raise ValueError("its state is not what was reduced")
    return items


def _named(place: types.ModuleType, qualname: str) -> types.FunctionType | None:
    found: Any = place
    for part in qualname.split("."):
        found = vars(found).get(part) if isinstance(found, (types.ModuleType, type)) else None
        if isinstance(found, (staticmethod, classmethod)):
            found = cast("object", found.__func__)
    return found if type(found) is types.FunctionType else None


def _inner_code(place: types.ModuleType, qualname: str, digest: object) -> types.CodeType | None:
    """The code of a function made inside of another one, by the names on the way and by what it does."""
    outer, *inner = qualname.split(_LOCALS)
    function = _named(place, outer)
    codes = [] if function is None else [_innermost(function).__code__]
    for name in inner:
        codes = [
            item
            for code in codes
            for item in code.co_consts
            if isinstance(item, types.CodeType) and item.co_name == name.rpartition(".")[2]
        ]
    return next((code for code in codes if _digest(code) == digest), None)


def _innermost(function: types.FunctionType) -> types.FunctionType:
    """Behind decorators."""
    for _ in range(10):
        wrapped = vars(function).get("__wrapped__")
        if type(wrapped) is not types.FunctionType:
            break
        function = wrapped
    return function


def _digest(code: types.CodeType) -> bytes:
    parts = (code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_argcount)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


_FUNCTIONS = ValueType(_FUNCTION, types.FunctionType, _reduce_function, _rebuild_function)
