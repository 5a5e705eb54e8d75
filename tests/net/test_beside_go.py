"""One of the two nodes is what KubeVirt's proxy is made of (migproxy/bench/peer.go): many hashed streams, both ways."""

import asyncio
import hashlib
import os
import random
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from demo.lab import until
from migproxy.portmap import Channel
from tests.certificates import Cluster
from tests.missing import missing
from tests.net.nodes import MIB, Nodes, assert_logged, connect, receive, send

pytestmark = pytest.mark.tier("gate")

ROOT = Path(__file__).parents[2]
ADDRESS, PORT = "127.0.0.9", 7000


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program, compiled."""
    if not shutil.which("go"):
        missing("no Go compiler (golang-go)", "lab")
    folder = tmp_path_factory.mktemp("go")
    environment = os.environ | {"GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
    command = ["go", "build", "-o", str(folder / "peer"), str(ROOT / "migproxy/bench/peer.go")]
    subprocess.run(command, check=True, env=environment)
    return str(folder / "peer")


@asynccontextmanager
async def running(*command: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(*command)
    try:
        yield
    finally:
        process.kill()
        await process.wait()


async def exchange(pairs: list[tuple[socket.socket, socket.socket]], size: int) -> None:
    """Sends random bytes through all connections in both directions at once, and compares their hashes."""

    async def one_way(number: int, out: socket.socket, into: socket.socket) -> None:
        chance, sent = random.Random(number), hashlib.sha256()

        async def write() -> None:
            for _ in range(size // (MIB // 4)):
                data = chance.randbytes(MIB // 4)
                sent.update(data)
                await send(out, data)

        _, got = await asyncio.gather(write(), receive(into, size))
        assert hashlib.sha256(got).digest() == sent.digest()

    async with asyncio.TaskGroup() as tasks:
        for number, (near, far) in enumerate(pairs):
            tasks.create_task(one_way(2 * number, near, far))
            tasks.create_task(one_way(2 * number + 1, far, near))


@asynccontextmanager
async def connected(
    path: Path, listener: socket.socket, count: int
) -> AsyncIterator[list[tuple[socket.socket, socket.socket]]]:
    """Connections from one launcher to the other, by pairs."""
    pairs = []
    async with AsyncExitStack() as stack:
        for number in range(count):
            near = stack.enter_context(connect(path))
            await send(near, bytes((number,)))
            far, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(listener), 20)
            assert await receive(stack.enter_context(far), 1) == bytes((number,))
            pairs.append((near, far))
        yield pairs


@pytest.mark.parametrize("count", [1, 8, 32])
@pytest.mark.parametrize("role", ["source", "target"])
async def test_streams_cross_unchanged(nodes: Nodes, tmp_path: Path, peer: str, role: str, count: int) -> None:
    cluster = Cluster.make(tmp_path / "pki")
    for node in nodes.both:
        node.protect("--tls-dir", str(cluster.folder), "--ktls", "off")
    migration = nodes.migration(block=False)
    folder = migration.path.parent.parent
    if role == "source":  # of ours
        await nodes.source.start()
        path = folder / "go.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(64)
            listener.setblocking(False)
            async with running(peer, "target", str(path), f"{ADDRESS}:{PORT}", str(cluster.folder)):
                ports = {str(PORT): int(Channel.DIRECT)}
                migration.begin(to="elsewhere", targetNodeAddress=ADDRESS, targetDirectMigrationNodePorts=ports)
                await until(migration.source_path(Channel.DIRECT).is_socket, "the source's socket")
                async with connected(migration.source_path(Channel.DIRECT), listener, count) as pairs:
                    await exchange(pairs, 64 * MIB // count)
        opened = await assert_logged(nodes.source, "connection opened")
    else:
        await nodes.target.start()
        migration.begin()
        await until(lambda: Channel.DIRECT in migration.published(), "the target's ports")
        path = folder / "go.sock"
        address = f"{nodes.target.address}:{migration.published()[Channel.DIRECT]}"
        async with running(peer, "source", str(path), address, str(cluster.folder)):
            await until(path.is_socket, "the peer")
            async with connected(path, migration.listener(Channel.DIRECT), count) as pairs:
                await exchange(pairs, 64 * MIB // count)
        opened = await assert_logged(nodes.target, "connection opened")
    assert "TLSv1.3 TLS_AES_128_GCM_SHA256" in opened["security"]
