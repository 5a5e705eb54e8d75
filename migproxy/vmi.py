"""The few fields of a VirtualMachineInstance that migproxy reads, and the role predicates.

Pure. Everything else in the document is ignored, whatever its type.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from migproxy.announcement import TARGET_ANNOTATION

TARGET_NODE_LABEL = "kubevirt.io/migrationTargetNodeName"
MIGRATION_TARGET_ANNOTATION = "kubevirt.io/create-migration-target"
UNIX_TRANSPORT = "Unix"
BLOCK_MIGRATION = "BlockMigration"
FINAL_PHASES = ("Succeeded", "Failed")


class InvalidVMI(ValueError):
    """A VMI document with a field that migproxy needs and cannot read."""


@dataclass(frozen=True, slots=True)
class SideState:
    """One side of a migration: status.migrationState.sourceState or .targetState.

    Args:
        vmi_uid: virtualMachineInstanceUID.
        sync_address: where that side's cluster synchronises a decentralized migration.
        node_address: nodeAddress, as it stands there.
        ports: directMigrationNodePorts, unparsed.
    """

    vmi_uid: str | None
    sync_address: str | None
    node_address: str | None
    ports: object


@dataclass(frozen=True, slots=True)
class MigrationState:
    """status.migrationState of a VMI.

    Args:
        target_node_address: as it stands there.
        target_ports: targetDirectMigrationNodePorts, unparsed, so that a malformed map does not hide the VMI.
        start, end: aware datetimes.
    """

    migration_uid: str | None
    source_node: str | None
    source_pod: str | None
    target_node: str | None
    target_pod: str | None
    target_node_address: str | None
    target_ports: object
    start: datetime | None
    end: datetime | None
    completed: bool
    failed: bool
    abort_requested: bool
    abort_status: str | None
    mode: str | None
    source_state: SideState | None
    target_state: SideState | None


@dataclass(frozen=True, slots=True)
class VMI:
    """A VirtualMachineInstance as migproxy sees it.

    The predicates follow virt-handler (KubeVirt main, August 2026).

    Args:
        target_node_label: the node that is to receive the VMI (TARGET_NODE_LABEL).
        created_for_migration: made to receive a decentralized migration (MIGRATION_TARGET_ANNOTATION).
        deleted: being deleted (metadata.deletionTimestamp).
        active_pods: pod UID -> node.
        migrated_volumes: status.migratedVolumes is not empty.
        announced: where migproxy says that it listens (TARGET_ANNOTATION), unparsed.
    """

    namespace: str
    name: str
    uid: str
    target_node_label: str | None
    created_for_migration: bool
    deleted: bool
    phase: str | None
    node_name: str | None
    active_pods: Mapping[str, str]
    migration_transport: str | None
    migration_method: str | None
    migrated_volumes: bool
    migration: MigrationState | None
    announced: str | None = None

    def is_source_on(self, node: str) -> bool:
        """The node's proxy serves the sending side.

        A decentralized migration needs the other side's syncAddress and nodeAddress instead of nodeName.
        """
        migration = self.migration
        if migration is None or migration.source_node != node:
            return False
        if self.is_decentralized():
            target = migration.target_state
            return target is not None and bool(target.sync_address and target.node_address)
        return self.node_name == node

    def awaits_target_on(self, node: str) -> bool:
        """The node is to send a decentralized migration whose other side has not reported its nodeAddress."""
        migration = self.migration
        if migration is None or migration.target_state is None or not self.is_decentralized():
            return False
        target = migration.target_state
        return migration.source_node == node and bool(target.sync_address) and not target.node_address

    def is_target_on(self, node: str) -> bool:
        """The node's proxy serves the receiving side."""
        return self.target_node_label == node

    def is_decentralized(self) -> bool:
        """Between two VMIs, as between clusters: both states exist, exactly one has a syncAddress."""
        if self.migration is None or self.migration.source_state is None or self.migration.target_state is None:
            return False
        return bool(self.migration.source_state.sync_address) != bool(self.migration.target_state.sync_address)

    def is_done(self) -> bool:
        """The migration is over: it has ended, and completed or failed."""
        migration = self.migration
        return migration is not None and migration.end is not None and (migration.completed or migration.failed)

    def is_running(self, now: datetime) -> bool:
        """The migration has started by `now` (aware) and not ended: what is published may not change."""
        migration = self.migration
        return (
            migration is not None and migration.start is not None and migration.start <= now and migration.end is None
        )

    def is_aborting(self) -> bool:
        """An abort was asked for, and the source has not reported its end."""
        return self.migration is not None and self.migration.abort_requested and not self.is_done()

    def uses_block(self) -> bool:
        """Disks are copied too, so that the block channel is needed."""
        return self.migration_method == BLOCK_MIGRATION or self.migrated_volumes

    def has_ended(self) -> bool:
        """The VMI itself is over: being deleted, or in a final phase."""
        return self.deleted or self.phase in FINAL_PHASES

    def source_key(self) -> str:
        """The KEY in the names of the sockets of a source."""
        return self.uid

    def target_key(self) -> str:
        """The KEY of a target: the source VMI's UID where the source's URIs carry that, else its own.

        That is for a decentralized migration over unix transport.
        """
        source = self.migration.source_state if self.migration else None
        if self.migration_transport == UNIX_TRANSPORT and self.created_for_migration and source and source.vmi_uid:
            return source.vmi_uid
        return self.uid

    def domain(self) -> str:
        """libvirt's name for the guest (KubeVirt)."""
        return f"{self.namespace}_{self.name}"


