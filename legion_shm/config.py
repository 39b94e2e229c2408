"""Settings: validated, typed, loadable from YAML, with defaults that need no thought.

`WorkerSpec` describes a worker, `SupervisorSettings` the supervisor's limits, `JobOptions` one job.
All are immutable pydantic models that refuse unknown keys. Whatever is wrong with one raises
`ConfigError` naming the key, what was given and what was expected. Nothing here starts anything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypedDict, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from legion_shm.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from legion_shm.keywords import SettingsKeywords, WorkerKeywords

__all__ = ["JobKeywords", "JobOptions", "SupervisorSettings", "WorkerSpec", "load_yaml"]

_Model = TypeVar("_Model", bound="_Settings")

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MiB = 1 << 20


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)
    title: ClassVar[str] = "settings"

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(type(self), error) from None

    @field_validator("*", mode="before")
    @classmethod
    def _truth_where_it_belongs(cls, value: object, info: ValidationInfo) -> object:
        """A truth value is no number. A bare ``off``, which YAML reads as false, means what it says."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if not value and "off" in get_args(annotation):
                return "off"
            kinds = {annotation, *get_args(annotation)}
            if {int, float} & kinds.union(*map(get_args, get_args(annotation))):
                raise ValueError("Input should be a number")
        return value

    @classmethod
    def from_yaml(cls: type[_Model], source: str | os.PathLike[str]) -> _Model:
        """Read from a YAML file. Raises ConfigError that names the file, and the line or the key."""
        path = Path(source)
        values = load_yaml(path)
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}", key=error.key) from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML's own reader keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            if isinstance(key, yaml.ScalarNode):
                name = (key.tag, str(key.value))
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        "while constructing a mapping",
                        node.start_mark,
                        f"the key {key.value!r} is there twice",
                        key.start_mark,
                    )
                seen.add(name)
        return cast("dict[Any, Any]", super().construct_mapping(node, deep))


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises ConfigError naming the file, with the line for a syntax error or a key that is there twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings file {path}: {error}") from error
    try:
        values: object = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return {str(key): value for key, value in cast("dict[object, Any]", values).items()}


def _config_error(model: type[_Settings], error: ValidationError) -> ConfigError:
    lines: list[str] = []
    first_key: str | None = None
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or "(whole)"
        text = item["msg"].removeprefix("Value error, ")
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):  # of a model inside this one, which has said it all
            first_key = first_key or (f"{key}.{inner.key}" if inner.key else key)
            lines.append(f"{key}: {inner}")
            continue
        first_key = first_key or key
        if item["type"] == "extra_forbidden":
            known = ", ".join(sorted(model.model_fields))
            lines.append(f"{key}: unknown; {model.title} has {known}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing")
        elif key.split(".")[0] == "env":  # values of the environment may be secrets
            lines.append(f"{key}: {text}")
        else:
            lines.append(f"{key}: {text}; got {_short(item.get('input'))}")
    return ConfigError(f"{model.title}: " + "; ".join(lines), key=first_key)


def _path_text(value: object) -> object:
    return os.fspath(cast("os.PathLike[str]", value)) if isinstance(value, os.PathLike) else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _zygote_default() -> Any:
    value = os.environ.get("LEGION_ZYGOTE") or "auto"
    if value not in ("auto", "off"):
        raise ConfigError(
            f"LEGION_ZYGOTE, in the environment: expected auto or off, got {value!r}", key="zygote"
        )
    return value


