"""What a target publishes is exactly its own fields, once, and only while they are what it thinks they are."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from migproxy.announcement import Announcement
from migproxy.inventory import PublishError
from migproxy.inventory.announcements import Announcements
from migproxy.kube.api import ApiServer
from migproxy.portmap import Channel, PortMap
from tests.clock import Clock, eventually
from tests.kube.cluster import MERGE_PATCH, NODES, VMIS, Cluster, begin, start, vmi
from tests.kube.gate import Gate
from tests.kube.world import PACE, Listener, listening

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

ADDRESS = ipaddress.ip_address("10.1.1.2")
PORTS = PortMap.of({Channel.LIBVIRT: 32899, Channel.DIRECT: 42691})
STATE = {"targetNodeAddress": "10.1.1.2", "targetDirectMigrationNodePorts": {"32899": 0, "42691": 49152}}
DEAF = replace(PACE, silence=60.0)
"""A watch that falls silent stays so."""
HERE = NODES[1]
"""The target's node, whose migproxy publishes."""


@pytest.fixture
async def target(kubernetes: Cluster, door: Gate, tmp_path: Path) -> AsyncIterator[Listener]:
    """The target node's inventory, with a VMI called one that migrates to it."""
    await kubernetes.request("POST", VMIS, vmi("one"))
    await kubernetes.request("PATCH", f"{VMIS}/one", begin("first"), MERGE_PATCH)
    await kubernetes.use_handlers_token()
    async with listening(kubernetes, tmp_path, door.url, HERE, DEAF) as listener:
        yield listener


async def publish(target: Listener, ports: PortMap = PORTS) -> None:
    found = target.named("one")
    assert found
    await target.inventory.publish(found, ADDRESS, ports)


async def read(kubernetes: Cluster) -> dict[str, Any]:
    return dict(await kubernetes.request("GET", f"{VMIS}/one"))


def patches(door: Gate, status: int = 200) -> list[Any]:
    return [
        one.body
        for one in door.passed
        if one.method == "PATCH" and "virtualmachineinstances" in one.path and one.status == status
    ]


async def change(kubernetes: Cluster, body: dict[str, Any]) -> None:
    await kubernetes.request("PATCH", f"{VMIS}/one", body, MERGE_PATCH)


async def test_only_the_two_fields_change(kubernetes: Cluster, target: Listener) -> None:
    before = await read(kubernetes)
    await publish(target)
    after = await read(kubernetes)
    assert STATE.items() <= after["status"]["migrationState"].items()
    for field in STATE:
        del after["status"]["migrationState"][field]
    for metadata in (before["metadata"], after["metadata"]):
        for field in ("resourceVersion", "generation", "managedFields"):
            metadata.pop(field, None)
    assert after == before


async def test_target_state_gets_the_same_values_where_it_exists(kubernetes: Cluster, target: Listener) -> None:
    await change(kubernetes, {"status": {"migrationState": {"targetState": {"syncAddress": "10.0.0.1:9185"}}}})
    await eventually(lambda: len(target.batches) == 2, "targetState")
    await publish(target)
    assert (await read(kubernetes))["status"]["migrationState"]["targetState"] == {
        "syncAddress": "10.0.0.1:9185",
        "nodeAddress": STATE["targetNodeAddress"],
        "directMigrationNodePorts": STATE["targetDirectMigrationNodePorts"],
    }


async def test_every_assumption_is_tested_in_the_patch(target: Listener, door: Gate) -> None:
    await publish(target)
    found = target.named("one")
    assert found
    (patch,) = patches(door)
    tests = {operation["path"]: operation["value"] for operation in patch if operation["op"] == "test"}
    state = "/status/migrationState"
    assert tests == {
        "/metadata/uid": found.uid,
        f"{state}/migrationUid": "first",
        f"{state}/startTimestamp": None,
        f"{state}/endTimestamp": None,
        f"{state}/targetNodeAddress": None,
        f"{state}/targetDirectMigrationNodePorts": None,
    }


