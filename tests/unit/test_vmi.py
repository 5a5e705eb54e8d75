"""Reading a VMI, and virt-handler's role predicates."""

import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migproxy.portmap import PortMapError, parse_port_map
from migproxy.vmi import VMI, InvalidVMI, parse

pytestmark = pytest.mark.tier("gate")

UID = "6f1e9dcb-7d2f-4f0c-9a52-0d8e3f0b9c11"
SOURCE_UID = "0c55c3a2-51b0-4c3e-8c0e-6a4a6b6d1f00"
NOON = datetime(2026, 8, 1, 12, tzinfo=UTC)


def document(
    migration: object = None,
    status: dict[str, Any] | None = None,
    labels: Any = None,
    annotations: Any = None,
    **metadata: Any,
) -> dict[str, Any]:
    """A VMI document; migration is its status.migrationState."""
    return {
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": {
            "namespace": "default",
            "name": "vmi-migratable",
            "uid": UID,
            "labels": labels,
            "annotations": annotations,
            **metadata,
        },
        "spec": {"domain": {"devices": {}}},
        "status": {"migrationState": migration, **(status or {})},
    }


def vmi(*args: Any, **kwargs: Any) -> VMI:
    return parse(document(*args, **kwargs))


# --- reading


def test_every_field_is_found_where_kubevirt_puts_it() -> None:
    side = {
        "virtualMachineInstanceUID": "side-uid",
        "syncAddress": "10.0.0.9:9185",
        "nodeAddress": "10.1.1.1",
        "directMigrationNodePorts": {"1": 0},
        "pod": "ignored",
    }
    full = vmi(
        {
            "migrationUid": "m-1",
            "sourceNode": "node01",
            "targetNodeAddress": "10.1.1.1",
            "targetDirectMigrationNodePorts": {"32899": 0},
            "startTimestamp": "2026-08-01T12:00:00Z",
            "endTimestamp": "2026-08-01T14:00:05.123456789+02:00",
            "completed": True,
            "failed": False,
            "sourceState": side,
            "targetState": {},
        },
        status={
            "phase": "Running",
            "nodeName": "node01",
            "activePods": {"pod-1": "node01", "pod-2": None},
            "migrationTransport": "Unix",
            "migrationMethod": "LiveMigration",
            "migratedVolumes": [{"volumeName": "disk"}],
        },
        labels={"kubevirt.io/nodeName": "node01", "kubevirt.io/migrationTargetNodeName": "node02"},
        annotations={"kubevirt.io/create-migration-target": "true"},
        deletionTimestamp="2026-08-01T13:00:00Z",
    )
    assert (full.namespace, full.name, full.uid) == ("default", "vmi-migratable", UID)
    assert (full.target_node_label, full.created_for_migration, full.deleted) == ("node02", True, True)
    assert (full.phase, full.node_name, full.active_pods) == ("Running", "node01", {"pod-1": "node01"})
    assert (full.migration_transport, full.migration_method) == ("Unix", "LiveMigration")
    assert full.migrated_volumes
    assert full.domain() == "default_vmi-migratable"
    migration = full.migration
    assert migration
    assert (migration.migration_uid, migration.source_node) == ("m-1", "node01")
    assert (migration.target_node_address, migration.target_ports) == ("10.1.1.1", {"32899": 0})
    assert (migration.start, migration.end) == (NOON, NOON + timedelta(seconds=5, microseconds=123456))
    assert (migration.completed, migration.failed) == (True, False)
    assert migration.source_state
    assert (migration.source_state.vmi_uid, migration.source_state.sync_address) == ("side-uid", "10.0.0.9:9185")
    assert (migration.source_state.node_address, migration.source_state.ports) == ("10.1.1.1", {"1": 0})
    assert migration.target_state
    assert migration.target_state.vmi_uid is None


