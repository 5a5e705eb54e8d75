"""The reconciler: makes the proxies that run on this node equal to the plan."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from migproxy.health import WatchReporter
from migproxy.inventory import Inventory, PublishError
from migproxy.launcher import LauncherError
from migproxy.netif import AddressWatcher, MigrationAddress
from migproxy.plan import Held, Migration, Role, SourceProxy, TargetProxy, make_plan
from migproxy.portmap import IPAddress
from migproxy.proxy import ProxyError, Surroundings
from migproxy.relay import Traffic
from migproxy.retention import Ended, Retention
from migproxy.source import Source
from migproxy.target import PortRange, Target
from migproxy.vmi import VMI
from migproxy.watch import Watcher

log = structlog.get_logger(__name__)

_FIRST_RETRY = 0.05  # seconds; doubled up to the last
_LAST_RETRY = 2.0
_NOTED_AFTER = 3.0  # seconds of failing: a launcher may take that long to come up in good health

FAILED = "MigrationProxyFailed"

Key = tuple[Migration, Role]
Planned = SourceProxy | TargetProxy


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What is particular to this node.

    Attributes:
        name: As the VMIs' status and labels name it.
        ports: Where targets listen.
        socket_owner: User and group of the sources' socket files, None for the owner of the launcher's folder.
        libvirt_socket: The target libvirt's socket, below the launcher's /var/run.
        retention: Seconds that an ended migration is still reported.
    """

    name: str
    ports: PortRange
    socket_owner: tuple[int, int] | None
    libvirt_socket: str
    retention: float = 300.0


