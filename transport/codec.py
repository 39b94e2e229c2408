"""The value codec: any value that nodes exchange, as a MessagePack tree over blocks of shared memory.

    encode:  value ─ Planner ─▶ tokens + regions ─ cluster ─▶ groups ─ write_groups ─▶ tree + blocks
    decode:  tree + blocks ─ unpack_tree ─▶ tokens ─ Reader ─▶ value

Lossless: classes are kept exactly, tensors and arrays keep dtype, shape, strides and what they share;
what can't travel raises `UnsupportedValue` with its path, before anything is reserved. Decoding is
strict and bounded. The codec owns no memory: blocks come from a `BlockStore` and leases are its
caller's. Classes beyond the builtin ones are codec_registry.py's. It imports torch and numpy only for
values that hold something of theirs.
"""

from __future__ import annotations

import hashlib
import struct
import traceback
from collections.abc import Sequence
from typing import Any

from legion_shm.errors import ProtocolError, UnsupportedValue
from legion_shm.transport.codec_blocks import Fresh, discard_all, write_groups
from legion_shm.transport.codec_builtins import Builtins
from legion_shm.transport.codec_layout import cluster
from legion_shm.transport.codec_objects import Records
from legion_shm.transport.codec_pickle import Pickled
from legion_shm.transport.codec_plan import Planner
from legion_shm.transport.codec_plugins import Plugins
from legion_shm.transport.codec_read import Reader
from legion_shm.transport.codec_registry import (
    VALUE_TYPES,
    CodecSource,
    ValueType,
    ValueTypes,
    register_codec,
)
from legion_shm.transport.codec_types import (
    BlockStore,
    DecodeLimits,
    DevicePolicy,
    DeviceResolver,
    EncodedValue,
    ReservedBlock,
    TransferStats,
)
from legion_shm.transport.codec_wire import DEPTH_CEILING, INT_MAX, INT_MIN, Refusal, pack_tree, unpack_tree
from legion_shm.transport.handles import BlockHandle

__all__ = [
    "RECORDS",
    "VALUE_TYPES",
    "BlockStore",
    "CodecSource",
    "DecodeLimits",
    "DevicePolicy",
    "DeviceResolver",
    "EncodedValue",
    "Fresh",
    "Pickled",
    "ReservedBlock",
    "TransferStats",
    "ValueType",
    "ValueTypes",
    "decode",
    "encode",
    "register_codec",
    "value_identity",
]

RECORDS = Records()
"""Enums, named tuples, dataclasses, attrs and pydantic classes of this process; `allow` modules here."""

VALUE_TYPES.add_source(Builtins())
VALUE_TYPES.add_source(RECORDS)
VALUE_TYPES.add_source(Plugins(VALUE_TYPES))

_LIMITS = DecodeLimits()
_DEVICES = DevicePolicy()
_PLAIN = frozenset((str, int, float, bool, bytes, type(None)))
_LEAVES = frozenset((bool, float))
_NO_PAYLOAD = TransferStats()
_HANDLE = struct.Struct("<QIQQQ")


def encode(
    value: object,
    store: BlockStore,
    *,
    path: str = "value",
    max_depth: int = 64,
    limits: DecodeLimits = _LIMITS,
    devices: DevicePolicy = _DEVICES,
    types: ValueTypes = VALUE_TYPES,
    fresh: Fresh | None = None,
    hold_copied: bool = False,
) -> EncodedValue:
    """Encode a value; its private bytes are copied once, those in blocks already not at all.

    ``fresh`` is the same for all values of one message, so that what two of them share is copied once, and
    is one object on the other side. With
    ``hold_copied`` the result's ``keepalive`` has what was copied too: giving memory back takes time.
    Raises `UnsupportedValue` with a path that starts with ``path``, before any block is reserved, and
    what ``store.reserve`` raises (`ArenaFull`), after all that was reserved has been discarded.
    """
    if fresh is None and (
        value is None or type(value) in _LEAVES or (type(value) is int and INT_MIN <= value <= INT_MAX)
    ):
        return EncodedValue(pack_tree([], [value]), (), (), _NO_PAYLOAD)
    planner = Planner(
        inline_max_bytes=store.inline_max_bytes,
        max_depth=min(max_depth, limits.max_depth, DEPTH_CEILING),
        limits=limits,
        devices=devices,
        types=types,
    )
    if fresh is not None:
        planner.elsewhere = fresh.objects
    try:
        planner.node(value, 0)
        planner.finish()
    except Refusal as refusal:
        where = refusal.path(path)
        raise UnsupportedValue(f"{where}: {refusal.reason}", path=where) from refusal.__cause__
    except RecursionError as error:
        raise UnsupportedValue(f"{path}: nested too deep for this thread's stack", path=path) from error
    if not (planner.regions or planner.tensors or fresh):  # nothing but what is in the tree
        tree = pack_tree([], planner.tokens)
        return EncodedValue(tree, (), (), _NO_PAYLOAD, noted=tuple(planner.noted))
    groups = cluster(planner.regions) if planner.regions else []
    written = write_groups(groups, store, max_inline_bytes=limits.max_inline_bytes, fresh=fresh)
    try:
        tree = pack_tree(written.buffers, planner.tokens)
    except BaseException:
        discard_all(written, store)
        raise
    if fresh is not None:
        fresh.note_objects(*planner.objects())
    return EncodedValue(
        tree=tree,
        blocks=tuple(written.blocks),
        owned=tuple(written.owned),
        stats=written.stats(planner.tensors),
        keepalive=tuple(written.referenced + written.copied if hold_copied else written.referenced),
        noted=tuple(planner.noted),
        uses=tuple(sorted(planner.uses)),
    )


