"""Node classes for tests: they sleep, fail, crash, print, and write where they should not.

Owns the classes. Use them by ``WorkerSpec(node_modules=["legion_shm.testing.nodes"])``. None of them is
ever cached, and each gives its value on at slot 0.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from legion_shm.job_context import check_cancelled, current_job, preview, progress

__all__ = ["NODE_CLASS_MAPPINGS"]

_POLL_S = 0.005
_KILL = signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL  # there it is TerminateProcess


class _TestNode:
    """``OPTIONS``: the inputs with their types, all optional; each class has its own `run`."""

    OPTIONS: ClassVar[dict[str, Any]] = {}
    RETURN_TYPES: tuple[str, ...] = ("*",)
    FUNCTION = "run"
    CATEGORY = "Legion/testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"required": {}, "optional": {**cls.OPTIONS, "value": ("*", {"forceInput": True})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: object) -> float:  # noqa: N802 - the protocol's name
        return float("nan")


class TestSleep(_TestNode):
    """Sleeps; ``cooperate`` looks for cancellation every few milliseconds."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "seconds": ("FLOAT",),
        "cooperate": ("BOOLEAN",),
    }

    def run(self, seconds: float = 0.1, cooperate: bool = False, value: object = None) -> tuple[object]:
        until_s = time.monotonic() + seconds
        while cooperate and time.monotonic() < until_s:
            check_cancelled()
            time.sleep(_POLL_S)
        time.sleep(max(0.0, until_s - time.monotonic()))
        return (value,)


class TestGate(_TestNode):
    """Makes the file ``entered``, then waits until the file ``go`` is there. Looks for no cancellation."""

    OPTIONS: ClassVar[dict[str, Any]] = {"entered": ("STRING",), "go": ("STRING",)}

    def run(self, entered: str = "", go: str = "", value: object = None) -> tuple[object]:
        Path(entered).touch()
        until_s = time.monotonic() + 60.0
        while not Path(go).exists():
            if time.monotonic() > until_s:
                raise TimeoutError(f"nobody made {go}")
            time.sleep(_POLL_S)
        return (value,)


class TestUntilCancelled(_TestNode):
    """Waits until its job is cancelled, and then returns as if it had not noticed."""

    def run(self, value: object = None) -> tuple[object]:
        until_s = time.monotonic() + 60.0
        while not current_job().cancelled:
            if time.monotonic() > until_s:
                raise TimeoutError("nobody cancelled the job")
            time.sleep(_POLL_S)
        return (value,)


class TestHoldGil(_TestNode):
    """Makes the file ``entered``, then sleeps in C without giving up the interpreter's lock."""

    OPTIONS: ClassVar[dict[str, Any]] = {"seconds": ("FLOAT",), "entered": ("STRING",)}

    def run(self, seconds: float = 60.0, entered: str = "", value: object = None) -> tuple[object]:
        if entered:
            Path(entered).touch()
        for _ in range(round(seconds * 2)):  # usleep may refuse a second and more
            if sys.platform == "win32":
                ctypes.PyDLL("kernel32").Sleep(500)
            else:
                ctypes.PyDLL(None).usleep(500_000)
        return (value,)


class TestRaise(_TestNode):
    OPTIONS: ClassVar[dict[str, Any]] = {"kind": ("STRING",), "text": ("STRING",)}

    def run(self, kind: str = "ValueError", text: str = "", value: object = None) -> tuple[object]:
        import builtins

        raise getattr(builtins, kind)(text)


class TestSignal(_TestNode):
    """Sends a signal to its own process, by name: ``SIGKILL``, ``SIGSEGV``, ``SIGABRT``, ``SIGSTOP``."""

    OPTIONS: ClassVar[dict[str, Any]] = {"name": ("STRING",)}

    def run(self, name: str = "SIGKILL", value: object = None) -> tuple[object]:
        os.kill(os.getpid(), _KILL if name == "SIGKILL" else getattr(signal, name))
        return (value,)


class TestExit(_TestNode):
    """Ends its process; ``raising`` by SystemExit, which an engine may catch."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "code": ("INT",),
        "raising": ("BOOLEAN",),
    }

    def run(self, code: int = 7, raising: bool = False, value: object = None) -> tuple[object]:
        if raising:
            sys.exit(code)
        os._exit(code)


class TestDieUntil(_TestNode):
    """Kills its process, unless ``file`` has that many lines already; adds one each time."""

    OPTIONS: ClassVar[dict[str, Any]] = {"file": ("STRING",), "deaths": ("INT",)}

    def run(self, file: str = "", deaths: int = 1, value: object = None) -> tuple[object]:
        with open(file, "a+", encoding="utf-8") as log:
            log.seek(0)
            if len(log.readlines()) < deaths:
                log.write(f"{os.getpid()}\n")
                log.flush()
                os.kill(os.getpid(), _KILL)
        return (value,)


class TestWriteInput(_TestNode):
    """Fills the tensor or array that it was given, in place; gives what was in its first element before."""

    OPTIONS: ClassVar[dict[str, Any]] = {"fill": ("FLOAT",)}
    RETURN_TYPES = ("*", "FLOAT")

    def run(self, fill: float = 9.0, value: Any = None) -> tuple[object, float]:
        first = float(value.reshape(-1)[0])
        value[...] = fill
        return value, first


class TestKeepOutput(_TestNode):
    """Fills the tensor that its last call gave out, in place, then gives a new one and keeps it."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "fill": ("FLOAT",),
        "elements": ("INT",),
    }
    _kept: ClassVar[list[Any]] = []

    def run(self, fill: float = 1.0, elements: int = 1 << 18, value: Any = None) -> tuple[object]:
        import torch

        for tensor in self._kept:
            tensor[...] = -1.0
        tensor = torch.full((elements,), fill) if value is None else value
        self._kept.append(tensor)
        return (tensor,)


