"""One node class whose ``run`` executes the code that it is given, in the worker, with its host at hand."""

from __future__ import annotations

import sys
import threading
from typing import Any, ClassVar


def host() -> Any:
    """The worker's own host object: what a node should never touch."""
    from legion_shm.supervisor.host import _Host

    frame = sys._current_frames()[threading.main_thread().ident or 0]
    while not isinstance(frame.f_locals.get("self"), _Host):
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_locals["self"]


def wire(message: Any) -> bytes:
    from legion_shm.transport.frames import encode_message

    return encode_message(message, max_bytes=1 << 30)


def send_raw(frame: bytes) -> None:
    """A frame on the job socket, in turn with the control thread, which sends on it too while a node runs.

    Past the lock, libzmq itself would end the process sooner or later, and no test would say of what.
    """
    worker = host()
    with worker._jobs_lock:
        worker._jobs.send(frame)


class Hostile:
    RETURN_TYPES = ("*",)
    FUNCTION = "run"
    CATEGORY = "test"
    INPUTS: ClassVar[dict[str, Any]] = {
        "required": {"code": ("STRING", {"default": ""})},
        "optional": {"value": ("*", {"forceInput": True})},
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return cls.INPUTS

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:  # noqa: N802 - the protocol's name
        return float("nan")

    def run(self, code: str, value: object = None) -> tuple[object]:
        import legion_shm.transport.messages as messages

        names = {**vars(messages), "host": host, "wire": wire, "send_raw": send_raw, "value": value}
        exec(code, names)
        return (names.get("out", value),)


NODE_CLASS_MAPPINGS = {"Hostile": Hostile}
