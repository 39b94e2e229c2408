"""Bringing up a real ComfyUI in this process, headless: no listener, no port, no browser.

Owns the order of the start, and what is put in place of the parts that would serve a browser. It goes
through ComfyUI's own `main.py` (`comfy_main`), so that each version sets up its memory, its paths, its caches
and its custom nodes by itself; what differs between versions is looked for in the modules, never deduced from
a version number.

    main.py without its last block ─▶ start_comfyui: prompt server, nodes, routes, progress hook
                                  └─▶ prompt_worker, up to its first look at the queue: the executor
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from legion_shm.errors import ConfigError, StartupError
from legion_shm.supervisor.comfy_args import accelerator_found, headless_arguments, read_arguments
from legion_shm.supervisor.comfy_job import Relay
from legion_shm.supervisor.comfy_main import MainProgram, is_manager, take_begun
from legion_shm.supervisor.comfy_node_files import is_loaded
from legion_shm.supervisor.graph_report import describe_value
from legion_shm.transport.runtime_dir import RuntimeDir, sweep_stale

__all__ = ["WORKER_NODES", "HeadlessComfy", "start_headless"]

_log = logging.getLogger(__name__)

WORKER_NODES = ("LegionExporter", "LegionImporter", "LegionInput", "LegionOutput")
"""The nodes by which a job's values enter and leave. Ours replace any others of these names."""

_NODES_MODULE = "legion_shm.nodes"  # by name: it lives in a layer above this one
_CLOSE_WAIT_S = 2.0


@dataclass
class HeadlessComfy:
    """A ComfyUI that is ready to run prompts. The modules are ComfyUI's own."""

    root: Path
    nodes: Any
    execution: Any
    model_management: Any
    server: Any
    executor: Any
    relay: Relay
    versions: dict[str, str]
    not_loaded: tuple[str, ...]
    _main: Any
    _loop: asyncio.AbstractEventLoop
    _thread: threading.Thread
    _temp: _Temp

    def folders(self) -> dict[str, str]:
        """Where the files are that output nodes tell of, by their type."""
        paths: Any = sys.modules["folder_paths"]
        return {
            "input": os.path.abspath(paths.get_input_directory()),
            "output": os.path.abspath(paths.get_output_directory()),
            "temp": os.path.abspath(paths.get_temp_directory()),
        }

    def restore_hooked_functions(self) -> None:
        """What ComfyUI does after prompts against custom nodes that replace its functions."""
        restore = getattr(sys.modules.get("hook_breaker_ac10a0"), "restore_functions", None)
        if restore is not None:
            restore()

    def close(self) -> None:
        seeder = getattr(self._main, "asset_seeder", None)
        with contextlib.suppress(Exception):
            if seeder is not None:
                seeder.shutdown()
        session = getattr(self.server, "client_session", None)
        with contextlib.suppress(Exception):
            if session is not None:
                asyncio.run_coroutine_threadsafe(session.close(), self._loop).result(timeout=_CLOSE_WAIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_CLOSE_WAIT_S)
        if not self._thread.is_alive():
            self._loop.close()
        self._temp.close()


def start_headless(root: Path, extra_args: Sequence[str]) -> HeadlessComfy:
    """Start the ComfyUI in ``root``. ConfigError for arguments it refuses, StartupError where it can't start.

    To be called once in a process, on its main thread, before anything has loaded torch.
    """
    sys.path[:] = [str(root), *(entry for entry in sys.path if entry != str(root))]
    given = read_arguments(extra_args)
    temp = _Temp(given.value("temp_directory"))
    try:
        arguments = headless_arguments(given, temp=temp.path, accelerator=accelerator_found(os.environ))
        sys.argv = [str(root / "main.py"), *arguments]
        _tell_preloaded(temp.path)
        return _start(root, temp)
    except ModuleNotFoundError as error:
        temp.close()
        raise StartupError(
            f"the ComfyUI in {root} needs the module {error.name!r}, which {sys.executable} lacks: install "
            f"{root / 'requirements.txt'} there, or run the worker with ComfyUI's own Python "
            "(python_executable, legion --python) with legion_shm installed in it, or take engine='graph'"
        ) from error
    except SystemExit as error:
        temp.close()
        raise StartupError(
            f"the ComfyUI in {root} ended itself while it started (exit code {error.code!r}); "
            "its last lines of output say why"
        ) from error
    except BaseException:
        temp.close()
        raise


