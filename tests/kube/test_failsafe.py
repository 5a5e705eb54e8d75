"""The failsafe: what a killed daemon has left in virt-handler's way is given back, whoever follows."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from demo.lab import MIGPROXY, end, until
from migproxy.inventory import BYPASSED
from migproxy.lifeline import Lifeline
from migproxy.status import render
from tests.kube.cluster import NODES, VMIS, Cluster, begin, start, vmi
from tests.kube.gate import Gate
from tests.kube.test_beside_source import Scene, through
from tests.kube.test_beside_target import (
    THEIRS,
    announced,
    change,
    publish,
    published,
    until_announced,
    until_withdrawn,
)
from tests.kube.world import LocalNode
from tests.net.nodes import Daemon

ADDRESS = "127.77.0.1"
HERE, THERE = NODES


class Protected(Scene):
    """A node whose daemon and whose failsafe are processes, and a VMI that migrates from it, or to it.

    Attributes:
        daemon: `migproxy run`.
        log: The failsafe's.
    """

    def __init__(self, kubernetes: Cluster, node: LocalNode, uid: str, target: socket.socket, url: str) -> None:
        super().__init__(kubernetes, node, uid, target)
        self.folder_of_node = node.launchers.parent
        kubeconfig = kubernetes.kubeconfig(self.folder_of_node, HERE, url)
        owner = f"{os.getuid()}:{os.getgid()}"
        self.options = ["--kubeconfig", str(kubeconfig), "--launcher-run-dir", f"{node.launchers}/{{uid}}"]
        self.options += ["--socket-owner", owner]
        beside = ["--beside-virt-handler", "--migration-address", ADDRESS]
        self.daemon = Daemon(HERE, ADDRESS, self.folder_of_node / "daemon", *self.options, *beside)
        self.log = self.folder_of_node / "failsafe.log"
        self.failsafe: asyncio.subprocess.Process

    @asynccontextmanager
    async def watched_over(self) -> AsyncIterator[None]:
        """The failsafe runs while the context lasts, and ends by itself once the daemon has."""
        options = ["--node-name", HERE, "--control-socket", str(self.daemon.control), "--log-format", "json"]
        command = [*MIGPROXY, "failsafe", *self.options, *options]
        with self.log.open("wb") as log:
            self.failsafe = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        try:
            yield
            await self.daemon.stop()
            if self.failsafe.returncode is None:
                await self.complete()
        finally:
            if self.failsafe.returncode is None:
                self.failsafe.kill()
                await self.failsafe.wait()

    async def complete(self) -> None:
        """The failsafe has looked at everything since the daemon's death: told to end, it does that first."""
        assert await end(self.failsafe, signal.SIGTERM) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()

    async def in_path(self) -> None:
        """virt-handler has prepared the source, and ours lead there."""
        self.prepare()
        await until(self.is_ours, "our sockets over virt-handler's")

    async def kill(self) -> None:
        """The daemon dies, and nobody starts it anew."""
        await self.daemon.stop(signal.SIGKILL)

    def told(self, event: str) -> bool:
        """Whether the failsafe has logged that."""
        return f'"{event}"' in self.log.read_text()


@pytest.fixture
async def killable(kubernetes: Cluster, tmp_path: Path, door: Gate) -> AsyncIterator[Protected]:
    await kubernetes.install_beside()
    uid = (await kubernetes.request("POST", VMIS, vmi("one")))["metadata"]["uid"]
    node = LocalNode(HERE, ADDRESS, tmp_path)
    node.boot_launcher(uid)
    with socket.create_server(("127.77.0.3", 0)) as target:
        target.setblocking(False)
        made = Protected(kubernetes, node, uid, target, door.url)
        async with made.watched_over():
            yield made
        await made.virt_handler.close()


async def test_killed_daemons_sources_go_by_virt_handler_again_until_there_is_another_daemon(
    killable: Protected,
) -> None:
    scene = killable
    await scene.daemon.start()
    await scene.change(begin("first"))
    await scene.publish()
    await scene.in_path()

    await scene.kill()
    await until(lambda: not scene.is_ours(), "virt-handler's sockets")
    assert {path.name[:4] for path in scene.folder.iterdir()} == {scene.uid[:4]}, "nothing is left beside them"
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}
    assert any("daemon does not run" in one for one in await scene.events(BYPASSED))

    await scene.daemon.start()
    await until(scene.is_ours, "our sockets again")
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}


async def test_killed_daemons_announcement_goes_before_virt_handler_publishes(killable: Protected) -> None:
    scene = killable
    await scene.daemon.start()
    await scene.change(begin("first", source=THERE, target=HERE))
    await until_announced(scene.kubernetes)

    await scene.kill()
    await until_withdrawn(scene.kubernetes)
    await publish(scene.kubernetes, targetNodeAddress=ADDRESS)
    assert (await published(scene.kubernetes))["ports"] == THEIRS


