"""Custom nodes with prestartup scripts, and ComfyUI-Manager, in workers: forked ones and executed ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from legion_shm import Supervisor, WorkerSpec
from tests.comfy.conftest import RealComfyUI
from tests.system.support import wait_for

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(300)]

_WAIT_S = 150

# What ComfyUI promises such a script: it runs before torch is loaded, with folders known and the log set up.
EARLY = """
import json, logging, os, sys
import folder_paths
{first}
with open({log!r}, "a") as file:
    said = {{
        "pid": os.getpid(),
        "torch": "torch" in sys.modules,
        "custom_nodes": folder_paths.get_folder_paths("custom_nodes"),
        "program": sys.modules["__main__"].__file__,
        "name": sys.modules["main"].__name__ if "main" in sys.modules else None,
        "log": bool(logging.getLogger().handlers),
        "preloaded": os.environ.get("LD_PRELOAD", ""),
    }}
    file.write(json.dumps(said) + "\\n")
os.environ["SET_EARLY"] = {value!r}
sys.path.append("/early/{value}")
"""

PACK = """
import json, multiprocessing, os, sys
import nodes


class EarlyFacts:
    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "early"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*", {"forceInput": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, value):
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=os.getpid)
        process.start()
        process.join(60)
        facts = {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "set_early": os.environ.get("SET_EARLY"),
            "path": [path for path in sys.path if path.startswith("/early/")],
            "program": sys.modules["__main__"].__file__,
            "spawned": process.exitcode,
            "manager_nodes": "ManagerNode" in nodes.NODE_CLASS_MAPPINGS,
            "nodes": sorted(nodes.NODE_CLASS_MAPPINGS),
            "modules": {name: kind.RELATIVE_PYTHON_MODULE for name, kind in nodes.NODE_CLASS_MAPPINGS.items()
                        if hasattr(kind, "RELATIVE_PYTHON_MODULE")},
            "names": dict(nodes.NODE_DISPLAY_NAME_MAPPINGS),
            "handlers": [type(handler).__name__ for handler in __import__("logging").getLogger().handlers],
        }
        return (json.dumps(facts),)


