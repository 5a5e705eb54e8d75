"""User-space TLS: what test_connection.py says of plaintext holds here too, and truncation is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import random
import signal
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from migproxy.connection import RelayedConnection
from migproxy.relay import process, workers
from migproxy.relay.client import RelayClient
from migproxy.relay.protocol import Way
from migproxy.tls import MutualTLS
from migproxy.tlserrors import Reason, TLSError
from tests.certificates import DAY, SOURCE, Cluster, client_context
from tests.relaying import patience, relaying

pytestmark = pytest.mark.tier("gate")

DEADLINE = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=["1.2", "1.3"])
def version(request: pytest.FixtureRequest) -> ssl.TLSVersion:
    return {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[request.param]


class Legs:
    """A target's connection under test, with the launcher's end, and a source of the standard library at the other.

    Attributes:
        launcher: The launcher's end.
        far: The source's TLS connection, blocking.
        connection: What is between them.
    """

    def __init__(self, relay: RelayClient, name: str) -> None:
        self._lease = relay.lease(name)
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
        assert transport.way is Way.TLS
        self.connection = RelayedConnection(self._lease, self._unix, transport)
        self.run = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self.connection.run(patience)
        finally:
            self._lease.drop()

    async def ended(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await self.run


@contextlib.asynccontextmanager
async def connected(
    relay: RelayClient, cluster: Cluster, version: ssl.TLSVersion, name: str = "one"
) -> AsyncIterator[Legs]:
    """Legs, ended with the context."""
    made = Legs(relay, name)
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
async def relay() -> AsyncIterator[RelayClient]:
    async with relaying() as made:
        yield made


@pytest.fixture
async def legs(relay: RelayClient, cluster: Cluster, version: ssl.TLSVersion) -> AsyncIterator[Legs]:
    async with connected(relay, cluster, version) as made:
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


async def test_bytes_cross_both_ways_at_once_unchanged(relay: RelayClient, cluster: Cluster) -> None:
    """Between two of ours, so that both ends send and receive at once for as long as it lasts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.setblocking(False)
    transports = await asyncio.gather(
        cluster.security().secure(near, server=False), cluster.security().secure(far, server=True)
    )
    launchers: list[socket.socket] = []
    connections: list[RelayedConnection] = []
    runs: list[asyncio.Task[None]] = []
    for transport in transports:
        assert transport.way is Way.TLS
        launcher, unix = socket.socketpair(socket.AF_UNIX)
        launcher.settimeout(DEADLINE)
        launchers.append(launcher)
        connections.append(RelayedConnection(relay.lease(f"{len(runs)}"), unix, transport))
        runs.append(asyncio.create_task(connections[-1].run(patience)))
    there, back = random.Random(1).randbytes(40_000_000), random.Random(2).randbytes(37_000_001)

    def send(launcher: socket.socket, data: bytes) -> None:
        launcher.sendall(data)
        launcher.shutdown(socket.SHUT_WR)

    sending = asyncio.gather(*(asyncio.to_thread(send, *pair) for pair in zip(launchers, (there, back), strict=True)))
    got_back, got_there = await asyncio.gather(*(asyncio.to_thread(read, launcher) for launcher in launchers))
    await sending
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*runs)
    for launcher, connection in zip(launchers, connections, strict=True):
        launcher.close()
        connection.lease.drop()
    assert hashlib.sha256(got_there).digest() == hashlib.sha256(there).digest()
    assert hashlib.sha256(got_back).digest() == hashlib.sha256(back).digest()
    assert [(one.sent, one.received) for one in connections] == [(len(there), len(back)), (len(back), len(there))]
    assert [one.spliced for one in connections] == [(0, 0)] * 2


async def test_a_few_bytes_do_not_wait_for_more(legs: Legs) -> None:
    for number in range(100):
        word = str(number).encode()
        await asyncio.to_thread(legs.far.sendall, word)
        assert await asyncio.to_thread(read, legs.launcher, len(word)) == word
        await asyncio.to_thread(legs.launcher.sendall, word)
        assert await asyncio.to_thread(read, legs.far, len(word)) == word


async def test_what_the_peer_sends_with_its_handshake_is_not_lost(relay: RelayClient, cluster: Cluster) -> None:
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
    assert transport.way is Way.TLS
    lease = relay.lease("one")
    run = asyncio.create_task(RelayedConnection(lease, unix, transport).run(patience))
    launcher.shutdown(socket.SHUT_WR)  # the target's close_notify must not swallow them
    assert await asyncio.to_thread(read, launcher, 11) == b"first words"
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    lease.drop()
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
    with pytest.raises(TLSError, match="does not decrypt") as damaged:
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


@pytest.mark.tier("soak")
async def test_what_a_launcher_wrote_before_it_went_away_waits_for_a_far_one_that_pauses(legs: Legs) -> None:
    wrote = os.urandom(1_000_000)
    await asyncio.to_thread(legs.launcher.sendall, wrote)
    legs.launcher.close()
    legs.far.sendall(b"for nobody")
    await asyncio.sleep(6)
    assert await asyncio.to_thread(read, legs.far, len(wrote)) == wrote
    with pytest.raises(BrokenPipeError):
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


