"""By which path a connection goes beside virt-handler: ours where it works, else virt-handler's; none comes twice."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from migproxy.greeting import READY
from migproxy.portmap import Channel
from migproxy.source import Source
from migproxy.tls import Plaintext
from tests.clock import Clock, eventually
from tests.kube.beside import (
    STRANGER,
    TARGET,
    Act,
    Scene,
    close,
    listening,
    migrating,
    say_nothing,
    say_something_else,
    through,
)
from tests.kube.cluster import Cluster, end, start

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]


@pytest.fixture
async def scene(kubernetes: Cluster, tmp_path: Path) -> AsyncIterator[Scene]:
    async with migrating(kubernetes, tmp_path, Plaintext) as made:
        yield made


async def test_connection_goes_by_the_two_migproxies(scene: Scene) -> None:
    async with scene.target_runs(), scene.source_runs():
        await scene.publish()
        await scene.in_place()
        for _ in range(3):
            await scene.migrate()
        assert (scene.path(), scene.paths()) == (("migproxy", ""), [("migproxy", "", 3)])
        assert scene.relayed == 0
        (channel,) = [one for one in scene.source.migration("one")["channels"] if one["channel"] == "libvirt"]
        assert (channel["bytes_sent"], channel["bytes_received"]) == (21, 21), "the two's own words are not counted"
        (channel,) = [one for one in scene.target.migration("one")["channels"] if one["channel"] == "libvirt"]
        assert (channel["bytes_sent"], channel["bytes_received"]) == (21, 21)


async def test_it_goes_on_after_the_start_by_what_was_announced(scene: Scene) -> None:
    async with scene.target_runs(), scene.source_runs():
        await scene.publish()
        await scene.in_place()
        await scene.change(start())
        await eventually(lambda: scene.target.migration("one")["state"] == "running", "the start")
        await scene.migrate()
        assert scene.paths() == [("migproxy", "", 1)]
        await scene.change(end())
        await eventually(lambda: not scene.target.tcp_ports(), "the end of the listeners")
        async with asyncio.timeout(20):
            while await scene.announced() is not None:
                await asyncio.sleep(0.01)


async def test_without_the_targets_migproxy_it_goes_by_virt_handler(scene: Scene) -> None:
    async with scene.source_runs():
        await scene.publish()
        await scene.in_place()
        await scene.migrate()
        assert (scene.path(), scene.paths()) == (("virt-handler", "unannounced"), [("virt-handler", "unannounced", 1)])
        assert scene.relayed == 1
        async with scene.target_runs():  # late: what begins from now on goes by it
            await scene.in_place()
            await scene.migrate()
            assert scene.path() == ("migproxy", "")
            assert scene.relayed == 1


async def test_without_the_sources_migproxy_nothing_is_ours(scene: Scene) -> None:
    async with scene.target_runs():
        await scene.publish()
        await scene.migrate()
        assert scene.relayed == 1
        assert "channels" in scene.target.migration("one")


# What the target's migproxy may do instead of taking a connection


REFUSALS: dict[str, tuple[Act, str, float]] = {
    "says nothing": (say_nothing, "timeout", 0.45),
    "closes": (close, "refused", 0.0),
}
REFUSALS["says something else"] = (say_something_else, "refused", 0.0)


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_target_that_does_not_take_it_costs_half_a_second_once(scene: Scene, refusal: str, clock: Clock) -> None:
    act, reason, patience = REFUSALS[refusal]
    async with scene.source_runs(), listening(act) as port:
        await scene.announce(f"1 first {port}:0,{port + 1}:49152 {STRANGER}")
        await scene.publish()
        await scene.in_place()
        for number, longest in enumerate((patience, 0.0), 1):
            began = clock()
            await scene.migrate()
            assert round(clock() - began, 3) <= longest + 0.05
            assert scene.paths() == [("virt-handler", reason, number)]
        assert (scene.path(), scene.relayed) == (("virt-handler", reason), 2)
        assert STRANGER in scene.source.migration("one")["path_why"]


async def test_target_that_listens_no_more_costs_nothing(scene: Scene, clock: Clock) -> None:
    async with scene.source_runs():
        await scene.announce(f"1 first 1:0,2:49152 {STRANGER}")
        await scene.publish()
        await scene.in_place()
        began = clock()
        await scene.migrate()
        assert round(clock() - began, 3) <= 0.05
        assert scene.paths() == [("virt-handler", "unreachable", 1)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2 first 1:0,2:49152 127.77.0.9", "version"),
        ("first 1:0,2:49152 127.77.0.9", "version"),
        ("1 first 1:0 host", "malformed"),
        ("1 second 1:0,2:49152 127.77.0.9", "unannounced"),
        ("1 first 2:49152 127.77.0.9", "channel"),
    ],
)
async def test_announcement_that_is_of_no_use_is_not_tried(scene: Scene, text: str, reason: str, clock: Clock) -> None:
    async with scene.source_runs():
        await scene.announce(text)
        await scene.publish()
        await scene.in_place()
        began = clock()
        await scene.migrate()
        assert round(clock() - began, 3) <= 0.05
        assert scene.paths() == [("virt-handler", reason, 1)]


async def test_launcher_that_the_target_cannot_reach_is_virt_handlers_to_try_at_once(
    scene: Scene, clock: Clock
) -> None:
    async with scene.target_runs(), scene.source_runs():
        await scene.publish()
        await scene.in_place()
        scene.launcher.vanish()
        began = clock()
        with scene.dial() as near:
            assert await asyncio.get_running_loop().sock_recv(near, 1) == b""
        assert round(clock() - began, 3) <= 0.05
        assert (scene.relayed, scene.launcher.accepted) == (1, [])
        assert scene.paths() == [("virt-handler", "refused", 1)]
        (channel,) = [one for one in scene.target.migration("one")["channels"] if one["channel"] == "libvirt"]
        assert channel["failures"] == {"dial": 1}, "the target tells, too"


async def test_both_paths_closed_is_an_error_that_names_both(scene: Scene) -> None:
    async with scene.source_runs():
        await scene.announce(f"1 first 1:0,2:49152 {STRANGER}")
        await scene.publish()
        await scene.in_place()
        scene.theirs[0].die()
        with scene.dial() as near:
            assert await asyncio.get_running_loop().sock_recv(near, 1) == b""
        told = scene.source.migration("one")["last_error"]
        assert STRANGER in told
        assert "virt-handler's socket" in told


async def test_virt_handler_that_has_died_leaves_ours_to_be_tried_first_again(scene: Scene) -> None:
    async with scene.source_runs(), AsyncExitStack() as later:
        await scene.announce(f"1 first 1:0,2:49152 {STRANGER}")
        await scene.publish()
        await scene.in_place()
        await scene.migrate()
        scene.theirs[0].die()
        await later.enter_async_context(scene.target_runs())
        async with asyncio.timeout(20):
            while STRANGER in str(await scene.announced()):
                await asyncio.sleep(0.01)
        await scene.in_place()
        await scene.migrate()
        assert scene.path() == ("migproxy", "")


async def test_connections_arrive_in_the_order_in_which_they_were_made(scene: Scene) -> None:
    """QEMU before 8.0 takes the first of its parallel ones for the main one, whatever path the others take."""
    async with scene.source_runs(), listening(say_nothing) as port:
        await scene.announce(f"1 first {port}:0,{port + 1}:49152 {STRANGER}")
        await scene.publish()
        await scene.in_place()
        dialled = []
        for number in range(6):
            dialled.append(scene.dial())
            await asyncio.sleep(0.2)  # the first ones wait for the target meanwhile, the last ones do not
            await asyncio.get_running_loop().sock_sendall(dialled[-1], bytes([number]))
        await eventually(lambda: all(scene.launcher.accepted[5:6]), "the last one")
        assert [data[:1] for data in scene.launcher.accepted] == [bytes([number]) for number in range(6)]
        for near in dialled:
            near.close()


async def test_full_target_leaves_a_connection_to_virt_handler(scene: Scene) -> None:
    scene.target.max_connections = 1
    async with scene.target_runs(), scene.source_runs():
        await scene.publish()
        await scene.in_place()
        with scene.dial() as first:
            await asyncio.get_running_loop().sock_sendall(first, b"first")
            await eventually(lambda: scene.launcher.accepted == [b"first"], "the first one")
            await scene.migrate()
        assert scene.paths() == [("migproxy", "", 1), ("virt-handler", "refused", 1)]


@pytest.mark.parametrize("how", ["drained", "unready"])
async def test_who_is_on_the_way_when_ours_steps_aside_is_served_by_virt_handler(scene: Scene, how: str) -> None:
    async with scene.source_runs():
        await scene.publish()
        await scene.in_place()
        near = scene.dial()  # in the listener's queue, which nobody has looked at yet
        if how == "drained":
            (worker,) = scene.source.node._workers.values()
            assert isinstance(worker.proxy, Source)
            await worker.proxy.give_back()
        else:
            scene.source.node._around.relay._well_until = -10.0
            scene.source.node._around.relay.problem = "the relay is gone"
            scene.source.node._replan()
            scene.source.node._around.relay.problem = None
        await through(near)
        assert scene.relayed == 1


async def test_node_without_a_relay_leaves_new_migrations_to_virt_handler(scene: Scene) -> None:
    async with scene.target_runs(), scene.source_runs():
        await scene.publish()
        await scene.in_place()
        for node in (scene.source, scene.target):
            node.node._around.relay._lose("it has ended")
        await eventually(lambda: scene.path() == ("virt-handler", "unready"), "the source out of the path")
        async with asyncio.timeout(20):
            while await scene.announced() is not None:
                await asyncio.sleep(0.01)
        await scene.migrate()
        assert scene.relayed == 1


async def test_socket_that_is_our_own_is_no_way_to_virt_handler(scene: Scene) -> None:
    """The folder is the pod's: a connection that comes to itself would not end before nothing is left."""
    async with scene.source_runs():
        await scene.publish()
        await scene.in_place()
        path = scene.theirs[0].path(scene.uid, Channel.LIBVIRT)
        kept = path.with_name(f".virt-handler-{path.name}")
        kept.unlink()
        kept.hardlink_to(path)
        with scene.dial() as near:
            assert await asyncio.get_running_loop().sock_recv(near, 1) == b""
        assert len(scene.source.migration("one")["channels"]) >= 1
        (channel,) = [one for one in scene.source.migration("one")["channels"] if one["channel"] == "libvirt"]
        assert (channel["connections_total"], channel["connections_failed"]) == (0, 1)


