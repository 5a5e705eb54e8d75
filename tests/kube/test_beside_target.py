"""A target beside virt-handler: its ports get into virt-handler's own write, or nothing of it is in the path."""

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
from migproxy.inventory.announcements import UNSUPPORTED
from migproxy.plan import Migration, Role
from migproxy.portmap import Channel
from migproxy.relay.client import Contents, Left
from migproxy.state import ProxyState
from migproxy.survival import listener_name, state_name
from tests.clock import Clock, eventually
from tests.kube.cluster import JSON_PATCH, MERGE_PATCH, NODES, VMIS, Cluster, Refused, begin, end, start, vmi
from tests.kube.gate import Gate
from tests.kube.test_beside_source import Unready
from tests.kube.world import LocalNode

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

ADDRESS = "127.77.0.2"
THEIRS = {"1001": 0, "1002": 49152}
OURS = {"2001": 0, "2002": 49152}
HERE = NODES[1]


@pytest.fixture
async def beside(kubernetes: Cluster) -> Cluster:
    """The cluster with deploy/beside-virt-handler, and a VMI called one that migrates to node02."""
    await kubernetes.install_beside()
    await migrating(kubernetes)
    await policy_in_force(kubernetes)
    return kubernetes


async def migrating(kubernetes: Cluster, name: str = "one", migration: str = "first") -> None:
    await kubernetes.request("POST", VMIS, vmi(name))
    await change(kubernetes, begin(migration), name)


async def policy_in_force(kubernetes: Cluster) -> None:
    """A real API server follows new policies a moment after they were created, and knows a new schema seconds later."""
    await migrating(kubernetes, "probe")
    async with asyncio.timeout(30):
        while (await published(kubernetes, "probe"))["ports"] != OURS:
            try:
                await announce(kubernetes, OURS, name="probe")
                await change(
                    kubernetes, {"status": {"migrationState": {"targetDirectMigrationNodePorts": None}}}, "probe"
                )
                await publish(kubernetes, "probe")
            except Refused:
                await asyncio.sleep(0.1)
    await kubernetes.request("DELETE", f"{VMIS}/probe")


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
    await as_migproxy(kubernetes, text or f"first {pairs} {ADDRESS}", name)


async def as_migproxy(kubernetes: Cluster, text: str | None, name: str = "one", node: str = HERE) -> None:
    body = {"metadata": {"annotations": {TARGET_ANNOTATION: text}}}
    await kubernetes.request("PATCH", f"{VMIS}/{name}", body, MERGE_PATCH, token=kubernetes.token(node))


async def published(kubernetes: Cluster, name: str = "one") -> dict[str, Any]:
    state = (await kubernetes.request("GET", f"{VMIS}/{name}"))["status"]["migrationState"]
    ports = dict(state.get("targetDirectMigrationNodePorts") or {})
    return {"address": state.get("targetNodeAddress"), "ports": ports, "side": state.get("targetState")}


async def announced(kubernetes: Cluster, name: str = "one") -> str | None:
    annotations = (await kubernetes.request("GET", f"{VMIS}/{name}"))["metadata"].get("annotations") or {}
    return annotations.get(TARGET_ANNOTATION)


# The policy


async def test_announced_ports_get_into_virt_handlers_own_write(beside: Cluster) -> None:
    await announce(beside, OURS)
    side = {"syncAddress": "10.0.0.1:9185", "nodeAddress": ADDRESS, "directMigrationNodePorts": THEIRS}
    await publish(beside, targetState=side)
    assert await published(beside) == {
        "address": ADDRESS,
        "ports": OURS,
        "side": {**side, "directMigrationNodePorts": OURS},
    }


@pytest.mark.parametrize("side", [{}, {"syncAddress": "10.0.0.1:9185", "nodeAddress": ADDRESS}])
async def test_target_state_that_has_no_ports_gets_none(beside: Cluster, side: dict[str, str]) -> None:
    await announce(beside, OURS)
    await publish(beside, targetState=side)
    assert await published(beside) == {"address": ADDRESS, "ports": OURS, "side": side}


