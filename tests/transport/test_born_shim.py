from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from legion_shm.transport import born_build
from legion_shm.transport.born import Shim
from legion_shm.transport.born_build import library_path, preload_problem
from tests import needs

HERE = Path(__file__).parent
COMPILER = shutil.which("cc")

needs_compiler = pytest.mark.skipif(
    library_path()[0] is None or COMPILER is None, reason="needs Linux, glibc and a C compiler that works"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, nothing known from before, and no shim that came with the package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(born_build, "_PREBUILT", tmp_path / "none")
    library_path.cache_clear()
    yield tmp_path / "legion-shm"
    library_path.cache_clear()


@needs_compiler
def test_the_shim_withstands_threads_reallocs_late_frees_and_forks(cache: Path, tmp_path: Path) -> None:
    library, reason = library_path()
    assert library is not None, reason
    program = tmp_path / "stress"
    source = HERE / "born_stress.c"
    # Not optimized: a compiler may take it that nobody looks at memory after free().
    subprocess.run(
        [str(COMPILER), "-O0", "-fno-builtin", "-o", program, source, library, "-lpthread"], check=True
    )
    done = subprocess.run(
        [program],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


REGIONS = """
import ctypes, os
library, page, huge = ctypes.CDLL(None), 4096, 2 << 20
library.legion_born_reserve.argtypes = [ctypes.c_uint64]
library.legion_born_serve.argtypes = [ctypes.c_uint64]
library.legion_born_add.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64]
assert library.legion_born_reserve(1 << 32) == 0
library.legion_born_serve(huge)
for segment in (1, 2, 3):
    fd = os.memfd_create("region")
    os.ftruncate(fd, huge + segment * page)
    assert library.legion_born_add(fd, huge + segment * page, segment) == 0
for segment in (1, 2, 3):
    block = ctypes.c_void_p()
    assert library.posix_memalign(ctypes.byref(block), 64, huge + segment * page) == 0
    print(block.value % huge)
"""


@needs_compiler
def test_each_region_lies_so_that_huge_pages_can_be_mapped_whole(cache: Path) -> None:
    library, reason = library_path()
    assert library is not None, reason
    done = subprocess.run(
        [sys.executable, "-c", REGIONS],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["0", "0", "0"]


@needs_compiler
def test_it_is_built_once_into_a_folder_of_the_users_alone(cache: Path) -> None:
    library, _ = library_path()
    assert library is not None
    assert library.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in cache.iterdir()] == [library.name], "and the compiler's folder is gone"
    built_ns = library.stat().st_mtime_ns
    library_path.cache_clear()
    assert library_path() == (library, "")
    assert library.stat().st_mtime_ns == built_ns


@needs_compiler
def test_the_shim_that_came_with_the_package_is_taken_before_our_own(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prebuilt = tmp_path / born_build.PREBUILT_NAME
    assert born_build.build_for_wheel(prebuilt)
    monkeypatch.setattr(born_build, "_PREBUILT", prebuilt)
    assert library_path() == (prebuilt, "")
    assert not cache.exists(), "and nothing is compiled"


@needs_compiler
@pytest.mark.parametrize("what", ["of another machine", "of another version", "where no preload reaches"])
def test_a_shim_that_is_of_no_use_here_is_passed_over(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    prebuilt = tmp_path / born_build.PREBUILT_NAME
    if what == "of another machine":
        prebuilt.write_bytes(b"\x7fELF\x02 and no more")
    elif what == "of another version":
        source = tmp_path / "other.c"
        source.write_text("int legion_born_version(void) { return 999; }\n")
        subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", prebuilt, source], check=True)
    else:
        prebuilt = tmp_path / "a folder" / born_build.PREBUILT_NAME
        prebuilt.parent.mkdir()
        born_build.build_for_wheel(prebuilt)
    monkeypatch.setattr(born_build, "_PREBUILT", prebuilt)
    library, _ = library_path()
    assert library is not None
    assert library.parent == cache


@needs_compiler
def test_a_cache_where_no_preload_reaches_is_a_reason(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "my cache"))
    library, reason = library_path()
    assert library is None
    assert "no path with a space" in reason


@needs_compiler
def test_what_failed_to_be_built_for_a_wheel_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "false")
    target = tmp_path / "born.so"
    with pytest.raises(OSError, match="ended with 1"):
        born_build.build_for_wheel(target)
    assert not target.exists()


@needs_compiler
@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_others_could_have_written_is_not_loaded(cache: Path, which: str) -> None:
    library, _ = library_path()
    assert library is not None
    (cache if which == "folder" else library).chmod(0o777)
    library_path.cache_clear()
    assert library_path()[0] is None
    assert "only this user can write" in library_path()[1]


@needs.posix
def test_without_a_compiler_there_is_a_reason_and_no_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(born_build, "_runs_on_glibc", lambda: True)
    library, reason = library_path()
    assert library is None
    assert "no C compiler" in reason


@needs.posix
def test_a_compiler_that_fails_is_quoted(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho no such header >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(born_build, "_runs_on_glibc", lambda: True)
    assert library_path() == (None, f"it could not be built: {fake} ended with 3: no such header")


@pytest.mark.parametrize(("system", "glibc"), [("darwin", True), ("linux", False)])
def test_elsewhere_it_is_not_even_tried(
    cache: Path, monkeypatch: pytest.MonkeyPatch, system: str, glibc: bool
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(born_build, "_runs_on_glibc", lambda: glibc)
    library, reason = library_path()
    assert library is None
    assert reason.startswith("it needs ")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about ELF programs")
def test_an_interpreter_that_is_no_such_program_gets_no_preload(tmp_path: Path) -> None:
    assert preload_problem(sys.executable) == ""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\nexec python3 "$@"\n')
    script.chmod(0o755)
    assert "not a 64-bit ELF program" in preload_problem(str(script))
    copied = tmp_path / "setuid"
    copied.write_bytes(Path(os.path.realpath(sys.executable)).read_bytes())
    copied.chmod(0o4755)
    assert "setuid" in preload_problem(str(copied))
    copied.chmod(0o755)
    preload_problem.cache_clear()
    assert preload_problem(str(copied)) == ""
    foreign = copied.read_bytes().replace(b"/lib64/ld-linux", b"/lib64/ld-other")
    copied.write_bytes(foreign)
    preload_problem.cache_clear()
    if sys.maxsize > 2**32 and foreign != Path(os.path.realpath(sys.executable)).read_bytes():
        assert "ld-other" in preload_problem(str(copied))
    assert "not a program" in preload_problem("no-such-python")


def test_a_process_that_was_started_without_it_has_none() -> None:
    assert Shim.here() is None
