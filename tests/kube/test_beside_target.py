"""A target beside virt-handler: announced from before the start to the end, and served to the last connection."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from migproxy.announcement import TARGET_ANNOTATION
from migproxy.inventory import BYPASSED
from migproxy.plan import Migration, Role
from migproxy.portmap import Channel
from migproxy.relay.client import Contents, Left
from migproxy.state import ProxyState
from migproxy.survival import listener_name, state_name
from migproxy.vmi import VMI
from tests.clock import Clock, eventually
from tests.kube.beside_source import Unready
from tests.kube.cluster import JSON_PATCH, MERGE_PATCH, NODES, VMIS, Cluster, Refused, begin, end, start, vmi
from tests.kube.gate import Gate
from tests.kube.world import LocalNode

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

ADDRESS = "127.77.0.2"
THEIRS = {"1001": 0, "1002": 49152}
OURS = {"2001": 0, "2002": 49152}
HERE = NODES[1]


@pytest.fixture
async def beside(kubernetes: Cluster) -> Cluster:
    """The cluster, and a VMI called one that migrates to node02."""
    await migrating(kubernetes)
    return kubernetes


async def migrating(kubernetes: Cluster, name: str = "one", migration: str = "first") -> None:
    await kubernetes.request("POST", VMIS, vmi(name))
    await change(kubernetes, begin(migration), name)


async def change(kubernetes: Cluster, body: dict[str, Any], name: str = "one") -> None:
    await kubernetes.request("PATCH", f"{VMIS}/{name}", body, MERGE_PATCH)


async def publish(kubernetes: Cluster, name: str = "one", **state: Any) -> None:
    """What virt-handler writes, once: the whole VMI, and after a conflict the whole VMI as it is by then."""
    values = {"targetNodeAddress": ADDRESS, "targetDirectMigrationNodePorts": THEIRS, **state}
    async with asyncio.timeout(20):
        while True:
            document = await kubernetes.request("GET", f"{VMIS}/{name}")
            document["status"]["migrationState"] |= values
            try:
                await kubernetes.request("PUT", f"{VMIS}/{name}", document)
            except Refused as error:
                if ": 409: " not in str(error):
                    raise
            else:
                return


async def announce(kubernetes: Cluster, ports: Any, name: str = "one", text: str | None = None) -> None:
    """Announces with migproxy's own token."""
    pairs = ",".join(f"{port}:{channel}" for port, channel in ports.items())
    await as_migproxy(kubernetes, text or f"1 first {pairs} {ADDRESS}", name)


async def as_migproxy(kubernetes: Cluster, text: str | None, name: str = "one", node: str = HERE) -> None:
    body = {"metadata": {"annotations": {TARGET_ANNOTATION: text}}}
    await kubernetes.request("PATCH", f"{VMIS}/{name}", body, MERGE_PATCH, token=kubernetes.token(node))


async def announced(kubernetes: Cluster, name: str = "one") -> str | None:
    annotations = (await kubernetes.request("GET", f"{VMIS}/{name}"))["metadata"].get("annotations") or {}
    return annotations.get(TARGET_ANNOTATION)


# The daemon


@asynccontextmanager
async def target_node(
    kubernetes: Cluster,
    folder: Path,
    door: Gate | None = None,
    protection: Unready | None = None,
    left: Contents | None = None,
) -> AsyncIterator[LocalNode]:
    folder.mkdir(exist_ok=True)
    made = LocalNode(HERE, ADDRESS, folder)
    if protection:
        made.security = protection
    async with made.run(kubernetes.kubeconfig(folder, HERE, door.url if door else None), beside=True, left=left):
        yield made


@pytest.fixture
def protection() -> Unready:
    made = Unready()
    made.problem = None
    return made


def path(node: LocalNode, name: str = "one") -> tuple[str | None, str | None]:
    found = node.migration(name)
    return found.get("path"), found.get("path_reason")


async def until_announced(kubernetes: Cluster, name: str = "one") -> dict[str, int]:
    async with asyncio.timeout(30):
        while (text := await announced(kubernetes, name)) is None:
            await asyncio.sleep(0.01)
    pairs = text.split(" ")[2].split(",")
    return {port: int(channel) for port, channel in (pair.split(":") for pair in pairs)}


async def until_withdrawn(kubernetes: Cluster) -> None:
    async with asyncio.timeout(30):
        while await announced(kubernetes) is not None:
            await asyncio.sleep(0.01)


