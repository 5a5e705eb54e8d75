"""HTTP for Prometheus, for probes and for people: /metrics, /healthz, /readyz, a status page, and its JSON."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from aiohttp import web

from migproxy.metrics import Exporter, render

Report = Mapping[str, Any]
Checks = Mapping[str, str | None]


class HTTPError(Exception):
    """The HTTP server cannot be started; says why, and what to do."""


@dataclass(frozen=True, slots=True)
class HTTPOptions:
    """Where HTTP is served, and how.

    Attributes:
        host: The address, "" for all of them.
        port: The port, 0 for the kernel's choice.
        certificate, key: PEM files for HTTPS, None for HTTP.
    """

    host: str
    port: int
    certificate: str | None = None
    key: str | None = None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@asynccontextmanager
async def serve(
    options: HTTPOptions,
    report: Callable[[], Report],
    checks: Callable[[], Checks],
    exporter: Exporter,
    hangs: Callable[[], Sequence[str]],
) -> AsyncIterator[str]:
    """Serves HTTP while the context lasts.

    Args:
        options: Where and how.
        report: `Node.report`; called for each request.
        checks: `Node.checks`; likewise.
        exporter: Of the metrics.
        hangs: What of this process hangs, so that it should be started anew; likewise.

    Returns:
        The URL that it is served at.

    Raises:
        HTTPError: The port is taken, the address is not this machine's, or the certificate cannot be used.
    """
    protection = _protection(options)
    runner = web.AppRunner(_application(report, checks, exporter, hangs), access_log=None)
    await runner.setup()
    try:
        sock = _listen(options)
        await web.SockSite(runner, sock, ssl_context=protection).start()
        port = sock.getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host or socket.gethostname()
        yield f"{'https' if protection else 'http'}://{host}:{port}/"
    finally:
        await runner.cleanup()


def _listen(options: HTTPOptions) -> socket.socket:
    dual = not options.host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, dualstack_ipv6=dual, backlog=64)
    except OSError as error:
        remedies = {
            errno.EADDRINUSE: f"another program listens there (ss -ltnp 'sport = :{options.port}'): end it, "
            "choose another port, or off",
            errno.EADDRNOTAVAIL: "it is not an address of this machine",
            errno.EACCES: "ports below 1024 need root (CAP_NET_BIND_SERVICE)",
        }
        remedy = remedies.get(error.errno or 0, "choose another")
        why = os.strerror(error.errno) if error.errno else str(error)
        raise HTTPError(f"--http-listen {options}: {why}: {remedy}") from error


def _protection(options: HTTPOptions) -> ssl.SSLContext | None:
    if options.certificate is None or options.key is None:
        return None
    try:
        return _Certificate(options.certificate, options.key).context
    except (OSError, ssl.SSLError) as error:
        raise HTTPError(
            f"--http-tls-cert {options.certificate}, --http-tls-key {options.key}: {error.strerror or error}: give a "
            "PEM certificate and its unencrypted key, readable by this user"
        ) from error


class _Certificate:
    """A certificate and its key in files that are replaced now and then.

    Attributes:
        context: To be listened with; each handshake uses the files as they are then.
    """

    def __init__(self, certificate: str, key: str) -> None:
        self._paths = certificate, key
        self._loaded, self.context = self._load()
        self._latest = self.context
        self.context.sni_callback = self._renew

    def _load(self) -> tuple[list[tuple[int, int, int]], ssl.SSLContext]:
        identities = [_identity(path) for path in self._paths]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self._paths)
        return identities, context

    def _renew(self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str, _context: ssl.SSLContext) -> None:
        try:
            if [_identity(path) for path in self._paths] != self._loaded:
                self._loaded, self._latest = self._load()
        except (OSError, ssl.SSLError):
            pass  # half-replaced: the pair that was good stays, and the next handshake tries again
        connection.context = self._latest


def _identity(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_mtime_ns


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