def test_null_and_empty_are_as_good_as_missing() -> None:
    names = ["sourceNode", "targetNodeAddress", "targetDirectMigrationNodePorts", "startTimestamp", "completed",
             "sourceState", "targetState"]  # fmt: skip
    status = ["phase", "nodeName", "activePods", "migrationTransport", "migratedVolumes"]
    absent = vmi({})
    assert vmi(dict.fromkeys(names), status=dict.fromkeys(status)) == absent
    assert vmi({"sourceNode": "", "startTimestamp": ""}, status={"phase": "", "migratedVolumes": []}) == absent
    assert absent.migration is not None
    assert vmi(None).migration is None
    assert parse({"metadata": {"name": "a", "uid": UID}}).migration is None


def test_kubectls_namespace_is_default_where_there_is_none() -> None:
    assert vmi(namespace=None).namespace == "default"


@pytest.mark.parametrize(
    "written",
    [
        "2026-08-01T12:00:00Z",
        "2026-08-01T14:00:00+02:00",
        "2026-08-01T12:00:00.000000000Z",
        NOON,
        NOON.replace(tzinfo=None),
        int(NOON.timestamp()),
    ],
)
def test_times_may_be_text_or_what_a_yaml_loader_made_of_it(written: object) -> None:
    migration = vmi({"startTimestamp": written}).migration
    assert migration
    assert migration.start == NOON


def test_a_malformed_port_map_does_not_hide_the_vmi() -> None:
    migration = vmi({"targetDirectMigrationNodePorts": ["nonsense"]}).migration
    assert migration
    with pytest.raises(PortMapError, match="nonsense"):
        parse_port_map(migration.target_ports)


def test_wrong_types_in_fields_that_are_not_read_are_ignored() -> None:
    odd = document({"migrationConfiguration": 7, "targetCPUSet": {}}, status={"conditions": 3}, labels={"x": 1})
    odd["spec"] = ["odd"]
    odd[1] = None  # type: ignore[index]
    assert parse(odd).uid == UID


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (document(uid=None), "metadata.uid is missing"),
        (document(uid=""), "metadata.uid is missing"),
        (document(uid=17), "metadata.uid must be a string, not int (in YAML, quote it)"),
        (document(labels=["x"]), "metadata.labels must be a mapping, not list"),
        (document(labels={"kubevirt.io/migrationTargetNodeName": 2}), "kubevirt.io/migrationTargetNodeName must be"),
        (document(annotations={"kubevirt.io/create-migration-target": True}), "create-migration-target must be a str"),
        (document(deletionTimestamp=True), "metadata.deletionTimestamp is not a time"),
        (document("x"), "status.migrationState must be a mapping, not str"),
        (document({"sourceNode": ["node01"]}), "status.migrationState.sourceNode must be a string"),
        (document({"targetNodeAddress": 10}), "status.migrationState.targetNodeAddress must be a string"),
        (document({"completed": "true"}), "status.migrationState.completed must be true or false"),
        (document({"startTimestamp": "noon"}), "startTimestamp is not a time such as 2026-08-01T12:00:00Z"),
        (document({"startTimestamp": date(2026, 8, 1)}), "startTimestamp is not a time"),
        (document({"endTimestamp": 10**30}), "endTimestamp is not a time"),
        (document({"endTimestamp": 10**15}), "endTimestamp is not a time"),
        (document({"sourceState": 1}), "status.migrationState.sourceState must be a mapping"),
        (document({"targetState": {"nodeAddress": 1}}), "status.migrationState.targetState.nodeAddress must be"),
        (document(status={"activePods": ["pod"]}), "status.activePods must be a mapping"),
        (document(status={"activePods": {"pod": 1}}), "status.activePods.pod must be a string"),
        (document(status={"activePods": {1: "node01"}}), "status.activePods has a key that is no string but int"),
        (document(status={"migratedVolumes": "disk"}), "status.migratedVolumes must be a list, not str"),
        (document(status={"migratedVolumes": {"a": 1}}), "status.migratedVolumes must be a list, not dict"),
    ],
)
def test_a_wrong_field_is_named_with_its_vmi(broken: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidVMI) as error:
        parse(broken)
    assert str(error.value).startswith("VMI default/vmi-migratable: ")
    assert complaint in str(error.value)


