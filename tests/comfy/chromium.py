"""A headless Chromium and its one page, spoken to over its debugging protocol.

Owns the process and the connection. It reaches what it is sent to, and opens nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp

from legion_shm.clock import monotonic_s

__all__ = ["Page", "find_chromium", "opened"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_START_WAIT_S = 30.0
_ANSWER_WAIT_S = 60.0
_POLL_S = 0.05


def find_chromium() -> str | None:
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Page:
    """The page. `said` are the lines of its console that are errors."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse[bool]) -> None:
        self._socket = socket
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.said: list[str] = []

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        number = len(self._answers) + 1
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(self._answers[number], _ANSWER_WAIT_S)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        answer = await self.send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, script: str, within_s: float = 30.0) -> Any:
        """Wait until an expression is true, and give its value."""
        deadline_s = monotonic_s() + within_s
        while not (value := await self.run(script)):
            if monotonic_s() > deadline_s:
                raise AssertionError(f"not so within {within_s:g} s: {script}\n" + "\n".join(self.said))
            await asyncio.sleep(_POLL_S)
        return value

    async def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            await self.send(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, buttons=1
            )

    async def click_on(self, element: str, within_s: float = 30.0) -> None:
        """Click in the middle of the element that an expression gives, once it is shown and at rest."""
        script = f"""(() => {{
            const found = {element};
            found?.scrollIntoView({{block: "nearest"}});
            const box = found?.getBoundingClientRect();
            return box && box.width ? [box.x + box.width / 2, box.y + box.height / 2] : null;
        }})()"""
        before, place = None, await self.until(script, within_s)
        while place != before:
            await asyncio.sleep(2 * _POLL_S)
            before, place = place, await self.until(script, within_s)
        await self.click(*place)

    async def picture(self, path: Path) -> None:
        answer = await self.send("Page.captureScreenshot", format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    async def read(self) -> None:
        async for message in self._socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            data = message.json()
            if "id" in data:
                future = self._answers[data["id"]]
                if not future.done():
                    future.set_result(data)
            elif data["method"] == "Runtime.exceptionThrown":
                details = data["params"]["exceptionDetails"]
                self.said.append(str(details.get("exception", {}).get("description", details["text"])))
            elif data["method"] == "Runtime.consoleAPICalled" and data["params"]["type"] == "error":
                values = [item.get("value", item.get("description")) for item in data["params"]["args"]]
                self.said.append(" ".join(map(str, values)))


@contextlib.asynccontextmanager
async def opened(url: str, *, width: int = 1600, height: int = 1000) -> AsyncGenerator[Page, None]:
    """Start a Chromium with a profile of its own, and open a page."""
    program = find_chromium()
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                program,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(profile) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    targets = await answer.json()
                target = next(item for item in targets if item["type"] == "page")
                address = target["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=1 << 28) as socket:
                    page = Page(socket)
                    reader = asyncio.create_task(page.read())
                    await page.send("Page.enable")
                    await page.send("Runtime.enable")
                    await page.send("Page.navigate", url=url)
                    yield page
                    with contextlib.suppress(AssertionError, TimeoutError, ConnectionError):
                        await asyncio.wait_for(page.send("Browser.close"), 5)
                    reader.cancel()
        finally:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


async def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline_s = monotonic_s() + _START_WAIT_S
    while monotonic_s() < deadline_s and process.poll() is None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int(file.read_text().splitlines()[0])
        await asyncio.sleep(_POLL_S)
    raise AssertionError(f"Chromium did not start (exit code {process.poll()})")