@pytest.mark.parametrize(
    ("text", "state"),
    [
        pytest.param(f"second 2001:0,2002:49152 {ADDRESS}", {}, id="another-migration"),
        pytest.param("first 2001:0,2002:49152 127.77.0.9", {}, id="another-address"),
        pytest.param(f"first 2001:0 {ADDRESS}", {}, id="a-channel-too-few"),
        pytest.param(f"first 2001:0,2002:49152,2003:49153 {ADDRESS}", {}, id="a-channel-too-many"),
        pytest.param(f"first 2001:0,2002:49153 {ADDRESS}", {}, id="another-channel"),
        pytest.param(f"first 2001:0,2002:0 {ADDRESS}", {}, id="a-channel-twice"),
        pytest.param(f"first 2001:0,2001:49152 {ADDRESS}", {}, id="a-port-twice"),
        pytest.param("first 2001:0,2002:49152", {}, id="no-address"),
        pytest.param("nonsense", {}, id="nonsense"),
        pytest.param(
            f"first 2001:0,2002:49152 {ADDRESS}", {"startTimestamp": "2026-08-01T12:00:00Z"}, id="already-started"
        ),
    ],
)
async def test_anything_else_leaves_virt_handlers_values_alone(beside: Cluster, text: str, state: Any) -> None:
    await announce(beside, {}, text=text)
    await publish(beside, **state)
    assert (await published(beside))["ports"] == THEIRS


async def test_late_announcement_changes_nothing_that_is_published(beside: Cluster) -> None:
    await publish(beside)
    await announce(beside, OURS)
    await change(beside, {"metadata": {"labels": {"something": "else"}}})
    await publish(beside)  # the same again, as virt-handler may
    assert (await published(beside))["ports"] == THEIRS


async def test_new_address_before_the_start_publishes_what_is_announced_for_it(beside: Cluster) -> None:
    await announce(beside, OURS)
    await publish(beside)
    await publish(beside, targetNodeAddress="127.77.0.9", targetDirectMigrationNodePorts={"1003": 0, "1004": 49152})
    assert (await published(beside))["ports"] == {"1003": 0, "1004": 49152}
    await announce(beside, {}, text=f"first 2003:0,2004:49152 {ADDRESS}")
    await publish(beside)
    assert (await published(beside))["ports"] == {"2003": 0, "2004": 49152}


# Who may announce


async def test_only_migproxy_on_the_targets_node_may_announce(beside: Cluster) -> None:
    body = {"metadata": {"annotations": {TARGET_ANNOTATION: f"first 22:0,23:49152 {ADDRESS}"}}}
    with pytest.raises(Refused, match="only migproxy announces"):
        await change(beside, body)
    with pytest.raises(Refused, match="node of its token"):
        await as_migproxy(beside, "first 2001:0 127.0.0.1", node=NODES[0])
    await announce(beside, OURS)
    with pytest.raises(Refused, match="only migproxy announces"):
        await change(beside, body)
    await change(beside, {"metadata": {"annotations": {TARGET_ANNOTATION: None}}})


async def test_nobody_else_takes_an_announcement_away_from_its_publication_to_the_end(beside: Cluster) -> None:
    body = {"metadata": {"annotations": {TARGET_ANNOTATION: None}}}
    await announce(beside, OURS)
    await publish(beside)
    for state in ({}, start()):
        await change(beside, state)
        with pytest.raises(Refused, match="only migproxy takes that away"):
            await change(beside, body)
    await change(beside, end())
    await change(beside, body)
    assert await announced(beside) is None


@pytest.mark.parametrize(
    "body",
    [
        {"status": {"migrationState": {"targetNodeAddress": ADDRESS}}},
        {"status": {"phase": "Failed"}},
        {"spec": {"evictionStrategy": "None"}},
        {"metadata": {"annotations": {"other": "x"}}},
        {"metadata": {"annotations": {"kubevirt.io/latest-observed-api-version": None}}},
        {"metadata": {"labels": {"other": "x"}}},
    ],
)
async def test_migproxys_token_may_change_nothing_else(beside: Cluster, body: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="migproxy changes no"):
        await beside.request("PATCH", f"{VMIS}/one", body, MERGE_PATCH, token=beside.token(HERE))


