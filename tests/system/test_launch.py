"""Programs under `legion launch`: what their tensors are to workers, to themselves, and to their children."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from legion_shm.cli import main
from legion_shm.supervisor.worker_env import LAUNCHED
from legion_shm.transport.born_build import library_path
from tests.system.support import script_env

_, LACKING = library_path()
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"tensors cannot be born in arenas here: {LACKING}")

MIB = 1 << 20
PRELUDE = f"""
import json, os, sys, time
import torch
from legion_shm import Supervisor, WorkerSpec
from legion_shm.transport.born import Shim
from tests.system.support import flow, only_worker, pid_of, spec, wait_for

SIZE = 4 * {MIB}
SETTINGS = dict(segments="memfd", lease_flush_s=0.005)

def fresh(fill, nbytes=SIZE):
    return torch.full((nbytes // 4,), float(fill))

def there_and_back(legion, tensor, **options):
    workflow = {{"in": {{"class_type": "LegionImporter", "inputs": {{}}}},
                "out": {{"class_type": "LegionExporter", "inputs": {{"input_1": ["in", 0]}}}}}}
    result = legion.submit(workflow, inputs=[tensor], spec=spec(**options)).result(timeout=60)
    return result["output_1"], result.stats.copies

def warm(legion, **options):
    for _ in range(3):
        wait_for(lambda: there_and_back(legion, fresh(0.5), **options)[1] == 0, "it went without a copy")

def born(legion, fill):
    found = []
    def made():
        tensor = fresh(fill)
        got, copies = there_and_back(legion, tensor)
        found[:] = [tensor, got]
        return copies == 0
    wait_for(made, "it went without a copy")
    return found

def unsent(legion, fill):
    # Born in the arena too, and submitted to nobody.
    found = []
    def made():
        tensor = fresh(fill)
        there_and_back(legion, fresh(0))
        found[:] = [tensor]
        return Shim.here().find(tensor.data_ptr()) is not None
    wait_for(made, "it was born in the arena")
    return found[0]

def same(tensor, value):
    return float(tensor.min()) == float(tensor.max()) == float(value)

said = {{}}
"""


def launched(tmp_path: Path, code: str, *, within_s: float = 90.0, **env: str) -> dict[str, Any]:
    """What a program under `legion launch` puts into ``said``."""
    program = tmp_path / "program.py"
    program.write_text(f"{PRELUDE}{code}\nprint(json.dumps(said))\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "legion_shm.cli", "launch", "--", sys.executable, str(program)],
        env=script_env(**env),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=within_s,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said | {"stderr": done.stderr}


def test_what_a_launched_program_makes_goes_without_a_copy_and_its_later_writes_are_its_own(
    tmp_path: Path,
) -> None:
    said = launched(
        tmp_path,
        """
with Supervisor(**SETTINGS) as legion:
    warm(legion)
    mine, got = born(legion, 3)
    mine.fill_(-1)
    said["got what was sent"] = same(got, 3)
    said["mine is mine"] = same(mine, -1)
    back, copies = there_and_back(legion, mine)
    said["what was written since is copied"] = copies == 1 and same(back, -1)
    got.fill_(7)
    said["nor do I see what I write into what came back"] = same(mine, -1)
    mine, got = born(legion, 4)
    said["the same once more"] = [there_and_back(legion, mine)[1] for _ in range(3)]
    said["a part of it"] = there_and_back(legion, mine[SIZE // 8:])[1]
    said["small parts are copied"] = there_and_back(legion, fresh(1)[:20000])[1]
""",
    )
    assert said.pop("stderr") == ""
    assert said.pop("the same once more") == [0, 0, 0]
    assert said.pop("a part of it") == 0
    assert said.pop("small parts are copied") == 1
    assert all(said.values()), said


KEEPER = """
class Keeper:
    RETURN_TYPES = ("*",)
    FUNCTION = "run"
    kept = []
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",), "what": ("STRING",)}}
    def run(self, value, what):
        if what == "keep":
            self.kept.append(value)
            return (None,)
        (tensor,) = self.kept
        return (float(tensor.min()) if float(tensor.min()) == float(tensor.max()) else None,)
NODE_CLASS_MAPPINGS = {"Keeper": Keeper}
"""


def test_no_block_is_used_again_while_somebody_looks_at_it(tmp_path: Path) -> None:
    said = launched(
        tmp_path,
        f"KEEPER = {KEEPER!r}"
        """
with Supervisor(**SETTINGS) as legion:
    warm(legion)
    held = {fill: there_and_back(legion, fresh(fill))[0] for fill in range(12)}
    junk = [fresh(100 + fill) for fill in range(12)]
    del junk
    for fill in range(200, 212):
        there_and_back(legion, fresh(fill))
    said["all as they were sent"] = all(same(tensor, fill) for fill, tensor in held.items())
    with open("keeper.py", "w") as file:
        file.write(KEEPER)
    keeper = spec(node_modules=("keeper.py",))
    legion.submit(flow("Keeper", what="keep"), inputs=[fresh(55)], spec=keeper).result(timeout=60)
    for fill in range(300, 306):
        there_and_back(legion, fresh(fill))
    kept = legion.submit(flow("Keeper", what="show"), inputs=[None], spec=keeper).result(timeout=60)
    said["in the worker too"] = kept["output_1"] == 55.0
    legion.stop_workers(keeper)
    wait_for(lambda: len(legion.workers()) == 1, "the keeper has ended")
    os.kill(pid_of(only_worker(legion)), 9)
    warm(legion)
    said["and with the worker gone"] = all(same(tensor, fill) for fill, tensor in held.items())
said["and the supervisor"] = all(same(tensor, fill) for fill, tensor in held.items())
""",
    )
    assert said.pop("stderr") == ""
    assert all(said.values()), said


def test_a_fork_in_the_program_sees_what_was_there(tmp_path: Path) -> None:
    said = launched(
        tmp_path,
        """
with Supervisor(**SETTINGS) as legion:
    warm(legion)
    sent, got = born(legion, 3)
    private = unsent(legion, 4)
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(r, 1)
        ok = same(sent, 3) and same(private, 4)
        private.fill_(-2)
        other = fresh(9)
        del private, sent, other
        os._exit(0 if ok else 1)
    sent.fill_(-1)
    private.fill_(-1)
    del sent, private
    for fill in range(20):
        there_and_back(legion, fresh(fill))
    os.write(w, b"x")
    said["child"] = os.waitpid(pid, 0)[1]
    said["parent"] = same(got, 3)
    warm(legion)
""",
    )
    assert (said["child"], said["parent"]) == (0, True)


def test_workers_of_a_launched_program_get_an_environment_of_their_own(tmp_path: Path) -> None:
    said = launched(
        tmp_path,
        f"""
with Supervisor(**SETTINGS) as legion:
    warm(legion)
    def variable(name, **options):
        job = legion.submit(flow("TestEnviron", name=name), inputs=[None], spec=spec(**options))
        return job.result(timeout=60)["output_1"]
    said["launched"] = variable("{LAUNCHED}")
    said["preload"] = variable("LD_PRELOAD")
    def preloaded():  # when it was executed
        with open(f"/proc/{{pid_of(only_worker(legion))}}/environ") as file:
            return [entry for entry in file.read().split("\\0") if entry.startswith("LD_PRELOAD=")]
    said["own"] = ["/born-" in entry for entry in preloaded()]
    legion.stop_workers()
    wait_for(lambda: not legion.workers(), "they have ended")
    off = dict(born_in_arena="off", zygote="off")
    there_and_back(legion, fresh(1), **off)
    said["off"] = preloaded()
    said["user"] = variable("LD_PRELOAD", env={{"LD_PRELOAD": "libm.so.6"}}, **off)
    said["of the program"] = [os.environ["LD_PRELOAD"] == os.environ["{LAUNCHED}"]]
""",
    )
    assert said.pop("stderr") == ""
    assert said == {
        "launched": None,
        "preload": None,
        "own": [True],
        "off": [],
        "user": "libm.so.6",
        "of the program": [True],
    }


def test_one_supervisor_at_a_time_has_the_use_of_it_and_leaves_it_to_the_next(tmp_path: Path) -> None:
    said = launched(
        tmp_path,
        """
with Supervisor(**SETTINGS) as legion:
    warm(legion)
    mine, got = born(legion, 3)
    with Supervisor(**SETTINGS) as second:
        said["copies of the second"] = [there_and_back(second, fresh(1))[1] for _ in range(4)]
        said["of another's block"] = there_and_back(second, mine)[1]
    said["the first goes on"] = there_and_back(legion, mine)[1]
    little = fresh(5, 1 << 20)
    said["beside others"] = there_and_back(legion, little)[1]
with Supervisor(**SETTINGS) as third:
    said["from before"] = there_and_back(third, mine)[1]
    shim = Shim.here()
    found = [shim.find(tensor.data_ptr()) for tensor in [fresh(fill, 1 << 20) for fill in range(8)]]
    old = shim.find(little.data_ptr()).segment
    said["made in what the first left"] = sum(1 for block in found if block and block.segment == old)
    warm(third)
    said["kept"] = same(mine, 3) and same(got, 3)
    mine.fill_(4)
    said["apart"] = same(mine, 4) and same(got, 3)
""",
    )
    assert said.pop("stderr") == ""
    assert said == {
        "copies of the second": [1, 1, 1, 1],
        "of another's block": 1,
        "the first goes on": 0,
        "beside others": 0,
        "made in what the first left": 0,
        "from before": 1,
        "kept": True,
        "apart": True,
    }


def test_its_memory_goes_back_to_the_system_and_the_quota_is_kept(tmp_path: Path) -> None:
    said = launched(
        tmp_path,
        """
def regions():
    return [line for line in open("/proc/self/maps") if "segment" in line]

with Supervisor(idle_trim_s=0.3, **SETTINGS) as legion:
    warm(legion)
    wait_for(lambda: not regions(), "the arena was given back")
    mine, got = born(legion, 3)
    del got
    said["mine"] = same(mine, 3)
    del mine
    wait_for(lambda: not regions(), "the arena was given back once more")
    tried, trim = [], legion._memory.trim
    mine = unsent(legion, 4)
    legion._memory.trim = lambda: (tried.append(1), trim())[1]
    wait_for(lambda: tried, "it was looked for what could be given back")
    said["mine again"] = same(mine, 4)
    del mine
    wait_for(lambda: not regions(), "and again when nothing was left to say so")
with Supervisor(arena_quota_bytes=16 << 20, arena_wait_s=20.0, **SETTINGS) as legion:
    ok = True
    for nbytes in (2, 3, 15):
        for fill in range(6):
            ok = ok and same(there_and_back(legion, fresh(fill, nbytes << 20))[0], fill)
    said["quota"] = ok
""",
    )
    assert said.pop("stderr") == ""
    assert said == {"mine": True, "mine again": True, "quota": True}


# --- the command ----------------------------------------------------------------------------------


def command(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "legion_shm.cli", "launch", *arguments],
        env=script_env(**env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_program_takes_the_place_of_the_command() -> None:
    done = command("--", "sh", "-c", 'cat; echo "$0 $1" >&2; exit 7', "a b", "--help", stdin="through\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "through\n", "a b --help\n")
    script = "grep SigIgn /proc/self/status; kill -TERM $$"
    plain = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    done = command("sh", "-c", script)
    assert (done.returncode, ignored(done)) == (-signal.SIGTERM, ignored(plain))


def ignored(shown: subprocess.CompletedProcess[str]) -> int:
    """A mask of the signals, without the C library's own 32 and 33, which Python 3.13 ignores as a child."""
    return int(shown.stdout.split()[1], 16) & ~(0b11 << 31)


def test_its_environment_says_what_was_done_and_keeps_the_users() -> None:
    names = ("LD_PRELOAD", LAUNCHED, "GLIBC_TUNABLES")
    show = f"print(*map(__import__('os').environ.get, {names}), sep='\\n')"
    done = command(
        "--", sys.executable, "-c", show, LD_PRELOAD="libm.so.6", GLIBC_TUNABLES="glibc.malloc.check=0"
    )
    preload, library, tunables = done.stdout.splitlines()
    assert preload == f"{library}:libm.so.6"
    assert tunables == "glibc.malloc.check=0"
    twice = command(
        "--", sys.executable, "-c", show, LD_PRELOAD=preload, GLIBC_TUNABLES=tunables, **{LAUNCHED: library}
    )
    assert twice.stdout == done.stdout


@pytest.mark.parametrize(("program", "code"), [("no-such-program", 127), ("/etc/passwd", 126), ("/tmp", 126)])
def test_a_program_that_cannot_be_executed_ends_it_as_a_shell_would(program: str, code: int) -> None:
    done = command("--", program)
    assert (done.returncode, done.stdout) == (code, "")
    assert program in done.stderr
    assert "Traceback" not in done.stderr


def test_a_script_is_judged_by_its_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text('#!/bin/sh\necho "$LEGION_LAUNCHED"\n')
    script.chmod(0o755)
    done = command("--", str(script))
    assert done.stdout.strip().endswith(".so"), done.stderr
    script.write_text(f"#!{tmp_path / 'interpreter'}\n")
    interpreter = tmp_path / "interpreter"
    interpreter.write_bytes(b"no ELF program at all, but there")
    interpreter.chmod(0o755)
    done = command("--", str(script))
    assert done.returncode == 1
    assert "without `legion launch`" in done.stderr


def test_where_there_is_no_shim_it_says_why_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from legion_shm import cli_launch

    monkeypatch.setattr(cli_launch, "library_path", lambda: (None, "there is no C compiler here"))
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("it was started"))
    assert main(["launch", "--", sys.executable]) == 1
    assert "there is no C compiler here" in capsys.readouterr().err


def test_without_a_program_it_is_bad_usage() -> None:
    assert command("--").returncode == 2
