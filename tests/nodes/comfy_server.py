"""A real ComfyUI server with this repository among its custom nodes, and talking to it over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)

LAUNCH = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(REPO)!r}); from legion_shm.cli import main; sys.exit(main())",
    "launch",
    "--",
)
"""`legion launch --` of this repository, whether or not it is installed."""

# Nodes for the master and its workers alike: a source of known bits, one that writes them down, and more.
PROBE_PACK = '''
import os, threading, time
import numpy, torch
import comfy.model_management, comfy.utils


class ProbeSource:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {}), "height": ("INT", {"default": 64, "max": 8192})}}

    def run(self, seed, height):
        return (torch.rand(1, height, 96, 3, generator=torch.Generator().manual_seed(seed)),)


class ProbeWrite:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "probe", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*", {"forceInput": True}), "path": ("STRING", {"default": ""})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, value, path):
        with open(path, "wb") as file:
            numpy.save(file, value.numpy() if isinstance(value, torch.Tensor) else numpy.asarray(value))
        return {"ui": {"written": [time.monotonic()]}}


class ProbeSlow:
    """Steps of 20 ms with progress and, once, a preview; writes when it began and ended."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"image": ("IMAGE",), "steps": ("INT", {}), "log": ("STRING", {})},
            "optional": {"after": ("*", {"forceInput": True})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, image, steps, log, after=None):
        from PIL import Image

        with open(log, "a") as file:
            file.write(f"begin {time.monotonic()}\\n")
        bar = comfy.utils.ProgressBar(steps)
        for step in range(steps):
            comfy.model_management.throw_exception_if_processing_interrupted()
            preview = ("JPEG", Image.new("RGB", (32, 32), "red"), 64) if step == steps // 2 else None
            bar.update_absolute(step + 1, steps, preview)
            time.sleep(0.02)
        with open(log, "a") as file:
            file.write(f"end {time.monotonic()}\\n")
        return (image,)


class ProbeFail:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "how": ("STRING", {"default": "raise"})}}

    def run(self, image, how):
        import os, signal

        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the probe failed on purpose")


class Session:
    """What can't leave its process."""

    def __init__(self):
        self.lock, self.runs = threading.Lock(), 0


class ProbeLive:
    RETURN_TYPES, FUNCTION, CATEGORY = ("SESSION",), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {"default": ""})}}

    def run(self, name):
        return (Session(),)


class ProbeUse:
    """How often it ran on this very object, in which process."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"session": ("*", {"forceInput": True}), "number": ("INT", {"default": 0})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, session, number):
        with session.lock:
            session.runs += 1
            return (torch.tensor([session.runs, os.getpid()]),)


class ProbeItems:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("IMAGE",), "run", "probe", (True,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {})}}

    def run(self, count):
        return ([torch.full((1, 4, 4, 3), n / 8) for n in range(count)],)


class ProbeFirst:
    """Fails when it runs for the first time."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "log": ("STRING", {})}}

    def run(self, image, log):
        first = not os.path.exists(log)
        open(log, "a").close()
        if first:
            raise RuntimeError("the first run fails")
        return (image,)


class Fits(str):
    def __ne__(self, other):
        return False


class ProbeName:
    RETURN_TYPES, FUNCTION, CATEGORY = (Fits("*"),), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def run(self, name):
        return (name,)


