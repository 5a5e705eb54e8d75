"""Relays with mTLS between them: what test_relay.py says of plaintext holds here too, and truncation is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from migproxy.connection import LocalConnection
from migproxy.tls import MutualTLS
from migproxy.tlserrors import Reason, TLSError
from migproxy.transport import UserTransport
from tests.certificates import DAY, SOURCE, Cluster, client_context

pytestmark = pytest.mark.tier("gate")

DEADLINE = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=["1.2", "1.3"])
def version(request: pytest.FixtureRequest) -> ssl.TLSVersion:
    return {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[request.param]


class Legs:
    """A relay of a target under test, with the launcher's end, and a source of the standard library at the other.

    Attributes:
        launcher: The launcher's end.
        far: The source's TLS connection, blocking.
        relay: What is between them.
    """

    def __init__(self) -> None:
        self.launcher, self._unix = socket.socketpair(socket.AF_UNIX)
        self.launcher.settimeout(DEADLINE)

    async def connect(self, cluster: Cluster, version: ssl.TLSVersion) -> None:
        context = client_context(cluster.folder / "ca.crt", cluster.folder / "client")
        context.minimum_version = context.maximum_version = version
        security: MutualTLS = cluster.security()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            tcp, _ = listener.accept()
        near.settimeout(DEADLINE)
        tcp.setblocking(False)
        handshake = asyncio.create_task(asyncio.to_thread(context.wrap_socket, near, suppress_ragged_eofs=False))
        transport = await security.secure(tcp, server=True)
        self.far = await handshake
        assert str(self.far.version()) in transport.label
        assert isinstance(transport, UserTransport)
        self.relay = LocalConnection(self._unix, transport)
        self.run = asyncio.create_task(self.relay.run())

    async def ended(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await self.run


@contextlib.asynccontextmanager
async def connected(cluster: Cluster, version: ssl.TLSVersion) -> AsyncIterator[Legs]:
    """Legs, ended with the context."""
    made = Legs()
    await made.connect(cluster, version)
    try:
        yield made
    finally:
        made.run.cancel()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await made.ended()
        made.launcher.close()
        made.far.close()


@pytest.fixture
async def legs(cluster: Cluster, version: ssl.TLSVersion) -> AsyncIterator[Legs]:
    async with connected(cluster, version) as made:
        yield made


def read(sock: socket.socket, count: int | None = None) -> bytes:
    """Reads `count` bytes, or until the end of the stream."""
    data = bytearray()
    while count is None or len(data) < count:
        with contextlib.suppress(ssl.SSLZeroReturnError):  # after a close_notify of its own
            if chunk := sock.recv(1 << 16):
                data += chunk
                continue
        break
    return bytes(data)


async def test_bytes_cross_both_ways_at_once_unchanged(cluster: Cluster) -> None:
    """Through two of our relays, so that both ends send and receive at once for as long as it lasts."""
    source, target = cluster.security(), cluster.security()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.setblocking(False)
    transports = await asyncio.gather(source.secure(near, server=False), target.secure(far, server=True))
    launchers, runs, relays = [], [], []
    for transport in transports:
        assert isinstance(transport, UserTransport)
        launcher, unix = socket.socketpair(socket.AF_UNIX)
        launcher.settimeout(DEADLINE)
        launchers.append(launcher)
        relays.append(LocalConnection(unix, transport))
        runs.append(asyncio.create_task(relays[-1].run()))
    there, back = random.Random(1).randbytes(40_000_000), random.Random(2).randbytes(37_000_001)

    def send(launcher: socket.socket, data: bytes) -> None:
        launcher.sendall(data)
        launcher.shutdown(socket.SHUT_WR)

    sending = asyncio.gather(*(asyncio.to_thread(send, *pair) for pair in zip(launchers, (there, back), strict=True)))
    got_back, got_there = await asyncio.gather(*(asyncio.to_thread(read, launcher) for launcher in launchers))
    await sending
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*runs)
    for launcher in launchers:
        launcher.close()
    assert hashlib.sha256(got_there).digest() == hashlib.sha256(there).digest()
    assert hashlib.sha256(got_back).digest() == hashlib.sha256(back).digest()
    assert [(relay.sent, relay.received) for relay in relays] == [(len(there), len(back)), (len(back), len(there))]
    assert [relay.spliced for relay in relays] == [(0, 0)] * 2


async def test_a_few_bytes_do_not_wait_for_more(legs: Legs) -> None:
    for number in range(100):
        word = str(number).encode()
        await asyncio.to_thread(legs.far.sendall, word)
        assert await asyncio.to_thread(read, legs.launcher, len(word)) == word
        await asyncio.to_thread(legs.launcher.sendall, word)
        assert await asyncio.to_thread(read, legs.far, len(word)) == word


async def test_what_the_peer_sends_with_its_handshake_is_not_lost(cluster: Cluster) -> None:
    """A source may send its first bytes in the same packet as the end of its handshake (TLS 1.3)."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = client_context(cluster.folder / "ca.crt", cluster.folder / "client")
    client = context.wrap_bio(incoming, outgoing)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        tcp, _ = listener.accept()
    near.setblocking(False)
    tcp.setblocking(False)
    securing = asyncio.create_task(cluster.security().secure(tcp, server=True))
    loop = asyncio.get_running_loop()
    while True:
        try:
            client.do_handshake()
            break
        except ssl.SSLWantReadError:
            await loop.sock_sendall(near, outgoing.read())
            incoming.write(await loop.sock_recv(near, 65536))
    client.write(b"first words")
    await loop.sock_sendall(near, outgoing.read())
    launcher, unix = socket.socketpair(socket.AF_UNIX)
    launcher.settimeout(DEADLINE)
    transport = await securing
    assert isinstance(transport, UserTransport)
    run = asyncio.create_task(LocalConnection(unix, transport).run())
    launcher.shutdown(socket.SHUT_WR)  # the target's close_notify must not swallow them
    assert await asyncio.to_thread(read, launcher, 11) == b"first words"
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    near.close()
    launcher.close()