async def test_target_listens_and_is_announced_to_the_end_whatever_virt_handler_publishes(
    beside: Cluster, tmp_path: Path
) -> None:
    async with target_node(beside, tmp_path) as node:
        ours = await until_announced(beside)
        text = await announced(beside)
        await eventually(lambda: node.tcp_ports() == {int(port) for port in ours}, "the listeners")
        await publish(beside)
        await publish(beside, targetNodeAddress="127.77.0.9")
        await eventually(lambda: path(node) == ("migproxy", ""), "the path")
        await change(beside, start())
        await eventually(lambda: node.migration("one")["state"] == "running", "the start")
        assert (node.tcp_ports(), await announced(beside)) == ({int(port) for port in ours}, text)
        await change(beside, end())
        await eventually(lambda: not node.tcp_ports(), "the end of the listeners")
        await until_withdrawn(beside)
        (kept,) = node.node.report()["migrations"]
        assert (kept["state"], kept["path"]) == ("ended", "migproxy")


async def test_what_has_started_is_served_though_the_announcement_is_taken_away(
    beside: Cluster, tmp_path: Path
) -> None:
    async with target_node(beside, tmp_path) as node:
        ours = await until_announced(beside)
        await change(beside, start())
        await eventually(lambda: node.migration("one")["state"] == "running", "the start")
        await change(beside, {"metadata": {"annotations": {TARGET_ANNOTATION: None}}})
        await eventually(lambda: all(one.announced is None for one in known(node)), "the news")
        await asyncio.sleep(5)
        assert node.tcp_ports() == {int(port) for port in ours}
        await change(beside, end())
        await eventually(lambda: not node.tcp_ports(), "the end of the listeners")


def known(node: LocalNode) -> list[VMI]:
    return list(node.node._vmis.values())


async def test_announcement_that_somebody_takes_away_before_the_start_is_made_again(
    beside: Cluster, tmp_path: Path
) -> None:
    async with target_node(beside, tmp_path):
        ours = await until_announced(beside)
        await change(beside, {"metadata": {"annotations": {TARGET_ANNOTATION: None}}})
        assert await until_announced(beside) == ours


async def test_target_that_comes_after_the_start_leaves_it_to_virt_handler(beside: Cluster, tmp_path: Path) -> None:
    await publish(beside)
    await change(beside, start())
    async with target_node(beside, tmp_path) as node:
        await eventually(lambda: path(node) == ("virt-handler", "started"), "the path")
        assert not node.tcp_ports()
        await change(beside, end())
        await eventually(lambda: not node.migrations(), "the end")
        (kept,) = node.node.report()["migrations"]
        assert (kept["state"], kept["path"], kept["path_reason"]) == ("ended", "virt-handler", "started")


async def test_restarted_daemon_keeps_the_word_of_the_one_before(beside: Cluster, tmp_path: Path) -> None:
    async with target_node(beside, tmp_path / "a"):
        ours = await until_announced(beside)
    assert await announced(beside)
    async with target_node(beside, tmp_path / "b") as node:
        await eventually(lambda: node.tcp_ports() == {int(port) for port in ours}, "the same ports")
        await change(beside, start())
        await eventually(lambda: node.migration("one")["state"] == "running", "the start")
    async with target_node(beside, tmp_path / "c") as node:
        await eventually(lambda: node.tcp_ports() == {int(port) for port in ours}, "the same ports again")
        await eventually(lambda: path(node) == ("migproxy", ""), "the path")


async def test_restarted_daemon_waits_for_what_it_needs_to_know_before_it_gives_an_announcement_up(
    beside: Cluster, tmp_path: Path, protection: Unready, clock: Clock
) -> None:
    async with target_node(beside, tmp_path / "a") as node:
        ours = await until_announced(beside)
    text = await announced(beside)
    protection.problem = "KubeVirt's settings are not known yet"
    async with target_node(beside, tmp_path / "b", protection=protection) as node:
        await eventually(lambda: node.migration("one").get("state") == "waiting", "the wait")
        await asyncio.sleep(9.9)
        assert await announced(beside) == text
        protection.problem, ready = None, clock()
        await eventually(lambda: node.tcp_ports() == {int(port) for port in ours}, "the same ports")
        assert round(clock() - ready, 6) <= 0.05
        assert await announced(beside) == text
    events = await beside.request("GET", "/api/v1/namespaces/default/events")
    assert not [one for one in events["items"] if one["reason"] == BYPASSED]