class TestPrint(_TestNode):
    """Writes ``count`` lines ``text 0``, ``text 1``, ... to ``stdout``, ``stderr`` or ``log`` (a warning)."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "stream": ("STRING",),
        "text": ("STRING",),
        "count": ("INT",),
    }

    def run(
        self,
        stream: str = "stdout",
        text: str = "line",
        count: int = 1,
        value: object = None,
    ) -> tuple[object]:
        for number in range(count):
            line = f"{text} {number}" if count > 1 else text
            if stream == "log":
                logging.getLogger("legion.test").warning("%s", line)
            else:
                getattr(sys, stream).write(line + "\n")
        return (value,)


class TestWriteBytes(_TestNode):
    """Writes raw bytes, given in hex, to descriptor 1."""

    OPTIONS: ClassVar[dict[str, Any]] = {"hex": ("STRING",)}

    def run(self, hex: str = "", value: object = None) -> tuple[object]:  # noqa: A002 - an input's name
        data = bytes.fromhex(hex)
        while data:
            data = data[os.write(1, data) :]
        return (value,)


class TestProgress(_TestNode):
    """Reports ``steps`` steps, with a preview image at the first."""

    OPTIONS: ClassVar[dict[str, Any]] = {"steps": ("INT",)}

    def run(self, steps: int = 4, value: object = None) -> tuple[object]:
        import torch

        preview(torch.zeros(1, 8, 8, 3))
        for step in range(1, steps + 1):
            progress(step, steps)
        return (value,)


class TestBig(_TestNode):
    """Gives a new float32 tensor of ``nbytes``, filled with ``fill``."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "nbytes": ("INT",),
        "fill": ("FLOAT",),
    }

    def run(self, nbytes: int = 1 << 20, fill: float = 1.0, value: object = None) -> tuple[object]:
        import torch

        return (torch.full((nbytes // 4,), fill),)


class TestText(_TestNode):
    """Gives text of ``length`` letters, which travels inside the message."""

    OPTIONS: ClassVar[dict[str, Any]] = {"length": ("INT",)}

    def run(self, length: int = 10, value: object = None) -> tuple[object]:
        return ("x" * length,)


class TestNumbers(_TestNode):
    """Gives a list of ``count`` floats, nine bytes each inside the message."""

    OPTIONS: ClassVar[dict[str, Any]] = {"count": ("INT",)}

    def run(self, count: int = 10, value: object = None) -> tuple[object]:
        return ([0.5] * count,)


class TestObject(_TestNode):
    """Gives an object that cannot travel, inside a list."""

    def run(self, value: object = None) -> tuple[object]:
        return ([1, {"lock": object()}],)


class TestCounter(_TestNode):
    """Counts its calls in this process: ``(count, pid)``."""

    RETURN_TYPES = ("INT", "INT")
    _count: ClassVar[int] = 0

    def run(self, value: object = None) -> tuple[int, int]:
        TestCounter._count += 1
        return TestCounter._count, os.getpid()


class TestEnviron(_TestNode):
    """An environment variable, and the number of threads that torch took from its environment."""

    OPTIONS: ClassVar[dict[str, Any]] = {"name": ("STRING",)}
    RETURN_TYPES = ("*", "INT")

    def run(self, name: str = "", value: object = None) -> tuple[object, int]:
        import torch

        return os.environ.get(name), torch.get_num_threads()


class TestGrandchild(_TestNode):
    """Starts a process that would sleep for an hour; gives its pid."""

    RETURN_TYPES = ("INT",)

    def run(self, value: object = None) -> tuple[int]:
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])
        child.returncode = 0  # not to be waited for
        return (child.pid,)


class TestPass(_TestNode):
    """Gives its value on as it is."""

    def run(self, value: object = None) -> tuple[object]:
        return (value,)


class TestAdd(_TestNode):
    """A new tensor: its value and ``amount``."""

    OPTIONS: ClassVar[dict[str, Any]] = {"amount": ("FLOAT",)}

    def run(self, amount: float = 1.0, value: Any = None) -> tuple[object]:
        return (value + amount,)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        TestAdd, TestBig, TestCounter, TestDieUntil, TestEnviron, TestExit, TestGate, TestGrandchild,
        TestHoldGil, TestKeepOutput, TestNumbers, TestObject, TestPass, TestPrint, TestProgress, TestRaise,
        TestSignal, TestSleep, TestText, TestUntilCancelled, TestWriteBytes, TestWriteInput,
    )
}  # fmt: skip
