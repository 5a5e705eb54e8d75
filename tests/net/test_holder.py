"""A daemon that dies and comes again, a holder in trouble: migrations go on, and what is unprotected is told."""

import asyncio
import fcntl
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from demo.lab import Holder, background, until
from migproxy import control
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
    connect,
    receive,
    send,
)

pytestmark = pytest.mark.tier("gate")

PATTERN = os.urandom(16 * MIB)
UNPROTECTED, PROTECTED = "migrations would not survive a crash", "migrations are protected again"


class Held:
    """Two nodes whose daemons have a holder each."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.source, self.target = nodes.both
        self.holders = {node: Holder(node.directory) for node in nodes.both}
        self._idle = 0

    async def start(self, *options: str) -> Migration:
        """Starts everything, and a migration that is served."""
        for node, holder in self.holders.items():
            await holder.start()
            self._idle = holder.descriptors()
            await self.revive(node, *options)
        migration = self.nodes.migration()
        migration.begin()
        await migration.served()
        return migration

    async def revive(self, node: Daemon, *options: str) -> None:
        """Starts a node's daemon, with its holder."""
        await node.start(*options, env=self.holders[node].environment)

    async def kill(self, *nodes: Daemon) -> None:
        """Kills daemons, or both, and starts them again."""
        for node in nodes or self.nodes.both:
            await node.stop(signal.SIGKILL)
        for node in nodes or self.nodes.both:
            await self.revive(node)

    def state_file(self, node: Daemon) -> Path:
        """The state file of a node's daemon."""
        return node.control.with_suffix(".state.json")

    def is_on_record(self, node: Daemon) -> bool:
        """Whether the state file of a node's daemon knows of the one connection that is open."""
        proxies = json.loads(self.state_file(node).read_text())["proxies"]
        if not proxies or "direct" not in proxies[0]["channels"]:
            return False
        closed = proxies[0]["channels"]["direct"]["connections"]
        return closed == 1 and [one["channel"] for one in proxies[0]["relays"].values()] == ["direct"]

    def kept(self, node: Daemon) -> int:
        """How many descriptors a node's holder keeps."""
        return self.holders[node].descriptors() - self._idle

    async def reported(self, node: Daemon, *words: str) -> None:
        """Waits until the status tells a problem of the store with all these words; without words, of none."""

        def told() -> bool:
            problem = node.status()["store"]["problem"]
            return all(word in problem for word in words) if words and problem else not words and problem is None

        await until(told, f"{node.name}'s store to say {words or 'that all is well'}", 20)


@pytest.fixture
async def held(nodes: Nodes) -> AsyncIterator[Held]:
    made = Held(nodes)
    yield made
    for node in nodes.both:
        await node.stop()
    for holder in made.holders.values():
        await holder.stop(signal.SIGKILL)


async def accepted(migration: Migration, channel: Channel = Channel.DIRECT) -> socket.socket:
    """The next connection that arrives at the target's launcher."""
    return (await asyncio.wait_for(asyncio.get_running_loop().sock_accept(migration.listener(channel)), 20))[0]


def direct(migration: Migration, node: Daemon) -> dict[str, Any]:
    """What a node reports of the direct channel."""
    return next(one for one in migration.report(node)["channels"] if one["channel"] == "direct")


def established(port: int) -> bool:
    """Whether a daemon has accepted a connection on a port."""
    command = ["ss", "-Htnp", "state", "established", f"sport = {port}"]
    return "pid=" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


# A daemon that dies


@pytest.mark.parametrize("half_closed", [False, True])
async def test_connection_survives_each_daemon_and_both(held: Held, half_closed: bool) -> None:
    vm = await held.start()
    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        if half_closed:
            near.shutdown(socket.SHUT_WR)
            assert await asyncio.get_running_loop().sock_recv(far, 1) == b""
        for nodes in ((held.source,), (held.target,), (held.source, held.target)):
            await held.kill(*nodes)
            await asyncio.get_running_loop().sock_sendall(far, b"still here")
            assert await asyncio.get_running_loop().sock_recv(near, 100) == b"still here"
            if not half_closed:
                await assert_carries(near, far)
    vm.end()
    await vm.gone()