@pytest.mark.parametrize("first", ["launcher", "far"])
async def test_one_direction_ends_and_the_other_goes_on(legs: Legs, first: str) -> None:
    answer = os.urandom(3_000_000)
    if first == "launcher":
        legs.launcher.sendall(b"last words")
        legs.launcher.shutdown(socket.SHUT_WR)
        assert await asyncio.to_thread(read, legs.far) == b"last words"  # a clean end: with close_notify
        sending = asyncio.create_task(asyncio.to_thread(legs.far.sendall, answer))
        assert await asyncio.to_thread(read, legs.launcher, len(answer)) == answer
        await sending
        await asyncio.to_thread(close_notify, legs.far)
        assert await asyncio.to_thread(read, legs.launcher) == b""
    else:
        legs.far.sendall(b"last words")
        close_notify(legs.far)
        assert await asyncio.to_thread(read, legs.launcher) == b"last words"
        sending = asyncio.create_task(asyncio.to_thread(legs.launcher.sendall, answer))
        assert await asyncio.to_thread(read, legs.far, len(answer)) == answer
        await sending
        legs.launcher.shutdown(socket.SHUT_WR)
        assert await asyncio.to_thread(read, legs.far) == b""
    await legs.ended()


def close_notify(tls: ssl.SSLSocket) -> None:
    """Ends what that side sends, and nothing else."""
    tls.setblocking(False)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.unwrap()
    tls.settimeout(DEADLINE)


async def test_an_end_without_close_notify_is_an_error_and_the_launcher_gets_what_had_arrived(legs: Legs) -> None:
    legs.far.sendall(b"arrived")
    assert await asyncio.to_thread(read, legs.launcher, 7) == b"arrived"
    socket.socket.shutdown(legs.far, socket.SHUT_WR)
    with pytest.raises(TLSError, match="truncated") as truncated:
        await legs.ended()
    assert truncated.value.reason == Reason.TRUNCATED
    assert await asyncio.to_thread(read, legs.launcher) == b""


async def test_an_end_without_close_notify_is_none_once_the_launcher_has_closed(legs: Legs) -> None:
    """KubeVirt's source ends so: nobody is left who could miss anything."""
    legs.launcher.sendall(b"last words")
    legs.launcher.close()
    assert await asyncio.to_thread(read, legs.far) == b"last words"
    socket.socket.shutdown(legs.far, socket.SHUT_WR)
    await legs.ended()


async def test_an_end_without_close_notify_is_an_error_though_the_launcher_sends_no_more(legs: Legs) -> None:
    legs.launcher.shutdown(socket.SHUT_WR)
    assert await asyncio.to_thread(read, legs.far) == b""
    socket.socket.shutdown(legs.far, socket.SHUT_WR)
    with pytest.raises(TLSError, match="truncated"):
        await legs.ended()


async def test_damaged_bytes_are_an_error_and_reach_nobody(legs: Legs) -> None:
    socket.socket.send(legs.far, b"\x17\x03\x03\x00\x30" + bytes(48))
    with pytest.raises(TLSError, match="damaged") as damaged:
        await legs.ended()
    assert damaged.value.reason == Reason.BAD_RECORD
    assert await asyncio.to_thread(read, legs.launcher) == b""


