"""A relay between a unix socket and a TCP socket on loopback: ends, errors, counts, nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from migproxy.relay import Relay, Traffic
from migproxy.splice import Splice, Transport
from migproxy.threads import Threads

pytestmark = pytest.mark.tier("gate")

DEADLINE = 20.0
BROKEN = r"reset|Broken"


class Legs:
    """A relay under test, with the launcher's end and the far node's end of it."""

    def __init__(self) -> None:
        self.launcher, unix = socket.socketpair(socket.AF_UNIX)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.far = socket.create_connection(listener.getsockname())
            tcp, _ = listener.accept()
        for end in (self.launcher, self.far):
            end.setblocking(False)
        self.relay = Relay(unix, Transport(tcp))
        self.run = asyncio.create_task(self.relay.run())

    async def ended(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await self.run


@pytest.fixture
async def legs() -> AsyncIterator[Legs]:
    made = Legs()
    yield made
    made.relay.stop()
    with contextlib.suppress(OSError, asyncio.CancelledError):
        await made.ended()
    made.launcher.close()
    made.far.close()


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("migproxy.relay._threads", Threads(linger=0.01))
    threads = len(os.listdir("/proc/self/task"))
    yield
    deadline = time.monotonic() + DEADLINE
    while len(os.listdir("/proc/self/task")) > threads + 1:  # the loop's own worker; a thread takes a moment to go
        assert time.monotonic() < deadline
        time.sleep(0.001)


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def flood(sock: socket.socket) -> None:
    """Writes for as long as the connection takes it."""
    while True:
        await send(sock, os.urandom(100_000))


async def read(sock: socket.socket, count: int | None = None) -> bytes:
    """Reads `count` bytes, or until the end of the stream."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    async with asyncio.timeout(DEADLINE):
        while count is None or len(data) < count:
            chunk = await loop.sock_recv(sock, 1 << 20)
            if not chunk:
                break
            data += chunk
    return bytes(data)


async def test_bytes_cross_both_ways_at_once_unchanged(legs: Legs) -> None:
    there, back = random.Random(1).randbytes(20_000_000), random.Random(2).randbytes(17_000_001)

    async def one_way(out: socket.socket, data: bytes, into: socket.socket) -> bytes:
        reading = asyncio.create_task(read(into, len(data)))
        await send(out, data)
        return await reading

    got_there, got_back = await asyncio.gather(
        one_way(legs.launcher, there, legs.far), one_way(legs.far, back, legs.launcher)
    )
    assert hashlib.sha256(got_there).digest() == hashlib.sha256(there).digest()
    assert hashlib.sha256(got_back).digest() == hashlib.sha256(back).digest()
    for end in (legs.launcher, legs.far):
        end.shutdown(socket.SHUT_WR)
    await legs.ended()
    assert (legs.relay.sent, legs.relay.received) == (len(there), len(back))


@pytest.mark.parametrize("first", ["launcher", "far"])
async def test_one_direction_ends_and_the_other_goes_on(legs: Legs, first: str) -> None:
    ending, staying = (legs.launcher, legs.far) if first == "launcher" else (legs.far, legs.launcher)
    await send(ending, b"last words")
    ending.shutdown(socket.SHUT_WR)
    assert await read(staying) == b"last words"
    answer = os.urandom(3_000_000)
    sending = asyncio.create_task(send(staying, answer))
    assert await read(ending, len(answer)) == answer
    await sending
    staying.shutdown(socket.SHUT_WR)
    assert await read(ending) == b""
    await legs.ended()


async def test_a_reset_from_the_network_is_an_error_and_the_launcher_gets_what_had_arrived(legs: Legs) -> None:
    await send(legs.far, b"arrived")
    assert await read(legs.launcher, 7) == b"arrived"
    legs.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    legs.far.close()
    with pytest.raises(ConnectionResetError):
        await legs.ended()
    assert await read(legs.launcher) == b""


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


async def test_a_launcher_that_only_reads_no_more_ends_the_connection(legs: Legs) -> None:
    legs.launcher.shutdown(socket.SHUT_RD)
    with pytest.raises(OSError, match=BROKEN):
        await flood(legs.far)
    with pytest.raises(BrokenPipeError):
        await legs.ended()


async def test_stopping_ends_a_stalled_transfer_at_once_and_the_peer_sees_a_reset(legs: Legs) -> None:
    blocked = asyncio.create_task(send(legs.launcher, bytes(50_000_000)))  # nobody reads it at the far end
    while legs.relay.sent == 0:
        await asyncio.sleep(0)
    legs.relay.stop()
    await legs.ended()
    with pytest.raises(OSError, match=BROKEN):
        await blocked
    with pytest.raises(ConnectionResetError):
        await read(legs.far)


async def test_cancelling_waits_for_the_pumps_and_closes_everything(legs: Legs) -> None:
    before = len(os.listdir("/proc/self/fd"))
    await asyncio.sleep(0)
    for _ in range(3):  # a cancellation while it is ending must not leave a pump behind
        legs.run.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await legs.ended()
    assert len(os.listdir("/proc/self/fd")) == before - 6  # two sockets, two pipes


async def test_traffic_sums_open_and_ended_relays() -> None:
    traffic = Traffic()
    for size in (1000, 2000):
        legs = Legs()
        traffic.begin(legs.relay)
        await send(legs.launcher, bytes(size))
        await read(legs.far, size)
        async with asyncio.timeout(DEADLINE):
            while traffic.sent != (1000 if size == 1000 else 3000):  # counted a moment after it was delivered
                await asyncio.sleep(0)
        legs.launcher.close()
        legs.far.close()
        await legs.ended()
        traffic.end(legs.relay)
    assert (traffic.sent, traffic.received, traffic.connections, traffic.relays) == (3000, 0, 2, set())


async def test_a_defect_in_a_pump_breaks_its_connection(legs: Legs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than leave one that nobody moves: both peers notice, and the defect is named."""
    monkeypatch.setattr(Splice, "_fill", lambda *_: 1 / 0)
    await send(legs.launcher, b"x")
    with pytest.raises(OSError, match="ZeroDivisionError"):
        await legs.ended()
    with pytest.raises(ConnectionResetError):
        await read(legs.far)


async def test_a_relay_that_is_stopped_shows_its_peer_no_end_of_stream(legs: Legs) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(legs.launcher, b"half of a message")
    assert await loop.sock_recv(legs.far, 100) == b"half of a message"
    legs.relay.stop()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(loop.sock_recv(legs.far, 100), DEADLINE)
    await legs.ended()
