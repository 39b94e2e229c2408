"""What a zygote loads where there is a GPU, shown without one: this ComfyUI's own files, on no device."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from tests.comfy.conftest import REPOSITORY, RealComfyUI

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(180)]

SCRIPT = """
import json, os, sys
from pathlib import Path
from legion_shm.supervisor import comfy_preload

root, base, result = map(Path, sys.argv[1:])
comfy_preload.accelerator_found = lambda environment: True
begun = comfy_preload.preload_comfyui(root, ["--disable-all-custom-nodes", f"--base-directory={base}"])
names = sorted(name for name in sys.modules if name.partition(".")[0] in ("comfy_aimdo", "torch"))
with open(result, "w") as told:
    json.dump([begun if isinstance(begun, str) else "", names, "aiohttp" in sys.modules], told)
"""


def test_where_memory_is_set_up_before_torch_neither_is_loaded_before_the_fork(
    comfyui: RealComfyUI, tmp_path: Any
) -> None:
    script, told = tmp_path / "preload.py", tmp_path / "told.json"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [str(comfyui.python), str(script), str(comfyui.path), str(comfyui.base), str(told)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reason, names, others = json.loads(told.read_text())
    assert reason == ""
    assert others, "ComfyUI's libraries are loaded"
    if "comfy_aimdo" in (comfyui.path / "main.py").read_text(encoding="utf-8"):
        assert set(names) <= {"comfy_aimdo", "comfy_aimdo.control"}
    else:
        assert "torch" in names
