"""A connection that the relay moves, as its daemon sees it: what its peers see, what is counted, what is left."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

import pytest

from migproxy.connection import RelayedConnection
from migproxy.relay.client import RelayClient
from migproxy.splice import Splice
from migproxy.traffic import Traffic
from migproxy.transport import Transport
from tests.clock import Clock
from tests.relaying import patience, relaying

pytestmark = pytest.mark.tier("gate")

DEADLINE = 20.0
BROKEN = r"reset|Broken"


class Legs:
    """A connection under test, with the launcher's end and the far node's end of it."""

    def __init__(self, relay: RelayClient, name: str = "one") -> None:
        self.patience = patience
        self.launcher, unix = socket.socketpair(socket.AF_UNIX)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.far = socket.create_connection(listener.getsockname())
            tcp, _ = listener.accept()
        for end in (self.launcher, self.far):
            end.setblocking(False)
        self.connection = RelayedConnection(relay.lease(name), unix, Transport(tcp))
        self.run = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self.connection.run(lambda: self.patience())
        finally:
            self.connection.lease.drop()

    async def ended(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await self.run

    def close(self) -> None:
        for end in (self.launcher, self.far):
            end.close()


@asynccontextmanager
async def joined() -> AsyncIterator[Legs]:
    async with relaying() as relay:
        legs = Legs(relay)
        try:
            yield legs
        finally:
            legs.run.cancel()
            with suppress(OSError, asyncio.CancelledError):
                await legs.ended()
            legs.close()


@pytest.fixture
async def legs() -> AsyncIterator[Legs]:
    async with joined() as made:
        yield made


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def flood(sock: socket.socket) -> None:
    """Writes for as long as the connection takes it."""
    async with asyncio.timeout(DEADLINE):
        while True:
            await send(sock, os.urandom(100_000))


async def read(sock: socket.socket, count: int | None = None) -> bytes:
    """Reads `count` bytes, or until the end of the stream."""
    data = bytearray()
    async with asyncio.timeout(DEADLINE):
        while count is None or len(data) < count:
            chunk = await asyncio.get_running_loop().sock_recv(sock, 1 << 20)
            if not chunk:
                break
            data += chunk
    return bytes(data)


async def test_a_launcher_that_goes_away_resets_the_network_but_loses_nothing_it_wrote(legs: Legs) -> None:
    """It closes with unread data: what it wrote arrives in full, what it cannot take is an error for the peer."""
    wrote = os.urandom(5_000_000)
    writing = asyncio.create_task(send(legs.launcher, wrote))
    await send(legs.far, b"never read" * 100)
    reading = asyncio.create_task(read(legs.far, len(wrote)))
    await writing
    legs.launcher.close()
    assert await reading == wrote
    with pytest.raises(OSError, match=BROKEN):
        await flood(legs.far)
    with pytest.raises(BrokenPipeError):
        await legs.ended()
    assert legs.connection.sent == len(wrote)


async def test_what_a_launcher_wrote_before_it_went_away_waits_for_a_far_one_that_pauses(legs: Legs) -> None:
    wrote = os.urandom(1_000_000)
    await send(legs.launcher, wrote)
    legs.launcher.close()
    await send(legs.far, b"for nobody")
    await asyncio.sleep(6)
    assert await read(legs.far, len(wrote)) == wrote
    with pytest.raises(BrokenPipeError):
        await legs.ended()


async def test_a_launcher_that_only_reads_no_more_ends_the_connection(legs: Legs) -> None:
    legs.launcher.shutdown(socket.SHUT_RD)
    with pytest.raises(OSError, match=BROKEN):
        await flood(legs.far)
    with pytest.raises(BrokenPipeError):
        await legs.ended()


async def test_cancelling_ends_a_stalled_transfer_at_once_and_the_peer_sees_a_reset(legs: Legs) -> None:
    blocked = asyncio.create_task(send(legs.launcher, bytes(50_000_000)))  # nobody reads it at the far end
    async with asyncio.timeout(DEADLINE):
        while legs.connection.sent == 0:
            await asyncio.sleep(0)
    legs.run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await legs.ended()
    with pytest.raises(OSError, match=BROKEN):
        await blocked
    with pytest.raises(ConnectionResetError):
        await read(legs.far)


@pytest.mark.simulated_time
@pytest.mark.parametrize(
    ("patience", "then", "ends"), [(180.0, 180.0, 180.0), (180.0, 30.0, 50.0), (60.0, 180.0, 180.0)]
)
async def test_a_far_node_that_answers_nothing_is_given_up_by_the_patience_there_is_now(
    legs: Legs, clock: Clock, monkeypatch: pytest.MonkeyPatch, patience: float, then: float, ends: float
) -> None:
    """It changes while the connection runs; a change is noticed within ten seconds."""
    known = legs.connection.tcp_info
    assert known
    silent = partial(replace, known, unanswered=9)
    monkeypatch.setattr(RelayedConnection, "tcp_info", property(lambda _: silent(silence=clock())))
    legs.patience = lambda: patience if clock() < 45 else then
    await send(legs.launcher, b"half of a message")
    with pytest.raises(TimeoutError, match=rf"127\.0\.0\.1 has answered nothing for {ends:.0f} s \(--peer-timeout\)"):
        async with asyncio.timeout(1000):
            await legs.run
    assert clock() == pytest.approx(ends, abs=0.01)
    with pytest.raises(ConnectionResetError):
        await read(legs.far)


async def test_one_that_is_cancelled_shows_its_peer_no_end_of_stream(legs: Legs) -> None:
    await send(legs.launcher, b"half of a message")
    assert await read(legs.far, 17) == b"half of a message"
    legs.run.cancel()
    with pytest.raises(ConnectionResetError):
        await read(legs.far)


async def test_cancelling_closes_everything_however_often() -> None:
    async with relaying() as relay:
        before = len(os.listdir("/proc/self/fd"))
        legs = Legs(relay)
        await asyncio.sleep(0)
        for _ in range(3):  # a cancellation while it is ending must leave nothing behind
            legs.run.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await legs.ended()
        legs.close()
        assert await relay.settle(DEADLINE)
        async with asyncio.timeout(DEADLINE):
            while len(os.listdir("/proc/self/fd")) > before:  # the relay's threads end it a moment later
                await asyncio.sleep(0.001)


async def test_a_defect_in_a_pump_breaks_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than leave one that nobody moves: both peers notice, and the defect is named."""
    monkeypatch.setattr(Splice, "_fill", lambda *_: 1 / 0)
    async with joined() as legs:
        await send(legs.launcher, b"x")
        with pytest.raises(OSError, match="ZeroDivisionError"):
            await legs.ended()
        with pytest.raises(ConnectionResetError):
            await read(legs.far)


