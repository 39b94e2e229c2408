"""Classes beyond the builtin ones: by their fields, of libraries, of plugins; and what is refused."""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import enum
import io
import os
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar, NamedTuple

import attrs
import msgpack
import pydantic
import pytest
import torch
from PIL import Image

from legion_shm.errors import ProtocolError, UnsupportedValue
from legion_shm.transport import codec_wire as wire
from legion_shm.transport.codec import ValueType, ValueTypes, decode, encode
from legion_shm.transport.codec_builtins import Builtins
from legion_shm.transport.codec_objects import Records
from legion_shm.transport.codec_pickle import Pickled
from legion_shm.transport.codec_plugins import Plugins
from tests.transport.codec_values import assert_same
from tests.transport.fake_store import FakeStore
from tests.transport.test_codec_garbage import tree


class Point(NamedTuple):
    x: int
    y: Any = None


class Colour(enum.Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796 - an alias
    BLUE = "blue"


class Kind(str, enum.Enum):
    A = "a"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Level(enum.IntFlag):
    LOW = 1
    HIGH = 4


@dataclass
class Box:
    width: int
    content: Any = None
    kept: list[Any] = field(default_factory=list)
    made: ClassVar[int] = 0

    def __post_init__(self) -> None:
        Box.made += 1


@dataclass(frozen=True, slots=True)
class Fixed:
    name: str
    parts: tuple[Any, ...] = ()


@attrs.define
class Slotted:
    a: Any
    b: Any = 5


@attrs.frozen
class Frozen:
    a: Any


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", arbitrary_types_allowed=True)
    size: int
    image: Any = None
    _secret: int = pydantic.PrivateAttr(default=3)


class Outer:
    @dataclass
    class Inner:
        value: Any


@dataclass
class Closing:
    name: str

    def __del__(self) -> None:
        raise AssertionError("an object that was never meant to be")


@dataclass
class Hashing:
    name: str

    def __hash__(self) -> int:
        return len(self.name)


def fresh() -> ValueTypes:
    registry = ValueTypes()
    registry.add_source(Builtins())
    registry.add_source(Records())
    return registry


def crossed(value: object, types: ValueTypes | None = None, other: ValueTypes | None = None) -> Any:
    store = FakeStore()
    encoded = encode(value, store, types=types or fresh())
    return decode(encoded.tree, encoded.blocks, store, types=other or fresh())


# --- classes by their fields ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        Point(1),
        Point(1, [2, Point(3)]),
        Box(1, {"a": (1, 2)}),
        Fixed("x", (1, 2)),
        Slotted([1]),
        Frozen({"k": 1}),
        Outer.Inner(5),
        torch.return_types.max((torch.tensor(1), torch.tensor(2))),
        time.gmtime(0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_object_crosses_by_its_fields(value: object) -> None:
    got = crossed([value])[0]
    assert type(got) is type(value)
    assert got == value


@pytest.mark.parametrize("member", [Colour.RED, Colour.CRIMSON, Colour.BLUE, Kind.A, Rights.READ, Level.HIGH])
def test_a_member_of_an_enum_stays_that_member_also_as_a_key(member: enum.Enum) -> None:
    got = crossed({member: [member]})
    assert got == {member: [member]}
    assert next(iter(got)) is member
    assert got[member][0] is member


def test_flags_together_cross() -> None:
    assert crossed(Rights.READ | Rights.WRITE) == Rights.READ | Rights.WRITE
    assert crossed(Level(5)) == Level.LOW | Level.HIGH
    assert crossed(Rights(0)) is Rights(0)


def test_a_pydantic_object_keeps_extras_private_attributes_and_what_was_set() -> None:
    model = Model(size=3, image=torch.arange(4), more="x")  # type: ignore[call-arg]
    model._secret = 9
    got = crossed(model)
    assert (got.size, got.more, got._secret) == (3, "x", 9)
    assert torch.equal(got.image, model.image)
    assert got.model_fields_set == model.model_fields_set


def test_nothing_of_a_class_is_called_when_its_instance_arrives() -> None:
    box = Box(1)
    made = Box.made
    got = crossed(box)
    assert got == box
    assert Box.made == made


def test_attributes_beside_the_fields_cross_too() -> None:
    box = Box(1)
    box.extra = torch.ones(2)  # type: ignore[attr-defined]
    assert torch.equal(crossed(box).extra, box.extra)  # type: ignore[attr-defined]


def test_an_object_met_twice_is_one_object_and_one_with_itself_inside_is_refused() -> None:
    box = Box(1, torch.rand(3))
    got = crossed([box, {"again": box}, box.content])
    assert got[0] is got[1]["again"]
    assert got[0].content is got[2]
    box.kept.append(box)
    with pytest.raises(UnsupportedValue, match="contains itself") as caught:
        crossed({"b": box})
    assert caught.value.path == "value['b'].kept[0]"


def test_the_path_of_what_can_not_cross_is_written_as_its_user_would() -> None:
    with pytest.raises(UnsupportedValue) as caught:
        crossed([Box(1, {"lock": Fixed("a", (1, threading.Lock()))})])
    assert caught.value.path == "value[0].content['lock'].parts[1]"
    assert "legion_shm.register_codec" in str(caught.value)


def picture_with(info: object) -> Any:
    picture = Image.new("L", (1, 1))
    picture.info["a"] = info
    return picture


@pytest.mark.parametrize(
    ("holding", "step"),
    [
        (lambda bad: Point(1, bad), ".y"),
        (lambda bad: Point(0, (0, bad)), ".y[1]"),
        (lambda bad: collections.deque([1, bad]), "[1]"),
        (lambda bad: collections.deque([[bad]], maxlen=3), "[0][0]"),
        (lambda bad: collections.defaultdict(list, a=[bad]), "['a'][0]"),
        (lambda bad: collections.Counter(a=bad), "['a']"),
        (lambda bad: types.SimpleNamespace(a=[bad]), ".a[0]"),
        (picture_with, ".info['a']"),
        (lambda bad: {"points": [Point(0, collections.deque([bad]))]}, "['points'][0].y[0]"),
    ],
)
def test_the_path_through_a_class_of_a_library_is_pythons(
    holding: Callable[[object], object], step: str
) -> None:
    with pytest.raises(UnsupportedValue, match="lock has no codec") as caught:
        crossed([holding(threading.Lock())])
    assert caught.value.path == f"value[0]{step}"


def test_a_frozen_dataclass_is_a_key_and_one_with_a_hash_of_its_own_is_not() -> None:
    assert crossed({Fixed("a"): 1, Point(1, 2): 2}) == {Fixed("a"): 1, Point(1, 2): 2}
    with pytest.raises(UnsupportedValue, match="hash of its own"):
        crossed({Hashing("a"): 1})


def test_classes_that_have_no_name_to_be_found_by_are_refused() -> None:
    @dataclass
    class Local:
        x: int = 1

    with pytest.raises(UnsupportedValue, match=r"can't be found by its name.*move it to a module"):
        crossed(Local())
    main: Any = dataclass(type("Main", (), {"__module__": "__main__"}))
    with pytest.raises(UnsupportedValue, match="main script"):
        crossed(main())


def test_a_class_with_a_finalizer_is_refused_on_both_sides() -> None:
    value = Closing.__new__(Closing)
    try:
        with pytest.raises(UnsupportedValue, match="finalizer"):
            crossed(value)
    finally:
        Closing.__del__ = lambda self: None  # type: ignore[method-assign]
        del value, Closing.__del__
    name = f"dataclass:{__name__}:Ended"
    ended: Any = dataclass(type("Ended", (), {"__module__": __name__, "__del__": lambda self: None}))
    vars(sys.modules[__name__])["Ended"] = ended
    refused_by_name(name, {}, says="finalizer")


# --- what a hostile peer may name ----------------------------------------------------------------------


def refused_by_name(name: str, state: object, *, says: str, types: ValueTypes | None = None) -> None:
    parts: list[Any] = msgpack.unpackb(encode(state, FakeStore(), types=fresh()).tree, strict_map_key=False)
    data = tree([wire.EXTENSION, name], *parts[2:])
    with pytest.raises((UnsupportedValue, ProtocolError), match=says):
        decode(data, (), FakeStore(), types=types or fresh())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dataclass:antigravity:Thing", "not loaded"),
        ("dataclass:this:s", "not loaded"),
        ("dataclass:os:environ", "has no class"),
        ("dataclass:os:path.join", "has no class"),
        ("dataclass:subprocess:Popen", "no dataclass"),
        ("dataclass:tempfile:_TemporaryFileCloser", "no dataclass|has no class"),
        ("dataclass:builtins:object", "no dataclass"),
        ("enum:builtins:type", "no enum"),
        ("namedtuple:builtins:tuple", "no namedtuple"),
        ("structseq:builtins:tuple", "no structseq"),
        ("pydantic:pydantic.main:object", "has no class"),
        ("dataclass:legion_shm:Supervisor", "has no class"),
        ("function:os:system", "no codec of that name"),
        ("lib:subprocess.Popen", "no codec of that name"),
        ("os.system", "no codec of that name"),
    ],
)
def test_a_peer_can_name_only_classes_of_its_kind_that_are_loaded(name: str, says: str) -> None:
    refused_by_name(name, {}, says=says)
    assert "antigravity" not in sys.modules
    assert "this" not in sys.modules