async def test_same_values_are_not_published_twice(kubernetes: Cluster, target: Listener, door: Gate) -> None:
    stale = target.named("one")
    assert stale
    for _ in range(3):  # at once: before the watch has told of it
        await target.inventory.publish(stale, ADDRESS, PORTS)
    await eventually(lambda: told(target) == "10.1.1.2", "what was published")
    for _ in range(3):
        await target.inventory.publish(stale, ADDRESS, PORTS)
        await publish(target)
    assert len(patches(door)) == 1
    assert not patches(door, 422)


async def test_same_values_are_not_published_again_after_a_restart(
    kubernetes: Cluster, target: Listener, door: Gate, tmp_path: Path
) -> None:
    await publish(target)
    async with listening(kubernetes, tmp_path, door.url, HERE) as restarted:
        await publish(restarted)
    assert len(patches(door)) == 1


async def test_new_ports_before_the_start_replace_the_old_ones(kubernetes: Cluster, target: Listener) -> None:
    await publish(target)
    await eventually(lambda: told(target) == "10.1.1.2", "what was published")
    await publish(target, PortMap.of({Channel.LIBVIRT: 1, Channel.DIRECT: 2}))
    state = (await read(kubernetes))["status"]["migrationState"]
    assert state["targetDirectMigrationNodePorts"] == {"1": 0, "2": 49152}


async def test_what_somebody_cleared_is_published_again(kubernetes: Cluster, target: Listener, door: Gate) -> None:
    await publish(target)
    await eventually(lambda: told(target) == "10.1.1.2", "what was published")
    await change(kubernetes, {"status": {"migrationState": dict.fromkeys(STATE)}})
    await eventually(lambda: told(target) is None, "what was cleared")
    await publish(target)
    assert STATE.items() <= (await read(kubernetes))["status"]["migrationState"].items()
    assert len(patches(door)) == 2


async def test_what_was_cleared_is_published_again_though_the_watch_told_of_it_before_the_answer(
    kubernetes: Cluster, target: Listener, door: Gate
) -> None:
    door.answering.clear()
    publishing = asyncio.create_task(publish(target))
    await eventually(lambda: told(target) == "10.1.1.2", "what was published")
    door.answering.set()
    await publishing
    await change(kubernetes, {"status": {"migrationState": dict.fromkeys(STATE)}})
    await eventually(lambda: told(target) is None, "what was cleared")
    await publish(target)
    assert STATE.items() <= (await read(kubernetes))["status"]["migrationState"].items()


async def test_conflict_is_retried_from_the_fresh_object(kubernetes: Cluster, target: Listener, door: Gate) -> None:
    if kubernetes.double is None:
        pytest.skip("a real API server does not make conflicts on request")
    kubernetes.double.faults.conflicts = 2
    await publish(target)
    assert STATE.items() <= (await read(kubernetes))["status"]["migrationState"].items()
    assert len(patches(door, 409)) == 2
    assert sum(one.method == "GET" and one.path.endswith("/one") for one in door.passed) == 2


@pytest.mark.parametrize(
    ("meanwhile", "told"),
    [
        pytest.param(start(), "has started meanwhile", id="started"),
        pytest.param({"status": {"migrationState": {"migrationUid": "second"}}}, "has ended meanwhile", id="another"),
        pytest.param(
            {"status": {"migrationState": {"endTimestamp": "2026-08-01T12:00:00Z", "failed": True}}},
            "has ended meanwhile",
            id="ended",
        ),
        pytest.param({"status": {"migrationState": {"targetNodeAddress": "10.1.1.9"}}}, "10.1.1.9", id="somebody-else"),
        pytest.param({"status": {"migrationState": None}}, "taken away", id="taken-away"),
    ],
)
async def test_what_changed_meanwhile_is_left_alone(
    kubernetes: Cluster, target: Listener, door: Gate, meanwhile: dict[str, Any], told: str
) -> None:
    await eventually(lambda: door.watches == 2, "the watches")
    door.stall()  # this node does not hear of it in time
    await change(kubernetes, meanwhile)
    before = await read(kubernetes)
    with pytest.raises(PublishError, match=told) as refusal:
        await publish(target)
    assert "default/one (migration first)" in str(refusal.value)
    assert await read(kubernetes) == before
    assert not patches(door)


