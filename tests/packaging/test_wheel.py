"""The distribution: what a wheel holds, and what can be imported once it is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from legion_shm.transport.born import SHIM_VERSION
from tests import needs

REPO = Path(__file__).resolve().parents[2]
FOLDERS = ("legion_shm", "transport", "supervisor", "nodes", "native_bench")
LINKS = FOLDERS[1:]
LEFT_AS = [pytest.param("symlinks", marks=needs.symlinks), "text files", "empty folders"]
LOCAL = (".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "docs")
SITE_PACKAGES = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def checkout(target: Path, *, links: str) -> Path:
    """A copy of the repository, its symlinks as they are, or as Windows or a zip archive leaves them."""
    shutil.copytree(REPO, target, symlinks=True, ignore=shutil.ignore_patterns(*LOCAL))
    for link in LINKS:
        path = target / "legion_shm" / link
        path.unlink()
        if links == "symlinks":
            path.symlink_to(f"../{link}", target_is_directory=True)
        elif links == "text files":
            path.write_text(f"../{link}", encoding="utf-8")
        elif links == "empty folders":
            path.mkdir()
    return target


def build(source: Path, out: Path, kind: str, **env: str) -> Path:
    """Build offline with the setuptools of this environment; ``kind`` is a hook of PEP 517 or 660."""
    out.mkdir()
    code = f"import sys, setuptools.build_meta as b; print(b.{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module", params=LEFT_AS)
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("wheel")
    return build(checkout(base / "source", links=str(request.param)), base / "dist", "build_wheel")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def import_locations(site: Path, cwd: Path) -> dict[str, str | None]:
    """Where each name is found by a Python that has ``site`` beside the dependencies."""
    code = f"""
import sys, site, json, importlib.util
site.addsitedir({str(site)!r})
sys.path.extend({SITE_PACKAGES!r})
wanted = {[*LINKS, "legion_shm", *(f"legion_shm.{link}" for link in LINKS)]!r}
specs = {{name: importlib.util.find_spec(name) for name in wanted}}
print(json.dumps({{name: spec and spec.origin for name, spec in specs.items()}}))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def test_wheel_holds_every_module_of_the_five_folders_under_the_one_package(wheel: Path) -> None:
    expected = {
        (
            path.relative_to(REPO) if folder == "legion_shm" else Path("legion_shm", path.relative_to(REPO))
        ).as_posix()
        for folder in FOLDERS
        for path in (REPO / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    assert all(any(name.startswith(f"legion_shm/{link}/") for name in expected) for link in LINKS)
    assert {name for name in names(wheel) if name.endswith(".py")} == expected


def test_wheel_has_no_other_top_level_name(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"legion_shm"}


def test_wheel_is_marked_typed_and_licensed(wheel: Path) -> None:
    content = names(wheel)
    assert "legion_shm/py.typed" in content
    assert "legion_shm/native_bench/limits.c" in content
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in content)


def test_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = {name.rpartition("/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(info["METADATA"]).decode())
        scripts = archive.read(info["entry_points.txt"]).decode()
    assert metadata["Name"] == "legion-shm"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == {"cuda", "bench", "web", "dev"}
    assert "legion = legion_shm.__main__:main" in scripts.splitlines()
    required = {line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert {"torch>=2.4", "numpy>=1.26", "pyzmq>=26", "msgpack>=1.0.8"} <= required


def test_installed_wheel_makes_only_the_one_package_importable(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    found = import_locations(site, tmp_path)
    for link in LINKS:
        assert found[link] is None
        assert found[f"legion_shm.{link}"] == str(site / "legion_shm" / link / "__init__.py")


@pytest.mark.parametrize("links", LEFT_AS)
def test_editable_install_imports_the_five_folders_in_place(tmp_path: Path, links: str) -> None:
    source = checkout(tmp_path / "source", links=links)
    site = tmp_path / "site"
    with zipfile.ZipFile(build(source, tmp_path / "dist", "build_editable")) as archive:
        archive.extractall(site)
    found = import_locations(site, tmp_path)
    assert found["legion_shm"] == str(source / "legion_shm" / "__init__.py")
    for link in LINKS:
        assert found[link] is None
        assert os.path.realpath(str(found[f"legion_shm.{link}"])) == str(source / link / "__init__.py")


def test_wheel_built_from_the_source_distribution_is_the_same(tmp_path: Path) -> None:
    source = checkout(tmp_path / "source", links="text files" if needs.WINDOWS else "symlinks")
    archive = build(source, tmp_path / "sdist", "build_sdist")
    subprocess.run(
        [sys.executable, "-m", "tarfile", "-e", str(archive), str(tmp_path / "unpacked")],
        check=True,
        timeout=60,
    )
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build(unpacked, tmp_path / "again", "build_wheel")
    assert names(again) == names(build(source, tmp_path / "first", "build_wheel"))


# --- the allocator shim -------------------------------------------------------------------------------

SHIM = "legion_shm/transport/native/born-prebuilt.so"
WITHOUT_COMPILER = {"PATH": "/nowhere", "CC": ""}

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)


def tags(wheel: Path) -> tuple[list[str], str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        about = Parser().parsestr(archive.read(name).decode())
    return about.get_all("Tag", []), str(about["Root-Is-Purelib"])


@needs_compiler
def test_a_wheel_that_is_built_beside_a_compiler_carries_the_shim_and_says_where_it_runs(
    tmp_path: Path,
) -> None:
    source = checkout(tmp_path / "source", links="text files")
    wheel = build(source, tmp_path / "dist", "build_wheel")
    assert SHIM in names(wheel)
    ((tag,), pure) = tags(wheel)
    python, abi, where = tag.split("-")
    assert (python, abi, pure) == ("py3", "none", "false")
    assert wheel.name.endswith(f"-{tag}.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(SHIM, tmp_path)
    library = (tmp_path / SHIM).read_bytes()
    newest = max(int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)", library))
    found = re.fullmatch(r"manylinux_2_(\d+)_(x86_64|aarch64)|linux_\w+", where)
    assert found is not None, where
    if found[1]:
        assert newest <= int(found[1]) == 17, "what is newer is linked by its first version"
        assert b"libdl.so.2" in library, "before glibc 2.34 dlsym was in there"
    code = "import ctypes; print(ctypes.CDLL(None).legion_born_version())"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        env={**os.environ, "LD_PRELOAD": str(tmp_path / SHIM)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout.strip(), done.stderr) == (str(SHIM_VERSION), "")
    again = build(source, tmp_path / "without", "build_wheel", **WITHOUT_COMPILER)
    assert SHIM not in names(again), "what an earlier build left is not taken along"


def test_without_a_compiler_it_is_a_wheel_for_any_platform(tmp_path: Path) -> None:
    source = checkout(tmp_path / "source", links="text files")
    wheel = build(source, tmp_path / "dist", "build_wheel", **WITHOUT_COMPILER)
    assert not [name for name in names(wheel) if name.endswith(".so")]
    assert "legion_shm/transport/native/born.c" in names(wheel)
    assert tags(wheel) == (["py3-none-any"], "true")


@needs.posix
def test_an_editable_install_compiles_nothing(tmp_path: Path) -> None:
    source = checkout(tmp_path / "source", links="text files")
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n: > {tmp_path}/asked\nexit 1\n")
    compiler.chmod(0o755)
    wheel = build(source, tmp_path / "dist", "build_editable", CC=str(compiler))
    assert tags(wheel)[0] == ["py3-none-any"]
    assert not (tmp_path / "asked").exists()