def test_a_module_is_imported_only_where_it_was_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "legion_test_shapes.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass\nclass Shape:\n    sides: int\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "dataclass:legion_test_shapes:Shape"
    try:
        refused_by_name(name, {"sides": 3}, says="legion_test_shapes is not loaded")
        assert "legion_test_shapes" not in sys.modules
        records, registry = Records(), ValueTypes()
        records.allow(["legion_test_shapes"])
        registry.add_source(records)
        shape = registry.by_name(name)
        assert shape is not None
        assert vars(shape.rebuild({"sides": 3})) == {"sides": 3}
    finally:
        sys.modules.pop("legion_test_shapes", None)


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


class Watched(metaclass=_Meta):
    pass


def test_looking_a_class_up_runs_nothing_of_its_module() -> None:
    module: Any = types.ModuleType("legion_test_watched")
    module.__getattr__ = lambda name: pytest.fail(f"asked for {name}")
    module.Watched = Watched
    sys.modules["legion_test_watched"] = module
    try:
        refused_by_name("dataclass:legion_test_watched:Missing", {}, says="has no class")
        refused_by_name(f"dataclass:{__name__}:Watched.Inner", {}, says="has no class")
    finally:
        del sys.modules["legion_test_watched"]


@pytest.mark.parametrize(
    ("name", "state"),
    [
        (f"dataclass:{__name__}:Fixed", {"unknown": 1}),
        (f"dataclass:{__name__}:Fixed", [1]),
        (f"dataclass:{__name__}:Box", {1: 2}),
        (f"dataclass:{__name__}:Box", collections.Counter({"content": 1})),
        (f"namedtuple:{__name__}:Point", (1,)),
        (f"namedtuple:{__name__}:Point", [1, 2]),
        (f"enum:{__name__}:Colour", "GREEN"),
        (f"enum:{__name__}:Colour", 1),
        ("lib:fractions.Fraction", (1, 0)),
        ("lib:fractions.Fraction", "1/2"),
        ("lib:collections.defaultdict", ("type", {})),
        ("lib:collections.deque", ([1, 2], 1)),
        ("lib:datetime.date", (2020, 13, 1)),
        ("lib:datetime.datetime", ((2020,), "zone", 0)),
        ("lib:decimal.Decimal", "five"),
        ("lib:uuid.UUID", -1),
        ("lib:io.BytesIO", (b"x", -1)),
        ("lib:PIL.Image.Image", ("RGB", (1000, 1000), b"abc", None, {})),
        ("lib:PIL.Image.Image", ("XXX", (1, 1), b"abc", None, {})),
        ("structseq:time:struct_time", (1, 2)),
    ],
    ids=str,
)
def test_a_state_that_is_none_is_a_protocol_error(name: str, state: object) -> None:
    refused_by_name(name, state, says="makes no")


