"""pyisolate's tensor path: an extension in a process of its own, tensors through its shared-memory
serializer.

Settings: host-coupled execution, ``share_torch=True`` (its zero-copy way), sandbox off (it concerns the
start, not
transfers), a virtual environment made by its own ``uv`` without further dependencies. Calls are awaited on
one
event loop that is kept. What its serializer keeps for five seconds is flushed between exchanges by its own
``flush_tensor_keeper``, so that memory does not run out; that is outside of the timed window.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from legion_shm.errors import PeerFailed
from legion_shm.native_bench.payload import Order
from legion_shm.native_bench.peers.base import TIMEOUT_S, Peer, Seen, Session
from legion_shm.native_bench.peers.quiet import quiet_descriptors

__all__ = ["PEERS"]


class _IsolateSession(Session):
    def __init__(self) -> None:
        pyisolate: Any = importlib.import_module("pyisolate")
        extension = importlib.import_module("legion_shm.native_bench.peers.isolate_extension").BenchExtension
        logging.getLogger("pyisolate").setLevel(logging.ERROR)
        self._flush = pyisolate.flush_tensor_keeper
        self._folder = tempfile.mkdtemp(prefix="legion-bench-")
        module = Path(self._folder, "bench_extension")
        module.mkdir()
        (module / "__init__.py").touch()
        self._loop = asyncio.new_event_loop()
        self._manager: Any = None
        self._path = os.environ.get("PATH", "")
        # Where pip puts uv's program, which pyisolate looks for by name.
        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), self._path))
        try:
            self._manager = pyisolate.ExtensionManager(
                extension, {"venv_root_path": str(Path(self._folder, "venvs"))}
            )
            self._extension: Any = self._manager.load_extension(
                {
                    "name": "legion_bench",
                    "module_path": str(module),
                    "isolated": True,
                    "dependencies": [],
                    "apis": [],
                    "share_torch": True,
                    "share_cuda_ipc": False,
                    "sandbox_mode": pyisolate.SandboxMode.DISABLED,
                }
            )
        except BaseException:
            self.close()
            raise

    def _call(self, name: str, *arguments: Any) -> Any:
        async def call() -> Any:
            return await asyncio.wait_for(getattr(self._extension, name)(*arguments), TIMEOUT_S)

        try:
            return self._loop.run_until_complete(call())
        except Exception as error:
            raise PeerFailed(f"pyisolate: {type(error).__name__}: {error}") from error

    def ready(self) -> None:
        with quiet_descriptors():
            self._call("prepare", Order((1024,), "touch", 1, 2).plain())

    def prepare(self, order: Order) -> None:
        self._call("prepare", order.plain())

    def exchange(self, tensor: Any) -> Any:
        return self._call("exchange", tensor)

    def finish(self) -> Seen:
        self._flush()
        return Seen(**self._call("finish"))

    def close(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception), quiet_descriptors():
                manager.stop_all_extensions()
            self._flush()
        os.environ["PATH"] = self._path
        if not self._loop.is_closed():
            self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class IsolatePeer(Peer):
    name = "pyisolate"
    title = "pyisolate"
    settings = "host-coupled, share_torch=True, no sandbox, one kept event loop, keeper flushed in between"
    package = "pyisolate"

    def open(self, most_bytes: int) -> Session:
        del most_bytes
        return _IsolateSession()


PEERS: list[Peer] = [IsolatePeer()]
