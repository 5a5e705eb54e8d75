"""What should run on a node: each rule by itself, then properties that hold for any set of VMIs."""

import ipaddress
import random
import time
from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from migproxy.announcement import server_name
from migproxy.plan import Beside as SourceBeside
from migproxy.plan import (
    Held,
    Launcher,
    Migration,
    Plan,
    Readiness,
    Reason,
    Role,
    SourceProxy,
    TargetProxy,
    make_plan,
    sources_on,
)
from migproxy.portmap import Channel, IPAddress, PortMap, parse_address, source_socket_name
from migproxy.vmi import VMI, InvalidVMI, parse

pytestmark = pytest.mark.tier("gate")

NODE = "node01"
NOW = datetime(2026, 8, 1, 12, tzinfo=UTC)
STARTED = {"startTimestamp": "2026-08-01T11:59:00Z"}
UID = str(UUID(int=1))
SOURCE_UID = str(UUID(int=99))
OWN = ipaddress.ip_address("10.1.1.1")
OLD_OWN = ipaddress.ip_address("fd00::1")
OTHER = ipaddress.ip_address("10.1.1.2")
TWO = {"32899": 0, "42691": 49152}
THREE = {**TWO, "39497": 49153}
TWO_PORTS = PortMap.of({Channel.LIBVIRT: 32899, Channel.DIRECT: 42691})
THREE_PORTS = PortMap.of({**TWO_PORTS, Channel.BLOCK: 39497})
BLOCK = {"migrationMethod": "BlockMigration"}


def document(
    role: Role,
    migration: dict[str, Any] | None = None,
    status: dict[str, Any] | None = None,
    uid: str = UID,
    name: str = "vmi-migratable",
    **metadata: Any,
) -> dict[str, Any]:
    """A VMI of which this node is the source or the target."""
    here_and_there = (NODE, "node02") if role is Role.SOURCE else ("node02", NODE)
    return {
        "metadata": {
            "namespace": "default",
            "name": name,
            "uid": uid,
            "labels": {"kubevirt.io/migrationTargetNodeName": here_and_there[1]},
            **metadata,
        },
        "status": {
            "nodeName": here_and_there[0],
            "phase": "Running",
            "activePods": {f"{uid}-b": NODE, f"{uid}-a": NODE, f"{uid}-c": "node02"},
            "migrationTransport": "Unix",
            "migrationState": {
                "migrationUid": f"m-{uid}",
                "sourceNode": here_and_there[0],
                "targetNode": here_and_there[1],
                **(migration or {}),
            },
            **(status or {}),
        },
    }


def published(address: object = str(OTHER), ports: object = TWO, **migration: Any) -> dict[str, Any]:
    return {"targetNodeAddress": address, "targetDirectMigrationNodePorts": ports, **migration}


def plan(*documents: dict[str, Any], own: Collection[IPAddress] = (OWN, OLD_OWN)) -> Plan:
    return make_plan([parse(document) for document in documents], NODE, own, NOW)


def the_source(*args: Any, **kwargs: Any) -> SourceProxy:
    made = plan(document(Role.SOURCE, *args, **kwargs))
    assert not made.held
    assert not made.targets
    (proxy,) = made.sources
    return proxy


def the_target(*args: Any, **kwargs: Any) -> TargetProxy:
    made = plan(document(Role.TARGET, *args, **kwargs))
    assert not made.held
    assert not made.sources
    (proxy,) = made.targets
    return proxy


def the_hold(role: Role, *args: Any, **kwargs: Any) -> Held:
    made = plan(document(role, *args, **kwargs))
    assert not made.sources
    assert not made.targets
    (held,) = made.held
    assert held.role is role
    return held


# --- any role


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(
    ("migration", "status", "metadata"),
    [
        ({"endTimestamp": "2026-08-01T11:00:00Z", "completed": True}, {}, {}),
        ({"endTimestamp": "2026-08-01T11:00:00Z", "failed": True}, {}, {}),
        ({}, {"phase": "Succeeded"}, {}),
        ({}, {"phase": "Failed"}, {}),
        ({}, {}, {"deletionTimestamp": "2026-08-01T11:00:00Z"}),
    ],
)
def test_a_done_migration_and_an_ended_vmi_have_nothing(
    role: Role, migration: dict[str, Any], status: dict[str, Any], metadata: dict[str, Any]
) -> None:
    address = OTHER if role is Role.SOURCE else OWN
    live = document(role, published(str(address)))
    over = document(role, published(str(address), **migration), status, **metadata)
    assert plan(live) != Plan((), (), ())
    assert plan(over) == Plan((), (), ())


def test_a_vmi_that_does_not_concern_this_node_has_nothing() -> None:
    for role in Role:
        assert make_plan([parse(document(role, published()))], "node03", [OWN], NOW) == Plan((), (), ())


