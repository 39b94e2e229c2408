"""torch's largest library, loaded by a thread beside Python, while a zygote imports something else.

Owns which libraries, in torch's own order, and when that is left to torch. It never imports torch.

Most of it is relocation: 0.13 s, in which the interpreter is free. Libraries of others wait for it in turn,
so what gains is what is Python alone. It belongs after whatever sets the environment, for libgomp reads its
settings as it is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Generator

__all__ = ["torch_library_loading"]

_LIBRARIES = (("libtorch_global_deps.so", "RTLD_GLOBAL"), ("libtorch_cpu.so", "RTLD_LOCAL"))
_TORCHS_WAY = ("TORCH_USE_RTLD_GLOBAL", "USE_RTLD_GLOBAL_WITH_LIBTORCH")
"""With these in the environment torch loads its libraries in another way."""


@contextlib.contextmanager
def torch_library_loading() -> Generator[None, None, None]:
    """It is being loaded while the block runs, and is there at its end, with no thread left.

    What fails here is left to torch's own import, which says why.
    """
    folder = _folder()
    thread = None if folder is None else threading.Thread(target=_load, args=(folder,), name="torch-library")
    if thread is not None:
        try:
            thread.start()
        except RuntimeError:  # no thread to be had
            thread = None
    try:
        yield
    finally:
        if thread is not None:
            thread.join()


def _folder() -> str | None:
    """Where torch's libraries are; None where they are there already, or are not to be loaded like this."""
    if not sys.platform.startswith("linux") or "torch" in sys.modules or any(map(os.getenv, _TORCHS_WAY)):
        return None
    try:
        torch = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    if torch is None or not torch.submodule_search_locations:
        return None
    root = torch.submodule_search_locations[0]
    if os.path.exists(os.path.join(root, "_rocm_init.py")):  # it finds libraries of its own first
        return None
    return os.path.join(root, "lib")


def _load(folder: str) -> None:
    dlopen = ctypes.CDLL(None).dlopen  # a call of it gives up the GIL, which ctypes.CDLL does not do
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    for name, scope in _LIBRARIES:
        if not dlopen(os.fsencode(os.path.join(folder, name)), os.RTLD_NOW | getattr(os, scope)):
            return
