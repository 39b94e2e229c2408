"""Objects of Python classes by their fields: enums, named tuples, dataclasses, attrs and pydantic classes.

    object ── fields ──▶ state        state ── a blank instance, fields set ──▶ object

What a peer sends names a class and gives its fields, and the peer may be broken or hostile. So: the class is
looked up in modules that are loaded already (or that this process's owner allowed to be imported), never
imported because a peer says so; it must be of one of these kinds, and without a finalizer; and nothing of it
is called: no `__new__`, `__init__`, `__post_init__`, validator, setter or hash. What arrives is data of that
class, as trustworthy as the peer.
"""

from __future__ import annotations

import enum
import importlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from legion_shm.transport.codec_registry import ValueType, class_name

__all__ = ["Records", "fields_of", "find_class", "plain_type", "with_fields"]

_MEMBER: type = types.MemberDescriptorType
_NOT_STATE = frozenset({"__dict__", "__weakref__"})


def find_class(module: str, qualname: str, importable: Callable[[str], bool] = lambda _: False) -> type:
    """The class of that very name. Raises `LookupError` saying what is missing; runs no code of the module's.

    Modules are imported only where ``importable`` allows it.
    """
    found = sys.modules.get(module)
    if found is None and importable(module):
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise LookupError(f"its module {module} can't be imported ({error})") from error
    if found is None:
        raise LookupError(f"its module {module} is not loaded")
    place: Any = found
    for part in qualname.split("."):
        # Not getattr: a module's or a metaclass's own __getattr__ would run.
        place = vars(place).get(part) if isinstance(place, (types.ModuleType, type)) else None
    if not isinstance(place, type) or place.__module__ != module or place.__qualname__ != qualname:
        raise LookupError(f"module {module} has no class {qualname}")
    return place


def _slots(cls: type) -> dict[str, Any]:
    """The descriptors of an instance's slots, by name."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__[:-1]):
        slots = {name: item for name, item in vars(base).items() if type(item) is _MEMBER}
        found.update((name, item) for name, item in slots.items() if name not in _NOT_STATE)
    return found


def fields_of(value: object) -> dict[str, object]:
    """The state of an instance of a Python class: its slots that are set, then its `__dict__`, in order."""
    state: dict[str, object] = {}
    for name, slot in _slots(type(value)).items():
        try:
            state[name] = slot.__get__(value)
        except AttributeError:  # not set
            continue
    state.update(getattr(value, "__dict__", ()))
    return state


def with_fields(cls: type, state: object) -> object:
    """A blank instance with these fields; nothing of the class is called. ValueError for other states."""
    if type(state) is not dict:
        raise ValueError("its fields are not a dict")
    named = cast("dict[object, object]", state)
    value: object = object.__new__(cast(Any, cls))
    slots = _slots(cls)
    attributes: dict[str, object] | None = getattr(value, "__dict__", None)
    for name, item in named.items():
        if type(name) is not str:
            raise ValueError(f"a field's name is {name!r:.40}")
        slot = slots.get(name)
        if slot is not None:
            slot.__set__(value, item)
        elif attributes is not None:
            attributes[name] = item
        else:
            raise ValueError(f"the class has no field {name!r:.40}")
    return value


def unfit(cls: type) -> str | None:
    """Why blank instances of a class can't be made safely, or None."""
    if any("__del__" in vars(base) for base in cls.__mro__):
        return "it has a finalizer (__del__)"
    try:
        object.__new__(cast(Any, cls))
    except TypeError as error:
        return f"it is not a plain Python class ({error})"
    return None


def plain_type(name: str, cls: type) -> ValueType:
    """A value type that carries the fields of an instance, for a class that its caller has allowed.

    Raises LookupError where no blank instance of the class can be made.
    """
    reason = unfit(cls)
    if reason is not None:
        raise LookupError(f"{class_name(cls)} can't be sent by its fields: {reason}; register a codec for it")
    return ValueType(
        name,
        cls,
        fields_of,
        lambda state: with_fields(cls, state),
        hashable=_hash_is_generated(cls),
        by_fields=True,
    )


def _hash_is_generated(cls: type) -> bool:
    """Whether hashing and comparing run only what dataclasses, attrs or `object` wrote."""
    for method in ("__hash__", "__eq__"):
        code = getattr(getattr(cls, method, None), "__code__", None)
        if code is not None and not code.co_filename.startswith("<"):
            return False
    return True


# --- the kinds -----------------------------------------------------------------------------------------


def _kind(cls: type) -> str | None:
    if enum.Enum in cls.__mro__:
        return "enum"
    own = vars(cls)
    if tuple in cls.__mro__:
        if cls.__base__ is tuple and type(own.get("__new__")) is types.BuiltinMethodType:
            return "structseq" if type(own.get("n_sequence_fields")) is int else None
        return None if _field_names(cls) is None else "namedtuple"
    if "__dataclass_fields__" in own:
        return "dataclass"
    if "__attrs_attrs__" in own:
        return "attrs"
    pydantic: Any = sys.modules.get("pydantic.main")
    return "pydantic" if pydantic is not None and pydantic.BaseModel in cls.__mro__ else None


