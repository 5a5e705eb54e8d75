"""The few fields of a VirtualMachineInstance that migproxy reads, and the role predicates.

Pure. Everything else in the document is ignored, whatever its type. Whoever may edit a VMI may be hostile: what is
read is bounded, and no name, UID or text has a character that Kubernetes would not take there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from migproxy.announcement import TARGET_ANNOTATION
from migproxy.text import excerpt

TARGET_NODE_LABEL = "kubevirt.io/migrationTargetNodeName"
MIGRATION_TARGET_ANNOTATION = "kubevirt.io/create-migration-target"
UNIX_TRANSPORT = "Unix"
BLOCK_MIGRATION = "BlockMigration"
FINAL_PHASES = ("Succeeded", "Failed")

MAX_PODS: Final = 64
"""Of status.activePods. A VMI has one pod, and a second one while it migrates."""
MAX_PORTS: Final = 64
"""Of a port map. A migration has three channels."""
MAX_TEXT: Final = 1024
"""Characters of any other string: annotations, addresses."""


class InvalidVMI(ValueError):
    """A VMI document with a field that migproxy needs and cannot read."""


@dataclass(frozen=True, slots=True)
class SideState:
    """One side of a migration: status.migrationState.sourceState or .targetState.

    Args:
        vmi_uid: virtualMachineInstanceUID.
        sync_address: where that side's cluster synchronises a decentralized migration.
        node_address: nodeAddress, as it stands there.
        ports: directMigrationNodePorts, unparsed; see MigrationState.target_ports.
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
        target_ports: targetDirectMigrationNodePorts, unparsed, so that a malformed map does not hide the VMI; what is
            neither a mapping nor a number or short text in it is replaced by an excerpt.
        start, end: in UTC; what lies outside the years 1 to 9999 is the first or last moment of those.
    """

    migration_uid: str | None
    source_node: str | None
    target_node_address: str | None
    target_ports: object
    start: datetime | None
    end: datetime | None
    completed: bool
    failed: bool
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

    def leads_to_itself(self) -> bool:
        """The source's node is to receive the VMI too: no scheduler says so, but two hosts of one name do.

        The two VMIs of a decentralized migration may name one node, or the nodes of two clusters that have one name.
        """
        migration = self.migration
        if migration is None or self.created_for_migration or self.is_decentralized():
            return False
        return migration.source_node is not None and migration.source_node == self.target_node_label

    def is_decentralized(self) -> bool:
        """Between two VMIs, as between clusters: both states exist, exactly one has a syncAddress."""
        if self.migration is None or self.migration.source_state is None or self.migration.target_state is None:
            return False
        return bool(self.migration.source_state.sync_address) != bool(self.migration.target_state.sync_address)

    def is_done(self) -> bool:
        """The migration is over: it has ended, and completed or failed."""
        migration = self.migration
        return migration is not None and migration.end is not None and (migration.completed or migration.failed)

    def result(self, migration_uid: str) -> str | None:
        """How a migration of it has ended: "completed" or "failed"; None where the status does not say."""
        migration = self.migration
        if migration is None or migration.migration_uid != migration_uid or not self.is_done():
            return None
        return "failed" if migration.failed else "completed"

    def is_running(self, now: datetime) -> bool:
        """The migration has started by `now` (aware) and not ended: what is published may not change."""
        migration = self.migration
        return (
            migration is not None and migration.start is not None and migration.start <= now and migration.end is None
        )

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

    A null is as good as a missing field, and so is an empty string. Times are RFC 3339 strings as Go reads them
    (Kubernetes), or what a YAML loader makes of them: datetimes (naive ones are UTC) or Unix seconds.

    Args:
        document: the whole object, metadata and status.

    Raises:
        InvalidVMI: a field that is needed is missing, of a wrong type, too large, or has characters that are not
            allowed there; the message has namespace/name, and is short and printable whatever the document holds.
    """
    try:
        return _parse(_Fields(document))
    except _FieldError as error:
        raise InvalidVMI(f"VMI {_who(document)}: {error}") from None


