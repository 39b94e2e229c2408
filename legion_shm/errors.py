"""Every error that Legion raises on purpose.

LegionError
├── ConfigError            a setting is wrong: names the key, what was given and what was expected
├── InvalidWorkflow        the workflow cannot run as written: names the node and the input
├── UnsupportedValue       a value cannot cross to another process: gives the path inside the value
├── JobError               how a job that was accepted ended, when it did not end well
│   ├── JobFailed          a node raised: node id, class, exception, the worker's traceback
│   ├── JobCancelled       `Job.cancel()` or the closing supervisor ended it
│   ├── DeadlineExceeded   its `deadline_s` passed first
│   └── WorkerLost         its worker process died or hung: signal or exit code, log tail
├── StartupError           a worker, or the supervisor itself, could not start: its last words
│   └── StartupTimeout     a worker was not ready in time: names the setting
├── ArenaFull              no shared memory within the quota, after a bounded wait
├── CudaError              a call of the CUDA driver failed: which, and the driver's own words
├── MessageTooLarge        a control message over the limit: names the setting
├── QueueFull              `max_queue` jobs have not ended yet
├── ProtocolError          a peer broke the wire protocol
│   ├── InvalidHandle      a handle that points outside of what was granted
│   └── StaleHandle        a handle to a block that has been freed or reused since
├── BenchmarkError         native_bench: it cannot measure what was asked for
│   ├── PeerFailed         a way of moving tensors failed while it was measured
│   └── ContentsDiffer     a tensor arrived with other contents than were sent
├── ForkedError            used in a forked child of the process that made it
└── SupervisorClosed       used after `close()`

A text says what happened, to which id, and what to do now. The caller's own mistakes (`ConfigError`,
`InvalidWorkflow`, `UnsupportedValue`, ...) are raised by the call that made them where that can be
known there, and else by `Job.result()`. A peer's mistakes (`ProtocolError` and below) end the peer;
a caller sees them only as the cause of a `WorkerLost`.
"""

from __future__ import annotations

from legion_shm.exit_codes import name_of_end

__all__ = [
    "ArenaFull",
    "BenchmarkError",
    "ConfigError",
    "ContentsDiffer",
    "CudaError",
    "DeadlineExceeded",
    "ForkedError",
    "InvalidHandle",
    "InvalidWorkflow",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "LegionError",
    "MessageTooLarge",
    "PeerFailed",
    "ProtocolError",
    "QueueFull",
    "StaleHandle",
    "StartupError",
    "StartupTimeout",
    "SupervisorClosed",
    "UnsupportedValue",
    "WorkerLost",
]


class LegionError(Exception):
    """Base of every error in this module; never raised itself."""


class ConfigError(LegionError, ValueError):
    """A setting is unknown, of the wrong type or out of range.

    Raised by the call that was given the setting. ``key`` is its dotted name, or None where the
    trouble is not one key (a YAML syntax error).
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class InvalidWorkflow(LegionError, ValueError):
    """The workflow cannot run as written.

    Raised by ``submit`` for what the workflow's own text shows (shape, links, cycles, channel
    names), and by ``Job.result()`` for what only the worker's node classes can tell (unknown
    class, types, ranges). ``node_id`` and ``input_name`` say where, when there is one place;
    ``problems`` lists every fault found, one line each.
    """

    def __init__(
        self,
        message: str,
        *,
        node_id: str | None = None,
        input_name: str | None = None,
        problems: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.node_id = node_id
        self.input_name = input_name
        self.problems = problems or (message,)


class UnsupportedValue(LegionError, TypeError):
    """A value, or something inside it, has no codec and cannot cross to another process.

    ``path`` leads to it, in Python's notation: ``input_2[0][1]['control']``.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class JobError(LegionError):
    """Base of the ways an accepted job can end other than well. ``job_id`` says which job."""

    def __init__(self, message: str, *, job_id: str | None = None) -> None:
        super().__init__(message)
        self.job_id = job_id


