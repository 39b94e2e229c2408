"""What the graph engine says of a node that failed: its inputs in short, and the JobFailed.

Owns texts only. It never raises, whatever a node's values or exceptions do when they are looked at, and
everything it says is bounded.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any, cast

from legion_shm.errors import JobFailed

__all__ = ["describe_inputs", "describe_value", "node_failure"]

_VALUE_CHARS = 160
_SUMMARY_LINES = 40
_ITEMS_SHOWN = 4
_DEPTH_SHOWN = 2
_MESSAGE_CHARS = 4_000
_TRACEBACK_CHARS = 20_000
"""Enough for the frames that matter, and together far below a control message's limit."""


def describe_value(value: object, depth: int = 0) -> str:
    """A value in a few words: shape, dtype and device of a tensor or array, else a short repr."""
    try:
        return _cut(_describe(value, depth), _VALUE_CHARS)
    except Exception as error:
        return f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"


def _describe(value: object, depth: int) -> str:
    kind = type(value).__name__
    shape, dtype = cast("tuple[Any, Any]", (getattr(value, "shape", None), getattr(value, "dtype", None)))
    if shape is not None and dtype is not None:
        device = cast("object", getattr(value, "device", None))
        where = "" if device is None else f" {device}"
        return f"{kind}[{','.join(str(size) for size in shape)}] {str(dtype).removeprefix('torch.')}{where}"
    if isinstance(value, (str, bytes)):
        text = repr(value[:_VALUE_CHARS])
        return text if len(value) <= 100 else f"{kind} of {len(value)}: {text}"
    if isinstance(value, (bool, int, float, type(None))):
        return repr(value)
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        sized = cast("dict[object, object] | Sequence[object]", value)
        if depth >= _DEPTH_SHOWN:
            return f"{kind} of {len(sized)}"
        if isinstance(sized, dict):
            shown = [
                f"{_key(k)}: {describe_value(v, depth + 1)}" for k, v in list(sized.items())[:_ITEMS_SHOWN]
            ]
        else:
            shown = [describe_value(item, depth + 1) for item in list(sized)[:_ITEMS_SHOWN]]
        more = ", ..." if len(sized) > _ITEMS_SHOWN else ""
        return f"{kind} of {len(sized)}: {', '.join(shown)}{more}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _key(key: object) -> str:
    return describe_value(key, _DEPTH_SHOWN)


def describe_inputs(inputs: Mapping[str, Sequence[object]]) -> str:
    """A node's inputs, one line each; an input that is a list of several items says so."""
    lines: list[str] = []
    for name, items in list(inputs.items())[:_SUMMARY_LINES]:
        if len(items) == 1:
            lines.append(f"{name}: {describe_value(items[0])}")
        else:
            lines.append(_cut(f"{name}: {len(items)} items: {describe_value(list(items))}", 2 * _VALUE_CHARS))
    if len(inputs) > _SUMMARY_LINES:
        lines.append(f"... and {len(inputs) - _SUMMARY_LINES} more inputs")
    return "\n".join(lines)


def node_failure(
    error: BaseException,
    *,
    job_id: str,
    node_id: str,
    class_type: str,
    inputs: Mapping[str, Sequence[object]],
) -> JobFailed:
    """The JobFailed that tells of ``error`` in a node. It holds texts only, so it keeps no tensor alive."""
    name = qualified_name(type(error))
    try:
        message = _cut(str(error), _MESSAGE_CHARS)
    except Exception:
        message = "(its message cannot be shown)"
    return JobFailed(
        f"node {node_id} ({class_type}) of job {job_id} failed: {name}{': ' if message else ''}{message}",
        job_id=job_id,
        node_id=node_id,
        class_type=class_type,
        exception_type=name,
        exception_message=message,
        traceback=_traceback_text(error),
        inputs_summary=describe_inputs(inputs),
    )


def qualified_name(kind: type) -> str:
    """``module.Name``, and the bare name for builtins."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _traceback_text(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception as broken:
        return f"(the traceback cannot be shown: {type(broken).__name__})"
    if len(text) <= _TRACEBACK_CHARS:
        return text
    half = _TRACEBACK_CHARS // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