async def test_a_peer_that_ends_both_directions_at_once_is_no_error(legs: Legs) -> None:
    """KubeVirt's proxy does: close_notify, then both directions closed, and a reset for whatever comes later."""
    legs.far.sendall(b"all there is")
    close_notify(legs.far)
    legs.far.close()
    assert await asyncio.to_thread(read, legs.launcher) == b"all there is"
    legs.launcher.shutdown(socket.SHUT_WR)
    await legs.ended()


async def test_a_peer_that_is_gone_breaks_a_connection_with_something_to_send(legs: Legs) -> None:
    close_notify(legs.far)
    legs.far.close()
    assert await asyncio.to_thread(read, legs.launcher) == b""

    def flood() -> None:
        while True:
            legs.launcher.sendall(bytes(100_000))

    with pytest.raises(OSError, match=r"reset|Broken"):
        await asyncio.to_thread(flood)
    with pytest.raises(OSError, match=r"reset|Broken"):
        await legs.ended()


async def test_a_reset_from_the_network_is_an_error(legs: Legs) -> None:
    legs.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    legs.far.close()
    with pytest.raises(ConnectionResetError):
        await legs.ended()


async def test_a_launcher_that_goes_away_loses_nothing_it_wrote(legs: Legs) -> None:
    """It closes with unread data: what it wrote arrives, what it cannot take is an error for the peer."""
    wrote = os.urandom(2_000_000)
    legs.far.sendall(b"never read" * 100)
    reading = asyncio.create_task(asyncio.to_thread(read, legs.far, len(wrote)))
    await asyncio.to_thread(legs.launcher.sendall, wrote)
    legs.launcher.close()
    assert await reading == wrote

    def flood() -> None:
        while True:
            legs.far.sendall(bytes(100_000))

    with pytest.raises(OSError, match=r"reset|Broken|EOF"):
        await asyncio.to_thread(flood)
    with pytest.raises(BrokenPipeError):
        await legs.ended()


async def test_a_source_learns_after_its_handshake_that_the_target_refused_it(cluster: Cluster, tmp_path: Path) -> None:
    """In TLS 1.3 a client is done before the server has seen its certificate."""
    expired = replace(cluster, folder=tmp_path, source=cluster.ca.issue(replace(SOURCE, begins=-2 * DAY, ends=-DAY)))
    expired.write()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.setblocking(False)
    refusing = asyncio.create_task(cluster.security().secure(far, server=True))
    transport = await expired.security().secure(near, server=False)
    launcher, unix = socket.socketpair(socket.AF_UNIX)
    assert isinstance(transport, UserTransport)
    run = asyncio.create_task(LocalConnection(unix, transport).run())
    with pytest.raises(TLSError) as refused:
        await refusing
    far.close()
    assert refused.value.reason == Reason.EXPIRED
    with pytest.raises(TLSError, match="certificate expired") as told:
        await run
    assert told.value.reason == Reason.REFUSED_BY_PEER
    launcher.close()


async def test_launchers_that_read_nothing_hold_nobody_up(cluster: Cluster, version: ssl.TLSVersion) -> None:
    """However many they are: connections share the few places where they decrypt."""

    def flood(far: ssl.SSLSocket) -> None:
        with contextlib.suppress(OSError):
            far.sendall(bytes(50_000_000))

    data = os.urandom(5_000_000)
    floods = []
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(6):
            stalled = await stack.enter_async_context(connected(cluster, version))
            floods.append(threading.Thread(target=flood, args=(stalled.far,)))
            floods[-1].start()
            async with asyncio.timeout(DEADLINE):
                while stalled.relay.received == 0:
                    await asyncio.sleep(0)
        legs = await stack.enter_async_context(connected(cluster, version))
        sending = asyncio.create_task(asyncio.to_thread(legs.far.sendall, data))
        assert await asyncio.to_thread(read, legs.launcher, len(data)) == data
        await sending
        assert all(thread.is_alive() for thread in floods)
    for thread in floods:
        thread.join(DEADLINE)


async def test_stopping_ends_a_stalled_transfer_at_once_and_the_peer_sees_no_clean_end(legs: Legs) -> None:
    blocked = asyncio.create_task(asyncio.to_thread(legs.launcher.sendall, bytes(50_000_000)))
    while legs.relay.sent == 0:
        await asyncio.sleep(0)
    legs.run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await legs.ended()
    with pytest.raises(OSError, match=r"reset|Broken"):
        await blocked
    with pytest.raises(OSError, match=r"reset|EOF"):
        await asyncio.to_thread(read, legs.far)


async def test_nothing_is_left_open(legs: Legs) -> None:
    before = len(os.listdir("/proc/self/fd"))
    legs.run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await legs.ended()
    assert len(os.listdir("/proc/self/fd")) == before - 2  # the two sockets