class Node:
    """Owns a worker, and so a proxy, for each migration and role that the plan has for this node.

    Attributes:
        address: This node's migration address as it is now, None until it is known.
        synchronised: Whether the inventory has told its whole state.
        draining: Whether no new migration is taken any more.
        held: The migrations of this node that the plan has no proxy for now; what runs for them goes on.
    """

    def __init__(
        self,
        options: NodeOptions,
        around: Surroundings,
        inventory: Inventory,
        addresses: AddressWatcher,
        watcher: Watcher,
    ) -> None:
        self.options = options
        self.address: MigrationAddress | None = None
        self.synchronised = False
        self.draining = False
        self._around = around
        self._inventory = inventory
        self._addresses = addresses
        self._watcher = watcher
        self._vmis: dict[str, VMI] = {}
        self._own_addresses: set[IPAddress] = set()
        self._workers: dict[Key, _Worker] = {}
        self.held: dict[Key, Held] = {}
        self._ended: Retention[Key] = Retention(options.retention)
        self._next_start: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()

    async def run(self) -> None:
        """Reconciles until cancelled; then every proxy is closed."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_addresses())
                tasks.create_task(self._follow_inventory())
                tasks.create_task(self._sample())
        except ExceptionGroup as several:
            raise several.exceptions[0] from several
        finally:
            if self._next_start:
                self._next_start.cancel()
            await self._close(list(self._workers))

    async def drain(self) -> None:
        """Takes no new migration, closes those that have not begun, and returns when the running ones are over."""
        self.draining = True
        await self._close([key for key, worker in self._workers.items() if not worker.is_active])
        for key in self._workers:
            log.info("waiting for a running migration", migration=str(key[0]), role=str(key[1]))
        while any(worker.is_active for worker in self._workers.values()):
            self._idle.clear()
            with suppress(TimeoutError):  # an idle migration that is not marked as started ends without an event
                await asyncio.wait_for(self._idle.wait(), 1)

    async def _close(self, keys: Iterable[Key]) -> None:
        workers = [self._workers[key] for key in keys]
        for worker in workers:
            worker.want(None)
        await asyncio.gather(*(worker.task for worker in workers))

    async def _follow_addresses(self) -> None:
        async for state in self._addresses.states():
            self.address = state
            self._own_addresses.update(state.addresses)
            if state.problem:
                log.error("no migration address", error=state.problem, source=state.source)
            else:
                log.info("migration address", address=str(state.addresses[0]), source=state.source)
            self._replan()
            for worker in self._workers.values():
                worker.look_again()

    async def _follow_inventory(self) -> None:
        async for changes in self._inventory.changes():
            for uid, vmi in changes.items():
                if vmi is None:
                    self._vmis.pop(uid, None)
                else:
                    self._vmis[uid] = vmi
            if not self.synchronised:
                self.synchronised = True
                log.info("synchronised", vmis=len(self._vmis))
            self._replan()

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(1)
            for worker in self._workers.values():
                if worker.proxy:
                    worker.proxy.sample()

    def _replan(self) -> None:
        if not self.synchronised or self.address is None:
            return
        now = datetime.now(UTC)
        plan = make_plan(self._vmis.values(), self.options.name, self._own_addresses, now)
        self._note_held({(held.migration, held.role): held for held in plan.held})
        items: tuple[Planned, ...] = (*plan.sources, *plan.targets)
        planned = {(item.migration, item.role): item for item in items}
        # Those that end come first: two migrations of one VMI have the same socket names.
        for key in [key for key in self._workers if key not in planned and key not in self.held]:
            self._workers[key].want(None)
        for key, item in planned.items():
            worker = self._workers.get(key)
            if worker is None or worker.wanted is None:
                if self.draining:
                    continue
                worker = self._workers[key] = _Worker(self, key, after=worker)
            worker.want(item)
        self._replan_at_next_start(now)

    def _note_held(self, held: Mapping[Key, Held]) -> None:
        for (migration, role), item in held.items():
            if self.held.get((migration, role)) != item:
                about = {"migration": str(migration), "role": str(role), "reason": item.reason}
                if item.error:
                    log.error("migration cannot be served", **about)
                    self.warn((migration, role), item.reason)
                else:
                    log.info("migration waits", **about)
        self.held = dict(held)

    def _replan_at_next_start(self, now: datetime) -> None:
        """A start that lies ahead (another node's clock) changes the plan without an event."""
        if self._next_start:
            self._next_start.cancel()
            self._next_start = None
        starts = [vmi.migration.start for vmi in self._vmis.values() if vmi.migration and vmi.migration.start]
        ahead = [(start - now).total_seconds() for start in starts if start > now]
        if ahead:
            self._next_start = asyncio.get_running_loop().call_later(min(ahead), self._replan)

    def make_proxy(self, item: Planned) -> Source | Target:
        """Makes the proxy for a planned item; the caller closes it."""
        proxy: Source | Target
        if isinstance(item, SourceProxy):
            proxy = Source(item, self._around, self._watcher, self.options.socket_owner)
        else:
            proxy = Target(item, self._around, self.options.ports, self.options.libvirt_socket)
        if ended := self._ended.take((item.migration, item.role)):
            proxy.resume(ended.traffic, ended.began)
        return proxy

    async def publish(self, target: Target) -> None:
        """Publishes where a target listens, unless the status says so already or the migration has started.

        Raises:
            PublishError: It cannot be published; says why, and what to do.
        """
        plan, address, ports = target.plan, target.address, target.ports
        assert address is not None
        vmi = self._vmis.get(plan.migration.vmi_uid)
        if vmi is None or vmi.migration is None:
            return
        side = vmi.migration.target_state
        told = side is None or (side.node_address, side.ports) == (str(address), ports.published())
        if told and (plan.published_address, plan.published) == (address, ports):
            return
        if plan.running:
            raise ProxyError(
                f"listening on {address}, which the status does not name, and the migration has started: connections "
                f"that are open go on, new ones to {plan.published_address} will fail"
            )
        await self._inventory.publish(vmi, address, ports)
        target.log.info("published", address=str(address), ports=ports.published())

    def note_reconcile_error(self) -> None:
        """Counts an attempt that failed."""
        self._around.measures.reconcile_errors.inc()

    def warn(self, key: Key, problem: str) -> None:
        """Tells whoever looks at the VMI that a migration cannot be served."""
        migration, role = key
        if vmi := self._vmis.get(migration.vmi_uid):
            message = f"migration {role} proxy on {self.options.name}: {problem}"
            self._inventory.note(vmi, FAILED, message, warning=True)

    def forget(self, key: Key, worker: _Worker) -> None:
        """Keeps what a worker has to say of its migration, and lets go of it."""
        if proxy := worker.proxy:
            report = worker.report() | {"state": "ended", "history": []}
            self._ended.add(key, Ended(report, proxy.traffic, proxy.began))
            if proxy.opened is not None:
                self._around.measures.durations.labels(proxy.role).observe(time.monotonic() - proxy.opened)
        if self._workers.get(key) is worker:
            del self._workers[key]
        self._idle.set()

    @property
    def problems(self) -> dict[str, str]:
        """What keeps this node from being ready, by name; empty when it is."""
        problems = dict(self._inventory.problems)
        if not self.synchronised:
            problems["inventory"] = "not synchronised yet"
        if self.address is None:
            problems["address"] = "the migration address is not known yet"
        elif self.address.problem:
            problems["address"] = self.address.problem
        return problems

    @property
    def checks(self) -> dict[str, str | None]:
        """What a ready node needs, by name: None where it is well, else what is wrong and what to do."""
        problems = self.problems
        checks = {
            "synchronised": problems.pop("inventory", None),
            "address": problems.pop("address", None),
            "inventory": "; ".join(f"{where}: {what}" for where, what in problems.items()) or None,
            "serving": "draining: no new migration is taken any more" if self.draining else None,
        }
        tls = self._around.security.report()
        if tls["mode"] != "plaintext":
            checks["certificates"] = _certificate_problem(tls)
        return checks

    @property
    def queue_depth(self) -> int:
        """Migrations whose proxy is not (yet) as planned."""
        return sum(not worker.is_settled for worker in self._workers.values())

    def _report_ended_and_running(self) -> list[dict[str, Any]]:
        reports = {key: ended.report for key, ended in self._ended.items()}
        for key, worker in self._workers.items():
            # A proxy that is being made anew goes on with the counters that the one before left.
            reports[key] = {**reports.pop(key, {}), **worker.report()}
        return list(reversed(reports.values()))

    def report(self) -> dict[str, Any]:
        """What `migproxy status` shows and what is exported, as plain values."""
        inventory = self._inventory
        held = [
            {**_identity(migration, role), "state": "error" if item.error else "waiting", "error": item.reason}
            for (migration, role), item in self.held.items()
            if (migration, role) not in self._workers
        ]
        checks = self.checks
        return {
            "node": self.options.name,
            "ready": not any(checks.values()),
            "draining": self.draining,
            "checks": checks,
            "problems": self.problems,
            "address": str(self.address.addresses[0]) if self.address and self.address.addresses else None,
            "vmis": len(self._vmis),
            "queue_depth": self.queue_depth,
            "watch": asdict(inventory.health) if isinstance(inventory, WatchReporter) else None,
            "tls": self._around.security.report(),
            "migrations": held + self._report_ended_and_running(),
        }


class _Worker:
    """Keeps one proxy equal to what is wanted of it; its trouble is retried, and is nobody else's.

    Attributes:
        wanted: The latest plan, None to end; however many came since, only the last one counts.
        proxy: What runs, None before the first attempt.
        problem: What keeps the proxy from being as wanted.
    """

    def __init__(self, node: Node, key: Key, after: _Worker | None) -> None:
        self.wanted: Planned | None = None
        self.proxy: Source | Target | None = None
        self.problem: str | None = None
        self._failing_since: float | None = None
        self._noted: str | None = None
        self._node = node
        self._key = key
        self._changed = asyncio.Event()
        self._is_attempting = False
        self.task = asyncio.create_task(self._run(after))

    @property
    def is_settled(self) -> bool:
        """Whether the proxy is as wanted."""
        return not (self._is_attempting or self._changed.is_set() or self.problem)

    @property
    def is_active(self) -> bool:
        """Whether closing it would break a migration that has begun."""
        if self.wanted is None or self.proxy is None:
            return False
        return self.wanted.running or self.proxy.open_connections > 0

    def look_again(self) -> None:
        """Says that something has changed that is not in the plan."""
        self._changed.set()

    def want(self, item: Planned | None) -> None:
        """Says what is wanted; it is done as soon as may be, and nothing is done where nothing changed."""
        if item == self.wanted:
            return
        self.wanted = item
        if item is None and isinstance(self.proxy, Source):
            self.proxy.retire()
        self._changed.set()

    async def _run(self, after: _Worker | None) -> None:
        retry = _FIRST_RETRY
        try:
            if after is not None:  # which still holds the ports and sockets that this one needs
                await asyncio.wait([after.task])
            while self.wanted is not None:
                self._changed.clear()
                pause = None
                if not await self._attempt(self.wanted):
                    pause, retry = retry, min(retry * 2, _LAST_RETRY)
                else:
                    retry = _FIRST_RETRY
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), pause)
        finally:
            try:
                if self.proxy is not None:
                    await self.proxy.close()
            finally:
                self._node.forget(self._key, self)

    async def _attempt(self, item: Planned) -> bool:
        self._is_attempting = True
        try:
            await self._reconcile(item)
        except (LauncherError, ProxyError, PublishError) as error:
            self._fail(str(error))
        except Exception as error:  # noqa: BLE001 - a defect of ours must not end another migration
            self._fail(f"unexpected {type(error).__name__}: {error}", unexpected=True)
        else:
            if self.problem:
                log.info("migration is served again", migration=str(item.migration), role=str(item.role))
            self.problem = self._failing_since = self._noted = None
        finally:
            self._is_attempting = False
        return self.problem is None

    def _fail(self, problem: str, *, unexpected: bool = False) -> None:
        self._node.note_reconcile_error()
        if problem != self.problem:
            migration, role = self._key
            log.error(
                "migration cannot be served, retrying",
                migration=str(migration),
                role=str(role),
                error=problem,
                exc_info=unexpected,
            )
        self.problem = problem
        self._failing_since = self._failing_since or time.monotonic()
        if problem != self._noted and time.monotonic() - self._failing_since > _NOTED_AFTER:
            self._noted = problem
            self._node.warn(self._key, problem)

    async def _reconcile(self, item: Planned) -> None:
        if self.proxy is None:
            self.proxy = self._node.make_proxy(item)
        if isinstance(item, SourceProxy):
            assert isinstance(self.proxy, Source)
            await self.proxy.apply(item)
            return
        assert isinstance(self.proxy, Target)
        address = self._node.address
        if address is None or address.problem or not address.addresses:
            raise ProxyError(f"no migration address to listen on: {address and address.problem}")
        await self.proxy.apply(item, address.addresses[0])
        await self._node.publish(self.proxy)

    def report(self) -> dict[str, Any]:
        """What `migproxy status` shows of this migration."""
        migration, role = self._key
        proxy = self.proxy
        held = self._node.held.get(self._key)
        problem = self.problem or (proxy.problem if isinstance(proxy, Source) else None) or (held and held.reason)
        state = "running" if self.is_active else "error" if problem else "prepared" if proxy else "preparing"
        report: dict[str, Any] = {**_identity(migration, role), "state": state, "error": problem}
        if proxy is not None:
            report |= _traffic(proxy)
        return report


