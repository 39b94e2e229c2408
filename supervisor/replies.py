"""From a worker's words to ours: the error that a failed job raises, the figures of a finished one. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from legion_shm.errors import (
    ArenaFull,
    InvalidWorkflow,
    JobCancelled,
    JobFailed,
    LegionError,
    MessageTooLarge,
    UnsupportedValue,
)
from legion_shm.supervisor.result import JobStats, Transfer
from legion_shm.supervisor.submission import JobTimes
from legion_shm.transport.codec import TransferStats
from legion_shm.transport.messages import JobCancelledReply, JobDone, JobFailedReply
from legion_shm.transport.values import EXTRA_DATA, REPORT

__all__ = ["TEXT_MAX", "Figures", "error_from", "readable", "stats_from"]

TEXT_MAX = 64 * 1024
"""Characters that are kept of one text of a worker. Its own limits are lower; whoever speaks past them is not
to fill our memory."""

_PROBLEMS_MAX = 1000


def readable(text: str, limit: int = TEXT_MAX) -> str:
    """A worker's text as anyone can print it: no lone surrogates, and of bounded length."""
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


def error_from(
    message: JobFailedReply | JobCancelledReply, worker: str, warnings: tuple[str, ...] = ()
) -> LegionError:
    """The error that the job's caller sees. ``warnings``: what was odd about the job as it was submitted."""
    if isinstance(message, JobCancelledReply):
        return JobCancelled(f"job {message.job} was cancelled in worker {worker}", job_id=message.job)
    text = readable(message.message)
    if message.kind == "InvalidWorkflow":
        return InvalidWorkflow(
            text,
            node_id=message.node_id,
            input_name=message.path or None,
            problems=tuple(readable(problem) for problem in message.problems[:_PROBLEMS_MAX]),
        )
    if message.kind == "UnsupportedValue":
        return UnsupportedValue(text, path=readable(message.path))
    if message.kind == "ArenaFull":
        return ArenaFull(text)
    if message.kind == "MessageTooLarge":
        return MessageTooLarge(text)
    inputs = readable(message.inputs_summary)
    summary = "".join(f"\n  {line}" for line in inputs.splitlines())
    return JobFailed(
        text
        + (f"\n  with the inputs{summary}" if summary else "")
        + "".join(f"\n  note: {warning}" for warning in warnings),
        job_id=message.job,
        node_id=message.node_id,
        class_type=message.class_type,
        exception_type=readable(message.exception_type),
        exception_message=readable(message.exception_message),
        traceback=readable(message.traceback),
        inputs_summary=inputs,
    )


class Figures(NamedTuple):
    """What stays of a `JobDone` for its job's figures; ``values``: name and figures of each output."""

    attempt: int
    received_us: int
    decoded_us: int
    executed_us: int
    encoded_us: int
    nodes_executed: int
    nodes_cached: int
    values: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, message: JobDone) -> Figures:
        return cls(
            message.attempt,
            message.received_us,
            message.decoded_us,
            message.executed_us,
            message.encoded_us,
            message.nodes_executed,
            message.nodes_cached,
            tuple([(note.name, note.stats) for note in message.values]),
        )


def stats_from(
    reply: Figures,
    times: JobTimes,
    sent: Mapping[str, TransferStats],
    result_decode_s: float,
    *,
    engine: str,
    worker: str,
    now: float,
) -> JobStats:
    """Where the time went; ``sent``: what crossed for each input, ``now``: when the reply was read.

    The worker's times are of the same monotonic clock as ours.
    """

    def seconds(us: int) -> float:
        return us / 1e6

    transfers = [
        Transfer.from_stats("to_worker", name, stats) for name, stats in sent.items() if name != EXTRA_DATA
    ]
    transfers += [
        Transfer.from_stats("from_worker", name, TransferStats(*numbers))
        for name, numbers in reply.values
        if name != REPORT
    ]
    return JobStats(
        engine=engine,
        worker_id=worker,
        attempts=reply.attempt,
        nodes_executed=reply.nodes_executed,
        nodes_cached=reply.nodes_cached,
        encode_s=times.encoded_s - times.submitted_s,
        queue_s=times.sent_s - times.encoded_s,
        to_worker_s=seconds(reply.received_us) - times.sent_s,
        decode_s=seconds(reply.decoded_us - reply.received_us),
        execute_s=seconds(reply.executed_us - reply.decoded_us),
        result_encode_s=seconds(reply.encoded_us - reply.executed_us),
        from_worker_s=now - seconds(reply.encoded_us),
        total_s=now - times.submitted_s,
        result_decode_s=result_decode_s,
        transfers=tuple(transfers),
    )
