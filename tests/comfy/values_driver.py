"""Sends a value of every type from one real ComfyUI to another and back, and writes what came of each.

    python values_driver.py RESULTS.json COMFYUI_PATH [ComfyUI arguments ...]

This process has ComfyUI loaded, as the master has; the worker is a ComfyUI of its own. What comes back
must be what was sent: classes, bits, strides, and which objects are one.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import struct
import sys
import time
import types
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from legion_shm import LegionError, Supervisor, UnsupportedValue, WorkerSpec
from legion_shm.supervisor.comfy import ComfyEngine
from legion_shm.supervisor.comfy_models_special import lasting_attributes, patcher_attributes
from legion_shm.transport.codec import VALUE_TYPES
from legion_shm.transport.codec_objects import fields_of

_PASS = {
    "1": {"class_type": "LegionImporter", "inputs": {}},
    "2": {"class_type": "LegionExporter", "inputs": {"input_1": ["1", 0]}},
}
_LIGHT_S = 0.05
"""What went there and back in less is nested in others at random."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def difference(sent: Any, got: Any, pairs: dict[int, int], where: str = "value") -> str | None:
    """Where two values differ first, or None. ``pairs`` holds which object stands for which."""
    if not _same_class(type(sent), type(got)):
        return f"{where}: {type(sent).__name__} came back as {type(got).__name__}"
    # What can't be changed and holds no other object is equal; that it be one object is not promised.
    if isinstance(
        sent, (bool, int, str, bytes, Enum, range, torch.device, torch.dtype, torch.Size, type(None))
    ):
        return None if sent == got else f"{where}: {sent!r:.40} came back as {got!r:.40}"
    if isinstance(sent, float):
        return None if struct.pack("<d", sent) == struct.pack("<d", got) else f"{where}: {sent!r} as {got!r}"
    if id(sent) in pairs:
        return None if pairs[id(sent)] == id(got) else f"{where}: one object came back as two"
    if id(got) in pairs.values():
        return f"{where}: two objects came back as one"
    pairs[id(sent)] = id(got)
    if isinstance(sent, torch.Tensor):
        return tensor_difference(sent, got, where)
    if isinstance(sent, np.ndarray):
        same = sent.dtype == got.dtype and sent.shape == got.shape and sent.tobytes() == got.tobytes()
        return None if same else f"{where}: another array"
    if isinstance(sent, io.BytesIO):
        same = (sent.getvalue(), sent.tell()) == (got.getvalue(), got.tell())
        return None if same else f"{where}: another stream"
    if isinstance(sent, types.FunctionType):
        if "<" not in sent.__qualname__:  # else it has no name to be found by
            return None if sent is got else f"{where}: another function"
        # Not the code objects: of two equal lambdas in one module, either is the other.
        if sent.__code__.co_code != got.__code__.co_code or sent.__code__.co_consts != got.__code__.co_consts:
            return f"{where}: another function's code"
        sent, got = ([cell.cell_contents for cell in one.__closure__ or ()] for one in (sent, got))
        _KEPT.append((sent, got))
        return difference(sent, got, pairs, f"{where}'s closure")
    if isinstance(sent, (list, tuple)):
        if len(sent) != len(got):
            return f"{where}: {len(sent)} items came back as {len(got)}"
        found = (
            difference(a, b, pairs, f"{where}[{n}]") for n, (a, b) in enumerate(zip(sent, got, strict=True))
        )
        return next((text for text in found if text), None)
    if isinstance(sent, (set, frozenset)):
        return None if sent == got else f"{where}: another set"
    if isinstance(sent, (dict, OrderedDict)):
        if list(map(repr, sent)) != list(map(repr, got)):
            return f"{where}: other keys"
        found = (
            difference(a, b, pairs, f"{where}[{key!r:.40}]")
            for (key, a), b in zip(sent.items(), got.values(), strict=True)
        )
        return next((text for text in found if text), None)
    if type(sent).__module__ == "fractions":
        return None if sent == got else f"{where}: another number"
    fields = _lasting(sent), _lasting(got)
    _KEPT.append(fields)
    if not isinstance(pairs, _InsideOfModel) and _is_live(type(sent)):
        pairs = _InsideOfModel({id(sent): id(got)})
    return difference(*fields, pairs, where)


class _InsideOfModel(dict[int, int]):
    """Which object stands for which inside of a model; what it shares with others is not promised."""


def _is_live(kind: type) -> bool:
    value_type = VALUE_TYPES.by_class(kind)
    return value_type is not None and value_type.name == "comfy"