def test_a_proxy_knows_its_migration_and_where_to_look_for_the_launcher() -> None:
    for proxy in (the_source(published()), the_target()):
        assert proxy.migration == Migration("default", "vmi-migratable", UID, f"m-{UID}")
        assert str(proxy.migration) == f"default/vmi-migratable (migration m-{UID})"
        assert proxy.launcher == Launcher("default", "vmi-migratable", UID, (f"{UID}-a", f"{UID}-b"))
        assert proxy.key == UID
    assert the_source(published()).role is Role.SOURCE
    assert the_target().role is Role.TARGET


def test_a_standalone_file_may_omit_the_migration_uid() -> None:
    proxy = the_target({"migrationUid": None})
    assert proxy.migration.migration_uid == ""
    assert str(proxy.migration) == "default/vmi-migratable (migration without a UID)"


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(
    ("status", "uid", "complaint"),
    [
        ({}, "..", "the VMI's UID must not be used in a path: '..' is not a UID"),
        ({}, "a" * 100, "has 100 characters"),
        ({"activePods": {"..": NODE}}, UID, "a pod's UID in status.activePods must not be used in a path"),
    ],
)
def test_no_uid_from_the_status_becomes_a_path(role: Role, status: dict[str, Any], uid: str, complaint: str) -> None:
    held = the_hold(role, published(str(OWN)), status, uid=uid)
    assert held.error
    assert complaint in held.reason


def test_pods_on_other_nodes_are_not_looked_at() -> None:
    assert the_target(None, {"activePods": {"..": "node02", "p": NODE}}).launcher.pods == ("p",)
    assert the_target(None, {"activePods": None}).launcher.pods == ()


@pytest.mark.parametrize("beside", [None, Readiness(OWN)])
def test_a_vmi_that_goes_from_a_node_to_the_same_is_an_error_of_both_roles(beside: Readiness | None) -> None:
    labels = {"kubevirt.io/migrationTargetNodeName": NODE}
    vmi = parse(document(Role.SOURCE, published(str(OWN)), labels=labels))
    made = make_plan([vmi], NODE, [OWN], NOW, beside)
    assert (made.sources, made.targets, made.bypassed) == ((), (), ())
    assert [(held.role, held.error) for held in made.held] == [(Role.SOURCE, True), (Role.TARGET, True)]
    for held in made.held:
        assert all(words in held.reason for words in ("sourceNode", *labels, f"name {NODE}", "--node-name"))
    # The status alone says so, where it has no nodeName.
    (held,) = plan(document(Role.TARGET, {"sourceNode": NODE}, {"nodeName": None})).held
    assert (held.role, held.error) == (Role.TARGET, True)


@pytest.mark.parametrize(
    ("migration", "metadata"),
    [
        (
            {"sourceState": {"virtualMachineInstanceUID": SOURCE_UID}},
            {"annotations": {"kubevirt.io/create-migration-target": "true"}},
        ),
        ({"sourceState": {"syncAddress": "a"}, "targetState": {"virtualMachineInstanceUID": UID}}, {}),
    ],
)
def test_two_vmis_of_a_decentralized_migration_may_be_on_nodes_of_one_name(
    migration: dict[str, Any], metadata: dict[str, Any]
) -> None:
    assert the_target({"sourceNode": NODE, **migration}, **metadata)


# --- the source


@pytest.mark.parametrize(
    ("state", "missing"),
    [
        ({}, "address and ports"),
        (published(ports=None), "ports"),
        (published(address=None), "address"),
    ],
)
def test_the_source_waits_for_the_target_to_publish(state: dict[str, Any], missing: str) -> None:
    assert the_hold(Role.SOURCE, state) == Held(
        Migration("default", "vmi-migratable", UID, f"m-{UID}"),
        Role.SOURCE,
        f"waiting for the target to publish its {missing}",
        error=False,
    )


def test_the_source_leads_to_what_the_target_published() -> None:
    proxy = the_source(published(ports=THREE), BLOCK)
    assert (proxy.address, proxy.ports, proxy.warnings) == (OTHER, THREE_PORTS, ())


@pytest.mark.parametrize("address", ["fd00::2", "[fd00::2]"])
def test_the_targets_address_may_be_ipv6(address: str) -> None:
    assert the_source(published(address)).address == ipaddress.ip_address("fd00::2")


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        (published("node02.example.org"), "'node02.example.org' is not an IP address"),
        (published("0.0.0.0"), "0.0.0.0 is not the address of a node"),
        (published("169.254.169.254"), "169.254.169.254 is link-local"),
        (published("fe80::1%eth0"), "fe80::1%eth0 is a link-local address, and this node's own"),
        (published("127.0.0.1"), "127.0.0.1 is a loopback address, and this node's own migration address is not"),
        (published("::1"), "::1 is a loopback address"),
        (published("::ffff:127.0.0.1"), "127.0.0.1 is a loopback address"),
        (published(ports={}), "the port map is empty"),
        (published(ports={"x": 0}), "key 'x' is not a decimal port number"),
    ],
)
def test_the_source_cannot_use_a_malformed_publication(state: dict[str, Any], complaint: str) -> None:
    held = the_hold(Role.SOURCE, state)
    assert held.error
    assert complaint in held.reason


