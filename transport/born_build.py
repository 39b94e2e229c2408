"""The shim as a library file: compiled on first use, kept per user.

Owns the cache folder and the call of the compiler. Whatever is missing is a reason in words and never an
error: without the shim, tensors are copied into the arena as they are sent.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["library_path", "preload_problem"]

_SOURCE = Path(__file__).with_name("native") / "born.c"
_COMPILE_S = 60.0
_FLAGS = ("-O2", "-shared", "-fPIC", "-fvisibility=hidden")
_PT_INTERP = 3
_HEADER_BYTES = 16384


@functools.cache
def library_path() -> tuple[Path | None, str]:
    """The compiled shim, or None and the reason why there is none. Compiles it (0.3 s) if it is not there."""
    if not sys.platform.startswith("linux"):
        return None, f"it needs Linux, and this is {sys.platform}"
    if not _runs_on_glibc():
        return None, "it needs glibc"
    try:
        source = _SOURCE.read_bytes()
        key = hashlib.blake2b(source + platform.machine().encode(), digest_size=10).hexdigest()
        folder = _cache_folder()
        path = folder / f"born-{key}.so"
        if not _is_ours(path):
            _compile(path, folder)
        return path, ""
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return None, f"it could not be built: {error}"


@functools.lru_cache(maxsize=64)
def preload_problem(executable: str) -> str:
    """Why that interpreter should not be started with the shim; empty where it can be.

    A program of another C library or processor would not start at all; a setuid one ignores it.
    """
    found = shutil.which(executable)
    if found is None:
        return f"{executable} is not a program"
    try:
        status = os.stat(found)
        if status.st_mode & (stat.S_ISUID | stat.S_ISGID):
            return f"{found} is setuid or setgid"
        theirs, ours = _interpreter(found), _interpreter(sys.executable)
    except (OSError, ValueError, struct.error) as error:
        return f"{found} could not be looked at: {error}"
    return "" if theirs == ours else f"{found} runs with {theirs or 'no dynamic linker'}, we with {ours}"


def _runs_on_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


def _cache_folder() -> Path:
    """A folder of the user's alone. Raises OSError where somebody else could write into it."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise OSError(f"the cache folder {base!r} is not an absolute path")
    folder = Path(base) / "legion-shm"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} is not a folder that only this user can write into")
    return folder


def _is_ours(path: Path) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{path} is not a file that only this user can write")
    return True


def _compile(path: Path, folder: Path) -> None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang) here")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = os.path.join(scratch, path.name)
        done = subprocess.run(
            [compiler, *_FLAGS, "-o", built, str(_SOURCE), "-ldl", "-lpthread"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMPILE_S,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise OSError(f"{compiler} ended with {done.returncode}: {done.stderr.strip()[:500]}")
        os.chmod(built, 0o600)
        os.replace(built, path)


def _interpreter(executable: str) -> tuple[str, int]:
    """The dynamic linker that an ELF program asks for, and its processor's number."""
    with open(executable, "rb") as file:
        head = file.read(_HEADER_BYTES)
    if head[:5] != b"\x7fELF\x02":
        raise ValueError("it is not a 64-bit ELF program")
    order = "<" if head[5] == 1 else ">"
    (machine,) = struct.unpack_from(f"{order}H", head, 18)
    (table,) = struct.unpack_from(f"{order}Q", head, 32)
    size, count = struct.unpack_from(f"{order}HH", head, 54)
    for index in range(count):
        at = table + index * size
        if struct.unpack_from(f"{order}I", head, at)[0] == _PT_INTERP:
            offset, length = (
                struct.unpack_from(f"{order}Q", head, at + 8)[0],
                struct.unpack_from(f"{order}Q", head, at + 32)[0],
            )
            return head[offset : offset + length].rstrip(b"\0").decode(), machine
    return "", machine
