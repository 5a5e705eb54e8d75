"""What should run on a node: a pure function of the VMIs, the node's name and its migration addresses."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from migproxy.announcement import Announcement, parse_announcement
from migproxy.portmap import (
    AddressError,
    Channel,
    IPAddress,
    PortMap,
    PortMapError,
    ProxyKeyError,
    channels_for,
    check_key,
    parse_address,
    parse_port_map,
    salvage_port_map,
    unknown_channels,
)
from migproxy.vmi import VMI, MigrationState


class Role(StrEnum):
    """The side of a migration that a proxy serves."""

    SOURCE = "source"
    TARGET = "target"


@dataclass(frozen=True, slots=True, order=True)
class Migration:
    """The identity of one migration of one VMI; migration_uid is "" where the status has none."""

    namespace: str
    name: str
    vmi_uid: str
    migration_uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name} (migration {self.migration_uid or 'without a UID'})"


@dataclass(frozen=True, slots=True)
class Launcher:
    """Where to look for the virt-launcher of a VMI on this node.

    Args:
        pods: UIDs of the pods that status.activePods has on this node, sorted; each is safe in a path.
    """

    namespace: str
    name: str
    vmi_uid: str
    pods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SourceProxy:
    """Unix listeners at the source launcher, one per channel, each leading to the target's port.

    Args:
        key: in the sockets' names; safe in a path.
        address, ports: what the target published.
        running: the migration has started.
        warnings: what will not work, although the proxy can run.
    """

    migration: Migration
    launcher: Launcher
    key: str
    address: IPAddress
    ports: PortMap
    running: bool
    warnings: tuple[str, ...]

    @property
    def role(self) -> Role:
        return Role.SOURCE


@dataclass(frozen=True, slots=True)
class TargetProxy:
    """TCP listeners at the migration address, one per channel, each leading to the target launcher's socket.

    Args:
        key: in the names of QEMU's sockets; safe in a path.
        channels: those to listen for.
        published_address, published: what the status holds and is this node's own: to be bound again
            exactly. published is None where every port is free to choose, and lacks a channel where that
            one is.
        running: the migration has started: nothing may be published any more, and channels are exactly
            those of published.
        publish_target_state: status.migrationState.targetState exists and wants the same values.
        warnings: what will not work, although the proxy can run.
        beside: virt-handler publishes, not this daemon; it listens before the launcher is there, to be in time.
        announce: virt-handler has not published yet: where this one listens is to be announced.
    """

    migration: Migration
    launcher: Launcher
    key: str
    channels: tuple[Channel, ...]
    published_address: IPAddress | None
    published: PortMap | None
    running: bool
    publish_target_state: bool
    warnings: tuple[str, ...]
    beside: bool = False
    announce: bool = False

    @property
    def role(self) -> Role:
        return Role.TARGET


@dataclass(frozen=True, slots=True)
class Held:
    """A migration of this node for which no proxy can run now.

    Args:
        reason: what it waits for, or what is wrong and the remedy.
        error: somebody must mend something; False for an ordinary wait.
    """

    migration: Migration
    role: Role
    reason: str
    error: bool


class Reason(StrEnum):
    """Why a migration does not go through migproxy, beside virt-handler; a label of a metric."""

    LATE = "late"
    FAILED = "failed"
    POLICY = "policy"
    ADDRESS = "address"
    CHANNELS = "channels"
    UNSUPPORTED = "unsupported"
    UNREADY = "unready"
    STARTED = "started"


@dataclass(frozen=True, slots=True)
class Bypassed:
    """A migration that virt-handler's own proxy serves on this node: nothing of ours is in its path.

    Args:
        why: for people.
    """

    migration: Migration
    role: Role
    reason: Reason
    why: str


@dataclass(frozen=True, slots=True)
class Beside:
    """What is known of the virt-handler that this daemon runs beside.

    Args:
        address: that it will publish, as its network namespace has it now; None while that is not known.
        unsupported: why the cluster cannot put what is announced into what virt-handler publishes; None if it can.
        unready: why this daemon's connections would fail where virt-handler's would not; None if nothing says so.
        serving: where this daemon listens, by migration: what is published of it stays served, whatever becomes of the
            announcement.
        can_dial: connections can be made from here, from an address known before where there is none now.
        starting: this daemon has just been started: what is not known yet will be in a moment, and what the one before
            it has announced stays.
    """

    address: IPAddress | None = None
    unsupported: str | None = None
    unready: str | None = None
    serving: Mapping[Migration, Announcement] = field(default_factory=dict)
    can_dial: bool = False
    starting: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What should run on the node, each part sorted by migration.

    Args:
        stale: UIDs of the VMIs whose announcement is to be removed.
    """

    sources: tuple[SourceProxy, ...]
    targets: tuple[TargetProxy, ...]
    held: tuple[Held, ...]
    bypassed: tuple[Bypassed, ...] = ()
    stale: tuple[str, ...] = ()