def _certificate_problem(tls: Mapping[str, Any]) -> str | None:
    now = datetime.now(UTC)
    expired = [
        f"{one['file']} has expired: renew it"
        for one in tls.get("certificates", ())
        if datetime.fromisoformat(one["not_after"]) <= now
    ]
    told = [tls.get("problem"), *tls.get("problems", {}).values(), *expired]
    return "; ".join(dict.fromkeys(problem for problem in told if problem)) or None


def _identity(migration: Migration, role: Role) -> dict[str, Any]:
    return {
        "namespace": migration.namespace,
        "name": migration.name,
        "vmi_uid": migration.vmi_uid,
        "migration_uid": migration.migration_uid,
        "role": str(role),
    }


def _traffic(proxy: Source | Target) -> dict[str, Any]:
    sent, received = proxy.rate
    return {
        "peer": str(proxy.plan.address) if isinstance(proxy, Source) else None,
        "last_error": proxy.last_error,
        "began": proxy.began,
        "age_seconds": round(time.time() - proxy.began, 3),
        "history": proxy.history,
        "bytes_sent_per_second": round(sent),
        "bytes_received_per_second": round(received),
        "channels": [
            {
                "channel": channel.label,
                "listening": proxy.listening(channel),
                "peer": proxy.peer(channel),
                "connections_open": len(traffic.relays),
                "connections_total": traffic.connections,
                "connections_failed": traffic.failed,
                "failures": dict(traffic.failures),
                "bytes_sent": traffic.sent,
                "bytes_received": traffic.received,
                "modes": dict(traffic.modes),
                "retransmits": traffic.retransmits,
                "tcp": _tcp(traffic),
                "bytes_spliced_sent": traffic.spliced[0],
                "bytes_spliced_received": traffic.spliced[1],
            }
            for channel, traffic in sorted(proxy.traffic.items())
        ],
    }


def _tcp(traffic: Traffic) -> dict[str, float] | None:
    """TCP's view of a channel: its slowest connection's round trip, and the sums over all that are open."""
    infos = traffic.tcp_infos
    if not infos:
        return None
    return {
        "rtt_seconds": max(info.rtt for info in infos),
        "delivery_rate": sum(info.delivery_rate for info in infos),
        "congestion_window": sum(info.congestion_window for info in infos),
    }