async def test_drain_of_a_daemon_that_has_just_started_takes_back_what_the_one_before_announced(
    beside: Cluster, tmp_path: Path, protection: Unready
) -> None:
    async with target_node(beside, tmp_path / "a"):
        await until_announced(beside)
    protection.problem = "KubeVirt's settings are not known yet"
    async with target_node(beside, tmp_path / "b", protection=protection) as node:
        await eventually(lambda: node.migration("one").get("state") == "waiting", "the wait")
        await asyncio.wait_for(node.node.drain(), 30)
        assert await announced(beside) is None


async def test_daemon_that_never_gets_ready_leaves_migrations_to_virt_handler(
    beside: Cluster, tmp_path: Path, protection: Unready, clock: Clock
) -> None:
    began = clock()
    protection.problem = "KubeVirt's settings are not known yet"
    async with target_node(beside, tmp_path, protection=protection) as node:
        await eventually(lambda: path(node) == ("virt-handler", "unready"), "the path")
    assert 10 <= clock() - began < 10.1


async def test_port_that_was_announced_and_is_taken_is_an_error_once_the_migration_has_started(
    beside: Cluster, tmp_path: Path
) -> None:
    async with target_node(beside, tmp_path / "a"):
        ours = await until_announced(beside)
    await change(beside, start())
    port = int(next(iter(ours)))
    with socket.create_server((ADDRESS, port)):
        async with target_node(beside, tmp_path / "b") as node:
            problem = f"port {port} is in use on {ADDRESS}, and the migration has started with it"
            await eventually(lambda: problem in (node.migration("one").get("error") or ""), "the error")
            assert node.tcp_ports() == {port}
    async with target_node(beside, tmp_path / "c") as node:
        await eventually(lambda: node.tcp_ports() == {int(port) for port in ours}, "the ports")


async def test_port_that_was_announced_and_is_taken_is_another_one_before_the_start(
    beside: Cluster, tmp_path: Path
) -> None:
    async with target_node(beside, tmp_path / "a"):
        ours = await until_announced(beside)
    port = next(iter(ours))
    with socket.create_server((ADDRESS, int(port))):
        async with target_node(beside, tmp_path / "b"):
            async with asyncio.timeout(30):
                while port in (others := await until_announced(beside)):
                    await asyncio.sleep(0.01)
    assert others.keys() - {port}


@pytest.mark.parametrize("status", [503, 403, 409])
async def test_announcement_that_fails_is_tried_again_and_told(
    beside: Cluster, tmp_path: Path, door: Gate, status: int
) -> None:
    door.refuse = lambda request: status if request.method == "PATCH" else None
    async with target_node(beside, tmp_path, door) as node:
        await eventually(lambda: f"announce: {status}" in (node.migration("one").get("error") or ""), "the error")
        door.refuse = lambda request: None
        await until_announced(beside)
        await eventually(lambda: node.migration("one")["error"] is None, "the end of the error")


async def test_draining_daemon_takes_its_announcement_back(beside: Cluster, tmp_path: Path) -> None:
    async with target_node(beside, tmp_path) as node:
        await until_announced(beside)
        await asyncio.wait_for(node.node.drain(), 30)
        assert await announced(beside) is None
        assert not node.tcp_ports()


async def test_drain_does_not_wait_for_ever_for_a_withdrawal_that_is_refused(
    beside: Cluster, tmp_path: Path, door: Gate, clock: Clock
) -> None:
    """The DaemonSet's rights may have been deleted before its pods."""
    async with target_node(beside, tmp_path, door) as node:
        await until_announced(beside)
        door.refuse = lambda request: 403 if request.method in ("GET", "PATCH") else None
        began = clock()
        await asyncio.wait_for(node.node.drain(), 30)
        assert 5 <= clock() - began <= 5.5
        assert not node.tcp_ports()