def test_a_source_leads_to_a_link_local_address_of_its_own_zone() -> None:
    own = parse_address("fe80::2%migration0")
    there, elsewhere = (
        plan(document(Role.SOURCE, published(f"fe80::1%{zone}")), own=(own,)) for zone in ("migration0", "eth0")
    )
    assert there.sources[0].address == parse_address("fe80::1%migration0")
    assert not elsewhere.sources


def test_a_source_whose_status_claims_another_cluster_says_all_the_same_which_migration_it_means() -> None:
    """Else it could pass for KubeVirt's, which says nothing, at another migration's target."""
    other = {"nodeAddress": str(OTHER), "directMigrationNodePorts": TWO}
    assert the_source({**published(), **decentralized(other)}).name == the_source(published()).name


def test_a_source_leads_to_loopback_where_this_node_s_own_address_is_loopback_too() -> None:
    state = document(Role.SOURCE, published("127.0.0.2"))
    (source,) = plan(state, own=[ipaddress.ip_address("127.0.0.1")]).sources
    assert source.address == ipaddress.ip_address("127.0.0.2")
    assert plan(state, own=()).held


def test_a_source_runs_with_the_channels_published_and_warns_of_those_missing() -> None:
    proxy = the_source(published(ports=TWO), BLOCK)
    assert proxy.ports == TWO_PORTS
    assert proxy.warnings == ("no port is published for the block channel, which this migration needs",)
    only_block = the_source(published(ports={"39497": 49153}))
    assert [warning.split()[6] for warning in only_block.warnings] == ["libvirt", "direct"]


def test_a_source_serves_the_channels_that_it_knows_and_warns_of_others() -> None:
    proxy = the_source(published(ports=TWO | {"40000": 49154}))
    assert proxy.ports == TWO_PORTS
    assert proxy.warnings == ("the target published ports for unknown channels, which are not served here: 49154",)


def test_a_source_knows_whether_the_migration_runs() -> None:
    assert the_source(published(**STARTED)).running
    assert not the_source(published(startTimestamp="2026-08-01T12:00:01Z")).running


def decentralized(target_state: dict[str, Any]) -> dict[str, Any]:
    return {"sourceState": {}, "targetState": {"syncAddress": "192.0.2.1:9185", **target_state}}


def test_a_decentralized_source_reads_the_other_clusters_side() -> None:
    side = {"nodeAddress": "10.1.1.3", "directMigrationNodePorts": THREE}
    proxy = the_source({**published(), **decentralized(side)}, {"nodeName": "elsewhere"})
    assert (proxy.address, proxy.ports) == (ipaddress.ip_address("10.1.1.3"), THREE_PORTS)


def test_a_decentralized_source_falls_back_to_the_common_port_map() -> None:
    proxy = the_source({**published(), **decentralized({"nodeAddress": "10.1.1.3"})})
    assert (proxy.address, proxy.ports) == (ipaddress.ip_address("10.1.1.3"), TWO_PORTS)


def test_a_decentralized_source_waits_for_the_other_clusters_node_address() -> None:
    held = the_hold(Role.SOURCE, {**published(), **decentralized({})}, {"nodeName": "elsewhere"})
    assert held.reason == "waiting for the target to publish its address"
    assert not held.error


def test_a_migration_within_one_cluster_does_not_read_the_target_state() -> None:
    state = {"sourceState": {}, "targetState": {"nodeAddress": "10.1.1.3", "directMigrationNodePorts": THREE}}
    assert the_source({**published(), **state}).address == OTHER


# --- the target


def test_a_target_that_has_published_nothing_chooses_its_ports() -> None:
    proxy = the_target()
    assert proxy.channels == (Channel.LIBVIRT, Channel.DIRECT)
    assert (proxy.published_address, proxy.published, proxy.running) == (None, None, False)
    assert the_target(None, BLOCK).channels == tuple(Channel)


def test_ports_without_an_address_were_not_published_by_anybody() -> None:
    assert the_target(published(address=None)).published is None


@pytest.mark.parametrize("own", [OWN, OLD_OWN])
@pytest.mark.parametrize("state", [{}, STARTED])
def test_ports_published_with_an_address_of_this_node_are_bound_again_exactly(
    own: IPAddress, state: dict[str, Any]
) -> None:
    proxy = the_target(published(str(own), THREE, **state))
    assert (proxy.published_address, proxy.published) == (own, THREE_PORTS)
    assert proxy.channels == tuple(Channel)
    assert proxy.running is bool(state)


def test_an_ipv4_mapped_address_is_its_ipv4_address() -> None:
    assert the_target(published(f"::ffff:{OWN}")).published_address == OWN
    assert the_source(published(f"::ffff:{OTHER}")).address == OTHER


