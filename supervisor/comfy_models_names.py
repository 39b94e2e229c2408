"""Which classes and functions a model may be made of, and how they are named across processes.

    class, function ── name_of ──▶ [kind, module, name ...]      find ──▶ the very same of the other process

Owns the allow-list. What has a name is found by it, in an allowed module only, and must say itself that it is
of that module. What has none (a lambda, a function or class made inside of a function, as most of ComfyUI's
own model patches are) is found by a digest of its code among the code objects of an allowed module's own
source: a peer can choose among the code that is installed here, and never bring any. Nothing is called here.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any, cast

from legion_shm.errors import UnsupportedValue

__all__ = ["ALLOWED", "Names", "unwrapped"]

ALLOWED = (
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "comfy_kitchen",
    "node_helpers",
    "nodes",
    "spandrel",
    "spandrel_extra_arches",
    "torch.nn",
    "torchvision.models.optical_flow",
    "torchvision.ops.misc",
    "transformers",
)
"""Packages whose classes and functions models are made of."""

_NATIVE = ("torch.nn.functional", "torch", "math", "operator")
"""Modules whose functions written in C may be attributes of a model, as activations are."""

_NOT_NATIVE = frozenset({"from_file"})
_BUILTINS: dict[str, type] = {
    kind.__name__: kind
    for kind in (object, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, type(None))
}

_PATHS = ("comfy_extras", "custom_nodes")
"""Folders whose files ComfyUI loads as modules that are named by their path."""


def unwrapped(item: object) -> object:
    """The function of a static or class method."""
    return cast(Any, item).__func__ if isinstance(item, (staticmethod, classmethod)) else item


class Names:
    """The allow-list of a process, and the lookup of what it allows."""

    def __init__(self, allowed: tuple[str, ...] = ALLOWED) -> None:
        self._allowed = set(allowed)
        self._codes: dict[str, dict[str, types.CodeType]] = {}
        self._digests: dict[types.CodeType, str] = {}

    def allow(self, *packages: str) -> None:
        """Allow these modules and packages, with what is in them; ``custom_nodes/PACK`` for a node pack."""
        self._allowed.update(packages)

    def allows(self, module: str) -> bool:
        if module.startswith("@"):
            module = module[1:].replace("/", ".")
        parts = module.split(".")
        names = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        return not self._allowed.isdisjoint(names | {name.replace(".", "/") for name in names})

    # --- modules ------------------------------------------------------------------------------------------

    def module_name(self, module: str) -> str:
        """What a module is called on the wire: its name, or ``@folder/file`` where a path is its name.

        Or where it is a file of ComfyUI's own folder that was imported as if it were a package of its own.
        """
        if os.sep not in module:
            return f"@comfy/{module}" if _is_bare(module) else module
        for folder, root in _path_roots():
            if module.startswith(root + os.sep):
                return f"@{folder}/{module[len(root) + 1 :].replace(os.sep, '/')}"
        return module

    def module(self, name: str) -> types.ModuleType:
        """The module of that wire name, imported if it has to be. Raises LookupError."""
        if not self.allows(name):
            raise LookupError(f"{name} is not among the packages that models may use here")
        found = None
        if name.startswith("@"):
            folder, _, rest = name[1:].partition("/")
            if folder == "comfy":
                if _is_bare(rest):
                    return sys.modules[rest]
                raise LookupError(f"ComfyUI's {rest}.py is not loaded by that name here")
            for known, root in _path_roots():
                if known == folder:
                    found = found or sys.modules.get(os.path.join(root, *rest.split("/")))
            name = f"{folder}.{rest.replace('/', '.')}"
            if found is None and folder != "comfy_extras":
                raise LookupError(f"the node pack {rest.split('/')[0]!r} is not loaded here")
        if found is None:
            try:
                found = importlib.import_module(name)
            except ImportError as error:
                raise LookupError(f"{name} can't be imported here ({error})") from error
        return found

    # --- classes and functions that have a name -----------------------------------------------------------

    def named(self, item: Any) -> list[str] | None:
        """The module and the name by which the other side finds ``item``; None where it has no such name.

        Raises UnsupportedValue for what is not allowed.
        """
        module, qualname = _origin(item)
        if isinstance(item, type) and _BUILTINS.get(qualname) is item:
            return ["builtins", qualname]
        if isinstance(item, types.BuiltinFunctionType):
            name = str(cast(Any, item).__name__)
            for native in _NATIVE:
                if native in sys.modules and vars(sys.modules[native]).get(name) is item:
                    return [native, name]
        wire = self.module_name(module)
        if not self.allows(wire):
            raise UnsupportedValue(
                f"{module}.{qualname} is not of a package that models may use; allow it on both sides, "
                "as docs/models.md says, or keep the model in its process",
                path="",
            )
        loaded = sys.modules.get(module)
        if loaded is None or unwrapped(_walk(loaded, qualname)) is not item:
            return None
        return [wire, qualname]

    def find(self, module: str, qualname: str) -> Any:
        """The class or function of that name. Raises LookupError."""
        if module == "builtins":
            if qualname in _BUILTINS:
                return _BUILTINS[qualname]
            raise LookupError(f"builtins.{qualname} is not allowed")
        if module in _NATIVE and qualname not in _NOT_NATIVE:
            native = vars(importlib.import_module(module)).get(qualname)
            if isinstance(native, types.BuiltinFunctionType):
                return native
        loaded = self.module(module)
        item = unwrapped(_walk(loaded, qualname))
        if not isinstance(item, (type, types.FunctionType)) or _origin(item) != (loaded.__name__, qualname):
            raise LookupError(f"{module} has no class or function {qualname}")
        return item

    # --- code that has none -------------------------------------------------------------------------------

    def code_of(self, function: types.FunctionType) -> list[str]:
        """The module and the digest by which the other side finds the code of ``function``.

        Raises UnsupportedValue where it is not part of the source of an allowed module.
        """
        module = function.__module__
        wire = self.module_name(module)
        name = f"{module}.{function.__qualname__}"
        if not self.allows(wire):
            raise UnsupportedValue(
                f"the function {name} is not of a package that models may use; allow it on both sides, as "
                "docs/models.md says",
                path="",
            )
        loaded = sys.modules.get(module)
        digest = self._digest(function.__code__)
        if loaded is None or function.__globals__ is not vars(loaded) or digest not in self._index(loaded):
            raise UnsupportedValue(
                f"the function {name} is not in the source of its module, so the other process can't have it",
                path="",
            )
        return [wire, digest]

    def code(self, module: str, digest: str) -> tuple[types.CodeType, dict[str, Any]]:
        """The code of that digest in an allowed module's source, and the module's globals. LookupError."""
        loaded = self.module(module)
        found = self._index(loaded).get(digest)
        if found is None:
            raise LookupError(
                f"{module} is not the same here: it has no such function. Both sides need the same version"
            )
        return found, vars(loaded)

    def _index(self, module: types.ModuleType) -> dict[str, types.CodeType]:
        index = self._codes.get(module.__name__)
        if index is None:
            spec: Any = module.__spec__
            loader: Any = getattr(spec, "loader", None)
            name = str(getattr(spec, "name", module.__name__))
            source = loader.get_code(name) if hasattr(loader, "get_code") else None
            index = {} if source is None else {self._digest(code): code for code in _nested(source)}
            self._codes[module.__name__] = index
        return index

    def _digest(self, code: types.CodeType) -> str:
        found = self._digests.get(code)
        if found is None:
            parts = hashlib.blake2b(digest_size=16)
            for part in (
                code.co_name,
                code.co_code,
                code.co_names,
                code.co_varnames,
                code.co_freevars,
                code.co_cellvars,
                code.co_argcount,
                code.co_posonlyargcount,
                code.co_kwonlyargcount,
                code.co_flags,
                [self._digest(c) if isinstance(c, types.CodeType) else _constant(c) for c in code.co_consts],
            ):
                parts.update(repr(part).encode("utf-8", "surrogatepass"))
                parts.update(b"\0")
            found = self._digests[code] = parts.hexdigest()
        return found


def _constant(value: object) -> object:
    # A frozenset's order is another in each process.
    return (
        ("frozenset", sorted(map(repr, cast("frozenset[object]", value))))
        if isinstance(value, frozenset)
        else (type(value).__name__, value)
    )


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _nested(constant)


def _origin(item: Any) -> tuple[str, str]:
    return str(getattr(item, "__module__", "")), str(getattr(item, "__qualname__", ""))


def _walk(module: types.ModuleType, qualname: str) -> object:
    """Through namespaces, not by getattr, which may run code."""
    place: object = module
    for part in qualname.split("."):
        place = vars(place).get(part) if isinstance(place, (types.ModuleType, type)) else None
    return place


def _is_bare(module: str) -> bool:
    """Whether that module, which is loaded, is one of ``comfy/*.py`` under its bare name."""
    management, loaded = sys.modules.get("comfy.model_management"), sys.modules.get(module)
    if "." in module or hasattr(loaded, "__path__"):
        return False
    file, root = getattr(loaded, "__file__", None), getattr(management, "__file__", None)
    return bool(file and root) and os.path.dirname(str(file)) == os.path.dirname(str(root))


def _path_roots() -> list[tuple[str, str]]:
    """The folders that `_PATHS` names, of the ComfyUI in this process, as prefixes of module names."""
    management = sys.modules.get("comfy.model_management")
    if management is None or not management.__file__:
        return []
    root = os.path.dirname(os.path.dirname(os.path.abspath(management.__file__)))
    found = [(folder, os.path.join(root, folder)) for folder in _PATHS]
    paths: Any = sys.modules.get("folder_paths")
    if paths is not None:
        found += [("custom_nodes", str(path)) for path in paths.get_folder_paths("custom_nodes")]
    # Of a folder ComfyUI makes a module name by spelling its dots out.
    return found + [(folder, path.replace(".", "_x_")) for folder, path in found if "." in path]