@pytest.mark.parametrize("name", ["..", "a/b", "-x", "x-", "A", "a_b", "a..b", "a\0", "a\n", "é", "\u202e", "a" * 254])
def test_names_that_kubernetes_would_not_take_are_refused(name: str) -> None:
    for field in ("name", "namespace"):
        metadata: dict[str, Any] = {field: name}
        with pytest.raises(InvalidVMI, match=rf"metadata\.{field} is not the name of a Kubernetes") as error:
            parse(document(**metadata))
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 500


def test_a_name_may_have_dots_and_a_namespace_may_not() -> None:
    assert vmi(name="vm.example.org").name == "vm.example.org"
    with pytest.raises(InvalidVMI, match="namespace"):
        vmi(namespace="a.b")


HOSTILE = ["a/b", "../x", "a b", "a\n", "\x1b[2J", "a\x7f", "a\x9b", "\u202e", "\ud800", "é", "M" * 1_000_000]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    "place",
    [
        lambda value: document(uid=value),
        lambda value: document({"migrationUid": value}),
        lambda value: document({"sourceNode": value}),
        lambda value: document({"sourceState": {"virtualMachineInstanceUID": value}}),
        lambda value: document(status={"nodeName": value}),
        lambda value: document(status={"activePods": {value: "node01"}}),
        lambda value: document(status={"activePods": {"pod": value}}),
        lambda value: document(labels={"kubevirt.io/migrationTargetNodeName": value}),
    ],
)
def test_uids_and_nodes_that_kubernetes_would_not_take_are_refused(
    place: Callable[[str], dict[str, Any]], value: str
) -> None:
    with pytest.raises(InvalidVMI) as error:
        parse(place(value))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_a_uid_need_not_be_a_uuid() -> None:
    made = vmi({"migrationUid": "mig-1"}, uid="u_1.a", status={"activePods": {"P" * 128: "Node_1"}})
    assert (made.uid, made.active_pods) == ("u_1.a", {"P" * 128: "Node_1"})


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (document(status={"activePods": {f"p{n}": "n" for n in range(65)}}), "has 65 pods; more than 64 are not read"),
        (
            document({"targetDirectMigrationNodePorts": {str(n): 0 for n in range(65)}}),
            "has 65 entries in targetDirectMigrationNodePorts; more than 64 are not read",
        ),
        (document({"targetNodeAddress": "1" * 2000}), "targetNodeAddress is not a text of at most 1024"),
        (document(annotations={"migproxy.io/target": "1\x1b"}), "migproxy.io/target is not a text of at most 1024"),
    ],
)
def test_what_is_too_large_or_not_printable_is_refused(broken: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidVMI) as error:
        parse(broken)
    assert complaint in str(error.value)
    assert len(str(error.value)) < 500


def test_nothing_large_or_deep_is_kept_of_a_port_map() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for hostile in (deep, ["x" * 1_000_000], {"1": deep, "y" * 1_000_000: 10**5000, "2": 49152}):
        migration = vmi({"targetDirectMigrationNodePorts": hostile}).migration
        assert migration
        assert len(repr(migration.target_ports)) < 2000


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("0000-01-01T00:00:00Z", datetime.min.replace(tzinfo=UTC)),
        ("0000-02-29T00:00:00Z", datetime.min.replace(tzinfo=UTC)),
        ("0001-01-01T00:00:00+23:59", datetime.min.replace(tzinfo=UTC)),
        ("9999-12-31T23:59:59-23:59", datetime.max.replace(tzinfo=UTC)),
        ("2026-08-01T11:59:60Z", NOON - timedelta(seconds=1)),
        ("2026-08-02T12:00:00+24:00", NOON),
        ("2026-08-01T12:00:00.5Z", NOON + timedelta(milliseconds=500)),
    ],
)
def test_times_of_any_year_and_offset_are_read_as_go_reads_them(written: str, meant: datetime) -> None:
    made = vmi({"startTimestamp": written, "endTimestamp": written}, deletionTimestamp=written)
    assert made.migration
    assert made.migration.start == meant
    assert isinstance((made.migration.start - NOON).total_seconds(), float)
    assert made.deleted


