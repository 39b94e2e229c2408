"""Whether the nodes of a worker's workflow count as changed: they read files, or draw random numbers.

Owns the question. ComfyUI asks it of the nodes in its own prompt only, and would give out a Master's former
outputs though an image that its worker loads was replaced. Here the same classes are asked in the master.

    prompt ──▶ IS_CHANGED, fingerprint_inputs of each node ──▶ one digest; NaN where one says "always"
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from legion_shm.workflow import Workflow, is_link

__all__ = ["answers_of"]


def answers_of(prompt: Workflow, classes: Mapping[str, Any], own: Mapping[str, Any]) -> str | float:
    """What the nodes say, as a digest: empty where none says anything, NaN where one is changed each time.

    ``classes`` are the master's; the workers' other nodes, and those in ``own``, are not asked. A node whose
    answer can't be had counts as unchanged, for ComfyUI's own way to ask may know more than this one.
    """
    digest = hashlib.sha256()
    asked = False
    for node_id, node in sorted(prompt.items()):
        kind = node["class_type"]
        ask = None if kind in own else _question(classes.get(kind))
        if ask is None:
            continue
        answer = _answer(ask, node["inputs"])
        if isinstance(answer, float) and math.isnan(answer):
            return answer
        asked = True
        digest.update(repr((node_id, answer)).encode())
    return digest.hexdigest() if asked else ""


def _question(node_class: Any) -> Callable[..., Any] | None:
    """IS_CHANGED, or what the newer node classes have in its place; None where the class has neither."""
    if "fingerprint_inputs" in _names_below_the_base(node_class):
        return node_class.fingerprint_inputs  # type: ignore[no-any-return]
    if hasattr(node_class, "GET_SCHEMA"):
        return None
    return getattr(node_class, "IS_CHANGED", None)


def _names_below_the_base(node_class: Any) -> set[str]:
    """What a class of the newer kind and its parents define, without ComfyUI's own base classes."""
    parents: tuple[type, ...] = getattr(node_class, "__mro__", ())
    return {name for each in parents if not each.__module__.startswith("comfy_api.") for name in vars(each)}


def _answer(ask: Callable[..., Any], inputs: Mapping[str, Any]) -> object:
    """As ComfyUI asks: constants as they are, None for what comes over a link."""
    given = {name: None if is_link(value) else value for name, value in inputs.items()}
    try:
        answer = ask(**given)
    except Exception:
        return None
    if inspect.iscoroutine(answer):
        answer.close()
        return None
    return answer
