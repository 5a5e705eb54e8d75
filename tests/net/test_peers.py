"""A node that is gone is noticed whatever its connections do; a launcher that takes its time is not cut off."""

import asyncio
import hashlib
import random
import re
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from demo.lab import LabError, background, run, until
from migproxy.portmap import Channel
from tests.certificates import Cluster
from tests.net.nodes import (
    MIB,
    Daemon,
    Migration,
    Nodes,
    assert_carries,
    assert_ends,
    assert_logged,
    make_nodes,
    receive,
    send,
)

pytestmark = pytest.mark.tier("gate")


class Network:
    """The two nodes, each with a network stack of its own, and the cable between them."""

    def __init__(self, nodes: Nodes, protection: tuple[str, ...]) -> None:
        self.nodes = nodes
        self._protection = protection
        if protection:
            for node in nodes.both:
                node.protect(*protection)

    async def start(self, *options: str) -> Migration:
        """Starts both daemons, and a migration that they serve."""
        await self.nodes.source.start(*options)
        await self.nodes.target.start(*options, prefix=("unshare", "--net"))
        await run("ip", "link", "set", "mig2", "netns", str(self.nodes.target.pid))
        await self._on_target("ip", "address", "add", "10.9.0.2/24", "dev", "mig2")
        await self._on_target("ip", "link", "set", "mig2", "up")
        migration = self.nodes.migration(block=False)
        migration.begin()
        await migration.served()
        return migration

    async def _on_target(self, *command: str) -> None:
        await run("nsenter", "--net", "-t", str(self.nodes.target.pid), *command)

    async def cut(self) -> None:
        """Lets each node's packets go to nobody; nobody is told."""
        for on, address, device in ((run, "10.9.0.2", "mig1"), (self._on_target, "10.9.0.1", "mig2")):
            nobody = ("lladdr", "02:00:00:00:00:77", "nud", "permanent")
            await on("ip", "neigh", "replace", address, "dev", device, *nobody)

    async def mend(self) -> None:
        """Lets packets arrive again."""
        await run("ip", "neigh", "delete", "10.9.0.2", "dev", "mig1")
        await self._on_target("ip", "neigh", "delete", "10.9.0.1", "dev", "mig2")


@pytest.fixture(params=["plaintext", "mTLS"])
async def network(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Network]:
    """A network whose daemons are not started yet; with mTLS, which is in user space, or without."""
    tls = ("--tls-dir", str(Cluster.make(tmp_path / "pki").folder), "--ktls", "off")
    await run("ip", "link", "add", "mig1", "type", "veth", "peer", "mig2")
    try:
        await run("ip", "address", "add", "10.9.0.1/24", "dev", "mig1")
        await run("ip", "link", "set", "mig1", "up")
        async with make_nodes("10.9.0.1", "10.9.0.2", by_interface=True) as nodes:
            yield Network(nodes, tls if request.param == "mTLS" else ())
    finally:
        with suppress(LabError):  # it goes with the target's network stack
            await run("ip", "link", "delete", "mig1")


async def write(sock: socket.socket) -> None:
    """Writes for as long as somebody takes it."""
    with suppress(ConnectionError):
        while True:
            await asyncio.get_running_loop().sock_sendall(sock, bytes(MIB))


async def read(sock: socket.socket) -> None:
    """Reads until the end."""
    with suppress(ConnectionError):
        while await asyncio.get_running_loop().sock_recv(sock, MIB):
            pass


def failures(migration: Migration, node: Daemon) -> dict[str, int]:
    """The failures of the direct channel's connections, by reason."""
    (direct,) = [one for one in migration.report(node)["channels"] if one["channel"] == "direct"]
    return dict(direct["failures"])


async def assert_given_up(node: Daemon, migration: Migration, count: int) -> None:
    """A node takes the other one for gone, and says so of each connection, well before its kernel would."""

    def broken() -> list[dict[str, Any]]:
        return node.logged("connection broken", channel="direct", migration_uid=migration.migration_uid)

    await until(lambda: len(broken()) == count, f"{count} ends at {node.name}", 20)
    for line in broken():
        assert re.match(r"10\.9\.0\.[12] has answered nothing for \d+ s \(--peer-timeout\): is", line["error"])
    assert failures(migration, node) == {"timeout": count}