@pytest.mark.parametrize(
    ("state", "remedy"),
    [
        ({}, "if nobody listens there, clear targetNodeAddress and targetDirectMigrationNodePorts"),
        (STARTED, "it is left alone while the migration runs"),
    ],
)
@pytest.mark.parametrize(
    ("address", "complaint"),
    [(str(OTHER), "10.1.1.2 is not an address of this node"), ("node01", "'node01' is not an IP address")],
)
def test_somebody_elses_address_is_left_alone_and_said_so(
    address: str, complaint: str, state: dict[str, Any], remedy: str
) -> None:
    held = the_hold(Role.TARGET, published(address, **state))
    assert held.error
    assert complaint in held.reason
    assert remedy in held.reason


def test_without_a_migration_address_nobody_can_tell_whose_the_published_one_is() -> None:
    (held,) = plan(document(Role.TARGET, published(str(OWN))), own=()).held
    assert not held.error
    assert held.reason == "waiting for a migration address: 10.1.1.1 in the status may be ours"
    assert plan(document(Role.TARGET), own=()).targets


@pytest.mark.parametrize(
    ("ports", "kept"),
    [
        (None, None),
        ("nonsense", None),
        ({"32899": 0, "x": 49152}, PortMap.of({Channel.LIBVIRT: 32899})),
        (TWO, TWO_PORTS),
    ],
)
def test_before_the_start_a_damaged_or_partial_map_keeps_what_is_sound(ports: object, kept: PortMap | None) -> None:
    proxy = the_target(published(str(OWN), ports), BLOCK)
    assert proxy.published == kept
    assert proxy.published_address == OWN
    assert proxy.channels == tuple(Channel)
    assert proxy.warnings == ()


@pytest.mark.parametrize("ports", [None, "nonsense", {}, {"32899": 0, "x": 49152}])
def test_a_running_target_with_a_malformed_map_is_an_error(ports: object) -> None:
    held = the_hold(Role.TARGET, published(str(OWN), ports, **STARTED))
    assert held.error
    assert "restore targetDirectMigrationNodePorts" in held.reason


def test_a_running_target_listens_for_what_it_published_and_nothing_else() -> None:
    proxy = the_target(published(str(OWN), TWO, **STARTED), BLOCK)
    assert proxy.channels == (Channel.LIBVIRT, Channel.DIRECT)
    assert proxy.warnings == ("no port is published for the block channel, which this migration needs",)


def test_a_migration_that_started_unpublished_is_an_error() -> None:
    held = the_hold(Role.TARGET, STARTED)
    assert held.error
    assert "nothing may be published any more" in held.reason


def test_a_target_without_a_migration_state_waits_for_it() -> None:
    held = the_hold(Role.TARGET, None, {"migrationState": None})
    assert held == Held(
        Migration("default", "vmi-migratable", UID, ""), Role.TARGET, "waiting for status.migrationState", error=False
    )


FOR_MIGRATION = {"kubevirt.io/create-migration-target": "true"}


@pytest.mark.parametrize(("source_state", "transport"), [(None, "Unix"), ({}, None), (None, None)])
def test_a_decentralized_target_waits_for_source_state_and_transport(source_state: object, transport: object) -> None:
    held = the_hold(
        Role.TARGET, {"sourceState": source_state}, {"migrationTransport": transport}, annotations=FOR_MIGRATION
    )
    assert not held.error
    assert held.reason == "waiting for sourceState and migrationTransport from the source's cluster"


@pytest.mark.parametrize(("transport", "key"), [("Unix", SOURCE_UID), ("TCP", UID)])
def test_a_decentralized_targets_key_depends_on_the_transport(transport: str, key: str) -> None:
    state = {"sourceState": {"virtualMachineInstanceUID": SOURCE_UID, "syncAddress": "192.0.2.1"}, "targetState": {}}
    proxy = the_target(state, {"migrationTransport": transport}, annotations=FOR_MIGRATION)
    assert proxy.key == key
    assert proxy.launcher.vmi_uid == UID


def test_a_hostile_source_uid_is_no_key() -> None:
    state = {"sourceState": {"virtualMachineInstanceUID": ".."}}
    held = the_hold(Role.TARGET, state, annotations=FOR_MIGRATION)
    assert held.error
    assert "the UID in the sockets' names must not be used in a path" in held.reason


def test_an_aborting_decentralized_migration_keeps_its_target_until_the_end() -> None:
    state = {
        "sourceState": {"virtualMachineInstanceUID": SOURCE_UID, "syncAddress": "192.0.2.1"},
        "targetState": {},
        "abortRequested": True,
        **published(str(OWN), **STARTED),
    }
    assert the_target(state, annotations=FOR_MIGRATION).published == TWO_PORTS
    over = {**state, "endTimestamp": "2026-08-01T12:00:00Z", "failed": True}
    assert plan(document(Role.TARGET, over, annotations=FOR_MIGRATION)) == Plan((), (), ())


# --- several targets


def contenders(**states: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        document(Role.TARGET, published(str(OWN), **state), uid=str(UUID(int=number)), name=name)
        for number, (name, state) in enumerate(states.items())
    ]


