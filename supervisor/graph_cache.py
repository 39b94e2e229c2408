"""What the graph engine keeps from one job to the next: node outputs, node objects, validated plans.

Owns the signatures by which outputs are found again and the rule of what stays. It runs no node.

A node's signature covers its class, its constants, the signatures of what it is linked to and what its
IS_CHANGED gave. Two kinds of nodes are *volatile*: those whose IS_CHANGED gave NaN (or anything that is
not equal to itself or has no stable bytes), and those downstream of one. A volatile node's outputs live for
one job. Of the others, as in ComfyUI's classic cache, those stay that the last prompt used.

A class may have two attributes that only this engine knows:
- ``KEEP_OUTPUTS = False``: its outputs are never kept, because making them again costs nothing.
- ``OUTPUT_SIGNATURES(**constants)``: a classmethod that gives one entry per output slot: bytes that are
  equal for equal values, NaN for a value that cannot be given again, or None for "as the node itself".
  What is linked to a slot with bytes does not depend on the node's other slots.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from legion_shm.supervisor.graph_call import NodeResult
from legion_shm.supervisor.graph_protocol import Link, PlannedNode
from legion_shm.supervisor.graph_validation import Plan, SignatureRecipe
from legion_shm.supervisor.graph_writes import Watch

__all__ = ["GraphCache", "Signature", "encode_constant", "sign_plan"]

_log = logging.getLogger(__name__)

_PLANS_KEPT = 64
"""A plan is a few kilobytes and takes about as long to make as running small nodes does."""


@dataclass(frozen=True)
class Signature:
    """What a node's outputs are found by; ``volatile``: they live for one job. ``slots``: their own.

    What is volatile has no bytes that say anything.
    """

    node: bytes
    volatile: bool
    slots: Mapping[int, tuple[bytes, bool]]

    def of_slot(self, slot: int) -> tuple[bytes, bool]:
        return self.slots.get(slot, (self.node + struct.pack(">q", slot), self.volatile))


def encode_constant(value: object) -> bytes | None:
    """Bytes that are equal for equal constants of equal types, or None where there are none.

    NaN has none: it is not equal to itself. Nor has an object of a type that JSON does not know.
    """
    if value is None or isinstance(value, bool):
        text = repr(value).encode()
    elif isinstance(value, int):
        text = f"int:{value:x}".encode()
    elif isinstance(value, str):
        text = b"str:" + str.__str__(value).encode("utf-8", "surrogatepass")
    elif isinstance(value, float):
        if value != value:
            return None
        text = f"float:{float.hex(value)}".encode()
    elif isinstance(value, bytes):
        text = b"bytes:" + value
    elif isinstance(value, Mapping):
        pairs = cast("Mapping[object, object]", value).items()
        parts = [
            encode_constant(item) for pair in sorted(pairs, key=lambda pair: repr(pair[0])) for item in pair
        ]
        return _join(b"map", parts)
    elif isinstance(value, (list, tuple)):
        return _join(b"list", [encode_constant(item) for item in cast("Sequence[object]", value)])
    else:
        return None
    return struct.pack(">Q", len(text)) + text


def _join(kind: bytes, parts: Iterable[bytes | None]) -> bytes | None:
    body: list[bytes] = []
    for part in parts:
        if part is None:
            return None
        body.append(part)
    return kind + struct.pack(">Q", len(body)) + b"".join(body)


def sign_plan(plan: Plan, fingerprint: Callable[[PlannedNode, str], object]) -> dict[str, Signature]:
    """The signatures of the nodes of ``plan`` whose outputs may be kept, and of those that they are made of.

    ``fingerprint(node, function_name)`` calls a class's IS_CHANGED or OUTPUT_SIGNATURES over the node's
    constants and gives the list of what it returned.
    """
    if not plan.recipes:  # constants don't change between jobs
        plan.recipes.update(_recipes(plan))
    signatures: dict[str, Signature] = {}
    for node_id, recipe in plan.recipes.items():
        if recipe is not None:
            signatures[node_id] = _sign_node(plan.nodes[node_id], recipe, signatures, fingerprint)
    return signatures


def _recipes(plan: Plan) -> dict[str, SignatureRecipe | None]:
    """In the plan's order. Nobody looks for what is never kept: such a node counts by what reads it."""
    slots_read: dict[str, set[int]] = {}
    for node_id, node in reversed(list(plan.nodes.items())):
        if node.kept or node_id in slots_read:
            for link in node.links.values():
                slots_read.setdefault(link.node_id, set()).add(link.slot)
    return {
        node_id: SignatureRecipe(_parts_of(node), frozenset(slots_read.get(node_id, ())))
        if node.kept or node_id in slots_read
        else None
        for node_id, node in plan.nodes.items()
    }


