"""A small HTTP/1.1 server for clients that nobody vouches for: GET and HEAD, and one request a connection.

The control socket and the HTTP port are made of it; it loads nothing that a daemon's start would not. Whoever connects
is let in. Where there are too many, the connection gives way whose client has been idle or slow for the longest: an
honest one sends its request and takes its answer within milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

from migproxy.fds import OUT_OF_RESOURCES, reset_on_close
from migproxy.sockets import accept, ready

Refusal = Literal["malformed", "tls", "timeout", "displaced", "error"]
"""Why a connection ends without what it asked for: what came is no request; its TLS failed; its request did not come,
or its answer was not taken, in time; it gave way to a newer one; this daemon cannot answer."""

_MOST = 64  # connections: several Prometheus, probes and browsers ask at once; 64 slow ones cost 64 KiB each
_MOST_OF_ADDRESS = 16  # a browser opens six, a scraper one
_FEW = 4  # connections, while descriptors are short
_RESERVE = 128  # descriptors that migrations can still have then: sixteen connections
_HEAD_BYTES = 8192  # the usual limit of servers
_HEAD_SECONDS = 5.0  # for a handshake and the whole head
_ANSWER_SECONDS = 30.0  # for making the answer, and for the client to take it
_CLOSE_SECONDS = 1.0  # for the end of TLS, which not every client says
_PAUSE = 0.05  # seconds, until descriptors are free again
_CHUNK = 1 << 16  # bytes of an answer that may wait in this process for a slow client

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
_END = re.compile(rb"\r?\n\r?\n")
_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
_LINE = re.compile(rf"({_NAME}) (?:https?://[^/? ]*)?(/[^? ]*)(?:\?[^ ]*)? HTTP/1\.[0-9]")
_FIELD = re.compile(rf"({_NAME}):(.*)")
_TLS_HANDSHAKE = b"\x16"  # the first byte of a TLS client


class Malformed(ValueError):
    """What came is no HTTP request; says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a request.

    Attributes:
        method: Such as GET.
        path: Without its query.
        headers: By their names in lower case; of several with one name, joined by commas.
    """

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered.

    Attributes:
        status: HTTP's.
        headers: Besides Content-Type, Content-Length and Connection.
    """

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Awaitable[Answer]]


def parse(data: bytes) -> Request:
    """Reads a request's head.

    Args:
        data: It, with the empty line at its end; what follows is left alone.

    Raises:
        Malformed: It is none.
    """
    if data.startswith(_TLS_HANDSHAKE):
        raise Malformed("it is TLS, and this port speaks plain HTTP")
    first, *rest = _END.split(data, 1)[0].decode("latin-1").replace("\r\n", "\n").split("\n")
    line = _LINE.fullmatch(first)
    if line is None:
        raise Malformed(f"its first line is not METHOD /PATH HTTP/1.1: {first[:80]!r}")
    if not _END.search(data):
        raise Malformed(f"its head breaks off, or is longer than {_HEAD_BYTES} bytes")
    headers: dict[str, str] = {}
    for one in rest:
        pair = _FIELD.fullmatch(one)
        if pair is None:
            raise Malformed(f"it has a line that is no header: {one[:80]!r}")
        name, value = pair[1].lower(), pair[2].strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Request(line[1], line[2], headers)


@asynccontextmanager
async def serve(
    listener: socket.socket,
    routes: Mapping[str, Handler],
    refused: Callable[[Refusal, str, Exception], None],
    protection: ssl.SSLContext | None = None,
) -> AsyncIterator[None]:
    """Answers who connects to a socket while the context lasts.

    Args:
        listener: The socket, TCP or unix; stays the caller's.
        routes: Who answers which path.
        refused: Called with why a connection ended without its answer, its address, and the error.
        protection: For HTTPS, None for HTTP.
    """
    server = _Server(listener, routes, refused, protection)
    try:
        yield
    finally:
        await server.close()


@dataclass(slots=True, eq=False)
class _Client:
    """A connection.

    Attributes:
        still_since: When its client last brought it nearer to its end (`loop.time`); half a head does not.
        waits: The daemon makes its answer.
    """

    sock: socket.socket
    address: str
    still_since: float
    waits: bool = False


