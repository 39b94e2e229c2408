"""Where Legion's files lie: the runtime folder, the global settings, the workflows of workers.

Owns the lookup of a workflow by its name, and keeps it inside the folders that the settings name. It reads
files and makes the one folder that workflows go to; it writes no file.

    user/default/ComfyUI-LegionPower/ where it exists, else user/default/Legion-SHM/
      config.yaml                  settings of all workers
      default_legion_config.yaml   what a new Legion: Configuration node shows
      workflows/                   workflows of workers
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from legion_shm.errors import ConfigError
from legion_shm.nodes.legion_yaml import BUILTIN_YAML, explain_once
from legion_shm.nodes.yaml_settings import Setting, read_settings

__all__ = ["Folders", "GlobalSettings", "default_yaml", "find_workflow", "global_settings", "workflow_names"]

PREDECESSORS = "ComfyUI-LegionPower"
OURS = "Legion-SHM"
HOME_VARIABLE = "LEGION_HOME"
"""Takes the place of ComfyUI's user folder where no ComfyUI runs."""

_KEYS = (
    "ports.start_port",
    "ports.max_workers",
    "worker.startup_timeout",
    "paths.worker_templates_dir",
    "paths.workflows_roots",
    "paths.data_exchange_root",
    "paths.temp_root_dir",
    "logging.level",
)
_MEANINGLESS = (
    "ports.start_port",
    "paths.worker_templates_dir",
    "paths.data_exchange_root",
    "paths.temp_root_dir",
)
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_STARTUP_TIMEOUT_S = 300.0  # LegionPower's own, for installations with very many custom nodes
_MAX_WORKERS = 20  # LegionPower's own
_MAX_LISTED = 2000
_DRIVE = re.compile(r"^[A-Za-z]:")


@dataclass(frozen=True)
class Folders:
    """``user`` is ComfyUI's folder of the default user; ``comfyui`` its root, None where none runs."""

    user: Path
    comfyui: Path | None = None

    @classmethod
    def current(cls) -> Folders:
        """Those of the ComfyUI that this process runs inside of; else of LEGION_HOME or ~/.legion-shm."""
        paths = sys.modules.get("folder_paths")
        base: object = getattr(paths, "base_path", None)
        user_directory: object = getattr(paths, "get_user_directory", None)
        if isinstance(base, str) and callable(user_directory):
            return cls(Path(str(user_directory())) / "default", Path(base))
        home = os.environ.get(HOME_VARIABLE)
        return cls(Path(home).absolute() if home else Path.home() / ".legion-shm")

    @property
    def runtime(self) -> Path:
        predecessors = self.user / PREDECESSORS
        return predecessors if predecessors.is_dir() else self.user / OURS

    def placed(self, text: str) -> Path:
        """A path of the settings: placeholders filled in, relative ones from ComfyUI's root."""
        text = text.replace("{legion_runtime}", str(self.runtime))
        root = self.comfyui or self.user
        return root / Path(text.replace("{comfyui_root}", str(root))).expanduser()


@dataclass(frozen=True)
class GlobalSettings:
    """``config.yaml``. ``workflow_roots`` are looked through in order."""

    workflow_roots: tuple[Path, ...]
    max_workers: int = _MAX_WORKERS
    startup_timeout_s: float = _STARTUP_TIMEOUT_S
    log_level: str | None = None


def global_settings(folders: Folders) -> GlobalSettings:
    """The settings in ``config.yaml``, or the defaults. Raises ConfigError naming the file and the line."""
    path = folders.runtime / "config.yaml"
    text = _read(path)
    settings = {} if text is None else read_settings(text, _KEYS, where=str(path))
    given = {key: setting for key, setting in settings.items() if not setting.empty}
    idle = [key for key in _MEANINGLESS if key in given]
    if idle:
        explain_once(
            "config.yaml",
            f"{path}: {', '.join(idle)}: without meaning now, as nothing goes by ports or files",
        )
    roots: tuple[Path, ...] = (folders.runtime / "workflows", folders.user / "workflows")
    if "paths.workflows_roots" in given:
        roots = tuple(folders.placed(root) for root in given["paths.workflows_roots"].texts() if root.strip())
    return GlobalSettings(
        workflow_roots=roots,
        max_workers=given["ports.max_workers"].count(1, 1024)
        if "ports.max_workers" in given
        else _MAX_WORKERS,
        startup_timeout_s=given["worker.startup_timeout"].seconds()
        if "worker.startup_timeout" in given
        else _STARTUP_TIMEOUT_S,
        log_level=_level(given["logging.level"]) if "logging.level" in given else None,
    )