async def test_nothing_is_announced_after_the_start(beside: Cluster) -> None:
    await change(beside, start())
    with pytest.raises(Refused, match="not after the start"):
        await announce(beside, OURS)


async def test_any_node_may_remove_what_is_stale(beside: Cluster) -> None:
    await announce(beside, OURS)
    await change(beside, start())
    await as_migproxy(beside, None, node=NODES[0])
    assert await announced(beside) is None


# The daemon


@asynccontextmanager
async def target_node(
    kubernetes: Cluster, folder: Path, door: Gate | None = None, protection: Unready | None = None
) -> AsyncIterator[LocalNode]:
    folder.mkdir(exist_ok=True)
    made = LocalNode(HERE, ADDRESS, folder)
    if protection:
        made.security = protection
    async with made.run(kubernetes.kubeconfig(folder, HERE, door.url if door else None), beside=True):
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
    pairs = text.split(" ")[1].split(",")
    return {port: int(channel) for port, channel in (pair.split(":") for pair in pairs)}


async def until_withdrawn(kubernetes: Cluster) -> None:
    async with asyncio.timeout(30):
        while await announced(kubernetes) is not None:
            await asyncio.sleep(0.01)


async def test_target_is_in_the_path_from_announcement_to_end(beside: Cluster, tmp_path: Path) -> None:
    async with target_node(beside, tmp_path) as node:
        ours = await until_announced(beside)
        await eventually(lambda: node.tcp_ports() == {int(port) for port in ours}, "the listeners")
        await publish(beside)
        assert (await published(beside))["ports"] == ours
        await eventually(lambda: path(node) == ("migproxy", ""), "the path")
        await change(beside, start())
        await eventually(lambda: node.migration("one")["state"] == "running", "the start")
        assert node.tcp_ports() == {int(port) for port in ours}
        await change(beside, end())
        await eventually(lambda: not node.tcp_ports(), "the end of the listeners")
        await until_withdrawn(beside)
        (kept,) = node.node.report()["migrations"]
        assert (kept["state"], kept["path"]) == ("ended", "migproxy")


async def test_what_is_published_stays_served_though_the_announcement_is_taken_away(
    beside: Cluster, tmp_path: Path
) -> None:
    async with target_node(beside, tmp_path) as node:
        ours = await until_announced(beside)
        await publish(beside)
        await eventually(lambda: path(node) == ("migproxy", ""), "the path")
        await as_migproxy(beside, None, node=NODES[0])
        await change(beside, start())
        await eventually(lambda: node.migration("one")["state"] == "running", "the start")
        assert node.tcp_ports() == {int(port) for port in ours}
        assert path(node) == ("migproxy", "")


async def test_late_target_leaves_the_migration_to_virt_handler(beside: Cluster, tmp_path: Path) -> None:
    await publish(beside)
    async with target_node(beside, tmp_path) as node:
        await eventually(lambda: path(node) == ("virt-handler", "late"), "the path")
        assert not node.tcp_ports()
        await change(beside, end())
        await eventually(lambda: not node.migrations(), "the end")
        (kept,) = node.node.report()["migrations"]
        assert (kept["state"], kept["path"], kept["path_reason"]) == ("ended", "virt-handler", "late")
    assert (await published(beside))["ports"] == THEIRS


async def test_without_the_policy_nothing_of_ours_is_in_the_path(kubernetes: Cluster, tmp_path: Path) -> None:
    await kubernetes.install_beside(policy=False)
    await migrating(kubernetes)
    async with target_node(kubernetes, tmp_path) as node:
        await until_announced(kubernetes)
        await publish(kubernetes)
        await eventually(lambda: path(node) == ("virt-handler", "policy"), "the path")
        await eventually(lambda: not node.tcp_ports(), "the end of the listeners")
        await until_withdrawn(kubernetes)
        assert path(node) == ("virt-handler", "policy")
    assert (await published(kubernetes))["ports"] == THEIRS


