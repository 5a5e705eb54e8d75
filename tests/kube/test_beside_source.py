"""A source beside virt-handler: in the path as soon as virt-handler's sockets appear, and out of it again."""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from migproxy.inventory import BYPASSED
from migproxy.launcher import RunDir
from migproxy.plan import SourceProxy
from migproxy.portmap import Channel, source_socket_name
from migproxy.shared import SharedFolder
from migproxy.source import Source
from migproxy.tls import Plaintext
from tests.clock import Clock, eventually
from tests.kube.cluster import MERGE_PATCH, NODES, VMIS, Cluster, begin, end, start, vmi
from tests.kube.world import LocalNode
from tests.virt_handler import VirtHandler, shortened

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

HERE, ADDRESS = NODES[0], "127.77.0.1"
CHANNELS = (Channel.LIBVIRT, Channel.DIRECT)


class Unready(Plaintext):
    """Protection that is not to be had (yet)."""

    problem: str | None = "KubeVirt's settings are not known yet"

    def report(self) -> dict[str, Any]:
        return {"mode": "none yet", "errors": {}, "problem": self.problem}


class Scene:
    """A migration from node01, whose target is a listener of the test's; virt-handler's steps are the test's, too."""

    def __init__(self, kubernetes: Cluster, node: LocalNode, uid: str, target: socket.socket) -> None:
        self.kubernetes, self.node, self.uid, self.target = kubernetes, node, uid, target
        self.run_dir = node.launchers / uid
        self.folder = self.run_dir / "kubevirt/migrationproxy"
        self.virt_handler = VirtHandler(ADDRESS, self.run_dir, "libvirt/libvirt-sock", owner=(os.getuid(), os.getgid()))
        address, port = target.getsockname()
        self.leads_to = (address, {str(port): 0, str(port + 1): 49152})

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

    async def publish(self) -> None:
        """What the target's node writes."""
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
        """The next connection that arrives at the target."""
        accepted, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(self.target), 20)
        return accepted


