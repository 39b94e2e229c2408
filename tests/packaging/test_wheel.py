"""The distribution: what a wheel holds, and what can be imported once it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

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


def build(source: Path, out: Path, kind: str) -> Path:
    """Build offline with the setuptools of this environment; ``kind`` is a hook of PEP 517 or 660."""
    out.mkdir()
    code = f"import sys, setuptools.build_meta as b; print(b.{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, timeout=100
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
    assert "legion = legion_shm.cli:main" in scripts.splitlines()
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
