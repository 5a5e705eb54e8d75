"""Daemons that are killed and started again in a cluster: KubeVirt's settings tell them how to go on."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from demo.lab import until
from demo.stream import short_path
from migproxy.devcerts import make
from migproxy.portmap import Channel, source_socket_name, target_socket_path
from tests.kube.cluster import KUBEVIRTS, MERGE_PATCH, NODES, VMIS, Cluster, begin, kubevirt, vmi
from tests.kube.gate import Gate
from tests.net.nodes import LIBVIRT_SOCKET, Daemon, assert_carries, assert_ends, receive, send

pytestmark = pytest.mark.tier("gate")

ADDRESSES = ("127.77.0.1", "127.77.0.2")


class Pair:
    """A cluster's two nodes with a daemon and a relay each, and a VMI that migrates from the first to the second."""

    def __init__(self, kubernetes: Cluster, folder: Path, url: str, uid: str) -> None:
        self.daemons: list[Daemon] = []
        make(str(folder / "tls"), 1)
        for name, address in zip(NODES, ADDRESSES, strict=True):
            options = ["--kubeconfig", str(kubernetes.kubeconfig(folder, name, url)), "--migration-address", address]
            options += ["--publish-status"]
            options += ["--launcher-run-dir", f"{folder}/{{uid}}-on-{name}", "--libvirt-socket", LIBVIRT_SOCKET]
            options += ["--socket-owner", f"{os.getuid()}:{os.getgid()}"]
            for part in ("kubevirt/migrationproxy", "libvirt"):
                (folder / f"{uid}-on-{name}" / part).mkdir(parents=True)
            daemon = Daemon(name, address, folder / name, *options)
            daemon.protect("--tls-dir", str(folder / "tls"), "--ktls", "off")
            self.daemons.append(daemon)
        here, there = (folder / f"{uid}-on-{name}" for name in NODES)
        self.departure = here / "kubevirt/migrationproxy" / source_socket_name(uid, Channel.DIRECT)
        self.arrival = there / target_socket_path(uid, Channel.DIRECT, LIBVIRT_SOCKET)

    async def start(self) -> None:
        """Starts the daemons; returns when they have read the VMIs."""
        for daemon in self.daemons:
            await daemon.start()

    async def kill(self) -> None:
        """Kills the daemons."""
        for daemon in self.daemons:
            await daemon.stop(signal.SIGKILL)

    async def beginning(self) -> socket.socket:
        """A connection that both daemons have, and its launcher on the target does not listen for yet."""
        await until(self.departure.exists, "the source's socket")
        await until(lambda: self.kept() == [2, 2], "the listeners at the relays")
        made = self.connect()
        # The source's relay moves it by then: two sockets, two pipes, its tallies. The target has accepted.
        await until(lambda: self.kept() == [2 + 7, 2 + 1], "the connection at both relays")
        return made

    def kept(self) -> list[int]:
        """How many descriptors the relays keep."""
        return [int(daemon.status()["relay"]["descriptors"]) for daemon in self.daemons]

    def connect(self) -> socket.socket:
        """Connects as the source's QEMU does."""
        made = socket.socket(socket.AF_UNIX)
        with short_path(self.departure) as path:
            made.connect(path)
        made.setblocking(False)
        return made

    def listen(self) -> socket.socket:
        """Listens as the target's QEMU does."""
        made = socket.socket(socket.AF_UNIX)
        with short_path(self.arrival) as path:
            made.bind(path)
        made.listen()
        made.setblocking(False)
        return made


@pytest.fixture
async def pair(kubernetes: Cluster, door: Gate, tmp_path: Path) -> AsyncIterator[Pair]:
    """The VMI's migration has been asked for, and nothing runs."""
    uid = (await kubernetes.request("POST", VMIS, vmi("one")))["metadata"]["uid"]
    await kubernetes.request("PATCH", f"{VMIS}/one", begin("first"), MERGE_PATCH)
    await kubernetes.request("POST", KUBEVIRTS, kubevirt({}))
    await kubernetes.use_handlers_token()
    made = Pair(kubernetes, tmp_path, door.url, uid)
    try:
        yield made
    finally:
        for daemon in made.daemons:
            await daemon.stop(signal.SIGKILL)
            await daemon.relay.stop(signal.SIGKILL)


async def disable_tls(kubernetes: Cluster, *, yes: bool = True) -> None:
    """Writes it into the KubeVirt resource."""
    change = {"spec": {"configuration": {"migrations": {"disableTLS": yes}}}}
    await kubernetes.request("PATCH", f"{KUBEVIRTS}/kubevirt", change, MERGE_PATCH)


@asynccontextmanager
async def untold(door: Gate) -> AsyncIterator[None]:
    """The API server does not tell KubeVirt's settings in the context, at whose end both daemons wait for them."""
    asked: set[str] = set()

    def hold(request: web.Request) -> bool:
        if request.path == KUBEVIRTS:
            asked.add(request.headers["Authorization"])
        return request.path == KUBEVIRTS

    door.hold = hold
    yield
    await until(lambda: len(asked) == len(NODES), "both daemons to ask")
    door.hold = lambda request: False
    door.released.set()


async def test_what_is_being_connected_waits_for_kubevirts_settings(
    kubernetes: Cluster, door: Gate, pair: Pair
) -> None:
    await disable_tls(kubernetes)
    await pair.start()
    with await pair.beginning() as first:
        await pair.kill()
        async with untold(door):
            await pair.start()
            second = pair.connect()
        with second, pair.listen() as listener:
            await send(first, b"1")
            await send(second, b"2")
            found = set()
            for _ in range(2):
                with await arrived(listener) as far:
                    found.add(number := await receive(far, 1))
                    await assert_carries(first if number == b"1" else second, far)
            assert found == {b"1", b"2"}


async def test_who_waited_for_kubevirts_settings_is_encrypted_where_they_say_so(
    kubernetes: Cluster, door: Gate, pair: Pair
) -> None:
    """What was accepted in plaintext is not gone on with: KubeVirt has TLS now."""
    await disable_tls(kubernetes)
    await pair.start()
    with await pair.beginning() as first:
        await pair.kill()
        await disable_tls(kubernetes, yes=False)
        async with untold(door):
            await pair.start()
            second = pair.connect()
        with second, pair.listen() as listener:
            await assert_ends(first)
            with await arrived(listener) as far:
                await assert_carries(second, far)
    for daemon in pair.daemons:
        security = daemon.logged("connection opened")[-1]["security"]
        assert security.startswith("TLSv1.3"), security


async def arrived(listener: socket.socket) -> socket.socket:
    """The next connection that arrives."""
    return (await asyncio.wait_for(asyncio.get_running_loop().sock_accept(listener), 20))[0]
