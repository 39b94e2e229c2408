"""What a worker tells of a job: events while it runs, the reply when it failed, log records.

Owns the making and thinning of these messages. It sends nothing itself: each thing here is given a function
that does.
"""

from __future__ import annotations

import io
import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any

from legion_shm.clock import monotonic_s
from legion_shm.errors import (
    ArenaFull,
    InvalidWorkflow,
    JobFailed,
    LegionError,
    MessageTooLarge,
    ProtocolError,
    UnsupportedValue,
)
from legion_shm.supervisor.engine import NodeStatus
from legion_shm.transport.messages import (
    JobFailedReply,
    LogRecord,
    Message,
    NodeNotes,
    PreviewNote,
    ProgressNote,
    RunJob,
)

__all__ = ["REPORT_INTERVAL_S", "Events", "LogHandler", "failure_reply"]

REPORT_INTERVAL_S = 0.02  # fifty bars a second is more than anyone sees
_LOG_TEXT_MAX = 8192
_LOG_NAME_MAX = 256
_LOGS_AT_ONCE = 10_000
_LOGS_A_SECOND = 1_000  # a flood of them would cost every job of the supervisor
_PREVIEW_SIDE = 512


def failure_reply(message: RunJob, error: BaseException) -> JobFailedReply:
    kinds = (JobFailed, InvalidWorkflow, UnsupportedValue, ArenaFull, MessageTooLarge, ProtocolError)
    kind = next((known.__name__ for known in kinds if isinstance(error, known)), "JobFailed")
    if isinstance(error, JobFailed):
        return JobFailedReply(
            message.job,
            message.attempt,
            kind,
            str(error),
            error.node_id,
            error.class_type,
            error.exception_type,
            error.exception_message,
            error.traceback,
            error.inputs_summary,
            (),
            "",
        )
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return JobFailedReply(
        message.job,
        message.attempt,
        kind,
        str(error) if isinstance(error, LegionError) else f"{type(error).__name__}: {error}",
        _id(getattr(error, "node_id", None)),
        None,
        f"{type(error).__module__}.{type(error).__qualname__}",
        str(error),
        text,
        "",
        tuple(error.problems) if isinstance(error, InvalidWorkflow) else (),
        error.path if isinstance(error, UnsupportedValue) else str(getattr(error, "input_name", None) or ""),
    )


def _id(node_id: object) -> str | None:
    """As a message has it: what nodes say comes here unchecked, and ids are numbers to many."""
    return None if node_id is None else str(node_id)


class Events:
    """What the engine reports, as messages. Progress is thinned out; its last step always goes."""

    def __init__(self, send: Callable[[Message], None], job: str, attempt: int) -> None:
        self._send, self._job, self._attempt = send, job, attempt
        self._last_s = 0.0
        self._taken_s = monotonic_s()
        self._lock = threading.Lock()
        self._held: list[tuple[str, str, str]] = []

    def node(self, node_id: str, class_type: str, status: NodeStatus) -> None:
        """Quick nodes share a message; while one takes long, the control thread sends what is held here."""
        with self._lock:
            self._held.append((node_id, class_type, status))
            late = status == "started" and monotonic_s() - self._taken_s > REPORT_INTERVAL_S
        if late:
            notes = self.take_notes()
            if notes is not None:
                self._send(notes)

    def take_notes(self) -> NodeNotes | None:
        """What has not been sent yet, to be sent now."""
        with self._lock:
            rows, self._held = tuple(self._held), []
            self._taken_s = monotonic_s()
        return NodeNotes(self._job, self._attempt, rows) if rows else None

    def progress(self, node_id: str | None, value: float, total: float) -> None:
        now = monotonic_s()
        if value < total and now - self._last_s < REPORT_INTERVAL_S:
            return
        self._last_s = now
        self._send(ProgressNote(self._job, self._attempt, _id(node_id), float(value), float(total)))

    def preview(self, node_id: str | None, image: object) -> None:
        kind, data = _encode_preview(image)
        self._send(PreviewNote(self._job, self._attempt, _id(node_id), kind, data))


def _encode_preview(image: object) -> tuple[str, bytes]:
    from PIL import Image

    picture: Any = image
    if not isinstance(picture, Image.Image):
        array = picture[0] if picture.ndim == 4 else picture
        array = (array.detach().clamp(0, 1) * 255).round().to("cpu").numpy().astype("uint8")
        picture = Image.fromarray(array)
    picture = picture.convert("RGB")
    picture.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "JPEG", buffer.getvalue()


class LogHandler(logging.Handler):
    """Log records as messages, thinned out when they come as a flood; how many were left out is said."""

    def __init__(self, send: Callable[[LogRecord], None]) -> None:
        super().__init__()
        self._send = send
        self._room = float(_LOGS_AT_ONCE)
        self._filled_s = monotonic_s()
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        now = monotonic_s()
        self._room = min(_LOGS_AT_ONCE, self._room + (now - self._filled_s) * _LOGS_A_SECOND)
        self._filled_s = now
        if self._room < 1.0:
            self._left_out += 1
            return
        self._room -= 1.0
        self.tell_left_out()
        try:
            text = self.format(record)[:_LOG_TEXT_MAX]
            level, name = str(record.levelname)[:_LOG_NAME_MAX], str(record.name)[:_LOG_NAME_MAX]
        except Exception:
            self.handleError(record)
            return
        self._send(LogRecord(level, name, text))

    def tell_left_out(self) -> None:
        """Say how many records were dropped since this was said last, if any were."""
        left_out, self._left_out = self._left_out, 0
        if left_out:
            text = f"{left_out} log records were left out: more than {_LOGS_A_SECOND} a second"
            self._send(LogRecord("WARNING", "legion_shm", text))
