"""The client of the descriptor store, against a holder that this test plays: what it hands over, and takes back."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from migproxy import fdstore
from migproxy.fdstore import Store
from migproxy.holder import Holder, HolderError
from migproxy.notify import Notifier
from migproxy.relay import Relay
from migproxy.splice import Transport

pytestmark = pytest.mark.tier("gate")

DEADLINE = 20.0


class Played:
    """A holder's socket, and what a daemon sends to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(DEADLINE)

    def receive(self) -> tuple[str, list[int]]:
        message, fds, _, _ = socket.recv_fds(self.socket, 4096, 16)
        return message.decode(), fds

    def answer(self, messages: Sequence[tuple[bytes, Sequence[int]]]) -> threading.Thread:
        """Answers the next FDRETURN, in a thread."""

        def work() -> None:
            _, (fd,) = self.receive()
            with socket.socket(fileno=fd) as asked:
                for text, fds in messages:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
                    asked.sendmsg([text], rights)

        thread = threading.Thread(target=work)
        thread.start()
        return thread


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    made = Played(tmp_path / "holder.sock")
    yield made
    made.socket.close()


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_holder_that_gives_up_in_the_middle_is_not_taken_for_one_that_has_no_more(
    played: Played, is_whole: bool
) -> None:
    store = Store(Notifier(str(played.path)))
    reader, writer = os.pipe()
    messages: list[tuple[bytes, list[int]]] = [(b"FDSTORE=7", []), (b"FDNAME=one", [reader])]
    thread = played.answer([*messages, (b"FDRETURN=1", [])] if is_whole else messages)
    taken = await store.take_back({})
    thread.join()
    assert list(taken) == ["one"]
    assert (store.problem is None) is is_whole
    assert store.report()["limit"] == 7
    for fd in (*taken["one"], reader, writer):
        os.close(fd)
    store.close()


async def test_a_manager_that_keeps_no_descriptors_protects_nothing_and_is_asked_no_more(played: Played) -> None:
    store = Store(Notifier(str(played.path)))
    assert store
    thread = played.answer([])
    assert await store.take_back({}) == {}
    thread.join()
    assert store.problem == "the service manager keeps no descriptors"
    assert not store
    store.lease("name", played.socket.fileno()).release()
    played.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        played.receive()
    store.close()


class Kept:
    """A real holder, which reads what it is sent only when it is told to."""

    def __init__(self, path: Path) -> None:
        self.holder = Holder(str(path), 1024)
        self.store = Store(Notifier(str(path)))
        self.messages = 0

    @property
    def names(self) -> dict[str, int]:
        """How many descriptors it has under each name."""
        return {name: len(fds) for name, fds in self.holder._held.items()}

    async def reads(self) -> None:
        """Lets it read everything, while the store goes on sending."""
        self.holder._socket.setblocking(False)
        while self.store._unsent or select.select([self.holder._socket], [], [], 0)[0]:
            with suppress(BlockingIOError):
                self.holder._handle()
                self.messages += 1
            await asyncio.sleep(0)

    async def checks(self) -> None:
        """Lets the store look after it once, while it reads."""
        checking = asyncio.create_task(self.store._check())
        async with asyncio.timeout(DEADLINE):
            while not checking.done():
                await self.reads()
                await asyncio.sleep(0.001)
        await checking

    def close(self) -> None:
        self.store.close()
        for name in list(self.holder._held):
            self.holder._remove(name)
        self.holder._socket.close()


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    made = Kept(tmp_path / "holder.sock")
    yield made
    made.close()


async def test_a_holder_that_takes_nothing_costs_a_bounded_number_of_descriptors(kept: Kept) -> None:
    before = len(os.listdir("/proc/self/fd"))
    lasting = kept.store.lease("lasting", 0, 1)
    for number in range(3000):
        kept.store.lease(f"short {number}", 0, 1, 2).release(keep_record=False)
    assert len(os.listdir("/proc/self/fd")) < before + 4 * 300
    assert "slow" in (kept.store.problem or "")
    await kept.reads()
    for _ in range(2):
        await kept.checks()
    assert kept.store.problem is None
    assert kept.names == {"lasting": len({os.fstat(fd).st_ino for fd in lasting.fds})}