async def test_vmi_of_the_same_name_that_came_after_it_is_left_alone(
    kubernetes: Cluster, target: Listener, door: Gate
) -> None:
    await eventually(lambda: door.watches == 2, "the watches")
    door.stall()
    await kubernetes.request("DELETE", f"{VMIS}/one")
    with pytest.raises(PublishError, match="404"):
        await publish(target)
    await kubernetes.request("POST", VMIS, vmi("one"))
    await change(kubernetes, begin("first"))
    with pytest.raises(PublishError, match="deleted"):
        await publish(target)
    assert not patches(door)


async def test_missing_permission_is_named(kubernetes: Cluster, target: Listener) -> None:
    await kubernetes.request(
        "PATCH", "/apis/rbac.authorization.k8s.io/v1/clusterroles/kubevirt-handler", {"rules": []}, MERGE_PATCH
    )

    async def refused() -> bool:
        try:
            await publish(target)
        except PublishError as error:
            return "allow patch on virtualmachineinstances" in str(error)
        return False

    async with asyncio.timeout(30):  # a real server's authorizer follows a moment later
        while not await refused():
            await asyncio.sleep(0.1)


async def test_server_that_is_away_is_said(target: Listener, door: Gate) -> None:
    await door.close()
    with pytest.raises(PublishError, match=r"default/one \(migration first\)"):
        await publish(target)
    await door.open()
    await publish(target)


async def test_status_that_kubevirts_webhook_sets_back_is_not_published(
    kubernetes: Cluster, door: Gate, tmp_path: Path
) -> None:
    if kubernetes.double is None:
        pytest.skip("only the double has KubeVirt's webhooks")
    await kubernetes.request("POST", VMIS, vmi("one"))
    await kubernetes.request("PATCH", f"{VMIS}/one", begin("first"), MERGE_PATCH)
    foreign = await kubernetes.kubevirt_token("somebody")
    kubernetes._tokens[HERE] = foreign
    async with listening(kubernetes, tmp_path, door.url, HERE, DEAF) as target:
        for _ in range(2):
            with pytest.raises(PublishError, match=r"virt-api's mutating webhook.*kubevirt-handler.*--publish-status"):
                await publish(target)
        assert len(patches(door)) == 2, "what was set back does not count as published"
        assert not target.inventory.has_notes


async def test_an_account_that_no_policy_binds_announces_nothing(
    kubernetes: Cluster, target: Listener, door: Gate, tmp_path: Path
) -> None:
    await kubernetes.use_renamed_account(HERE, "proxy")
    found = target.named("one")
    assert found
    async with ApiServer(str(kubernetes.kubeconfig(tmp_path, HERE, door.url))) as api:
        with pytest.raises(PublishError, match=r"VMI default/one: not announced: .*apply daemonset\.yaml again"):
            await Announcements(api).announce(found, Announcement("first", PORTS, ADDRESS))
    metadata = (await read(kubernetes))["metadata"]
    assert metadata["annotations"] == vmi("one")["metadata"]["annotations"], "and the attempt had no effect"


async def test_whether_the_policy_is_in_force_is_asked_once_whatever_prefix_the_account_has(
    kubernetes: Cluster, target: Listener, door: Gate, tmp_path: Path
) -> None:
    await kubernetes.use_renamed_account(HERE, "prefixed-migproxy-suffixed")
    async with ApiServer(str(kubernetes.kubeconfig(tmp_path, HERE, door.url))) as api:
        announcements = Announcements(api)
        for text in ("first", "second"):
            found = target.named("one")
            assert found
            await announcements.announce(found, Announcement(text, PORTS, ADDRESS))
            await eventually(lambda: announced(target) != found.announced, "what was announced")  # noqa: B023
    assert len(patches(door, 403)) == 1
    assert len(patches(door)) == 2


async def test_announcing_with_a_token_without_a_nodes_name_is_no_conflict(
    kubernetes: Cluster, target: Listener, door: Gate, tmp_path: Path
) -> None:
    await kubernetes.use_unbound_token(HERE)
    found = target.named("one")
    assert found
    async with ApiServer(str(kubernetes.kubeconfig(tmp_path, HERE, door.url))) as api:
        with pytest.raises(PublishError, match=r"cannot announce: .*Kubernetes 1\.30"):
            await Announcements(api).announce(found, Announcement("first", PORTS, ADDRESS))
    assert len(patches(door, 403)) == 1


