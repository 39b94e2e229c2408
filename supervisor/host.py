"""The worker host: what runs in a worker process around an engine.

Owns the process's entry, its memory and its two threads. It decides nothing about jobs: it runs what it is
told, one at a time, and reports (host_reports.py).

    main thread      job socket      RunJob ─▶ decode ─▶ engine ─▶ encode ─▶ JobDone       (no thread hop)
    control thread   control socket  heartbeat, Cancel, ended leases, log records        (host_control.py)

torch is loaded by what an engine or a value needs, long after the environment is settled.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, cast

from legion_shm import faults
from legion_shm.clock import monotonic_s
from legion_shm.errors import (
    ConfigError,
    JobCancelled,
    JobFailed,
    MessageTooLarge,
)
from legion_shm.supervisor import death_pipe
from legion_shm.supervisor.engine import Engine, JobRequest
from legion_shm.supervisor.freeing import IdleHeap, empty_gpu_caches, freeze, measured
from legion_shm.supervisor.host_control import ControlThread
from legion_shm.supervisor.host_reports import Events, LogHandler, failure_reply
from legion_shm.supervisor.spawn import HostConfig
from legion_shm.supervisor.worker_env import without_preload
from legion_shm.supervisor.worker_io import write_begun
from legion_shm.supervisor.worker_memory import WorkerMemory
from legion_shm.transport.channel import ClientChannel
from legion_shm.transport.codec import RECORDS, VALUE_TYPES, Pickled
from legion_shm.transport.copying import use_library
from legion_shm.transport.frames import decode_message, encode_message
from legion_shm.transport.messages import (
    HANDLES_MAX,
    Free,
    Freed,
    Hello,
    JobCancelledReply,
    JobDone,
    JobFailedReply,
    LogRecord,
    Message,
    NodeNotes,
    Ready,
    Released,
    RunJob,
    SegmentRetired,
    StartFailed,
    Stop,
)
from legion_shm.transport.values import EXTRA_DATA
from legion_shm.workflow import Workflow

__all__ = ["extend_path", "main"]

_PROMPTS_KEPT = 64
_LONG_TO_UNMAP_BYTES = 1 << 20
_OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")  # of Python and numpy, of torch


def main(config: HostConfig) -> None:
    """The worker process, first line to last. Its exit code is 0, or 1 if the engine could not start."""
    death_pipe.arm(config.death_fd)
    without_preload(os.environ, config.preloaded)
    faulthandler.enable(sys.__stderr__ or 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides what Ctrl-C means
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whatever the program does: nodes have children too
    extend_path(config.python_path, config.parent_path)
    if config.library:
        use_library(config.library)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(
            AttributeError
        ):  # in a fork a prestartup script may have put its own in place
            cast("io.TextIOWrapper", stream).reconfigure(line_buffering=True, errors="backslashreplace")
    faults.arm_from_environment()
    host = _Host(config)
    try:
        started = host.start()
        if started:
            host.serve()
    finally:
        host.close()
    if not started:
        raise SystemExit(1)


def extend_path(first: Sequence[str], last: Sequence[str]) -> None:
    """Put folders in front of the others on ``sys.path``, and those that are not there yet behind them."""
    for path in reversed(first):
        sys.path.insert(0, path)
    sys.path.extend(path for path in last if path not in sys.path)


def _make_engine(config: HostConfig, memory: WorkerMemory) -> Engine:
    if config.engine == "comfy":
        from legion_shm.supervisor.comfy import ComfyEngine

        return ComfyEngine(comfyui_path=config.comfyui_path, extra_args=config.extra_args)
    from legion_shm.supervisor.graph import GraphEngine

    return GraphEngine(node_modules=config.node_modules, views=memory.private_view)


def _load_codecs(config: HostConfig) -> None:
    """After the engine, so that what a module imports finds it settled."""
    VALUE_TYPES.place = f"worker {config.worker}"
    RECORDS.allow(config.codec_modules)
    if config.pickle_classes:
        VALUE_TYPES.add_source(Pickled(config.pickle_classes))
    for module in config.codec_modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"codec_modules: no module named {module!r} can be imported; name an importable module (its "
                "folder may be added by python_path)",
                key="codec_modules",
            ) from error


class _Host:
    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self._jobs = ClientChannel(config.endpoint, config.job_identity, max_bytes=config.max_message_bytes)
        self._jobs_lock = threading.Lock()
        self._memory = WorkerMemory(config, self._send, self._receive_message)
        self._heap = IdleHeap(config.idle_trim_s)
        self._control = ControlThread(config, self._memory, self._flush_slow_node)
        self._events: Events | None = None
        self._engine: Engine | None = None
        self._log_handler: LogHandler | None = None
        self._prompts: dict[bytes, Workflow] = {}
        self._stopping = False
        self._pid = os.getpid()
        self._waiting: deque[RunJob | Free] = deque()  # in the order in which they came

    # --- messages ---------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        frame = encode_message(message, max_bytes=self._config.max_message_bytes)
        with self._jobs_lock:
            self._jobs.send(frame)

    def _send_notes(self) -> None:
        """What nodes did and nobody was told yet. Called with the lock, which keeps reports in order."""
        notes = None if self._events is None else self._events.take_notes()
        if notes is not None:
            self._jobs.send(encode_message(notes, max_bytes=self._config.max_message_bytes))

    def _flush_slow_node(self) -> None:
        """From the control thread, while a node runs. The lock hands the socket from thread to thread."""
        if self._jobs_lock.acquire(blocking=False):
            try:
                self._send_notes()
            finally:
                self._jobs_lock.release()

    def _receive_message(self, timeout_s: float | None) -> Message | None:
        """The next message; those about memory are taken care of and come back all the same."""
        with self._jobs_lock:
            frame = self._jobs.receive(timeout_s)
        if frame is None:
            return None
        message = decode_message(frame, max_bytes=self._config.max_message_bytes)
        if isinstance(message, Stop):
            self._stopping = True
        elif isinstance(message, Free):
            self._waiting.append(message)
        elif isinstance(message, RunJob):
            self._memory.freed(message.freed)
            self._waiting.append(message)
        else:
            self._memory.take(message)
        return message

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> bool:
        config = self._config
        if faults.hit is not None:
            faults.hit("host.before_hello")
        self._send(Hello(config.worker, config.token, "job", os.getpid()))
        try:
            self._control.start()
        except RuntimeError as error:
            self._send(
                StartFailed(
                    f"its control thread could not be started: {error}; the worker is at a limit of threads "
                    "or memory (ulimit -u, ulimit -v)",
                    "",
                )
            )
            return False
        self._log_handler = LogHandler(self.log)
        logging.getLogger().addHandler(self._log_handler)
        try:
            engine = _make_engine(config, self._memory)
            self._engine = engine
            info = engine.start()
            _load_codecs(config)
        except BaseException as error:
            return self._start_failed(error)
        failure = self._control.failure()
        if failure is not None:
            return self._start_failed(failure, "its control thread failed: ")
        self._control.engine = engine
        self._control.flush_logs(self._send)  # what was logged so far is no job's
        self._memory.engine_started()
        freeze()  # the libraries' hundred thousands of objects need not be looked at in each collection
        if faults.hit is not None:
            faults.hit("host.before_ready")
        self._send(Ready(info.name, tuple(sorted(info.versions.items())), info.node_classes))
        return True

    def _start_failed(self, error: BaseException, what: str = "") -> bool:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        told = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):  # one of ours: of nodes and of ComfyUI others tell
            lacking = f"{sys.executable} lacks the module {error.name!r}, which a worker needs"
            told = f"StartupError: {lacking}; install it there, or name another Python (python_executable)"
        self._send(StartFailed(f"{what}{told}", text[-32768:]))
        return False

    def serve(self) -> None:
        while not self._stopping:
            if self._waiting:
                message = self._waiting.popleft()
                if isinstance(message, Free):
                    free = self._require_engine().free
                    self._send(Freed(*measured(free, self._memory.give_up_unused)))
                    continue
                started_s = monotonic_s()
                self._run(message)
                ended_s = monotonic_s()
                self._memory.make_room()
                self._heap.used(ended_s, ended_s - started_s)
                continue
            forgotten = self._memory.take_forgotten()
            if forgotten:
                self._require_engine().forget(forgotten)
            due_s = [self._memory.trim_in_s(), self._heap.due_in_s(monotonic_s())]
            wait_s = min((each for each in due_s if each is not None), default=None)
            if self._receive_message(wait_s) is None:
                retired = self._memory.trim()
                if retired:
                    self._send(SegmentRetired(retired))
                self._heap.give_back(monotonic_s())

    def close(self) -> None:
        if faults.hit is not None:
            faults.hit("host.while_stopping")
        with contextlib.suppress(Exception):
            if self._engine is not None:
                self._engine.close()
        _flush(sys.stdout)
        _flush(sys.stderr)
        self._control.stop()
        self._jobs.close()
        ClientChannel.terminate()

    def _require_engine(self) -> Engine:
        assert self._engine is not None, "start() came first"
        return self._engine

    # --- one job ----------------------------------------------------------------------------------

    def _run(self, message: RunJob) -> None:
        self._control.begin(message.job)
        if faults.hit is not None:
            faults.hit("host.before_begun")
        write_begun(self._config.begun_fd, message.job, message.attempt)
        if faults.hit is not None:
            faults.hit("host.after_begun")
        try:
            reply = self._execute(message)
        finally:
            self._control.end()
        _flush(sys.stdout)
        _flush(sys.stderr)
        if self._log_handler is not None:
            self._log_handler.tell_left_out()
        self._control.flush_logs(self._send)
        if faults.hit is not None:
            faults.hit("host.before_reply")
        try:
            if not isinstance(reply, JobDone):
                with self._jobs_lock:
                    self._send_notes()
            self._send(reply)
            if faults.hit is not None:
                faults.hit("host.after_reply")
        except MessageTooLarge as error:
            self._memory.discard_result(message.job)
            if isinstance(reply, JobDone):
                self._send(NodeNotes(reply.job, reply.attempt, reply.rows))
                self._send(Released(reply.released))
                self._memory.remotes.drop(reply.remotes)
            self._send(failure_reply(message, error))
        else:
            if self._memory.copied_bytes(message.job) >= _LONG_TO_UNMAP_BYTES:
                self._jobs.let_leave()
            self._memory.result_sent(message.job)
        if isinstance(reply, JobFailedReply) and reply.exception_type.endswith(_OUT_OF_MEMORY):
            self._require_engine().free()  # whatever is kept for later jobs, this one lacked its room
            empty_gpu_caches()
            self._memory.give_up_unused()

    def _execute(self, message: RunJob) -> Message:
        received_us = _now_us()
        try:
            inputs, identities = self._memory.decode_inputs(message.values, allow_cpu=message.allow_cpu)
            extra_data = inputs.pop(EXTRA_DATA, {})
            request = JobRequest(
                job_id=message.job,
                prompt=self._prompt(message),
                prompt_digest=message.digest,
                inputs=inputs,
                identities=identities,
                extra_data=cast("Mapping[str, object]", extra_data),
            )
            del inputs
            decoded_us = _now_us()
            events = self._events = Events(self.event, message.job, message.attempt)
            try:
                outcome = self._require_engine().execute(request, events)
            finally:
                if os.getpid() != self._pid:
                    os._exit(1)  # a node forked, and its child came back here: the sockets are not its own
            del request
            executed_us = _now_us()
            values = self._memory.encode_outputs(
                message.job, outcome.outputs, outcome.report, remote=message.remote
            )
            counts = (outcome.executed, outcome.cached)
            del outcome  # what the job held is given back together with its result
            self._memory.seal(message.job)
            with self._jobs_lock:  # what the control thread has in hand goes first
                notes = events.take_notes()
            return JobDone(
                message.job,
                message.attempt,
                values,
                self._memory.drain_released(HANDLES_MAX, quick=True),
                received_us,
                decoded_us,
                executed_us,
                _now_us(),
                *counts,
                () if notes is None else notes.rows,
                self._memory.remotes.take_exported(),
            )
        except JobCancelled:
            return JobCancelledReply(message.job, message.attempt)
        except BaseException as error:
            if isinstance(error, (SystemExit, KeyboardInterrupt)):
                error = JobFailed(
                    f"a node ended the job with {type(error).__name__}; the worker goes on",
                    exception_type=type(error).__name__,
                    exception_message=str(error),
                    traceback=traceback.format_exc(),
                )
            return failure_reply(message, error)

    def _prompt(self, message: RunJob) -> Workflow:
        prompt = self._prompts.pop(message.digest, None)
        if prompt is None:
            import json

            prompt = cast("Workflow", json.loads(message.workflow.decode("utf-8", "surrogatepass")))
        self._prompts[message.digest] = prompt
        if len(self._prompts) > _PROMPTS_KEPT:
            del self._prompts[next(iter(self._prompts))]
        return prompt

    # --- events -----------------------------------------------------------------------------------

    def log(self, record: LogRecord) -> None:
        if threading.current_thread() is threading.main_thread():
            with contextlib.suppress(Exception):
                self.event(record)
                return
        self._control.log(record)

    def event(self, message: Message) -> None:
        """From the main thread at once and in order; from others by way of the control thread."""
        if threading.current_thread() is threading.main_thread():
            with self._jobs_lock:
                self._send_notes()
            self._send(message)
        else:
            self._control.post(message)


def _flush(stream: Any) -> None:
    try:
        stream.flush()
    except Exception:  # whatever a node has put in its place
        return


def _now_us() -> int:
    return time.monotonic_ns() // 1000
