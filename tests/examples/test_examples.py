"""Each example runs as a user would run it, and says what it should."""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from legion_shm import WorkerSpec
from legion_shm.supervisor.spawn import preload_for

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "examples"


def born_in_arenas() -> bool:
    return bool(preload_for(WorkerSpec(engine="graph"), "memfd"))


def run(name: str, *, stdin: str | None = None) -> str:
    command = [sys.executable, "-i"] if stdin is not None else [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(REPO), "PYTHONWARNINGS": "error::ResourceWarning"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plain_script_halves_an_image_with_one_copy_each_way() -> None:
    assert "(1, 512, 768, 3) -> (1, 256, 384, 3) with 2 copies" in run("plain_script.py")


def test_several_workers_answer_five_jobs_in_order() -> None:
    lines = run("several_workers.py").splitlines()
    assert len(lines) == 5
    assert all("8 node events, mean 0." in line for line in lines)


def test_own_node_classes_run_and_report_their_errors() -> None:
    output = run("own_nodes.py")
    assert "node 2: 4 of 4" in output
    assert "mean 0.725" in output
    assert "node 2 (Vignette)" in output


def test_a_class_of_ones_own_crosses_with_a_codec_and_says_what_it_needs_without() -> None:
    lines = run("own_codec.py").splitlines()
    assert lines == [
        "Curve of 3 points, reversed: [1.0, 0.5, 0.0]",
        "input_1['grid']: my_curves.Grid has no codec",
    ]


def test_the_notebook_session_runs_cell_by_cell_in_an_interactive_interpreter() -> None:
    source = (EXAMPLES / "notebook_session.py").read_text(encoding="utf-8")
    cells = [cell.partition("\n")[2] for cell in source.split("# %%")[1:]]
    typed = "\n".join(f"exec({cell.replace('from __future__ import annotations', '')!r})" for cell in cells)
    output = run("notebook_session.py", stdin=typed + "\n")
    shared = 0 if hasattr(os, "memfd_create") else 1  # what lies in a portable segment is copied once
    copies = re.search(rf"\[\('a', {shared}\), \('b', {shared}\), \('mixed', ([01])\)\]", output)
    assert copies is not None, output
    assert (copies[1] == "0") == born_in_arenas(), "what the second job makes is born in shared memory"
    assert "was cancelled" in output or "it was faster than we were" in output
    assert re.search(r"still readable: tensor\(0\.8125\)", output)


def test_the_web_service_inverts_a_picture_per_request(monkeypatch: pytest.MonkeyPatch) -> None:
    test_utils = pytest.importorskip("aiohttp.test_utils", reason="the extra [web] is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import web_service  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]

    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (255, 0, 51)).save(buffer, "PNG")

    async def ask() -> tuple[list[bytes], int, str]:
        async with test_utils.TestClient(test_utils.TestServer(web_service.make_app())) as client:
            answers = await asyncio.gather(
                *(client.post("/invert", data=buffer.getvalue()) for _ in range(4))
            )
            bodies = [await answer.read() for answer in answers]
            refused = await client.post("/invert", data=b"not a picture")
            return bodies, refused.status, await refused.text()

    bodies, status, said = asyncio.run(ask())
    assert status == 415
    assert said == "the body is no image that Pillow can read; send the bytes of a PNG or JPEG file\n"
    for body in bodies:
        picture = np.asarray(Image.open(io.BytesIO(body)))
        assert picture.shape == (30, 40, 3)
        assert (picture == (0, 255, 204)).all()
