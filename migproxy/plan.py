"""What should run on a node: a pure function of the VMIs, the node's name and its migration addresses."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv6Address

from migproxy.announcement import Announcement, AnnouncementError, parse_announcement, server_name
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
from migproxy.vmi import TARGET_NODE_LABEL, VMI, MigrationState


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


class Reason(StrEnum):
    """Why a connection, or one side of a migration, goes by virt-handler's proxy: in status, metrics and the log."""

    UNANNOUNCED = "unannounced"
    VERSION = "version"
    MALFORMED = "malformed"
    CHANNEL = "channel"
    STARTED = "started"
    STARTING = "starting"
    UNREADY = "unready"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Beside:
    """What concerns a source that stands beside virt-handler's.

    Args:
        why: for people: why its connections go by virt-handler's socket although they reach ours; None where the target
            has announced where to.
        reason: of `why`.
        stays_out: why its sockets are not put over virt-handler's where they are not there already; None: they are.
        out_reason: of `stays_out`.
    """

    why: str | None = None
    reason: Reason | None = None
    stays_out: str | None = None
    out_reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class SourceProxy:
    """Unix listeners at the source launcher, one per channel, each leading to the target's port.

    Args:
        key: in the sockets' names; safe in a path.
        channels: those to listen for.
        address, ports: what the target published; beside virt-handler, what its migproxy announced, None and empty
            where it has not.
        running: the migration has started.
        warnings: what will not work, although the proxy can run.
        name: the TLS server name that tells the target which migration is meant; None where it knows it by another.
        beside: None where the status alone tells where the target is.
    """

    migration: Migration
    launcher: Launcher
    key: str
    channels: tuple[Channel, ...]
    address: IPAddress | None
    ports: PortMap
    running: bool
    warnings: tuple[str, ...]
    name: str | None = None
    beside: Beside | None = None

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
        warnings: what will not work, although the proxy can run.
        name: the TLS server name that a source sends; None where that is another's.
        beside: virt-handler publishes, and this daemon announces; it listens before the launcher is there, to be in
            time.
        announce: the migration has not started yet: where this one listens is to be announced.
    """

    migration: Migration
    launcher: Launcher
    key: str
    channels: tuple[Channel, ...]
    published_address: IPAddress | None
    published: PortMap | None
    running: bool
    warnings: tuple[str, ...]
    name: str | None = None
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


@dataclass(frozen=True, slots=True)
class Bypassed:
    """A target that virt-handler's own proxy serves alone: nothing is announced for it.

    Args:
        why: for people.
    """

    migration: Migration
    role: Role
    reason: Reason
    why: str


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether this daemon can serve beside virt-handler.

    Args:
        address: where it listens; None while that is not known.
        unready: why its connections would fail where virt-handler's would not; None if nothing says so.
        starting: it has just been started: what is not known yet will be in a moment.
    """

    address: IPAddress | None = None
    unready: str | None = None
    starting: bool = False

    @property
    def why_not(self) -> str | None:
        """Why virt-handler's proxy is to serve what has not begun; None where nothing is against ours."""
        return self.unready or (None if self.address else "this node's migration address is not known")


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
    beside: Readiness | None = None,
    listens: Callable[[Migration, int], bool] = lambda *_: False,
) -> Plan:
    """Decide which proxies should run on a node. The order of the VMIs does not matter.

    Args:
        vmis: all VMIs known, in any order, each once.
        node: this node's name.
        own_addresses: every migration address that this node has had since the daemon started; may be empty.
        now: aware; a migration has started when its startTimestamp is not after it.
        beside: where virt-handler publishes, and this daemon announces; None where this daemon publishes.
        listens: whether a migration's target listens on a port already: nobody else's status takes that from it.
    """
    planner = _Planner(node, own_addresses, now, beside)
    known = list(vmis)
    decisions = [decision for vmi in known for decision in planner.decide(vmi)]
    targets, refused = _settle_ports([proxy for proxy in decisions if isinstance(proxy, TargetProxy)], listens)
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


