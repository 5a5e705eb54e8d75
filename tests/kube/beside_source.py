"""A source beside virt-handler, whose target's side is a test's: virt-handler's path, and what is announced."""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from migproxy.announcement import TARGET_ANNOTATION
from migproxy.greeting import GO, READY
from migproxy.portmap import Channel, source_socket_name
from migproxy.tls import Plaintext
from tests.kube.cluster import MERGE_PATCH, NODES, VMIS, Cluster
from tests.kube.world import LocalNode
from tests.virt_handler import VirtHandler, shortened

HERE, ADDRESS, TARGET = NODES[0], "127.77.0.1", "127.77.0.3"
CHANNELS = (Channel.LIBVIRT, Channel.DIRECT)


class Unready(Plaintext):
    """Protection that is not to be had (yet)."""

    problem: str | None = "KubeVirt's settings are not known yet"

    def report(self) -> dict[str, Any]:
        return {"mode": "none yet", "errors": {}, "problem": self.problem}


class Targets:
    """The target's side: where virt-handler's proxy leads, and where its migproxy has announced that it listens.

    Attributes:
        published: Where virt-handler's leads.
        announced: The text of the announcement, but for the migration.
    """

    def __init__(self) -> None:
        servers = [socket.create_server((TARGET, 0)) for _ in range(2)]
        for server in servers:
            server.setblocking(False)
        (_, theirs), (_, ours) = (server.getsockname() for server in servers)
        self.published = (TARGET, {str(theirs): 0, str(theirs + 1): 49152})
        self.announced = f"{ours}:0,{ours + 1}:49152 {TARGET}"
        self._servers = servers
        self._arrived: asyncio.Queue[socket.socket] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._serve(*one)) for one in zip(servers, (False, True), strict=True)]

    async def _serve(self, server: socket.socket, greets: bool) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(server)
            if greets:
                await loop.sock_sendall(connection, READY)
                if await loop.sock_recv(connection, 1) != GO:
                    connection.close()
                    continue
            self._arrived.put_nowait(connection)

    async def arrived(self) -> socket.socket:
        """The next connection that arrives, by either way."""
        return await asyncio.wait_for(self._arrived.get(), 20)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._servers:
            server.close()
        while not self._arrived.empty():
            self._arrived.get_nowait().close()


class SourceScene:
    """A migration from node01; virt-handler's steps are the test's."""

    def __init__(self, kubernetes: Cluster, node: LocalNode, uid: str, targets: Targets) -> None:
        self.kubernetes, self.node, self.uid, self.targets = kubernetes, node, uid, targets
        self.run_dir = node.launchers / uid
        self.folder = self.run_dir / "kubevirt/migrationproxy"
        self.virt_handler = VirtHandler(ADDRESS, self.run_dir, "libvirt/libvirt-sock", owner=(os.getuid(), os.getgid()))
        self.leads_to = targets.published

    async def change(self, body: dict[str, Any]) -> None:
        await self.kubernetes.request("PATCH", f"{VMIS}/one", body, MERGE_PATCH)

    def prepare(self) -> None:
        """What virt-handler does when the target has published, or has published something else."""
        self.virt_handler.start_source(self.uid, *self.leads_to)

    def is_ours(self) -> bool:
        """Whether every path leads to migproxy."""
        try:
            modes = [(self.folder / source_socket_name(self.uid, channel)).stat().st_mode for channel in CHANNELS]
        except FileNotFoundError:
            return False
        return all(mode & stat.S_ISVTX for mode in modes)

    def is_given_back(self) -> bool:
        """virt-handler's own sockets are at the paths, and nothing is beside them."""
        names = {source_socket_name(self.uid, channel) for channel in CHANNELS}
        files = list(self.folder.iterdir())
        return {one.name for one in files} == names and not any(one.stat().st_mode & stat.S_ISVTX for one in files)

    async def publish(self, migration: str = "first") -> None:
        """What the target's virt-handler and migproxy write."""
        body = {"metadata": {"annotations": {TARGET_ANNOTATION: f"1 {migration} {self.targets.announced}"}}}
        token = self.kubernetes.token(NODES[1])
        await self.kubernetes.request("PATCH", f"{VMIS}/one", body, MERGE_PATCH, token=token)
        address, ports = self.leads_to
        published = {"targetNodeAddress": address, "targetDirectMigrationNodePorts": ports}
        await self.change({"status": {"migrationState": published}})

    async def events(self, reason: str) -> list[str]:
        """What Events of that reason say."""
        found = await self.kubernetes.request("GET", "/api/v1/namespaces/default/events")
        return [one["message"] for one in found["items"] if one["reason"] == reason]

    async def connect(self) -> None:
        """A connection by the libvirt channel's path arrives at the target."""
        async with self.connection() as (near, far):
            await through(near, far)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
        """A connection by the libvirt channel's path, and its other end at the target."""
        with self.dial() as near, await self.arrived() as far:
            yield near, far

    def dial(self) -> socket.socket:
        """Connects by the libvirt channel's path."""
        near = socket.socket(socket.AF_UNIX)
        near.setblocking(False)
        with shortened(self.virt_handler.path(self.uid, Channel.LIBVIRT)) as path:
            near.connect(path)
        return near

    async def arrived(self) -> socket.socket:
        """The next connection that arrives at the target, by either way."""
        return await self.targets.arrived()


async def through(near: socket.socket, far: socket.socket) -> None:
    """What is sent arrives."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(near, b"through")
    assert await asyncio.wait_for(loop.sock_recv(far, 7), 20) == b"through"


@asynccontextmanager
async def targets() -> AsyncIterator[Targets]:
    """The target's side of a migration."""
    made = Targets()
    try:
        yield made
    finally:
        await made.close()
