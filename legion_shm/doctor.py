"""What this machine offers to Legion, found out by trying, and what will be used of it.

Owns the questions and the report. It changes nothing that outlives it: what it makes (a small segment, a
directory, with the round trip a worker process) is gone when it returns.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from legion_shm import __version__
from legion_shm.clock import monotonic_s
from legion_shm.comfy_location import (
    COMFYUI_VARIABLE,
    ComfyLocation,
    find_comfyui,
    not_found_message,
    variable_passed_over,
)
from legion_shm.errors import LegionError

__all__ = ["Fact", "Report", "examine", "print_report"]

Level = Literal["ok", "note", "problem"]

_PACKAGES = ("torch", "numpy", "pyzmq", "msgpack", "pydantic", "psutil", "pillow", "safetensors")
_CHECK_SHAPE = (256, 1024)  # 1 MiB of float32
_CHECK_TIMEOUT_S = 60.0
_SMALL_NOFILE = 1024
_SMALL_SHM_BYTES = 256 << 20
_F_SETOWN_EX, _F_OWNER_TID = 15, 0
_F_SETSIG = 10  # linux/fcntl.h; the fcntl module lacks these in some builds
_F_ADD_SEALS, _F_GET_SEALS, _SEALS = 1033, 1034, 0x1 | 0x2 | 0x4


@dataclass(frozen=True)
class Fact:
    """One answer. ``note``: worth knowing; ``problem``: workflows can't run because of it."""

    section: str
    name: str
    value: str
    level: Level = "ok"


@dataclass
class Report:
    """All answers, in the order of the questions."""

    facts: list[Fact] = field(default_factory=list[Fact])

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(f"{fact.name}: {fact.value}" for fact in self.facts if fact.level == "problem")

    @property
    def usable(self) -> bool:
        """Whether the graph engine can run here."""
        return not self.problems

    def add(self, section: str, name: str, value: str, level: Level = "ok") -> None:
        self.facts.append(Fact(section, name, value, level))

    def document(self) -> dict[str, Any]:
        return {
            "usable": self.usable,
            "problems": list(self.problems),
            "facts": [asdict(fact) for fact in self.facts],
        }


def examine(
    *, comfyui: str | None = None, check: bool = True, env: Mapping[str, str] | None = None
) -> Report:
    """Ask every question; with ``check`` also send a tensor through a worker of each engine that is here.

    Raises ConfigError where ``comfyui`` is given and is no ComfyUI.
    """
    location = find_comfyui(comfyui, os.environ if env is None else env)
    report = Report()
    _system(report)
    _versions(report)
    _shared_memory(report)
    segments = _segment_kinds(report)
    _processes(report)
    channel = _channel_kinds(report)
    _runtime_dir(report)
    _devices(report, check=check)
    _comfyui(report, location, env)
    _used(report, segments, channel, location)
    if check and report.usable:
        _round_trip(report, "graph", None, "problem")
        if location is not None:
            _round_trip(report, "comfy", str(location.path), "note")
    return report


