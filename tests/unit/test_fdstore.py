"""The client of the descriptor store, against a holder that this test plays: what it hands over, and takes back."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from migproxy.fdstore import Store
from migproxy.holder import Holder, HolderError
from migproxy.notify import Notifier
from migproxy.relay import Relay
from migproxy.splice import Transport

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


async def test_a_manager_that_does_not_know_the_word_has_nothing_to_give(played: Played) -> None:
    store = Store(Notifier(str(played.path)))
    thread = played.answer([])
    assert await store.take_back({}) == {}
    thread.join()
    assert store.problem is None
    store.close()


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
