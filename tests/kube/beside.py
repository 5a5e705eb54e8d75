"""A migration between two nodes in this process, each with a migproxy beside a virt-handler."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from migproxy.announcement import TARGET_ANNOTATION
from migproxy.node import Node
from migproxy.portmap import Channel, source_socket_name
from migproxy.tls import Security
from tests.clock import eventually
from tests.kube.cluster import MERGE_PATCH, NODES, VMIS, Cluster, begin, vmi
from tests.kube.world import LocalNode
from tests.virt_handler import VirtHandler, shortened

SOURCE, TARGET = "127.77.0.1", "127.77.0.2"
STRANGER = "127.77.0.9"
LIBVIRT = "libvirt/libvirt-sock"

Act = Callable[[socket.socket], Awaitable[None]]
"""What is done with a connection."""


class Launcher:
    """The target's: takes connections at libvirt's socket, and says back what it hears."""

    def __init__(self, run_dir: Path) -> None:
        self.accepted: list[bytes] = []
        self._path = run_dir / LIBVIRT
        self._path.parent.mkdir(parents=True)
        self._server = socket.socket(socket.AF_UNIX)
        with shortened(self._path) as path:
            self._server.bind(path)
        self._server.listen()
        self._server.setblocking(False)
        self._tasks = [asyncio.create_task(self._serve())]

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._server)
            self.accepted.append(b"")
            self._tasks.append(asyncio.create_task(self._echo(connection, len(self.accepted) - 1)))

    async def _echo(self, connection: socket.socket, number: int) -> None:
        loop = asyncio.get_running_loop()
        with connection:
            while data := await loop.sock_recv(connection, 1 << 16):
                self.accepted[number] += data
                await loop.sock_sendall(connection, data)

    def vanish(self) -> None:
        self._path.unlink()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()


class Scene:
    """A migration from node01 to node02, a virt-handler on each; the target's migproxy runs where a test has it."""

    def __init__(self, kubernetes: Cluster, folder: Path, uid: str, protect: Callable[[], Security]) -> None:
        self.kubernetes, self.folder, self.uid, self.protect = kubernetes, folder, uid, protect
        self.source = LocalNode(NODES[0], SOURCE, folder)
        self.target = LocalNode(NODES[1], TARGET, folder)
        for node in (self.source, self.target):
            node.security = protect()
            node.boot_launcher(uid)
        self.launcher = Launcher(self.target.launchers / uid)
        owner = os.getuid(), os.getgid()
        self.theirs = [
            VirtHandler(str(node.address), node.launchers / uid, LIBVIRT, owner=owner)
            for node in (self.source, self.target)
        ]

    @property
    def relayed(self) -> int:
        """Connections that virt-handler's proxies have carried."""
        return self.theirs[0].relayed["source"]

    async def change(self, body: object) -> None:
        await self.kubernetes.request("PATCH", f"{VMIS}/one", body, MERGE_PATCH)

    async def announce(self, text: str) -> None:
        """What the target's migproxy writes."""
        body = {"metadata": {"annotations": {TARGET_ANNOTATION: text}}}
        token = self.kubernetes.token(NODES[1])
        await self.kubernetes.request("PATCH", f"{VMIS}/one", body, MERGE_PATCH, token=token)

    async def announced(self) -> str | None:
        annotations = (await self.kubernetes.request("GET", f"{VMIS}/one"))["metadata"].get("annotations") or {}
        found: str | None = annotations.get(TARGET_ANNOTATION)
        return found

    async def announced_port(self) -> int:
        """Where the libvirt channel's listener is announced."""
        text = await self.announced()
        assert text
        return int(text.split(" ")[2].split(":")[0])

    async def publish(self) -> None:
        """What the two virt-handlers do: the target's publishes, and the source's listens."""
        ports = self.theirs[1].start_target(self.uid)
        published = {"targetNodeAddress": TARGET, "targetDirectMigrationNodePorts": ports}
        await self.change({"status": {"migrationState": published}})
        self.theirs[0].start_source(self.uid, TARGET, ports)

    @asynccontextmanager
    async def source_runs(self) -> AsyncIterator[None]:
        kubeconfig = self.kubernetes.kubeconfig(self.folder, NODES[0])
        async with self.source.run(kubeconfig, beside=True):
            yield

    @asynccontextmanager
    async def target_runs(self) -> AsyncIterator[None]:
        kubeconfig = self.kubernetes.kubeconfig(self.folder, NODES[1])
        async with self.target.run(kubeconfig, beside=True):
            async with asyncio.timeout(20):
                while await self.announced() is None:
                    await asyncio.sleep(0.01)
            yield

    async def in_place(self) -> None:
        """Waits until the source's sockets stand over virt-handler's, and it knows what is announced."""
        folder = self.source.launchers / self.uid / "kubevirt/migrationproxy"
        kept = folder / f".virt-handler-{source_socket_name(self.uid, Channel.LIBVIRT)}"
        await eventually(kept.exists, "our socket over virt-handler's")
        text = await self.announced()
        await eventually(lambda: self.known() == text, "what is announced")

    def known(self) -> str | None:
        node: Node = self.source.node
        return node._vmis[self.uid].announced if self.uid in node._vmis else None

    def path(self) -> tuple[str, str]:
        found = self.source.migration("one")
        return found.get("path", ""), found.get("path_reason", "")

    def paths(self) -> list[tuple[str, str, int]]:
        found = self.source.migration("one")["paths"]
        return [(one["path"], one["reason"], one["connections"]) for one in found]

    def dial(self) -> socket.socket:
        near = socket.socket(socket.AF_UNIX)
        near.setblocking(False)
        with shortened(self.theirs[0].path(self.uid, Channel.LIBVIRT)) as path:
            near.connect(path)
        return near

    async def migrate(self, data: bytes = b"through") -> None:
        """A connection by the libvirt channel's path arrives at the target's launcher, and what is sent comes back."""
        before = len(self.launcher.accepted)
        await through(self.dial(), data)
        assert self.launcher.accepted[before:] == [data]