async def test_a_holder_that_was_slow_and_missed_nothing_is_given_nothing_again(kept: Kept) -> None:
    leases = [kept.store.lease(f"name {number}", 0) for number in range(40)]
    assert kept.store._unsent, "its queue is full"
    kept.store._trouble(fdstore._SLOW)
    await kept.checks()
    assert kept.store.problem is None
    assert kept.messages == len(leases) + 1  # and whether all has arrived


async def test_what_a_holder_did_not_give_back_in_time_stays_a_problem(kept: Kept) -> None:
    kept.holder._held["of the daemon before"] = [os.dup(0)]
    kept.store._report_slow_return()
    for _ in range(3):
        await kept.checks()
    assert "did not give back" in (kept.store.problem or "")
    assert kept.names == {"of the daemon before": 1}


async def test_a_slow_return_of_nothing_is_forgotten(kept: Kept) -> None:
    kept.store._report_slow_return()
    for _ in range(2):
        await kept.checks()
    assert kept.store.problem is None


async def test_removals_that_a_dead_holders_successor_missed_reach_it(kept: Kept) -> None:
    lease = kept.store.lease("over", 0)
    await kept.reads()
    kept.store._lost(ConnectionRefusedError())
    lease.release(keep_record=False)
    assert kept.names == {"over": 1}
    for _ in range(2):
        await kept.checks()
    assert (kept.names, kept.store.problem) == ({}, None)


async def test_settling_waits_until_the_holder_has_done_everything(kept: Kept) -> None:
    leases = [kept.store.lease(f"name {number}", 0) for number in range(60)]
    for lease in leases:
        lease.release()
    kept.store.remove_released(kept.store.released)
    assert not await kept.store.settle(0.05)
    settling = asyncio.create_task(kept.store.settle(DEADLINE))
    while not settling.done():
        await kept.reads()
        await asyncio.sleep(0.001)
    assert await settling
    assert kept.names == {}


async def test_a_relay_that_never_ran_ends_with_a_reset_and_is_with_the_holder_no_more(played: Played) -> None:
    store = Store(Notifier(str(played.path)))
    launcher, unix = socket.socketpair(socket.AF_UNIX)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        tcp, _ = listener.accept()
    before = len(os.listdir("/proc/self/fd"))
    relay = Relay(unix, Transport(tcp), store.lease("connection", unix.fileno(), tcp.fileno()))
    relay.discard()
    store.remove_released(store.released)
    held = [played.receive() for _ in range(3)]
    assert [text.partition("\n")[0] for text, _ in held] == ["FDSTORE=1", "FDSTORE=1", "FDSTOREREMOVE=1"]
    far.settimeout(DEADLINE)
    with pytest.raises(ConnectionResetError):  # at once, although the holder still has a descriptor
        far.recv(1)
    assert launcher.recv(1) == b""
    for _, fds in held:
        for fd in fds:
            os.close(fd)
    store.close()
    for sock in (launcher, far):
        sock.close()
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_what_waits_to_be_sent_keeps_its_own_descriptors(played: Played) -> None:
    store = Store(Notifier(str(played.path)))
    reader, writer = os.pipe()
    identity = os.fstat(reader).st_ino
    sent = 0
    while not store._unsent:  # until the holder's queue is full
        store.lease(f"name {sent}", reader)
        sent += 1
    os.close(reader)
    os.close(writer)
    arrived = []
    for _ in range(sent):
        _, fds = await asyncio.to_thread(played.receive)
        arrived += [os.fstat(fd).st_ino for fd in fds]
        for fd in fds:
            os.close(fd)
        await asyncio.sleep(0)
    assert arrived == [identity] * sent
    async with asyncio.timeout(DEADLINE):
        await store.handed_over()
    store.close()


def test_a_holder_takes_nothing_away_that_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "holder.sock"
    path.write_text("somebody's")
    with pytest.raises(HolderError, match="something else stands there"):
        Holder(str(path), 16)
    assert path.read_text() == "somebody's"
