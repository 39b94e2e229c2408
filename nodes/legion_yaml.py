"""What a LEGION_CONFIG is, and how it comes from YAML: LegionPower's keys, and a few of our own.

Owns the keys and what each means for a worker. It starts nothing and looks for no file.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from legion_shm.config import WorkerSpec
from legion_shm.nodes.yaml_settings import Setting, read_settings

__all__ = ["BUILTIN_YAML", "Configuration", "explain_once", "parse_configuration"]

_log = logging.getLogger("legion_shm.nodes")

ENV = "execution.env_vars"
KEYS = (
    "comfyui.type",
    "comfyui.port",
    "comfyui.paths.comfyui_path",
    "comfyui.paths.python_executable",
    "comfyui.paths.custom_nodes_template",
    "execution.startup_timeout",
    "execution.dry_run",
    "execution.asynch",
    "execution.extra_args",
    "execution.max_workers",
    "execution.warm_spares",
    "execution.idle_timeout",
    "execution.deadline",
    "execution.retries",
    "execution.node_modules",
    "execution.models",
    "workflow",
)

WORKER_LABEL = "LEGION_WORKER_LABEL"
"""In the worker's environment, where configurations differ in nothing else that a worker is made of."""

Engine = Literal["auto", "comfy", "graph"]
Models = Literal["auto", "reference", "recipe"]
_MODELS: tuple[Models, ...] = ("auto", "reference", "recipe")
_ENGINES: dict[str, Engine] = {"local_process": "auto", "auto": "auto", "comfy": "comfy", "graph": "graph"}

BUILTIN_YAML = """\
comfyui:
  # local_process: ComfyUI, or the built-in graph engine where no ComfyUI is found
  # comfy, graph: the one or the other, always
  type: local_process
  paths:
    # empty: this ComfyUI, and the Python that runs it
    comfyui_path:
    python_executable:

execution:
  # seconds that a worker may take to start; empty: 300
  startup_timeout:
  # true: nothing is run, the inputs come back as the outputs
  dry_run: false
  # true: go on at once; Legion: Join Campaign gives the outputs later
  asynch: false
  # command line arguments of the worker's ComfyUI, such as: --lowvram --preview-method auto
  extra_args:
  # environment of the worker, such as: CUDA_VISIBLE_DEVICES: "1"
  env_vars:
  # how many such workers may run at a time
  max_workers: 1
  # weights of models: reference (shared memory), recipe (the worker reads the file), auto (the cheaper)
  models: auto

# a file in user/default/Legion-SHM/workflows, or in the workflows of this ComfyUI
workflow:
"""


@dataclass(frozen=True)
class Configuration:
    """A LEGION_CONFIG: what kind of worker, which workflow, and how to run it. Times in seconds.

    Compares by value: equal ones share a worker. None means that nothing was written.
    """

    engine: Engine = "auto"
    comfyui_path: str | None = None
    python_executable: str | None = None
    port: int | None = None
    custom_nodes_template: str | None = None
    startup_timeout_s: float | None = None
    dry_run: bool = False
    asynch: bool = False
    extra_args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    max_workers: int = 1
    warm_spares: int = 0
    idle_timeout_s: float | None = None
    deadline_s: float | None = None
    retries: int = 0
    node_modules: tuple[str, ...] = ()
    models: Models = "auto"
    workflow: str | None = None

    def worker_spec(self, *, startup_timeout_s: float, inherited_args: Sequence[str] = ()) -> WorkerSpec:
        """The worker that this asks for. ``startup_timeout_s`` counts where none was written."""
        env = dict(self.env)
        label = self._label()
        if label:
            env.setdefault(WORKER_LABEL, label)
        return WorkerSpec(
            engine=self.engine,
            comfyui_path=self.comfyui_path,
            python_executable=self.python_executable,
            extra_args=(*inherited_args, *self.extra_args),
            env=env,
            node_modules=self.node_modules,
            max_workers=self.max_workers,
            warm_spares=self.warm_spares,
            startup_timeout_s=self.startup_timeout_s or startup_timeout_s,
            idle_timeout_s=self.idle_timeout_s,
            models=self.models,
        )

    def _label(self) -> str:
        parts = [] if self.port is None else [f"port {self.port}"]
        if self.custom_nodes_template is not None:
            parts.append(f"template {self.custom_nodes_template}")
        return ", ".join(parts)


