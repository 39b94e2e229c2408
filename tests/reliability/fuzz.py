"""Fuzzing of everything that reads what a peer sent. The invariant, for any bytes whatever:

    nothing but ProtocolError (InvalidHandle, StaleHandle) comes out, UnsupportedValue for a device or a class
    that is not here, and memory stays bounded by the input, whatever lengths it claims.

`make fuzz` runs minutes, `test_fuzz.py` seconds. Inputs are grown from the kept corpus by mutation; one that
gets a new answer (another class or another text, numbers aside) is grown from in turn.

    python -m tests.reliability.fuzz [--seconds N] [--seed N] [--keep]
"""

from __future__ import annotations

import argparse
import array
import datetime as dt
import enum
import os
import random
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import msgpack
import psutil
import torch

from legion_shm.errors import ProtocolError, UnsupportedValue
from legion_shm.transport.attachments import Attachments
from legion_shm.transport.codec import ValueType, ValueTypes, decode, encode
from legion_shm.transport.codec_builtins import Builtins
from legion_shm.transport.codec_objects import Records
from legion_shm.transport.codec_pickle import Pickled
from legion_shm.transport.fdpass import SegmentReceiver, send_segment_fd
from legion_shm.transport.frames import MESSAGES, decode_message, encode_message
from legion_shm.transport.handles import BLOCK_ALIGN, BlockHandle
from legion_shm.transport.leases import LeaseTable
from legion_shm.transport.messages import Heartbeat, LogRecord, Released
from legion_shm.transport.segment import SegmentKind, attach_segment, create_segment
from tests.transport.fake_store import FakeStore

CORPUS = Path(__file__).with_name("corpus")
INPUT_MAX = 4096
GROWN_MAX_BYTES = 256 << 20

_NUMBER = re.compile(r"0x[0-9a-f]+|-?\d+|'[^']*'|b\"[^\"]*\"")
_ANSWER_CHARS = 48
_KEPT_MAX = 40
_EDGES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1, -1, -(2**63))


def codec(data: bytes) -> None:
    store = FakeStore()
    block = store.reserve(4096)
    decode(data, (block.handle,) if data[-1:] > b"\x7f" else (), store)


class Pair(NamedTuple):
    first: object
    second: object = None


class Mode(enum.Enum):
    ON = 1
    OFF = "off"


@dataclass(frozen=True)
class Box:
    content: object
    label: str = ""


class Curve:
    def __init__(self, points: object) -> None:
        if not isinstance(points, list):
            raise TypeError("points are a list")
        self.points: list[Any] = points


class Named:
    def __init__(self, content: object = None) -> None:
        self.content = content


_NOT_LOADED = "wave"  # a module of the standard library that nobody here needs
CLASS_NAMES = (
    *(f"{__name__}.{name}" for name in ("Pair", "Mode", "Box", "Curve", "Named", "Path", "no_such_class")),
    *(f"pickle:{__name__}.{name}" for name in ("Named", "Curve", "Box")),
    *(f"lib:{name}" for name in ("datetime.date", "pathlib.PurePosixPath", "os.system", "decimal.Decimal")),
    *("os.system", "subprocess.Popen", "builtins.eval", "builtins.object", "type", "sys.modules", "pickle:"),
    *(f"{_NOT_LOADED}.Error", f"lib:{_NOT_LOADED}.Error", "torch.nn.modules.linear.Linear", "a.b.__class__"),
    *("", ".", "..", "\0", "x" * 300, f"{__name__}.Box.__init__", f"{__name__}.Mode.ON"),
)


def _types() -> ValueTypes:
    types = ValueTypes(ValueType(f"{__name__}.Curve", Curve, lambda curve: curve.points, Curve))
    for source in (Builtins(), Records(), Pickled([f"{__name__}.Named"])):
        types.add_source(source)
    return types


def classes(data: bytes) -> None:
    """Objects by class names and codecs: what is not loaded stays so, whatever a peer names."""
    decode(data, (), FakeStore(), types=_types())
    assert _NOT_LOADED not in sys.modules


def frames(data: bytes) -> None:
    message = decode_message(data, max_bytes=1 << 20)
    again = encode_message(message, max_bytes=1 << 22)
    assert repr(decode_message(again, max_bytes=1 << 22)) == repr(message)


