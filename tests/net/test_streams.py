"""Bytes through two daemons: whole, in order, both ways at once, and without slowing the daemons' control."""

import asyncio
import hashlib
import os
import re
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager

import pytest
from asyncinotify import Inotify, Mask

from demo.lab import run, until
from migproxy.portmap import Channel
from tests.net.nodes import (
    MIB,
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

CONNECTIONS = 8
RANDOM = memoryview(os.urandom(4 * MIB))


def send_stamped(sock: socket.socket, size: int, number: int) -> bytes:
    """Sends random bytes, each MiB with its stream's number and its position, and returns their hash."""
    digest = hashlib.blake2b()
    for position in range(0, size, MIB):
        start = (number * 131071 + position // MIB * 4099) % (3 * MIB)
        for part in (number.to_bytes(8) + position.to_bytes(8), RANDOM[start : start + MIB - 16]):
            digest.update(part)
            sock.sendall(part)
    sock.shutdown(socket.SHUT_WR)
    return digest.digest()


def receive_hashed(sock: socket.socket) -> tuple[int, bytes]:
    """Receives to the end of the stream; the number of bytes, and their hash."""
    digest, count, buffer = hashlib.blake2b(), 0, memoryview(bytearray(MIB))
    while part := sock.recv_into(buffer):
        digest.update(buffer[:part])
        count += part
    return count, digest.digest()


async def test_4_gib_each_way_over_8_connections_per_channel_arrive_whole(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    vm.start()
    size = 4096 * MIB // (CONNECTIONS * len(vm.channels)) // MIB * MIB
    streams = CONNECTIONS * len(vm.channels)

    async with AsyncExitStack() as stack:
        pairs = []
        for channel in vm.channels:
            for _ in range(CONNECTIONS):
                pairs.append(await stack.enter_async_context(vm.connection(channel)))
        for near, far in pairs:
            near.setblocking(True)
            far.setblocking(True)
        began = time.monotonic()
        with ThreadPoolExecutor(4 * streams) as threads:
            sending = [
                threads.submit(send_stamped, sock, size, 2 * number + side)
                for number, pair in enumerate(pairs)
                for side, sock in enumerate(pair)
            ]
            arriving = [threads.submit(receive_hashed, sock) for pair in pairs for sock in reversed(pair)]
            await asyncio.gather(*map(asyncio.wrap_future, sending))
            await asyncio.gather(*map(asyncio.wrap_future, arriving))
        print(f"{2 * streams * size / (time.monotonic() - began) / 1e9:.2f} GB/s, both ways together")

    assert [work.result() for work in arriving] == [(size, work.result()) for work in sending]
    for node in nodes.both:
        channels = vm.report(node)["channels"]
        await until(lambda node=node: vm.connections(node) == 0, "ends")  # type: ignore[misc]
        assert [one["bytes_sent"] for one in channels] == [CONNECTIONS * size + 64] * 3
        assert [one["bytes_received"] for one in channels] == [CONNECTIONS * size + 64] * 3


@pytest.mark.parametrize("first", ["near", "far"])
async def test_one_way_still_carries_after_the_other_way_has_ended(nodes: Nodes, first: str) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()

    async with vm.connection() as pair:
        ending, other = pair if first == "near" else reversed(pair)
        await send(ending, b"the last")
        ending.shutdown(socket.SHUT_WR)
        assert await receive(other) == b"the last"
        data = os.urandom(3 * MIB)
        sending = asyncio.create_task(send(other, data))
        assert await receive(ending, len(data)) == data
        await sending
        other.shutdown(socket.SHUT_WR)
        assert await receive(ending) == b""

    await assert_logged(nodes.source, "connection closed", channel="direct", migration_uid=vm.migration_uid)


async def test_small_messages_are_not_held_back(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()

    async with vm.connection(Channel.LIBVIRT) as (near, far):
        times = []
        for _ in range(200):
            began = time.perf_counter()
            await assert_carries(near, far)
            times.append(time.perf_counter() - began)
    print(f"64 bytes there and back: {1e6 * statistics.median(times):.0f} us")
    assert statistics.median(times) < 0.04  # a corked segment waits for 40 or 200 ms


@pytest.mark.parametrize("connections", [1_000, pytest.param(10_000, marks=pytest.mark.tier("soak"))])
async def test_many_short_connections_leave_descriptors_and_threads_where_they_were(
    nodes: Nodes, connections: int
) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    for _ in range(20):
        async with vm.connection() as (near, far):
            await assert_carries(near, far)
    await until(lambda: vm.connections(nodes.target) == 0, "idle")
    before = [(node.descriptors(), node.threads()) for node in nodes.both]
    workers = 8

    def serve() -> None:
        listener = vm.listener(Channel.DIRECT).dup()
        with listener:
            listener.setblocking(True)
            for _ in range(connections // workers):
                with listener.accept()[0] as sock:
                    sock.sendall(sock.recv(16))

    def use() -> None:
        for number in range(connections // workers):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(vm.source_path(Channel.DIRECT)))
                sock.sendall(number.to_bytes(16))
                assert sock.recv(16) == number.to_bytes(16)

    began = time.monotonic()
    with ThreadPoolExecutor(2 * workers) as threads:
        work = [threads.submit(job) for job in (serve, use) for _ in range(workers)]
        await asyncio.gather(*map(asyncio.wrap_future, work))
    print(f"{connections / (time.monotonic() - began):.0f} connections per second")

    for node, (fds, tasks) in zip(nodes.both, before, strict=True):
        await until(lambda node=node, fds=fds: node.descriptors() <= fds, f"{node.name}'s descriptors")  # type: ignore[misc]
        await until(lambda node=node, tasks=tasks: node.threads() <= tasks, f"{node.name}'s threads")  # type: ignore[misc]
        direct = next(one for one in vm.report(node)["channels"] if one["channel"] == "direct")
        assert (direct["connections_total"], direct["connections_failed"]) == (connections + 21, 0)


# Errors on one side reach the other


@pytest.mark.parametrize("first", ["near", "far"])
async def test_end_that_closes_with_unread_data_ends_the_other_side(nodes: Nodes, first: str) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()

    async with vm.connection() as pair:
        closing, other = pair if first == "near" else reversed(pair)
        await send(other, b"unread")
        await asyncio.wait_for(_readable(closing), 10)
        closing.close()
        await assert_ends(other)
    await until(lambda: vm.connections(nodes.source) == 0, "idle")


async def _readable(sock: socket.socket) -> None:
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


# The control plane


@contextmanager
def at_full_speed(pairs: list[tuple[socket.socket, socket.socket]]) -> Iterator[None]:
    """Sends through connections as fast as they take it, and discards what arrives, until the end."""
    with ExitStack() as stack:
        for near, far in pairs:
            near.setblocking(True)
            far.setblocking(True)
            # Processes of their own: in threads of this one, they would slow down the measuring itself.
            for process in (
                subprocess.Popen(["dd", "if=/dev/zero", "bs=1M"], stdout=near.fileno(), stderr=subprocess.DEVNULL),
                subprocess.Popen(["dd", "of=/dev/null", "bs=1M"], stdin=far.fileno(), stderr=subprocess.DEVNULL),
            ):
                stack.callback(process.wait)
                stack.callback(process.kill)
        yield


def latencies(nodes: Nodes, prefix: str, count: int) -> list[float]:
    """Milliseconds from a VMI's file being in place to its last source socket being there, for so many VMIs.

    The target's ports are in the file already: what is measured is the source alone.
    """
    measured = []
    for number in range(count):
        vm = nodes.migration(f"{prefix}{number}", block=False)
        with Inotify(sync_timeout=10) as watch:
            watch.add_watch(vm.folder(nodes.source), Mask.MOVED_TO)
            vm.begin(
                to="elsewhere",
                targetNodeAddress="127.0.0.9",
                targetDirectMigrationNodePorts={"5000": 0, "5001": 49152},
            )
            began = time.perf_counter()
            events = iter(watch)
            for _ in vm.channels:
                next(events)
            measured.append(1e3 * (time.perf_counter() - began))
        vm.path.unlink()
    return sorted(measured)


async def test_new_vmi_is_served_within_milliseconds_beside_8_connections_at_full_speed(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    vm.start()
    idle = latencies(nodes, "i", 50)

    async with AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(vm.connection()) for _ in range(CONNECTIONS)]
        with at_full_speed(pairs):
            before = vm.report(nodes.source)["channels"][1]["bytes_sent"]
            began = time.monotonic()
            busy = latencies(nodes, "b", 50)
            moved = vm.report(nodes.source)["channels"][1]["bytes_sent"] - before
            speed = moved / (time.monotonic() - began) / 1e9
    for name, times in ("idle", idle), (f"at {speed:.2f} GB/s", busy):
        print(f"sockets in place, {name}: p50 {times[25]:.1f} ms, p99 {times[-1]:.1f} ms")
    assert speed > 0.1
    assert busy[25] < 1000  # a loop that the pumps held up would not serve at all; the figures are printed


# TCP


async def tcp_options(vm: Migration) -> list[str]:
    """What ss tells of the established connections to the direct channel's port, both ends."""
    port = vm.published()[Channel.DIRECT]
    out = await run("ss", "-Htinoe", "state", "established", f"( sport = {port} or dport = {port} )")
    return re.sub(r"\n\s+", " ", out).strip().splitlines()


async def test_tcp_options_are_set_on_both_ends(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()

    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        ends = await tcp_options(vm)
    assert len(ends) == 2
    for end in ends:
        assert re.search(r"\bcubic\b", end)
        assert "timer:(keepalive," in end


async def test_connections_come_from_this_nodes_migration_address(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()

    async with vm.connection():
        ends = await tcp_options(vm)
    assert any(re.search(rf"{nodes.source.address}:\d+\s+{nodes.target.address}:\d+", end) for end in ends)


async def test_congestion_control_system_leaves_the_systems(nodes: Nodes) -> None:
    default = (await run("sysctl", "-n", "net.ipv4.tcp_congestion_control")).strip()
    await run("sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno")
    try:
        options = ["--congestion-control", "system"]
        await nodes.start(source=options, target=options)
        vm = nodes.migration()
        vm.begin()
        await vm.served()

        async with vm.connection():
            ends = await tcp_options(vm)
        assert len(ends) == 2
        assert all(re.search(r"\breno\b", end) for end in ends)
    finally:
        await run("sysctl", "-qw", f"net.ipv4.tcp_congestion_control={default}")


async def test_unavailable_congestion_control_is_told_once_and_does_without(nodes: Nodes) -> None:
    await nodes.start(target=["--congestion-control", "nonesuch"])
    vm = nodes.migration()
    vm.begin()
    await vm.served()

    event = "congestion control left at the system's default"
    (line,) = nodes.target.logged(event)
    assert line["wanted"] == "nonesuch"
    assert "--congestion-control" in line["remedy"]


async def test_ipv6_migration_addresses_serve_end_to_end() -> None:
    if not os.path.exists("/proc/net/if_inet6"):
        pytest.fail("this kernel has no IPv6")
    for number in (1, 2):
        await run("ip", "address", "add", f"fd00::{number}/128", "dev", "lo", "nodad")
    try:
        async with make_nodes("fd00::1", "fd00::2") as nodes:
            await nodes.start()
            vm = nodes.migration()
            vm.begin()
            await vm.served()
            assert vm.read()["targetNodeAddress"] == "fd00::2"
            assert vm.report(nodes.source)["channels"][0]["peer"].startswith("[fd00::2]:")
    finally:
        for number in (1, 2):
            await run("ip", "address", "delete", f"fd00::{number}/128", "dev", "lo")