def parse(document: Mapping[str, Any]) -> VMI:
    """Read a VMI as kubectl prints it, or as the API sends it.

    A null is as good as a missing field, and so is an empty string. Times are RFC 3339 strings, or what a
    YAML loader makes of them: datetimes (naive ones are UTC) or Unix seconds.

    Args:
        document: the whole object, metadata and status.

    Raises:
        InvalidVMI: a field that is needed is missing or of a wrong type; the message has namespace/name.
    """
    try:
        return _parse(_Fields(document))
    except _FieldError as error:
        raise InvalidVMI(f"VMI {_who(document)}: {error}") from None


def _parse(vmi: "_Fields") -> VMI:
    metadata, status = vmi.fields("metadata"), vmi.fields("status")
    migration = status.fields("migrationState")
    return VMI(
        namespace=metadata.object_name("namespace", default="default"),
        name=metadata.object_name("name"),
        uid=metadata.required_text("uid"),
        target_node_label=metadata.fields("labels").text(TARGET_NODE_LABEL),
        created_for_migration=metadata.fields("annotations").text(MIGRATION_TARGET_ANNOTATION) == "true",
        deleted=metadata.time("deletionTimestamp") is not None,
        phase=status.text("phase"),
        node_name=status.text("nodeName"),
        active_pods=status.fields("activePods").texts(),
        migration_transport=status.text("migrationTransport"),
        migration_method=status.text("migrationMethod"),
        migrated_volumes=status.has_items("migratedVolumes"),
        migration=_parse_migration(migration) if migration.present else None,
        announced=metadata.fields("annotations").text(TARGET_ANNOTATION),
    )


def _parse_migration(migration: "_Fields") -> MigrationState:
    return MigrationState(
        migration_uid=migration.text("migrationUid"),
        source_node=migration.text("sourceNode"),
        source_pod=migration.text("sourcePod"),
        target_node=migration.text("targetNode"),
        target_pod=migration.text("targetPod"),
        target_node_address=migration.text("targetNodeAddress"),
        target_ports=migration.raw("targetDirectMigrationNodePorts"),
        start=migration.time("startTimestamp"),
        end=migration.time("endTimestamp"),
        completed=migration.flag("completed"),
        failed=migration.flag("failed"),
        abort_requested=migration.flag("abortRequested"),
        abort_status=migration.text("abortStatus"),
        mode=migration.text("mode"),
        source_state=_parse_side(migration.fields("sourceState")),
        target_state=_parse_side(migration.fields("targetState")),
    )