def _same_class(one: type, other: type) -> bool:
    """A class made inside of a function, as patches of models are, is made anew where it arrives."""
    if one is other:
        return True
    inner = "<locals>" in one.__qualname__ and one.__qualname__ == other.__qualname__
    return inner and one.__module__ == other.__module__ and one.__mro__[2:] == other.__mro__[2:]


_KEPT: list[object] = []
"""What was compared by its identity, so that no other object gets the same."""


def _lasting(value: Any) -> dict[str, object]:
    """An object's fields; of models those that are not about where they are loaded just now."""
    fields = fields_of(value)
    if isinstance(value, torch.nn.Module):
        return dict(lasting_attributes(fields))
    if "object_patches_backup" in fields:
        return {**patcher_attributes(value), "model": fields["model"], "load_device": fields["load_device"]}
    return fields


def tensor_difference(sent: torch.Tensor, got: torch.Tensor, where: str) -> str | None:
    for name in ("dtype", "shape", "device", "requires_grad"):
        if getattr(sent, name) != getattr(got, name):
            return f"{where}: {name} {getattr(sent, name)} came back as {getattr(got, name)}"
    dense = sent.is_contiguous() or sent.numel() == 0
    if dense and sent.stride() != got.stride():
        return f"{where}: strides {sent.stride()} came back as {got.stride()}"
    if not sent.numel():
        return None
    bits = _BITS[sent.dtype.itemsize]
    same = torch.equal(sent.detach().contiguous().view(bits), got.detach().contiguous().view(bits))
    return None if same else f"{where}: other bits"


def main(results: Path, comfyui: str, arguments: tuple[str, ...]) -> None:
    engine = ComfyEngine(comfyui_path=comfyui, extra_args=arguments)
    info = engine.start()
    making: Any = importlib.import_module("value_making")  # beside this file; ComfyUI has tests of its own
    samples: Any = importlib.import_module("value_samples")
    nesting: Any = importlib.import_module("value_nesting")
    shop = making.Workshop(engine)
    spec = WorkerSpec(
        engine="comfy", comfyui_path=comfyui, python_executable=sys.executable, extra_args=arguments
    )
    rows: list[dict[str, Any]] = []
    light: list[Any] = []
    with Supervisor() as legion:

        def there_and_back(value: object) -> object:
            return legion.submit(_PASS, inputs=[value], spec=spec).result(timeout=120)["output_1"]

        for sample in samples.samples():
            row, value = _sent(there_and_back, making, shop, sample)
            rows.append(row)
            if row["outcome"] == "exact" and row["seconds"] < _LIGHT_S:
                light.append(value)
        cases, wrong = int(os.environ.get("LEGION_VALUE_EXAMPLES", "1000")), []
        for case in range(cases):
            _KEPT.clear()
            value = nesting.nested(random.Random(case), light)
            found = difference(value, there_and_back(value), {})
            wrong += [] if found is None else [f"case {case}: {found}"]
    engine.close()
    types = shop.types()
    report: dict[str, Any] = {
        "version": info.versions["comfyui"],
        "types": types,
        "no_values": {kind: why for kind, why in samples.NO_VALUES.items() if kind in types},
        "rows": rows,
        "nested": {"cases": cases, "of": len(light), "wrong": wrong},
    }
    results.write_text(json.dumps(report))


def _sent(
    there_and_back: Callable[[object], object], making: Any, shop: Any, sample: Any
) -> tuple[dict[str, Any], Any]:
    """What came of a sample that was made, sent there and back; and the sample."""
    row: dict[str, Any] = {"type": sample.kind, "what": sample.what, "maker": sample.made_by}
    row |= {"by_node": not sample.why, "why": sample.why}
    try:
        value = shop.make(sample)
    except making.Absent as absent:
        return {**row, "outcome": str(absent)}, None
    except Exception as error:
        return {**row, "outcome": "no sample", "reason": f"{type(error).__name__}: {error}"}, None
    began = time.monotonic()
    try:
        got = there_and_back(value)
    except UnsupportedValue as error:
        reason = str(error).removeprefix(f"{error.path}: ")
        return {**row, "outcome": "refused", "path": error.path, "reason": reason}, value
    except LegionError as error:
        return {**row, "outcome": "failed", "reason": f"{type(error).__name__}: {error}"}, value
    row["seconds"] = time.monotonic() - began
    wrong = difference(value, got, {})
    return {**row, "outcome": "exact" if wrong is None else "differs", "reason": wrong}, value


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], tuple(sys.argv[3:]))
