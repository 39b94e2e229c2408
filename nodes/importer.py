"""LegionImporter: where a job's numbered inputs enter a worker's workflow.

Owns the node alone. It reads the current job and changes nothing in it.
"""

from __future__ import annotations

import hashlib
from typing import Any

from legion_shm.errors import LegionError
from legion_shm.job_context import current_job
from legion_shm.nodes.any_type import ANY

__all__ = ["CHANNELS", "LegionImporter"]

CHANNELS = 12
_INPUTS = tuple(f"input_{n}" for n in range(1, CHANNELS + 1))


class LegionImporter:
    """Gives ``input_1`` to ``input_12`` of the job at slots 0 to 11; None where the job has no such input.

    Slot 12 and the input ``data_exchange_root`` carry nothing; they are there so that workflows wired for
    LegionPower load.
    """

    RETURN_TYPES = (*(ANY,) * CHANNELS, "STRING")
    RETURN_NAMES = (*(f"output_{n}" for n in range(1, CHANNELS + 1)), "data_exchange_root")
    FUNCTION = "import_data"
    WRITES_SHARED = False
    CATEGORY = "Legion/IO"
    DESCRIPTION = "Gives the values that the job was submitted with: its inputs 1 to 12."
    KEEP_OUTPUTS = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {}, "optional": {"data_exchange_root": (ANY, {"forceInput": True})}}

    @classmethod
    def IS_CHANGED(cls, data_exchange_root: object = None) -> str | float:  # noqa: N802 - the protocol's name
        """A digest of what the inputs' identities are; NaN, which is never equal, where one has none."""
        parts: list[bytes] = []
        for entry in _channel_identities():
            if not isinstance(entry, bytes):
                return entry
            parts += (len(entry).to_bytes(8, "big"), entry)
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @classmethod
    def OUTPUT_SIGNATURES(cls, data_exchange_root: object = None) -> list[bytes | float | None]:  # noqa: N802
        """For the graph engine: each slot by its own identity, so a new input 2 leaves slot 0 as it was."""
        return [*_channel_identities(), None]

    def import_data(self, data_exchange_root: object = None) -> tuple[object, ...]:
        inputs = current_job().originals
        root = data_exchange_root if isinstance(data_exchange_root, str) else ""
        return (*map(inputs.get, _INPUTS), root)


def _channel_identities() -> list[bytes | float]:
    """Per channel: bytes that are equal for equal values, or NaN for a value that can't be given again."""
    try:
        job = current_job()
    except LegionError:
        return [float("nan")] * CHANNELS
    inputs, identities = job.originals, job.identities
    entries: list[bytes | float] = []
    for name in _INPUTS:
        if name not in inputs:
            entries.append(b"absent")
            continue
        identity = identities.get(name)
        entries.append(float("nan") if identity is None else b"given:" + identity)
    return entries
