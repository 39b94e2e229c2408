"""What pyproject.toml can't say: a wheel that is built beside a C compiler carries the allocator shim.

Without a compiler, and for an editable install, nothing is compiled: the wheel is one for any platform, and
the shim is compiled on first use where that is possible.
"""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("legion_shm", "transport", "native")


def born_build() -> ModuleType:
    """transport/born_build.py by itself: the package has dependencies that a build has not."""
    path = Path(__file__).resolve().parent / "transport" / "born_build.py"
    spec = importlib.util.spec_from_file_location("born_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithShim(build_py):
    """``platform_tag``: of the library that was built; empty where there is none."""

    platform_tag = ""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        builder = born_build()
        library = Path(self.build_lib, NATIVE, builder.PREBUILT_NAME)
        try:
            self.platform_tag = builder.build_for_wheel(library)
        except (OSError, subprocess.SubprocessError) as error:
            self.warn(f"the wheel carries no allocator shim: {error}")


class TaggedWheel(bdist_wheel):
    def run(self) -> None:
        self.run_command("build_py")  # what it could build decides what the wheel is
        if self._platform_tag():
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = self._platform_tag()
        return ("py3", "none", tag) if tag else super().get_tag()

    def _platform_tag(self) -> str:
        return self.get_finalized_command("build_py").platform_tag


setup(cmdclass={"build_py": BuildWithShim, "bdist_wheel": TaggedWheel})