def sources_on(vmi: VMI, node: str, now: datetime) -> tuple[SourceProxy, ...]:
    """The sources of a VMI on a node, beside virt-handler: where sockets of ours may stand."""
    return make_plan([vmi], node, (), now, Readiness()).sources


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
    beside: Readiness | None

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
        # Another version's may be about this migration.
        return vmi.node_name == self.node and (vmi.is_done() or _where_announced(vmi)[2] is Reason.UNANNOUNCED)

    def _proxy_or_held(self, vmi: VMI, role: Role) -> SourceProxy | TargetProxy | Held | Bypassed:
        try:
            if vmi.migration is None:
                raise _Hold("waiting for status.migrationState", error=False)
            if vmi.leads_to_itself():
                raise _Hold(
                    f"source and target are one node: sourceNode in the status and the label {TARGET_NODE_LABEL} both "
                    f"name {self.node}: give each host a name of its own (--node-name), and write those two there",
                    error=True,
                )
            if role is Role.SOURCE:
                return self._source(vmi, vmi.migration)
            if self.beside:
                return self._announced_target(vmi, vmi.migration, self.beside)
            return self._target(vmi, vmi.migration)
        except _Hold as hold:
            return Held(_identity(vmi), role, str(hold), hold.error)

    def _source(self, vmi: VMI, migration: MigrationState) -> SourceProxy:
        launcher, key = self._launcher(vmi), _checked(vmi.source_key(), "the VMI's UID")
        if self.beside:
            return self._source_beside(vmi, migration, self.beside, launcher, key)
        address, ports, unknown = self._published_to_source(vmi, migration)
        return SourceProxy(
            migration=_identity(vmi),
            launcher=launcher,
            key=key,
            channels=tuple(ports),
            address=address,
            ports=ports,
            running=vmi.is_running(self.now),
            warnings=(*_missing_channels(vmi, ports), *unknown),
            name=server_name(vmi.uid, migration.migration_uid or ""),
        )

    def _source_beside(
        self, vmi: VMI, migration: MigrationState, beside: Readiness, launcher: Launcher, key: str
    ) -> SourceProxy:
        """A source whose sockets stand over virt-handler's: those are made, in their time, for any channel."""
        running = migration.start is not None
        announced, why, reason = _where_announced(vmi)
        if announced and (wrong := self._unreachable(announced.address)):
            announced, why, reason = None, wrong, Reason.MALFORMED
        stays_out = out_reason = None
        if running:
            stays_out, out_reason = "the migration had started when this node saw it", Reason.STARTED
        elif beside.why_not:
            # One that has just started leaves what stands there: it serves that by virt-handler until it is ready.
            stays_out, out_reason = beside.why_not, Reason.STARTING if beside.starting else Reason.UNREADY
        return SourceProxy(
            migration=_identity(vmi),
            launcher=launcher,
            key=key,
            channels=tuple(Channel),
            address=announced.address if announced else None,
            ports=announced.ports if announced else PortMap.of({}),
            running=running,
            warnings=(),
            name=_server_name(vmi),
            beside=Beside(why, reason, stays_out, out_reason),
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
            warnings=_missing_channels(vmi, channels),
            name=_server_name(vmi),
        )

    def _announced_target(self, vmi: VMI, migration: MigrationState, beside: Readiness) -> TargetProxy | Bypassed:
        """A target beside virt-handler: announced before the start, and kept to the end."""
        if not migration.migration_uid:
            raise _Hold("waiting for the migration's UID", error=False)
        if _server_name(vmi) is None:
            why = "the source is in another cluster, which does not see what is announced here"
            return Bypassed(_identity(vmi), Role.TARGET, Reason.UNANNOUNCED, why)
        # Whatever this node's clock says: from the start on, the admission policy lets nobody announce.
        started, announced = migration.start is not None, _announced(vmi)
        address = beside.address
        if started and announced is None:
            why = "the migration had started before this node could announce where it listens"
            return Bypassed(_identity(vmi), Role.TARGET, Reason.STARTED, why)
        if started and announced and self._own and announced.address not in self._own:
            why = f"what is announced, {announced.address}, is not an address of this node"
            return Bypassed(_identity(vmi), Role.TARGET, Reason.MALFORMED, why)
        if started and announced:
            address = announced.address
        elif beside.why_not and beside.starting:
            raise _Hold(f"just started: {beside.why_not}", error=False)
        elif beside.why_not:
            return Bypassed(_identity(vmi), Role.TARGET, Reason.UNREADY, beside.why_not)
        keeps = announced if announced and announced.address == address else None
        return TargetProxy(
            migration=_identity(vmi),
            launcher=self._launcher(vmi),
            key=_checked(vmi.target_key(), "the UID in the sockets' names"),
            channels=tuple(keeps.ports) if started and keeps else channels_for(vmi.uses_block()),
            published_address=address,
            published=keeps.ports if keeps else None,
            running=started,
            warnings=(),
            name=_server_name(vmi),
            beside=True,
            announce=not started,
        )

    def _published_to_source(self, vmi: VMI, migration: MigrationState) -> tuple[IPAddress, PortMap, tuple[str, ...]]:
        text, raw = migration.target_node_address, migration.target_ports
        if vmi.is_decentralized() and (other := migration.target_state):
            # The target is another VMI, in another cluster: its side of the status tells (virt-handler).
            text, raw = other.node_address, raw if other.ports is None else other.ports
        missing = [what for what, value in (("address", text), ("ports", raw)) if value is None]
        if text is None or raw is None:
            raise _Hold(f"waiting for the target to publish its {' and '.join(missing)}", error=False)
        try:
            address = parse_address(text)
            if wrong := self._unreachable(address):
                raise AddressError(wrong)
            return address, parse_port_map(raw), _unknown_channels(raw)
        except (AddressError, PortMapError) as error:
            raise _Hold(f"what the target published cannot be used: {error}", error=True) from None

    def _unreachable(self, target: IPAddress) -> str | None:
        """Why no target is led to: a loopback or link-local address means another node in each place.

        Nodes of a laboratory may have such a migration address themselves.
        """
        if target.is_loopback and not any(own.is_loopback for own in self._own):
            return f"{target} is a loopback address, and this node's own migration address is not"
        zone = target.scope_id if isinstance(target, IPv6Address) else None
        if zone and not any(isinstance(own, IPv6Address) and own.scope_id == zone for own in self._own):
            return f"{target} is a link-local address, and this node's own migration address is not one of {zone}"
        return None

    @property
    def _own(self) -> set[IPAddress]:
        """Every migration address that this node is known to have."""
        now = {self.beside.address} if self.beside and self.beside.address else set()
        return {*self.own_addresses, *now}

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
    return _where_announced(vmi)[0]