async def test_traffic_sums_connections_that_are_open_and_those_that_have_ended() -> None:
    traffic = Traffic()
    async with relaying() as relay:
        for size in (1000, 2000):
            legs = Legs(relay, str(size))
            traffic.begin(legs.connection)
            await send(legs.launcher, bytes(size))
            await read(legs.far, size)
            async with asyncio.timeout(DEADLINE):
                while traffic.sent != (1000 if size == 1000 else 3000):  # counted a moment after it was delivered
                    await asyncio.sleep(0)
            assert traffic.spliced == (traffic.sent, 0)
            for end in (legs.launcher, legs.far):
                end.shutdown(socket.SHUT_WR)
            await legs.ended()
            traffic.end(legs.connection)
            legs.close()
    assert (traffic.sent, traffic.received, traffic.connections, traffic.open) == (3000, 0, 2, set())
    assert (traffic.spliced, traffic.modes) == ((3000, 0), {"spliced": 3000})


async def test_without_descriptors_the_sockets_stay_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relaying() as relay:
        before = len(os.listdir("/proc/self/fd"))

        def none_left(*_: object) -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr("migproxy.tally.os.memfd_create", none_left)
        unix, other = socket.socketpair()
        with unix, other:
            with pytest.raises(OSError, match="Too many open files"):
                RelayedConnection(relay.lease("one"), unix, Transport(other))
            assert len(os.listdir("/proc/self/fd")) == before + 2
