"""Named values on their way in or out: what a channel carries, encoded once and accounted for.

Owns the meeting of codec, memory and messages, the same on both sides: `pack` encodes each named value
and gives back every block if one of them fails; `unpack` decodes and returns the leases on whatever the
decoder did not look at. It registers no lease and sends nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from legion_shm.errors import ArenaFull, LegionError
from legion_shm.transport.codec import (
    VALUE_TYPES,
    BlockStore,
    DevicePolicy,
    EncodedValue,
    Fresh,
    TransferStats,
    ValueTypes,
    decode,
    encode,
    value_identity,
)
from legion_shm.transport.codec_read import Reader
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.messages import ValueNote, Values
from legion_shm.transport.residence import Placing, residing

__all__ = [
    "BY_CONTENT",
    "EXTRA_DATA",
    "FOLDERS",
    "REPORT",
    "Identities",
    "PackedValues",
    "discard",
    "identity_of",
    "pack",
    "unpack",
]

BY_CONTENT = b""
"""For a note's identity: its tree and its blocks are all that there is to it."""

REPORT = "\0ui"
"""The name under which a result carries what its output nodes reported; no channel is called so."""

FOLDERS = "\0folders"
"""The key of that report, besides node ids, for the folders that its files are in."""

EXTRA_DATA = "\0extra_data"
"""The name under which a job's inputs carry its extra data."""


@dataclass(frozen=True)
class PackedValues:
    """Encoded values. ``keepalive`` must live until the leases on ``blocks`` have been registered.

    ``noted`` are the instances in them of classes whose `ValueType` is ``noted``.
    """

    values: Values
    stats: Mapping[str, TransferStats]
    keepalive: tuple[object, ...] = field(repr=False, default=())
    noted: tuple[object, ...] = field(repr=False, default=())

    def handles(self) -> Iterable[tuple[BlockHandle, bool]]:
        """Each block referred to, with whether it is new; one that two values use comes twice."""
        for note in self.values:
            yield from note.handles()


def pack(
    values: Mapping[str, object],
    store: BlockStore,
    *,
    types: ValueTypes = VALUE_TYPES,
    hold_copied: bool = False,
) -> PackedValues:
    """Encode each value. All or nothing: on any error no new block remains reserved.

    With ``hold_copied`` what was copied lives as long as the ``keepalive``: giving it back takes time.

    Raises UnsupportedValue with the path inside the value, ArenaFull.
    """
    notes: list[ValueNote] = []
    stats: dict[str, TransferStats] = {}
    keep: list[EncodedValue] = []
    fresh = Fresh() if len(values) > 1 else None
    try:
        with residing(store) as placing:
            for name, value in values.items():
                placing.copied_bytes = placing.copies = 0
                encoded = encode(
                    value, store, path=name.lstrip("\0"), types=types, fresh=fresh, hold_copied=hold_copied
                )
                keep.append(encoded)
                stats[name] = figures = _with_placed(encoded.stats, placing)
                identity: bytes | None = BY_CONTENT
                if True in encoded.owned or not (fresh is None or fresh.handles.isdisjoint(encoded.blocks)):
                    identity = None
                elif encoded.uses:
                    identity = value_identity(encoded.tree, encoded.blocks, encoded.owned)
                    identity = _with_uses(identity, [identity_of(notes[number]) for number in encoded.uses])
                numbers = _numbers(figures)
                note = ValueNote(name, encoded.tree, encoded.blocks, encoded.owned, identity, numbers)
                notes.append(note)
    except BaseException:
        discard(tuple(notes), store)
        raise
    noted = tuple([item for encoded in keep for item in encoded.noted])
    return PackedValues(tuple(notes), stats, tuple(keep), noted)


def discard(values: Values, store: BlockStore) -> None:
    """Give back the new blocks of values that will not be sent."""
    for note in values:
        for handle, new in note.handles():
            if new:
                store.discard(handle)