def _parse(vmi: "_Fields") -> VMI:
    metadata, status = vmi.fields("metadata"), vmi.fields("status")
    migration = status.fields("migrationState")
    return VMI(
        namespace=metadata.required("namespace", _NAMESPACE, default="default"),
        name=metadata.required("name", _OBJECT_NAME),
        uid=metadata.required("uid", _UID),
        target_node_label=metadata.fields("labels").text(TARGET_NODE_LABEL, _NODE_NAME),
        created_for_migration=metadata.fields("annotations").text(MIGRATION_TARGET_ANNOTATION) == "true",
        deleted=metadata.time("deletionTimestamp") is not None,
        phase=status.text("phase"),
        node_name=status.text("nodeName", _NODE_NAME),
        active_pods=status.fields("activePods").pods(),
        migration_transport=status.text("migrationTransport"),
        migration_method=status.text("migrationMethod"),
        migrated_volumes=status.has_items("migratedVolumes"),
        migration=_parse_migration(migration) if migration.present else None,
        announced=metadata.fields("annotations").text(TARGET_ANNOTATION),
    )


def _parse_migration(migration: "_Fields") -> MigrationState:
    return MigrationState(
        migration_uid=migration.text("migrationUid", _UID),
        source_node=migration.text("sourceNode", _NODE_NAME),
        target_node_address=migration.text("targetNodeAddress"),
        target_ports=migration.ports("targetDirectMigrationNodePorts"),
        start=migration.time("startTimestamp"),
        end=migration.time("endTimestamp"),
        completed=migration.flag("completed"),
        failed=migration.flag("failed"),
        source_state=_parse_side(migration.fields("sourceState")),
        target_state=_parse_side(migration.fields("targetState")),
    )


