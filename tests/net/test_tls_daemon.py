"""Daemons with mTLS: bad peers reach nothing, a crowd of them disturbs nothing, certificates rotate under load."""

import asyncio
import hashlib
import os
import random
import socket
import ssl
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from demo.lab import background, until
from migproxy.portmap import Channel
from migproxy.tlserrors import TLSError
from tests.certificates import SOURCE, TARGET, Cluster, SecretMount, authority, client_context
from tests.net.nodes import MIB, Migration, Nodes, assert_carries, assert_ends, assert_logged, connect, receive, send

pytestmark = pytest.mark.tier("gate")


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster.make(tmp_path / "pki")


async def start(nodes: Nodes, *options: str) -> Migration:
    """Starts both daemons with mTLS, and a migration."""
    for node in nodes.both:
        node.protect()
    await nodes.start(source=options, target=options)
    migration = nodes.migration(block=False)
    migration.begin()
    await migration.served()
    return migration


def errors(nodes: Nodes) -> dict[str, int]:
    """What the target's daemon has refused, by reason."""
    return dict(nodes.target.status()["tls"]["errors"])


@asynccontextmanager
async def hashed_stream(migration: Migration) -> AsyncIterator[None]:
    """Bytes cross one connection both ways all the while, and arrive as they were sent."""
    going = True

    async def one_way(out: socket.socket, into: socket.socket, seed: int) -> int:
        chance, sent, got, size = random.Random(seed), hashlib.sha256(), hashlib.sha256(), 0
        while going:
            data = chance.randbytes(MIB // 4)
            sent.update(data)
            reading = asyncio.create_task(receive(into, len(data)))
            await send(out, data)
            got.update(await reading)
            size += len(data)
        assert sent.digest() == got.digest()
        return size

    async with migration.connection() as (near, far):
        ways = [asyncio.create_task(one_way(near, far, 1)), asyncio.create_task(one_way(far, near, 2))]
        try:
            yield
        finally:
            going = False
            moved = await asyncio.gather(*ways)
    assert min(moved) > MIB


async def test_a_migration_crosses_with_mtls_and_a_bad_peer_reaches_nothing(nodes: Nodes, cluster: Cluster) -> None:
    migration = await start(nodes, "--tls-dir", str(cluster.folder), "--ktls", "off")
    listener = migration.listener(Channel.DIRECT)
    port = migration.published()[Channel.DIRECT]
    for words, reason in ((b"GET / HTTP/1.1\r\n\r\n", "not_tls"), (b"\x16\x03\x01", "closed_in_handshake")):
        with socket.create_connection((nodes.target.address, port)) as bad:
            bad.sendall(words)
            with suppress(OSError):  # it may be refused already
                bad.shutdown(socket.SHUT_WR)
            await until(lambda reason=reason: reason in errors(nodes), f"a refusal: {reason}")  # type: ignore[misc]
        line = await assert_logged(nodes.target, "connection failed", reason=reason)
        assert line["migration_uid"] == migration.migration_uid
        assert (line["channel"], line["remote"]) == ("direct", nodes.target.address.rsplit(".", 1)[0] + ".1")
    with pytest.raises(BlockingIOError):
        listener.accept()  # nobody was connected to the launcher for them
    async with migration.connection() as (near, far):
        await assert_carries(near, far)
    opened = await assert_logged(nodes.source, "connection opened")
    assert "TLSv1.3" in opened["security"]
    assert "kubevirt.io:system:node:virt-handler" in opened["security"]


async def test_a_source_of_another_cluster_is_told_apart_on_both_sides(
    nodes: Nodes, cluster: Cluster, tmp_path: Path
) -> None:
    stranger = Cluster.make(tmp_path / "stranger")
    for node in nodes.both:
        node.protect()
    await nodes.source.start("--tls-dir", str(stranger.folder), "--ktls", "off")
    await nodes.target.start("--tls-dir", str(cluster.folder), "--ktls", "off")
    migration = nodes.migration(block=False)
    migration.begin()
    await until(migration.is_served, "the listeners")
    with socket.socket(socket.AF_UNIX) as launcher:
        launcher.connect(str(migration.source_path(Channel.DIRECT)))
        await assert_logged(nodes.source, "connection failed", reason="wrong_ca")
        await assert_logged(nodes.target, "connection failed", reason="refused_by_peer")


async def test_connections_reach_the_launcher_in_the_order_in_which_they_were_made(
    nodes: Nodes, cluster: Cluster
) -> None:
    """QEMU before 8.0 takes the first of its parallel connections for the main one."""
    migration = await start(nodes, "--tls-dir", str(cluster.folder), "--ktls", "off")
    listener = migration.listener(Channel.DIRECT)
    for _ in range(10):
        with ExitStack() as stack:
            for number in range(16):
                near = stack.enter_context(connect(migration.source_path(Channel.DIRECT)))
                await send(near, bytes([number]))
            arrived = []
            for _ in range(16):
                far, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(listener), 60)
                arrived.append((await receive(stack.enter_context(far), 1))[0])
            assert arrived == list(range(16))