class _Server:
    """Owns the connections, and one descriptor that is free for the next when there is no other."""

    def __init__(
        self,
        listener: socket.socket,
        routes: Mapping[str, Handler],
        refused: Callable[[Refusal, str, Exception], None],
        protection: ssl.SSLContext | None,
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._routes = routes
        self._refused = refused
        self._protection = protection
        self._loop = asyncio.get_running_loop()
        self._clients: dict[asyncio.Task[None], _Client] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._few_from = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _RESERVE
        self._spare: int | None = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Lets nobody in any more, and ends who is there."""
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        tasks = [*self._clients, *self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._spare is not None:
            os.close(self._spare)

    async def _accept(self) -> None:
        while True:
            try:
                self._let_in(socket.socket(fileno=accept(self._listener)))
            except BlockingIOError:
                await ready(self._listener.fileno(), writing=False)
            except OSError as error:
                # Without descriptors, accept4(2) fails even where nobody asks.
                await ready(self._listener.fileno(), writing=False)
                await (self._make_room() if error.errno in OUT_OF_RESOURCES else asyncio.sleep(_PAUSE))
            else:
                await asyncio.sleep(0)  # those who are in go on first, so that no flood ends one that has asked

    def _let_in(self, sock: socket.socket) -> None:
        try:
            peer = sock.getpeername()
        except OSError:  # it has left already
            sock.close()
            return
        address = str(peer[0]).removeprefix("::ffff:") if peer else ""
        neighbours = [task for task, other in self._clients.items() if other.address == address]
        if len(neighbours) >= _MOST_OF_ADDRESS:
            self._displace(neighbours, f"its address has {_MOST_OF_ADDRESS} connections")
        most = _FEW if sock.fileno() >= self._few_from else _MOST  # the kernel gives the lowest that is free
        while len(self._clients) >= most:
            self._displace(self._clients, f"{most} connections are open")
        client = _Client(sock, address, self._loop.time())
        task = asyncio.create_task(self._serve(client))
        self._clients[task] = client
        task.add_done_callback(lambda _: self._left(task, sock))

    async def _make_room(self) -> None:
        """Returns when there may be a descriptor for the next client: the spare one, or that of another client."""
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        elif self._clients:
            await asyncio.wait([self._displace(self._clients, "no descriptors are left")])
        else:
            await asyncio.sleep(_PAUSE)

    def _displace(self, among: Collection[asyncio.Task[None]], why: str) -> asyncio.Task[None]:
        """Ends the connection whose client does nothing for the longest, and is not kept waiting by the daemon.

        Unless half of them wait: then nobody else would have the time to ask.
        """
        idle = [task for task in among if not self._clients[task].waits]
        candidates = idle if 2 * len(idle) >= len(among) else among
        task = min(candidates, key=lambda task: self._clients[task].still_since)
        client = self._clients.pop(task)
        self._ending.add(task)
        task.cancel()
        self._refused("displaced", client.address, ConnectionAbortedError(why))
        return task

    def _left(self, task: asyncio.Task[None], sock: socket.socket) -> None:
        sock.close()  # of a task that was cancelled before its first step
        self._clients.pop(task, None)
        self._ending.discard(task)
        if self._spare is None:
            with suppress(OSError):
                self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    async def _serve(self, client: _Client) -> None:
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(_HEAD_SECONDS) as deadline:
                reader, writer = await self._connect(client.sock)
                if data := await _read_head(reader):
                    deadline.reschedule(self._loop.time() + _ANSWER_SECONDS)
                    client.still_since, client.waits = self._loop.time(), True
                    parts = _parts(*await self._answer(data, client.address))
                    client.waits = False
                    for part in parts:
                        client.still_since = self._loop.time()
                        writer.write(part)
                        await writer.drain()
                    writer.close()
                    with suppress(OSError):  # of TLS that the client does not end
                        await writer.wait_closed()
        except TimeoutError as error:
            self._refused("timeout", client.address, error)
        except ssl.SSLError as error:
            self._refused("tls", client.address, error)
        except OSError:
            pass  # it has left
        finally:
            with suppress(OSError):
                reset_on_close(client.sock, yes=True)  # else the kernel would go on offering what was not taken
            if writer is not None:
                writer.transport.abort()

    async def _connect(self, sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader = asyncio.StreamReader(limit=_HEAD_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self._loop.connect_accepted_socket(  # with TLS, uvloop returns a protocol of its own
            lambda: protocol,
            sock,
            ssl=self._protection,
            ssl_shutdown_timeout=_CLOSE_SECONDS if self._protection else None,
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, self._loop)

    async def _answer(self, data: bytes, address: str) -> tuple[Answer, bool]:
        """Returns the answer, and whether its body is wanted."""
        try:
            request = parse(data)
        except Malformed as error:
            self._refused("malformed", address, error)
            return _plain(400), True
        wanted = request.method != "HEAD"
        handler = self._routes.get(request.path)
        if handler is None:
            return _plain(404), wanted
        if request.method not in ("GET", "HEAD"):
            return _plain(405, Allow="GET, HEAD"), wanted
        try:
            return await handler(request), wanted
        except Exception as error:  # noqa: BLE001 - whatever it is, it costs this request alone
            self._refused("error", address, error)
            return _plain(500), wanted


def json_answer(value: object) -> Answer:
    """Answers with JSON, without white space; it is not to be kept, for it is what is now."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return Answer(body, "application/json", headers={"Cache-Control": "no-store"})


def _plain(status: int, **headers: str) -> Answer:
    return Answer(f"{_REASONS[status]}\n".encode(), status=status, headers=headers)


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    """Returns what came until a head was whole, or could be none any more; nothing where nothing came."""
    data = b""
    while len(data) < _HEAD_BYTES and not _END.search(data) and not data.startswith(_TLS_HANDSHAKE):
        more = await reader.read(_HEAD_BYTES - len(data))
        if not more:
            break
        data += more
    return data


def _parts(answer: Answer, wanted: bool) -> Iterator[bytes]:
    """An answer as it is sent: its head, and its body in parts, if that is wanted."""
    headers = {
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        "Connection": "close",
        **answer.headers,
    }
    lines = (f"{name}: {value}\r\n" for name, value in headers.items())
    yield f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}\r\n{''.join(lines)}\r\n".encode("latin-1")
    for start in range(0, len(answer.body) if wanted else 0, _CHUNK):
        yield answer.body[start : start + _CHUNK]