def identity_of(note: ValueNote) -> bytes | None:
    """What a cache may know a value by, worked out here where its sender left that to who asks."""
    if note.identity != BY_CONTENT:
        return note.identity
    return value_identity(note.tree, note.blocks, note.owned)


class Identities(Mapping[str, bytes | None]):
    """`identity_of` by name: for most jobs nobody asks, and it takes as long as a copy."""

    def __init__(self, values: Values) -> None:
        self._notes = {note.name: note for note in values}
        self._known: dict[str, bytes | None] = {}

    def __getitem__(self, name: str) -> bytes | None:
        if name not in self._known:
            self._known[name] = identity_of(self._notes[name])
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._notes)

    def __len__(self) -> int:
        return len(self._notes)


def _with_uses(identity: bytes | None, used: Sequence[bytes | None]) -> bytes | None:
    """The identity of a value that holds objects of others: theirs count too."""
    if identity is None or None in used:
        return None
    return hashlib.blake2b(b"".join((identity, *filter(None, used))), digest_size=len(identity)).digest()


def _with_placed(stats: TransferStats, placing: Placing) -> TransferStats:
    """What a reducer placed for this value was copied too; the codec saw it as lying in a block already."""
    if not placing.copies:
        return stats
    return replace(
        stats,
        copied_bytes=stats.copied_bytes + placing.copied_bytes,
        copies=stats.copies + placing.copies,
        referenced_bytes=max(0, stats.referenced_bytes - placing.copied_bytes),
    )


def _numbers(stats: TransferStats) -> tuple[int, ...]:
    return (
        stats.tensors,
        stats.payload_bytes,
        stats.inline_bytes,
        stats.copied_bytes,
        stats.copies,
        stats.referenced_bytes,
    )


_CPU_ALLOWED, _NO_OTHER_DEVICE = DevicePolicy(allow_cpu=True), DevicePolicy()


class _Viewed:
    """A store that notes which deliveries the decoder took."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self.inline_max_bytes = store.inline_max_bytes
        self.taken: set[BlockHandle] = set()
        self.find = store.find
        self.adopt = store.adopt
        self.reserve = store.reserve
        self.device_block = store.device_block
        self.discard = store.discard

    def view(self, handle: BlockHandle) -> Any:
        buffer = self._store.view(handle)
        self.taken.add(handle)
        return buffer


def unpack(
    values: Values,
    store: BlockStore,
    *,
    give_back: Callable[[BlockHandle], None],
    allow_cpu: bool,
    types: ValueTypes = VALUE_TYPES,
) -> dict[str, object]:
    """Decode each value. ``give_back`` gets each delivered block that no view was made of.

    Raises ProtocolError for anything malformed, UnsupportedValue for a device that is not here, ArenaFull
    where this process can map no more memory.
    """
    devices = _CPU_ALLOWED if allow_cpu else _NO_OTHER_DEVICE
    result: dict[str, object] = {}
    pending = [handle for note in values for handle in note.blocks]
    earlier: list[Reader] | None = [] if len(values) > 1 else None
    try:
        with residing(store):
            for name, tree, blocks, *_ in values:
                viewed = _Viewed(store) if blocks else store
                try:
                    result[name] = decode(
                        tree, blocks, viewed, devices=devices, path=name, types=types, earlier=earlier
                    )
                except (OSError, MemoryError) as error:
                    if isinstance(error, LegionError):
                        raise
                    raise ArenaFull(
                        f"{name.lstrip(chr(0))!r} arrived, and this process could not map it: {error}; it is "
                        "at a limit of memory, mappings or open files (ulimit -v, vm.max_map_count, "
                        "ulimit -n)"
                    ) from error
                finally:
                    for handle in viewed.taken if isinstance(viewed, _Viewed) else ():
                        pending.remove(handle)
    finally:
        for handle in pending:
            give_back(handle)
    return result