async def test_silent_peers_keep_no_real_one_out(nodes: Nodes, cluster: Cluster) -> None:
    options = ("--max-handshakes", "16", "--max-connections", "4", "--handshake-timeout", "600")
    migration = await start(nodes, "--tls-dir", str(cluster.folder), "--ktls", "off", *options)
    address = (nodes.target.address, migration.published()[Channel.DIRECT])
    with ExitStack() as silent:
        for _ in range(100):
            silent.enter_context(socket.create_connection(address))
        await until(lambda: errors(nodes).get("handshake_displaced") == 84, "all but 16 of them to be given up")
        for _ in range(5):
            async with migration.connection() as (near, far):
                await assert_carries(near, far)


async def test_a_slow_handshake_comes_through_beside_silent_peers_of_hundreds_of_addresses(
    nodes: Nodes, cluster: Cluster
) -> None:
    migration = await start(nodes, "--tls-dir", str(cluster.folder), "--ktls", "off", "--handshake-timeout", "600")
    address = (nodes.target.address, migration.published()[Channel.DIRECT])
    loop, arrived, said = asyncio.get_running_loop(), ssl.MemoryBIO(), ssl.MemoryBIO()
    context = client_context(cluster.folder / "ca.crt", cluster.folder / "client")
    real = context.wrap_bio(arrived, said)
    with socket.create_connection(address) as tcp, ExitStack() as silent:
        tcp.setblocking(False)
        with suppress(ssl.SSLWantReadError):
            real.do_handshake()
        await send(tcp, said.read())
        arrived.write(await loop.sock_recv(tcp, 1 << 16))
        for number in range(900):
            peer = silent.enter_context(socket.socket())
            peer.bind((f"127.0.{8 + number // 200}.{number % 200 + 1}", 0))
            peer.connect(address)
        await until(lambda: errors(nodes).get("handshake_displaced", 0) >= 900 - 256, "the surplus to be given up")
        while True:
            with suppress(ssl.SSLWantReadError):
                real.do_handshake()
                break
            arrived.write(await asyncio.wait_for(loop.sock_recv(tcp, 1 << 16), 30))
        await send(tcp, said.read())
        far, _ = await asyncio.wait_for(loop.sock_accept(migration.listener(Channel.DIRECT)), 30)
        with far:
            real.write(b"memory")
            await send(tcp, said.read())
            assert await receive(far, 6) == b"memory"


async def test_a_flood_of_refused_peers_does_not_flood_the_log(nodes: Nodes, cluster: Cluster) -> None:
    migration = await start(nodes, "--tls-dir", str(cluster.folder), "--ktls", "off")
    address = (nodes.target.address, migration.published()[Channel.DIRECT])
    for _ in range(200):
        with socket.create_connection(address) as bad:
            bad.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(ConnectionResetError):
                bad.recv(1)
    migration.end()
    await assert_logged(nodes.target, "proxy ended")
    assert errors(nodes) == {"not_tls": 200}
    written = len(nodes.target.logged("connection failed", reason="not_tls"))
    counted = [line["count"] for line in nodes.target.logged("more connections failed", reason="not_tls")]
    assert written + sum(counted) == 200
    assert written + len(counted) <= 40