class ProbeLogin:
    """What nodes are told of the user and of previews; ``fail`` raises instead."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"image": ("IMAGE",), "fail": ("BOOLEAN", {"default": False})},
            "hidden": {"token": "AUTH_TOKEN_COMFY_ORG", "key": "API_KEY_COMFY_ORG"},
        }

    def run(self, image, fail, token=None, key=None):
        from comfy.cli_args import args

        if fail:
            raise RuntimeError("refused")
        return (f"{token} {key} {args.preview_method.value}",)


CLASSES = (
    ProbeSource,
    ProbeWrite,
    ProbeSlow,
    ProbeFail,
    ProbeLive,
    ProbeUse,
    ProbeItems,
    ProbeFirst,
    ProbeName,
    ProbeLogin,
)
NODE_CLASS_MAPPINGS = {c.__name__: c for c in CLASSES}
'''


class ComfyServer:
    """Started by the constructor; `stop` ends it."""

    def __init__(
        self,
        comfyui: Path,
        python: str,
        base: Path,
        *extra: str,
        legion: Path = REPO,
        name: str = "legion-shm",
        probe_pack: str = PROBE_PACK,
        environment: Mapping[str, str] | None = None,
        front_end: bool = False,
        launcher: Sequence[str] = (),
    ) -> None:
        """``legion`` becomes ``custom_nodes/name``. ``front_end``: with the page that its Python has.

        ``launcher``: a command that executes the one which follows it, as `LAUNCH` does.
        """
        self.base = base
        for folder in ("custom_nodes/probe_pack", "frontend", "input", "output", "user/default", "models"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / "probe_pack" / "__init__.py").write_text(probe_pack, encoding="utf-8")
        (base / "custom_nodes" / name).symlink_to(legion)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # Version 0.3.64 has no option for its database; a file that others lock is told of and does no harm.
        self._runtime = tempfile.mkdtemp(prefix="lg")  # a socket's path must be short
        self._log = open(base / "server.log", "w+", encoding="utf-8")  # noqa: SIM115 - closed by stop
        self.process = subprocess.Popen(
            [
                *launcher,
                python,
                str(comfyui / "main.py"),
                "--cpu",
                "--listen",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--base-directory",
                str(base),
                *([] if front_end else ["--front-end-root", str(base / "frontend")]),
                "--database-url",
                "sqlite:///:memory:",
                *extra,
            ],
            cwd=base,
            env={
                **os.environ,
                "XDG_RUNTIME_DIR": self._runtime,
                **({"OMP_NUM_THREADS": "1"} if environment is None else environment),
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._wait_until_ready(within_s=120)

    @classmethod
    def from_environment(cls, base: Path) -> ComfyServer:
        return cls(Path(COMFYUI or "."), PYTHON, base)

    def log(self) -> str:
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout=30)
        self._log.close()
        shutil.rmtree(self._runtime, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """Those that the server's Legion started: workers, and zygotes, which fork workers."""
        found: list[psutil.Process] = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # one that has ended is a zombie until it is reaped
                if "--multiprocessing-fork" in child.cmdline():
                    found.append(child)
        return found

    def workers(self) -> list[psutil.Process]:
        """Those of them that have started none of the others."""
        processes = self.processes()
        parents = {process.ppid() for process in processes}
        return [process for process in processes if process.pid not in parents]

    # --- HTTP ---------------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            body = answer.read().decode()
        return json.loads(body) if answer.headers.get_content_type() == "application/json" else body

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code}: {error.read().decode()}") from None
        return json.loads(text) if text else None

    def queue(self, prompt: Mapping[str, Any], client_id: str = "test") -> str:
        return str(self.post("/prompt", {"prompt": prompt, "client_id": client_id})["prompt_id"])

    def wait(self, prompt_id: str, within_s: float = 60.0) -> dict[str, Any]:
        """The prompt's history entry."""
        deadline_s = time.monotonic() + within_s
        while time.monotonic() < deadline_s:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return dict(history[prompt_id])
            time.sleep(0.01)
        raise AssertionError(f"prompt {prompt_id} has not ended within {within_s:g} s\n{self.log()[-4000:]}")

    def run(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """Queue, wait, and check that it ended well."""
        entry = self.wait(self.queue(prompt))
        assert entry["status"]["status_str"] == "success", json.dumps(entry["status"], indent=1)[:6000]
        return entry

    def fail(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """Queue, wait, and give the data of its execution_error."""
        entry = self.wait(self.queue(prompt))
        errors = [data for event, data in entry["status"]["messages"] if event == "execution_error"]
        assert errors, json.dumps(entry["status"], indent=1)[:6000]
        return dict(errors[0])

    def executed(self, entry: Mapping[str, Any], prompt: Mapping[str, Any]) -> set[str]:
        """The nodes of a prompt that were not taken from the cache."""
        cached: set[str] = set()
        for event, data in entry["status"]["messages"]:
            if event == "execution_cached":
                cached.update(data["nodes"])
        return set(prompt) - cached

    def _wait_until_ready(self, within_s: float) -> None:
        deadline_s = time.monotonic() + within_s
        while time.monotonic() < deadline_s and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        said = self.log()[-4000:]
        self.process.kill()
        self.process.wait()
        self._log.close()
        raise AssertionError(f"ComfyUI was not ready within {within_s:g} s\n{said}")