def _parse_side(side: "_Fields") -> SideState | None:
    if not side.present:
        return None
    return SideState(
        vmi_uid=side.text("virtualMachineInstanceUID", _UID),
        sync_address=side.text("syncAddress"),
        node_address=side.text("nodeAddress"),
        ports=side.ports("directMigrationNodePorts"),
    )


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a string may be.

    Args:
        pattern: of all of it.
        longest: its characters at most.
        what: for people: it "is not ...".
    """

    pattern: re.Pattern[str]
    longest: int
    what: str


_TEXT = _Kind(re.compile(r".*", re.DOTALL), MAX_TEXT, f"a text of at most {MAX_TEXT} printable characters")
# To Kubernetes a UID is opaque; its own are UUIDs. Files may have shorter ones.
_UID = _Kind(re.compile(r"[A-Za-z0-9._-]+"), 128, "a UID: letters, digits, '-', '_' and '.', at most 128")
_NODE_NAME = _Kind(re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*"), 253, "the name of a node")
# RFC 1123 by way of k8s.io/apimachinery/pkg/util/validation: a subdomain, and a label.
_OBJECT_NAME = _Kind(
    re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"),
    253,
    "the name of a Kubernetes object",
)
_NAMESPACE = _Kind(re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"), 63, "the name of a Kubernetes namespace")


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

    def fields(self, name: str) -> "_Fields":
        return _Fields(self._values.get(name), self._at(name))

    def text(self, name: str, kind: _Kind = _TEXT) -> str | None:
        value = self._values.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise _FieldError(f"{self._at(name)} must be a string, not {_kind(value)} (in YAML, quote it)")
        if not _is(value, kind):
            raise _FieldError(f"{self._at(name)} is not {kind.what}: {excerpt(value)}")
        return value

    def required(self, name: str, kind: _Kind, default: str | None = None) -> str:
        value = self.text(name, kind) or default
        if value is None:
            raise _FieldError(f"{self._at(name)} is missing")
        return value

    def pods(self) -> dict[str, str]:
        """The whole mapping, of pods' UIDs to nodes' names; entries that are null are left out."""
        self._limit("pods", self._values, MAX_PODS)
        for uid in self._values:
            if not isinstance(uid, str):
                raise _FieldError(f"{self._path} has a key that is no string but {_kind(uid)} (quote it)")
            if not _is(uid, _UID):
                raise _FieldError(f"{self._path} has a key that is not {_UID.what}: {excerpt(uid)}")
        nodes = {uid: self.text(uid, _NODE_NAME) for uid in self._values}
        return {uid: node for uid, node in nodes.items() if node is not None}

    def ports(self, name: str) -> object:
        """A port map as it stands there, but for what no port map has."""
        value = self._values.get(name)
        if not isinstance(value, Mapping):
            return _bounded(value)
        self._limit(f"entries in {name}", value, MAX_PORTS)
        return {_bounded(port): _bounded(channel) for port, channel in value.items()}

    def _limit(self, what: str, values: Mapping[Any, Any], most: int) -> None:
        if len(values) > most:
            raise _FieldError(f"{self._path} has {len(values)} {what}; more than {most} are not read")

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
            return _read_time(value)
        except (ValueError, OverflowError, OSError):
            raise _FieldError(f"{self._at(name)} is not a time such as 2026-08-01T12:00:00Z") from None

    def _at(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name


def _is(value: str, kind: _Kind) -> bool:
    return len(value) <= kind.longest and value.isprintable() and bool(kind.pattern.fullmatch(value))


def _bounded(value: object) -> object:
    """A number or a short text itself, an excerpt of anything else."""
    if value is None or isinstance(value, (bool, float)):
        return value
    is_short = value.bit_length() <= 64 if isinstance(value, int) else isinstance(value, str) and _is(value, _TEXT)
    return value if is_short else excerpt(value)


_RFC_3339: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:[.,](\d+))?(?:[Zz]|([+-])(\d\d):([0-5]\d))", re.ASCII
)


def _read_time(value: object) -> datetime:
    """A time in UTC, whatever its year.

    Raises:
        ValueError, OverflowError, OSError: it is no time.
    """
    if isinstance(value, str) and len(value) <= MAX_TEXT and (match := _RFC_3339.fullmatch(value)):
        return _rfc_3339(*match.groups())
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        return _shifted(value.replace(tzinfo=None), value.utcoffset() or timedelta())
    if isinstance(value, int) and not isinstance(value, bool):
        return datetime.fromtimestamp(value, UTC)
    raise ValueError(value)


def _rfc_3339(
    year: str, month: str, day: str, hour: str, minute: str, second: str, fraction: str | None,
    sign: str | None, hours: str | None, minutes: str | None,
) -> datetime:  # fmt: skip
    # A leap second is as good as the one before it. Year 0, which datetime does not have, is a leap year as 4 is.
    parts = (int(month), int(day), int(hour), int(minute), 59 if second == "60" else int(second))
    local = datetime(int(year) or 4, *parts, int((fraction or "0")[:6].ljust(6, "0")))  # noqa: DTZ001 - shifted below
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    if offset > timedelta(hours=24):
        raise ValueError("no zone is further from UTC than a day")
    return _FIRST if not int(year) else _shifted(local, -offset if sign == "-" else offset)


_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def _shifted(local: datetime, offset: timedelta) -> datetime:
    try:
        return (local - offset).replace(tzinfo=UTC)
    except OverflowError:
        return _FIRST if offset > timedelta() else _LAST


def _kind(value: object) -> str:
    return type(value).__name__


def _who(document: object) -> str:
    metadata = document.get("metadata") if isinstance(document, Mapping) else None
    values = metadata if isinstance(metadata, Mapping) else {}
    namespace, name = values.get("namespace"), values.get("name")
    if not isinstance(name, str):
        return "without a name"
    return f"{_shown(namespace, _NAMESPACE) if isinstance(namespace, str) else 'default'}/{_shown(name, _OBJECT_NAME)}"


def _shown(name: str, kind: _Kind) -> str:
    return name if _is(name, kind) else excerpt(name)
