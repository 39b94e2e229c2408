"""What a worker's environment gets beside the caller's own settings, because it is read at exec only.

Owns the merging of glibc's tunables and of what is preloaded. It changes no variable's meaning for the user:
what the environment or `WorkerSpec.env` says already stays.

`legion launch` has the same preloaded for a program, and notes in `LAUNCHED` which library that was: whatever
else that program starts inherits it, workers get their own.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, MutableMapping

__all__ = [
    "LAUNCHED",
    "NON_TEMPORAL_BYTES",
    "launch_environment",
    "runs_on_glibc",
    "with_preload",
    "with_tunables",
    "without_launch",
    "without_preload",
]

LAUNCHED = "LEGION_LAUNCHED"
"""The variable that holds the path of the library that `legion launch` had preloaded."""

NON_TEMPORAL_BYTES = 0x200000
"""From this size on memcpy is to bypass the cache where we have no native code, whose copies choose by
themselves. glibc's own threshold grows with the shared cache, and can exceed every tensor. Nodes' own copies
may become slower by it (docs/performance.md)."""

_TUNABLE = "glibc.cpu.x86_non_temporal_threshold"


def runs_on_glibc() -> bool:
    """Whether this interpreter's C library is glibc; workers are taken to have the same."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


def with_tunables(env: Mapping[str, str]) -> dict[str, str]:
    """The environment with the threshold added to GLIBC_TUNABLES, where glibc on x86 knows it.

    A value that is there already, of the user's or of ours, is left alone.
    """
    if platform.machine() not in ("x86_64", "i686") or not runs_on_glibc():
        return dict(env)
    present = [part for part in env.get("GLIBC_TUNABLES", "").split(":") if part]
    if any(part.partition("=")[0] == _TUNABLE for part in present):
        return dict(env)
    return {**env, "GLIBC_TUNABLES": ":".join((*present, f"{_TUNABLE}={NON_TEMPORAL_BYTES:#x}"))}


def with_preload(env: Mapping[str, str], library: str) -> dict[str, str]:
    """The environment with a library preloaded before whatever else is."""
    others = env.get("LD_PRELOAD", "").strip()
    return {**env, "LD_PRELOAD": f"{library}:{others}" if others else library}


def without_preload(env: MutableMapping[str, str], library: str) -> None:
    """Take that library out again, so that programs which this one starts don't get it."""
    preloaded = env.get("LD_PRELOAD", "").replace(" ", ":").split(":")
    if not library or library not in preloaded:
        return
    others = ":".join(path for path in preloaded if path not in ("", library))
    if others:
        env["LD_PRELOAD"] = others
    else:
        del env["LD_PRELOAD"]


def launch_environment(env: Mapping[str, str], library: str) -> dict[str, str]:
    """What a program whose own tensors are to be born in shared memory is executed with.

    A library that an earlier launch preloaded is not preloaded twice.
    """
    plain = dict(env)
    without_launch(plain)
    return {**with_preload(plain, library), LAUNCHED: library}


def without_launch(env: MutableMapping[str, str]) -> None:
    """Take out what `legion launch` preloaded, for a worker, which gets a library of its own or none."""
    without_preload(env, env.pop(LAUNCHED, ""))
