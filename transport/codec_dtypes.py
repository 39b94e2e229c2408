"""numpy dtypes on the wire: described field by field, rebuilt from an allow-list, never evaluated.

    leaf       "<f4", "|S5", "<M8[25s]"   dtype.str, or byte order and type code where only that is exact
    subarray   ["a", item, [size, ...]]
    structure  ["s", names, titles | nil, items, offsets, itemsize, aligned, record]

numpy's own `descr` is not used: it fails on overlapping and out-of-order fields and drops padding.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, cast

import numpy as np

from legion_shm.errors import ProtocolError
from legion_shm.transport.codec_wire import MAX_TOKEN_FIELDS, Refusal, are_sizes, is_list, is_list_of

__all__ = ["describe_dtype", "rebuild_dtype"]

DType = np.dtype[Any]

_LEAF = re.compile(
    r"\|b1|\|[iu]1|[<>][iu][248]|[<>]f(?:2|4|8|10|12|16)|[<>]c(?:8|16|20|24|32)"
    r"|\|[SV]\d{1,9}|[<>|]U\d{1,8}|[<>][mM]8(?:\[\d{0,9}[A-Za-z]{1,7}\])?|[<>|]?[iIlLqQgG]"
)
_CLASSES = frozenset(type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDGSUVmM")
_MAX_NESTING = 16


def describe_dtype(dtype: DType) -> Any:
    """What stands for a dtype in a token. Raises `Refusal` where nothing exact can."""
    description = _describe(dtype, 0)
    if dtype.names is not None and rebuild_dtype(description) != dtype:
        raise Refusal(f"numpy dtype {dtype} has no exact description")
    return description


def _describe(dtype: DType, nesting: int) -> Any:
    if dtype.hasobject:
        raise Refusal(f"numpy dtype {dtype} holds Python objects; convert it to numbers, texts or a list")
    if type(dtype) not in _CLASSES:
        raise Refusal(f"numpy dtype {dtype} can't be sent; convert it with astype")
    if dtype.metadata:
        raise Refusal(f"numpy dtype {dtype} has metadata, which would be lost; remove it with astype")
    if nesting > _MAX_NESTING:
        raise Refusal(f"a numpy dtype nested more than {_MAX_NESTING} levels deep")
    if dtype.subdtype is not None:
        item, shape = dtype.subdtype
        return ["a", _describe(item, nesting + 1), list(shape)]
    names = dtype.names
    if names is None:
        if dtype.type is np.record:
            raise Refusal("a numpy record dtype without fields")
        return _describe_leaf(dtype)
    if len(names) > MAX_TOKEN_FIELDS:
        raise Refusal(f"a numpy dtype with more than {MAX_TOKEN_FIELDS} fields")
    known: Any = cast("Any", dtype).fields
    members: list[tuple[Any, ...]] = [known[name] for name in names]
    titles = [member[2] if len(member) > 2 else None for member in members]
    if any(title is not None and type(title) is not str for title in titles):
        raise Refusal(f"numpy dtype {dtype} has titles that are not texts")
    return [
        "s",
        list(names),
        titles if any(title is not None for title in titles) else None,
        [_describe(member[0], nesting + 1) for member in members],
        [member[1] for member in members],
        dtype.itemsize,
        dtype.isalignedstruct,
        dtype.type is np.record,
    ]


def _describe_leaf(dtype: DType) -> str:
    text: str = cast("Any", dtype).str
    if dtype.char in "iIlLqQgG" and np.dtype(text).char != dtype.char:
        # Two C types of one size are different scalar classes: long and long long; on Windows int and long,
        # double and long double.
        return f"{text[0]}{dtype.char}"
    return text


def rebuild_dtype(description: object) -> DType:
    """The dtype that `describe_dtype` described. Anything else raises `ProtocolError`."""
    if type(description) is str:
        return _leaf(description)
    try:
        return _rebuild(description, 0)
    except ProtocolError:
        raise
    except Exception as error:  # numpy judges what it is given with errors of many classes
        raise ProtocolError(f"not a numpy dtype: {error!r}") from error


@lru_cache(maxsize=256)
def _leaf(text: str) -> DType:
    if not _LEAF.fullmatch(text):
        raise ProtocolError(f"not a numpy dtype that can be sent: {text!r:.60}")
    try:
        dtype = np.dtype(text)
    except Exception as error:
        raise ProtocolError(f"not a numpy dtype: {text!r:.60}") from error
    if type(dtype) not in _CLASSES or dtype.hasobject:
        raise ProtocolError(f"not a numpy dtype that can be sent: {text!r:.60}")
    return dtype


def _rebuild(description: Any, nesting: int) -> DType:
    if type(description) is str:
        return _leaf(description)
    if not is_list(description) or not description or nesting > _MAX_NESTING:
        raise ProtocolError("a numpy dtype without a description")
    kind, *parts = description
    if kind == "a" and len(parts) == 2:
        item, shape = parts
        if are_sizes(shape):
            return np.dtype((_rebuild(item, nesting + 1), tuple(shape)))
    elif kind == "s" and len(parts) == 7:
        return _rebuild_structure(parts, nesting)
    raise ProtocolError("a numpy dtype with a malformed description")


def _rebuild_structure(parts: list[Any], nesting: int) -> DType:
    names, titles, items, offsets, itemsize, aligned, record = parts
    if not (
        is_list_of(str, names)
        and (titles is None or _are_titles(titles))
        and is_list(items)
        and is_list_of(int, offsets)
        and type(itemsize) is int
        and 0 <= itemsize < 2**31
        and type(aligned) is bool
        and type(record) is bool
    ):
        raise ProtocolError("a numpy dtype with a malformed description")
    layout: dict[str, Any] = {
        "names": names,
        "formats": [_rebuild(item, nesting + 1) for item in items],
        "offsets": offsets,
        "itemsize": itemsize,
    }
    if titles is not None:
        layout["titles"] = titles
    dtype: DType = np.dtype(cast("Any", layout), align=aligned)
    return np.dtype((np.record, dtype)) if record else dtype


def _are_titles(titles: object) -> bool:
    return type(titles) is list and all(
        title is None or type(title) is str for title in cast("list[object]", titles)
    )
