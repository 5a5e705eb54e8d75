"""The daemon's end of the relay, and the connections that it sees: with real relays, and with one that is played."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from migproxy.connection import EndedConnection, RelayedConnection
from migproxy.fds import close_all
from migproxy.relay.client import Left, RelayClient
from migproxy.relay.protocol import (
    Drop,
    Ended,
    Keep,
    Kept,
    Move,
    Note,
    Noted,
    Refused,
    Synced,
    Way,
    Welcome,
    encode,
    for_relay,
)
from migproxy.transport import Transport
from tests.relaying import patience
from tests.relays import DEADLINE, RelayProcess, Wire, read, relay_process

pytestmark = pytest.mark.tier("gate")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "relay.sock")


@asynccontextmanager
async def running(path: str) -> AsyncIterator[RelayClient]:
    """A client that has what there is, and looks after it."""
    client = RelayClient(path)
    async with asyncio.timeout(DEADLINE):
        await client.open()
    run = asyncio.create_task(client.run())
    try:
        yield client
    finally:
        await cancelled(run)
        client.close()


async def comes(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.002)
    assert condition(), what


def connection(client: RelayClient, wire: Wire, name: str = "one") -> tuple[RelayedConnection, asyncio.Task[None]]:
    """A connection over copies of a wire's sockets."""
    made = RelayedConnection(client.lease(name), wire.unix.dup(), Transport(wire.tcp.dup()))
    wire.unix.close()
    wire.tcp.close()
    return made, asyncio.create_task(made.run(patience))


@pytest.fixture
def relay(path: str) -> Iterator[RelayProcess]:
    with relay_process(path) as process:
        yield process


async def test_a_connection_outlives_relays_and_is_counted_to_the_byte(path: str) -> None:
    with ExitStack() as stack, Wire() as wire:
        first = stack.enter_context(relay_process(path))
        async with running(path) as client:
            made, run = connection(client, wire)
            await asyncio.to_thread(wire.check)
            first.kill()
            stack.enter_context(relay_process(path))
            await asyncio.to_thread(wire.check)
            assert client.report()["replaced"] == 1
            for sock in (wire.launcher, wire.far):
                sock.shutdown(socket.SHUT_WR)
            await run
            assert (made.sent, made.received) == (200_000, 200_000)
            assert made.modes == {"spliced": 400_000}
            assert client.problem is None


async def test_an_error_is_raised_and_a_cancellation_is_a_reset(relay: RelayProcess, path: str) -> None:
    async with running(path) as client:
        with Wire() as wire:
            _, run = connection(client, wire, "broken")
            await asyncio.to_thread(wire.check)
            wire.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            wire.far.close()
            with pytest.raises(ConnectionResetError):
                await run
        with Wire() as wire:
            made, run = connection(client, wire, "cancelled")
            await asyncio.to_thread(wire.check, 1000)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            with pytest.raises(ConnectionResetError):
                await asyncio.to_thread(read, wire.far)
            assert (made.sent, made.received) == (1000, 1000)
    assert relay.process.poll() is None


async def test_the_next_client_gets_connections_words_and_ends(relay: RelayProcess, path: str) -> None:
    with Wire() as moving, Wire() as over:
        client = RelayClient(path)
        await client.open()
        for name, wire in (("moving", moving), ("over", over)):
            client.lease(name).move(Way.SPLICED, *wire.fds)
        client.note("state", lambda: "words")
        await asyncio.to_thread(moving.check, 1000)
        await asyncio.to_thread(over.check, 1000)
        for sock in (over.launcher, over.far):
            sock.shutdown(socket.SHUT_WR)
        ended = client._leases["over"].ended
        assert ended
        assert await ended == Ended("over")
        assert await client.settle(DEADLINE)
        client.close()
        for wire in (moving, over):
            wire.let_go()
        successor = RelayClient(path)
        told = await successor.open()
        assert told.notes == {"state": "words"}
        assert told.kept["over"].end == Ended("over")
        counted = EndedConnection(told.kept["over"])
        await counted.run(patience)
        assert (counted.sent, counted.received) == (1000, 1000)
        lease = successor.adopt("moving", told.kept["moving"])
        going = RelayedConnection.adopt(lease, told.kept["moving"])
        run = asyncio.create_task(going.run(patience))
        await asyncio.to_thread(moving.check, 1000)
        for sock in (moving.launcher, moving.far):
            sock.shutdown(socket.SHUT_WR)
        await run
        assert (going.sent, going.received) == (2000, 2000)
        successor.close()
    assert relay.process.poll() is None