async def test_cluster_without_such_policies_is_served_as_a_source_alone(kubernetes: Cluster, tmp_path: Path) -> None:
    if kubernetes.double is None:
        pytest.skip("a real API server has them")
    kubernetes.double.faults.older = True
    await migrating(kubernetes)
    async with target_node(kubernetes, tmp_path) as node:
        await eventually(lambda: path(node) == ("virt-handler", "unsupported"), "the path")
        await eventually(lambda: not node.tcp_ports(), "the end of the listeners")
        assert node.node.report()["beside"] == {"unsupported": UNSUPPORTED}


async def test_restarted_daemon_keeps_the_word_of_the_one_before(beside: Cluster, tmp_path: Path) -> None:
    async with target_node(beside, tmp_path / "a") as node:
        ours = await until_announced(beside)
    assert await announced(beside)
    async with target_node(beside, tmp_path / "b") as node:
        await eventually(lambda: node.tcp_ports() == {int(port) for port in ours}, "the same ports")
        await publish(beside)
        await eventually(lambda: path(node) == ("migproxy", ""), "the path")
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


async def test_port_that_is_published_and_taken_is_an_error_and_no_reason_to_take_another(
    beside: Cluster, tmp_path: Path
) -> None:
    async with target_node(beside, tmp_path / "a") as node:
        ours = await until_announced(beside)
        await publish(beside)
    port = int(next(iter(ours)))
    with socket.create_server((ADDRESS, port)):
        async with target_node(beside, tmp_path / "b") as node:
            problem = f"port {port} is in use on {ADDRESS}, and virt-handler published it"
            await eventually(lambda: problem in (node.migration("one").get("error") or ""), "the error")
            assert node.tcp_ports() == {port}
    async with target_node(beside, tmp_path / "c") as node:
        await eventually(lambda: node.tcp_ports() == {int(port) for port in ours}, "the ports")


@pytest.mark.parametrize(("status", "reason"), [(503, "failed"), (403, "failed"), (409, "late")])
async def test_announcement_that_fails_is_the_reason_that_is_told(
    beside: Cluster, tmp_path: Path, door: Gate, status: int, reason: str
) -> None:
    door.refuse = lambda request: status if request.method == "PATCH" else None
    async with target_node(beside, tmp_path, door) as node:
        await eventually(lambda: node.migration("one").get("state") == "error", "the error")
        await publish(beside)
        await eventually(lambda: path(node) == ("virt-handler", reason), "the path")
        assert f"announce: {status}" in node.migration("one")["path_why"]


async def test_draining_daemon_takes_its_announcement_back(beside: Cluster, tmp_path: Path) -> None:
    async with target_node(beside, tmp_path) as node:
        await until_announced(beside)
        await asyncio.wait_for(node.node.drain(), 30)
        assert await announced(beside) is None
        assert not node.tcp_ports()
    await publish(beside)
    assert (await published(beside))["ports"] == THEIRS


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
        await publish(beside, "two")
        assert (await published(beside, "two"))["ports"] == THEIRS


@pytest.mark.parametrize("status", [503, 409, 422])
async def test_listeners_close_only_once_the_announcement_is_gone_however_often_that_is_refused(
    beside: Cluster, tmp_path: Path, door: Gate, protection: Unready, status: int
) -> None:
    refused = 0

    def refuse(request: web.Request) -> int | None:
        nonlocal refused
        if request.method != "PATCH" or refused == 5:
            return None
        assert node.tcp_ports() == {int(port) for port in ours}
        refused += 1
        return status

    async with target_node(beside, tmp_path, door, protection) as node:
        ours = await until_announced(beside)
        door.refuse = refuse
        protection.problem = "the certificate has expired"
        await eventually(lambda: refused == 5, "the attempts to withdraw")
        await eventually(lambda: not node.tcp_ports(), "the end of the listeners")
        assert await announced(beside) is None
        assert path(node) == ("virt-handler", "unready")
        protection.problem = None
        await until_announced(beside)