NODE_CLASS_MAPPINGS = {"EarlyFacts": EarlyFacts}
"""

FLOW: dict[str, Any] = {
    "0": {"class_type": "LegionImporter", "inputs": {}},
    "1": {"class_type": "EarlyFacts", "inputs": {"value": ["0", 0]}},
    "2": {"class_type": "LegionExporter", "inputs": {"input_1": ["1", 0]}},
}


class Installation:
    """A base folder with custom nodes of its own for the real ComfyUI, and what their scripts wrote."""

    def __init__(self, comfyui: RealComfyUI, base: Path) -> None:
        self._comfyui, self.base, self.log = comfyui, base, base / "scripts.log"
        for folder in ("input", "models", "output", "temp", "user", "custom_nodes"):
            (base / folder).mkdir(parents=True)
        self.pack("early", PACK, self.script())

    def pack(self, name: str, source: str, script: str | None = None) -> Path:
        folder = self.base / "custom_nodes" / name
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text(source)
        if script is not None:
            (folder / "prestartup_script.py").write_text(script)
        return folder

    def script(self, value: str = "1", first: str = "") -> str:
        return EARLY.format(log=str(self.log), value=value, first=first)

    def spec(self, *arguments: str, **fields: Any) -> WorkerSpec:
        return WorkerSpec(
            engine="comfy",
            comfyui_path=str(self._comfyui.path),
            python_executable=str(self._comfyui.python),
            extra_args=(f"--base-directory={self.base}", "--disable-api-nodes", *arguments),
            **fields,
        )

    def said(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(autouse=True)
def zygotes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGION_ZYGOTE", "auto")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)  # as where nobody has set it


@pytest.fixture
def installation(comfyui: RealComfyUI, tmp_path: Path) -> Installation:
    return Installation(comfyui, tmp_path / "base")


@pytest.fixture
def legion() -> Iterator[Supervisor]:
    with Supervisor(restart_backoff_s=0.01, zygote="auto") as supervisor:
        yield supervisor


def facts(legion: Supervisor, spec: WorkerSpec) -> dict[str, Any]:
    told = legion.submit(FLOW, inputs=["x"], spec=spec).result(timeout=_WAIT_S)["output_1"]
    assert isinstance(told, str)
    return dict(json.loads(told))


def restart(legion: Supervisor, pid: int) -> None:
    psutil.Process(pid).kill()
    wait_for(lambda: all(worker.pid != pid for worker in legion.workers()), "it is gone", within_s=30)


def test_scripts_run_once_before_torch_and_act_in_every_fork(
    legion: Supervisor, installation: Installation
) -> None:
    spec = installation.spec()
    first = facts(legion, spec)
    restart(legion, first["pid"])
    second = facts(legion, spec)
    (said,) = installation.said()
    assert said["pid"] == first["parent"] == second["parent"] != os.getpid(), "it ran in their zygote"
    assert said == {
        "pid": said["pid"],
        "torch": False,
        "custom_nodes": said["custom_nodes"],
        "program": str(Path(spec.comfyui_path or "") / "main.py"),
        "name": "__main__",
        "log": True,
        "preloaded": os.environ.get("LD_PRELOAD", ""),
    }
    assert str(installation.base / "custom_nodes") in said["custom_nodes"]
    for worker in (first, second):
        assert (worker["set_early"], worker["path"]) == ("1", ["/early/1"])


def test_a_forked_worker_has_what_an_executed_one_has(legion: Supervisor, installation: Installation) -> None:
    forked = facts(legion, installation.spec())
    executed = facts(legion, installation.spec(zygote="off"))
    assert executed["parent"] == os.getpid() != forked["parent"]
    in_zygote, in_worker = installation.said()
    assert in_worker == {**in_zygote, "pid": executed["pid"]}
    for name in ("set_early", "path", "program", "spawned", "handlers", "nodes", "modules", "names"):
        assert forked[name] == executed[name], name
    assert executed["spawned"] == 0, "a node may start processes: they do not run ComfyUI's main.py"
    assert executed["handlers"].count("StreamHandler") == 0, "no line of the log comes twice"


def test_a_script_that_has_changed_runs_again_for_the_next_worker(
    legion: Supervisor, installation: Installation
) -> None:
    spec = installation.spec()
    first = facts(legion, spec)
    installation.pack("early", PACK, installation.script("2, edited"))
    restart(legion, first["pid"])
    second = facts(legion, spec)
    assert second["set_early"] == "2, edited"
    assert second["parent"] not in (first["parent"], os.getpid()), "from a new zygote"
    wait_for(lambda: not psutil.pid_exists(first["parent"]), "the old zygote has ended", within_s=30)
    installation.pack("later", "NODE_CLASS_MAPPINGS = {}\n", installation.script("3"))
    restart(legion, second["pid"])
    assert len(installation.said()) == 2
    facts(legion, spec)
    assert len(installation.said()) == 4, "a pack that has come since is another's turn to run both"


def test_a_script_that_starts_a_thread_makes_its_process_the_worker(
    legion: Supervisor, installation: Installation
) -> None:
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    installation.pack("early", PACK, installation.script("thread", thread))
    told = facts(legion, installation.spec())
    (said,) = installation.said()
    assert said["pid"] == told["pid"], "and has not run the script twice"
    assert (told["parent"], told["set_early"]) == (os.getpid(), "thread")


def test_a_script_that_fails_leaves_the_worker_without_it_alone(
    legion: Supervisor, installation: Installation
) -> None:
    installation.pack("broken", "NODE_CLASS_MAPPINGS = {}\n", "raise RuntimeError('on purpose')\n")
    assert facts(legion, installation.spec())["set_early"] == "1"


@pytest.mark.parametrize("arguments", [(), ("--enable-manager",)])
def test_comfyui_manager_is_left_to_the_server(
    legion: Supervisor, installation: Installation, arguments: tuple[str, ...]
) -> None:
    if arguments and not knows(installation.spec(), "--enable-manager"):
        pytest.skip("this ComfyUI has no --enable-manager")
    harm = installation.base / "harm"
    source = f"NODE_CLASS_MAPPINGS = {{'ManagerNode': object}}\nopen({str(harm)!r}, 'w').close()\n"
    folder = installation.pack("ComfyUI-Manager", source, source)
    (folder / "glob").mkdir()
    (folder / "glob" / "manager_core.py").touch()
    told = facts(legion, installation.spec(*arguments))
    assert not told["manager_nodes"]
    assert not harm.exists()
    shutil.rmtree(folder / "glob")  # of that name alone: somebody else's pack
    (folder / "prestartup_script.py").touch()
    restart(legion, told["pid"])
    facts(legion, installation.spec(*arguments))
    assert harm.exists()


def knows(spec: WorkerSpec, option: str) -> bool:
    return option in (Path(spec.comfyui_path or "") / "comfy" / "cli_args.py").read_text()