_KIND: SegmentKind = "memfd" if sys.platform == "linux" else "portable"
_segment = create_segment(_KIND, 1 << 20, name_prefix="legion-fuzz-")
_live = BlockHandle(7, 1, 2 * BLOCK_ALIGN, 4096, 5)


def handles(data: bytes) -> None:
    """A handle off the wire, against the lease table and a segment: no byte outside is ever mapped."""
    try:
        claim = msgpack.unpackb(data, strict_map_key=False)
    except Exception as error:
        raise ProtocolError("not MessagePack") from error
    handle = BlockHandle.from_wire(claim)
    table = LeaseTable()
    table.add_segment(7, 1, 1 << 20)
    table.publish(_live, "somebody")
    views = Attachments()
    known = _segment.descriptor
    views.add(7, 1, attach_segment(_KIND, os.dup(known) if isinstance(known, int) else known, 1 << 20))
    try:
        view = views.view(handle)
        assert handle.offset + len(view) <= 1 << 20
        assert view[0] == view[len(view) - 1] == 0
        del view
        table.check(handle)
        assert handle == _live
    finally:
        views.close()


def descriptors(data: bytes) -> None:
    """What comes over the descriptor socket: the first byte says how many descriptors come with the rest."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = len(os.listdir("/proc/self/fd"))
    receiver = SegmentReceiver(theirs)
    try:
        fds = array.array("i", [0] * (len(data) and data[0] % 4))
        ours.sendmsg([data[1:] or b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])
        for *_, fd in receiver.receive_pending():
            os.close(fd)
    finally:
        receiver.close()
        assert len(os.listdir("/proc/self/fd")) == before, "no descriptor stays"
        ours.close()
        theirs.close()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "codec": codec,
    "classes": classes,
    "frames": frames,
    "handles": handles,
}
if sys.platform == "linux":
    TARGETS["descriptors"] = descriptors


def answer(target: str, data: bytes) -> str:
    """What an input gets; anything but the invariant's errors comes out as it is."""
    try:
        TARGETS[target](data)
    except (ProtocolError, UnsupportedValue) as error:
        return f"{type(error).__name__}: {_NUMBER.sub('#', str(error))}"[:_ANSWER_CHARS]
    return "accepted"


def seeds(target: str) -> list[bytes]:
    """The kept corpus, and good inputs to spoil."""
    kept = [path.read_bytes() for path in sorted(CORPUS.glob(f"{target}-*"))]
    if target == "codec":
        values = (
            [
                1,
                2.5,
                "text",
                b"bytes",
                None,
                True,
                {1: (2, {3})},
                2**80,
                range(3),
                slice(1, 2),
                complex(1, 2),
            ],
            {"samples": torch.zeros(2, 3, 4), "noise_mask": torch.ones(1, dtype=torch.bool)},
            torch.eye(3).to_sparse(),
            torch.ones(3).numpy(),
        )
        return kept + [encode(value, FakeStore(inline_max_bytes=4096)).tree for value in values]
    if target == "classes":
        objects: tuple[object, ...] = (
            [Pair(1, Pair(2)), Mode.ON, Mode.OFF, Box({"a": [1]}, "b"), Curve([1.0]), Named([1, {2}])],
            {Mode.ON: Box(Pair(1), "x"), Box(1): dt.date(2020, 1, 2), "p": PurePosixPath("/a")},
            Named(Named(Box(Curve([Mode.OFF])))),
        )
        return kept + [
            encode(value, FakeStore(inline_max_bytes=4096), types=_types()).tree for value in objects
        ]
    if target == "frames":
        messages = (Heartbeat(1, 2, 3, "j"), LogRecord("INFO", "x", "text"), Released((_live,)))
        good = [encode_message(message, max_bytes=1 << 20) for message in messages]
        return (
            kept
            + good
            + [msgpack.packb([1, code] + [0] * len(form.checks)) for code, form in MESSAGES.items()]
        )
    if target == "handles":
        return [*kept, msgpack.packb(_live.to_wire()), msgpack.packb([7, 1, 0, 1 << 20, 0])]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        send_segment_fd(ours, 7, 1, 4096, 0)
        data, ancillary, *_ = theirs.recvmsg(64, 64)
        for _, _, fds in ancillary:
            os.close(array.array("i", fds)[0])
    return [*kept, b"\x01" + data]