@pytest.mark.parametrize("is_inside", [True, False], ids=["inside the request", "after it"])
async def test_drain_takes_back_what_the_watch_has_not_told_of(
    beside: Cluster, tmp_path: Path, door: Gate, is_inside: bool
) -> None:
    drained: list[asyncio.Task[None]] = []
    async with target_node(beside, tmp_path, door) as node:

        def interfere(request: web.Request) -> None:
            if request.method == "PATCH" and not drained:
                door.stall()
                if is_inside:
                    drained.append(asyncio.create_task(node.node.drain()))

        await until_announced(beside)
        await eventually(lambda: door.watches >= 2, "the watches")
        door.refuse = interfere
        await migrating(beside, "two")
        async with asyncio.timeout(30):
            while not drained and await announced(beside, "two") is None:
                await asyncio.sleep(0.01)
        await asyncio.wait_for(drained[0] if drained else node.node.drain(), 30)
        assert [await announced(beside, name) for name in ("one", "two")] == [None, None]
        assert not node.tcp_ports()


@pytest.mark.parametrize("status", [503, 409, 422])
async def test_target_that_could_serve_nobody_withdraws_however_often_that_is_refused(
    beside: Cluster, tmp_path: Path, door: Gate, protection: Unready, status: int
) -> None:
    refused = 0

    def refuse(request: web.Request) -> int | None:
        nonlocal refused
        if request.method != "PATCH" or refused == 5:
            return None
        refused += 1
        return status

    async with target_node(beside, tmp_path, door, protection) as node:
        await until_announced(beside)
        door.refuse = refuse
        protection.problem = "the certificate has expired"
        await eventually(lambda: refused == 5, "the attempts to withdraw")
        await eventually(lambda: not node.tcp_ports(), "the end of the listeners")
        await until_withdrawn(beside)
        assert path(node) == ("virt-handler", "unready")
        protection.problem = None
        await until_announced(beside)


async def test_draining_daemon_serves_what_has_started(beside: Cluster, tmp_path: Path) -> None:
    async with target_node(beside, tmp_path) as node:
        ours = await until_announced(beside)
        await change(beside, start())
        await eventually(lambda: node.migration("one")["state"] == "running", "the start")
        drained = asyncio.create_task(node.node.drain())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(drained), 60)
        assert node.tcp_ports() == {int(port) for port in ours}
        await change(beside, end())
        await asyncio.wait_for(drained, 30)


async def test_stale_announcement_is_removed(beside: Cluster, tmp_path: Path) -> None:
    await change(beside, {"status": {"nodeName": HERE}, "metadata": {"labels": {"kubevirt.io/nodeName": HERE}}})
    await announce(beside, {}, text=f"1 gone 2001:0,2002:49152 {ADDRESS}")
    await change(beside, {"metadata": {"labels": {"kubevirt.io/migrationTargetNodeName": None}}})
    async with target_node(beside, tmp_path):
        await until_withdrawn(beside)


async def test_vmi_without_any_annotation_is_announced_on(beside: Cluster, tmp_path: Path) -> None:
    await beside.request("PATCH", f"{VMIS}/one", [{"op": "remove", "path": "/metadata/annotations"}], JSON_PATCH)
    async with target_node(beside, tmp_path):
        await until_announced(beside)


async def test_listeners_that_a_killed_daemon_has_left_are_gone_on_with(beside: Cluster, tmp_path: Path) -> None:
    with socket.socket() as libvirt, socket.socket() as direct:
        for sock in (libvirt, direct):
            sock.bind((ADDRESS, 0))
            sock.listen()
        ports = {str(libvirt.getsockname()[1]): 0, str(direct.getsockname()[1]): 49152}
        await announce(beside, ports)
        await change(beside, start())
        uid = (await beside.request("GET", f"{VMIS}/one"))["metadata"]["uid"]
        migration = Migration("default", "one", uid, "first")
        names = [
            listener_name(Role.TARGET, channel, migration, (1, 1)) for channel in (Channel.LIBVIRT, Channel.DIRECT)
        ]
        kept = {name: Left([sock.dup().detach()]) for name, sock in zip(names, (libvirt, direct), strict=True)}
        state = ProxyState(
            namespace="default", name="one", vmi_uid=uid, migration_uid="first", role=Role.TARGET, began=time.time()
        )
        left = Contents(kept, {state_name(Role.TARGET, migration): state.model_dump_json()})
        async with target_node(beside, tmp_path, left=left) as node:
            await eventually(lambda: path(node) == ("migproxy", ""), "the path")
            await eventually(lambda: len(node.migration("one").get("channels", ())) == 2, "the proxy")
            assert node.tcp_ports() == {int(port) for port in ports}
            assert [one["listening"] for one in node.migration("one")["channels"]] == [
                f"{ADDRESS}:{port}" for port in ports
            ]