async def test_a_relay_is_started_where_none_answers_and_again_where_one_dies(path: str) -> None:
    client = RelayClient(path, starts=True)
    async with asyncio.timeout(DEADLINE):
        await client.open()
    run = asyncio.create_task(client.run())
    first = client.report()["pid"]
    os.kill(first, 9)
    await comes(lambda: client.report()["pid"] not in (first, None), "another relay")
    await cancelled(run)
    client.close()
    assert client._started
    assert await asyncio.to_thread(client._started.wait, DEADLINE) == 0  # it has nothing, and nobody


def test_of_an_ended_connection_the_error_is_raised() -> None:
    with Wire() as wire:
        left = Left([os.dup(wire.tallies.fd)], Way.SPLICED, Ended("n", errno.ECONNRESET, "reset by peer"))
        with pytest.raises(ConnectionResetError, match="reset by peer"):
            asyncio.run(EndedConnection(left).run(patience))


async def cancelled(task: asyncio.Task[object]) -> None:
    """Cancels a task, and waits for its end."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


class Played:
    """A relay that says what the test has it say."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(path)
        self.listener.listen()
        self.listener.settimeout(DEADLINE)

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        sock.settimeout(DEADLINE)
        return sock

    async def greeted(self, *before: bytes) -> socket.socket:
        """A client that has heard Welcome, what is told before Synced, and that."""
        sock = await asyncio.to_thread(self.accept)
        await asyncio.to_thread(sock.recv, 1 << 16)
        for packet in (encode(Welcome(1, "played", os.getpid(), 100)), *before, encode(Synced(0))):
            sock.send(packet)
        return sock


@pytest.fixture
def played(path: str) -> Iterator[Played]:
    made = Played(path)
    yield made
    made.listener.close()


def hear(sock: socket.socket) -> object:
    packet, fds, _, _ = socket.recv_fds(sock, 1 << 17, 16)
    message = for_relay(packet, len(fds))
    close_all(fds)
    return message


async def test_a_relay_that_dies_right_after_its_last_word_is_not_had(played: Played, path: str) -> None:
    """Whether at the first attempt or at a later one."""
    client = RelayClient(path)
    opening = asyncio.create_task(client.open())
    for _ in range(3):
        (await played.greeted()).close()
    with await played.greeted():
        await opening
        run = asyncio.create_task(client.run())
        client.note("state", lambda: "words")
    for _ in range(3):
        (await played.greeted()).close()
    with await played.greeted() as sock:
        assert await asyncio.to_thread(hear, sock) == Note("state", "words")
        assert client.problem is None
        await cancelled(run)
    client.close()


async def test_a_relay_that_does_not_say_who_it_is_is_none(played: Played, path: str) -> None:
    client = RelayClient(path)
    opening = asyncio.create_task(client.open())
    with await asyncio.to_thread(played.accept) as sock:
        await asyncio.to_thread(sock.recv, 1 << 16)
        sock.send(encode(Synced(0)))
        await comes(lambda: "has not said who it is" in (client.problem or ""), "a problem")
    await cancelled(opening)
    client.close()


async def test_a_connection_that_the_relay_does_not_take_is_reset(played: Played, path: str) -> None:
    client = RelayClient(path)
    opening = asyncio.create_task(client.open())
    with await played.greeted() as sock, Wire() as wire:
        await opening
        _, run = connection(client, wire)
        assert await asyncio.to_thread(hear, sock) == Move("one", Way.SPLICED)
        sock.send(encode(Refused("it is full", "one")))
        with pytest.raises(OSError, match="it is full"):
            await run
        assert client.problem == "it is full"
        with pytest.raises(ConnectionResetError):
            await asyncio.to_thread(read, wire.far)
    client.close()