async def test_announcement_that_comes_true_while_it_is_being_withdrawn_is_served(
    beside: Cluster, tmp_path: Path, door: Gate, protection: Unready
) -> None:
    async with target_node(beside, tmp_path, door, protection) as node:
        ours = await until_announced(beside)
        door.refuse = lambda request: 503 if request.method in ("GET", "PATCH") else None
        protection.problem = "the certificate has expired"
        await eventually(lambda: path(node) == ("virt-handler", "unready"), "the path")
        await publish(beside)
        door.refuse = lambda request: None
        await eventually(lambda: path(node) == ("migproxy", ""), "the path")
        assert (await published(beside))["ports"] == ours
        assert node.tcp_ports() == {int(port) for port in ours}


async def test_draining_daemon_serves_what_virt_handler_has_published(beside: Cluster, tmp_path: Path) -> None:
    async with target_node(beside, tmp_path) as node:
        ours = await until_announced(beside)
        await publish(beside)
        await eventually(lambda: path(node) == ("migproxy", ""), "the path")
        drained = asyncio.create_task(node.node.drain())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(drained), 60)
        assert node.tcp_ports() == {int(port) for port in ours}
        await change(beside, end())
        await asyncio.wait_for(drained, 30)


@pytest.mark.parametrize("text", [f"gone 2001:0,2002:49152 {ADDRESS}", "nonsense"])
async def test_stale_announcement_is_removed(beside: Cluster, tmp_path: Path, text: str) -> None:
    await change(beside, {"status": {"nodeName": HERE}, "metadata": {"labels": {"kubevirt.io/nodeName": HERE}}})
    await announce(beside, {}, text=text)
    await change(beside, {"metadata": {"labels": {"kubevirt.io/migrationTargetNodeName": None}}})
    async with target_node(beside, tmp_path):
        await until_withdrawn(beside)


async def test_vmi_without_any_annotation_is_announced_on(beside: Cluster, tmp_path: Path) -> None:
    await beside.request("PATCH", f"{VMIS}/one", [{"op": "remove", "path": "/metadata/annotations"}], JSON_PATCH)
    async with target_node(beside, tmp_path):
        await until_announced(beside)


async def test_what_a_killed_daemon_served_is_gone_on_with_though_the_announcement_is_taken_away(
    beside: Cluster, tmp_path: Path
) -> None:
    with socket.socket() as libvirt, socket.socket() as direct:
        for sock in (libvirt, direct):
            sock.bind((ADDRESS, 0))
            sock.listen()
        ports = {str(libvirt.getsockname()[1]): 0, str(direct.getsockname()[1]): 49152}
        await announce(beside, ports)
        await publish(beside)
        await as_migproxy(beside, None, node=NODES[0])
        uid = (await beside.request("GET", f"{VMIS}/one"))["metadata"]["uid"]
        migration = Migration("default", "one", uid, "first")
        names = [
            listener_name(Role.TARGET, channel, migration, (1, 1)) for channel in (Channel.LIBVIRT, Channel.DIRECT)
        ]
        async with target_node(beside, tmp_path) as node:
            kept = {name: Left([sock.dup().detach()]) for name, sock in zip(names, (libvirt, direct), strict=True)}
            state = ProxyState(
                namespace="default", name="one", vmi_uid=uid, migration_uid="first", role=Role.TARGET, began=time.time()
            )
            notes = {state_name(Role.TARGET, migration): state.model_dump_json()}
            node.node.take_over(Contents(kept, notes))
            await eventually(lambda: path(node) == ("migproxy", ""), "the path")
            await eventually(lambda: len(node.migration("one").get("channels", ())) == 2, "the proxy")
            assert node.tcp_ports() == {int(port) for port in ports}
            assert [one["listening"] for one in node.migration("one")["channels"]] == [
                f"{ADDRESS}:{port}" for port in ports
            ]