def _sign_node(
    node: PlannedNode,
    recipe: SignatureRecipe,
    signatures: Mapping[str, Signature],
    fingerprint: Callable[[PlannedNode, str], object],
) -> Signature:
    slots = _slot_signatures(node, fingerprint)
    if not node.kept and recipe.slots <= slots.keys():
        return Signature(b"", True, slots)
    changed: object = False
    if hasattr(node.node_class, "IS_CHANGED"):
        changed = _ask(node, "IS_CHANGED", fingerprint)
    own = encode_constant(changed)
    parts: list[bytes | None] = [own]
    for part in recipe.parts:
        if isinstance(part, Link):
            linked, volatile = signatures[part.node_id].of_slot(part.slot)
            parts.append(None if volatile else b"link" + linked)
        else:
            parts.append(part)
    if None in parts:
        return Signature(b"", True, slots)
    digest = hashlib.blake2b(b"".join(cast("list[bytes]", parts)), digest_size=24).digest()
    return Signature(digest, False, slots)


def _parts_of(node: PlannedNode) -> tuple[bytes | Link | None, ...]:
    """What a node's signature is made of besides its IS_CHANGED: bytes, links, None for what has none."""
    head = encode_constant(node.class_type) or b""
    if (
        node.is_output
        or "UNIQUE_ID" in node.hidden.values()
        or getattr(node.node_class, "NOT_IDEMPOTENT", False)
    ):
        head += encode_constant(node.node_id) or b""
    parts: list[bytes | Link | None] = [head]
    for name in sorted({*node.constants, *node.links}):
        parts.append(encode_constant(name) or b"")
        link = node.links.get(name)
        if link is not None:
            parts.append(link)
            continue
        try:
            parts.append(encode_constant(node.constants[name]))
        except RecursionError:
            parts.append(None)
    return tuple(parts)


def _slot_signatures(
    node: PlannedNode, fingerprint: Callable[[PlannedNode, str], object]
) -> dict[int, tuple[bytes, bool]]:
    if not hasattr(node.node_class, "OUTPUT_SIGNATURES"):
        return {}
    answers = _ask(node, "OUTPUT_SIGNATURES", fingerprint)
    if not isinstance(answers, list) or len(cast("list[object]", answers)) != 1:
        return {}
    slots: dict[int, tuple[bytes, bool]] = {}
    for slot, entry in enumerate(cast("Sequence[object]", answers[0])):
        if isinstance(entry, bytes):
            slots[slot] = (b"slot:" + entry, False)
        elif entry is not None:
            slots[slot] = (b"", True)
    return slots


def _ask(node: PlannedNode, function: str, fingerprint: Callable[[PlannedNode, str], object]) -> object:
    try:
        return fingerprint(node, function)
    except Exception:
        _log.warning(
            "%s of node %s (%s) raised; the node counts as changed", function, node.node_id, node.class_type,
            exc_info=True,
        )  # fmt: skip
        return float("nan")


class GraphCache:
    """Outputs by signature, node objects by node id and class, plans by prompt digest."""

    def __init__(self) -> None:
        self._results: dict[bytes, tuple[NodeResult, Watch]] = {}
        self._objects: dict[tuple[str, str], Any] = {}
        self._objects_of: Plan | None = None  # the last prompt's
        self._plans: OrderedDict[bytes, Plan] = OrderedDict()

    def plan(self, digest: bytes, make: Callable[[], Plan]) -> Plan:
        """The plan of the prompt with this digest, made by ``make`` if it is not at hand."""
        plan = self._plans.get(digest)
        if plan is None:
            plan = make()
            self._plans[digest] = plan
            if len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(digest)
        return plan

    def begin(self, plan: Plan, signatures: Mapping[str, Signature]) -> None:
        """Drop what this prompt does not use, before it needs the memory."""
        if self._results:
            used = {signature.node for signature in signatures.values()}
            self._results = {key: result for key, result in self._results.items() if key in used}
        if plan is not self._objects_of:
            ids = {(node.node_id, node.class_type) for node in plan.nodes.values()}
            self._objects = {key: item for key, item in self._objects.items() if key in ids}
            self._objects_of = plan

    def node_object(self, node: PlannedNode) -> Any:
        """The node's object: made once and kept while its node is in the prompts, for nodes with state."""
        key = (node.node_id, node.class_type)
        if key not in self._objects:
            self._objects[key] = node.node_class()
        return self._objects[key]

    def find(self, signature: Signature) -> NodeResult | None:
        if signature.volatile:
            return None
        kept = self._results.get(signature.node)
        if kept is None:
            return None
        result, watch = kept
        if watch.changed():
            del self._results[signature.node]  # by a node that promised not to: it is not what its node made
            return None
        return result

    def store(self, node: PlannedNode, signature: Signature, result: NodeResult) -> None:
        """Keep a result for later jobs, unless the node is volatile or its class says not to."""
        if node.kept and not signature.volatile:
            self._results[signature.node] = (result, Watch(result.outputs))

    def __len__(self) -> int:
        """How many nodes' outputs are kept."""
        return len(self._results)

    def clear(self) -> None:
        self._results.clear()
        self._objects.clear()
        self._objects_of = None
        self._plans.clear()
