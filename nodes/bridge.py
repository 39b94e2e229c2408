"""What connects Legion's nodes to the ComfyUI that they run inside of; without one they work all the same.

Owns showing a job's progress on the running node, forwarding the user's interruption to jobs and the wish to
free memory to workers, and what a node can learn of the ComfyUI around it. It imports nothing of ComfyUI, but
looks at what is loaded.

    job's events ──▶ wait_for ──▶ progress bar, previews, log of the node that waits
    interruption ──▶ wait_for, or cancel_on_interruption ──▶ Job.cancel
    buttons that unload models, free memory ──▶ on_free_memory
"""

from __future__ import annotations

import copy
import io
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from legion_shm.clock import monotonic_s
from legion_shm.errors import JobFailed, LegionError, StartupError, WorkerLost
from legion_shm.events import Event, LogEvent, NodeEvent, PreviewEvent, ProgressEvent
from legion_shm.nodes.saved_json import as_items

if TYPE_CHECKING:
    from legion_shm.supervisor.job import Job
    from legion_shm.supervisor.result import Result

__all__ = [
    "blocked",
    "cancel_on_interruption",
    "explained",
    "forwarded_data",
    "inherited_arguments",
    "master_node_classes",
    "on_free_memory",
    "raise_if_interrupted",
    "wait_for",
]

_log = logging.getLogger("legion_shm.worker")

_POLL_S = 0.1
"""How often a waiting node looks whether it was interrupted; an interruption must be forwarded within 1 s."""

_SHOW_AFTER_S = 0.1
_SHOW_EVERY_S = 0.05
"""Each update of the bar costs ComfyUI a message with the state of all nodes, so short jobs show none."""

_LOG_TAIL = 20

_LOGIN = ("auth_token_comfy_org", "api_key_comfy_org", "comfy_usage_source")
"""What ComfyUI's API nodes are paid with, of a prompt's extra data."""

_INHERITED = (
    "base_directory",
    "models_directory",
    "extra_model_paths_config",
    "input_directory",
    "output_directory",
    "user_directory",
)
"""The arguments by which a ComfyUI finds its files: a worker of the same ComfyUI needs the same."""


def wait_for(job: Job, *, nodes: int) -> Result:
    """Wait for a job as a node does that runs: show what happens, forward an interruption, raise its error.

    ``nodes``: how many there are in its workflow. Whatever ends the wait early cancels the job.
    """
    shown = _Shown(nodes)
    position, ended = 0, False
    try:
        while not ended:
            events, position = job.events_since(position, _POLL_S)
            raise_if_interrupted()
            for event in events:
                shown.event(event)
                ended = ended or event.terminal
        raise_if_interrupted()
    except BaseException:
        job.cancel()
        raise
    try:
        return job.result(timeout=0)
    except LegionError as error:
        raise explained(error) from error.__cause__


def explained(error: LegionError) -> LegionError:
    """The error with the worker's own words in its text, for a node's error shows nothing else of it."""
    if isinstance(error, JobFailed) and error.traceback:
        more = f"\n\nThe worker's traceback:\n{error.traceback.rstrip()}"
    elif isinstance(error, (WorkerLost, StartupError)) and error.log_tail:
        more = "\n\nThe worker's last lines:\n" + "\n".join(error.log_tail[-_LOG_TAIL:])
    else:
        return error
    longer = copy.copy(error)
    longer.args = (f"{error}{more}", *error.args[1:])
    return longer


class _Shown:
    """A job's events on the node that waits for it: one bar over all nodes of the job's workflow."""

    def __init__(self, nodes: int) -> None:
        self._nodes = max(nodes, 1)
        self._done: set[str] = set()
        self._started_s = self._shown_s = monotonic_s()
        self._bar: Any = None

    def event(self, event: Event) -> None:
        if isinstance(event, NodeEvent):
            if event.status != "started":
                self._done.add(event.node_id)
            self._show(0.0)
        elif isinstance(event, ProgressEvent):
            self._show(event.value / event.total if event.total > 0 else 0.0)
        elif isinstance(event, PreviewEvent):
            self._show(None, _picture(event))
        elif isinstance(event, LogEvent):
            level: object = getattr(logging, event.level or "INFO", None)
            _log.log(level if isinstance(level, int) else logging.INFO, "[worker] %s", event.text)

    def _show(self, fraction: float | None, preview: object = None) -> None:
        now = monotonic_s()
        if preview is None and (now - self._started_s < _SHOW_AFTER_S or now - self._shown_s < _SHOW_EVERY_S):
            return
        self._shown_s = now
        if self._bar is None:
            self._bar = _progress_bar(self._nodes * 100)
        if self._bar is not None:
            done = len(self._done) * 100 + (0 if fraction is None else min(max(fraction, 0.0), 1.0) * 100)
            value = max(int(done), self._bar.current)
            self._bar.update_absolute(min(value, self._nodes * 100), self._nodes * 100, preview)


def _progress_bar(total: int) -> Any:
    make: Any = getattr(sys.modules.get("comfy.utils"), "ProgressBar", None)
    return None if make is None else make(total)