@asynccontextmanager
async def target_of_the_tests_own(
    nodes: Nodes, cluster: Cluster, serve: Callable[[int, socket.socket], Awaitable[None]]
) -> AsyncIterator[Migration]:
    """A source's daemon, and in place of the target's, `serve` with the number of each connection."""
    nodes.source.protect()
    await nodes.source.start("--tls-dir", str(cluster.folder), "--ktls", "off")
    with socket.create_server(("127.0.0.9", 0)) as listener:
        listener.setblocking(False)

        async def accept() -> None:
            for number in count(1):
                tcp, _ = await asyncio.get_running_loop().sock_accept(listener)
                tcp.setblocking(False)
                await serve(number, tcp)

        async with background(accept()):
            migration = nodes.migration(block=False)
            ports = {str(listener.getsockname()[1]): int(Channel.DIRECT)}
            migration.begin(to="elsewhere", targetNodeAddress="127.0.0.9", targetDirectMigrationNodePorts=ports)
            await until(migration.source_path(Channel.DIRECT).is_socket, "the source's socket")
            yield migration


@pytest.mark.parametrize(
    ("answer", "by_reset", "words"),
    [
        (b"", False, "the target closed the connection before the TLS handshake: its launcher's socket"),
        (b"", True, "the target closed the connection before the TLS handshake: its launcher's socket"),
        (b"\x16\x03\x03\0\x7a", False, "the peer closed the connection during the TLS handshake"),
    ],
    ids=["end", "reset", "amid"],
)
async def test_a_target_that_breaks_the_handshake_off_is_told_at_once_and_not_dialled_again(
    nodes: Nodes, cluster: Cluster, answer: bytes, by_reset: bool, words: str
) -> None:
    """KubeVirt's has its launcher see each attempt, and closes where that has no socket."""
    dialled = 0

    async def serve(number: int, tcp: socket.socket) -> None:
        nonlocal dialled
        dialled = number
        with tcp:
            await asyncio.get_running_loop().sock_recv(tcp, 1 << 16)
            tcp.send(answer)
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", by_reset, 0))

    async with target_of_the_tests_own(nodes, cluster, serve) as migration:
        with connect(migration.source_path(Channel.DIRECT)) as near:
            await assert_ends(near)
            told = await assert_logged(nodes.source, "connection failed", reason="closed_in_handshake")
    assert words in told["error"]
    assert ("127.0.0.9:" in told["error"]) == (not answer)
    assert dialled == 1


@pytest.mark.parametrize("by_reset", [False, True], ids=["end", "reset"])
async def test_a_migproxy_that_breaks_a_handshake_off_is_dialled_again(
    nodes: Nodes, cluster: Cluster, by_reset: bool
) -> None:
    """Its launcher has seen nothing of the attempt, unlike KubeVirt's. Which it is, its first handshake tells."""
    ours, dialled, kept = cluster.security(), 0, ExitStack()

    async def serve(number: int, tcp: socket.socket) -> None:
        nonlocal dialled
        dialled = number
        kept.enter_context(tcp)
        if number in (2, 3):
            await asyncio.get_running_loop().sock_recv(tcp, 1 << 16)
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", by_reset, 0))
            tcp.close()
        else:
            await ours.secure(tcp, server=True)

    with kept:
        async with target_of_the_tests_own(nodes, cluster, serve) as migration:
            for served in (1, 2):
                kept.enter_context(connect(migration.source_path(Channel.DIRECT)))
                await until(lambda n=served: len(nodes.source.logged("connection opened")) == n, "it to be served")  # type: ignore[misc]
    assert dialled == 4
    assert not nodes.source.logged("connection failed")


