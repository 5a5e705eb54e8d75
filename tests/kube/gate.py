"""A reverse proxy before the API server, be it the double or a real one, that makes what can go wrong go wrong."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

RETRY_AFTER = "1"
"""Seconds that the gate asks for with a 429."""

_HOP_BY_HOP = {"transfer-encoding", "content-length", "content-encoding", "connection", "host"}


@dataclass(frozen=True, slots=True)
class Passed:
    """A request that was answered by the server, with what it said."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    status: int


class Gate:
    """Passes requests on, and lets its user interfere.

    Attributes:
        passed: Every request that is no watch and was answered by the server, in order.
        watches: How many watches have been accepted.
        lists: How many lists (first pages) have been answered.
        answering: While it is not set, what the server answers to requests that are no watches is held back.
        slow: Watches by a selector that has this in it tell everything a moment late.
        refuse: Called with each request; an HTTP status to answer instead of passing it on, or None.
        hold: Called with each request; whether not to answer it before `released`.
        held: How many have been held so.
        released: Set to pass on what is held; it never is otherwise.
    """

    def __init__(self, upstream: str, tls: ssl.SSLContext | bool = False, host: str = "127.0.0.1") -> None:
        self.passed: list[Passed] = []
        self.watches = 0
        self.lists = 0
        self.slow = ""
        self.answering = asyncio.Event()
        self.answering.set()
        self.refuse: Callable[[web.Request], int | None] = lambda request: None
        self.hold: Callable[[web.Request], bool] = lambda request: False
        self.held = 0
        self.released = asyncio.Event()
        self.url = ""
        self._upstream = upstream
        self._host = host
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._streams: dict[asyncio.Task[Any], web.StreamResponse] = {}
        self._stalled: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Takes connections, always on the same port."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls, limit=0), read_bufsize=2**21
        )
        application = web.Application(client_max_size=1 << 26)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, reuse_address=True)
        await site.start()
        self._port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = f"http://{self._host}:{self._port}"

    async def close(self) -> None:
        """Refuses connections and breaks those that are open: the API server is gone."""
        self.cut()
        if self._runner:
            await self._runner.cleanup()
        if self._session:
            await self._session.close()
        self._runner = self._session = None

    def cut(self) -> None:
        """Breaks every watch in the middle of whatever it was telling."""
        for task, response in list(self._streams.items()):
            if response._req is not None and response._req.transport is not None:
                response._req.transport.abort()
            task.cancel()

    def stall(self) -> None:
        """Makes every watch that is open silent for ever, without ending it."""
        self._stalled |= self._streams.keys()

    async def expire(self) -> None:
        """Ends every watch with the event that says 410."""
        event = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}}
        for task, response in list(self._streams.items()):
            with suppress(ConnectionResetError):
                await response.write(json.dumps(event).encode() + b"\n")
            task.cancel()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        assert self._session
        if (status := self.refuse(request)) is not None:
            reason = {410: "Expired", 429: "TooManyRequests"}.get(status, "InternalError")
            told = {"kind": "Status", "code": status, "reason": reason, "message": "the gate refuses"}
            headers = {"Retry-After": RETRY_AFTER} if status == 429 else {}
            return web.json_response(told, status=status, headers=headers)
        if self.hold(request):
            self.held += 1
            await self.released.wait()
        passed = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        body = await request.read()
        url = self._upstream + request.path_qs
        timeout = aiohttp.ClientTimeout(total=None)
        try:
            async with self._session.request(
                request.method, url, data=body or None, headers=passed, timeout=timeout
            ) as answer:
                watch = "watch" in request.query
                if watch and answer.status == 200:
                    return await self._relay(request, answer)
                content = await answer.read()
                sent = json.loads(body) if body else None
                self.passed.append(Passed(request.method, request.path, dict(request.query), sent, answer.status))
                if request.method == "GET" and "limit" in request.query and "continue" not in request.query:
                    self.lists += 1
                await self.answering.wait()
                return web.Response(body=content, status=answer.status, content_type="application/json")
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=str(error))

    async def _relay(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        task = asyncio.current_task()
        assert task
        self._streams[task] = response
        self.watches += 1
        try:
            async for line in answer.content:
                if task in self._stalled:
                    await asyncio.Event().wait()
                if self.slow and self.slow in request.query.get("labelSelector", ""):
                    await asyncio.sleep(0.1)
                await response.write(line)
        finally:
            self._stalled.discard(task)
            del self._streams[task]
        return response


@asynccontextmanager
async def gate(upstream: str, tls: ssl.SSLContext | bool = False, host: str = "127.0.0.1") -> AsyncIterator[Gate]:
    """A gate that is open when the context begins."""
    made = Gate(upstream, tls, host)
    await made.open()
    try:
        yield made
    finally:
        await made.close()
