"""HTTP for Prometheus, for probes and for people: where it is served, its certificate, and who is refused."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from ipaddress import ip_address

import structlog

from migproxy import httpd, pages
from migproxy.limit import Limit
from migproxy.measure import Measures
from migproxy.sockets import sockaddr

log = structlog.get_logger(__name__)

_BACKLOG = 4096  # what net.core.somaxconn allows: under a second of work. Who finds it full waits a second


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
    report: Callable[[], pages.Report],
    checks: Callable[[], pages.Checks],
    measures: Measures,
    hangs: Callable[[], Sequence[str]],
) -> AsyncIterator[str]:
    """Serves HTTP while the context lasts.

    Args:
        options: Where and how.
        report: `Node.report`; called for each request.
        checks: `Node.checks`; likewise.
        measures: The node's instruments.
        hangs: What of this process hangs, so that it should be started anew; likewise.

    Returns:
        The URL that it is served at.

    Raises:
        HTTPError: The port is taken, the address is not this machine's, or the certificate cannot be used.
    """
    protection = _protection(options)
    routes = pages.routes(report, checks, measures, hangs)
    with _listen(options) as listener, closing(_Refusals(measures)) as refusals:
        async with httpd.serve(listener, routes, refusals.note, protection):
            port = listener.getsockname()[1]
            host = f"[{options.host}]" if ":" in options.host else options.host or socket.gethostname()
            yield f"{'https' if protection else 'http'}://{host}:{port}/"


class _Refusals:
    """Counts who was refused, and writes a line of the first few."""

    def __init__(self, measures: Measures) -> None:
        self._count = measures.http_refused
        self._lines = Limit(self._log_more)
        self.close = self._lines.close

    def note(self, reason: httpd.Refusal, peer: str, error: Exception) -> None:
        self._count.labels(reason).inc()
        if reason == "timeout" or not self._lines.admits(reason):  # browsers connect in advance, and ask nothing
            return
        if reason == "error":
            log.error("HTTP request cannot be answered", peer=peer, exc_info=error)
        else:
            log.warning("HTTP connection refused", reason=reason, peer=peer, error=str(error))

    def _log_more(self, reason: httpd.Refusal, count: int) -> None:
        log.warning("more HTTP connections refused", reason=reason, count=count)


def _listen(options: HTTPOptions) -> socket.socket:
    dual = not options.host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in options.host else socket.AF_INET
    try:
        where = sockaddr(ip_address(options.host), options.port) if options.host else ("", options.port)
        return socket.create_server(where, family=family, dualstack_ipv6=dual, backlog=_BACKLOG)
    except OSError as error:
        remedies = {
            errno.EADDRINUSE: f"another program listens there (ss -ltnp 'sport = :{options.port}'): end it, "
            "choose another port, or off",
            errno.EADDRNOTAVAIL: "it is not an address of this machine",
            errno.ENODEV: "there is no interface of the name after the %",
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
    if not stat.S_ISREG(status.st_mode):  # OpenSSL would wait for what a FIFO says
        raise OSError(errno.EINVAL, "one is no regular file", path)
    return status.st_dev, status.st_ino, status.st_mtime_ns