async def test_a_target_that_is_not_whom_it_must_be_is_not_dialled_again(
    nodes: Nodes, cluster: Cluster, tmp_path: Path
) -> None:
    stranger, dialled = Cluster.make(tmp_path / "stranger").security(), 0

    async def serve(number: int, tcp: socket.socket) -> None:
        nonlocal dialled
        dialled = number
        with suppress(TLSError), tcp:
            await stranger.secure(tcp, server=True)

    async with target_of_the_tests_own(nodes, cluster, serve) as migration:
        with connect(migration.source_path(Channel.DIRECT)) as near:
            await assert_ends(near)
            await assert_logged(nodes.source, "connection failed", reason="wrong_ca")
    assert dialled == 1


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.tier("soak"))])
async def test_malformed_handshakes_disturb_nothing(nodes: Nodes, cluster: Cluster, count: int) -> None:
    migration = await start(nodes, "--tls-dir", str(cluster.folder), "--ktls", "off", "--log-level", "error")
    port = migration.published()[Channel.LIBVIRT]
    async with hashed_stream(migration):
        await bombard(nodes.target.address, port, 2_000)  # until every pool and cache has its size
        descriptors, memory = nodes.target.descriptors(), resident(nodes.target.pid)
        refused = sum(errors(nodes).values())
        await bombard(nodes.target.address, port, count)
        assert sum(errors(nodes).values()) - refused >= 0.99 * count  # a changed random number is no malformation
        await until(lambda: nodes.target.descriptors() <= descriptors, "the descriptors to come back")
        assert resident(nodes.target.pid) < memory + 30 * MIB
    async with migration.connection(Channel.LIBVIRT) as (near, far):
        await assert_carries(near, far)


async def bombard(address: str, port: int, count: int) -> None:
    """Sends malformed handshakes from a process of its own."""
    program = str(Path(__file__).with_name("malformed.py"))
    process = await asyncio.create_subprocess_exec(sys.executable, program, address, str(port), str(count), str(count))
    try:
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def resident(pid: int) -> int:
    """Bytes of memory that a process has in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.tier("soak"))])
async def test_ca_and_pairs_rotate_each_second_under_load_and_nobody_notices(
    nodes: Nodes, tmp_path: Path, seconds: int
) -> None:
    """Each second a new CA signs new pairs. As in KubeVirt, a CA is in the bundle before and after its time."""
    mounts = {role: SecretMount(tmp_path / role) for role in ("server", "client", "ca")}
    authorities = [authority(f"CA {number}") for number in range(3)]

    def rotate() -> None:
        mounts["ca"].put({"ca-bundle": b"".join(ca.pem() for ca in authorities[-3:])})
        for role, leaf in (("server", TARGET), ("client", SOURCE)):
            issued = authorities[-2].issue(leaf)
            mounts[role].put({"tls.crt": issued.pem(), "tls.key": issued.key_pem()})

    rotate()
    folders = ("--tls-server-dir", str(mounts["server"].folder), "--tls-client-dir", str(mounts["client"].folder))
    migration = await start(nodes, *folders, "--tls-ca", str(mounts["ca"].folder), "--ktls", "off")
    deadline, rotations, connections = time.monotonic() + seconds, 0, 0
    async with hashed_stream(migration):
        next_rotation = time.monotonic()
        while time.monotonic() < deadline:
            if time.monotonic() >= next_rotation:
                authorities = [*authorities[1:], authority(f"CA {rotations + 3}")]
                rotate()
                rotations += 1
                next_rotation += 1
            async with migration.connection(Channel.LIBVIRT) as (near, far):
                await assert_carries(near, far)
            connections += 1
    assert rotations >= seconds // 2
    assert connections > rotations
    for node in nodes.both:
        assert node.status()["tls"]["errors"] == {}
        assert node.status()["tls"]["reloads"] >= rotations
        assert not node.logged("connection failed") + node.logged("connection broken")
