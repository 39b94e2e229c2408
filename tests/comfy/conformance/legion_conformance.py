"""A pytest plugin for ComfyUI's own tests: a Legion worker stands where they start ComfyUI's HTTP server.

Owns the three doors between those tests and the server, and what comes through them: the start of `main.py`
(subprocess.Popen), its HTTP API (urllib.request.urlopen) and its messages (websocket.WebSocket). Nothing is
served; what is for another address goes where it did. The tests and their nodes stay as they are.

    Popen(main.py ARGS)   ─▶ Supervisor, WorkerSpec(engine="comfy", extra_args=ARGS)
    POST /prompt          ─▶ Supervisor.submit ─▶ worker ─▶ Job.events ─▶ WebSocket.recv
    GET /history, /view   ◀─ Result.ui, the files that it names

To be loaded with ``-p legion_conformance`` in ComfyUI's checkout, by `tests.comfy.conformance`. It can't be
part of the package ``tests`` there: that name is ComfyUI's.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import json
import os
import queue
import subprocess
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from legion_shm import InvalidWorkflow, JobFailed, LegionError, Supervisor, WorkerSpec
from legion_shm.events import Event, JobEnded, NodeEvent, PreviewEvent, ProgressEvent
from legion_shm.supervisor.job import Job
from legion_shm.workflow import is_link

_WAIT_S = 120.0
"""For a worker's start, a prompt, or a message: longer than any of them takes, and short of forever."""

_OF_HTTP_ITSELF = {
    "test_jobs_api_": "tests HTTP itself: the lists of /api/jobs",
    "test_get_job_": "tests HTTP itself: the fields and the 404 of /api/jobs/{id}",
}

_PREVIEW_HEADER = b"\0\0\0\1\0\0\0\1"

Prompt = dict[str, dict[str, Any]]

websocket: Any = importlib.import_module("websocket")  # without types; only ComfyUI's tests need it
_real_popen, _real_urlopen, _real_websocket = subprocess.Popen, urllib.request.urlopen, websocket.WebSocket
_servers: dict[str, WorkerInPlaceOfServer] = {}