async def test_connections_wait_for_the_next_daemon(held: Held) -> None:
    vm = await held.start()
    await held.source.stop(signal.SIGKILL)
    with connect(vm.source_path(Channel.DIRECT)) as near:
        await held.revive(held.source)
        with await accepted(vm) as far:
            await assert_carries(near, far)
    await held.target.stop(signal.SIGKILL)
    with connect(vm.source_path(Channel.DIRECT)) as near:
        await held.revive(held.target)
        with await accepted(vm) as far:
            await assert_carries(near, far)


async def test_connection_that_is_being_set_up_is_set_up_by_the_next_daemon(held: Held) -> None:
    vm = await held.start()
    vm.close(Channel.DIRECT)
    with connect(vm.source_path(Channel.DIRECT)) as near:
        await until(lambda: established(vm.published()[Channel.DIRECT]), "the target to accept it")
        await held.kill()
        vm.listen(Channel.DIRECT)
        with await accepted(vm) as far:
            await assert_carries(near, far)


async def test_launchers_that_left_meanwhile_are_told_to_the_other_side(held: Held) -> None:
    vm = await held.start()
    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        await held.source.stop(signal.SIGKILL)
        near.sendall(b"last words")
        near.close()
        await held.revive(held.source)
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(far, 100), 20) == b"last words"
        await assert_ends(far)


async def test_migration_that_ended_meanwhile_is_ended(held: Held) -> None:
    vm = await held.start()
    async with vm.connection() as (near, far):
        for node in held.nodes.both:
            await node.stop(signal.SIGKILL)
        vm.end()
        for node in held.nodes.both:
            await held.revive(node)
        await assert_ends(near)
        await assert_ends(far)
    for node in held.nodes.both:
        await until(lambda node=node: vm.report(node).get("state") == "ended", "the migration to be over")  # type: ignore[misc]
        await until(lambda node=node: node.status()["store"]["descriptors"] == 0, "nothing to be stored")  # type: ignore[misc]


async def test_counters_go_on_and_nothing_is_left_in_the_holder(held: Held) -> None:
    for holder in held.holders.values():
        await holder.start()
    idle = {node: holder.descriptors() for node, holder in held.holders.items()}
    for node in held.nodes.both:
        await held.revive(node)
    vm = held.nodes.migration()
    vm.begin()
    await vm.served()
    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        await held.kill()
        await assert_carries(near, far)
    for node in held.nodes.both:
        await until(lambda node=node: direct(vm, node)["connections_open"] == 0, "the connection to be over")  # type: ignore[misc]
        counted = direct(vm, node)
        # One when the migration was served, of 64 bytes each way, and this one.
        assert (counted["connections_total"], counted["bytes_sent"], counted["bytes_received"]) == (2, 192, 192)
    vm.end()
    await vm.gone()
    for node, holder in held.holders.items():
        await until(lambda holder=holder, node=node: holder.descriptors() == idle[node], "the holder to be empty")  # type: ignore[misc]


async def test_handing_over_ends_at_once_and_leaves_everything_to_the_next(held: Held) -> None:
    vm = await held.start()
    async with vm.connection() as (near, far):
        for node in held.nodes.both:
            node.signal(signal.SIGUSR1)
            assert await node.ended() == 0
            await held.revive(node)
        await assert_carries(near, far)


async def test_user_space_tls_ends_with_its_daemon_and_the_next_one_says_so(held: Held, tmp_path: Path) -> None:
    cluster = Cluster.make(tmp_path / "pki")
    for node in held.nodes.both:
        node.protect("--tls-dir", str(cluster.folder), "--ktls", "off")
    vm = await held.start()
    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        await until(lambda: held.is_on_record(held.source), "the connection to be on record")
        await held.source.stop(signal.SIGKILL)
        await assert_ends(near)  # at once: nobody has started the next daemon
        await assert_ends(far)
        await held.revive(held.source)
        told = await assert_logged(held.source, "connection lost", "cannot be resumed", channel="direct")
        assert told["migration_uid"] == vm.migration_uid
        assert direct(vm, held.source)["failures"] == {"lost": 1}
    await vm.served()  # new ones are made