async def test_a_source_learns_after_its_handshake_that_the_target_refused_it(
    relay: RelayClient, cluster: Cluster, tmp_path: Path
) -> None:
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
    assert transport.way is Way.TLS
    lease = relay.lease("one")
    run = asyncio.create_task(RelayedConnection(lease, unix, transport).run(patience))
    with pytest.raises(TLSError) as refused:
        await refusing
    far.close()
    assert refused.value.reason == Reason.EXPIRED
    with pytest.raises(TLSError, match=r"alert 45 \(certificate_expired\)") as told:
        await run
    assert told.value.reason == Reason.REFUSED_BY_PEER
    lease.drop()
    launcher.close()


async def test_launchers_that_read_nothing_hold_nobody_up(
    relay: RelayClient, cluster: Cluster, version: ssl.TLSVersion
) -> None:
    """However many they are: connections share a worker and its buffers."""

    def flood(far: ssl.SSLSocket) -> None:
        with contextlib.suppress(OSError):
            far.sendall(bytes(50_000_000))

    data = os.urandom(5_000_000)
    floods = []
    async with contextlib.AsyncExitStack() as stack:
        for number in range(6):
            stalled = await stack.enter_async_context(connected(relay, cluster, version, f"stalled {number}"))
            floods.append(threading.Thread(target=flood, args=(stalled.far,)))
            floods[-1].start()
            async with asyncio.timeout(DEADLINE):
                while stalled.connection.received == 0:
                    await asyncio.sleep(0)
        legs = await stack.enter_async_context(connected(relay, cluster, version))
        sending = asyncio.create_task(asyncio.to_thread(legs.far.sendall, data))
        assert await asyncio.to_thread(read, legs.launcher, len(data)) == data
        await sending
        assert all(thread.is_alive() for thread in floods)
    for thread in floods:
        thread.join(DEADLINE)


async def test_stopping_ends_a_stalled_transfer_at_once_and_the_peer_sees_no_clean_end(legs: Legs) -> None:
    blocked = asyncio.create_task(asyncio.to_thread(legs.launcher.sendall, bytes(50_000_000)))
    while legs.connection.sent == 0:
        await asyncio.sleep(0)
    legs.run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await legs.ended()
    with pytest.raises(OSError, match=r"reset|Broken"):
        await blocked
    with pytest.raises(OSError, match=r"reset|EOF"):
        await asyncio.to_thread(read, legs.far)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_that_dies_or_hangs_takes_its_connections_with_it_and_no_other(
    relay: RelayClient, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(workers, "_HANG_SECONDS", 2.0)
    monkeypatch.setattr(process, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))  # two workers
    version = ssl.TLSVersion.TLSv1_3
    async with connected(relay, cluster, version) as legs, connected(relay, cluster, version, "other") as other:
        for one in (legs, other):
            await carries(one)
        first, _ = sorted(children())
        os.kill(first, number)
        with pytest.raises(OSError, match=r"process \d+, which had its keys, has died"):
            await legs.ended()
        with pytest.raises(OSError, match=r"reset|EOF"):
            await asyncio.to_thread(read, legs.far)
        assert await asyncio.to_thread(read, legs.launcher) == b""
        await carries(other)
        async with connected(relay, cluster, version, "next") as legs_of_the_next:
            await carries(legs_of_the_next)
            assert len(children()) == 2


async def test_a_worker_is_not_told_to_end_with_everybody_else(relay: RelayClient, cluster: Cluster) -> None:
    """systemd tells the whole unit; the relay stays as long as it moves something, and so does the worker."""
    async with connected(relay, cluster, ssl.TLSVersion.TLSv1_3) as legs:
        await carries(legs)
        (worker,) = children()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker, number)
        await carries(legs)
        assert children() == [worker]


async def carries(legs: Legs) -> None:
    """Asserts that bytes cross, both ways."""
    legs.far.sendall(b"there")
    assert await asyncio.to_thread(read, legs.launcher, 5) == b"there"
    legs.launcher.sendall(b"back")
    assert await asyncio.to_thread(read, legs.far, 4) == b"back"


async def test_nothing_is_left_open(relay: RelayClient, cluster: Cluster, version: ssl.TLSVersion) -> None:
    """Neither by the relay and the daemon, which are in this process, nor by the worker."""

    def opened() -> list[int]:
        gc.collect()
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), *children())]

    counts = []
    for _ in range(3):
        async with connected(relay, cluster, version) as legs:
            await carries(legs)
        counts.append(opened())
    assert counts[1:] == counts[:1] * 2
    assert len(counts[0]) == 2


def children() -> list[int]:
    found: list[int] = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            found += map(int, Path(f"/proc/self/task/{task}/children").read_text().split())
    return found
