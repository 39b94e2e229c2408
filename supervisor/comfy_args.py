"""What a worker's ComfyUI is started with: the user's own arguments, and those that make it headless.

Owns the command line that ComfyUI's parser is given, and the look for a GPU that decides on ``--cpu``.
It imports of ComfyUI only `comfy.cli_args`, and never torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import logging
import os
import platform
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from legion_shm.errors import ConfigError

__all__ = ["GivenArguments", "accelerator_found", "headless_arguments", "read_arguments"]

_log = logging.getLogger(__name__)

_KEY = "extra_args"
_REFUSED = ("quick_test_for_ci", "list_feature_flags")
"""Options with which ComfyUI ends instead of running."""

_THE_SERVERS = ("--enable-manager", "--enable-manager-legacy-ui", "--disable-manager-ui")
"""ComfyUI-Manager's: it installs and restarts, and writes the server's log file (`comfy_main`)."""

_IN_MEMORY = "sqlite:///:memory:"


class GivenArguments:
    """The user's arguments, as this very ComfyUI reads them."""

    def __init__(self, parser: Any, arguments: Sequence[str]) -> None:
        self._parser = parser
        self.arguments = tuple(arguments)
        self._values = _parse(parser, self.arguments)

    def value(self, name: str) -> Any:
        """What option ``name`` (``temp_directory``) was set to, or its default; None if it is not known."""
        return getattr(self._values, name, None)

    def given(self, name: str) -> bool:
        """Whether the option has another value than its default."""
        return bool(self.value(name) != self._parser.get_default(name))

    def knows(self, option: str) -> bool:
        """Whether this ComfyUI has the option ``--option``."""
        return option in self._parser._option_string_actions  # argparse has no public way to ask

    def accepts(self, *more: str) -> bool:
        """Whether ``more`` can stand beside what was given (options may exclude each other)."""
        try:
            _parse(self._parser, (*self.arguments, *more))
        except ConfigError:
            return False
        return True

    def without_manager(self) -> GivenArguments:
        """The same without the flags of ComfyUI-Manager, which the log names."""
        dropped = [word for word in self.arguments if word in _THE_SERVERS]
        if not dropped:
            return self
        _log.info("ComfyUI-Manager is left out of workers: it belongs to the server (%s)", " ".join(dropped))
        return GivenArguments(self._parser, [word for word in self.arguments if word not in dropped])

    def without_rivals(self, option: str) -> GivenArguments:
        """The same without the flags that can't stand beside ``option``, which the log names."""
        groups = self._parser._mutually_exclusive_groups
        rivals = {
            name
            for group in groups
            if any(option in action.option_strings for action in group._group_actions)
            for action in group._group_actions
            for name in action.option_strings
        } - {option}
        dropped = [word for word in self.arguments if word in rivals]
        _log.warning("there is no GPU here, so ComfyUI starts with %s, without %s", option, " ".join(dropped))
        return GivenArguments(self._parser, [word for word in self.arguments if word not in rivals])


def read_arguments(arguments: Sequence[str]) -> GivenArguments:
    """The user's arguments, read by the parser of the ComfyUI that is first on ``sys.path``.

    Leaves ComfyUI's argument module as it was: unloaded, for it parses ``sys.argv`` once, when it loads; or,
    in a fork of a zygote, the one that the modules imported there know. Raises ConfigError in the parser's
    own words.
    """
    loaded = "comfy.cli_args" in sys.modules
    module = importlib.import_module("comfy.cli_args")
    try:
        given = GivenArguments(module.parser, arguments)
    finally:
        if not loaded:
            del sys.modules["comfy.cli_args"]
            vars(sys.modules["comfy"]).pop("cli_args", None)
    for name in _REFUSED:
        if given.given(name):
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{_KEY}: with {option} ComfyUI ends instead of running; leave it out", key=_KEY
            )
    return given


def headless_arguments(given: GivenArguments, *, temp: Path, accelerator: bool) -> list[str]:
    """The whole command line. ``temp`` is this worker's own folder: ComfyUI empties its temp at its start."""
    if not accelerator and not given.accepts("--cpu"):
        given = given.without_rivals("--cpu")
    given = given.without_manager()
    front_end = temp / "frontend"
    front_end.mkdir(exist_ok=True)
    added: list[tuple[str, ...]] = [
        ("--temp-directory", str(temp)),
        ("--front-end-root", str(front_end)),  # else the front end's package has to be there, for nothing
        ("--disable-auto-launch",),
    ]
    if not given.given("database_url"):
        added.append(("--database-url", _IN_MEMORY))  # the file is locked by the ComfyUI that runs beside us
    if (
        not accelerator
        and not given.value("cpu")
        and given.value("directml") is None
        and given.accepts("--cpu")
    ):
        added.append(("--cpu",))
    # Ours come last: of an option given twice, the last one counts.
    return [*given.arguments, *(part for words in added if given.knows(words[0]) for part in words)]


def _parse(parser: Any, arguments: Sequence[str]) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parser.parse_args(list(arguments))
    except SystemExit:
        words = said.getvalue().strip().splitlines()
        why = words[-1].partition("error: ")[2] or words[-1] if words else "it ended without a word"
        raise ConfigError(f"{_KEY}: ComfyUI does not take {' '.join(arguments)!r}: {why}", key=_KEY) from None


def accelerator_found(env: Mapping[str, str]) -> bool:
    """Whether torch will find a GPU or the like; without one ComfyUI starts only with ``--cpu``.

    Asks NVML and not CUDA, whose first call settles for good which devices are visible.
    """
    if any(importlib.util.find_spec(name) is not None for name in ("torch_npu", "torch_mlu", "torch_ixuca")):
        return True
    built_for = _torch_build()
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    if built_for.get("hip"):
        return os.name == "nt" or os.path.exists("/dev/kfd")
    if built_for.get("xpu"):
        return os.name == "nt" or os.path.exists("/dev/dri")
    if not built_for.get("cuda") or env.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return _nvidia_devices() > 0


def _torch_build() -> Mapping[str, Any]:
    """What ``torch.version`` says, without loading torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return {}
    path = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    try:
        return runpy.run_path(str(path))
    except Exception:  # a build of its own kind: let ComfyUI find out
        return {"cuda": "unknown"}


def _nvidia_devices() -> int:
    nvml_name, cuda_name = (
        ("nvml.dll", "nvcuda.dll") if os.name == "nt" else ("libnvidia-ml.so.1", "libcuda.so.1")
    )
    try:
        nvml = ctypes.CDLL(nvml_name)
    except OSError:
        try:
            ctypes.CDLL(cuda_name)
        except OSError:
            return 0
        return 1  # a driver without NVML, as on some embedded boards
    count = ctypes.c_uint(0)
    try:
        if nvml.nvmlInit_v2() != 0:
            return 0
        try:
            return count.value if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 else 0
        finally:
            nvml.nvmlShutdown()
    except AttributeError:
        return 0