def make_plan(
    vmis: Iterable[VMI],
    node: str,
    own_addresses: Collection[IPAddress],
    now: datetime,
    beside: Beside | None = None,
) -> Plan:
    """Decide which proxies should run on a node. The order of the VMIs does not matter.

    Args:
        vmis: all VMIs known, in any order, each once.
        node: this node's name.
        own_addresses: every migration address that this node has had since the daemon started; may be empty.
        now: aware; a migration has started when its startTimestamp is not after it.
        beside: where virt-handler publishes, and this daemon only announces; None where this daemon publishes.
    """
    planner = _Planner(node, own_addresses, now, beside)
    known = list(vmis)
    decisions = [decision for vmi in known for decision in planner.decide(vmi)]
    targets, refused = _settle_ports([proxy for proxy in decisions if isinstance(proxy, TargetProxy)])
    sources = [proxy for proxy in decisions if isinstance(proxy, SourceProxy)]
    held = [*refused, *(held for held in decisions if isinstance(held, Held))]
    bypassed = [one for one in decisions if isinstance(one, Bypassed)]
    wanted = {one.migration.vmi_uid for one in targets} | {
        one.migration.vmi_uid for one in held if one.role is Role.TARGET
    }
    return Plan(
        sources=tuple(sorted(sources, key=_by_migration)),
        targets=tuple(sorted(targets, key=_by_migration)),
        held=tuple(sorted(held, key=_by_migration)),
        bypassed=tuple(sorted(bypassed, key=_by_migration)),
        stale=tuple(sorted(vmi.uid for vmi in known if vmi.uid not in wanted and planner.finds_stale(vmi))),
    )


def sources_not_begun(vmi: VMI, node: str, now: datetime) -> list[SourceProxy]:
    """The sources on a node whose migration has not started: what stands in the path may still be changed."""
    return [one for one in make_plan([vmi], node, (), now).sources if not one.running]


def is_forsaken(vmi: VMI, node: str) -> bool:
    """Whether what is announced on a VMI is to go as a node's daemon is dead, whose duty it would have been.

    What is published already stays to the migration's end: the next daemon is to serve it.
    """
    if vmi.announced is None:
        return False
    announced = _announced(vmi)
    if vmi.is_done() or announced is None or vmi.migration is None:
        return vmi.node_name == node or vmi.is_target_on(node)
    return vmi.is_target_on(node) and not _is_published(vmi.migration, announced)


def _by_migration(decision: SourceProxy | TargetProxy | Held | Bypassed) -> tuple[Migration, Role]:
    return decision.migration, decision.role


class _Hold(Exception):
    """No proxy for this role now; see Held."""

    def __init__(self, reason: str, *, error: bool) -> None:
        super().__init__(reason)
        self.error = error