async def shuts(migration: Migration) -> None:
    """Waits until the kernel probes a window that the target has shut."""
    port = migration.published()[Channel.DIRECT]
    while "timer:(persist" not in await run("ss", "-Htno", "dport", f"= {port}"):
        await asyncio.sleep(0.02)


async def test_a_node_that_is_gone_is_noticed_on_every_connection(network: Network) -> None:
    """One is idle, one is in the middle of its data, and the window of one is shut."""
    migration = await network.start("--peer-timeout", "3")
    source, target = network.nodes.both
    async with migration.connection() as idle:
        await assert_carries(*idle)
        await source.stop(signal.SIGKILL)  # the next daemon judges what it takes over, too
        await source.start("--peer-timeout", "3")
        await until(lambda: bool(source.logged("connection goes on")), "the connection to go on")
        await migration.served()
        async with migration.connection() as busy, migration.connection() as shut:
            async with background(write(shut[0])):
                await shuts(migration)
                async with background(write(busy[0])), background(read(busy[1])):
                    await network.cut()
                    await asyncio.gather(assert_given_up(source, migration, 3), assert_given_up(target, migration, 3))
            for near, _ in (idle, busy, shut):
                await assert_ends(near)


async def test_a_launcher_that_pauses_or_trickles_gets_every_byte(network: Network) -> None:
    """For longer than a node may be silent: its kernel answers."""
    migration = await network.start("--peer-timeout", "1")
    size = 24 * MIB
    data = random.Random(1).randbytes(size)

    async def trickle(far: socket.socket, until_set: asyncio.Event) -> bytes:
        got = b""
        while not until_set.is_set():
            got += await receive(far, 100)
            await asyncio.sleep(0.1)
        return got

    async with migration.connection() as pauses, migration.connection() as trickles:
        writing = [asyncio.create_task(send(near, data)) for near, _ in (pauses, trickles)]
        is_over = asyncio.Event()
        trickling = asyncio.create_task(trickle(trickles[1], is_over))
        await shuts(migration)
        await asyncio.sleep(4)
        is_over.set()
        got = [b"", await trickling]
        for place, (_, far) in enumerate((pauses, trickles)):
            got[place] += await receive(far, size - len(got[place]))
        await asyncio.gather(*writing)
        assert [hashlib.sha256(one).digest() for one in got] == [hashlib.sha256(data).digest()] * 2
        for near, far in (pauses, trickles):
            await assert_carries(near, far)
    for node in network.nodes.both:
        assert failures(migration, node) == {}


@pytest.mark.tier("soak")
async def test_a_network_that_is_away_for_45_seconds_costs_a_connection_nothing(network: Network) -> None:
    """By the defaults: less than KubeVirt waits for progress (150 s)."""
    migration = await network.start()
    async with migration.connection() as (near, far), migration.connection(Channel.LIBVIRT) as idle:
        await assert_carries(*idle)
        await network.cut()
        data = random.Random(1).randbytes(8 * MIB)
        writing = asyncio.create_task(asyncio.get_running_loop().sock_sendall(near, data))
        await asyncio.sleep(45)
        await network.mend()
        got = await receive(far, len(data), seconds=60)
        await writing
        assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
        await assert_carries(near, far)
        await assert_carries(*idle)
    for node in network.nodes.both:
        assert not node.logged("connection broken")


@pytest.mark.tier("soak")
async def test_a_reload_changes_how_long_a_running_connection_waits(network: Network, tmp_path: Path) -> None:
    config = tmp_path / "migproxy.toml"
    config.write_text("peer-timeout = 900\n")
    migration = await network.start("--config", str(config))
    async with migration.connection() as (near, far):
        await assert_carries(near, far)
        config.write_text("peer-timeout = 2\n")
        network.nodes.source.signal(signal.SIGHUP)
        await assert_logged(network.nodes.source, "configuration read again", changed=["--peer-timeout"])
        await network.cut()
        await send(near, b"into the void")
        await assert_given_up(network.nodes.source, migration, 1)
        await assert_ends(near)
    assert failures(migration, network.nodes.target) == {}