def announced(target: Listener) -> str | None:
    found = target.named("one")
    return found.announced if found else None


def told(target: Listener) -> str | None:
    found = target.named("one")
    return found.migration.target_node_address if found and found.migration else "nothing"


# Events


async def events(kubernetes: Cluster) -> dict[str, Any]:
    """The Events in the VMI's namespace, by reason."""
    found = await kubernetes.request("GET", "/api/v1/namespaces/default/events")
    by_reason = {item["reason"]: item for item in found["items"]}
    assert len(by_reason) == len(found["items"]), "one Event a reason"
    return by_reason


async def event(kubernetes: Cluster, reason: str, count: int = 1) -> Any:
    """An Event, when it has been counted that often."""
    async with asyncio.timeout(30):
        while True:
            found = (await events(kubernetes)).get(reason)
            if found and found["count"] == count:
                return found
            await asyncio.sleep(0.05)


async def test_listening_is_an_event_on_the_vmi(kubernetes: Cluster, target: Listener) -> None:
    await publish(target)
    found = await event(kubernetes, "MigrationProxyListening")
    vmi_now = await read(kubernetes)
    assert found["involvedObject"]["uid"] == vmi_now["metadata"]["uid"]
    assert found["involvedObject"]["kind"] == "VirtualMachineInstance"
    assert found["type"] == "Normal"
    assert "10.1.1.2" in found["message"]
    assert "32899 (libvirt)" in found["message"]
    assert found["source"] == {"component": "migproxy", "host": HERE}


async def test_same_event_is_counted_not_repeated(
    kubernetes: Cluster, target: Listener, door: Gate, clock: Clock
) -> None:
    found = target.named("one")
    assert found
    for number in range(100):
        target.inventory.note(found, "MigrationProxyFailed", f"no launcher ({number})", warning=True)
    shown = await event(kubernetes, "MigrationProxyFailed", 100)
    assert shown["type"] == "Warning"
    assert shown["message"] == "no launcher (99)"
    target.inventory.note(found, "MigrationProxyFailed", "no launcher (100)", warning=True)
    await publish(target)
    await event(kubernetes, "MigrationProxyListening")
    assert sum("events" in one.path for one in door.passed) == 2
    await eventually(lambda: sum("events" in one.path for one in door.passed) == 3, "the later one's turn")
    assert clock() == 30


async def test_event_of_an_earlier_life_is_counted_on(
    kubernetes: Cluster, target: Listener, door: Gate, tmp_path: Path
) -> None:
    found = target.named("one")
    assert found
    target.inventory.note(found, "MigrationProxyFailed", "no launcher", warning=True)
    await event(kubernetes, "MigrationProxyFailed")
    async with listening(kubernetes, tmp_path, door.url, HERE) as restarted:
        restarted.inventory.note(found, "MigrationProxyFailed", "still none", warning=True)
        assert (await event(kubernetes, "MigrationProxyFailed", 2))["message"] == "still none"


async def test_denied_events_are_given_up(kubernetes: Cluster, target: Listener, door: Gate) -> None:
    found = target.named("one")
    assert found
    await kubernetes.request(
        "PATCH",
        "/apis/rbac.authorization.k8s.io/v1/clusterroles/kubevirt-handler",
        {
            "rules": [
                {"apiGroups": ["kubevirt.io"], "resources": ["virtualmachineinstances"], "verbs": ["list", "watch"]}
            ]
        },
        MERGE_PATCH,
    )
    target.inventory.note(found, "MigrationProxyFailed", "no launcher", warning=True)
    await eventually(lambda: any("events" in one.path and one.status == 403 for one in door.passed), "the refusal")
    await kubernetes.request("DELETE", f"{VMIS}/one")
    await eventually(lambda: target.names == set(), "a change, which is still told")
    assert sum("events" in one.path for one in door.passed) == 1