def _where_announced(vmi: VMI) -> tuple[Announcement | None, str | None, Reason | None]:
    """What is announced for the VMI's present migration; else why nothing is."""
    current = vmi.migration.migration_uid if vmi.migration else None
    if vmi.announced is None:
        return None, "no migproxy has announced that it listens on the target node", Reason.UNANNOUNCED
    try:
        announced = parse_announcement(vmi.announced)
    except AnnouncementError as error:
        return None, str(error), Reason.VERSION if error.is_version else Reason.MALFORMED
    if announced.migration_uid != current:
        return None, "what is announced is of another migration", Reason.UNANNOUNCED
    return announced, None, None


def _server_name(vmi: VMI) -> str | None:
    """None where the two sides are two VMIs, with UIDs of their own."""
    if vmi.is_decentralized() or vmi.created_for_migration:
        return None
    return server_name(vmi.uid, (vmi.migration and vmi.migration.migration_uid) or "")


def _identity(vmi: VMI) -> Migration:
    migration_uid = vmi.migration.migration_uid if vmi.migration else None
    return Migration(vmi.namespace, vmi.name, vmi.uid, migration_uid or "")


def _checked(uid: str, what: str) -> str:
    try:
        return check_key(uid)
    except ProxyKeyError as error:
        raise _Hold(f"{what} must not be used in a path: {error}", error=True) from None


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


def _settle_ports(
    proxies: list[TargetProxy], listens: Callable[[Migration, int], bool]
) -> tuple[list[TargetProxy], list[Held]]:
    """Leave each published port to one target: one that listens there, then one that runs, then by migration."""

    def rank(proxy: TargetProxy) -> tuple[bool, bool, Migration]:
        ports = (proxy.published or {}).values()
        return not any(listens(proxy.migration, port) for port in ports), not proxy.running, proxy.migration

    kept: list[TargetProxy] = []
    refused: list[Held] = []
    owners: dict[tuple[IPAddress | None, int], Migration] = {}
    for proxy in sorted(proxies, key=rank):
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