def parse_configuration(text: str, overrides: Mapping[str, object] | None = None) -> Configuration:
    """A configuration from YAML; ``overrides`` are settings by dotted key that count before it.

    Raises ConfigError that names the line and the key.
    """
    settings = read_settings(text, KEYS, where="legion_config", free=(ENV,))
    for key, value in (overrides or {}).items():
        settings[key] = Setting(key, value, "legion_config, widget")
    fields: dict[str, Any] = {}
    env: dict[str, str] = {}
    for key, setting in settings.items():
        if key.startswith(ENV + "."):
            env[key[len(ENV) + 1 :]] = _env_value(setting)
        elif not setting.empty:
            name, value = _read(setting)
            fields[name] = value
    configuration = replace(Configuration(), **fields, env=env)
    # Whatever WorkerSpec refuses is refused here, where the user wrote it.
    configuration.worker_spec(startup_timeout_s=1.0)
    _explain(configuration)
    return configuration


def _read(setting: Setting) -> tuple[str, object]:
    """The field of Configuration that a setting is for, and its value."""
    key = setting.key
    if key == "comfyui.type":
        engine = _ENGINES.get(setting.text())
        if engine is None:
            raise setting.error(f"one of {', '.join(_ENGINES)}")
        return "engine", engine
    if key == "comfyui.port":
        return "port", None if setting.value == "auto" else setting.count(1, 65535)
    if key in ("comfyui.paths.comfyui_path", "comfyui.paths.python_executable"):
        return key.rpartition(".")[2], os.path.expanduser(_path(setting))
    if key == "comfyui.paths.custom_nodes_template":
        return "custom_nodes_template", setting.text()
    if key in ("execution.startup_timeout", "execution.idle_timeout", "execution.deadline"):
        return f"{key.rpartition('.')[2]}_s", setting.seconds()
    if key in ("execution.dry_run", "execution.asynch"):
        return key.rpartition(".")[2], setting.flag()
    if key == "execution.extra_args":
        return "extra_args", setting.words()
    if key == "execution.max_workers":
        return "max_workers", setting.count(1, 256)
    if key == "execution.warm_spares":
        return "warm_spares", setting.count(0, 256)
    if key == "execution.retries":
        return "retries", setting.count(0, 100)
    if key == "execution.node_modules":
        return "node_modules", setting.texts()
    if key == "execution.models":
        if setting.text() not in _MODELS:
            raise setting.error(f"one of {', '.join(_MODELS)}")
        return "models", setting.text()
    return "workflow", setting.text()


def _path(setting: Setting) -> str:
    text = setting.text()
    if "\0" in text:
        raise setting.error("a path")
    return text


def _env_value(setting: Setting) -> str:
    if setting.value is None:
        raise setting.error('a value ("" for an empty one)')
    if not isinstance(setting.value, (str, int, float)):
        raise setting.error("text")
    return str(setting.value)


def _explain(configuration: Configuration) -> None:
    if configuration.port is not None:
        explain_once(
            "port",
            f"comfyui.port: workers need no port and none is opened; {configuration.port} only tells this "
            "worker from those of other ports. A ComfyUI that already runs there is not used",
        )
    if configuration.custom_nodes_template is not None:
        explain_once(
            "custom_nodes_template",
            f"comfyui.paths.custom_nodes_template: {configuration.custom_nodes_template!r} only tells this "
            "worker from those of other templates; choose a worker's custom nodes by execution.extra_args, "
            "with --disable-all-custom-nodes --whitelist-custom-nodes NAME ...",
        )


_explained: set[str] = set()
_explained_lock = threading.Lock()


def explain_once(topic: str, text: str) -> None:
    """Log a text at the first call for its topic in this process."""
    with _explained_lock:
        if topic in _explained:
            return
        _explained.add(topic)
    _log.info("%s", text)