class JobFailed(JobError):
    """A node raised while the job ran; the worker lives on.

    ``node_id``, ``class_type`` say where; ``exception_type`` (qualified name) and
    ``exception_message`` what; ``traceback`` is the worker's, as text; ``inputs_summary`` describes
    the node's inputs, one line each.
    """

    def __init__(
        self,
        message: str,
        *,
        job_id: str | None = None,
        node_id: str | None = None,
        class_type: str | None = None,
        exception_type: str = "",
        exception_message: str = "",
        traceback: str = "",
        inputs_summary: str = "",
    ) -> None:
        super().__init__(message, job_id=job_id)
        self.node_id = node_id
        self.class_type = class_type
        self.exception_type = exception_type
        self.exception_message = exception_message
        self.traceback = traceback
        self.inputs_summary = inputs_summary


class JobCancelled(JobError):
    """The job was cancelled, by its owner or because the supervisor closed."""


class DeadlineExceeded(JobError, TimeoutError):
    """The job's ``deadline_s`` passed before it was done; it was ended."""


class WorkerLost(JobError):
    """The worker process that ran the job died, or hung and was ended.

    ``exit_code`` is the process's, negative for a signal as in :mod:`subprocess`, None when
    unknown. ``log_tail`` holds the worker's last lines of output.
    """

    def __init__(
        self,
        message: str,
        *,
        job_id: str | None = None,
        worker_id: str | None = None,
        exit_code: int | None = None,
        log_tail: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, job_id=job_id)
        self.worker_id = worker_id
        self.exit_code = exit_code
        self.log_tail = log_tail

    @property
    def signal_name(self) -> str | None:
        """``"SIGKILL"`` and the like, on Windows the name of a crash; None when it exited by itself."""
        return name_of_end(self.exit_code)


class StartupError(LegionError):
    """A worker, or the supervisor itself, could not start.

    Raised by ``Supervisor()`` where the process is short of descriptors or threads; else seen by the result
    of every job that waited for the worker. ``traceback`` is the worker's when it could still tell,
    ``log_tail`` its last lines of output.
    """

    def __init__(
        self,
        message: str,
        *,
        worker_id: str | None = None,
        exit_code: int | None = None,
        traceback: str = "",
        log_tail: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.worker_id = worker_id
        self.exit_code = exit_code
        self.traceback = traceback
        self.log_tail = log_tail


class StartupTimeout(StartupError, TimeoutError):
    """A worker was not ready within ``WorkerSpec.startup_timeout_s``; it was ended."""


class ArenaFull(LegionError, MemoryError):
    """No shared memory could be had within the quota, after waiting for blocks to be freed."""


class CudaError(LegionError, OSError):
    """A call of the CUDA driver failed, or there is no driver.

    Transfers then go through main memory, so callers do not see it; logs and ``legion doctor`` quote it.
    """


class MessageTooLarge(LegionError, ValueError):
    """A control message would exceed ``max_message_bytes``; nothing was sent."""


class QueueFull(LegionError):
    """``max_queue`` jobs wait or run already; the job was not accepted."""


class ProtocolError(LegionError):
    """A peer sent something that the wire protocol does not allow; the peer is dropped."""


class InvalidHandle(ProtocolError):
    """A handle that does not describe memory its sender was granted: bounds, dtype, shape, arena."""


class StaleHandle(ProtocolError):
    """A handle to a block that has been freed, or freed and used again, since it was made."""


class BenchmarkError(LegionError):
    """native_bench cannot do what it was asked for: an unknown size or way, a file that is no result."""


class PeerFailed(BenchmarkError):
    """A way of moving tensors failed or did not answer in time; it is left out from then on, and said so."""


class ContentsDiffer(BenchmarkError):
    """A tensor arrived, there or here, with other contents than were sent. No figure of that way counts."""


class ForkedError(LegionError, RuntimeError):
    """A supervisor (or an arena) was used in a forked child; make a new one in the child."""


class SupervisorClosed(LegionError, RuntimeError):
    """The supervisor has been closed; no job can be submitted to it any more."""
