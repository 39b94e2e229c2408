"""The tree on the wire: one flat MessagePack array of tokens, and how it is packed and unpacked.

    tree   = msgpack([VERSION, buffer count, buffer, ..., token, ...])
    buffer = bytes (inline) | [block index, offset, nbytes]
    token  = nil | bool | int64/uint64 | float64 | str | bytes | [tag, field, ...]

A container is a token with its length, followed by the tokens of its items: a value nests, its tree
does not. So a decoder's memory is bounded by the items that really arrive, whatever lengths a damaged
tree claims. docs/protocol.md lists the fields of each tag.

Owns tags, version and limits of the tokens. It never interprets a token.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, Final, cast

import msgpack

from legion_shm.errors import ProtocolError

__all__ = [
    "DEPTH_CEILING",
    "VERSION",
    "Refusal",
    "Token",
    "are_sizes",
    "is_list",
    "is_list_of",
    "pack_token",
    "pack_tree",
    "unpack_tree",
]

Token = list[Any]

VERSION: Final = 1

LIST: Final = 1
TUPLE: Final = 2
DICT: Final = 3
ORDERED_DICT: Final = 4
SET: Final = 5
FROZENSET: Final = 6
REFERENCE: Final = 7
INT: Final = 8
COMPLEX: Final = 9
RANGE: Final = 10
SLICE: Final = 11
BYTES: Final = 12
BYTEARRAY: Final = 13
STR: Final = 14
EXTENSION: Final = 15
ELSEWHERE: Final = 16
TENSOR: Final = 20
SPARSE: Final = 21
SIZE: Final = 22
DTYPE: Final = 23
DEVICE: Final = 24
ARRAY: Final = 30
SCALAR: Final = 31
NUMPY_STR: Final = 32
NUMPY_BYTES: Final = 33

# Where tensors and arrays hold what is known only once all are laid out.
AT_STRIDES: Final = 3
AT_BUFFER: Final = 4
AT_OFFSET: Final = 5
AT_FLAGS: Final = 6

REQUIRES_GRAD: Final = 1
PARAMETER: Final = 2
ATTRIBUTES: Final = 4
SHARED: Final = 8
COALESCED: Final = 16
READ_ONLY: Final = 1

DEPTH_CEILING: Final = 200
"""Both walks take three Python frames per level; the default recursion limit is 1000."""

MAX_DIMS: Final = 64
"""numpy's bound, and that of torch's operators."""

MAX_TOKEN_FIELDS: Final = 1024
"""Of one token: a structured dtype has as many names as fields."""

INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**64 - 1
SIZE_MAX: Final = 2**63 - 1


class Refusal(Exception):
    """A value can't travel. Each container that it passes on its way up adds its step of the path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self._steps: list[str] = []

    def add_step(self, step: str) -> None:
        self._steps.append(step)

    def rename_step(self, rename: Callable[[str], str]) -> None:
        """Change the step that was added last, or add one to none."""
        last = self._steps.pop() if self._steps else ""
        self._steps.append(rename(last))

    def path(self, root: str) -> str:
        return root + "".join(reversed(self._steps))


def is_list(value: object) -> bool:
    return type(value) is list


def is_list_of(kind: type, value: object) -> bool:
    """Whether that is a list of exactly such items."""
    return type(value) is list and {kind}.issuperset(map(type, cast("list[object]", value)))


def are_sizes(shape: object) -> bool:
    """Whether that is a list of sizes for at most `MAX_DIMS` dimensions, each of which fits into 63 bits."""
    if not is_list_of(int, shape):
        return False
    sizes = cast("list[int]", shape)
    return len(sizes) <= MAX_DIMS and (not sizes or (min(sizes) >= 0 and max(sizes) <= SIZE_MAX))


def pack_token(token: object) -> bytes:
    # surrogatepass: a str may hold lone surrogates (file names do), and comes back as it was.
    packer = msgpack.Packer(use_bin_type=True, unicode_errors="surrogatepass")
    return packer.pack(token)


def pack_tree(buffers: list[Any], tokens: list[Any]) -> bytes:
    return pack_token([VERSION, len(buffers), *buffers, *tokens])


def unpack_tree(tree: bytes, *, max_tokens: int) -> list[Any]:
    """The tokens of a tree, version checked and left out. Anything else raises `ProtocolError`."""
    nbytes = len(tree)
    if not nbytes:
        raise ProtocolError("a value's tree is empty")
    try:
        unpacker = msgpack.Unpacker(
            None,
            read_size=nbytes,
            max_buffer_size=nbytes,
            use_list=True,
            raw=False,
            unicode_errors="surrogatepass",
            strict_map_key=False,
            max_str_len=nbytes,
            max_bin_len=nbytes,
            max_array_len=MAX_TOKEN_FIELDS,
            max_map_len=0,
            max_ext_len=0,
        )
        unpacker.feed(tree)
        count = unpacker.read_array_header()
        if count > max_tokens:
            raise ProtocolError(f"a value's tree has {count} tokens, more than the {max_tokens} allowed")
        tokens: list[Any] = list(islice(unpacker, count))
        consumed = unpacker.tell()
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a value's tree is not what the codec writes: {error!r}") from error
    if len(tokens) != count or consumed != nbytes:
        raise ProtocolError(f"a value's tree of {nbytes} bytes is cut short or has bytes behind its end")
    if count < 2 or type(tokens[0]) is not int or tokens[0] != VERSION:
        raise ProtocolError(f"a value's tree is not of version {VERSION}")
    del tokens[0]
    return tokens
