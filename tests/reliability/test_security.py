"""The attacks that docs/security.md speaks of, each tried."""

from __future__ import annotations

import ast
import os
import pickle
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch
import zmq

from legion_shm import ConfigError, ProtocolError, Supervisor
from legion_shm.supervisor.spawn import HostConfig
from legion_shm.supervisor.worker_io import WorkerIO
from legion_shm.transport.codec import decode
from legion_shm.transport.frames import decode_message
from tests import needs
from tests.system.support import REPO, pid_of, run, run_script, spec
from tests.transport.fake_store import FakeStore

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)


@pytest.fixture
def base() -> Iterator[Path]:
    """A short path that every user can reach, as XDG_RUNTIME_DIR's parent is."""
    with tempfile.TemporaryDirectory(prefix="legion-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder) / "run"


def as_nobody(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program that becomes another user before its first line; later it cannot even see our interpreter."""
    become = f"import os, socket, sys\nos.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    command = [sys.executable, "-c", become + program, *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)


ATTACKS = """
import os, socket, sys
base, path, pid = sys.argv[1:]
def refused(name, attack):
    try:
        attack()
    except OSError as error:
        print(name, type(error).__name__)
    else:
        print(name, "WORKED")
def connect():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
refused("list", lambda: os.listdir(base))
refused("connect", connect)
refused("write", lambda: open(os.path.join(base, "x"), "w"))
refused("unlink", lambda: os.unlink(path))
refused("memory", lambda: open(f"/proc/{pid}/mem", "rb"))
refused("segments", lambda: os.listdir(f"/proc/{pid}/fd"))
refused("kill", lambda: os.kill(int(pid), 9))
"""


@AS_ROOT
def test_another_user_gets_nothing_though_he_knows_the_paths(base: Path) -> None:
    with Supervisor(runtime_dir=str(base), segments="portable") as legion:
        shared = legion.share(torch.ones(1 << 18))
        (path,) = base.glob("*/control")
        for name in [entry.name for entry in Path("/dev/shm").glob(f"{legion._directory.segment_prefix}*")]:
            assert stat.S_IMODE(os.lstat(f"/dev/shm/{name}").st_mode) == 0o600
        run(legion, "TestPass")
        done = as_nobody(ATTACKS, str(base), str(path), str(pid_of(legion.workers()[0])))
        lines = done.stdout.split("\n")[:-1]
        assert len(lines) == 7, done.stderr
        assert {line.split()[1] for line in lines} == {"PermissionError"}, lines
        assert float(shared.sum()) == 1 << 18


@AS_ROOT
def test_a_connection_of_another_user_is_turned_away_by_his_credentials(base: Path) -> None:
    """Should anyone open the directory: the kernel still says who connects."""
    with Supervisor(runtime_dir=str(base)) as legion:
        (path,) = base.glob("*/control")
        for opened in (base, path.parent):
            opened.chmod(0o711)
        path.chmod(0o777)
        program = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(10)
try:
    sock.connect(sys.argv[1])
    sock.sendall(bytes([0xFF]) + bytes(8) + bytes([0x7F]))
    print("heard" if sock.recv(64) else "closed")
except ConnectionError:
    print("closed")
"""
        mine = run_script("-c", program, str(path), cwd=REPO)
        assert mine.stdout == "heard\n", "our own is greeted"
        his = as_nobody(program, str(path))
        assert his.stdout == "closed\n", his.stderr
        assert run(legion, "TestPass", 5) == 5
        for opened in (base, path.parent):
            opened.chmod(0o700)


@AS_ROOT
@pytest.mark.parametrize("trouble", ["another's", "a link to another's", "open to all"])
def test_a_runtime_directory_that_is_not_ours_alone_is_refused(base: Path, trouble: str) -> None:
    real = base.with_name("real")
    real.mkdir(mode=0o700)
    if trouble == "open to all":
        real.chmod(0o777)
    else:
        os.chown(real, NOBODY, NOBODY)
    if trouble == "a link to another's":
        base.symlink_to(real)
    else:
        real.rename(base)
    with pytest.raises(ConfigError, match=r"symbolic link|belongs to user 65534|mode 0777"):
        Supervisor(runtime_dir=str(base))
    assert not list(base.iterdir())


@needs.posix
def test_the_directory_and_all_in_it_are_for_us_alone_and_cannot_be_guessed(base: Path) -> None:
    with Supervisor(runtime_dir=str(base)), Supervisor(runtime_dir=str(base)):
        assert stat.S_IMODE(os.lstat(base).st_mode) == 0o700
        for entry in base.iterdir():
            assert stat.S_IMODE(os.lstat(entry).st_mode) == (0o700 if entry.is_dir() else 0o600)
        names = [entry.name for entry in base.iterdir() if entry.is_dir()]
        assert len({*names}) == 2
        assert all(re.fullmatch("[0-9a-f]{16}", name) for name in names), "64 random bits"
    assert not list(base.iterdir())


@needs.posix
def test_a_peer_of_our_own_that_speaks_garbage_is_dropped(base: Path) -> None:
    with Supervisor(runtime_dir=str(base)) as legion:
        (path,) = base.glob("*/control")
        context: Any = zmq.Context()
        try:
            for identity in (b"w1.job.guess", b"\0", b"x" * 255):
                peer = context.socket(zmq.DEALER)
                peer.setsockopt(zmq.IDENTITY, identity if identity[0] else b"y")
                peer.setsockopt(zmq.LINGER, 200)
                peer.connect(f"ipc://{path}")
                for garbage in (b"", os.urandom(300), b"\x91" * 1000):
                    peer.send(garbage)
                    peer.send_multipart([garbage] * 3)
                peer.close()
        finally:
            context.term()
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(os.urandom(500))
            assert run(legion, "TestPass", 5) == 5
        assert legion._channel.dropped >= 9
        assert legion._loop._inbox.protocol_errors == 0
        assert legion._loop.fault is None


@pytest.mark.parametrize("channel", [pytest.param("ipc", marks=needs.posix), "tcp"])
def test_no_port_is_open_to_other_machines(channel: Literal["ipc", "tcp"]) -> None:
    with Supervisor(channel=channel) as legion:
        run(legion, "TestPass")
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = [
            connection.laddr.ip
            for process in family
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening == ([] if channel == "ipc" else ["127.0.0.1"])
        assert bool(legion._channel._auth) == (channel == "tcp"), "CURVE, which test_channel.py attacks"


# --- pickle -------------------------------------------------------------------------------------------

DANGEROUS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def test_nothing_that_handles_what_others_sent_can_unpickle_or_execute_it() -> None:
    found: dict[str, set[str]] = {}
    for folder in ("transport", "supervisor", "nodes"):
        for path in sorted((REPO / folder).rglob("*.py")):
            used: set[str] = set()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    used |= {alias.name.split(".")[0] for alias in node.names} & DANGEROUS
                elif isinstance(node, ast.ImportFrom) and node.module:
                    used |= {node.module.split(".")[0]} & DANGEROUS
                    if node.module.startswith("multiprocessing"):
                        used |= {alias.name for alias in node.names} & {"reduction", "connection"}
                elif isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    used |= {called} & {"eval", "exec", "torch.load", "np.load", "numpy.load"}
            if used:
                found[path.relative_to(REPO).as_posix()] = used
    assert found == {
        "transport/codec_pickle.py": {"pickle"},  # classes that spec.pickle_classes names, and no others
        "supervisor/spawn.py": {"reduction"},  # from a parent to its own child, before there is any wire
        "supervisor/spawn_windows.py": {"reduction"},  # the same
        "supervisor/zygote_wire.py": {"pickle"},  # from a parent to its own zygote, over a socketpair
        "supervisor/comfy_main.py": {"exec"},  # ComfyUI's own main.py, which spec.comfyui_path names
    }


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("pickle-was-run",))


def test_a_pickle_on_the_wire_is_a_protocol_error_and_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        bomb = pickle.dumps(Bomb(), protocol)
        with pytest.raises(ProtocolError):
            decode_message(bomb, max_bytes=1 << 20)
        with pytest.raises(ProtocolError):
            decode(bomb, (), FakeStore())
    assert not list(tmp_path.iterdir())


# --- what is logged -----------------------------------------------------------------------------------

PROGRAM = """
import logging, os, signal, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s %(message)s %(args)s")
import torch
from legion_shm import JobFailed, LegionError, Supervisor
from tests.reliability.support import code_flow, hostile
from tests.system.support import flow, spec

canary, channel = sys.argv[1:]
tensor = torch.frombuffer(bytearray(("TENSOR-" + canary).encode() * 4096), dtype=torch.uint8)
own = spec(env={"SECRET": "ENV-" + canary})
prompt = flow("TestPrint", text="fine")
prompt["note"] = {"class_type": "TestPass", "inputs": {"value": "PROMPT-" + canary}}
prompt["end"] = {"class_type": "LegionOutput", "inputs": {"name": "note", "value": ["note", 0]}}
with Supervisor(channel=channel, heartbeat_interval_s=0.05) as legion:
    deep = code_flow("import logging; logging.getLogger().setLevel(10); out = value")
    noisy = hostile(env={"SECRET": "ENV-" + canary})
    legion.submit(deep, inputs=[tensor], spec=noisy).result(timeout=60)
    legion.submit(prompt, inputs=[tensor], spec=own).result(timeout=60)
    values = {"input_1": tensor, "unread": "INPUT-" + canary}
    legion.submit(prompt, inputs=values, spec=own).result(timeout=60)
    broken = flow("TestRaise", kind="ValueError")
    bad = flow("NoSuchClass", text="PROMPT-" + canary)
    dies = flow("TestSignal", name="SIGKILL")
    for workflow in (broken, bad, dies):
        job = legion.submit(workflow, inputs=[["INPUT-" + canary, tensor]], spec=own)
        assert isinstance(job.exception(timeout=60), LegionError)
    try:
        legion.submit(prompt, inputs=[{"INPUT-" + canary: open}], spec=own)
    except LegionError:
        pass
    lies = code_flow("import os; send_raw(os.urandom(99)); import time; time.sleep(9)")
    assert isinstance(legion.submit(lies, inputs=[tensor], spec=noisy).exception(timeout=60), LegionError)
    logging.getLogger("canary").warning("logging works: %s", "WITNESS-" + canary)
    workers = list(legion._loop._processes)  # one that takes an ended one's place may have no endpoint yet
    tokens = [worker.token for worker in workers]
    tokens += [worker.endpoint.client_secret.decode() for worker in workers if worker.endpoint is not None]
with open("tokens", "w") as file:
    file.write("\\n".join(token for token in tokens if token))
"""


@pytest.mark.parametrize("channel", [pytest.param("ipc", marks=needs.posix), "tcp"])
def test_no_log_holds_a_token_a_prompt_an_environment_value_or_a_tensors_bytes(
    tmp_path: Path, channel: str
) -> None:
    canary = os.urandom(8).hex()
    done = run_script("-c", PROGRAM, canary, channel, cwd=tmp_path, within_s=110)
    assert done.returncode == 0, done.stderr[-2000:]
    logs = done.stdout + done.stderr
    assert f"WITNESS-{canary}" in logs, "what is logged is seen here"
    assert "legion_shm" in logs
    assert [line for line in logs.splitlines() if canary in line and "WITNESS" not in line] == []
    tokens = (tmp_path / "tokens").read_text().split()
    assert tokens
    assert not [token for token in tokens if token in logs]


def test_what_holds_a_secret_does_not_show_it() -> None:
    worker = WorkerIO("w1", spec(), 10)
    assert worker.token not in repr(worker)
    values: dict[str, Any] = dict.fromkeys((field.name for field in fields(HostConfig)), "public")
    values.update(token="hush", job_identity=b"w1.job.hush", control_identity=b"w1.control.hush")
    assert "hush" not in repr(HostConfig(**values))
