"""What was measured on: processor, memory, kernel, versions. No host name, no user, no path.

Owns the reading. What a system doesn't tell is left out.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["describe_machine", "describe_packages", "gpu_reason"]

_PACKAGES = ("legion-shm", "torch", "numpy", "pyzmq", "msgpack")
_SYSCTL = {
    "shmem_huge_pages": Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    "huge_pages": Path("/sys/kernel/mm/transparent_hugepage/enabled"),
}


def describe_machine() -> dict[str, str | int | float]:
    import psutil

    facts: dict[str, str | int | float] = {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "system": platform.system(),
        "kernel": platform.release().split("-")[0],
        "libc": " ".join(platform.libc_ver()).strip(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    for name, path in _SYSCTL.items():
        text = _read(path)
        if "[" in text:
            facts[name] = text.partition("[")[2].partition("]")[0]
    hypervisor = "hypervisor" in _read(Path("/proc/cpuinfo"))
    if sys.platform == "linux":
        facts["virtual_machine"] = "yes" if hypervisor else "no"
    if hasattr(os, "getloadavg"):
        facts["load_at_start"] = round(os.getloadavg()[0], 2)
    for variable in ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "OMP_NUM_THREADS"):
        if variable in os.environ:
            value = os.environ[variable]
            facts[variable] = Path(value).name if variable == "LD_PRELOAD" else value
    return facts


def describe_packages(more: Iterable[str]) -> dict[str, str]:
    """Versions of our own dependencies that matter here, and of ``more``, where installed."""
    versions: dict[str, str] = {}
    for name in dict.fromkeys((*_PACKAGES, *more)):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def gpu_reason() -> str:
    """Why nothing can be measured on a GPU here; empty where it can."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device is available to torch"
    return ""


def _processor() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