def _parse_side(side: "_Fields") -> SideState | None:
    if not side.present:
        return None
    return SideState(
        vmi_uid=side.text("virtualMachineInstanceUID"),
        sync_address=side.text("syncAddress"),
        node_address=side.text("nodeAddress"),
        ports=side.raw("directMigrationNodePorts"),
    )


class _FieldError(ValueError):
    """A field, by its path in the document, and what is wrong with it."""


class _Fields:
    """One mapping in the document, by its path; absent and null alike read as empty."""

    __slots__ = ("_path", "_values", "present")

    def __init__(self, values: object, path: str = "") -> None:
        self._path = path
        self.present = values is not None
        if values is None:
            values = {}
        elif not isinstance(values, Mapping):
            raise _FieldError(f"{path or 'the document'} must be a mapping, not {_kind(values)}")
        self._values: Mapping[Any, Any] = values

    def raw(self, name: str) -> object:
        return self._values.get(name)

    def fields(self, name: str) -> "_Fields":
        return _Fields(self._values.get(name), self._at(name))

    def text(self, name: str) -> str | None:
        value = self._values.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise _FieldError(f"{self._at(name)} must be a string, not {_kind(value)} (in YAML, quote it)")
        return value

    def required_text(self, name: str, default: str | None = None) -> str:
        value = self.text(name) or default
        if value is None:
            raise _FieldError(f"{self._at(name)} is missing")
        return value

    def object_name(self, name: str, default: str | None = None) -> str:
        """A name that the API server would take: it may stand in a path (--launcher-run-dir)."""
        value = self.required_text(name, default)
        if len(value) > 253 or not _OBJECT_NAME.fullmatch(value):
            raise _FieldError(f"{self._at(name)} is not the name of a Kubernetes object")
        return value

    def texts(self) -> dict[str, str]:
        """The whole mapping, of strings to strings; entries that are null are left out."""
        for name in self._values:
            if not isinstance(name, str):
                raise _FieldError(f"{self._path} has a key that is no string but {_kind(name)} (quote it)")
        values = {name: self.text(name) for name in self._values}
        return {name: value for name, value in values.items() if value is not None}

    def flag(self, name: str) -> bool:
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise _FieldError(f"{self._at(name)} must be true or false, not {_kind(value)}")
        return bool(value)

    def has_items(self, name: str) -> bool:
        value = self._values.get(name)
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
            raise _FieldError(f"{self._at(name)} must be a list, not {_kind(value)}")
        return bool(value)

    def time(self, name: str) -> datetime | None:
        value = self._values.get(name)
        if value is None or value == "":
            return None
        try:
            time = _read_time(value)
        except (ValueError, OverflowError, OSError):
            raise _FieldError(f"{self._at(name)} is not a time such as 2026-08-01T12:00:00Z") from None
        return time if time.tzinfo else time.replace(tzinfo=UTC)

    def _at(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name


def _read_time(value: object) -> datetime:
    if isinstance(value, datetime):
        return value
    if isinstance(value, str):
        return datetime.fromisoformat(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return datetime.fromtimestamp(value, UTC)
    raise ValueError(value)


def _kind(value: object) -> str:
    return type(value).__name__


def _who(document: object) -> str:
    metadata = document.get("metadata") if isinstance(document, Mapping) else None
    values = metadata if isinstance(metadata, Mapping) else {}
    namespace, name = values.get("namespace"), values.get("name")
    if not isinstance(name, str):
        return "without a name"
    return f"{namespace if isinstance(namespace, str) else 'default'}/{name}"


_OBJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