@pytest.mark.parametrize("written", ["0000-02-30T00:00:00Z", "2026-08-01T12:00:61Z", "2026-08-01T12:00:00+24:01"])
def test_what_is_no_time_to_go_is_none_here(written: str) -> None:
    with pytest.raises(InvalidVMI, match="is not a time"):
        vmi({"startTimestamp": written})


@pytest.mark.parametrize(
    ("broken", "who"),
    [
        ({}, "VMI without a name: metadata.name is missing"),
        ({"metadata": None}, "VMI without a name: metadata.name is missing"),
        ({"metadata": "x"}, "VMI without a name: metadata must be a mapping"),
        ({"metadata": {"name": 7}}, "VMI without a name: metadata.name must be a string"),
        ({"metadata": {"namespace": 7, "name": "a"}}, "VMI default/a: metadata.namespace must be a string"),
        ([], "VMI without a name: the document must be a mapping, not list"),
    ],
)
def test_a_vmi_without_a_readable_name_is_an_error_all_the_same(broken: Any, who: str) -> None:
    with pytest.raises(InvalidVMI) as error:
        parse(broken)
    assert who in str(error.value)


# --- roles


def test_source_is_the_node_that_the_migration_leaves_and_the_vmi_is_on() -> None:
    source = vmi({"sourceNode": "node01"}, status={"nodeName": "node01"})
    assert source.is_source_on("node01")
    assert not source.is_source_on("node02")
    assert not vmi({"sourceNode": "node01"}, status={"nodeName": "node02"}).is_source_on("node01")
    assert not vmi({"sourceNode": "node01"}).is_source_on("node01")
    assert not vmi({}, status={"nodeName": "node01"}).is_source_on("node01")
    assert not vmi(None, status={"nodeName": "node01"}).is_source_on("node01")


def test_target_is_the_node_of_the_label() -> None:
    target = vmi({}, labels={"kubevirt.io/migrationTargetNodeName": "node02"})
    assert target.is_target_on("node02")
    assert not target.is_target_on("node01")
    assert not vmi({"targetNode": "node02"}).is_target_on("node02")


@pytest.mark.parametrize(
    ("source", "target", "decentralized"),
    [
        (None, None, False),
        ({"syncAddress": "a"}, None, False),
        (None, {"syncAddress": "a"}, False),
        ({}, {}, False),
        ({"syncAddress": "a"}, {}, True),
        ({}, {"syncAddress": "a"}, True),
        ({"syncAddress": "a"}, {"syncAddress": "b"}, False),
        ({"syncAddress": ""}, {"syncAddress": "b"}, True),
    ],
)
def test_decentralized_has_both_states_and_exactly_one_sync_address(
    source: object, target: object, decentralized: bool
) -> None:
    assert vmi({"sourceState": source, "targetState": target}).is_decentralized() is decentralized
    assert not vmi(None).is_decentralized()


@pytest.mark.parametrize(
    ("source_state", "target_state", "is_source", "awaits"),
    [
        ({}, {"syncAddress": "a", "nodeAddress": "10.1.1.1"}, True, False),
        ({}, {"syncAddress": "a"}, False, True),
        ({"syncAddress": "a"}, {"nodeAddress": "10.1.1.1"}, False, False),
        ({"syncAddress": "a"}, {}, False, False),
        ({}, None, False, False),
    ],
)
def test_a_decentralized_source_needs_the_targets_sync_and_node_address(
    source_state: object, target_state: object, is_source: bool, awaits: bool
) -> None:
    view = vmi({"sourceNode": "node01", "sourceState": source_state, "targetState": target_state})
    assert view.is_source_on("node01") is is_source
    assert view.awaits_target_on("node01") is awaits
    assert not view.is_source_on("node02")
    assert not view.awaits_target_on("node02")
    assert not vmi(None).awaits_target_on("node01")


