"""The shim as a library file: the one that the wheel brought, else compiled on first use and kept per user.

Owns the cache folder and the call of the compiler, for setup.py too, which loads this file by itself: it
imports nothing of ours at its top. Whatever is missing is a reason in words and never an error: without the
shim, tensors are copied into the arena as they are sent, by the C library's memmove. The library also holds
copy.c, for `transport.copying`, which needs no preloading.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["PREBUILT_NAME", "build_for_wheel", "library_path", "preload_problem"]

PREBUILT_NAME = "born-prebuilt.so"
"""Beside the source, in wheels that were built where there was a compiler."""

_FOLDER = Path(__file__).with_name("native")
_SOURCES = (_FOLDER / "born.c", _FOLDER / "copy.c")
_PREBUILT = _FOLDER / PREBUILT_NAME
_COMPILE_S = 60.0
_FLAGS = ("-O2", "-shared", "-fPIC", "-fvisibility=hidden")
_LIBRARIES = ("-ldl", "-lpthread")
# Before glibc 2.34 dlsym was in a library of its own, which not every program has loaded.
_OLDER_LIBRARIES = ("-s", "-Wl,--no-as-needed", "-l:libdl.so.2", "-lpthread")
_MANYLINUX_MACHINES = ("x86_64", "aarch64")
_MANYLINUX_LEAST_MINOR = 17  # the oldest glibc that installers of wheels are built for
_PT_INTERP = 3
_HEADER_BYTES = 16384


@functools.cache
def library_path() -> tuple[Path | None, str]:
    """The shim, or None and the reason why there is none.

    The wheel's, where it loads; else our own, which is compiled (0.3 s) if it is not there.
    """
    if not sys.platform.startswith("linux"):
        return None, f"it needs Linux, and this is {sys.platform}"
    if not _runs_on_glibc():
        return None, "it needs glibc"
    if _preloadable(_PREBUILT) and _loads(_PREBUILT):
        return _PREBUILT, ""
    try:
        source = b"".join(path.read_bytes() for path in _SOURCES)
        key = hashlib.blake2b(source + platform.machine().encode(), digest_size=10).hexdigest()
        folder = _cache_folder()
        path = folder / f"born-{key}.so"
        if not _preloadable(path):
            raise OSError(f"LD_PRELOAD takes no path with a space or a colon in it, as {path} has")
        if not _is_ours(path):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch, path.name)
                _compile(built, _LIBRARIES)
                os.chmod(built, 0o600)
                os.replace(built, path)
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


def _preloadable(path: Path) -> bool:
    return not re.search(r"[\s:]", str(path))


def _loads(path: Path) -> bool:
    """Whether this process can load a library that was built elsewhere, and it is of our version."""
    if not path.is_file():
        return False
    from legion_shm.transport.born import SHIM_VERSION

    try:
        return int(ctypes.CDLL(str(path)).legion_born_version()) == SHIM_VERSION
    except (AttributeError, OSError):
        return False


def _compile(target: Path, libraries: tuple[str, ...]) -> None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang) here")
    done = subprocess.run(
        [compiler, *_FLAGS, "-o", str(target), *map(str, _SOURCES), *libraries],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_COMPILE_S,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise OSError(f"{compiler} ended with {done.returncode}: {done.stderr.strip()[:500]}")


def build_for_wheel(target: Path) -> str:
    """Compile the shim for other machines too; the tag of the platform that it runs on.

    Raises OSError or SubprocessError where it can't be built; ``target`` is gone then.
    """
    machine = platform.machine()
    try:
        if not sys.platform.startswith("linux") or not _runs_on_glibc():
            raise OSError("the allocator shim needs Linux with glibc")
        try:
            _compile(target, _OLDER_LIBRARIES)
        except OSError:
            _compile(target, _LIBRARIES)
            return f"linux_{machine}"
        if machine not in _MANYLINUX_MACHINES:
            return f"linux_{machine}"
        return f"manylinux_2_{max(_glibc_minor(target), _MANYLINUX_LEAST_MINOR)}_{machine}"
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _glibc_minor(library: Path) -> int:
    """The glibc 2.x that a library needs, by the newest of the symbol versions that it names."""
    named: list[bytes] = re.findall(rb"\0GLIBC_2\.(\d+)", library.read_bytes())
    return max(map(int, named), default=0)


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
