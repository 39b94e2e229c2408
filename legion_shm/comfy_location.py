"""Where ComfyUI lies on this machine, and which version it is.

Owns the order in which places are looked at and what counts as a ComfyUI. It imports nothing of ComfyUI,
starts nothing and changes nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from legion_shm.errors import ConfigError

__all__ = ["COMFYUI_VARIABLE", "ComfyLocation", "find_comfyui", "not_found_message", "variable_passed_over"]

COMFYUI_VARIABLE = "COMFYUI_PATH"

_IN_HOME = "~/ComfyUI"
_FILES = ("main.py", "nodes.py")
_FOLDERS = ("comfy",)
_VERSION = re.compile(r"""^(?:__version__|version)\s*=\s*["']([^"'\n]+)["']""", re.MULTILINE)
_VERSION_FILES = ("comfyui_version.py", "pyproject.toml")
_VERSION_FILE_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class ComfyLocation:
    """A ComfyUI. ``how`` says what led to it; ``version`` is None where it does not tell."""

    path: Path
    how: str
    version: str | None = None


def find_comfyui(explicit: str | None, env: Mapping[str, str]) -> ComfyLocation | None:
    """The ComfyUI to use, None where there is none.

    Looked at in this order: ``explicit``; the ComfyUI that this process runs inside of; COMFYUI_PATH of
    ``env``; ComfyUI in the home folder of ``env``. Raises ConfigError where ``explicit`` is given and is
    none.
    """
    if explicit is not None:
        path = _absolute(explicit, env)
        missing = _missing(path)
        if missing:
            raise ConfigError(
                f"comfyui_path: {path} is not a ComfyUI: {missing}; "
                "give the folder that holds ComfyUI's main.py",
                key="comfyui_path",
            )
        return ComfyLocation(path, "given", _version(path))
    for how, path in _places(env):
        if not _missing(path):
            return ComfyLocation(path, how, _version(path))
    return None


def not_found_message(env: Mapping[str, str] | None = None) -> str:
    """Why `find_comfyui` found none, and how to point to one. ``env``: the process's own by default."""
    env = os.environ if env is None else env
    found = "no ComfyUI was found"
    given = env.get(COMFYUI_VARIABLE)
    if given:
        found += f" ({COMFYUI_VARIABLE} is set to {_what_is_wrong(_absolute(given, env))})"
    return f"{found}; point to one with comfyui_path (legion --comfyui), or set {COMFYUI_VARIABLE}"


def variable_passed_over(found: ComfyLocation, env: Mapping[str, str] | None = None) -> str:
    """Why ``found`` is not the one of COMFYUI_PATH; empty where it is, or where that was not looked at."""
    env = os.environ if env is None else env
    given = env.get(COMFYUI_VARIABLE)
    if not given or found.how != _IN_HOME:
        return ""
    return f"passed over: it is set to {_what_is_wrong(_absolute(given, env))}"


def _what_is_wrong(path: Path) -> str:
    return f"{path}, but {_missing(path) or 'it is one'}"


def _places(env: Mapping[str, str]) -> list[tuple[str, Path]]:
    places: list[tuple[str, Path]] = []
    running: object = getattr(sys.modules.get("folder_paths"), "base_path", None)
    if isinstance(running, str) and running:
        places.append(("running in this process", Path(running)))
    given = env.get(COMFYUI_VARIABLE)
    if given:
        places.append((COMFYUI_VARIABLE, _absolute(given, env)))
    home = _home(env)
    if home is not None:
        places.append((_IN_HOME, home / "ComfyUI"))
    return places


def _home(env: Mapping[str, str]) -> Path | None:
    home = env.get("HOME") or env.get("USERPROFILE")
    return Path(home) if home else None


def _absolute(text: str, env: Mapping[str, str]) -> Path:
    home = _home(env)
    if home is not None and (text == "~" or text.startswith(("~/", "~" + os.sep))):
        return home / text[2:]
    return Path(os.path.abspath(text))


def _missing(path: Path) -> str:
    """What a folder lacks to be a ComfyUI; empty where it is one."""
    try:
        if not path.is_dir():
            return "there is no such folder"
        lacks = [name for name in _FILES if not (path / name).is_file()]
        lacks += [f"{name}/" for name in _FOLDERS if not (path / name).is_dir()]
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return f"it lacks {', '.join(lacks)}" if lacks else ""


def _version(path: Path) -> str | None:
    for name in _VERSION_FILES:
        try:
            with open(path / name, encoding="utf-8", errors="replace") as file:
                match = _VERSION.search(file.read(_VERSION_FILE_MAX_BYTES))
        except OSError:
            continue
        if match:
            return match.group(1)
    return None