async def through(near: socket.socket, far: socket.socket) -> None:
    """What is sent arrives."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(near, b"through")
    assert await asyncio.wait_for(loop.sock_recv(far, 7), 20) == b"through"


@pytest.fixture
def protection() -> Unready:
    made = Unready()
    made.problem = None
    return made


@pytest.fixture
async def scene(kubernetes: Cluster, tmp_path: Path, protection: Unready) -> AsyncIterator[Scene]:
    await kubernetes.install_beside()
    uid = (await kubernetes.request("POST", VMIS, vmi("one")))["metadata"]["uid"]
    node = LocalNode(HERE, ADDRESS, tmp_path)
    node.security = protection
    node.boot_launcher(uid)
    with socket.create_server(("127.77.0.3", 0)) as target:
        target.setblocking(False)
        async with node.run(kubernetes.kubeconfig(tmp_path, HERE), beside=True):
            made = Scene(kubernetes, node, uid, target)
            await made.change(begin("first"))
            await made.publish()
            yield made
            await made.virt_handler.close()


def path(node: LocalNode) -> tuple[str | None, str | None]:
    found = node.migration("one")
    return found.get("path"), found.get("path_reason")


async def test_source_is_in_the_path_as_soon_as_virt_handler_listens_and_whenever_it_does_again(
    scene: Scene, clock: Clock
) -> None:
    scene.prepare()
    await eventually(scene.is_ours, "our sockets over virt-handler's")
    await eventually(lambda: path(scene.node) == ("migproxy", ""), "the path")
    await scene.connect()
    assert not scene.virt_handler.relayed
    for _ in range(9):
        scene.virt_handler.stop_source(scene.uid)
        scene.prepare()
        began = clock()
        await eventually(scene.is_ours, "our sockets over virt-handler's new ones")
        # An event brings it about, not a look now and then: virt-handler asks the launcher some ten milliseconds later.
        assert round(clock() - began, 6) <= SharedFolder.longest_pause
    await scene.connect()
    assert not scene.virt_handler.relayed
    await scene.change(start())
    await scene.change(end())
    scene.virt_handler.stop_source(scene.uid)
    await eventually(lambda: not scene.node.migrations(), "the end")
    assert list(scene.folder.iterdir()) == []


async def test_end_that_we_hear_of_first_leaves_virt_handlers_sockets_to_virt_handler(scene: Scene) -> None:
    scene.prepare()
    await eventually(scene.is_ours, "our sockets")
    await scene.change(end())
    await eventually(lambda: not scene.node.migrations(), "the end")
    assert not scene.is_ours()
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}
    scene.virt_handler.stop_source(scene.uid)
    assert list(scene.folder.iterdir()) == []


async def test_path_that_virt_handler_does_not_fill_is_filled_in_the_end(scene: Scene) -> None:
    await eventually(scene.is_ours, "our sockets, for want of others")
    scene.prepare()
    await eventually(scene.is_ours, "our sockets over virt-handler's")
    await scene.connect()


async def test_draining_daemon_gives_virt_handlers_sockets_back(scene: Scene) -> None:
    scene.prepare()
    await eventually(scene.is_ours, "our sockets")
    await asyncio.wait_for(scene.node.node.drain(), 30)
    assert not scene.is_ours()
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}


async def test_source_that_has_given_back_leaves_a_launcher_that_comes_up_to_virt_handler(scene: Scene) -> None:
    """A daemon that drains goes on trying what had failed."""
    scene.prepare()
    await eventually(scene.is_ours, "our sockets")
    (worker,) = scene.node.node._workers.values()
    assert isinstance(worker.wanted, SourceProxy)
    late = scene.node.node.make_proxy(worker.wanted)
    assert isinstance(late, Source)
    late.give_back()
    before = asyncio.all_tasks()
    await late.apply(worker.wanted)
    assert asyncio.all_tasks() == before, "it would keep sockets in place that it may not put there"
    assert scene.is_ours()
    await late.close()


async def test_daemon_that_could_not_protect_a_connection_stays_out_of_the_path_until_it_can(
    scene: Scene, protection: Unready
) -> None:
    scene.prepare()
    await eventually(scene.is_ours, "our sockets")
    protection.problem = "the certificate has expired"
    await eventually(lambda: path(scene.node) == ("virt-handler", "unready"), "the path")
    await eventually(lambda: not scene.is_ours(), "virt-handler's sockets")
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}
    protection.problem = None
    await eventually(scene.is_ours, "our sockets again")
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}


async def test_connections_of_a_source_go_on_though_it_could_make_no_new_ones(
    scene: Scene, protection: Unready
) -> None:
    scene.prepare()
    await eventually(scene.is_ours, "our sockets")
    async with scene.connection() as (near, far):
        protection.problem = "the certificate has expired"
        await eventually(lambda: scene.node.node.report()["tls"]["problem"] is not None, "the problem")
        await asyncio.sleep(60)
        await through(near, far)
        assert scene.is_ours()
        assert path(scene.node) == ("migproxy", "")


async def test_event_says_that_a_migrations_source_is_left_to_virt_handler(scene: Scene, protection: Unready) -> None:
    protection.problem = "the certificate has expired"
    await eventually(lambda: path(scene.node) == ("virt-handler", "unready"), "the path")
    async with asyncio.timeout(30):
        while not (told := await scene.events(BYPASSED)):
            await asyncio.sleep(0.05)
    assert told == [f"migration source on {HERE}: the certificate has expired"]


async def test_sockets_of_a_killed_daemon_make_way_for_virt_handlers_where_this_one_is_not_ready(
    scene: Scene, protection: Unready
) -> None:
    await scene.change(end(failed=True))
    await eventually(lambda: not scene.node.migrations(), "the end")
    protection.problem = "the certificate has expired"
    scene.prepare()
    with RunDir(str(scene.run_dir), "") as run:
        folder = SharedFolder(run, None)
        for channel in CHANNELS:
            placed = folder.place(source_socket_name(scene.uid, channel))
            assert placed
            placed.listener.close()
        folder.close()
    assert scene.is_ours()
    await scene.change({"status": {"migrationState": None}})
    await scene.change(begin("second"))
    await scene.publish()
    await eventually(lambda: not scene.is_ours(), "virt-handler's sockets")
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}
    assert len(list(scene.folder.iterdir())) == len(CHANNELS)


async def test_source_whose_sockets_cannot_be_put_over_virt_handlers_says_so(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "the file system cannot exchange two files")

    monkeypatch.setattr(SharedFolder, "_rename", refuse)
    scene.prepare()
    await eventually(lambda: path(scene.node) == ("virt-handler", "failed"), "the path")
    assert "cannot exchange two files" in scene.node.migration("one")["path_why"]
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}