def test_of_two_targets_with_one_port_the_first_keeps_it_and_the_other_chooses_anew() -> None:
    documents = contenders(a={}, b={"ports": {"32899": 49152}})
    first, second = plan(*documents).targets
    assert (first.migration.name, first.published) == ("a", TWO_PORTS)
    assert (second.migration.name, second.published) == ("b", None)
    assert second.channels == (Channel.LIBVIRT, Channel.DIRECT)
    assert second.warnings == (f"port 32899 at 10.1.1.1 is published for {first.migration} too, which keeps it",)
    assert plan(*reversed(documents)) == plan(*documents)


def test_a_running_target_keeps_its_port_before_one_that_does_not_run() -> None:
    first, second = plan(*contenders(a={}, b=STARTED)).targets
    assert (first.published, second.published) == (None, TWO_PORTS)


@pytest.mark.parametrize("states", [{"a": STARTED, "b": {}}, {"a": STARTED, "b": STARTED}], ids=["prepared", "running"])
def test_whoever_listens_on_a_port_keeps_it_whatever_anothers_status_says(states: dict[str, dict[str, Any]]) -> None:
    vmis = [parse(one) for one in contenders(**states)]
    made = make_plan(vmis, NODE, (OWN,), NOW, listens=lambda migration, port: (migration.name, port) == ("b", 32899))
    assert {one.migration.name: one.published for one in made.targets}["b"] == TWO_PORTS
    assert [one.migration.name for one in made.held] == ["a"]


def test_of_two_running_targets_with_one_port_one_is_an_error() -> None:
    made = plan(*contenders(a=STARTED, b=STARTED))
    (kept,), (held,) = made.targets, made.held
    assert kept.migration.name == "a"
    assert held.migration.name == "b"
    assert held.error
    assert f"port 32899 at 10.1.1.1 is published for {kept.migration} too" in held.reason


def test_a_target_that_lost_its_ports_takes_none_from_a_third() -> None:
    states: dict[str, dict[str, Any]] = {
        "a": {"ports": {"1": 0}}, "b": {"ports": {"1": 0, "2": 49152}}, "c": {"ports": {"2": 49152}}
    }  # fmt: skip
    made = plan(*contenders(**states))
    assert [proxy.published is None for proxy in made.targets] == [False, True, False]


def test_one_port_at_two_addresses_is_no_conflict() -> None:
    documents = [
        document(Role.TARGET, published(str(own)), uid=str(UUID(int=number)))
        for number, own in enumerate([OWN, OLD_OWN])
    ]
    assert [proxy.published for proxy in plan(*documents).targets] == [TWO_PORTS, TWO_PORTS]


# --- properties


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def likely(*values: object) -> st.SearchStrategy[object]:
    """One of these, nothing, or, now and then, anything."""
    usual = st.sampled_from([*values, None])
    return st.integers(0, 30).flatmap(lambda die: json_values if die == 30 else usual)


times = likely("2026-08-01T11:00:00Z", "2026-08-01T13:00:00Z", 0)
flags = likely(True, False)
nodes = likely(NODE, "node02")
addresses = likely(str(OWN), str(OLD_OWN), str(OTHER), "node01")
port_maps = st.dictionaries(st.integers(1, 6).map(str), st.sampled_from([0, 49152, 49153]), min_size=1, max_size=3)
ports = port_maps | json_values
uids = likely(UID, SOURCE_UID, "..")
sides = likely({}) | st.fixed_dictionaries(
    {},
    optional={
        "virtualMachineInstanceUID": uids,
        "syncAddress": likely("192.0.2.1"),
        "nodeAddress": addresses,
        "directMigrationNodePorts": ports,
    },
)
states = json_values | st.fixed_dictionaries(
    {"sourceNode": nodes, "targetNodeAddress": addresses, "targetDirectMigrationNodePorts": ports},
    optional={
        "migrationUid": likely("m-1", "m-2"),
        "targetNode": nodes,
        "startTimestamp": times,
        "endTimestamp": times,
        "completed": flags,
        "failed": flags,
        "abortRequested": flags,
        "sourceState": sides,
        "targetState": sides,
    },
)
documents = st.fixed_dictionaries(
    {
        "metadata": st.fixed_dictionaries(
            {"name": st.sampled_from("ab"), "uid": st.sampled_from([UID, SOURCE_UID, ".."])},
            optional={
                "labels": st.fixed_dictionaries({"kubevirt.io/migrationTargetNodeName": nodes}),
                "annotations": st.fixed_dictionaries({"kubevirt.io/create-migration-target": likely("true")}),
                "deletionTimestamp": times,
            },
        ),
        "status": json_values
        | st.fixed_dictionaries(
            {"migrationState": states, "nodeName": nodes},
            optional={
                "phase": likely("Running", "Succeeded"),
                "activePods": json_values | st.dictionaries(uids.filter(lambda u: isinstance(u, str)), nodes),
                "migrationTransport": likely("Unix"),
                "migrationMethod": likely("BlockMigration"),
                "migratedVolumes": json_values,
            },
        ),
    }
)


