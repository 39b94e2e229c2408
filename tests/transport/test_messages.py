"""Every message comes back as it was sent, and nothing but ProtocolError comes out of garbage."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from legion_shm.errors import InvalidHandle, MessageTooLarge, ProtocolError
from legion_shm.transport.frames import MESSAGES, PROTOCOL_VERSION, decode_message, encode_message
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle
from legion_shm.transport.messages import (
    Cancel,
    Hello,
    JobDone,
    LogRecord,
    Message,
    PreviewNote,
    ProgressNote,
    Ready,
    Released,
    RunJob,
    SegmentRetired,
    Stop,
    ValueNote,
    in_batches,
)

LIMIT = 1 << 20
KINDS = [form.message for form in MESSAGES.values()]

U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(max_size=20) | st.just("\ud800 alone")
HANDLE = st.builds(
    BlockHandle, U64, st.integers(0, 2**32 - 1), st.integers(0, 2**40).map(lambda n: n * BLOCK_ALIGN),
    st.integers(1, 2**64 - 1), U64,
)  # fmt: skip
NUMBER = st.integers(-(2**63), 2**64 - 1)


def many(item: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(item, max_size=4).map(tuple)


BY_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "int": NUMBER,
    "str": TEXT,
    "bytes": st.binary(max_size=30),
    "bool": st.booleans(),
    "float": st.floats(allow_nan=False),
    "str | None": st.none() | TEXT,
    "Handles": many(HANDLE),
    "Names": many(TEXT),
    "Pairs": many(st.tuples(TEXT, TEXT)),
    "NodeRows": many(st.tuples(TEXT, TEXT, TEXT)),
    "tuple[int, ...]": many(NUMBER),
    "Values": many(
        st.builds(
            ValueNote, TEXT, st.binary(max_size=30), many(HANDLE), many(st.booleans()),
            st.none() | st.binary(max_size=32), many(NUMBER),
        )
    ),
}  # fmt: skip


def messages_of(kind: type[Message]) -> st.SearchStrategy[Any]:
    return st.builds(kind, *(BY_TYPE[str(field.type)] for field in fields(kind)))


MESSAGE = st.one_of(*(messages_of(kind) for kind in KINDS))
H = BlockHandle(7, 1, BLOCK_ALIGN, 100, 3)
RUN = RunJob("j", 1, b"{}", b"d", (ValueNote("input_1", b"t", (H,), (True,), None, (1, 2)),), (H,), False)


def encode(message: Message) -> bytes:
    return encode_message(message, max_bytes=LIMIT)


def decode(frame: bytes) -> Message:
    return decode_message(frame, max_bytes=LIMIT)


def row(message: Message) -> list[Any]:
    items: list[Any] = msgpack.unpackb(encode(message), unicode_errors="surrogatepass")
    return items


def packed(row: object) -> bytes:
    frame: bytes = msgpack.packb(row, unicode_errors="surrogatepass")
    return frame


# --- there and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_was_sent(kind: type[Message]) -> None:
    @settings(max_examples=25, deadline=None)
    @given(messages_of(kind))
    def there_and_back(message: Message) -> None:
        again = decode(encode(message))
        assert again == message
        assert type(again) is kind
        for field in fields(kind):
            assert type(getattr(again, field.name)) is type(getattr(message, field.name))

    there_and_back()


def test_every_message_class_has_a_number_of_its_own() -> None:
    assert set(KINDS) == set(Message.__subclasses__())
    assert all(code == form.message.code > 0 for code, form in MESSAGES.items())


def test_a_whole_number_is_a_number_too() -> None:
    again = decode(encode(ProgressNote("j", 1, None, 1, 20)))
    assert isinstance(again, ProgressNote)
    assert (again.value, again.total) == (1.0, 20.0)
    assert type(again.value) is float
    huge = decode(encode(ProgressNote("j", 1, None, 2**64 - 1, 2**53 + 1)))
    assert isinstance(huge, ProgressNote)
    assert (huge.value, huge.total) == (2.0**64, 2.0**53)
    note = decode(encode(ProgressNote("j", 1, None, math.nan, math.inf)))
    assert isinstance(note, ProgressNote)
    assert math.isnan(note.value)


def test_a_frame_is_version_code_and_fields() -> None:
    assert row(Cancel("j-1")) == [PROTOCOL_VERSION, 33, "j-1"]
    assert row(Stop()) == [PROTOCOL_VERSION, 34]


# --- what must not pass -------------------------------------------------------------------------------

WRONG: dict[str, list[object]] = {
    "int": [None, "1", 1.0, True, b"1", [1], []],
    "str": [None, 1, b"text", ["text"], True],
    "bytes": [None, "text", 1, [1]],
    "bool": [None, 0, 1, "true", b""],
    "float": [None, "1.0", True, b"", [1.0]],
    "str | None": [1, b"x", ["x"], False],
    "Handles": [
        None,
        1,
        "x",
        b"x",
        [1],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6]],
        [[1, 2, 3, True, 5]],
        [[-1, 1, 0, 1, 1]],
        [[1, 2**32, 0, 1, 1]],
        [[1, 1, 0, 0, 1]],
        [[1, 1, 0, 1, 1.0]],
    ],
    "Names": [None, "text", [1], ["a", b"b"], [["a"]]],
    "Pairs": [None, [["a"]], [["a", "b", "c"]], [["a", 1]], ["ab"], [[]]],
    "NodeRows": [None, [["a", "b"]], [["a", "b", "c", "d"]], [["a", "b", 1]], ["abc"]],
    "tuple[int, ...]": [None, 1, ["1"], [True], [1.0], [[1]]],
    "Values": [
        None,
        [1],
        [[]],
        [["n", b"t", [], [], None]],
        [["n", b"t", [], [], None, [], 1]],
        [[1, b"t", [], [], None, []]],
        [["n", "t", [], [], None, []]],
        [["n", b"t", [1], [], None, []]],
        [["n", b"t", [], [1], None, []]],
        [["n", b"t", [], [], "x", []]],
        [["n", b"t", [], [], None, ["1"]]],
    ],
}
SAMPLES: dict[str, object] = {
    "int": 1,
    "str": "x",
    "bytes": b"x",
    "bool": True,
    "float": 0.5,
    "str | None": None,
    "Handles": [H.to_wire()],
    "Names": ["x"],
    "Pairs": [["a", "b"]],
    "NodeRows": [["1", "Blur", "started"]],
    "tuple[int, ...]": [1],
    "Values": [["n", b"t", [H.to_wire()], [True], b"i", [1]]],
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_field_of_the_wrong_type_is_refused_and_the_message_named(kind: type[Message]) -> None:
    good = [PROTOCOL_VERSION, kind.code, *(SAMPLES[str(field.type)] for field in fields(kind))]
    assert type(decode(packed(good))) is kind
    for at, field in enumerate(fields(kind), 2):
        for wrong in WRONG[str(field.type)]:
            with pytest.raises(ProtocolError, match=kind.__name__):
                decode(packed([*good[:at], wrong, *good[at + 1 :]]))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_field_too_many_or_too_few_is_refused(kind: type[Message]) -> None:
    good = [PROTOCOL_VERSION, kind.code, *(SAMPLES[str(field.type)] for field in fields(kind))]
    with pytest.raises(ProtocolError, match=f"{kind.__name__} has {len(good) - 2} fields, got"):
        decode(packed([*good, None]))
    if len(good) > 2:
        with pytest.raises(ProtocolError, match="fields, got"):
            decode(packed(good[:-1]))


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (packed([PROTOCOL_VERSION + 1, 34]), "the peer speaks protocol version 2, we speak 1"),
        (packed([PROTOCOL_VERSION, 999]), "unknown message code 999"),
        (packed([PROTOCOL_VERSION, 0]), "unknown message code 0"),
        (packed([PROTOCOL_VERSION, "34"]), "no version and code"),
        (packed([True, 34]), "no version and code"),
        (packed([PROTOCOL_VERSION]), "no version and code"),
        (packed([]), "no version and code"),
        (packed({}), "expected an array, got dict"),
        (packed({1: 34}), "not MessagePack"),
        (packed("text"), "expected an array"),
        (packed(None), "expected an array"),
        (b"", "not MessagePack"),
        (encode(Stop()) + b"\xc0", "not MessagePack: ExtraData"),
        (encode(Cancel("j"))[:-1], "not MessagePack"),
        (b"\x93\x01\x21\xa1\xff", "not MessagePack: UnicodeDecodeError"),
        (b"\xc1", "not MessagePack"),
        (packed([1, 33, msgpack.ExtType(5, b"x")]), "not MessagePack"),
        (packed([1, 33, msgpack.Timestamp(1, 1)]), "not MessagePack"),
        (b"\x93\x01\x21\xc7\x00\x05", "Cancel: expected text, got ExtType"),
        (b"\xdd\xff\xff\xff\xff", "not MessagePack"),
        (b"\xdc\xff\xff\x01\x22", "not MessagePack"),
        (b"\xc6\xff\xff\xff\xff", "not MessagePack"),
    ],
)
def test_what_is_not_exactly_one_message_is_refused(frame: bytes, text: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(frame)
    assert text in str(caught.value)


@pytest.mark.parametrize("depth", [3, 100, 600, 200_000])
def test_nesting_however_deep_is_refused(depth: int) -> None:
    with pytest.raises(ProtocolError):
        decode(b"\x93\x01\x21" + b"\x91" * depth + b"\xc0")


def test_a_short_frame_that_claims_large_arrays_gets_no_room_for_them() -> None:
    import tracemalloc

    frame = b"\x93\x01\x21" + b"\xdd\x00\x01\x86\xa0" * 400
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(frame)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_an_oversize_frame_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="a frame of 11 bytes exceeds max_message_bytes = 10"):
        decode_message(b"\xc1" * 11, max_bytes=10)
    frame = encode(Cancel("j"))
    assert decode_message(frame, max_bytes=len(frame)) == Cancel("j")


def test_a_malformed_handle_is_an_invalid_handle() -> None:
    with pytest.raises(InvalidHandle, match="Released: block handle: nbytes 0 is out of range"):
        decode(packed([PROTOCOL_VERSION, 12, [[1, 1, 0, 0, 1]]]))


def test_a_message_that_is_too_large_is_refused_where_it_is_sent() -> None:
    message = replace(RUN, workflow=b"x" * 2000)
    frame = encode_message(message, max_bytes=1 << 20)
    assert encode_message(message, max_bytes=len(frame)) == frame
    with pytest.raises(MessageTooLarge) as caught:
        encode_message(message, max_bytes=len(frame) - 1)
    assert f"a RunJob message of {len(frame)} bytes exceeds max_message_bytes = {len(frame) - 1}" in str(
        caught.value
    )
    assert "`inputs`" in str(caught.value)


# --- garbage ------------------------------------------------------------------------------------------


def only_protocol_errors(frame: bytes) -> None:
    try:
        message = decode(frame)
    except ProtocolError:
        return
    assert decode(encode(message)) == message or "nan" in repr(message)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_give_nothing_but_protocol_errors(data: bytes) -> None:
    only_protocol_errors(data)


JSONISH = st.recursive(
    st.none() | st.booleans() | NUMBER | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KINDS), st.lists(JSONISH, max_size=14))
def test_random_fields_give_nothing_but_protocol_errors(kind: type[Message], values: list[Any]) -> None:
    only_protocol_errors(packed([PROTOCOL_VERSION, kind.code, *values]))


FRAMES = [
    encode(message)
    for message in (
        RUN,
        Hello("w1", "token", "job", 77),
        Ready("graph", (("torch", "2.4"), ("python", "3.10")), 25),
        JobDone("j", 1, RUN.values, (H, H), 1, 2, 3, 4, 5, 6),
        Released((H,) * 5),
        LogRecord("INFO", "x", "text" * 10),
        PreviewNote("j", 1, None, "JPEG", b"\xff" * 40),
        SegmentRetired((1, 2, 3)),
        ProgressNote("j", 2, "5", 0.5, 2.0),
    )
]


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_mutated_frames_give_nothing_but_protocol_errors(data: st.DataObject) -> None:
    frame = bytearray(data.draw(st.sampled_from(FRAMES)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(frame) - 1)))
        change = data.draw(st.sampled_from(["set", "insert", "delete", "cut", "repeat"]))
        if change == "set" and frame:
            frame[at] = data.draw(st.integers(0, 255))
        elif change == "insert":
            frame[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif change == "delete":
            del frame[at : at + data.draw(st.integers(1, 4))]
        elif change == "cut":
            del frame[at:]
        else:
            frame[at:at] = frame[at : at + 9]
    only_protocol_errors(bytes(frame))


@settings(max_examples=100, deadline=None)
@given(MESSAGE)
def test_no_two_messages_look_alike_on_the_wire(message: Message) -> None:
    wire = row(message)
    assert wire[:2] == [PROTOCOL_VERSION, message.code]
    assert len(wire) == 2 + len(fields(message))


def test_many_handles_go_in_several_messages() -> None:
    handles = [BlockHandle(1, 1, 0, 1, generation) for generation in range(25_000)]
    batches = list(in_batches(handles))
    assert [len(batch) for batch in batches] == [10_000, 10_000, 5_000]
    assert [handle for batch in batches for handle in batch] == handles
    assert list(in_batches([])) == []
