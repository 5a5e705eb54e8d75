"""mTLS with peers of another make, in both roles: OpenSSL's and GnuTLS' tools, and Go's crypto/tls, KubeVirt's."""

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from migproxy.transport import Transport
from tests.certificates import Cluster
from tests.missing import missing
from tests.relaying import carry

pytestmark = pytest.mark.tier("gate")

DEADLINE = 120.0
SIZE = 3_000_001


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def go_peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Go program of this folder, compiled."""
    go = shutil.which("go")
    if go is None:
        missing("no Go compiler (golang-go)", "lab")
    import subprocess

    out = tmp_path_factory.mktemp("go") / "peer"
    source = Path(__file__).with_name("peer") / "main.go"
    environment = {**os.environ, "GOCACHE": str(out.parent / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
    subprocess.run([go, "build", "-o", str(out), str(source)], check=True, env=environment)
    return out


class Ours:
    """This project's end of a connection: a launcher, and a relay with mTLS to the peer.

    Attributes:
        launcher: The launcher's end, not blocking.
    """

    def __init__(self, transport: Transport) -> None:
        self.launcher, unix = socket.socketpair(socket.AF_UNIX)
        self.launcher.setblocking(False)
        self.transport = transport
        self.run = asyncio.create_task(carry(unix, transport))

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.launcher, data)

    async def receive(self, count: int | None = None) -> bytes:
        """Reads `count` bytes, or to the end of the stream."""
        data = bytearray()
        while count is None or len(data) < count:
            if not (chunk := await asyncio.get_running_loop().sock_recv(self.launcher, 1 << 16)):
                break
            data += chunk
        return bytes(data)

    async def close(self) -> None:
        """Ends the launcher's side; raises what broke the connection, if anything did."""
        self.launcher.close()
        await self.run


