"""The real page of ComfyUI in a real Chromium: templates, a queued workflow, progress, the result, help.

LEGION_BROWSER_PICTURES names a folder for screenshots, to be looked at.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("aiohttp")

from tests.comfy.chromium import Page, find_chromium, opened
from tests.nodes.comfy_server import COMFYUI, PYTHON, REPO, ComfyServer

FRONT_END = os.environ.get("COMFYUI_FRONTEND", "")
PICTURES = os.environ.get("LEGION_BROWSER_PICTURES", "")
EXAMPLE = "Run a workflow in a worker"


def _lacking() -> str:
    if COMFYUI is None:
        return "COMFYUI_PATH says no ComfyUI"
    if find_chromium() is None:
        return "no Chromium is installed"
    tried = subprocess.run(
        [PYTHON, "-c", "import comfyui_frontend_package"],
        env={**os.environ, "PYTHONPATH": FRONT_END},
        capture_output=True,
        timeout=60,
    )
    if tried.returncode:
        return "COMFYUI_PYTHON has no comfyui-frontend-package, nor has the folder COMFYUI_FRONTEND"
    return ""


@pytest.fixture(scope="module")
def comfy(
    tmp_path_factory: pytest.TempPathFactory, nothing_left_by_the_module: None
) -> Iterator[ComfyServer]:
    lacking = _lacking()
    if lacking:
        pytest.skip(lacking)
    base = tmp_path_factory.mktemp("comfyui")
    (base / "input").mkdir()
    with Image.open(REPO / "legion_shm" / "demo_data" / "coffee.jpg") as picture:
        picture.save(base / "input" / "example.png")
    server = ComfyServer(
        Path(COMFYUI or "."),
        PYTHON,
        base,
        front_end=True,
        environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": FRONT_END},
    )
    yield server
    server.stop()


pytestmark = [pytest.mark.browser, pytest.mark.comfyui, pytest.mark.timeout(300)]


@asynccontextmanager
async def page_of(comfy: ComfyServer) -> AsyncGenerator[Page, None]:
    async with opened(f"http://127.0.0.1:{comfy.port}/") as page:
        await page.until("!!(window.app?.extensionManager?.command && window.app.canvas?.graph)", 90)
        yield page
        assert not [line for line in page.said if "legion" in line.lower()]


def in_page(comfy: ComfyServer, steps: Callable[[Page], Awaitable[None]]) -> None:
    async def run() -> None:
        async with page_of(comfy) as page:
            try:
                await steps(page)
            except BaseException:
                await look(page, "failed")
                raise

    asyncio.run(run())


async def look(page: Page, name: str) -> None:
    if PICTURES:
        await page.picture(Path(PICTURES) / f"{name}.png")


def with_text(text: str, within: str = "[role=dialog]") -> str:
    """The element that shows nothing but a text."""
    return (
        f"[...document.querySelectorAll('{within} *')]"
        f".find(e => !e.childElementCount && e.textContent.trim() == {json.dumps(text)})"
    )


async def load_template(page: Page, name: str) -> None:
    await page.run("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    await page.click_on(with_text("legion-shm"))
    await page.until(f"!!({with_text(name)})")
    await look(page, "templates")
    await page.click_on(with_text(name))
    await page.until(f"!!({MASTER})")
    await page.until(f"!({with_text(name)})?.getBoundingClientRect().width")


MASTER = "app.canvas.graph?.nodes.find(n => n.type == 'LegionMaster3')"
RESULT = "app.canvas.graph?.nodes.find(n => n.type == 'PreviewImage')"
RUN = "document.querySelector('[data-testid=queue-button]')"


def test_a_template_is_opened_and_run_and_its_result_appears(comfy: ComfyServer) -> None:
    async def steps(page: Page) -> None:
        await load_template(page, EXAMPLE)
        await page.click_on(RUN)
        await page.until(f"!!({RESULT}).imgs?.[0]?.naturalWidth", 60)
        assert await page.run(f"({RESULT}).imgs[0].naturalWidth") == 600
        await look(page, "result")

    in_page(comfy, steps)


def test_progress_and_preview_of_the_worker_show_on_the_master_while_it_runs(
    comfy: ComfyServer, tmp_path: Path
) -> None:
    slow = {
        "in": {"class_type": "LegionImporter", "inputs": {}},
        "slow": {
            "class_type": "ProbeSlow",
            "inputs": {"image": ["in", 0], "steps": 150, "log": str(tmp_path / "log")},
        },
        "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["slow", 0]}},
    }

    async def steps(page: Page) -> None:
        await load_template(page, EXAMPLE)
        text = f"({MASTER}).widgets.find(w => w.name == 'workflow_text')"
        await page.run(f"{text}.value = {json.dumps(json.dumps(slow))}")
        await page.click_on(RUN)
        await page.until(f"({MASTER}).progress > 0.55", 60)
        first = await page.run(f"({MASTER}).progress")
        await page.until(f"({MASTER}).imgs?.length > 0", 5)
        await look(page, "progress")
        assert await page.until(f"({MASTER}).progress > {first}", 10)
        await page.until(f"!!({RESULT}).imgs?.[0]?.naturalWidth", 60)
        await look(page, "after")

    in_page(comfy, steps)


def test_an_error_of_the_worker_is_shown(comfy: ComfyServer) -> None:
    wrong = {"in": {"class_type": "LegionImporter", "inputs": {}}}

    async def steps(page: Page) -> None:
        await load_template(page, EXAMPLE)
        text = f"({MASTER}).widgets.find(w => w.name == 'workflow_text')"
        await page.run(f"{text}.value = {json.dumps(json.dumps(wrong))}")
        await page.click_on(RUN)
        await page.click_on(with_text("View details", "body"), 60)
        await page.until("document.body.innerText.includes('no LegionExporter')")
        await look(page, "error")

    in_page(comfy, steps)


def test_a_nodes_help_page_opens_from_the_page(comfy: ComfyServer) -> None:
    async def steps(page: Page) -> None:
        await load_template(page, EXAMPLE)
        await page.run(f"app.canvas.selectNode({MASTER})")
        await page.click_on("document.querySelector('[data-testid=info-button]')")
        await page.until("document.body.innerText.includes('A worker that crashes fails this node')")
        await look(page, "help")

    in_page(comfy, steps)
