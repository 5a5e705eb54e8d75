"""Debian's Chromium, headless, driven over the DevTools protocol."""

import asyncio
import base64
import json
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from demo.lab import background, end, until

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--lang=en",
]


class Page:
    """One tab.

    Attributes:
        requests: URLs that it has asked for.
        complaints: What its console and its script reported as errors or warnings.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._socket = socket
        self._answers: dict[int, asyncio.Future[Any]] = {}

    async def call(self, method: str, **parameters: Any) -> Any:
        """Calls a DevTools method, and returns its result."""
        number = len(self._answers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        return await asyncio.wait_for(answer, 30)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def eventually(self, expression: str) -> Any:
        """Waits until an expression is true, and returns its value."""
        async with asyncio.timeout(60):
            while not (value := await self.evaluate(expression)):
                await asyncio.sleep(0.1)
        return value

    async def look(self, *, width: int, height: int, dark: bool = False, scale: float = 1) -> None:
        """Sets the window's size in pixels, and the colours that the user prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[feature])

    async def screenshot(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])

    async def _listen(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                answer = self._answers[event["id"]]
                if "error" in event:
                    answer.set_exception(RuntimeError(str(event["error"])))
                else:
                    answer.set_result(event["result"])
            elif event["method"] == "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
            elif event["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(event["params"]["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning"):
                self.complaints.append(json.dumps(event["params"]["args"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] in ("error", "warning"):
                self.complaints.append(event["params"]["entry"]["text"])


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Page]:
    """A page in a browser of its own, listened to from before its first request on."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # its children outlive it for a moment
        process = await asyncio.create_subprocess_exec(
            *("chromium", *_FLAGS, f"--user-data-dir={profile}", "about:blank"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            told = Path(profile, "DevToolsActivePort")
            await until(lambda: told.exists() and len(told.read_text().splitlines()) == 2, "Chromium", 60)
            port = told.read_text().splitlines()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    (tab,) = (one for one in await answer.json() if one["type"] == "page")
                async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    async with background(page._listen()):
                        for domain in ("Page", "Runtime", "Network", "Log"):
                            await page.call(f"{domain}.enable")
                        await page.call("Page.navigate", url=url)
                        yield page
        finally:
            await end(process, signal.SIGTERM)