async def test_without_a_holder_it_is_said_once_that_nothing_is_protected(nodes: Nodes) -> None:
    await nodes.start()
    async with nodes.undisturbed():
        assert "NOTIFY_SOCKET" in nodes.source.status()["store"]["problem"]
    assert len([line for line in nodes.source.log.read_text().splitlines() if "NOTIFY_SOCKET" in line]) == 1


async def test_what_a_later_version_left_is_ended_cleanly(held: Held) -> None:
    vm = await held.start()
    async with vm.connection() as (near, far):
        await held.source.stop(signal.SIGKILL)
        held.state_file(held.source).write_text('{"version": 99, "what": "nobody knows yet"}')
        await held.revive(held.source)
        await assert_logged(held.source, "another version of migproxy left connections: they are ended", "99")
        await assert_ends(near)
        await assert_ends(far)
    await vm.served()
    await until(lambda: held.kept(held.source) == 3, "the holder to have the new listeners alone")


@pytest.mark.parametrize("content", [None, b"", b'{"version":1,"boo', b"\0" * 4096])
async def test_without_a_usable_state_file_connections_go_on_all_the_same(held: Held, content: bytes | None) -> None:
    vm = await held.start()
    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        await held.source.stop(signal.SIGKILL)
        if content is None:
            held.state_file(held.source).unlink()
        else:
            held.state_file(held.source).write_bytes(content)
        await held.revive(held.source)
        await assert_carries(near, far)
        if content is not None:
            await assert_logged(held.source, "the state file is of no use: what it counted is lost", "state.json")


@pytest.mark.tier("soak")
async def test_daemon_that_is_killed_again_and_again_while_it_starts(held: Held) -> None:
    vm = await held.start()
    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        for pause in range(1, 30):
            for node in held.nodes.both:
                await node.stop(signal.SIGKILL)
                await node.spawn(env=held.holders[node].environment)
            await asyncio.sleep(pause * 0.02)
        await held.kill()
        await assert_carries(near, far)


@pytest.mark.tier("soak")
async def test_short_connections_all_through_a_storm(held: Held) -> None:
    vm = await held.start()
    counts: Counter[str] = Counter()
    kills = 20
    async with background(answering(vm.listener(Channel.DIRECT))):
        over = asyncio.Event()
        clients = [asyncio.create_task(asking(vm.source_path(Channel.DIRECT), over, counts)) for _ in range(4)]
        for number in range(kills):
            enough = counts["whole"] + 10
            await held.kill(held.nodes.both[number % 2])
            await until(lambda enough=enough: counts["whole"] >= enough, "connections to be made again")  # type: ignore[misc]
        over.set()
        await asyncio.gather(*clients)
        for node in held.nodes.both:
            await until(lambda node=node: direct(vm, node)["connections_open"] == 0, "all to be over")  # type: ignore[misc]
            assert "lost" not in direct(vm, node)["failures"]
            await until(lambda node=node: held.kept(node) == 3, "only the listeners to be left")  # type: ignore[misc]
    print(f"{counts} of {kills} kills")
    # One that is accepted right when the daemon dies ends with it: a matter of tenths of a millisecond.
    assert counts["ended"] <= kills / 4


async def answering(listener: socket.socket) -> None:
    """Sends back what each connection to a listener brings."""
    loop = asyncio.get_running_loop()

    async def answer(sock: socket.socket) -> None:
        with sock, suppress(ConnectionError):
            await send(sock, await receive(sock))

    async with asyncio.TaskGroup() as tasks:
        while True:
            tasks.create_task(answer((await loop.sock_accept(listener))[0]))