@given(documents)
def test_garbage_in_a_status_is_refused_or_held_and_nothing_else(garbage: dict[str, Any]) -> None:
    try:
        vmi = parse(garbage)
    except InvalidVMI:
        return
    make_plan([vmi], NODE, [OWN], NOW)


good_maps = st.permutations(range(1, 7)).map(lambda ports: {str(ports[0]): 0, str(ports[1]): 49152})
some_vmis = st.lists(
    st.builds(
        document,
        role=st.sampled_from(Role),
        migration=st.fixed_dictionaries(
            {
                "targetNodeAddress": st.sampled_from([str(OWN), str(OWN), str(OLD_OWN), str(OTHER), "node01", None]),
                "targetDirectMigrationNodePorts": good_maps | good_maps | port_maps | st.none(),
                "startTimestamp": st.sampled_from(["2026-08-01T11:00:00Z", "2026-08-01T13:00:00Z", None]),
            },
            optional={
                "endTimestamp": st.just("2026-08-01T11:30:00Z"),
                "completed": st.booleans(),
                "failed": st.booleans(),
            },
        ),
        status=st.fixed_dictionaries(
            {},
            optional={
                "phase": st.sampled_from(["Running", "Failed"]),
                "migrationMethod": st.sampled_from(["BlockMigration", "LiveMigration"]),
            },
        ),
        uid=st.integers(0, 20).map(lambda n: str(UUID(int=n)) if n else ".."),
        name=st.sampled_from("ab"),
    ),
    max_size=8,
    unique_by=lambda vmi: vmi["metadata"]["uid"],
).map(lambda found: [parse(document) for document in found])


rivals = st.lists(
    st.tuples(st.sampled_from([OWN, OLD_OWN]), good_maps, st.sampled_from([{}, STARTED])), min_size=2, max_size=6
).map(
    lambda found: [
        parse(document(Role.TARGET, published(str(address), ports, **state), uid=str(UUID(int=number))))
        for number, (address, ports, state) in enumerate(found)
    ]
)


@given(some_vmis | rivals)
def test_no_port_has_two_owners(vmis: list[VMI]) -> None:
    made = make_plan(vmis, NODE, [OWN, OLD_OWN], NOW)
    owned = Counter(
        (proxy.published_address, port) for proxy in made.targets for port in (proxy.published or {}).values()
    )
    assert all(count == 1 for count in owned.values())


@given(some_vmis | rivals, st.randoms(use_true_random=False))
def test_the_order_of_the_vmis_does_not_matter(vmis: list[VMI], shuffler: random.Random) -> None:
    shuffled = vmis.copy()
    shuffler.shuffle(shuffled)
    assert make_plan(shuffled, NODE, [OWN, OLD_OWN], NOW) == make_plan(vmis, NODE, [OLD_OWN, OWN], NOW)


@given(some_vmis)
def test_each_live_migration_of_this_node_is_planned_or_held_exactly_once(vmis: list[VMI]) -> None:
    made = make_plan(vmis, NODE, [OWN, OLD_OWN], NOW)
    decisions: list[SourceProxy | TargetProxy | Held] = [*made.sources, *made.targets, *made.held]
    decided = [(decision.migration.vmi_uid, decision.role) for decision in decisions]
    live = [vmi for vmi in vmis if not vmi.is_done() and not vmi.has_ended()]
    expected = [(vmi.uid, Role.SOURCE) for vmi in live if vmi.is_source_on(NODE)]
    expected += [(vmi.uid, Role.TARGET) for vmi in live if vmi.is_target_on(NODE)]
    assert sorted(decided) == sorted(expected)


@given(some_vmis)
def test_what_is_planned_can_be_carried_out(vmis: list[VMI]) -> None:
    made = make_plan(vmis, NODE, [OWN, OLD_OWN], NOW)
    for key in [*(proxy.key for proxy in made.sources), *(proxy.key for proxy in made.targets)]:
        assert "/" not in source_socket_name(key, Channel.BLOCK)
    for proxy in made.targets:
        assert proxy.channels
        assert set(proxy.published or ()) <= set(proxy.channels)
        assert proxy.published_address in (None, OWN, OLD_OWN)
        assert not proxy.running or tuple(proxy.published or ()) == proxy.channels


@given(some_vmis)
def test_one_migration_never_changes_what_another_source_does(vmis: list[VMI]) -> None:
    assume(vmis)
    rest = make_plan(vmis[1:], NODE, [OWN], NOW).sources
    assert set(rest) <= set(make_plan(vmis, NODE, [OWN], NOW).sources)


def test_a_thousand_vmis_are_planned_in_a_few_milliseconds() -> None:
    idle = [
        parse({"metadata": {"name": f"vmi-{n}", "uid": str(UUID(int=n))}, "status": {"nodeName": NODE}})
        for n in range(100, 1090)
    ]
    moving = [parse(document(Role.SOURCE, published(), uid=str(UUID(int=n)))) for n in range(10)]
    began = time.process_time()
    for _ in range(10):
        assert len(make_plan(idle + moving, NODE, [OWN], NOW).sources) == 10
    assert time.process_time() - began < 10 * 0.02