def _field_names(cls: type) -> tuple[object, ...] | None:
    named = next((vars(base)["_fields"] for base in cls.__mro__ if "_fields" in vars(base)), None)
    return cast("tuple[object, ...]", named) if type(named) is tuple else None


def _enum_type(name: str, cls: type) -> ValueType:
    members: Mapping[str, object] = cls.__dict__["_member_map_"]
    composite = enum.Flag in cls.__mro__ and not any(
        "_missing_" in vars(base)
        for base in cls.__mro__[: cls.__mro__.index(enum.Flag)]
        if base is not enum.IntFlag  # which has one of its own before Python 3.11
    )
    hashes = _hash_is_generated_enum(cls)

    def reduce(member: Any) -> object:
        known = member._name_
        return known if known is not None and members.get(known) is member else member._value_

    def rebuild(state: object) -> object:
        if type(state) is str and state in members:
            return members[state]
        if composite and type(state) is int:
            return cast(Any, cls)(state)
        raise ValueError(f"the enum has no member {state!r:.60}")

    return ValueType(name, cls, reduce, rebuild, hashable=hashes)


def _hash_is_generated_enum(cls: type) -> bool:
    for base in cls.__mro__:
        if base.__module__ == "enum" or base in (str, int, float, object):
            continue
        if "__hash__" in vars(base) or "__eq__" in vars(base):
            return False
    return True


def _tuple_type(name: str, cls: type) -> ValueType:
    steps = {f"[{index}]": f".{field}" for index, field in enumerate(_field_names(cls) or ())}
    count = len(steps)
    own_hash = any(
        "__hash__" in vars(base) or "__eq__" in vars(base) for base in cls.__mro__[: cls.__mro__.index(tuple)]
    )

    def reduce(value: Any) -> object:
        if getattr(value, "__dict__", None):
            raise ValueError("it has attributes beside its fields")
        return tuple(value)

    def rebuild(state: object) -> object:
        if type(state) is not tuple or len(cast("tuple[object, ...]", state)) != count:
            raise ValueError(f"it has {count} fields")
        blank = cast(Any, tuple).__new__
        return cast(object, blank(cls, state))

    return ValueType(
        name, cls, reduce, rebuild, hashable=not own_hash, step_to=lambda step: steps.get(step, step)
    )


def _structseq_type(name: str, cls: type) -> ValueType:
    def rebuild(state: object) -> object:
        if type(state) is not tuple:
            raise ValueError("its items are not a tuple")
        return cast(Any, cls)(state)  # C code of the interpreter's, which checks the length

    return ValueType(name, cls, tuple, rebuild, step_to=lambda step: step)


_MAKERS: dict[str, Callable[[str, type], ValueType]] = {
    "enum": _enum_type,
    "namedtuple": _tuple_type,
    "structseq": _structseq_type,
    "dataclass": plain_type,
    "attrs": plain_type,
    "pydantic": plain_type,
}


class Records:
    """A `CodecSource` for enums, named tuples, dataclasses, attrs and pydantic classes, by their names.

    A class crosses where the receiver has loaded its module, or where the module is one of those that
    `allow` named (or inside of one): then it is imported.
    """

    def __init__(self) -> None:
        self._importable: set[str] = set()

    def allow(self, modules: Iterable[str]) -> None:
        """Modules and packages that this process may import because a peer sent a class of theirs."""
        self._importable.update(modules)

    def for_class(self, cls: type) -> ValueType | None:
        kind = _kind(cls)
        if kind is None:
            return None
        advice = "move it to a module that both processes have, or register a codec for it"
        if cls.__module__ in ("__main__", "__mp_main__"):
            raise LookupError(
                f"{class_name(cls)} is defined in the main script, which a worker does not run; {advice}"
            )
        try:
            found = find_class(cls.__module__, cls.__qualname__)
        except LookupError as error:
            raise LookupError(f"{class_name(cls)} can't be found by its name: {error}; {advice}") from None
        if found is not cls:
            raise LookupError(f"{class_name(cls)} is not what its module has by that name; {advice}")
        return _MAKERS[kind](f"{kind}:{cls.__module__}:{cls.__qualname__}", cls)

    def for_name(self, name: str) -> ValueType | None:
        parts = name.split(":")
        if len(parts) != 3 or parts[0] not in _MAKERS:
            return None
        kind, module, qualname = parts
        cls = find_class(module, qualname, self._allows)
        if _kind(cls) != kind:
            raise LookupError(f"{class_name(cls)} is no {kind} here")
        return _MAKERS[kind](name, cls)

    def _allows(self, module: str) -> bool:
        parts = module.split(".")
        return any(".".join(parts[:count]) in self._importable for count in range(1, len(parts) + 1))
