"""Workflows as they are sent, prepared once for as often as they are submitted.

Owns the memory of those that were submitted before; what is checked in them is `legion_shm.workflow`'s and
`legion_shm.channels`'.
"""

from __future__ import annotations

import contextlib
import marshal
from dataclasses import dataclass
from typing import Any, cast

from legion_shm.channels import Channels, linked_channels, read_channels
from legion_shm.workflow import WorkflowSource, load_workflow, pack_workflow

__all__ = ["PreparedWorkflow", "WorkflowCache"]

_MARSHAL_VERSION = 2  # later ones write whether two equal texts are one object


@dataclass(frozen=True)
class PreparedWorkflow:
    """A checked workflow as it is sent: its channels, its JSON bytes and their digest.

    ``linked``: each numbered channel that a node's input is linked to, with words for that input.
    """

    channels: Channels
    linked: tuple[tuple[str, str], ...]
    data: bytes
    digest: bytes


class WorkflowCache:
    """Workflows prepared before, so that submitting one again checks and packs nothing. Thread-safe.

    A dict is found by its marshalled bytes, which tell apart whatever `load_workflow` does (a tuple from a
    list, 1 from True from "1"); text by itself. Files are read each time.
    """

    def __init__(self, *, entries: int = 128, max_bytes: int = 1 << 20) -> None:
        self._entries, self._max_bytes = entries, max_bytes
        self._kept: dict[bytes | str, PreparedWorkflow] = {}

    def prepare(self, source: WorkflowSource) -> PreparedWorkflow:
        """What `load_workflow`, `read_channels` and `pack_workflow` give. Raises InvalidWorkflow."""
        key = self._key(source)
        kept = None if key is None else self._kept.get(key)
        if kept is not None:
            return kept
        workflow = load_workflow(source)
        prepared = PreparedWorkflow(
            read_channels(workflow), linked_channels(workflow), *pack_workflow(workflow)
        )
        if key is not None:
            while len(self._kept) >= self._entries:
                with contextlib.suppress(KeyError, RuntimeError, StopIteration):  # another thread was faster
                    del self._kept[next(iter(self._kept))]
            self._kept[key] = prepared
        return prepared

    def _key(self, source: WorkflowSource) -> bytes | str | None:
        if type(source) is dict:
            try:
                key = marshal.dumps(cast("Any", source), _MARSHAL_VERSION)
            except ValueError:  # something that is no plain value, or nested too deep
                return None
            return key if len(key) <= self._max_bytes else None
        if type(source) is str and source[:1] == "{" and len(source) <= self._max_bytes:
            return source
        return None