# --- the standard library and Pillow -------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        collections.defaultdict(list, {"a": [1]}),
        collections.defaultdict(None, {1: 2}),
        collections.Counter("aab"),
        collections.deque([1, [2]], maxlen=5),
        collections.deque(),
        Fraction(-3, 7),
        decimal.Decimal("1.500"),
        uuid.UUID(int=7),
        dt.date(2024, 2, 29),
        dt.timedelta(-1, 5, 7),
        dt.time(1, 2, 3, 4, fold=1),
        dt.datetime(2024, 1, 2, 3, tzinfo=dt.timezone.utc),
        dt.datetime(2024, 1, 2, fold=1),  # noqa: DTZ001
        dt.timezone(dt.timedelta(hours=1), "here"),
        Path("/some/where"),
        PurePosixPath("a/b"),
        PureWindowsPath("c:\\x"),
        types.SimpleNamespace(a=1, b=[2]),
        ...,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_of_the_standard_library_crosses(value: object) -> None:
    got = crossed({"v": value, "w": value})
    assert type(got["v"]) is type(value)
    assert got["v"] == value
    assert repr(got["v"]) == repr(value)
    assert got["v"] is got["w"]


def test_defaults_and_bounds_go_on_working_on_the_other_side() -> None:
    got = crossed([collections.defaultdict(list), collections.deque([1, 2], maxlen=2)])
    got[0]["new"].append(1)
    got[1].append(3)
    assert (dict(got[0]), list(got[1])) == ({"new": [1]}, [2, 3])