async def asking(path: Path, over: asyncio.Event, counts: Counter[str]) -> None:
    """Makes one connection after the other, and counts those whose bytes came back whole, and those that ended."""
    while not over.is_set():
        with connect(path) as sock:
            try:
                await send(sock, PATTERN[:1000])
                sock.shutdown(socket.SHUT_WR)
                answer = await receive(sock)
            except ConnectionError:
                answer = b""
            assert answer in (b"", PATTERN[:1000])
            counts["whole" if answer else "ended"] += 1


async def test_holder_takes_no_harm_from_what_it_does_not_understand(held: Held) -> None:
    vm = await held.start()
    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        # Three listeners, two sockets and two pipes; what served before is let go by and by.
        await until(lambda: held.kept(held.source) == 7, "the holder to have what is open")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.connect(str(held.holders[held.source].socket))
            for message in (b"", b"\xff\0", b"FDSTORE=1", b"FDRETURN=1", b"FDSTOREREMOVE=1\nFDNAME=none", b"=" * 5000):
                socket.send_fds(stranger, [message], [])
            for message in (b"", b"FDRETURN=1", b"READY=1", b"FDSTOREREMOVE=1\nFDNAME=none"):
                socket.send_fds(stranger, [message], [stranger.fileno(), sys.stderr.fileno()])
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    socket.send_fds(stranger, [b"BARRIER=1"], [theirs.fileno()])
                assert await receive(ours) == b"", "all of that has been read"
        await until(lambda: held.kept(held.source) == 7, "the holder to have what it had")
        await held.kill(held.source)
        await assert_carries(near, far)


# A holder in trouble


async def test_dead_holder_is_told_and_the_next_is_given_everything(held: Held) -> None:
    vm = await held.start()
    holder = held.holders[held.source]
    async with vm.connection() as (near, far):
        await holder.stop(signal.SIGKILL)
        await held.reported(held.source, "gone")
        await assert_logged(held.source, UNPROTECTED, "gone", "start it again")
        await assert_carries(near, far)
        await vm.served()

        await holder.start()
        await held.reported(held.source)
        await assert_logged(held.source, PROTECTED)
        await held.kill(held.source)
        await assert_carries(near, far)


async def test_full_holder_is_told_and_the_rest_goes_unprotected(held: Held) -> None:
    vm = await held.start()
    holder = held.holders[held.source]
    await held.source.stop()
    await holder.stop()
    await holder.start("--limit", "2")
    await held.revive(held.source)
    await held.reported(held.source, "full", "2")
    await assert_logged(held.source, UNPROTECTED, "full", "--limit")
    await vm.served()


@pytest.mark.tier("soak")
@pytest.mark.parametrize("limit", range(3, 9))
async def test_what_a_full_holder_has_a_part_of_is_never_taken_for_the_whole(held: Held, limit: int) -> None:
    vm = await held.start()
    holder = held.holders[held.source]
    await held.source.stop()
    await holder.stop()
    await holder.start("--limit", str(limit))
    await held.revive(held.source)
    await vm.served()
    async with vm.connection() as (near, far), in_flight(near, far):
        await held.kill(held.source)
    await vm.served()


@asynccontextmanager
async def in_flight(near: socket.socket, far: socket.socket) -> AsyncIterator[None]:
    """Fills a connection up with bytes that nobody reads yet; at the end all of them arrive, or the first of them.

    Where it breaks, a unix socket only tells of an end: what arrived before must be without a gap.
    """
    sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(near, PATTERN))
    try:
        before = -1
        while before != (now := unread(far)):  # until it takes no more
            before = now
            await asyncio.sleep(0.2)
        yield
        received = bytearray()
        with suppress(ConnectionError):
            while len(received) < len(PATTERN):
                part = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(far, MIB), 20)
                if not part:
                    break
                received += part
        assert PATTERN.startswith(received), "there is a gap"
        if len(received) < len(PATTERN):
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(sending, 20)
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