async def through(near: socket.socket, data: bytes = b"through") -> None:
    loop = asyncio.get_running_loop()
    with near:
        await loop.sock_sendall(near, data)
        answer = b""
        async with asyncio.timeout(60):
            while len(answer) < len(data) and (more := await loop.sock_recv(near, 1 << 16)):
                answer += more
    assert answer == data


@asynccontextmanager
async def migrating(kubernetes: Cluster, folder: Path, protect: Callable[[], Security]) -> AsyncIterator[Scene]:
    """A scene whose migration has been asked for.

    Args:
        protect: What protects the connections of a node's migproxy.
    """
    uid = (await kubernetes.request("POST", VMIS, vmi("one")))["metadata"]["uid"]
    made = Scene(kubernetes, folder, uid, protect)
    await made.change(begin("first"))
    try:
        yield made
    finally:
        for handler in made.theirs:
            await handler.close()
        await made.launcher.close()


@asynccontextmanager
async def listening(act: Act, *, at_once: bool = False) -> AsyncIterator[int]:
    """A port at a stranger's address, whose connections are dealt with one by one, or each at once."""
    tasks = set()
    async with AsyncExitStack() as stack:
        server = stack.enter_context(socket.create_server((STRANGER, 0)))
        server.setblocking(False)

        async def deal(connection: socket.socket) -> None:
            with connection:
                connection.setblocking(False)
                await act(connection)

        async def serve() -> None:
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(server)
                task = asyncio.create_task(deal(connection))
                tasks.add(task)
                if not at_once:
                    await task

        tasks.add(asyncio.create_task(serve()))
        try:
            yield server.getsockname()[1]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def say_nothing(_: socket.socket) -> None:
    await asyncio.Event().wait()


async def close(_: socket.socket) -> None:
    pass


async def say_something_else(connection: socket.socket) -> None:
    await asyncio.get_running_loop().sock_sendall(connection, b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await asyncio.get_running_loop().sock_recv(connection, 1 << 16)