async def start(*command: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


@asynccontextmanager
async def ended(peer: asyncio.subprocess.Process) -> AsyncIterator[None]:
    """Within this, a peer lives at most; on the way out it must have ended well by itself."""
    try:
        async with asyncio.timeout(DEADLINE):
            yield
            assert peer.stdin
            peer.stdin.close()
            status = await peer.wait()
            assert peer.stderr
            assert status == 0, (await peer.stderr.read()).decode()
    finally:
        if peer.returncode is None:
            peer.kill()
            await peer.wait()
        peer._transport.close()  # type: ignore[attr-defined]


async def dial(cluster: Cluster, port: int) -> Ours:
    """Connects as a source does, once the peer listens."""
    loop = asyncio.get_running_loop()
    while True:
        tcp = socket.socket()
        tcp.setblocking(False)
        try:
            await loop.sock_connect(tcp, ("127.0.0.1", port))
            break
        except ConnectionRefusedError:
            tcp.close()
            await asyncio.sleep(0.05)
    return Ours(await cluster.security().secure(tcp, server=False))


async def accept(cluster: Cluster, listener: socket.socket) -> Ours:
    """Accepts as a target does."""
    listener.setblocking(False)
    tcp, _ = await asyncio.get_running_loop().sock_accept(listener)
    return Ours(await cluster.security().secure(tcp, server=True))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def pair(cluster: Cluster, role: str) -> list[str]:
    files = cluster.files(role)
    return ["-cert", files.cert, "-key", files.key, "-CAfile", files.ca]


async def converse(ours: Ours, peer: asyncio.subprocess.Process) -> None:
    """Sends random bytes both ways at once through a tool that reads and writes its standard streams."""
    there, back = os.urandom(SIZE), os.urandom(SIZE)
    assert peer.stdin
    assert peer.stdout

    async def peer_sends() -> None:
        assert peer.stdin
        peer.stdin.write(back)
        await peer.stdin.drain()

    _, _, got_there, got_back = await asyncio.gather(
        ours.send(there), peer_sends(), peer.stdout.readexactly(SIZE), ours.receive(SIZE)
    )
    assert (got_there, got_back) == (there, back)


@pytest.mark.parametrize("version", ["1_2", "1_3"])
async def test_openssl_as_the_target(cluster: Cluster, version: str) -> None:
    port = free_port()
    options = ["-accept", f"127.0.0.1:{port}", "-naccept", "1", "-Verify", "2", "-verify_return_error"]
    peer = await start("openssl", "s_server", "-quiet", f"-tls{version}", *options, *pair(cluster, "server"))
    async with ended(peer):
        ours = await dial(cluster, port)
        assert f"TLSv{version.replace('_', '.')}" in ours.transport.label
        await converse(ours, peer)
        await ours.close()


@pytest.mark.parametrize("version", ["1_2", "1_3"])
async def test_openssl_as_the_source(cluster: Cluster, version: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = ["-connect", f"127.0.0.1:{listener.getsockname()[1]}", "-verify_return_error"]
        peer = await start("openssl", "s_client", "-quiet", f"-tls{version}", *options, *pair(cluster, "client"))
        async with ended(peer):
            ours = await accept(cluster, listener)
            await converse(ours, peer)
            await ours.close()


@pytest.mark.parametrize("command", ["K", "k"])
@pytest.mark.parametrize("role", ["target", "source"])
async def test_openssl_changes_its_keys(cluster: Cluster, role: str, command: str) -> None:
    """In the middle of the stream, and asks us to do so, too (K). Its tools take such commands from their input."""
    options = ["-tls1_3", "-verify_return_error"]
    async with AsyncExitStack() as stack:
        if role == "target":
            port = free_port()
            options += ["-accept", f"127.0.0.1:{port}", "-naccept", "1", "-Verify", "2"]
            peer = await stack.enter_async_context(started("openssl", "s_server", *options, *pair(cluster, "server")))
            ours = await dial(cluster, port)
        else:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            options += ["-connect", f"127.0.0.1:{listener.getsockname()[1]}"]
            peer = await stack.enter_async_context(started("openssl", "s_client", *options, *pair(cluster, "client")))
            ours = await accept(cluster, listener)
        assert peer.stdin
        assert peer.stdout
        for number in range(3):
            word = b"word %d\n" % number
            peer.stdin.write(command.encode() + b"\n")
            await ours.send(word)
            while not (line := await peer.stdout.readline()).endswith(word):
                assert line, "it has ended"  # before it says a few things of the handshake
            peer.stdin.write(word)  # not with the command: it would be taken for a part of that
            assert await ours.receive(len(word)) == word
        ours.launcher.close()
        peer.kill()
        with suppress(OSError):
            await ours.run


GNUTLS = {
    "1.2": "NORMAL:-VERS-ALL:+VERS-TLS1.2",
    "1.3": "NORMAL:-VERS-ALL:+VERS-TLS1.3",
    "1.3 with ChaCha20": "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+CHACHA20-POLY1305",
}


@pytest.mark.parametrize("priority", GNUTLS)
@pytest.mark.parametrize("role", ["target", "source"])
async def test_gnutls(cluster: Cluster, role: str, priority: str) -> None:
    if not shutil.which("gnutls-cli"):
        missing("no GnuTLS tools (gnutls-bin)", "lab")
    files = cluster.files("server" if role == "target" else "client")
    options = ["--priority", GNUTLS[priority], "--x509certfile", files.cert, "--x509keyfile", files.key]
    options += ["--x509cafile", files.ca]
    async with AsyncExitStack() as stack:
        if role == "target":
            port = free_port()
            options += ["--http", "--require-client-cert", "--verify-client-cert", "--port", str(port)]
            await stack.enter_async_context(started("gnutls-serv", *options))
            ours = await dial(cluster, port)
            await ours.send(b"GET / HTTP/1.0\r\n\r\n")
            answer = await ours.receive()  # to its close_notify
            assert answer.startswith(b"HTTP/1.0 200 OK")
            assert answer.rstrip().endswith(b"</HTML>")
        else:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = listener.getsockname()[1]
            options += ["--no-ca-verification", "--logfile", "/dev/null", "127.0.0.1", "--port", str(port)]
            peer = await stack.enter_async_context(started("gnutls-cli", *options))
            ours = await accept(cluster, listener)
            await converse(ours, peer)
        ours.launcher.close()
        with suppress(OSError):
            await ours.run


@asynccontextmanager
async def started(*command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A peer that ends with the context, whatever it does."""
    peer = await start(*command)
    try:
        async with asyncio.timeout(DEADLINE):
            yield peer
    finally:
        with suppress(ProcessLookupError):
            peer.kill()
        await peer.wait()
        peer._transport.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_go_as_the_target(cluster: Cluster, go_peer: Path, version: str) -> None:
    """Go reads to the end of what our launcher sends, and answers after it: the half-close crosses both ways."""
    peer = await start(str(go_peer), "server", "127.0.0.1:0", str(cluster.folder), version, "echo")
    async with ended(peer):
        assert peer.stdout
        ours = await dial(cluster, int(await peer.stdout.readline()))
        await assert_echoed(ours)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_go_as_the_source(cluster: Cluster, go_peer: Path, version: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        peer = await start(str(go_peer), "client", address, str(cluster.folder), version, "echo")
        async with ended(peer):
            await assert_echoed(await accept(cluster, listener))


async def assert_echoed(ours: Ours) -> None:
    data = os.urandom(SIZE)
    await ours.send(data)
    ours.launcher.shutdown(socket.SHUT_WR)
    assert await ours.receive() == data
    await ours.close()


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_a_peer_that_ends_both_directions_at_once_as_kubevirts_does(
    cluster: Cluster, go_peer: Path, version: str
) -> None:
    peer = await start(str(go_peer), "server", "127.0.0.1:0", str(cluster.folder), version, "both")
    async with ended(peer):
        assert peer.stdout
        ours = await dial(cluster, int(await peer.stdout.readline()))
        assert await ours.receive() == bytes(1 << 20)
        await ours.close()