def _tell_preloaded(temp: Path) -> None:
    """In a fork of a zygote ComfyUI has read its arguments: these, but for the worker's own folder."""
    known = sys.modules.get("comfy.cli_args")
    if known is not None:
        known.args.temp_directory = str(temp)
        if hasattr(known.args, "front_end_root"):
            known.args.front_end_root = str(temp / "frontend")


def _start(root: Path, temp: _Temp) -> HeadlessComfy:
    main = _load_main(root)
    _begin_log(root)
    start = _need(root, main, "start_comfyui")
    prompt_worker = _need(root, main, "prompt_worker")
    execution, nodes, server, management = map(
        _module, ("execution", "nodes", "server", "comfy.model_management")
    )
    relay = Relay(
        _need(root, nodes, "interrupt_processing"), _need(root, management, "InterruptProcessingException")
    )
    _silence(server.PromptServer, relay)
    execution.WebUIProgressHandler = relay.progress_handler(_need(root, execution, "WebUIProgressHandler"))
    if hasattr(execution, "format_value"):
        execution.format_value = describe_value  # str() of a large tensor takes long, and says less

    not_loaded = _watch_custom_nodes(nodes)
    main.prompt_worker = _no_work
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    _, prompt_server, _ = start(loop)
    _register_worker_nodes(nodes)
    executor = _make_executor(execution, prompt_worker, prompt_server)
    if hasattr(executor, "execute_async"):
        executor.execute_async = relay.watch(executor.execute_async)

    # Custom nodes reach the server's loop from their threads, so it runs, though nothing listens on it.
    thread = threading.Thread(target=_run_loop, args=(loop,), name="comfyui-loop", daemon=True)
    thread.start()
    if hasattr(prompt_server, "setup"):
        asyncio.run_coroutine_threadsafe(prompt_server.setup(), loop).result(timeout=30)
    return HeadlessComfy(
        root=root,
        nodes=nodes,
        execution=execution,
        model_management=management,
        server=prompt_server,
        executor=executor,
        relay=relay,
        versions=_versions(),
        not_loaded=tuple(not_loaded),
        _main=main,
        _loop=loop,
        _thread=thread,
        _temp=temp,
    )


def _begin_log(root: Path) -> None:
    """ComfyUI's log raises IndexError where its first line begins with a carriage return (a progress bar).

    In a fork of a zygote that can be, because what the core says as it is imported was said before.
    """
    lines = getattr(sys.modules.get("app.logger"), "logs", None)
    if lines is not None and not lines:
        sys.stdout.write(f"ComfyUI in {root}, without a server\n")