class WorkerSpec(_Settings):
    """What a worker is. Equal specs share workers; a worker is started on first use.

    ``env`` is set before the worker's interpreter starts, over the environment of this process.
    ``node_modules`` are importable names, or paths of ``.py`` files or package folders, that have
    ``NODE_CLASS_MAPPINGS`` (graph engine). ``python_path`` folders come first on the worker's ``sys.path``. A
    ``python_executable`` other than ours needs legion_shm installed in it. ``born_in_arena``: large tensors
    that nodes make lie in shared memory from the start, where the system allows it (`legion doctor` says),
    and leave the worker without a copy. ``gpu_arena``: tensors of a GPU cross within its memory where that
    can be shared; off, or where not, through main memory. ``codec_modules`` are importable names of modules
    that the worker imports for the classes of values and their codecs (`register_codec`). Instances of the
    classes that ``pickle_classes`` names in full, and of no others, may be pickled between the worker and us.
    ``zygote``: whether workers may be forked from a process that has their imports done; see docs/startup.md.
    ``models``: how the weights of ComfyUI's models reach the worker: through shared memory, by the loader's
    call and its file, or the cheaper; see docs/models.md. ``max_workers`` run jobs at a time. Beyond the busy
    ones, ``warm_spares`` more are kept ready, each with memory of its own, to take the place of one that is
    lost or has reached ``max_jobs_per_life``. They count among the supervisor's ``max_workers``.
    """

    title: ClassVar[str] = "WorkerSpec"

    engine: Literal["auto", "graph", "comfy"] = "auto"
    node_modules: Sequence[str] = ()
    codec_modules: Sequence[str] = ()
    pickle_classes: Sequence[str] = ()
    env: Mapping[str, str] = Field(default_factory=dict[str, str], repr=False)  # may hold secrets
    python_path: Sequence[str] = ()
    python_executable: str | None = None
    working_dir: str | None = None
    comfyui_path: str | None = None
    extra_args: Sequence[str] = ()
    max_workers: int = Field(default=1, ge=1, le=256)
    warm_spares: int = Field(default=0, ge=0, le=256)
    startup_timeout_s: Seconds = 120.0
    idle_timeout_s: Seconds | None = None
    max_jobs_per_life: int | None = Field(default=None, ge=1)
    zygote: Literal["auto", "off"] = "auto"
    born_in_arena: Literal["auto", "off"] = "auto"
    gpu_arena: Literal["auto", "off"] = "auto"
    models: Literal["auto", "reference", "recipe"] = "auto"

    if TYPE_CHECKING:

        def __init__(self, **values: Unpack[WorkerKeywords]) -> None: ...

    @field_validator("node_modules", "codec_modules", "pickle_classes", "python_path", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if isinstance(value, (str, os.PathLike)):
            return (_path_text(cast("object", value)),)
        if isinstance(value, Sequence):
            return tuple(_path_text(item) for item in cast("Sequence[object]", value))
        return value

    @field_validator("codec_modules", "pickle_classes")
    @classmethod
    def _dotted_names(cls, value: Sequence[str]) -> Sequence[str]:
        for name in value:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(f"{name!r} is not a dotted name, such as my_pack.codecs")
        return value

    @field_validator("extra_args", mode="before")
    @classmethod
    def _split_arguments(cls, value: object) -> object:
        if value is None:
            return ()
        if isinstance(value, str):
            import shlex

            return tuple(shlex.split(value))
        if isinstance(value, Sequence):
            return tuple(cast("Sequence[object]", value))
        return value

    @field_validator("python_executable", "comfyui_path", "working_dir", mode="before")
    @classmethod
    def _plain_path(cls, value: object) -> object:
        return _path_text(value)

    @field_validator("env", mode="before")
    @classmethod
    def _env_text(cls, value: object) -> object:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            return value
        env: dict[str, str] = {}
        for name, content in cast("Mapping[object, object]", value).items():
            if not isinstance(name, str) or not name or "=" in name or "\0" in name:
                raise ValueError(f"{name!r} is not a name of an environment variable")
            if isinstance(content, bool) or not isinstance(content, (str, int, float)):
                raise ValueError(f"{name} must be text (or a number), got {type(content).__name__}")
            if "\0" in str(content):
                raise ValueError(f"{name} holds a NUL character")
            env[name] = str(content)
        return dict(sorted(env.items()))

    @property
    def key(self) -> str:
        """Equal for equal specs: what decides whether two jobs may share a worker."""
        text = json.dumps(self.model_dump())  # pydantic's own JSON takes no name that is not Unicode
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def __hash__(self) -> int:
        return hash(self.key)


class SupervisorSettings(_Settings):
    """The supervisor's limits. Sizes in bytes, times in seconds, each with the reason for its default."""

    title: ClassVar[str] = "SupervisorSettings"

    max_workers: int = Field(default=16, ge=1, le=1024)
    """Live workers of all specs together."""
    max_queue: int = Field(default=10_000, ge=1)
    """Jobs that have been accepted and have not ended; one more raises QueueFull."""
    arena_quota_bytes: int = Field(default=8 << 30, ge=1 << 16)
    """Shared memory that one process's arena may grow to."""
    gpu_arena_quota_bytes: int = Field(default=1 << 30, ge=0)
    """GPU memory that one process's arenas may grow to, of all devices together; 0: none is shared."""
    arena_wait_s: Seconds = 30.0
    """How long a transfer waits for shared memory before ArenaFull."""
    inline_max_bytes: int = Field(default=64 << 10, ge=0, le=1 << 20)
    """Payloads up to this size travel inside the message; above, through shared memory."""
    max_message_bytes: int = Field(default=64 * MiB, ge=1 << 16, le=1 << 31)
    """Of one control message; larger ones raise MessageTooLarge."""
    heartbeat_interval_s: Seconds = 1.0
    heartbeat_timeout_s: Seconds = 60.0
    """A worker silent for this long is hung. Long, for a node may hold the interpreter's lock."""
    cancel_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """How long a cancelled job's node may go on before its worker is ended."""
    stop_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3.0
    """Stop ladder: from the request to stop until SIGTERM."""
    term_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """Stop ladder: from SIGTERM until SIGKILL."""
    restart_budget: int = Field(default=3, ge=0)
    """How often in a row workers of one spec may die before a job is done."""
    restart_backoff_s: Seconds = 0.1
    """Wait before the first restart; doubles each time, up to ``restart_backoff_max_s``."""
    restart_backoff_max_s: Seconds = 10.0
    restart_reset_s: Seconds = 60.0
    """A spec that was given up is tried again after this long."""
    event_history: int = Field(default=1000, ge=10)
    """Events kept per job for late readers."""
    log_tail_lines: int = Field(default=100, ge=1)
    """Lines of a worker's output kept for error messages."""
    lease_flush_s: Seconds = 0.05
    """How long an ended lease may wait for company before it is returned."""
    idle_trim_s: Seconds = 10.0
    """Shared memory, of GPUs too, that was unused for this long goes back to the system."""
    zygote: Literal["auto", "off"] = Field(default_factory=_zygote_default, validate_default=True)
    """Fork workers from a process that has their imports done, where that is safe. Default: LEGION_ZYGOTE."""
    zygote_idle_s: Seconds = 60.0
    """Such a process ends when it has had no worker for this long."""
    channel: Literal["auto", "ipc", "tcp"] = "auto"
    """ZeroMQ transport: ipc sockets, or loopback TCP with CURVE where there are none."""
    segments: Literal["auto", "memfd", "portable"] = "auto"
    """Kind of shared memory: anonymous memfd, or named segments where there is none."""
    runtime_dir: str | None = None
    """Folder for sockets; by default in XDG_RUNTIME_DIR, else in the temporary folder."""

    if TYPE_CHECKING:

        def __init__(self, **values: Unpack[SettingsKeywords]) -> None: ...

    @field_validator("heartbeat_timeout_s")
    @classmethod
    def _time_for_two_beats(cls, value: float, info: ValidationInfo) -> float:
        interval_s = info.data.get("heartbeat_interval_s", 0.0)
        if value < 2 * interval_s:
            raise ValueError(f"must be at least twice heartbeat_interval_s = {interval_s:g}")
        return value

    @field_validator("runtime_dir", mode="before")
    @classmethod
    def _plain_path(cls, value: object) -> object:
        return _path_text(value)


class JobKeywords(TypedDict, total=False):
    """The keywords of ``Supervisor.submit``, for type checkers; `JobOptions` checks them."""

    spec: WorkerSpec | None
    deadline_s: float | None
    retries: int
    allow_cpu: bool
    targets: Sequence[str] | None
    extra_data: Mapping[str, object]
    remote: bool


class JobOptions(_Settings):
    """The keyword options of ``Supervisor.submit``.

    ``deadline_s`` seconds after submission the job is ended with DeadlineExceeded, as `Job.cancel` ends one:
    a node that does not stop has ``cancel_grace_s`` more. ``retries`` is how often it may be run again after
    its worker was lost. ``allow_cpu`` lets a tensor of a device that
    the worker does not have arrive in the worker's main memory. ``targets`` are ids of output nodes: only
    these are run, and what they are made of; None: all output nodes. ``extra_data`` is ComfyUI's
    ``extra_data``, from which hidden inputs are filled (``extra_pnginfo``, API keys) and ``preview_method``
    is taken. With ``remote`` outputs that can't travel stay in the worker, and
    come as `RemoteHandle`.
    """

    title: ClassVar[str] = "submit"

    spec: WorkerSpec = Field(default_factory=WorkerSpec)
    deadline_s: Seconds | None = None
    retries: int = Field(default=0, ge=0, le=100)
    allow_cpu: bool = False
    targets: Sequence[str] | None = None
    extra_data: Mapping[str, object] = Field(default_factory=dict[str, object], repr=False)  # may hold keys
    remote: bool = False

    @field_validator("spec", mode="before")
    @classmethod
    def _default_spec(cls, value: object) -> object:
        return WorkerSpec() if value is None else value
