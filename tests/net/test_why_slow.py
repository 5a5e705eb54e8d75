"""What a migration is limited by, with real limits: a writer, a reader, a link, a CPU."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.lab import background, run, until
from tests.certificates import Cluster
from tests.net.nodes import Daemon, Migration, Nodes, assert_logged, make_nodes

CHUNK = 1 << 18
NAMESPACES = ("why1", "why2")
ADDRESSES = ("10.78.1.1", "10.78.2.1")
CPU = max(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Case:
    """What is in a migration's way.

    Attributes:
        by: What is to be named.
        write, read: Bytes per second that the source's QEMU writes, and that the target's reads; None: all it can.
        link: Bits per second of the router's link to the target; None: as it is.
        queue: Bytes that wait before that link.
        drop: Share of the packets that get lost on their way to the target.
        busy: The relay of the source shares its CPU with a process of real-time priority.
    """

    by: str
    write: float | None = None
    read: float | None = None
    link: int | None = None
    queue: int = 600_000
    drop: float = 0.0
    busy: bool = False


PURE = {
    "guest": Case("guest", write=50e6),
    "target": Case("target", read=20e6),
    "link": Case("network", link=100_000_000),
    "deep queue": Case("network", link=400_000_000, queue=30_000_000),
    "loss": Case("network", drop=0.3),
    "cpu": Case("source", busy=True),
}
CASES = PURE | {
    "guest below link": Case("guest", write=5e6, link=100_000_000),
    "link below guest": Case("network", write=50e6, link=100_000_000),
    "target below link": Case("target", read=5e6, link=100_000_000),
    "link below target": Case("network", read=20e6, link=100_000_000),
    "guest below target": Case("guest", write=10e6, read=20e6),
    "target below guest": Case("target", write=50e6, read=10e6),
    "link below cpu": Case("network", link=500_000, busy=True),
    "target below cpu": Case("target", read=2e5, busy=True),
}


@pytest.fixture
async def apart() -> AsyncIterator[Nodes]:
    """Two nodes in network namespaces of their own, with a router between them; not started."""
    async with AsyncExitStack() as stack:
        stack.push_async_callback(run, "umount", "/run/netns")  # which the first one is mounted on
        for name in (*NAMESPACES, "router"):
            await run("ip", "netns", "add", name)
            stack.push_async_callback(run, "ip", "netns", "delete", name)
            await run("ip", "-n", name, "link", "set", "lo", "up")
        await run("ip", "netns", "exec", "router", "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
        for name, address in zip(NAMESPACES, ADDRESSES, strict=True):
            gateway = f"{address.rpartition('.')[0]}.254"
            await run(
                "ip", "link", "add", "mig", "netns", name, "type", "veth", "peer", "name", name, "netns", "router"
            )
            for where, device, own in ((name, "mig", address), ("router", name, gateway)):
                await run("ip", "-n", where, "address", "add", f"{own}/24", "dev", device)
                await run("ip", "-n", where, "link", "set", device, "up")
            await run("ip", "-n", name, "route", "add", "default", "via", gateway)
        yield await stack.enter_async_context(make_nodes(*ADDRESSES))


async def start(nodes: Nodes, *tls: str) -> Migration:
    """Starts both daemons, with mTLS where options of it are given, and a migration."""
    for node, name in zip(nodes.both, NAMESPACES, strict=True):
        prefix = ["ip", "netns", "exec", name]
        await node.relay.start(prefix=prefix)
        if tls:
            node.protect(*tls)
        await node.start(prefix=prefix)
    migration = nodes.migration(block=False)
    migration.begin()
    await migration.served()
    return migration


def children(pid: int) -> list[int]:
    """The processes that a process has started: a relay's TLS workers."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


@asynccontextmanager
async def limited(case: Case, nodes: Nodes) -> AsyncIterator[None]:
    """Puts the network and the CPU of a case in the way."""
    if case.link:
        shape = f"rate {case.link} burst 64k limit {case.queue}"
        await run("ip", "netns", "exec", "router", "tc", "qdisc", "add", "dev", "why2", "root", "tbf", *shape.split())
    if case.drop:
        drop = f"-A INPUT -i mig -m statistic --mode random --probability {case.drop} -j DROP"
        await run("ip", "netns", "exec", "why2", "iptables", *drop.split())
    if not case.busy:
        yield
        return
    for pid in (nodes.source.relay.pid, *children(nodes.source.relay.pid)):
        await run("taskset", "-a", "-p", "-c", str(CPU), str(pid))
    hog = await asyncio.create_subprocess_exec(
        *("chrt", "--fifo", "50", "taskset", "-c", str(CPU), sys.executable, "-c", "while True: pass")
    )
    try:
        yield
    finally:
        hog.kill()
        await hog.wait()