def test_a_stream_in_memory_keeps_its_position() -> None:
    stream = io.BytesIO(os.urandom(1000))
    stream.seek(17)
    got = crossed(stream)
    assert (got.getvalue(), got.tell()) == (stream.getvalue(), 17)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_a_picture_of_pillow_crosses_to_the_bit(mode: str) -> None:
    picture = Image.frombytes("L", (13, 7), os.urandom(91))
    picture = picture.convert("RGB").convert(mode) if mode != "I;16" else Image.new("I;16", (13, 7), 40_000)
    picture.info["dpi"] = (72, 72)
    got = crossed(picture)
    assert (got.mode, got.size, got.tobytes(), got.info) == (mode, (13, 7), picture.tobytes(), picture.info)
    assert got.getpalette() == picture.getpalette()


def test_a_picture_that_is_still_a_file_says_so() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    with pytest.raises(UnsupportedValue, match="PngImageFile"):
        crossed(Image.open(buffer))


# --- plugins -------------------------------------------------------------------------------------------


class Curve:
    def __init__(self, points: list[float]) -> None:
        self.points = points


CURVE = ValueType(f"{__name__}.Curve", Curve, lambda curve: curve.points, Curve)


@pytest.fixture
def loaded() -> list[str]:
    return []


def plugins(loaded: list[str], **entries: Callable[[], Any]) -> ValueTypes:
    registry = fresh()

    def noting(name: str, load: Callable[[], Any]) -> Callable[[], Any]:
        def note_and_load() -> Any:
            loaded.append(name)
            return load()

        return note_and_load

    named = {name.replace("__", "."): noting(name, load) for name, load in entries.items()}
    registry.add_source(Plugins(registry, lambda: named))
    return registry


def test_an_entry_point_is_loaded_when_its_class_is_met_on_either_side(loaded: list[str]) -> None:
    package = __name__.partition(".")[0]
    sender = plugins(loaded, **{package: lambda: CURVE, "other": lambda: 1 / 0})
    receiver = plugins(loaded, **{package: lambda: [CURVE]})
    assert crossed([Curve([1.0]), Curve([2.0])], sender, receiver)[1].points == [2.0]
    assert loaded == [package, package]