@dataclass(frozen=True, slots=True)
class _Planner:
    """What one VMI asks of the node, whatever the other VMIs ask."""

    node: str
    own_addresses: Collection[IPAddress]
    now: datetime
    beside: Beside | None

    def decide(self, vmi: VMI) -> Iterator[SourceProxy | TargetProxy | Held | Bypassed]:
        if vmi.has_ended() or vmi.is_done():
            return
        if vmi.is_source_on(self.node) or vmi.awaits_target_on(self.node):
            yield self._proxy_or_held(vmi, Role.SOURCE)
        if vmi.is_target_on(self.node):
            yield self._proxy_or_held(vmi, Role.TARGET)

    def finds_stale(self, vmi: VMI) -> bool:
        """An announcement stands on a VMI of this node that is not, or no longer, about its migration to this node.

        The target's node removes its own; the node that the VMI runs on, what a node has left behind that is gone.
        """
        if self.beside is None or vmi.announced is None or vmi.has_ended():
            return False
        if vmi.is_target_on(self.node) and not vmi.is_done():
            return True  # there is no proxy for it, or it would not have been asked
        return vmi.node_name == self.node and (vmi.is_done() or _announced(vmi) is None)

    def _proxy_or_held(self, vmi: VMI, role: Role) -> SourceProxy | TargetProxy | Held | Bypassed:
        try:
            if vmi.migration is None:
                raise _Hold("waiting for status.migrationState", error=False)
            if role is Role.SOURCE:
                return self._source(vmi, vmi.migration)
            return self._announced_target(vmi, vmi.migration) if self.beside else self._target(vmi, vmi.migration)
        except _Hold as hold:
            return Held(_identity(vmi), role, str(hold), hold.error)

    def _source(self, vmi: VMI, migration: MigrationState) -> SourceProxy | Bypassed:
        launcher, key = self._launcher(vmi), _checked(vmi.source_key(), "the VMI's UID")
        address, ports, unknown = _published_to_source(vmi, migration)
        beside = None if migration.start else self.beside
        if beside and (why := self._unready(beside, beside.can_dial or beside.address is not None)):
            return Bypassed(_identity(vmi), Role.SOURCE, Reason.UNREADY, why)
        return SourceProxy(
            migration=_identity(vmi),
            launcher=launcher,
            key=key,
            address=address,
            ports=ports,
            running=vmi.is_running(self.now),
            warnings=(*_missing_channels(vmi, ports), *unknown),
        )

    def _target(self, vmi: VMI, migration: MigrationState) -> TargetProxy:
        if vmi.created_for_migration and not (migration.source_state and vmi.migration_transport):
            raise _Hold("waiting for sourceState and migrationTransport from the source's cluster", error=False)
        launcher, key = self._launcher(vmi), _checked(vmi.target_key(), "the UID in the sockets' names")
        running = vmi.is_running(self.now)
        address = self._own_published_address(migration, running)
        published = _published_by_us(migration, running) if address else None
        # While it runs nothing more can be published, so that there is nothing more to listen for.
        needed = () if running else channels_for(vmi.uses_block())
        channels = tuple(sorted({*needed, *(published or ())}))
        return TargetProxy(
            migration=_identity(vmi),
            launcher=launcher,
            key=key,
            channels=channels,
            published_address=address,
            published=published,
            running=running,
            publish_target_state=migration.target_state is not None,
            warnings=_missing_channels(vmi, channels),
        )

    def _announced_target(self, vmi: VMI, migration: MigrationState) -> TargetProxy | Bypassed:
        """A target beside virt-handler: announced before that publishes, kept if it published what was announced."""
        assert self.beside
        if not migration.migration_uid:
            raise _Hold("waiting for the migration's UID", error=False)
        # Whatever this node's clock says: from the start on, the admission policy leaves what is published alone.
        running, announced = migration.start is not None, _announced(vmi)
        address, published, is_settled = self.beside.address, None, False
        if _is_settled(migration, running, address):
            ours = (announced, self.beside.serving.get(_identity(vmi)))
            kept = next((one for one in ours if one and _is_published(migration, one)), None)
            if kept is None:
                return Bypassed(_identity(vmi), Role.TARGET, *_why_bypassed(migration, announced))
            address, published, is_settled = kept.address, kept.ports, True
        elif self.beside.unsupported:
            return Bypassed(_identity(vmi), Role.TARGET, Reason.UNSUPPORTED, self.beside.unsupported)
        elif why := self._unready(self.beside, address is not None):
            return Bypassed(_identity(vmi), Role.TARGET, Reason.UNREADY, why)
        elif announced and announced.address == address:
            published = announced.ports  # by a daemon before this one, whose word is kept
        return TargetProxy(
            migration=_identity(vmi),
            launcher=self._launcher(vmi),
            key=_checked(vmi.target_key(), "the UID in the sockets' names"),
            channels=tuple(published) if is_settled and published else channels_for(vmi.uses_block()),
            published_address=address,
            published=published,
            running=running,
            publish_target_state=False,
            warnings=(),
            beside=True,
            announce=not is_settled,
        )

    @staticmethod
    def _unready(beside: Beside, has_address: bool) -> str | None:
        """Why virt-handler's proxy is to serve what has not begun; None where nothing is against ours."""
        why = beside.unready or (None if has_address else "virt-handler's migration address is not known")
        if why and beside.starting:
            raise _Hold(f"just started: {why}", error=False)
        return why

    def _launcher(self, vmi: VMI) -> Launcher:
        pods = sorted(pod for pod, node in vmi.active_pods.items() if node == self.node)
        return Launcher(
            namespace=vmi.namespace,
            name=vmi.name,
            vmi_uid=_checked(vmi.uid, "the VMI's UID"),
            pods=tuple(_checked(pod, "a pod's UID in status.activePods") for pod in pods),
        )

    def _own_published_address(self, migration: MigrationState, running: bool) -> IPAddress | None:
        """This node's address in the status; None where there is none and one may still be published."""
        text = migration.target_node_address
        if text is None:
            if running:
                raise _Hold(
                    "the migration has started (startTimestamp), but the status has no targetNodeAddress: "
                    "nothing may be published any more; start it anew",
                    error=True,
                )
            return None
        remedy = (
            "it is left alone while the migration runs"
            if running
            else "it is left alone; if nobody listens there, clear targetNodeAddress and "
            "targetDirectMigrationNodePorts in the status"
        )
        try:
            address = parse_address(text)
        except AddressError as error:
            raise _Hold(f"targetNodeAddress: {error}; {remedy}", error=True) from None
        if not self.own_addresses:
            raise _Hold(f"waiting for a migration address: {address} in the status may be ours", error=False)
        if address not in self.own_addresses:
            raise _Hold(f"targetNodeAddress {address} is not an address of this node: {remedy}", error=True)
        return address