@pytest.mark.parametrize(
    ("migration", "done"),
    [
        (None, False),
        ({}, False),
        ({"completed": True}, False),
        ({"endTimestamp": NOON}, False),
        ({"endTimestamp": NOON, "completed": True}, True),
        ({"endTimestamp": NOON, "failed": True}, True),
        ({"endTimestamp": NOON, "completed": False, "failed": False}, False),
    ],
)
def test_done_has_an_end_and_completed_or_failed(migration: object, done: bool) -> None:
    assert vmi(migration).is_done() is done


@pytest.mark.parametrize(
    ("migration", "running"),
    [
        (None, False),
        ({}, False),
        ({"startTimestamp": NOON}, True),
        ({"startTimestamp": NOON - timedelta(hours=1)}, True),
        ({"startTimestamp": NOON + timedelta(microseconds=1)}, False),
        ({"startTimestamp": NOON, "endTimestamp": NOON}, False),
    ],
)
def test_running_has_a_start_in_the_past_and_no_end(migration: object, running: bool) -> None:
    assert vmi(migration).is_running(NOON) is running


@given(st.datetimes(timezones=st.timezones()), st.datetimes(timezones=st.timezones()))
def test_any_start_can_be_compared_with_now(start: datetime, now: datetime) -> None:
    vmi({"startTimestamp": start}).is_running(now)


def test_a_vmi_has_ended_when_deleted_succeeded_or_failed() -> None:
    assert vmi(deletionTimestamp="2026-08-01T12:00:00Z").has_ended()
    assert vmi(status={"phase": "Succeeded"}).has_ended()
    assert vmi(status={"phase": "Failed"}).has_ended()
    for phase in ("Pending", "Scheduling", "Scheduled", "Running", "Unknown", None):
        assert not vmi(status={"phase": phase}).has_ended()


def test_block_is_used_by_block_migration_and_by_migrated_volumes() -> None:
    assert vmi(status={"migrationMethod": "BlockMigration"}).uses_block()
    assert vmi(status={"migratedVolumes": [{}]}).uses_block()
    assert not vmi(status={"migrationMethod": "LiveMigration", "migratedVolumes": []}).uses_block()


@pytest.mark.parametrize(
    ("transport", "annotation", "source_state", "key"),
    [
        ("Unix", "true", {"virtualMachineInstanceUID": SOURCE_UID}, SOURCE_UID),
        (None, "true", {"virtualMachineInstanceUID": SOURCE_UID}, UID),
        ("TCP", "true", {"virtualMachineInstanceUID": SOURCE_UID}, UID),
        ("Unix", "false", {"virtualMachineInstanceUID": SOURCE_UID}, UID),
        ("Unix", None, {"virtualMachineInstanceUID": SOURCE_UID}, UID),
        ("Unix", "true", {}, UID),
        ("Unix", "true", None, UID),
    ],
)
def test_a_decentralized_target_over_unix_transport_has_the_sources_uid_for_key(
    transport: object, annotation: object, source_state: object, key: str
) -> None:
    view = vmi(
        {"sourceState": source_state},
        status={"migrationTransport": transport},
        annotations={"kubevirt.io/create-migration-target": annotation},
    )
    assert view.target_key() == key
    assert view.source_key() == UID
    assert vmi(None).target_key() == UID


def test_a_thousand_vmis_are_read_in_well_under_half_a_second() -> None:
    one = document({"sourceNode": "node01", "startTimestamp": "2026-08-01T12:00:00Z"}, status={"nodeName": "node01"})
    began = time.process_time()
    for _ in range(1000):
        parse(one)
    assert time.process_time() - began < 0.5
