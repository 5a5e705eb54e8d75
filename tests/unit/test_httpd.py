"""The HTTP server on loopback, with clients that do what strangers do; what an honest one gets beside them."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migproxy import httpd
from migproxy.httpd import Answer, Malformed, Request, parse
from tests.clock import Clock, eventually

pytestmark = pytest.mark.tier("gate")

GET = b"GET /healthz HTTP/1.1\r\nHost: node01\r\n\r\n"
LARGE = b"x" * (16 << 20)  # more than both ends' socket buffers hold


class Served:
    """A server with the paths /healthz, /large and /slow.

    Attributes:
        refused: Reason and error of each connection that was refused.
        made: /slow is answered once it is set.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.refused: list[tuple[str, str]] = []
        self.made = asyncio.Event()

    async def connect(self, source: str = "127.0.0.1", sock: socket.socket | None = None) -> socket.socket:
        sock = sock or socket.socket()
        sock.setblocking(False)
        sock.bind((source, 0))
        await asyncio.get_running_loop().sock_connect(sock, self.address)
        return sock

    async def ask(self, request: bytes = GET, sock: socket.socket | None = None) -> bytes:
        """All that is answered."""
        async with asyncio.timeout(60):
            with await self.connect(sock=sock) as connected:
                await asyncio.get_running_loop().sock_sendall(connected, request)
                return await rest(connected)

    def reasons(self) -> list[str]:
        return [reason for reason, _ in self.refused]


@asynccontextmanager
async def served() -> AsyncIterator[Served]:
    async def healthy(_: Request) -> Answer:
        return Answer(b"ok\n")

    async def large(_: Request) -> Answer:
        return Answer(LARGE)

    async def slow(_: Request) -> Answer:
        await server.made.wait()
        return Answer(b"made\n")

    async def broken(_: Request) -> Answer:
        raise ValueError("a defect")

    routes = {"/healthz": healthy, "/large": large, "/slow": slow, "/broken": broken}
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        server = Served(listener.getsockname())
        async with httpd.serve(listener, routes, lambda reason, _, error: server.refused.append((reason, str(error)))):
            yield server