def test_each_part_of_a_plan_is_sorted_by_migration() -> None:
    uids = [str(UUID(int=number)) for number in (3, 1, 2)]
    made = plan(
        *(document(Role.SOURCE, published(), uid=uid) for uid in uids),
        *(document(Role.TARGET, uid=uid, name="target") for uid in uids),
        *(document(Role.SOURCE, uid=uid, name="waiting") for uid in uids),
    )
    for part in (made.sources, made.targets, made.held):
        assert [decision.migration.vmi_uid for decision in part] == sorted(uids)


def test_a_start_in_the_future_begins_when_its_time_comes() -> None:
    vmi = parse(document(Role.TARGET, published(str(OWN), startTimestamp="2026-08-01T12:00:01Z")))
    running = [make_plan([vmi], NODE, [OWN], now).targets[0].running for now in (NOW, NOW + timedelta(seconds=1))]
    assert running == [False, True]


# Beside virt-handler, which publishes

ANNOUNCED = f"1 m-{UID} 32899:0,42691:49152 {OWN}"
ENDED = {"endTimestamp": "2026-08-01T11:59:30Z", "completed": True}


def beside(vmi: dict[str, Any], address: IPAddress | None = OWN, **known: Any) -> Plan:
    return make_plan([parse(vmi)], NODE, (), NOW, Readiness(address, **known))


def annotated(announced: str | None) -> dict[str, Any]:
    return {"annotations": {"migproxy.io/target": announced} if announced else {}}


def target_beside(migration: dict[str, Any] | None = None, announced: str | None = None, **known: Any) -> Plan:
    return beside(document(Role.TARGET, migration, **annotated(announced)), **known)


def source_beside(migration: dict[str, Any] | None = None, announced: str | None = None, **known: Any) -> SourceProxy:
    (source,) = beside(document(Role.SOURCE, migration or published(), **annotated(announced)), **known).sources
    return source


@pytest.mark.parametrize("migration", [None, published(str(OWN)), published(str(OTHER), THREE)])
def test_target_is_announced_before_the_start_whatever_virt_handler_publishes(migration: dict[str, Any] | None) -> None:
    (proxy,) = target_beside(migration).targets
    assert (proxy.announce, proxy.published, proxy.channels) == (True, None, tuple(TWO_PORTS))
    assert (proxy.published_address, proxy.name) == (OWN, server_name(UID, f"m-{UID}"))
    made = target_beside(migration, ANNOUNCED)
    (again,) = made.targets
    assert (again.announce, again.published, made.stale) == (True, TWO_PORTS, ())


def test_what_was_announced_is_kept_from_the_start_on() -> None:
    made = target_beside(published(str(OTHER), **STARTED), ANNOUNCED, address=None)
    (proxy,) = made.targets
    assert (proxy.announce, proxy.published, proxy.running) == (False, TWO_PORTS, True)
    assert (proxy.published_address, proxy.channels, made.stale) == (OWN, tuple(TWO_PORTS), ())


def test_address_that_has_changed_is_announced_anew_before_the_start() -> None:
    (proxy,) = target_beside(None, f"1 m-{UID} 32899:0,42691:49152 {OTHER}").targets
    assert (proxy.announce, proxy.published, proxy.published_address) == (True, None, OWN)


@pytest.mark.parametrize(
    ("migration", "announced", "known", "reason"),
    [
        pytest.param(published(str(OWN), **STARTED), None, {}, Reason.STARTED, id="never announced"),
        pytest.param(STARTED, f"1 other 32899:0,42691:49152 {OWN}", {}, Reason.STARTED, id="for another one"),
        pytest.param(STARTED, "2 whatever", {}, Reason.STARTED, id="by another version"),
        pytest.param(
            STARTED, f"1 m-{UID} 32899:0,42691:49152 {OTHER}", {}, Reason.MALFORMED, id="another node's address"
        ),
        pytest.param(None, ANNOUNCED, {"unready": "no certificate"}, Reason.UNREADY, id="no certificate"),
        pytest.param(None, ANNOUNCED, {"address": None}, Reason.UNREADY, id="no address"),
    ],
)
def test_anything_else_goes_by_virt_handler_and_the_announcement_goes(
    migration: dict[str, Any] | None, announced: str | None, known: dict[str, Any], reason: Reason
) -> None:
    made = target_beside(migration, announced, **known)
    (bypassed,) = made.bypassed
    assert (bypassed.reason, made.targets, made.held) == (reason, (), ())
    assert made.stale == ((UID,) if announced else ())


def test_target_of_another_clusters_source_is_not_announced() -> None:
    vmi = document(Role.TARGET, None)
    vmi["metadata"]["annotations"] = {"kubevirt.io/create-migration-target": "true"}
    made = beside(vmi)
    assert ([one.reason for one in made.bypassed], made.targets) == ([Reason.UNANNOUNCED], ())