def test_an_entry_point_is_loaded_once_also_where_a_class_of_its_package_is_not_in_it(
    loaded: list[str],
) -> None:
    package = __name__.partition(".")[0]
    registry = plugins(loaded, **{package: lambda: CURVE})
    assert crossed(Curve([1.0]), registry, registry).points == [1.0]
    for _ in range(2):
        with pytest.raises(UnsupportedValue, match="Odd has no codec"):
            crossed(Odd(torch.ones(1)), registry)
    assert loaded == [package]


def test_an_entry_point_may_be_a_module_that_registers(loaded: list[str]) -> None:
    def module() -> Any:
        sender.register(CURVE)
        return types.ModuleType("registers")

    sender = plugins(loaded, **{__name__.replace(".", "__"): module})
    assert crossed(Curve([1.0]), sender, ValueTypes(CURVE)).points == [1.0]


@pytest.mark.parametrize("broken", [lambda: 1 / 0, lambda: 5, lambda: [CURVE, 5]])
def test_an_entry_point_that_gives_none_is_named(loaded: list[str], broken: Callable[[], Any]) -> None:
    package = __name__.partition(".")[0]
    with pytest.raises(UnsupportedValue, match=f"entry point '{package}'"):
        crossed(Curve([1.0]), plugins(loaded, **{package: broken}))


def test_what_a_codec_raises_is_told_with_the_path() -> None:
    def reduce(curve: Curve) -> object:
        raise ValueError("this curve has no end")

    with pytest.raises(UnsupportedValue, match="this curve has no end") as caught:
        crossed({"c": [Curve([])]}, ValueTypes(ValueType("Curve", Curve, reduce, Curve)))
    assert caught.value.path == "value['c'][0]"


def test_a_registered_codec_goes_before_the_fields() -> None:
    registry = fresh()
    registry.register(ValueType("box", Box, lambda box: box.width, lambda state: Box(state + 1)))
    assert crossed(Box(1), registry, registry).width == 2


def test_tensors_in_objects_share_memory_as_they_did() -> None:
    image = torch.rand(4, 8)
    got = crossed([Box(1, image), image, Fixed("row", (image[1],))])
    assert got[0].content is got[1]
    assert got[2].parts[0].data_ptr() == got[1][1].data_ptr()
    assert_same(image, got[1])


# --- pickle, for named classes -------------------------------------------------------------------------


class Odd:
    def __init__(self, image: torch.Tensor) -> None:
        self.image, self.again, self.own = image, image, self

    def __reduce__(self) -> Any:
        return Odd, (self.image,)


class Sly:
    def __reduce__(self) -> Any:
        return os.getenv, ("HOME",)


def pickling(*names: str) -> ValueTypes:
    registry = fresh()
    registry.add_source(Pickled([f"{__name__}.{name}" for name in names]))
    return registry


def test_a_named_class_is_pickled_with_its_tensors_beside_it() -> None:
    image = torch.rand(100)
    got = crossed([Odd(image), image], pickling("Odd"), pickling("Odd"))
    assert got[0].image is got[1]
    assert torch.equal(got[1], image)


def test_no_other_class_is_pickled_or_unpickled() -> None:
    with pytest.raises(UnsupportedValue, match="Odd has no codec"):
        crossed(Odd(torch.ones(1)), pickling("Sly"))
    with pytest.raises(UnsupportedValue, match="pickle_classes does not name"):
        crossed(Odd(torch.ones(1)), pickling("Odd"), pickling("Sly"))


def test_a_pickle_under_a_name_that_is_not_named_is_not_even_read() -> None:
    """Though what it holds is of a class that may be pickled."""
    known = pickling("Odd").by_class(Odd)
    assert known is not None
    forger = fresh()
    forger.register(ValueType(f"pickle:{__name__}.Sly", Odd, known.reduce, known.rebuild, hashable=False))
    with pytest.raises(UnsupportedValue, match=r"pickle_classes does not name .*Sly"):
        crossed(Odd(torch.ones(1)), forger, pickling("Odd"))


def test_a_pickle_that_names_another_global_is_refused() -> None:
    with pytest.raises(UnsupportedValue, match=r"refers to os\.getenv"):
        crossed(Sly(), pickling("Sly"), pickling("Sly"))