def unread(sock: socket.socket) -> int:
    """Bytes that wait in a socket."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


async def test_what_a_slow_holder_has_a_part_of_is_never_taken_for_the_whole(held: Held) -> None:
    vm = await held.start()
    holder = held.holders[held.source]
    holder.signal(signal.SIGSTOP)
    async with vm.connection() as (near, far), in_flight(near, far):
        await held.source.stop(signal.SIGKILL)
        holder.signal(signal.SIGCONT)
        await held.revive(held.source)
    await vm.served()


async def test_slow_holder_is_told_and_holds_up_nobody(held: Held) -> None:
    vm = await held.start()
    holder = held.holders[held.source]
    async with vm.connection() as (near, far):
        holder.signal(signal.SIGSTOP)
        for _ in range(8):  # more than the queue of its socket takes
            async with vm.connection() as (new_near, new_far):
                await assert_carries(new_near, new_far)
        await held.reported(held.source, "slow")
        await assert_logged(held.source, UNPROTECTED, "slow")
        await assert_carries(near, far)

        holder.signal(signal.SIGCONT)
        await held.reported(held.source)
        stored = held.source.status()["store"]["descriptors"]
        await until(lambda: held.kept(held.source) == stored == 7, "the holder to have all, and nothing twice")
        await held.kill(held.source)
        await assert_carries(near, far)


# What a daemon leaves that ends in order


async def test_a_stop_leaves_nothing_in_the_holder_however_much_there_was(held: Held) -> None:
    first = await held.start()
    migrations = [first, *(held.nodes.migration(f"vm{number}") for number in range(20))]
    for migration in migrations[1:]:
        migration.begin()
    for migration in migrations:
        await migration.served(30)
    for node in held.nodes.both:
        assert await node.stop() == 0
        assert held.kept(node) == 0
        assert not held.state_file(node).exists()
        await held.revive(node)
    for migration in migrations:
        await migration.served(30)


@pytest.mark.tier("soak")
async def test_a_stop_with_a_holder_that_takes_nothing_leaves_nothing_that_the_next_daemon_takes_for_alive(
    held: Held,
) -> None:
    first = await held.start()
    migrations = [first, *(held.nodes.migration(f"vm{number}") for number in range(8))]
    for migration in migrations[1:]:
        migration.begin()
    for migration in migrations:
        await migration.served(30)
    holder = held.holders[held.target]
    holder.signal(signal.SIGSTOP)
    assert await held.target.stop() == 0
    holder.signal(signal.SIGCONT)
    await held.revive(held.target)
    for migration in migrations:
        await migration.served(30)


async def test_what_was_taken_over_goes_on_while_its_vmi_cannot_be_read(held: Held) -> None:
    vm = await held.start()
    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        whole = vm.path.read_text()
        for node in held.nodes.both:
            await node.stop(signal.SIGKILL)
        vm.path.write_text("status: [")
        for node in held.nodes.both:
            await node.spawn(env=held.holders[node].environment)
            await until(lambda node=node: has_read(node), "the daemon to have read what it can")  # type: ignore[misc]
            await assert_logged(node, "connection resumed", channel="direct")
        await asyncio.sleep(1.5)  # longer than the daemon's period: nothing is to happen, and nobody tells that
        await assert_carries(near, far)
        vm.path.write_text(whole)
        await vm.served(30)
        await assert_carries(near, far)
    vm.end()
    await vm.gone()


def has_read(node: Daemon) -> bool:
    """Whether a daemon knows what is in its folder, and what cannot be read there."""
    with suppress(control.ControlError):
        return node.status()["checks"]["synchronised"] is None
    return False


async def test_nothing_is_handed_over_to_a_daemon_that_would_not_start(held: Held) -> None:
    config = held.nodes.directory / "options.toml"
    config.write_text("")
    vm = await held.start("--config", str(config), "--drain-timeout", "600")
    vm.start()
    async with vm.connection() as (near, far):
        config.write_text("dial-timeout = -1\n")
        held.source.signal(signal.SIGUSR1)
        await assert_logged(
            held.source, "the next daemon would not start: draining instead of handing over", "dial-timeout"
        )
        await assert_logged(held.source, "draining: no new migration is taken")
        await assert_carries(near, far)
        vm.end()
        assert await held.source.ended(20) == 0


async def test_user_space_tls_is_waited_for_when_the_rest_is_handed_over(held: Held, tmp_path: Path) -> None:
    cluster = Cluster.make(tmp_path / "pki")
    for node in held.nodes.both:
        node.protect("--tls-dir", str(cluster.folder), "--ktls", "off")
    vm = await held.start("--drain-timeout", "600")
    async with vm.connection() as (near, far):
        held.source.signal(signal.SIGUSR1)
        await assert_logged(held.source, "waiting for connections that cannot be handed over")
        await assert_carries(near, far)
    assert await held.source.ended(20) == 0
    await assert_logged(held.source, "handed over")
    await held.revive(held.source)
    await vm.served()


@pytest.mark.tier("soak")
async def test_a_holder_that_answers_too_late_at_the_start_is_told_and_keeps_what_it_has(held: Held) -> None:
    vm = await held.start()
    holder = held.holders[held.source]
    async with vm.connection() as (near, far):
        await held.source.stop(signal.SIGKILL)
        holder.signal(signal.SIGSTOP)
        await held.source.spawn(env=holder.environment)
        await until(lambda: "did not give back" in held.source.log.read_text(), "the daemon to say it", 40)
        holder.signal(signal.SIGCONT)
        await vm.served(30)
        await held.reported(held.source, "did not give back")
        await held.kill(held.source)
        await assert_carries(near, far)


async def test_a_holder_that_is_told_to_end_waits_for_the_daemon(held: Held) -> None:
    await held.start()
    holder = held.holders[held.source]
    holder.signal(signal.SIGTERM)
    await until(lambda: "waiting for the daemon" in holder.log.read_text(), "the holder to wait")
    await held.kill(held.source)
    assert await held.source.stop() == 0
    assert await holder.ended() == 0
    assert "stopped" in holder.log.read_text()


@pytest.mark.tier("soak")
async def test_connections_of_a_burst_reach_the_launcher_once_whoever_dies_meanwhile(held: Held) -> None:
    """QEMU counts the connections of a migration: one too many, that comes and goes, and it waits for ever."""
    vm = await held.start()
    chance = random.Random(7)
    lost, rounds = 0, 9
    for number in range(rounds):
        dying = [(held.source,), (held.target,), held.nodes.both][number % 3]
        if number % 2:  # what there is to be handed over waits, and dies with the daemon
            for node in dying:
                held.holders[node].signal(signal.SIGSTOP)
        burst = [connect(vm.source_path(Channel.DIRECT)) for _ in range(8)]
        for identity, near in enumerate(burst):
            near.send(bytes([identity]))
        await asyncio.sleep(chance.uniform(0, 0.02))
        for node in dying:
            await node.stop(signal.SIGKILL)
            held.holders[node].signal(signal.SIGCONT)
        await held.kill(*dying)
        alive = {identity: near for identity, near in enumerate(burst) if not has_ended(near)}
        lost += len(burst) - len(alive)
        arrived = {}
        for _ in alive:
            far = await accepted(vm)
            (identity,) = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(far, 1), 20)
            arrived[identity] = far
        assert arrived.keys() == alive.keys()
        for identity, far in arrived.items():
            await assert_carries(alive[identity], far)
        with pytest.raises(BlockingIOError):
            vm.listener(Channel.DIRECT).accept()
        for sock in (*burst, *arrived.values()):
            sock.close()
    print(f"{lost} of {8 * rounds} connections ended with the daemon that was accepting them")
    assert lost <= rounds


def has_ended(sock: socket.socket) -> bool:
    """Whether the other side has closed a connection on which it has sent nothing."""
    return bool(select.select([sock], [], [], 0)[0])