def test_target_without_a_migrations_uid_waits() -> None:
    vmi = document(Role.TARGET, None)
    del vmi["status"]["migrationState"]["migrationUid"]
    assert [one.error for one in beside(vmi).held] == [False]


@pytest.mark.parametrize("migration", [published(), {"targetNodeAddress": None}])
def test_source_is_there_for_every_channel_and_prefers_what_is_announced(migration: dict[str, Any]) -> None:
    source = source_beside(migration, ANNOUNCED)
    assert (source.channels, source.address, source.ports) == (tuple(Channel), OWN, TWO_PORTS)
    assert source.name == server_name(UID, f"m-{UID}")
    assert source.beside == SourceBeside()


@pytest.mark.parametrize(
    ("announced", "reason"),
    [
        (None, Reason.UNANNOUNCED),
        (f"1 other 32899:0,42691:49152 {OWN}", Reason.UNANNOUNCED),
        (f"m-{UID} 32899:0,42691:49152 {OWN}", Reason.VERSION),
        ("2 anything at all", Reason.VERSION),
        (f"1 m-{UID} nonsense {OWN}", Reason.MALFORMED),
        (f"1 m-{UID} 32899:0,42691:49152 127.0.0.1", Reason.MALFORMED),
        (f"1 m-{UID} 32899:0,42691:49152 169.254.169.254", Reason.MALFORMED),
    ],
)
def test_source_that_has_nothing_announced_says_why(announced: str | None, reason: Reason) -> None:
    source = source_beside(None, announced)
    assert (source.address, source.ports) == (None, PortMap.of({}))
    assert source.beside
    assert (source.beside.reason, source.beside.stays_out) == (reason, None)
    assert source.beside.why


def test_source_stays_out_of_the_path_of_what_has_started_or_what_it_could_not_serve() -> None:
    for migration, known, reason in (
        (published(**STARTED), {}, Reason.STARTED),
        (published(), {"unready": "no certificate"}, Reason.UNREADY),
        (published(), {"address": None}, Reason.UNREADY),
    ):
        source = source_beside(migration, ANNOUNCED, **known)
        assert source.beside
        assert source.beside.out_reason is reason
        assert source.beside.stays_out
    # A start that lies ahead by this node's clock is one all the same: the launcher may have connected by then.
    ahead = source_beside(published(startTimestamp="2036-08-01T12:00:00Z"))
    assert ahead.beside
    assert ahead.beside.out_reason is Reason.STARTED


@pytest.mark.parametrize("known", [{"unready": "settings are not known yet"}, {"address": None}])
def test_daemon_that_has_just_started_waits_for_what_it_does_not_know_yet(known: dict[str, Any]) -> None:
    made = target_beside(None, ANNOUNCED, starting=True, **known)
    (held,) = made.held
    assert (held.error, made.bypassed, made.targets, made.stale) == (False, (), (), ())
    assert "just started" in held.reason
    # A source serves whoever waits at what the one before has left, by virt-handler.
    source = source_beside(published(), starting=True, **known)
    assert source.beside
    assert source.beside.out_reason is Reason.STARTING
    # What has started already needs nothing of that.
    assert target_beside(published(str(OWN), **STARTED), ANNOUNCED, starting=True, **known).targets
    assert beside(document(Role.SOURCE, published(**STARTED)), starting=True, **known).sources


def test_announcement_that_is_left_over_is_removed_by_the_node_that_the_vmi_runs_on() -> None:
    over = published(str(OTHER), **STARTED, **ENDED)
    mine = annotated(f"1 m-{UID} 32899:0,42691:49152 {OTHER}")
    assert beside(document(Role.SOURCE, over, **mine)).stale == (UID,)
    assert beside(document(Role.SOURCE, published(), **mine)).stale == ()
    assert beside(document(Role.SOURCE, {"migrationUid": "next"}, **mine)).stale == (UID,)
    # Another version's may be about this migration.
    assert beside(document(Role.SOURCE, {"migrationUid": "next"}, **annotated("2 next"))).stale == ()
    assert beside(document(Role.SOURCE, over, **annotated("2 next"))).stale == (UID,)
    elsewhere = document(Role.SOURCE, over, **mine)
    elsewhere["status"]["nodeName"] = "node03"
    assert beside(elsewhere).stale == ()
    assert plan(document(Role.SOURCE, over, **mine)).stale == ()


def test_sockets_of_a_source_may_be_given_back_at_any_time_before_its_end() -> None:
    waiting, running, over = (
        parse(document(Role.SOURCE, published(**more))) for more in ({}, STARTED, {**STARTED, **ENDED})
    )
    for vmi in (waiting, running):
        assert [one.migration.vmi_uid for one in sources_on(vmi, NODE, NOW)] == [UID]
        assert sources_on(vmi, "node03", NOW) == ()
    assert sources_on(over, NODE, NOW) == ()