class WorkerInPlaceOfServer:
    """What the tests hold as the server's process."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--listen", default="127.0.0.1")
        parser.add_argument("--port", default="8188")
        parser.add_argument("--output-directory", type=Path, default=folder / "output")
        place, _ = parser.parse_known_args(arguments)
        self.address = f"{place.listen}:{place.port}"
        self._temp = tempfile.TemporaryDirectory(prefix="legion-conformance-temp-")
        self._folders = {"output": folder / place.output_directory, "input": folder / "input"}
        self._history: dict[str, dict[str, Any]] = {}
        self._runs: dict[str, PromptRun] = {}
        self._numbers = itertools.count()
        self._clients: dict[str | None, queue.Queue[str | bytes]] = {}
        self._lock = threading.Lock()
        self.supervisor = Supervisor()
        self.spec = WorkerSpec(
            engine="comfy",
            comfyui_path=str(folder),
            working_dir=str(folder),
            # A worker's own temporary files are in a place of its own choice, which /view has to know.
            extra_args=(*arguments, "--temp-directory", self._temp.name),
            startup_timeout_s=_WAIT_S,
        )
        self.supervisor.warm_up(self.spec)
        _servers[self.address] = self

    # --- the process ------------------------------------------------------------------------------------

    def kill(self) -> None:
        if _servers.get(self.address) is self:
            del _servers[self.address]
            self.supervisor.close()
            for run in self._runs.values():
                run.join(_WAIT_S)
            self._temp.cleanup()

    # --- the messages -----------------------------------------------------------------------------------

    def connect(self, client_id: str | None) -> queue.Queue[str | bytes]:
        with self._lock:
            self._clients[client_id] = queue.Queue()
            return self._clients[client_id]

    def send(self, client_id: str | None, message: str | bytes) -> None:
        with self._lock:
            inbox = self._clients.get(client_id)
        if inbox is not None:
            inbox.put(message)

    # --- the HTTP API -----------------------------------------------------------------------------------

    def answer(self, request: urllib.request.Request) -> bytes:
        url = urllib.parse.urlsplit(request.full_url)
        query = dict(urllib.parse.parse_qsl(url.query))
        match url.path.strip("/").split("/"):
            case ["prompt"] if isinstance(request.data, bytes):
                return _json(self._prompt(json.loads(request.data)))
            case ["history", prompt_id]:
                with self._lock:
                    return _json({key: item for key, item in self._history.items() if key == prompt_id})
            case ["history"]:
                return _json(self._page(int(query.get("offset", -1)), query.get("max_items")))
            case ["api", "jobs", prompt_id]:
                return _json(self._job(prompt_id))
            case ["view"]:
                return self._file(query["filename"], query.get("subfolder", ""), query.get("type", "output"))
            case _:
                raise _Refused(501, {"error": f"no test was known to ask for {request.full_url}"})

    def _prompt(self, body: Mapping[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        prompt = runnable(body["prompt"], body.get("partial_execution_targets"))
        try:
            job = self.supervisor.submit(prompt, spec=self.spec)
        except InvalidWorkflow as error:
            raise _Refused(400, _refusal(error)) from None
        run = PromptRun(job, body.get("client_id"), self)
        self._runs[job.id] = run
        refused = run.wait_until_accepted()
        if refused is not None:
            raise _Refused(400, _refusal(refused))
        return {"prompt_id": job.id, "number": number, "node_errors": {}}

    def record(self, prompt_id: str, outputs: Mapping[str, Any], state: str) -> None:
        with self._lock:
            status = {"status_str": "success" if state == "done" else "error", "completed": state == "done"}
            self._history[prompt_id] = {"outputs": outputs, "status": {**status, "messages": []}}

    def _page(self, offset: int, most: str | None) -> dict[str, Any]:
        with self._lock:
            kept = list(self._history.items())
        if offset < 0:
            offset = 0 if most is None else max(0, len(kept) - int(most))
        return dict(kept[offset : None if most is None else offset + int(most)])

    def _job(self, prompt_id: str) -> dict[str, Any]:
        with self._lock:
            kept = self._history.get(prompt_id)
        if kept is not None:
            done = kept["status"]["completed"]
            return {"id": prompt_id, "status": "completed" if done else "failed", "outputs": kept["outputs"]}
        if prompt_id in self._runs:
            return {"id": prompt_id, "status": "in_progress"}
        raise _Refused(404, {"error": "no such job"})

    def _file(self, name: str, subfolder: str, kind: str) -> bytes:
        folders = (
            [self._folders[kind]] if kind in self._folders else Path(self._temp.name).glob("temp/*/temp")
        )
        for folder in folders:
            path = folder / subfolder / name
            if path.is_file():
                return path.read_bytes()
        raise _Refused(404, {"error": f"no file {name} of type {kind}"})


class PromptRun:
    """One prompt at the worker: its events become what the server would have sent."""

    def __init__(self, job: Job, client_id: str | None, server: WorkerInPlaceOfServer) -> None:
        self._job, self._client_id, self._server = job, client_id, server
        self._accepted = threading.Event()
        self._refused: InvalidWorkflow | None = None
        self._states: dict[str, dict[str, Any]] = {}
        self._thread = threading.Thread(target=self._follow, name=f"prompt {job.id}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def wait_until_accepted(self) -> InvalidWorkflow | None:
        """Until its first node is heard of, for the worker validates; the refusal if it refuses."""
        if not self._accepted.wait(_WAIT_S):
            raise TimeoutError(f"nothing was heard of prompt {self._job.id} for {_WAIT_S:g} s")
        return self._refused

    def _follow(self) -> None:
        for event in self._job.events():
            if isinstance(event, JobEnded):
                self._end(event)
            else:
                for message in self._messages(event):
                    self._send(message)
                    self._accepted.set()

    def _messages(self, event: Event) -> Iterator[str | bytes]:
        if isinstance(event, NodeEvent):
            node = {"node": event.node_id, "display_node": event.node_id}
            if event.status == "cached":
                yield self._message("execution_cached", nodes=[event.node_id])
                return
            if event.status == "started":
                yield self._message("executing", **node)
            yield self._progress_state(event.node_id, "finished" if event.status == "finished" else "running")
        elif isinstance(event, ProgressEvent):
            yield self._message("progress", node=event.node_id, value=event.value, max=event.total)
            if event.node_id is not None:
                yield self._progress_state(event.node_id, "running", event.value, event.total)
        elif isinstance(event, PreviewEvent):
            yield _PREVIEW_HEADER + event.data

    def _progress_state(self, node_id: str, state: str, value: float = 0.0, total: float = 1.0) -> str:
        self._states[node_id] = {"node_id": node_id, "state": state, "value": value, "max": total}
        return self._message("progress_state", nodes=self._states)

    def _end(self, event: JobEnded) -> None:
        error = event.error
        if isinstance(error, InvalidWorkflow) and not self._accepted.is_set():
            self._refused = error
            self._accepted.set()
            return
        outputs = {} if error is not None else json.loads(json.dumps(self._job.result(0).ui))
        self._server.record(self._job.id, outputs, event.state)
        if error is None:
            self._send(self._message("execution_success"))
        else:
            self._send(self._message("execution_error", **_execution_error(error)))
        self._send(self._message("executing", node=None))
        self._accepted.set()

    def _message(self, kind: str, **data: Any) -> str:
        return json.dumps({"type": kind, "data": {**data, "prompt_id": self._job.id}})

    def _send(self, message: str | bytes) -> None:
        self._server.send(self._client_id, message)


def runnable(prompt: Prompt, targets: Sequence[str] | None) -> Prompt:
    """The part of ``prompt`` that ComfyUI's server would run.

    Of a prompt with a link to a node that is not there, the server runs the outputs that do not need it;
    Legion refuses such a workflow as a whole. ``targets`` are the outputs to run, None for all: a caller of
    Legion hands in a workflow that has these alone.
    """
    broken: set[str] = set()
    found = -1
    while len(broken) > found:
        found = len(broken)
        broken |= {
            key for key, node in prompt.items() if any(s not in prompt or s in broken for s in _sources(node))
        }
    wanted = set(prompt) if targets is None else set(targets)
    waiting = list(wanted & set(prompt))
    while waiting:
        for source in _sources(prompt[waiting.pop()]):
            if source in prompt and source not in wanted:
                wanted.add(source)
                waiting.append(source)
    return {key: node for key, node in prompt.items() if key in wanted and key not in broken}


def _sources(node: Mapping[str, Any]) -> list[str]:
    return [value[0] for value in node["inputs"].values() if is_link(value)]


def _execution_error(error: LegionError) -> dict[str, Any]:
    data: dict[str, Any] = {"exception_type": type(error).__name__, "exception_message": str(error)}
    if isinstance(error, JobFailed):
        data.update(
            node_id=error.node_id,
            node_type=error.class_type,
            exception_type=error.exception_type,
            exception_message=error.exception_message,
            traceback=error.traceback.splitlines(keepends=True),
        )
    return data


def _refusal(error: InvalidWorkflow) -> dict[str, Any]:
    return {"error": {"type": "invalid_prompt", "message": str(error), "details": list(error.problems)}}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


class _Refused(Exception):
    def __init__(self, code: int, body: object) -> None:
        super().__init__(body)
        self.code, self.body = code, _json(body)


# --- the doors ------------------------------------------------------------------------------------------


class _Popen(subprocess.Popen[Any]):
    def __new__(cls, command: Any, *_args: Any, cwd: Any = None, **_named: Any) -> Any:
        words = [os.fspath(word) for word in command] if isinstance(command, (list, tuple)) else []
        if words[1:2] == ["main.py"]:
            return WorkerInPlaceOfServer(words[2:], Path(cwd or os.getcwd()))
        return super().__new__(cls)


def _urlopen(url: Any, *args: Any, **named: Any) -> Any:
    request = url if isinstance(url, urllib.request.Request) else urllib.request.Request(url)
    server = _servers.get(request.host)
    if server is None:
        return _real_urlopen(url, *args, **named)
    try:
        return io.BytesIO(server.answer(request))
    except _Refused as error:
        answer = io.BytesIO(error.body)
        raise urllib.error.HTTPError(request.full_url, error.code, str(error), Message(), answer) from None


class _WebSocket:
    def __init__(self) -> None:
        self._inbox: queue.Queue[str | bytes] = queue.Queue()
        self._timeout_s = _WAIT_S

    def connect(self, url: str, **_named: object) -> None:
        parts = urllib.parse.urlsplit(url)
        server = _servers.get(parts.netloc)
        if server is None:
            raise ConnectionRefusedError(f"no server was started for {parts.netloc}")
        self._inbox = server.connect(dict(urllib.parse.parse_qsl(parts.query)).get("clientId"))

    def settimeout(self, timeout_s: float | None) -> None:
        self._timeout_s = _WAIT_S if timeout_s is None else timeout_s

    def recv(self) -> str | bytes:
        try:
            return self._inbox.get(timeout=self._timeout_s)
        except queue.Empty:
            raise websocket.WebSocketTimeoutException(f"no message for {self._timeout_s:g} s") from None

    def close(self) -> None:
        """The server's end goes with the server."""


def _patched(restore: bool = False) -> None:
    doors: tuple[tuple[Any, str, Callable[..., Any], Callable[..., Any]], ...] = (
        (subprocess, "Popen", _Popen, _real_popen),
        (urllib.request, "urlopen", _urlopen, _real_urlopen),
        (websocket, "WebSocket", _WebSocket, _real_websocket),
    )
    for module, name, ours, real in doors:
        setattr(module, name, real if restore else ours)


def pytest_configure() -> None:
    _patched()


def pytest_unconfigure() -> None:
    for server in list(_servers.values()):
        server.kill()
    _patched(restore=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for start, reason in _OF_HTTP_ITSELF.items():
            if item.name.startswith(start):
                item.add_marker(pytest.mark.skip(reason=reason))