def default_yaml(folders: Folders) -> str:
    """What a new configuration node shows: the user's template, else ours."""
    with contextlib.suppress(ConfigError):
        text = _read(folders.runtime / "default_legion_config.yaml")
        if text is not None and text.strip():
            return text.strip() + "\n"
    return BUILTIN_YAML


def workflow_names(folders: Folders) -> list[str]:
    """The workflow files that there are, by the names that `find_workflow` takes, sorted."""
    with contextlib.suppress(OSError):
        (folders.runtime / "workflows").mkdir(parents=True, exist_ok=True)
    names: set[str] = set()
    try:
        roots = global_settings(folders).workflow_roots
    except ConfigError:
        return []  # the node that runs says it
    for root in roots:
        for folder, subfolders, files in os.walk(root):  # follows no links
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            inside = Path(folder).relative_to(root)
            names.update((inside / name).as_posix() for name in files if _is_workflow(name))
            if len(names) > _MAX_LISTED:
                break
    return sorted(names)[:_MAX_LISTED]


def find_workflow(name: str, folders: Folders) -> Path:
    """The file of a workflow by its name, from the first of the folders that has it.

    Raises ConfigError for a name that leads out of those folders, by whatever means, and for one that is
    not there.
    """
    refused = _refusal(name)
    if refused:
        raise ConfigError(f"workflow: {name!r} {refused}", key="workflow")
    roots = global_settings(folders).workflow_roots
    relative = name.strip().replace("\\", "/")
    absolute = Path(relative).is_absolute() or relative.startswith("/")
    outside = absolute and not any(Path(relative).is_relative_to(root) for root in roots)
    for root in roots if not outside else ():
        for candidate in (root / relative, root / f"{relative}.json"):
            if _is_file(candidate):
                if _lies_in(candidate, root):
                    return candidate.resolve()
                outside = True  # unless another folder has one of this name
    if outside:
        raise ConfigError(
            f"workflow: {name!r} leads out of the folders of paths.workflows_roots "
            f"({', '.join(map(str, roots))}); a workflow must lie in one of them",
            key="workflow",
        )
    there = workflow_names(folders)
    raise ConfigError(
        f"workflow: there is no {name!r} in {', '.join(map(str, roots))}; "
        + (
            f"there are {', '.join(there[:10])}{' ...' if len(there) > 10 else ''}"
            if there
            else "they are empty"
        ),
        key="workflow",
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _lies_in(path: Path, root: Path) -> bool:
    """Whether the real file, behind all links, is in the real folder."""
    try:
        return path.resolve(strict=True).is_relative_to(root.resolve(strict=True))
    except OSError:
        return False


def _refusal(name: str) -> str:
    text = name.strip().replace("\\", "/")
    if not text:
        return "is no name of a file"
    if "\0" in text:
        return "holds a NUL character"
    if text.startswith("//") or (_DRIVE.match(text) and not _is_a_windows_path(text)):
        return "is a path of Windows; give the name of a file in one of the folders of paths.workflows_roots"
    if text.startswith("~") or ".." in text.split("/"):
        return "leads out of the folders of paths.workflows_roots; give a name inside of them"
    return ""


def _is_a_windows_path(text: str) -> bool:
    """Absolute, with its drive, on Windows: what may be given there as ``/...`` is elsewhere."""
    return sys.platform == "win32" and Path(text).is_absolute()


def _is_workflow(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


def _level(setting: Setting) -> str:
    level = setting.text().upper()
    if level not in _LEVELS:
        raise setting.error(f"one of {', '.join(_LEVELS)}")
    return level


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
