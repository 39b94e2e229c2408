"""Classes of the standard library and of Pillow that values hold: each by a state of plain data.

A table of our own, so a peer can make nothing be imported but these modules. Owns no container that the
codec knows by itself (list, dict, OrderedDict, set, ...).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, cast

from legion_shm.transport.codec_registry import ValueType

__all__ = ["Builtins"]

_Reduce = Callable[[Any], object]
_Rebuild = Callable[[Any, Any], object]  # of the class and the state

_FACTORIES: dict[str, type] = {
    kind.__name__: kind for kind in (list, dict, set, tuple, int, float, str, bytes, bool, frozenset)
}


def _tuple_of(state: object, *kinds: type) -> tuple[Any, ...]:
    if type(state) is not tuple:
        raise ValueError("its state is not a tuple")
    items = cast("tuple[object, ...]", state)
    if tuple(map(type, items)) != kinds:
        raise ValueError(f"its state is not {', '.join(kind.__name__ for kind in kinds)}")
    return items


def _exactly(state: object, kind: type) -> Any:
    if type(state) is not kind:
        raise ValueError(f"its state is not a {kind.__name__}")
    return state


def _plain(value: object) -> None:
    """Refuse what a dict or deque of a class can have beside its items."""
    if getattr(value, "__dict__", None):
        raise ValueError("it has attributes beside its items")


def _reduce_defaultdict(value: Any) -> object:
    factory = value.default_factory
    if factory is not None and _FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
        raise ValueError(
            f"its default_factory is {factory!r:.60}; it crosses with None or one of {', '.join(_FACTORIES)}"
        )
    return (None if factory is None else factory.__name__, dict(value))


def _rebuild_defaultdict(cls: Any, state: object) -> object:
    pair = cast("tuple[Any, ...]", state)
    if type(state) is not tuple or len(pair) != 2 or type(pair[1]) is not dict:
        raise ValueError("its state is not a factory and a dict")
    return cls(None if pair[0] is None else _FACTORIES[pair[0]], pair[1])


def _rebuild_counter(cls: Any, state: object) -> object:
    value: dict[object, object] = cls()
    dict[object, object].update(value, _exactly(state, dict))  # Counter's own update adds
    return value


def _rebuild_deque(cls: Any, state: object) -> object:
    pair = cast("tuple[Any, ...]", state)
    if type(state) is not tuple or len(pair) != 2:
        raise ValueError("its state is not items and a length")
    items, most = _exactly(pair[0], list), pair[1]
    if most is not None and (type(most) is not int or len(items) > most):
        raise ValueError("it has more items than its length allows")
    return cls(items, most)


def _rebuild_fraction(cls: Any, state: object) -> object:
    top, bottom = _tuple_of(state, int, int)
    return cls(top, bottom)


def _rebuild_text(cls: Any, state: object) -> object:
    return cls(_exactly(state, str))


def _rebuild_uuid(cls: Any, state: object) -> object:
    return cls(int=_exactly(state, int))


def _timedelta_state(value: Any) -> object:
    return (value.days, value.seconds, value.microseconds)


def _rebuild_timedelta(cls: Any, state: object) -> object:
    return cls(*_tuple_of(state, int, int, int))


def _rebuild_date(cls: Any, state: object) -> object:
    return cls(*_tuple_of(state, int, int, int))


def _time_state(value: Any) -> object:
    return ((value.hour, value.minute, value.second, value.microsecond), value.tzinfo, value.fold)


def _datetime_state(value: Any) -> object:
    parts = (value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond)
    return (parts, value.tzinfo, value.fold)


def _rebuild_time(cls: Any, state: object) -> object:
    parts, zone, fold = cast("tuple[Any, ...]", state)
    timezone: Any = sys.modules["datetime"].timezone
    if type(zone) not in (type(None), timezone) or any(type(part) is not int for part in parts):
        raise ValueError("its parts are not numbers and a time zone")
    return cls(*parts, tzinfo=zone, fold=fold)


def _zone_state(value: Any) -> object:
    return (value.utcoffset(None), value.tzname(None))


def _rebuild_zone(cls: Any, state: object) -> object:
    offset, name = cast("tuple[Any, ...]", state)
    if not offset and name == "UTC":
        return cls.utc
    plain = cls(offset)
    return plain if plain.tzname(None) == name else cls(offset, name)


def _bytesio_state(value: Any) -> object:
    _plain(value)
    return (value.getvalue(), value.tell())


def _rebuild_bytesio(cls: Any, state: object) -> object:
    content, position = _tuple_of(state, bytes, int)
    value = cls(content)
    value.seek(position)
    return value


def _rebuild_stringio(cls: Any, state: object) -> object:
    content, position = _tuple_of(state, str, int)
    value = cls(content, newline="")
    value.seek(position)
    return value


def _namespace_state(value: Any) -> object:
    return dict(cast("dict[str, object]", vars(value)))


def _rebuild_namespace(cls: Any, state: object) -> object:
    value = cls()
    for name, item in _exactly(state, dict).items():
        vars(value)[_exactly(name, str)] = item
    return value


def _rebuild_ellipsis(_cls: Any, state: object) -> object:
    if state is not None:
        raise ValueError("its state is not None")
    return ...


_BYTES_PER_PIXEL = {
    **dict.fromkeys(("1", "L", "P"), 1),
    **dict.fromkeys(("LA", "La", "PA", "I;16", "I;16L", "I;16B", "I;16N"), 2),
    **dict.fromkeys(("RGB", "YCbCr", "LAB", "HSV"), 3),
    **dict.fromkeys(("RGBA", "RGBa", "RGBX", "CMYK", "I", "F"), 4),
}


def _picture_state(value: Any) -> object:
    if value.mode not in _BYTES_PER_PIXEL:
        raise ValueError(f"its mode is {value.mode}; convert() it")
    palette = None
    if value.palette is not None:
        value.load()
        palette = (value.palette.mode, bytes(value.palette.palette))
    return (value.mode, tuple(value.size), value.tobytes(), palette, dict(value.info))


def _rebuild_picture(cls: Any, state: object) -> object:
    mode, size, content, palette, info = cast("tuple[Any, ...]", state)
    width, height = _tuple_of(size, int, int)
    row = (width + 7) // 8 if mode == "1" else width * _BYTES_PER_PIXEL[mode]
    if width < 0 or height < 0 or len(_exactly(content, bytes)) != row * height:
        raise ValueError(f"{len(content)} bytes are not {width} x {height} pixels of {mode!r}")
    pictures: Any = sys.modules["PIL.Image"]
    value = pictures.frombytes(mode, size, content) if content else pictures.new(mode, size)
    if palette is not None:
        palette_mode, colours = _tuple_of(palette, str, bytes)
        value.putpalette(colours, palette_mode)
    value.info = _exactly(info, dict)
    return value


_TABLE: dict[str, tuple[_Reduce, _Rebuild]] = {
    "collections.defaultdict": (_reduce_defaultdict, _rebuild_defaultdict),
    "collections.Counter": (dict, _rebuild_counter),
    "collections.deque": (lambda value: (list(value), value.maxlen), _rebuild_deque),
    "fractions.Fraction": (lambda value: (value.numerator, value.denominator), _rebuild_fraction),
    "decimal.Decimal": (str, _rebuild_text),
    "uuid.UUID": (lambda value: value.int, _rebuild_uuid),
    "datetime.timedelta": (_timedelta_state, _rebuild_timedelta),
    "datetime.date": (lambda value: (value.year, value.month, value.day), _rebuild_date),
    "datetime.time": (_time_state, _rebuild_time),
    "datetime.datetime": (_datetime_state, _rebuild_time),
    "datetime.timezone": (_zone_state, _rebuild_zone),
    **dict.fromkeys(
        (f"pathlib.{name}" for name in ("PurePosixPath", "PosixPath", "PureWindowsPath", "WindowsPath")),
        (str, _rebuild_text),
    ),
    "io.BytesIO": (_bytesio_state, _rebuild_bytesio),
    "io.StringIO": (lambda value: (value.getvalue(), value.tell()), _rebuild_stringio),
    "types.SimpleNamespace": (_namespace_state, _rebuild_namespace),
    "types.EllipsisType": (lambda _: None, _rebuild_ellipsis),
    "PIL.Image.Image": (_picture_state, _rebuild_picture),
}


# Where a part of the state is the instance's own items, or has a name there: its step of an error's path.
_STEPS: dict[str, dict[str, str]] = {
    "collections.defaultdict": {"[1]": ""},
    "collections.Counter": {},
    "collections.deque": {"[0]": ""},
    "PIL.Image.Image": {"[4]": ".info"},
}


class Builtins:
    """A `CodecSource` for `_TABLE`; its names on the wire are ``lib:`` and the class's public name."""

    def __init__(self) -> None:
        self._types: dict[str, ValueType] = {}
        self._names: dict[str, str] = {}  # a class's own name to the table's: where it is defined may differ
        for name in _TABLE:
            self._names[name.rpartition(".")[2]] = name

    def for_class(self, cls: type) -> ValueType | None:
        name = self._names.get("EllipsisType" if cls.__name__ == "ellipsis" else cls.__name__)
        if name is None or name.rpartition(".")[0] not in sys.modules:
            return None
        found = self._type(name)
        return found if found is not None and found.cls is cls else None

    def for_name(self, name: str) -> ValueType | None:
        prefix, _, rest = name.partition(":")
        if prefix != "lib" or rest not in _TABLE:
            return None
        found = self._type(rest)
        if found is None:
            raise LookupError(f"{rest.partition('.')[0]} is not installed there")
        return found

    def _type(self, name: str) -> ValueType | None:
        found = self._types.get(name)
        if found is None:
            module, _, attribute = name.rpartition(".")
            try:
                cls = cast("type", getattr(importlib.import_module(module), attribute))
            except ImportError:
                return None
            reduce, rebuild = _TABLE[name]
            steps = _STEPS.get(name)
            found = self._types[name] = ValueType(
                f"lib:{name}",
                cls,
                reduce,
                lambda state: rebuild(cls, state),
                by_fields=name == "types.SimpleNamespace",
                step_to=None if steps is None else lambda step: steps.get(step, step),
            )
        return found