def _announced(vmi: VMI) -> Announcement | None:
    """What is announced for the VMI's present migration."""
    announced = parse_announcement(vmi.announced)
    current = vmi.migration.migration_uid if vmi.migration else None
    return announced if announced and announced.migration_uid == current else None


def _is_settled(migration: MigrationState, running: bool, address: IPAddress | None) -> bool:
    """virt-handler has published for good: it does so again, before the start, only with another address."""
    if running:
        return True
    if migration.target_ports is None or migration.target_node_address is None:
        return False
    return address is None or _same_address(migration.target_node_address, address)


def _same_address(text: str | None, address: IPAddress) -> bool:
    try:
        return text is not None and parse_address(text) == address
    except AddressError:
        return False


def _is_published(migration: MigrationState, announced: Announcement) -> bool:
    """The status has connections go to where the announcement says that this node listens."""
    if not _same_address(migration.target_node_address, announced.address):
        return False
    try:
        return parse_port_map(migration.target_ports) == announced.ports
    except PortMapError:
        return False


def _why_bypassed(migration: MigrationState, announced: Announcement | None) -> tuple[Reason, str]:
    if migration.target_ports is None:
        return Reason.STARTED, "the migration has started, and the status has no ports: virt-handler deals with that"
    if announced is None:
        return Reason.LATE, "virt-handler had published its own ports when this node was ready to announce"
    if not _same_address(migration.target_node_address, announced.address):
        address = migration.target_node_address
        return Reason.ADDRESS, f"virt-handler published {address}, and this node had announced {announced.address}"
    published = salvage_port_map(migration.target_ports) or PortMap.of({})
    if set(published) != set(announced.ports):
        theirs, ours = (", ".join(channel.label for channel in one) for one in (published, announced.ports))
        return Reason.CHANNELS, f"virt-handler published the channels {theirs}, and this node had announced {ours}"
    return Reason.POLICY, (
        "virt-handler's own ports were published although others had been announced: is the MutatingAdmissionPolicy "
        "migproxy-target applied, with its binding?"
    )