async def test_connection_that_is_ready_first_does_not_overtake_one_that_goes_by_virt_handler(scene: Scene) -> None:
    heard: list[int] = []

    async def silent_to_the_first(connection: socket.socket) -> None:
        heard.append(1)
        if len(heard) == 1:
            await asyncio.sleep(0.3)
            return
        await asyncio.get_running_loop().sock_sendall(connection, READY)
        await asyncio.get_running_loop().sock_recv(connection, 1)

    async with scene.source_runs(), listening(silent_to_the_first, at_once=True) as port:
        await scene.announce(f"1 first {port}:0,{port + 1}:49152 {STRANGER}")
        await scene.publish()
        await scene.in_place()
        first, second = scene.dial(), scene.dial()
        loop = asyncio.get_running_loop()
        with first, second:
            await loop.sock_sendall(first, b"first")
            await loop.sock_sendall(second, b"second")
            await eventually(lambda: len(scene.launcher.accepted) == 2 and all(scene.launcher.accepted), "both")
        assert scene.launcher.accepted == [b"first", b"second"]
        assert scene.paths() == [("virt-handler", "refused", 2)]


# Who may come to an announced target


async def come(scene: Scene, words: bytes = b"") -> bytes:
    """Connects to the announced target as a source would, and says something; returns what is heard."""
    loop, heard = asyncio.get_running_loop(), b""
    with socket.socket() as tcp:
        tcp.setblocking(False)
        await loop.sock_connect(tcp, (TARGET, await scene.announced_port()))
        heard = await loop.sock_recv(tcp, 1)
        if words:
            await loop.sock_sendall(tcp, words)
            with suppress(ConnectionResetError):
                heard += await loop.sock_recv(tcp, 1)
    return heard


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n"])
async def test_who_does_not_say_the_last_word_reaches_no_launcher(scene: Scene, words: bytes) -> None:
    async with scene.target_runs():
        assert await come(scene, words) == READY
        await eventually(lambda: scene.target.migration("one")["channels"][0]["connections_failed"] == 1, "the failure")
        assert scene.launcher.accepted == []
