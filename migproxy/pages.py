"""What is answered over HTTP: metrics, health and readiness, a status page, and its JSON."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from aiohttp import web

from migproxy.measure import Measures
from migproxy.metrics import Exporter, render

Report = Mapping[str, Any]
Checks = Mapping[str, str | None]


@asynccontextmanager
async def answer(
    listener: socket.socket,
    protection: ssl.SSLContext | None,
    report: Callable[[], Report],
    checks: Callable[[], Checks],
    measures: Measures,
    hangs: Callable[[], Sequence[str]],
) -> AsyncIterator[None]:
    """Answers who connects to a socket while the context lasts.

    Args:
        listener: The socket.
        protection: For HTTPS, None for HTTP.
        report, checks, measures, hangs: See `web.serve`.
    """
    runner = web.AppRunner(_application(report, checks, Exporter(report, measures), hangs), access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, listener, ssl_context=protection).start()
        yield
    finally:
        await runner.cleanup()


def _application(
    report: Callable[[], Report],
    checks: Callable[[], Checks],
    exporter: Exporter,
    hangs: Callable[[], Sequence[str]],
) -> web.Application:
    page = files("migproxy").joinpath("page.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _policy(page), "X-Content-Type-Options": "nosniff"}

    async def status_page(_: web.Request) -> web.Response:
        return web.Response(text=page, content_type="text/html", headers=headers)

    async def status(_: web.Request) -> web.Response:
        return web.json_response(report(), headers={"Cache-Control": "no-store"})

    async def metrics(request: web.Request) -> web.Response:
        # Formatting takes most of the time, and needs nothing of the event loop's.
        body, content_type = await asyncio.to_thread(render, exporter.scrape(), request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def alive(_: web.Request) -> web.Response:
        problems = hangs()
        return web.Response(text="\n".join(problems or ["ok"]) + "\n", status=503 if problems else 200)

    async def ready(_: web.Request) -> web.Response:
        now = checks()
        lines = [f"[{'-' if reason else '+'}] {name}: {reason or 'ok'}" for name, reason in now.items()]
        return web.Response(text="\n".join(lines) + "\n", status=503 if any(now.values()) else 200)

    app = web.Application()
    routes: dict[str, Any] = {
        "/": status_page,
        "/api/status": status,
        "/metrics": metrics,
        "/healthz": alive,
        "/readyz": ready,
    }
    for path, handler in routes.items():
        app.router.add_get(path, handler)
    return app


def _policy(page: str) -> str:
    """The page may run its own script, use its own style, and talk to this daemon: nothing leaves the host."""

    def allow(tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in contents]
        return " ".join(f"'sha256-{one}'" for one in hashes)

    return (
        f"default-src 'none'; script-src {allow('script')}; style-src {allow('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