def decode(
    tree: bytes,
    blocks: Sequence[BlockHandle],
    store: BlockStore,
    *,
    path: str = "value",
    limits: DecodeLimits = _LIMITS,
    devices: DevicePolicy = _DEVICES,
    types: ValueTypes = VALUE_TYPES,
    earlier: list[Reader] | None = None,
) -> object:
    """The value that `encode` encoded. Its tensors and arrays are writable views of the blocks.

    ``earlier`` is the same list for all values of one message, in their order, if they were encoded with one
    ``fresh``.

    Each block is viewed exactly once, first of all, so that its lease ends whatever the tree holds.
    Raises `ProtocolError` (`InvalidHandle`, `StaleHandle`) for anything that `encode` doesn't write,
    and `UnsupportedValue` for what this process hasn't: a class or its codec, or a tensor's device, unless
    ``devices`` allows the CPU.
    """
    try:
        return _decode(tree, blocks, store, path, limits, devices, types, earlier)
    except (ProtocolError, UnsupportedValue) as error:
        _forget_frames(error)
        raise


def _decode(
    tree: bytes,
    blocks: Sequence[BlockHandle],
    store: BlockStore,
    path: str,
    limits: DecodeLimits,
    devices: DevicePolicy,
    types: ValueTypes,
    earlier: list[Reader] | None,
) -> object:
    if len(blocks) > limits.max_tensors or len(set(blocks)) != len(blocks):
        raise ProtocolError(f"a value over {len(blocks)} blocks: too many, or one of them twice")
    views = [store.view(handle) for handle in blocks]
    tokens = unpack_tree(tree, max_tokens=limits.max_items + limits.max_tensors + 2)
    if not blocks and earlier is None and _is_plain(tokens):
        return tokens[1]
    try:
        reader = Reader(tokens, blocks, views, limits=limits, devices=devices, types=types)
        reader.earlier = earlier or ()
        value = reader.read()
    except Refusal as refusal:
        where = refusal.path(path)
        raise UnsupportedValue(f"{where}: {refusal.reason}", path=where) from None
    except RecursionError as error:
        raise ProtocolError("a value nested too deep for this thread's stack") from error
    if earlier is not None:
        earlier.append(reader)
    return value


def _is_plain(tokens: list[Any]) -> bool:
    """Whether they are one number, short text or the like, as which `Reader` would give it."""
    return len(tokens) == 2 and type(tokens[0]) is int and tokens[0] == 0 and type(tokens[1]) in _PLAIN


def _forget_frames(error: BaseException | None) -> None:
    """Drop what the frames behind an error hold: someone may keep the error, and must not keep the leases."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def value_identity(tree: bytes, blocks: Sequence[BlockHandle], owned: Sequence[bool]) -> bytes | None:
    """A digest that is equal for equal values, for caches to key on; None when no other can ever equal it.

    Inline content counts by its bytes, blocks by their handles: a handle's generation is never used
    again, so equal handles mean equal bytes. A block that was copied for this value is new each time.
    """
    if any(owned):
        return None
    digest = hashlib.blake2b(tree, digest_size=32)
    for handle in blocks:
        digest.update(
            _HANDLE.pack(handle.arena, handle.segment, handle.offset, handle.nbytes, handle.generation)
        )
    return digest.digest()
