"""Daemons and relays whose standard descriptors are closed, full, stuck or gone: the log is not the service."""

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from demo.lab import until
from migproxy.portmap import Channel
from tests.net.nodes import MIB, Migration, Nodes, make_nodes, receive

pytestmark = pytest.mark.tier("gate")

KINDS = ("closed", "full", "stuck", "gone")
BLOCK = os.urandom(MIB)


class Trouble:
    """What is wrong with descriptors of a process that a shell starts.

    Args:
        kind: One of KINDS.
        fifo: Where the pipe of a stuck or gone one is made.
    """

    def __init__(self, kind: str, fifo: Path) -> None:
        self._kind = kind
        self._fifo = fifo
        self._end = -1
        if kind in ("stuck", "gone"):
            os.mkfifo(fifo)
            self._end = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)  # so that neither open waits for the other end

    def prefix(self, *descriptors: int) -> list[str]:
        """What starts a command with these descriptors."""
        place = {"closed": "&-", "full": "/dev/full"}.get(self._kind, str(self._fifo))
        before = {"gone": "/dev/null", "stuck": "/dev/zero"}.get(self._kind, place)
        into = " ".join(f"0<{before}" if fd == 0 else f"{fd}>{place}" for fd in descriptors)
        return ["sh", "-c", f'exec "$@" {into}', "sh"]

    def begin(self) -> None:
        """Lets a pipe's other end go, once all have theirs, or has it be full."""
        if self._kind == "gone":
            self.close()
        elif self._kind == "stuck":
            with suppress(BlockingIOError):
                while True:
                    os.write(self._end, b"\n" * 4096)

    def read(self) -> bytes:
        """What has come through the pipe."""
        with suppress(BlockingIOError):
            return os.read(self._end, MIB)
        return b""

    def close(self) -> None:
        end, self._end = self._end, -1
        if end >= 0:
            os.close(end)


@contextmanager
def trouble(kind: str, folder: Path) -> Iterator[Trouble]:
    made = Trouble(kind, folder / "pipe")
    try:
        yield made
    finally:
        made.close()


@asynccontextmanager
async def troubled_nodes(kind: str, *descriptors: int) -> AsyncIterator[tuple[Nodes, Trouble]]:
    """Two nodes whose daemons and relays all have this trouble with these descriptors."""
    async with make_nodes() as nodes:
        with trouble(kind, nodes.directory) as made:
            for node in nodes.both:
                await node.relay.start(prefix=made.prefix(*descriptors))
                await node.start(prefix=made.prefix(*descriptors))
            made.begin()
            yield nodes, made


async def stream(migration: Migration, seconds: float) -> None:
    """Sends for so long, and asserts that everything arrives as it was sent, and the answer to it."""
    loop = asyncio.get_running_loop()
    async with migration.connection() as (near, far):
        sent, got = hashlib.blake2b(), hashlib.blake2b()

        async def send() -> None:
            end = loop.time() + seconds
            while loop.time() < end:
                sent.update(BLOCK)
                await loop.sock_sendall(near, BLOCK)
            near.shutdown(1)

        async def take() -> None:
            while data := await loop.sock_recv(far, MIB):
                got.update(data)

        async with asyncio.timeout(seconds + 20):
            await asyncio.gather(send(), take())
        assert sent.digest() == got.digest()
        await loop.sock_sendall(far, b"answer")
        assert await receive(near, 6) == b"answer"


def complain(nodes: Nodes) -> None:
    """Gives both daemons two hundred lines to write."""
    documents = [f"kind: VirtualMachineInstance\nmetadata: {os.urandom(8).hex()}\n" for _ in range(200)]
    new = nodes.vmi_dir / ".broken"
    new.write_text("---\n".join(documents))
    new.rename(nodes.vmi_dir / "broken.yaml")


async def trouble_the_log(nodes: Nodes, migration: Migration, seconds: float) -> None:
    """Gives both daemons something to say, again and again, and asks them how they are."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        complain(nodes)
        async with migration.connection(Channel.LIBVIRT):
            pass
        for node in nodes.both:
            node.signal(signal.SIGHUP)
            assert (await asyncio.to_thread(node.status))["ready"]


async def assert_unnoticed(nodes: Nodes, seconds: float) -> None:
    migration = nodes.migration(block=False)
    migration.begin()
    await migration.served()
    await asyncio.gather(stream(migration, seconds), trouble_the_log(nodes, migration, seconds))
    later = nodes.migration("later", block=False)
    later.begin()
    await later.served()


def lost(nodes: Nodes) -> list[int]:
    return [node.status()["log"]["lines_lost"] for node in nodes.both]


@pytest.mark.parametrize("kind", KINDS)
async def test_no_migration_notices_what_becomes_of_the_log(kind: str) -> None:
    async with troubled_nodes(kind, 0, 1, 2) as (nodes, _):
        await assert_unnoticed(nodes, 1)
        while not all(lost(nodes)):
            complain(nodes)
        for node in nodes.both:
            assert await asyncio.wait_for(node.stop(), 20) == 0


async def test_once_lines_can_be_written_again_it_is_told_how_many_were_lost() -> None:
    async with troubled_nodes("stuck", 2) as (nodes, made):
        while not all(lost(nodes)):
            complain(nodes)
        read = b""

        def is_told() -> bool:
            nonlocal read
            read += made.read()
            return read.count(b"log lines were lost") == 2

        await until(is_told, "both daemons to tell how many lines were lost", 20)
        told = [json.loads(line) for line in read.splitlines() if b"log lines were lost" in line]
        assert sorted(line["lines"] for line in told) == sorted(lost(nodes))
        assert [node.status()["log"]["problem"] for node in nodes.both] == [None, None]


@pytest.mark.tier("soak")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("descriptors", "seconds"), [((0,), 5), ((1,), 5), ((2,), 5), ((0, 1, 2), 60)], ids=str)
@pytest.mark.patience(180)
async def test_no_migration_notices_for_long(kind: str, descriptors: tuple[int, ...], seconds: float) -> None:
    async with troubled_nodes(kind, *descriptors) as (nodes, _):
        await assert_unnoticed(nodes, seconds)
