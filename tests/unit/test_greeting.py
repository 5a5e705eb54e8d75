"""Two ends of a connection meet: the migration has a name, and two migproxies have words, in plaintext and mTLS."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migproxy.announcement import server_name
from migproxy.greeting import GO
from migproxy.relay.protocol import Way
from migproxy.relay.records import unpack
from migproxy.tls import Meeting, Plaintext, Security
from migproxy.tlserrors import Reason, TLSError
from migproxy.transport import Transport
from tests.certificates import Cluster

pytestmark = pytest.mark.tier("gate")

NAME = server_name("vmi", "migration")


@pytest.fixture(params=["plaintext", "1.2", "1.3"])
def protect(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Security]:
    if request.param == "plaintext":
        return Plaintext
    cluster = Cluster.make(tmp_path)
    if request.param == "1.3":
        return lambda: cluster.security(min_version="1.3")
    return lambda: cluster.security(ciphers=("ECDHE-ECDSA-AES128-GCM-SHA256",))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        for sock in (near, far):
            sock.setblocking(False)
        yield near, far


async def at_once() -> None:
    pass


async def meet(
    pair: tuple[socket.socket, socket.socket], security: Security, source: Meeting, target: Meeting
) -> tuple[Transport | BaseException, Transport | BaseException]:
    """What becomes of the source's end, and of the target's, whose GO is said as a relay would."""
    near, far = pair
    loop = asyncio.get_running_loop()
    accepting = asyncio.create_task(security.secure(far, server=True, meeting=target))
    ours: Transport | BaseException
    try:
        ours = await security.secure(near, server=False, meeting=source)
    except TLSError as error:
        ours = error
    if isinstance(ours, Transport) and source.greet:
        if ours.way is Way.TLS:
            sealer, _, preface = unpack(memoryview(ours.keys))
            assert preface == GO
            await loop.sock_sendall(near, sealer.data(preface))
        else:
            await loop.sock_sendall(near, ours.preface)
    elif not isinstance(ours, Transport):
        near.close()
    (theirs,) = await asyncio.gather(accepting, return_exceptions=True)
    return ours, theirs


async def test_two_migproxies_greet_each_other_and_the_target_waits_for_the_last_word(
    pair: tuple[socket.socket, socket.socket], protect: Callable[[], Security]
) -> None:
    steps: list[str] = []

    async def target_is_ready() -> None:
        steps.append("the launcher is there")

    async def source_may_go() -> None:
        steps.append("the source may go")

    ours, theirs = await meet(pair, protect(), Meeting(NAME, source_may_go), Meeting(NAME, target_is_ready))
    assert isinstance(ours, Transport)
    assert isinstance(theirs, Transport)
    assert steps == ["the launcher is there", "the source may go"]
    assert theirs.preface == b""
    if ours.way is Way.TLS:  # each end goes on where the two have left off
        sealer, opener, _ = unpack(memoryview(theirs.keys))
        back, forth, preface = unpack(memoryview(ours.keys))
        back.data(preface)
        for sends, takes in ((sealer, forth), (back, opener)):
            plain = memoryview(bytearray(1 << 15))
            _, filled = takes.open(memoryview(sends.data(b"data")), plain)
            assert bytes(plain[:filled]) == b"data"


async def test_target_that_is_not_ready_says_nothing(
    pair: tuple[socket.socket, socket.socket], protect: Callable[[], Security]
) -> None:
    async def never() -> None:
        pair[1].shutdown(socket.SHUT_RDWR)
        raise TLSError(Reason.CLOSED, "no launcher")

    ours, theirs = await meet(pair, protect(), Meeting(NAME, at_once), Meeting(NAME, never))
    assert isinstance(ours, TLSError)
    assert ours.reason is Reason.CLOSED
    assert isinstance(theirs, TLSError)


@pytest.mark.parametrize(
    ("sent", "known", "greets", "is_taken"),
    [
        (NAME, NAME, True, True),
        (None, NAME, True, False),
        (server_name("vmi", "another"), NAME, True, False),
        # To a published target KubeVirt's source comes as well, which sends no name.
        (NAME, NAME, False, True),
        (None, NAME, False, True),
        (server_name("another", "migration"), NAME, False, False),
        # Across clusters the two sides know the migration by different UIDs.
        ("anything", None, False, True),
    ],
)
async def test_who_is_let_in_by_the_migration_that_is_meant(
    pair: tuple[socket.socket, socket.socket],
    tmp_path: Path,
    sent: str | None,
    known: str | None,
    greets: bool,
    is_taken: bool,
) -> None:
    greet = at_once if greets else None
    ours, theirs = await meet(pair, Cluster.make(tmp_path).security(), Meeting(sent, greet), Meeting(known, greet))
    assert isinstance(theirs, Transport) is is_taken
    if not is_taken:
        assert isinstance(theirs, TLSError)
        assert theirs.reason is Reason.OTHER_MIGRATION
        if greets:
            assert isinstance(ours, TLSError)
            assert "unrecognized_name" in str(ours)


async def test_who_says_something_else_is_no_migproxy(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    await asyncio.get_running_loop().sock_sendall(far, b"HTTP/1.1 400\r\n\r\n")
    with pytest.raises(TLSError, match="no migproxy of this version"):
        await Plaintext().secure(near, server=False, meeting=Meeting(NAME, at_once))