def _load_main(root: Path) -> Any:
    """ComfyUI's `main.py` as a module that was told it is the program, without the block that starts it."""
    program, forked = take_begun(root), True
    if program is None:
        program, forked = MainProgram(root), False
        program.begin()
    main = program.finish(torch_is_here=forked and "torch" in sys.modules)
    _no_second_console(program.handlers)
    return main


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _need(root: Path, module: Any, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        raise StartupError(
            f"the ComfyUI in {root} has no {module.__name__}.{name}, by which Legion drives it; versions "
            "from 0.3.64 on have it: update that ComfyUI, or point comfyui_path to another one"
        ) from None


def _no_second_console(comfyuis: Sequence[logging.Handler]) -> None:
    """Drop ComfyUI's console handler where somebody takes log records already: each line would come twice."""
    root = logging.getLogger()
    if all(handler in comfyuis for handler in root.handlers):
        return
    files, level = False, 0
    for handler in [handler for handler in root.handlers if handler in comfyuis]:
        if isinstance(handler, logging.FileHandler):
            files = True
        elif isinstance(handler, logging.StreamHandler):
            root.removeHandler(cast("logging.Handler", handler))
            level = max(level, handler.level)
    if level and not files:
        root.setLevel(level)  # it was lowered for a file that nobody asked for


def _silence(prompt_server: Any, relay: Relay) -> None:
    """The class stays ComfyUI's own, which custom nodes know; what it would send or serve goes no further."""

    def send_sync(_self: Any, event: object, data: Any, _sid: object = None) -> None:
        relay.message(event, data)

    def ignore(_self: Any, *_args: object, **_named: object) -> None:
        """No page is served, and nobody looks at the queue."""

    prompt_server.send_sync = send_sync
    prompt_server.queue_updated = ignore
    prompt_server.add_routes = ignore  # the page's files, which need not be there; decorated routes are kept


class _Said(logging.Handler):
    """Keeps the last line that was logged."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().strip().splitlines()
        self.last = lines[-1][:500] if lines else self.last


def _watch_custom_nodes(nodes: Any) -> list[str]:
    """What custom nodes will not have loaded, and what was logged of each; ComfyUI goes on without them."""
    failed: list[str] = []
    said = _Said()
    load = getattr(nodes, "load_custom_node", None)
    if not callable(load):
        return failed

    async def watched(module_path: str, *args: Any, **named: Any) -> Any:
        parent = named.get("module_parent", "custom_nodes")
        if is_manager(module_path) or (not args and is_loaded(module_path, parent)):
            return True
        said.last = ""
        logging.getLogger().addHandler(said)
        try:
            loaded = await cast("Any", load)(module_path, *args, **named)
        finally:
            logging.getLogger().removeHandler(said)
        if not loaded and parent == "custom_nodes":
            name = os.path.basename(module_path)
            failed.append(f"{name}: {said.last}" if said.last else name)
        return loaded

    nodes.load_custom_node = watched
    return failed


def _no_work(*_args: object) -> None:
    """In place of ComfyUI's thread that takes prompts from its queue."""


class _AskedForWorkError(BaseException):
    """Not an Exception: nothing in between may take it for a failure."""


class _EmptyQueue:
    def get(self, *_args: object, **_named: object) -> None:
        raise _AskedForWorkError


def _make_executor(execution: Any, prompt_worker: Any, prompt_server: Any) -> Any:
    """The executor that this version makes of the user's cache arguments, by its own code."""
    real = execution.PromptExecutor
    made: list[Any] = []

    def recorded(*args: Any, **named: Any) -> Any:
        made.append(real(*args, **named))
        return made[-1]

    execution.PromptExecutor = recorded
    try:
        with contextlib.suppress(_AskedForWorkError):
            prompt_worker(_EmptyQueue(), prompt_server)
    finally:
        execution.PromptExecutor = real
    if not made:
        raise StartupError(
            "this ComfyUI made no PromptExecutor when its prompt worker started; Legion cannot drive it"
        )
    return made[-1]


def _register_worker_nodes(nodes: Any) -> None:
    ours = importlib.import_module(_NODES_MODULE)
    for name in WORKER_NODES:
        node_class = ours.NODE_CLASS_MAPPINGS[name]
        other = nodes.NODE_CLASS_MAPPINGS.get(name)
        if other is node_class:
            continue
        if other is not None:
            _log.warning(
                "the node %s of %s gives way to Legion's own in this worker",
                name,
                getattr(other, "RELATIVE_PYTHON_MODULE", other.__module__),
            )
        if not hasattr(node_class, "RELATIVE_PYTHON_MODULE"):
            node_class.RELATIVE_PYTHON_MODULE = "custom_nodes.legion-shm"
        nodes.NODE_CLASS_MAPPINGS[name] = node_class
        nodes.NODE_DISPLAY_NAME_MAPPINGS[name] = ours.NODE_DISPLAY_NAME_MAPPINGS[name]


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name, module in (("comfyui", "comfyui_version"), ("torch", "torch")):
        with contextlib.suppress(Exception):
            versions[name] = str(importlib.import_module(module).__version__)
    return versions


class _Temp:
    """This worker's own temp folder: ComfyUI empties the one that it is given.

    In the folder that the user names, if any: inside its ``temp``, which the ComfyUI that owns it empties at
    its start. Else in the system's, where the next worker removes what a killed one left.
    """

    def __init__(self, wanted: str | None) -> None:
        self._owned: RuntimeDir | None = None
        if wanted:
            parent = Path(os.path.abspath(wanted)) / "temp"
            try:
                parent.mkdir(parents=True, exist_ok=True)
                self.path = Path(tempfile.mkdtemp(prefix="legion-", dir=parent))
            except OSError as error:
                raise ConfigError(
                    f"extra_args: the --temp-directory {wanted} cannot be used: {error}", key="extra_args"
                ) from error
            return
        base = Path(tempfile.gettempdir()) / f"legion-comfy-{getattr(os, 'getuid', int)()}"
        try:
            sweep_stale(base)
            self._owned = RuntimeDir.create(base)
            self.path = self._owned.path
        except ConfigError:  # an unusual temporary folder: its path too long, its owner another
            self.path = Path(tempfile.mkdtemp(prefix="legion-comfy-"))

    def close(self) -> None:
        if self._owned is not None:
            self._owned.close()
        else:
            shutil.rmtree(self.path, ignore_errors=True)