async def paced(rate: float | None, step: Callable[[], Awaitable[int]]) -> None:
    """Calls `step`, which moves some bytes and returns how many, as fast as the rate allows, until it moves none."""
    loop = asyncio.get_running_loop()
    begun, moved = loop.time(), 0
    while count := await step():
        moved += count
        if rate and (ahead := moved / rate - (loop.time() - begun)) > 0:
            await asyncio.sleep(ahead)


def writing(near: socket.socket, data: bytes) -> Callable[[], Awaitable[int]]:
    async def step() -> int:
        await asyncio.get_running_loop().sock_sendall(near, data)
        return len(data)

    return step


def reading(far: socket.socket) -> Callable[[], Awaitable[int]]:
    into = bytearray(CHUNK)
    return lambda: asyncio.get_running_loop().sock_recv_into(far, into)


@asynccontextmanager
async def load(case: Case, migration: Migration, connections: int) -> AsyncIterator[None]:
    """Bytes go through, on so many connections."""
    data = os.urandom(CHUNK)
    async with AsyncExitStack() as stack:
        for _ in range(connections):
            near, far = await stack.enter_async_context(migration.connection())
            for rate, step in ((case.write, writing(near, data)), (case.read, reading(far))):
                await stack.enter_async_context(background(paced(rate and rate / connections, step)))
        yield


def shares(node: Daemon, migration: Migration) -> dict[str, float]:
    """Of the last ten seconds, by what limited them."""
    seconds = migration.report(node)["limited"]["now"]["seconds"]
    return {by: share / sum(seconds.values()) for by, share in seconds.items()}


async def assert_named(case: Case, nodes: Nodes, migration: Migration, seconds: int, connections: int = 1) -> None:
    async with limited(case, nodes), load(case, migration, connections):

        def passed() -> float:
            return float(sum(migration.report(nodes.source)["limited"]["all"]["seconds"].values()))

        before = passed()
        await until(lambda: passed() > before + seconds, "some seconds to pass", seconds + 20)
        source, target = shares(nodes.source, migration), shares(nodes.target, migration)
        assert source[case.by] >= 0.8, (source, target, migration.report(nodes.source))
        wanted = "target" if case.by == "target" else "upstream"
        assert target[wanted] >= 0.8, (source, target)
        assert migration.report(nodes.source)["limited"]["now"]["verdict"].split(" by ")[0].endswith(" %")


@pytest.mark.tier("gate")
async def test_what_a_migration_is_limited_by_is_named(apart: Nodes) -> None:
    migration = await start(apart)
    await assert_named(CASES["target"], apart, migration, 3)


@pytest.mark.tier("gate")
async def test_the_account_outlives_the_daemon_and_stands_in_the_log_at_the_end(apart: Nodes) -> None:
    migration = await start(apart)
    source = apart.source

    def told() -> dict[str, float]:
        return dict(migration.report(source)["limited"]["all"]["seconds"])

    async with load(CASES["guest"], migration, 1):
        await until(lambda: sum(told().values()) > 2, "two seconds to pass", 20)
        await source.stop(signal.SIGKILL)
        await source.start(prefix=["ip", "netns", "exec", "why1"])
        await until(lambda: sum(told().values()) > 2, "the seconds to be known again", 20)
    migration.end()
    line = await assert_logged(source, "migration relayed")
    assert " % by the guest" in line["limited"]
    assert line["seconds"] >= 2
    assert line["moved"].endswith(" MiB")


@pytest.mark.tier("soak")
@pytest.mark.alone
@pytest.mark.root
@pytest.mark.patience(120)
@pytest.mark.parametrize("protection", ["plaintext", "TLS"])
@pytest.mark.parametrize(("name", "connections"), [*((name, 1) for name in CASES), *((name, 8) for name in PURE)])
async def test_each_limit_and_the_tighter_of_two_is_named(
    name: str, connections: int, protection: str, apart: Nodes, tmp_path: Path
) -> None:
    tls = ("--tls-dir", str(Cluster.make(tmp_path / "pki").folder), "--ktls", "off") if protection == "TLS" else ()
    migration = await start(apart, *tls)
    await assert_named(CASES[name], apart, migration, 13, connections)