async def test_the_same_relay_is_told_what_it_lacks_and_moves_nothing_twice(played: Played, path: str) -> None:
    with Wire() as wire:
        client = RelayClient(path)
        opening = asyncio.create_task(client.open())
        sock = await played.greeted()
        await opening
        run = asyncio.create_task(client.run())
        ended = client.lease("moved").move(Way.SPLICED, *wire.fds)
        client.lease("kept", wire.unix.fileno())
        client.note("state", lambda: "new", at_once=True)
        sock.close()
        sock = await asyncio.to_thread(played.accept)
        await asyncio.to_thread(sock.recv, 1 << 16)
        sock.send(encode(Welcome(1, "played", 1, 100)))
        for name, way, fds in (("moved", Way.SPLICED, wire.fds), ("stale", None, wire.fds[:1])):
            sock.sendmsg([encode(Kept(name, way))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))])
        sock.send(encode(Noted("old", "words")))
        sock.send(encode(Synced(0)))
        heard = [await asyncio.to_thread(hear, sock) for _ in range(4)]
        assert heard[:2] == [Drop(("stale",)), Drop(("old",))]
        assert heard[2:] == [Note("state", "new"), Keep("kept")]
        sock.send(encode(Ended("moved", 5, "broken")))
        assert await ended == Ended("moved", 5, "broken")
        await cancelled(run)
        client.close()
        sock.close()


async def test_ends_of_many_connections_are_one_message_with_the_words_that_tell_of_them(
    played: Played, path: str
) -> None:
    client = RelayClient(path)
    opening = asyncio.create_task(client.open())
    with await played.greeted() as sock:
        await opening
        words = "first"
        client.note("state", lambda: words)
        assert await asyncio.to_thread(hear, sock) == Note("state", "first"), "the first words are said at once"
        client.note("state", lambda: words)  # nothing new
        leases = [client.lease(name, 0) for name in "abcd"]
        assert [await asyncio.to_thread(hear, sock) for _ in leases] == [Keep(name) for name in "abcd"]
        for lease in leases[:2]:
            client.note("state", lambda: words, lease)
            lease.drop()  # which says nothing before those words
        words = "two are over"
        assert await asyncio.to_thread(hear, sock) == Note("state", words, ("a", "b"))
        client.note("state", lambda: words, leases[2], at_once=True)
        assert await asyncio.to_thread(hear, sock) == Note("state", words, ("c",))
        client.note("state", lambda: words, leases[3])
        client.forget_note("state")
        assert await asyncio.to_thread(hear, sock) == Drop(("d", "state"))
    client.close()


@pytest.mark.parametrize("notes", [1, 3])
async def test_a_relay_that_dies_between_two_messages_is_lost_once(played: Played, path: str, notes: int) -> None:
    client = RelayClient(path)
    opening = asyncio.create_task(client.open())
    with await played.greeted() as sock:
        await opening
        for number in range(notes):
            client.note(str(number), lambda: "words")
            assert await asyncio.to_thread(hear, sock) == Note(str(number), "words")
    for number in range(notes):
        client.note(str(number), lambda: "more")
    assert not await client.settle(0.05)
    run = asyncio.create_task(client.run())
    with await played.greeted() as sock:
        heard = [await asyncio.to_thread(hear, sock) for _ in range(notes)]
        assert heard == [Note(str(number), "more") for number in range(notes)]
        assert not run.done()
    await cancelled(run)
    client.close()


async def test_a_relay_that_takes_nothing_is_left_and_nothing_waits_for_it(played: Played, path: str) -> None:
    client = RelayClient(path)
    opening = asyncio.create_task(client.open())
    with await played.greeted():
        await opening
        before = len(os.listdir("/proc/self/fd"))
        for number in range(10_000):
            client.lease(str(number), 0).drop()
        assert "takes no messages" in (client.problem or "")
        assert not await client.settle(0.05)
        assert len(os.listdir("/proc/self/fd")) < before
    client.close()