async def test_what_is_published_or_runs_is_left_to_the_next_daemon(killable: Protected) -> None:
    scene = killable
    await scene.daemon.start()
    await scene.change(begin("first"))
    await scene.publish()
    await scene.in_path()
    await scene.change(start())
    await scene.kubernetes.request("POST", VMIS, vmi("two", node=THERE))
    await change(scene.kubernetes, begin("second", source=THERE, target=HERE), "two")
    await until_announced(scene.kubernetes, "two")
    await publish(scene.kubernetes, "two", targetNodeAddress=ADDRESS)
    ports = (await published(scene.kubernetes, "two"))["ports"]
    assert ports != THEIRS

    await scene.kill()
    await scene.complete()

    assert scene.is_ours()
    assert await announced(scene.kubernetes, "two")
    assert (await published(scene.kubernetes, "two"))["ports"] == ports
    await scene.daemon.start()
    await scene.connect()
    assert not scene.virt_handler.relayed


async def test_what_cannot_be_given_back_at_once_is_tried_again(killable: Protected, door: Gate) -> None:
    scene = killable
    await scene.daemon.start()
    await scene.change(begin("first", source=THERE, target=HERE))
    await until_announced(scene.kubernetes)

    door.refuse = lambda request: 500 if request.method == "PATCH" else None
    await scene.kill()
    await until(lambda: scene.told("cannot give back, trying again"), "a refusal")
    door.refuse = lambda request: None
    await until_withdrawn(scene.kubernetes)


async def test_api_server_that_is_away_at_the_daemons_death_is_waited_for(killable: Protected, door: Gate) -> None:
    scene = killable
    await scene.daemon.start()
    await scene.change(begin("first"))
    await scene.publish()
    await scene.in_path()

    await door.close()
    await scene.kill()
    await until(
        lambda: scene.told("the daemon does not run: looking for what one has left in virt-handler's way"), "it"
    )
    await door.open()
    await until(lambda: not scene.is_ours(), "virt-handler's sockets")


async def test_failsafe_that_is_told_to_end_waits_for_a_daemon_that_drains(killable: Protected) -> None:
    scene = killable
    await scene.daemon.start()
    await scene.change(begin("first"))
    await scene.publish()
    await scene.in_path()

    scene.failsafe.send_signal(signal.SIGTERM)
    async with scene.connection():  # it lives as long as the daemon does
        assert scene.failsafe.returncode is None
        await scene.kill()
        assert await asyncio.wait_for(scene.failsafe.wait(), 20) == 0
    assert not scene.is_ours()


async def test_who_has_connected_to_a_dead_daemon_is_served_by_the_next_one(killable: Protected) -> None:
    scene, store = killable, killable.folder_of_node / "holder.sock"
    holder = await asyncio.create_subprocess_exec(*MIGPROXY, "holder", str(store))
    try:
        await until(store.is_socket, "the holder")
        environment = {"NOTIFY_SOCKET": str(store)}
        await scene.daemon.start(env=environment)
        await scene.change(begin("first"))
        await scene.publish()
        await scene.in_path()
        await until(lambda: scene.daemon.status()["store"]["descriptors"] >= 2, "the listeners in the holder")

        await scene.kill()
        assert scene.is_ours()
        with scene.dial() as near:
            await until(lambda: not scene.is_ours(), "virt-handler's sockets")
            await scene.daemon.start(env=environment)
            with await scene.arrived() as far:
                await through(near, far)
        assert not scene.virt_handler.relayed
        await scene.daemon.stop()
    finally:
        assert await end(holder, signal.SIGTERM) == 0


async def test_status_says_whether_a_failsafe_runs(killable: Protected) -> None:
    scene = killable
    await scene.daemon.start()
    assert "no failsafe" not in render(scene.daemon.status())
    scene.failsafe.kill()
    await scene.failsafe.wait()
    assert "no failsafe" in render(scene.daemon.status())


async def test_daemon_that_starts_waits_for_a_failsafe_that_acts(killable: Protected) -> None:
    scene = killable
    lifeline = Lifeline(str(scene.daemon.control.with_suffix(".daemon.lock")))
    with lifeline.taken() as is_taken:
        assert is_taken
        await scene.daemon.spawn()
        await until(lambda: scene.daemon.control.is_socket(), "it")
        assert not scene.daemon.logged("synchronised")
    await until(lambda: bool(scene.daemon.logged("synchronised")), "its start")
    assert lifeline.is_held