def _system(report: Report) -> None:
    import psutil

    add = report.add
    add("Machine", "system", f"{platform.system()} {platform.release()} ({platform.machine()})")
    add("Machine", "processors", f"{_usable_cpus()} usable, {os.cpu_count() or '?'} in all")
    memory = psutil.virtual_memory()
    add("Machine", "memory", f"{_size(memory.total)}, {_size(memory.available)} available")
    version = sys.version_info
    add(
        "Software",
        "Python",
        f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "ok" if version >= (3, 10) else "problem",
    )
    add("Software", "legion-shm", __version__)


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions(report: Report) -> None:
    for name in _PACKAGES:
        try:
            report.add("Software", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            remedy = f"not installed; run `{sys.executable} -m pip install {name}`"
            report.add("Software", name, remedy, "problem")
    with _trouble_in(report, "Software", "libzmq", "problem"):
        importlib.import_module("legion_shm.transport.channel")  # the one module that may import zmq
        zmq = cast("Any", sys.modules["zmq"])
        report.add("Software", "libzmq", str(zmq.zmq_version()))


def _shared_memory(report: Report) -> None:
    section = "Shared memory"
    if sys.platform == "win32":
        return  # named file mappings: there is nothing to try
    report.add(section, "memfd", *_outcome(_try_memfd, "yes"))
    report.add(section, "seals", *_outcome(_try_seals, "yes"))
    report.add(
        section, "pagemap", *_outcome(_try_pagemap, "readable: views nobody wrote to go on without a copy")
    )
    if sys.platform == "linux":
        report.add(
            section, "huge pages", *_outcome(_try_huge_pages, "yes: large tensors are mapped 2 MiB at a time")
        )
    report.add(
        section, "born in the arena", *_outcome(_try_born, "yes: what nodes make leaves without a copy")
    )
    shm = Path("/dev/shm")
    if shm.is_dir():
        usage = shutil.disk_usage(shm)
        value = f"{_size(usage.total)}, {_size(usage.free)} free (only portable segments need it)"
        report.add(section, "/dev/shm", value, "note" if usage.free < _SMALL_SHM_BYTES else "ok")
    else:
        report.add(section, "/dev/shm", "not there")


def _processes(report: Report) -> None:
    section = "Processes"
    for name, limit in (
        ("open files (RLIMIT_NOFILE)", "RLIMIT_NOFILE"),
        ("locked memory (RLIMIT_MEMLOCK)", "RLIMIT_MEMLOCK"),
    ):
        value, small = _limit(limit)
        report.add(section, name, value, "note" if limit == "RLIMIT_NOFILE" and small else "ok")
    if sys.platform == "win32":
        report.add(section, "job objects", *_outcome(_try_job_object, "yes: workers die with the supervisor"))
        return
    report.add(section, "pidfd", *_outcome(_try_pidfd, "yes"))
    report.add(
        section, "death pipe (F_SETSIG)", *_outcome(_try_death_signal, "yes: workers die with the supervisor")
    )


def _limit(name: str) -> tuple[str, bool]:
    if sys.platform == "win32":
        return "no such limit here", False
    import resource

    soft, hard = resource.getrlimit(getattr(resource, name))
    count: Callable[[int], str] = str if name == "RLIMIT_NOFILE" else _size
    texts = ["unlimited" if limit == resource.RLIM_INFINITY else count(limit) for limit in (soft, hard)]
    return f"{texts[0]} (at most {texts[1]})", soft != resource.RLIM_INFINITY and soft < _SMALL_NOFILE


def _outcome(attempt: Callable[[], None], yes: str) -> tuple[str, Level]:
    """What trying shows: ``yes``, or a note with the reason why not."""
    try:
        attempt()
    except (OSError, AttributeError, ImportError, NotImplementedError, ValueError) as error:
        return f"no: {error}", "note"
    return yes, "ok"


def _try_memfd() -> None:
    os.close(os.memfd_create("legion-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))


def _try_seals() -> None:
    import fcntl

    fd = os.memfd_create("legion-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        if fcntl.fcntl(fd, _F_GET_SEALS) & _SEALS != _SEALS:
            raise OSError("the seals were not kept")
    finally:
        os.close(fd)


def _try_pagemap() -> None:
    """A page that was just written must show as present; without the right to look, entries read as zero."""
    import ctypes

    page = os.sysconf("SC_PAGESIZE")
    memory = ctypes.create_string_buffer(b"\1" * page)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(ctypes.addressof(memory) // page * 8)
        (entry,) = struct.unpack("=Q", file.read(8))
    if not entry >> 63:
        raise OSError(
            "/proc/self/pagemap hides this process's own pages; received tensors are copied when sent on"
        )


def _try_huge_pages() -> None:
    from legion_shm.transport.huge_pages import huge_pages_problem

    if problem := huge_pages_problem():
        raise OSError(f"{problem}; large tensors take longer to be mapped")


def _try_job_object() -> None:
    from legion_shm.supervisor.win32 import Win32

    win32 = Win32()
    win32.close(win32.create_job())


def _try_born() -> None:
    """The allocator shim must load into an interpreter like this one."""
    import subprocess

    from legion_shm.transport.born_build import library_path, preload_problem

    library, reason = library_path()
    reason = reason or preload_problem(sys.executable)
    if library is None or reason:
        raise OSError(f"{reason}; what nodes make is copied once")
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import ctypes; ctypes.CDLL(None).legion_born_version"],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        timeout=_CHECK_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise OSError(f"{library} does not load into {sys.executable}; what nodes make is copied once")


def _try_pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _try_death_signal() -> None:
    """Closing a pipe's last write end must send the chosen signal; here a harmless one, to this thread."""
    import fcntl
    import signal

    number = signal.SIGRTMIN + 5
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    read_end, write_end = os.pipe()
    try:
        owner = struct.pack("ii", _F_OWNER_TID, threading.get_native_id())
        fcntl.fcntl(read_end, _F_SETOWN_EX, owner)
        fcntl.fcntl(read_end, _F_SETSIG, number)
        fcntl.fcntl(read_end, fcntl.F_SETFL, fcntl.fcntl(read_end, fcntl.F_GETFL) | os.O_ASYNC)
        os.close(write_end)
        write_end = -1
        if signal.sigtimedwait({number}, 1.0) is None:
            raise OSError("no signal came; a worker could outlive a killed supervisor")
    finally:
        for fd in (read_end, write_end):
            if fd >= 0:
                os.close(fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _segment_kinds(report: Report) -> str | None:
    from legion_shm.transport.segment import supported_kinds

    return _kinds(report, "Shared memory", "segment kind", supported_kinds())


def _channel_kinds(report: Report) -> str | None:
    with _trouble_in(report, "ZeroMQ", "transports", "problem"):
        from legion_shm.transport.channel import channel_kinds

        return _kinds(report, "ZeroMQ", "transport", channel_kinds())
    return None


def _kinds(report: Report, section: str, what: str, kinds: Mapping[str, str]) -> str | None:
    """List each kind; gives the first one that can be used, which is the one that ``auto`` takes."""
    for kind, reason in kinds.items():
        name = f"{what} {kind}{' with CURVE' if kind == 'tcp' else ''}"
        report.add(section, name, f"no: {reason}" if reason else "yes", "note" if reason else "ok")
    usable = [kind for kind, reason in kinds.items() if not reason]
    if not usable:
        report.add(section, what, "none can be used", "problem")
        return None
    return usable[0]


def _runtime_dir(report: Report) -> None:
    from legion_shm.transport.runtime_dir import RuntimeDir, default_base

    base = default_base()
    try:
        with RuntimeDir.create(base, sweeper=False):
            report.add("ZeroMQ", "runtime directory", f"{base} (sockets, private to this user)")
    except (LegionError, OSError) as error:
        report.add("ZeroMQ", "runtime directory", str(error), "problem")


def _devices(report: Report, *, check: bool) -> None:
    section = "Devices"
    with _trouble_in(report, section, "torch", "problem"):
        import torch as torch_module

        torch = cast("Any", torch_module)
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(index)
                uuid = getattr(properties, "uuid", "unknown")
                value = f"{properties.name}, {_size(properties.total_memory)}, UUID {uuid}"
                report.add(section, f"GPU {index}", value)
                if check:
                    torch.zeros(1, device=f"cuda:{index}")  # its memory is shared by who uses it
                    _gpu_arena(report, f"GPU {index}", str(uuid))
        elif torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
            report.add(section, "GPU", "none: this torch is built without CUDA; tensors stay in main memory")
        else:
            built = torch.version.cuda or torch.version.hip
            report.add(
                section, "GPU", f"none: torch (built for {built}) finds no usable device or driver", "note"
            )
        report.add(section, "torch threads", str(torch.get_num_threads()))


def _gpu_arena(report: Report, name: str, uuid: str) -> None:
    """Share memory of the device with a child process, as transfers do."""
    from legion_shm.transport.cuda_driver import ipc_problem
    from legion_shm.transport.gpu_probe import probe

    reason = ipc_problem()
    if not reason:
        try:
            report.add("Devices", f"{name}, arena", f"yes: its memory is {probe(uuid)}")
            return
        except LegionError as error:
            reason = str(error)
    report.add("Devices", f"{name}, arena", f"no: {reason}; its tensors cross through main memory", "note")


def _comfyui(report: Report, location: ComfyLocation | None, env: Mapping[str, str] | None) -> None:
    if location is None:
        report.add("ComfyUI", "found", f"no: {not_found_message(env)}")
        return
    passed_over = variable_passed_over(location, env)
    if passed_over:
        report.add("ComfyUI", COMFYUI_VARIABLE, passed_over, "note")
    version = location.version or "unknown"
    report.add("ComfyUI", "found", f"{location.path}, version {version} ({location.how})")


def _used(report: Report, segments: str | None, channel: str | None, location: ComfyLocation | None) -> None:
    section = "What will be used"
    memory = {"memfd": "memfd, without a name", "portable": "portable segments, with a name (no memfd here)"}
    report.add(section, "shared memory", memory.get(segments or "", "none"))
    report.add(
        section,
        "channel",
        {
            "ipc": "ZeroMQ over ipc",
            "tcp": "ZeroMQ over loopback TCP with CURVE (no ipc here)",
        }.get(channel or "", "none"),
    )
    report.add(section, "engine for engine=auto", "graph" if location is None else f"comfy ({location.path})")
    from legion_shm.supervisor.facilities import launcher_in_words

    start, end_seen, with_us = launcher_in_words()
    report.add(section, "start of workers", start)
    report.add(section, "end of workers", end_seen)
    report.add(section, "end of the supervisor", with_us)


def _round_trip(report: Report, engine: Literal["graph", "comfy"], path: str | None, level: Level) -> None:
    """A tensor goes through a worker and must come back equal; ``level`` is how bad it is if not."""
    section, name = "Check", _check_name(engine)
    with _trouble_in(report, section, name, level):
        import torch as torch_module

        from legion_shm.config import WorkerSpec
        from legion_shm.supervisor.api import Supervisor

        torch = cast("Any", torch_module)
        workflow: dict[str, Any] = {
            "1": {"class_type": "LegionImporter", "inputs": {}},
            "2": {"class_type": "LegionExporter", "inputs": {"input_1": ["1", 0]}},
        }
        sent = torch.rand(_CHECK_SHAPE)
        spec = WorkerSpec(engine=engine, comfyui_path=path, startup_timeout_s=_CHECK_TIMEOUT_S)
        started_s = monotonic_s()
        with Supervisor() as legion:
            first = legion.submit(workflow, inputs=[sent], spec=spec).result(timeout=_CHECK_TIMEOUT_S)
            ready_s = monotonic_s()
            second = legion.submit(workflow, inputs=[sent], spec=spec).result(timeout=_CHECK_TIMEOUT_S)
            again_s = monotonic_s()
            returned = all(torch.equal(result["output_1"], sent) for result in (first, second))
        copies = {
            transfer.direction: transfer.copies
            for transfer in second.stats.transfers
            if transfer.payload_bytes
        }
        if not returned:
            report.add(section, name, "it came back changed", level)
            return
        report.add(
            section,
            name,
            f"came back whole; copies: {copies.get('to_worker', 0)} on the way there, "
            f"{copies.get('from_worker', 0)} on the way back",
        )
        report.add(
            section,
            "time",
            f"{ready_s - started_s:.2f} s with the worker's start, then {1e3 * (again_s - ready_s):.1f} ms",
        )


def _check_name(engine: str) -> str:
    return f"a 1 MiB tensor through a worker, engine={engine}"


@contextlib.contextmanager
def _trouble_in(report: Report, section: str, name: str, level: Level) -> Any:
    """Whatever goes wrong inside is an answer too, and not the doctor's end."""
    try:
        yield
    except Exception as error:  # a broken install fails in any way
        report.add(section, name, f"{type(error).__name__}: {error}", level)


def _size(nbytes: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} bytes"


def print_report(report: Report) -> None:
    """Print for a person, on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    marks = {"ok": ("✓", "green"), "note": ("!", "yellow"), "problem": ("✗", "red")}
    section = ""
    table = Table.grid(padding=(0, 2))
    for fact in report.facts:
        if fact.section != section:
            section = fact.section
            table.add_row("", Text(section, style="bold"), "")
        mark, style = marks[fact.level]
        table.add_row(Text(mark, style=style), Text(fact.name), Text(fact.value, overflow="fold"))
    console.print(table)
    if report.usable:
        console.print(Text("Workflows can run here.", style="bold green"))
        if any(
            (fact.section, fact.name, fact.level) == ("Check", _check_name("comfy"), "note")
            for fact in report.facts
        ):
            console.print(
                Text("But not in ComfyUI, which engine=auto takes: see the last check. engine=graph works.")
            )
    else:
        console.print(Text("Workflows cannot run here:", style="bold red"))
        for problem in report.problems:
            console.print(Text(f"  {problem}"))