def _identity(vmi: VMI) -> Migration:
    migration_uid = vmi.migration.migration_uid if vmi.migration else None
    return Migration(vmi.namespace, vmi.name, vmi.uid, migration_uid or "")


def _checked(uid: str, what: str) -> str:
    try:
        return check_key(uid)
    except ProxyKeyError as error:
        raise _Hold(f"{what} must not be used in a path: {error}", error=True) from None


def _published_to_source(vmi: VMI, migration: MigrationState) -> tuple[IPAddress, PortMap, tuple[str, ...]]:
    text, raw = migration.target_node_address, migration.target_ports
    if vmi.is_decentralized() and (other := migration.target_state):
        # The target is another VMI, in another cluster: its side of the status tells (virt-handler).
        text, raw = other.node_address, raw if other.ports is None else other.ports
    missing = [what for what, value in (("address", text), ("ports", raw)) if value is None]
    if text is None or raw is None:
        raise _Hold(f"waiting for the target to publish its {' and '.join(missing)}", error=False)
    try:
        return parse_address(text), parse_port_map(raw), _unknown_channels(raw)
    except (AddressError, PortMapError) as error:
        raise _Hold(f"what the target published cannot be used: {error}", error=True) from None


def _published_by_us(migration: MigrationState, running: bool) -> PortMap | None:
    if not running:
        return salvage_port_map(migration.target_ports)
    try:
        return parse_port_map(migration.target_ports)
    except PortMapError as error:
        raise _Hold(
            f"the migration runs, but which ports were published cannot be told: {error}; "
            "restore targetDirectMigrationNodePorts in the status",
            error=True,
        ) from None


def _missing_channels(vmi: VMI, ports: Collection[Channel]) -> tuple[str, ...]:
    return tuple(
        f"no port is published for the {channel.label} channel, which this migration needs"
        for channel in channels_for(vmi.uses_block())
        if channel not in ports
    )


def _unknown_channels(raw: object) -> tuple[str, ...]:
    if unknown := unknown_channels(raw):
        return (f"the target published ports for unknown channels, which are not served here: {unknown}",)
    return ()


def _settle_ports(proxies: list[TargetProxy]) -> tuple[list[TargetProxy], list[Held]]:
    """Leave each published port to one target: one that runs before one that does not, then by migration."""
    kept: list[TargetProxy] = []
    refused: list[Held] = []
    owners: dict[tuple[IPAddress | None, int], Migration] = {}
    for proxy in sorted(proxies, key=lambda proxy: (not proxy.running, proxy.migration)):
        claims = [(proxy.published_address, port) for port in (proxy.published or {}).values()]
        taken = next((claim for claim in claims if claim in owners), None)
        if taken is None:
            owners.update(dict.fromkeys(claims, proxy.migration))
            kept.append(proxy)
            continue
        address, port = taken
        why = f"port {port} at {address} is published for {owners[taken]} too, which keeps it"
        if proxy.running:
            refused.append(Held(proxy.migration, Role.TARGET, f"{why}: abort one of the two", error=True))
        else:
            kept.append(replace(proxy, published=None, warnings=(*proxy.warnings, why)))
    return kept, refused