def _picture(event: PreviewEvent) -> object:
    """A preview as ComfyUI's progress hook takes it; None where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(event.data))
        picture.load()
    except (UnidentifiedImageError, OSError):
        return None
    return ("JPEG", picture.convert("RGB"), None)


# --- interruption -------------------------------------------------------------------------------------


def raise_if_interrupted() -> None:
    """Raise what ends ComfyUI's current prompt if its user interrupted it; nothing elsewhere."""
    check: Any = getattr(_model_management(), "throw_exception_if_processing_interrupted", None)
    if check is not None:
        check()


_running: weakref.WeakKeyDictionary[Job, object] = weakref.WeakKeyDictionary()
_running_lock = threading.Lock()


def cancel_on_interruption(job: Job) -> None:
    """Cancel a job that nobody waits for yet when the prompt that it belongs to is interrupted.

    ComfyUI's flag is no use here: whichever node sees it clears it. So its function that sets it is
    wrapped, once.
    """
    management = _model_management()
    interrupt: Any = getattr(management, "interrupt_current_processing", None)
    if interrupt is None:
        return
    with _running_lock:
        _running[job] = _prompt_id()
        if not hasattr(interrupt, "legion_wrapped"):
            management.interrupt_current_processing = _forwarding(interrupt)


def _forwarding(interrupt: Callable[..., Any]) -> Callable[..., Any]:
    def interrupt_current_processing(value: bool = True) -> Any:
        answer = interrupt(value)
        if value:
            _cancel_running()
        return answer

    interrupt_current_processing.legion_wrapped = interrupt  # type: ignore[attr-defined]
    return interrupt_current_processing


def _cancel_running() -> None:
    with _running_lock:
        jobs = [job for job, prompt in _running.items() if prompt == _prompt_id()]
    for job in jobs:
        job.cancel()


def _prompt_id() -> object:
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    return getattr(getattr(server, "instance", None), "last_prompt_id", None)


# --- memory -------------------------------------------------------------------------------------------


def on_free_memory(call: Callable[[], None]) -> None:
    """Have ``call`` called whenever the user has ComfyUI unload its models or free its memory.

    That is when its thread takes these wishes from its queue, after the prompt that runs, so the queue's
    function for that is wrapped, once.
    """
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    queue = getattr(getattr(server, "instance", None), "prompt_queue", None)
    take: Any = getattr(queue, "get_flags", None)
    if queue is None or take is None or hasattr(take, "legion_wrapped"):
        return

    def get_flags(*args: Any, **named: Any) -> Any:
        flags = take(*args, **named)
        if flags.get("unload_models") or flags.get("free_memory"):
            try:
                call()
            except Exception:  # ComfyUI's thread for prompts must not end by it
                _log.exception("Legion's workers were not told to free memory")
        return flags

    get_flags.legion_wrapped = take  # type: ignore[attr-defined]
    queue.get_flags = get_flags


def _model_management() -> Any:
    return sys.modules.get("comfy.model_management")


# --- the ComfyUI around us ----------------------------------------------------------------------------


def master_node_classes() -> Mapping[str, Any] | None:
    """The node classes of the ComfyUI that this process runs inside of; None where it runs in none."""
    if "comfy.model_management" not in sys.modules:
        return None
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", None)


def inherited_arguments(own: tuple[str, ...]) -> tuple[str, ...]:
    """How the ComfyUI around us was told where its files are, but for what ``own`` arguments say."""
    args = getattr(sys.modules.get("comfy.cli_args"), "args", None)
    inherited: list[str] = []
    for name in _INHERITED:
        option = "--" + name.replace("_", "-")
        value: object = getattr(args, name, None)
        if value and not any(word == option or word.startswith(option + "=") for word in own):
            for words in _each(value):
                inherited += [option, *words]
    return tuple(inherited)


def _each(value: Any) -> list[list[str]]:
    """The words after an option, for each time that it was given."""
    if isinstance(value, str) or not as_items(value):
        return [[str(value)]]
    return [[str(word) for word in as_items(item) or (item,)] for item in as_items(value)]


def forwarded_data(own: Sequence[str]) -> dict[str, object]:
    """Of the prompt that runs, what a worker's nodes need as ours do: how to preview, and the user's login.

    ``own`` arguments of the worker that say how to preview count before ours.
    """
    data: dict[str, object] = {}
    args = getattr(sys.modules.get("comfy.cli_args"), "args", None)
    name = getattr(getattr(args, "preview_method", None), "value", None)  # ComfyUI sets it for each prompt
    if name not in (None, "none") and not any(word.startswith("--preview-method") for word in own):
        data["preview_method"] = name
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    queue = getattr(getattr(server, "instance", None), "prompt_queue", None)
    running: Any = getattr(queue, "currently_running", {})
    for item in list(running.values()):
        if len(item) > 3 and item[1] == _prompt_id():
            given = {key: value for part in (item[3], *item[5:6]) for key, value in part.items()}
            data |= {key: given[key] for key in _LOGIN if given.get(key) is not None}
    return data


def blocked(message: str) -> object:
    """A value that stops whoever uses it, with a message: ComfyUI's own; elsewhere the message itself."""
    make: Any = getattr(sys.modules.get("comfy_execution.graph_utils"), "ExecutionBlocker", None)
    if make is None:
        make = getattr(sys.modules.get("comfy_execution.graph"), "ExecutionBlocker", None)
    return message if make is None else make(message)