def mutated(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    spoiled = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 8))):
        at = dice.randrange(len(spoiled) + 1)
        kind = dice.randrange(7)
        if kind == 0 and spoiled:
            spoiled[at % len(spoiled)] ^= 1 << dice.randrange(8)
        elif kind == 1 and spoiled:
            spoiled[at % len(spoiled)] = dice.randrange(256)
        elif kind == 2:
            del spoiled[at : at + dice.randrange(1, 9)]
        elif kind == 3:
            spoiled[at:at] = msgpack.packb(dice.choice(_EDGES))
        elif kind == 4:
            spoiled[at:at] = spoiled[: dice.randrange(1, 33)]
        elif kind == 5:
            other = dice.choice(others)
            spoiled[at:] = other[dice.randrange(len(other) + 1) :]
        else:
            spoiled[at:at] = bytes(dice.randrange(256) for _ in range(dice.randrange(1, 9)))
    return bytes(spoiled[:INPUT_MAX])


def renamed(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """Half of them spoiled as others are; in the other half items of the tree become others, names names."""
    try:
        tree: object = msgpack.unpackb(data, strict_map_key=False) if dice.randrange(2) else None
    except Exception:  # what is no MessagePack is spoiled further
        tree = None
    places: list[tuple[list[Any], int]] = []
    lists: list[object] = [tree]
    while lists:
        at = lists.pop()
        if isinstance(at, list):
            places += [(at, number) for number in range(len(at))]
            lists += at
    if not places:
        return mutated(data, others, dice)
    for _ in range(dice.choice((1, 1, 2, 4))):
        holder, number = dice.choice(places)
        if isinstance(holder[number], str):
            holder[number] = dice.choice(CLASS_NAMES)
        else:
            other, there = dice.choice(places)
            holder[number] = dice.choice((dice.choice(_EDGES), dice.randrange(32), other[there], None, []))
    try:
        return bytes(msgpack.packb(tree))[:INPUT_MAX]
    except (ValueError, RecursionError):  # an item became its own part
        return mutated(data, others, dice)


SPOIL: dict[str, Callable[[bytes, list[bytes], random.Random], bytes]] = {"classes": renamed}


def _peak_bytes() -> int:
    """The most memory that this process has had."""
    if sys.platform == "linux":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def fuzz(target: str, *, seconds: float, seed: int, keep: bool = False) -> tuple[int, int]:
    """Inputs tried and different answers seen. The first input that breaks the invariant is raised."""
    dice = random.Random(seed)
    grown, spoil = seeds(target), SPOIL.get(target, mutated)
    answers: set[str] = set()
    tried, until_s = 0, time.monotonic() + seconds
    before = _peak_bytes()
    while time.monotonic() < until_s:
        data = grown[tried] if tried < len(grown) else spoil(dice.choice(grown), grown, dice)
        tried += 1
        try:
            told = answer(target, data)
        except BaseException as error:
            raise AssertionError(f"{target}: {data!r} gives {type(error).__name__}: {error}") from error
        if told not in answers:
            answers.add(told)
            grown.append(data)
            if keep and len(list(CORPUS.glob(f"{target}-*"))) < _KEPT_MAX and len(data) < 512:
                (CORPUS / f"{target}-{len(answers):03}").write_bytes(data)
    more = _peak_bytes() - before
    assert more < GROWN_MAX_BYTES, f"{target} made this process grow by {more} bytes"
    return tried, len(answers)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("LEGION_FUZZ_SECONDS", "60")))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write inputs with new answers into the corpus")
    given = parser.parse_args()
    for target in TARGETS:
        tried, answers = fuzz(target, seconds=given.seconds, seed=given.seed, keep=given.keep)
        print(f"{target}: {tried} inputs, {answers} different answers, the invariant held", flush=True)


if __name__ == "__main__":
    from tests.reliability import (
        fuzz as module,
    )  # its classes cross by their names; those of a main script don't

    module.main()