async def rest(sock: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    with suppress(ConnectionResetError):
        while more := await asyncio.get_running_loop().sock_recv(sock, 1 << 20):
            found += more
    return found


def is_open(sock: socket.socket) -> bool:
    """Whether the server has neither closed nor reset a connection on which it sends nothing."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    return False


def open_of(socks: Sequence[socket.socket]) -> int:
    return sum(map(is_open, socks))


@pytest.mark.parametrize(
    ("head", "request_"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", Request("GET", "/", {})),
        (b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n", Request("HEAD", "/metrics", {})),
        (b"GET http://node01:9470/readyz HTTP/1.1\r\n\r\n", Request("GET", "/readyz", {})),
        (b"GET / HTTP/1.1\nA-B: c\n\nrest", Request("GET", "/", {"a-b": "c"})),
        (b"GET / HTTP/1.1\r\nAccept:  a \r\naccept: b\r\n\r\n", Request("GET", "/", {"accept": "a, b"})),
    ],
)
def test_requests(head: bytes, request_: Request) -> None:
    assert parse(head) == request_


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "it is TLS, and this port speaks plain HTTP"),
        (b"GET / HTTP/9.9\r\n\r\n", r"first line is not METHOD /PATH HTTP/1.1: 'GET / HTTP/9.9'"),
        (b"GET /\r\n\r\n", "first line"),
        (b"SSH-2.0-x\r\n\r\n", "first line"),
        (b"GET / HTTP/1.1\r\nno header\r\n\r\n", "no header: 'no header'"),
        (b"GET / HTTP/1.1\r\nA : b\r\n\r\n", "no header"),
        (b"GET / HTTP/1.1\r\nA: b\r\n", "breaks off, or is longer than 8192 bytes"),
    ],
)
def test_what_is_no_request_is_told_with_what_is_wrong(data: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        parse(data)


def test_white_space_in_a_header_costs_no_more_than_other_text() -> None:
    """It would take ten minutes if its cost grew with the square."""
    white = " " * 400_000
    assert parse(f"GET / HTTP/1.1\r\nA: x{white}y {white}\r\n\r\n".encode()).headers["a"] == f"x{white}y"


@given(st.binary() | st.from_regex(rb"GET /.* HTTP/1\.1\r\n(.*\r\n)*\r\n.*"))
def test_whatever_comes_is_a_request_or_malformed(data: bytes) -> None:
    with suppress(Malformed):
        assert parse(data).path.startswith("/")


async def test_an_answer_says_its_length_and_closes() -> None:
    async with served() as server:
        headers = b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
        assert await server.ask() == b"HTTP/1.1 200 OK\r\n" + headers + b"ok\n"
        assert await server.ask(GET.replace(b"GET", b"HEAD")) == b"HTTP/1.1 200 OK\r\n" + headers
        assert (await server.ask(GET * 100)).count(b"HTTP/1.1") == 1, "one request a connection"
        assert (await server.ask(GET.replace(b"healthz", b"large"))).endswith(LARGE)
        assert server.refused == []


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /other HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /healthz HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n", b"405 Method Not Allowed\r\n"),
        (b"nonsense\r\n\r\n", b"400 Bad Request"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 8192, b"400 Bad Request"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 8192 + b"\r\n\r\n", b"400 Bad Request"),
        (b"GET /broken HTTP/1.1\r\n\r\n", b"500 Internal Server Error"),
    ],
)
async def test_what_cannot_be_answered_has_its_status(request_: bytes, status: bytes) -> None:
    async with served() as server:
        assert (await server.ask(request_)).startswith(b"HTTP/1.1 " + status)
        assert (await server.ask()).endswith(b"ok\n")


async def test_a_defect_of_an_answer_and_what_is_no_request_are_told_once() -> None:
    async with served() as server:
        await server.ask(b"GET /broken HTTP/1.1\r\n\r\n")
        await server.ask(b"\x16\x03\x01")  # a client that speaks TLS waits for our hello: answered at once
        assert server.refused == [("error", "a defect"), ("malformed", "it is TLS, and this port speaks plain HTTP")]
        with await server.connect():
            pass  # a port scan, or a probe that only connects
        await server.ask()
        assert len(server.refused) == 2


@pytest.mark.simulated_time
@pytest.mark.parametrize("sent", [b"", b"GET / HTT", GET[:-2]])
async def test_a_request_has_five_seconds_to_come(sent: bytes, clock: Clock) -> None:
    async with served() as server:
        with await server.connect() as sock:
            await asyncio.get_running_loop().sock_sendall(sock, sent)
            assert await rest(sock) == b""
        assert clock() == 5
        assert server.reasons() == ["timeout"]


@pytest.mark.simulated_time
async def test_a_request_that_trickles_in_has_five_seconds_all_the_same(clock: Clock) -> None:
    async with served() as server:
        with await server.connect() as sock:
            await asyncio.get_running_loop().sock_sendall(sock, b"GET / HTTP/1.1\r\nA: ")
            while is_open(sock):
                sock.send(b"a")
                await asyncio.sleep(0.5)
        assert 5 <= clock() <= 6
        assert server.reasons() == ["timeout"]


@pytest.mark.simulated_time
async def test_a_client_that_takes_nothing_of_its_answer_is_dropped_after_thirty_seconds(clock: Clock) -> None:
    async with served() as server:
        with await server.connect() as sock:
            await asyncio.get_running_loop().sock_sendall(sock, GET.replace(b"healthz", b"large"))
            await eventually(lambda: server.reasons() == ["timeout"], "the end of patience", 60)
            assert clock() == 30
            assert len(await rest(sock)) < len(LARGE), "it was reset"


def sources(count: int) -> list[str]:
    return [f"127.0.{1 + at // 200}.{1 + at % 200}" for at in range(count)]


@pytest.mark.parametrize(
    ("source", "remain"), [(["127.0.0.1"] * 300, 16), (sources(300), 64)], ids=["one address", "many addresses"]
)
@pytest.mark.parametrize("sent", [b"", GET[:-2], GET.replace(b"healthz", b"large")], ids=["idle", "half", "slow"])
async def test_a_probe_is_answered_beside_any_number_of_strangers(source: list[str], remain: int, sent: bytes) -> None:
    async with served() as server:
        with ExitStack() as stack:
            strangers = []
            for address in source:
                strangers.append(stack.enter_context(await server.connect(address)))
                with suppress(OSError):
                    strangers[-1].send(sent)
                if len(strangers) % 50 == 0:
                    assert (await server.ask()).endswith(b"ok\n")
            assert (await server.ask()).endswith(b"ok\n")
            displaced = len(source) - remain
            await eventually(lambda: server.reasons().count("displaced") >= displaced, "room for others")
            if b"large" not in sent:
                assert open_of(strangers) <= remain


async def test_who_waits_for_the_daemon_is_not_displaced_by_who_is_idle() -> None:
    async with served() as server:
        scrape = asyncio.create_task(server.ask(GET.replace(b"healthz", b"slow")))
        with ExitStack() as stack:
            for source in sources(200):
                stack.enter_context(await server.connect(source))
            await eventually(lambda: server.reasons().count("displaced") >= 136, "room for others")
            server.made.set()
            assert (await scrape).endswith(b"made\n")


async def test_a_probe_is_answered_beside_clients_that_all_wait_for_the_daemon() -> None:
    async with served() as server:
        with ExitStack() as stack:
            for source in sources(100):
                stack.enter_context(await server.connect(source)).send(GET.replace(b"healthz", b"slow"))
            slow_probe = stack.enter_context(await server.connect())
            for source in sources(20):
                stack.enter_context(await server.connect(source)).send(GET.replace(b"healthz", b"slow"))
            await asyncio.get_running_loop().sock_sendall(slow_probe, GET)
            assert (await rest(slow_probe)).endswith(b"ok\n")


async def test_where_descriptors_are_short_a_few_connections_have_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpd, "_RESERVE", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    async with served() as server:
        with ExitStack() as stack:
            strangers = [stack.enter_context(await server.connect(source)) for source in sources(30)]
            assert (await server.ask()).endswith(b"ok\n")
            assert server.reasons().count("displaced") >= 26
            await eventually(lambda: open_of(strangers) <= 4, "the others' end")


@contextmanager
def no_descriptors() -> Iterator[None]:
    """While it lasts, this process can open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


async def test_a_probe_is_answered_where_no_descriptor_is_left() -> None:
    with ExitStack() as stack:
        ready = [stack.enter_context(socket.socket()) for _ in range(40)]
        async with served() as server:
            with no_descriptors():
                assert (await server.ask(sock=ready.pop())).endswith(b"ok\n")
                for _ in range(30):
                    await server.connect(sock=ready.pop())
                assert (await server.ask(sock=ready.pop())).endswith(b"ok\n")
                assert (await server.ask(sock=ready.pop())).endswith(b"ok\n")
            assert set(server.reasons()) == {"displaced"}
            assert (await server.ask()).endswith(b"ok\n")


@pytest.mark.simulated_time
async def test_where_even_that_fails_it_tries_again_now_and_then(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[float] = []

    def fail(_: socket.socket) -> int:
        tries.append(clock())
        raise OSError(errno.EMFILE, "Too many open files")

    async with served() as server:
        with monkeypatch.context() as patched:
            patched.setattr(httpd, "accept", fail)
            answer = asyncio.create_task(server.ask())
            await eventually(lambda: clock() >= 1, "a second")
        assert len(tries) <= 25
        assert (await answer).endswith(b"ok\n")
