"""A source beside virt-handler: in the path as soon as virt-handler's sockets appear, and out of it again."""

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migproxy.inventory import BYPASSED
from migproxy.launcher import RunDir
from migproxy.plan import SourceProxy
from migproxy.portmap import source_socket_name
from migproxy.shared import SharedFolder
from migproxy.source import Source
from tests.clock import Clock, eventually
from tests.kube.beside_source import ADDRESS, CHANNELS, HERE, SourceScene, Unready, targets, through
from tests.kube.cluster import VMIS, Cluster, begin, end, start, vmi
from tests.kube.world import LocalNode

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]


@pytest.fixture
def protection() -> Unready:
    made = Unready()
    made.problem = None
    return made


@pytest.fixture
async def scene(kubernetes: Cluster, tmp_path: Path, protection: Unready) -> AsyncIterator[SourceScene]:
    uid = (await kubernetes.request("POST", VMIS, vmi("one")))["metadata"]["uid"]
    node = LocalNode(HERE, ADDRESS, tmp_path)
    node.security = protection
    node.boot_launcher(uid)
    async with targets() as far, node.run(kubernetes.kubeconfig(tmp_path, HERE), beside=True):
        made = SourceScene(kubernetes, node, uid, far)
        await made.change(begin("first"))
        await made.publish()
        yield made
        await made.virt_handler.close()


def path(node: LocalNode) -> tuple[str | None, str | None]:
    found = node.migration("one")
    return found.get("path"), found.get("path_reason")


async def test_source_is_in_the_path_as_soon_as_virt_handler_listens_and_whenever_it_does_again(
    scene: SourceScene, clock: Clock
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


async def test_next_migration_of_a_vmi_keeps_what_is_its_own(scene: SourceScene) -> None:
    """The one before has the same names, and ends in the same moment."""
    scene.prepare()
    await eventually(scene.is_ours, "our sockets")
    for number in range(20):
        scene.virt_handler.stop_source(scene.uid)
        await scene.change(begin(f"migration-{number}"))
        scene.prepare()
        await eventually(scene.is_ours, "our sockets over virt-handler's new ones")
    kept = {f".virt-handler-{source_socket_name(scene.uid, channel)}" for channel in CHANNELS}
    assert kept <= {path.name for path in scene.folder.iterdir()}
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}, "nothing is announced for this one"


async def test_end_that_we_hear_of_first_leaves_virt_handlers_sockets_to_virt_handler(scene: SourceScene) -> None:
    scene.prepare()
    await eventually(scene.is_ours, "our sockets")
    await scene.change(end())
    await eventually(lambda: not scene.node.migrations(), "the end")
    assert not scene.is_ours()
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}
    scene.virt_handler.stop_source(scene.uid)
    assert list(scene.folder.iterdir()) == []


async def test_path_that_virt_handler_has_not_filled_stays_empty(scene: SourceScene) -> None:
    await eventually(lambda: scene.node.migration("one").get("state") == "prepared", "the source")
    await asyncio.sleep(60)
    assert list(scene.folder.iterdir()) == []
    scene.prepare()
    await eventually(scene.is_ours, "our sockets over virt-handler's")
    await scene.connect()


async def test_source_that_comes_after_the_start_leaves_virt_handlers_sockets_where_they_are(
    scene: SourceScene,
) -> None:
    await scene.change(start())
    await eventually(lambda: path(scene.node) == ("virt-handler", "started"), "the path")
    scene.prepare()
    await asyncio.sleep(60)
    assert not scene.is_ours()
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}


async def test_draining_daemon_gives_virt_handlers_sockets_back(scene: SourceScene) -> None:
    scene.prepare()
    await eventually(scene.is_ours, "our sockets")
    await asyncio.wait_for(scene.node.node.drain(), 30)
    assert not scene.is_ours()
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}


async def test_source_that_has_given_back_leaves_a_launcher_that_comes_up_to_virt_handler(scene: SourceScene) -> None:
    """A daemon that drains goes on trying what had failed."""
    scene.prepare()
    await eventually(scene.is_ours, "our sockets")
    (worker,) = scene.node.node._workers.values()
    assert isinstance(worker.wanted, SourceProxy)
    late = scene.node.node.make_proxy(worker.wanted)
    assert isinstance(late, Source)
    await late.give_back()
    before = asyncio.all_tasks()
    await late.apply(worker.wanted)
    assert asyncio.all_tasks() == before, "it would keep sockets in place that it may not put there"
    assert scene.is_ours()
    await late.close()


async def test_daemon_that_could_not_protect_a_connection_stays_out_of_the_path_until_it_can(
    scene: SourceScene, protection: Unready
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
    scene: SourceScene, protection: Unready
) -> None:
    scene.prepare()
    await eventually(scene.is_ours, "our sockets")
    async with scene.connection() as (near, far):
        protection.problem = "the certificate has expired"
        await eventually(lambda: scene.node.node.report()["tls"]["problem"] is not None, "the problem")
        await asyncio.sleep(60)
        await through(near, far)
        assert not scene.is_ours()
        assert path(scene.node) == ("virt-handler", "unready")


async def test_event_says_that_a_migrations_source_is_left_to_virt_handler(
    scene: SourceScene, protection: Unready
) -> None:
    protection.problem = "the certificate has expired"
    await eventually(lambda: path(scene.node) == ("virt-handler", "unready"), "the path")
    async with asyncio.timeout(30):
        while not (told := await scene.events(BYPASSED)):
            await asyncio.sleep(0.05)
    assert told == [f"migration source on {HERE}: the certificate has expired"]


async def test_sockets_of_a_killed_daemon_make_way_for_virt_handlers_where_this_one_is_not_ready(
    scene: SourceScene, protection: Unready
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
    scene: SourceScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "the file system cannot exchange two files")

    monkeypatch.setattr(SharedFolder, "_rename", refuse)
    scene.prepare()
    await eventually(lambda: path(scene.node) == ("virt-handler", "failed"), "the path")
    assert "cannot exchange two files" in scene.node.migration("one")["path_why"]
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}
