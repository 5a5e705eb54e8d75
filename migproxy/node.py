"""The reconciler: makes the proxies that run on this node equal to the plan."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import structlog

from migproxy import logs, rows, survival
from migproxy.health import Activity, WatchReporter
from migproxy.inventory import BYPASSED, FAILED, RELAYED, Inventory, PublishError
from migproxy.launcher import LauncherError
from migproxy.limit import Limit
from migproxy.netif import AddressWatcher, MigrationAddress
from migproxy.pauses import doubling
from migproxy.plan import Bypassed, Held, Migration, Plan, Readiness, Reason, Role, SourceProxy, TargetProxy, make_plan
from migproxy.portmap import IPAddress, is_address
from migproxy.proxy import Proxy, ProxyError, Surroundings
from migproxy.relay.client import Contents
from migproxy.retention import Ended, Retention
from migproxy.shared import SharedFolder
from migproxy.source import SocketFolder, Source
from migproxy.survival import fingerprint
from migproxy.takeover import AdoptedProxy, take_over
from migproxy.target import PortRange, Target
from migproxy.text import printable
from migproxy.traffic import Progress
from migproxy.vmi import VMI
from migproxy.watch import Watcher

if TYPE_CHECKING:
    from migproxy.inventory.announcements import Announcements

log = structlog.get_logger(__name__)

_GLANCE_SECONDS = 0.1  # between two looks at connections that send
_FIRST_RETRY, _LAST_RETRY = 0.05, 2.0  # seconds
_START_SECONDS = 10.0  # what a daemon needs to know is known in less, or will not be for a while
_WITHDRAW_SECONDS = 5.0  # that a daemon which ends tries to take back what it has announced
_NOTED_AFTER = 3.0  # seconds of failing: a launcher may take that long to come up in good health

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

    Args:
        announcements: Where its targets are announced; None where they are published.
        life: Entered before anything is done, and left behind all.

    Attributes:
        address: This node's migration address as it is now, None until it is known.
        synchronised: Whether the inventory has told its whole state.
        draining: Whether no new migration is taken any more.
        waits: For which other daemon's end, and what to do about it; None where it serves.
        knows_its_work: Set once there is a plan: the inventory and the migration address are known.
        held: The migrations of this node that the plan has no proxy for now; what runs for them goes on.
        bypassed: Those that virt-handler's own proxy serves alone, and why.
        lines: Limits the log's lines about each VMI's migrations.
    """

    def __init__(
        self,
        options: NodeOptions,
        around: Surroundings,
        inventory: Inventory,
        addresses: AddressWatcher,
        watcher: Watcher,
        announcements: Announcements | None = None,
        life: AbstractAsyncContextManager[None] | None = None,
    ) -> None:
        self.options = options
        self.address: MigrationAddress | None = None
        self.synchronised = False
        self.draining = False
        self.waits: str | None = None
        self._around = around
        self._inventory = inventory
        self._addresses = addresses
        self._watcher = watcher
        self._vmis: dict[str, VMI] = {}
        self._own_addresses: set[IPAddress] = set()
        self._workers: dict[Key, _Worker] = {}
        self.held: dict[Key, Held] = {}
        self.bypassed: dict[Key, Bypassed] = {}
        self._announcements = announcements
        self._life, self._living = life, AsyncExitStack()
        self._known_beside: Readiness | None = None
        self._clock = asyncio.get_running_loop().time
        self._starts_until: float | None = None
        # By the VMI's UID: what may stand on it by this daemon's doing, whatever the watch has told by now.
        self._standing: dict[str, VMI] = {}
        self._void: set[str] = set()  # those whose announcement is to go
        self._withdrawing: dict[str, asyncio.Task[None]] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # one request at a time for each
        # Of a VMI's changes, which its tenant makes as fast as may be.
        self.lines: Limit[str] = Limit(
            lambda uid, count: log.warning("more lines about a VMI's migrations", uid=uid, count=count)
        )
        self._ended: Retention[Key] = Retention(options.retention, lambda key: key[0].vmi_uid, self._clock)
        self._adopted: dict[survival.Key, AdoptedProxy] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._next_start: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self.knows_its_work = asyncio.Event()

    async def run(self) -> None:
        """Reconciles until cancelled; then every proxy is closed."""
        if self.is_beside:
            self._starts_until = self._clock() + _START_SECONDS
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_addresses())
                tasks.create_task(self._follow_inventory())
                tasks.create_task(self._sample())
                tasks.create_task(self._await_start())
        except ExceptionGroup as several:
            raise several.exceptions[0] from several
        finally:
            for task in self._withdrawing.values():
                task.cancel()
            if self._next_start:
                self._next_start.cancel()
            await self._close(list(self._workers))
            await self._end_adopted(list(self._adopted.values()))
            await asyncio.gather(*self._endings)
            await self._living.aclose()

    def wait_for(self, why: str | None) -> None:
        """Says that nothing is served yet, and why; or that now it is.

        Args:
            why: See `waits`.
        """
        if why:
            log.warning("another daemon serves this node", why=why)
        elif self.waits:
            log.info("no other daemon serves this node any more")
        self.waits = why

    def take_over(self, contents: Contents) -> None:
        """Takes what an earlier daemon left; each migration goes to its proxy as soon as the plan has one.

        Args:
            contents: What the relay has; owned from now on.
        """
        self._adopted.update(take_over(contents, self._around))

    async def drain(self) -> None:
        """Takes no new migration, closes those that have not begun, and returns when the running ones are over."""
        self.draining = True
        if self.is_beside:
            await self._step_out()
        await self._close([key for key, worker in self._workers.items() if not worker.is_active])
        for key in self._workers:
            log.info("waiting for a running migration", migration=str(key[0]), role=str(key[1]))
        while any(worker.is_active for worker in self._workers.values()) or self._adopted:
            self._idle.clear()
            with suppress(TimeoutError):  # an idle migration that is not marked as started ends without an event
                async with asyncio.timeout(1):
                    await self._idle.wait()

    async def _end_adopted(self, adopted: Iterable[AdoptedProxy]) -> None:
        for one in adopted:
            one.log.info("connections left by an earlier daemon are closed: the migration has ended")
            report = rows.adopted(one) | {"state": "ended", "error": None, "history": [], "limited_by": []}
            await one.close()
            self._sum_up(one)
            self._ended.add((one.migration, one.role), Ended(report, one.progress))
        self._idle.set()

    async def _close(self, keys: Iterable[Key]) -> None:
        workers = [self._workers[key] for key in keys]
        for worker in workers:
            worker.want(None)
        # Shielded: the end of a drain, which waits here, would cancel the proxies while they close.
        await asyncio.shield(asyncio.gather(*(worker.task for worker in workers)))

    async def _begin(self) -> None:
        """Takes over from whoever acts for a dead daemon: not before it is known what is to be done."""
        if self._life:
            await self._living.enter_async_context(self._life)

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
                await self._begin()
                self.synchronised = True
                log.info("synchronised", vmis=len(self._vmis))
            self._replan()

    async def _sample(self) -> None:
        while True:
            await self._look_for_a_second()
            self._around.budget.look_again()
            # Of certificates, and of an inventory's trouble that is over, nobody tells.
            if self._adopted or self._beside() != self._known_beside:
                self._replan()
            if self._sending():
                await asyncio.to_thread(self._around.busiest.look, self._around.relay.pid)  # thousands of threads
            for proxy in self._proxies():
                proxy.sample()
                proxy.note()

    async def _look_for_a_second(self) -> None:
        end = self._clock() + 1
        while (left := end - self._clock()) > 0:
            sending = self._sending()
            await asyncio.sleep(min(left, _GLANCE_SECONDS) if sending else left)
            for proxy in sending:
                proxy.glance()

    def _sending(self) -> list[Proxy]:
        return [proxy for proxy in self._proxies() if proxy.role is Role.SOURCE and proxy.open_connections]

    async def _await_start(self) -> None:
        while self._starts_until:
            await asyncio.sleep(_FIRST_RETRY)
            if self._beside() != self._known_beside:
                self._replan()

    def _replan(self) -> None:
        if not self.synchronised or self.address is None:
            return
        now = datetime.now(UTC)
        self._known_beside = self._beside()
        plan = self._plan(self._vmis.values(), now)
        self._note_held({(held.migration, held.role): held for held in plan.held})
        self._note_bypassed(plan)
        self._withdraw_void(plan)
        items: tuple[Planned, ...] = (*plan.sources, *plan.targets)
        planned = {(item.migration, item.role): item for item in items}
        bypassed = {(one.migration, one.role) for one in plan.bypassed}
        served = {(fingerprint(migration), role) for migration, role in (*planned, *self.held, *bypassed)}
        ended = [key for key, one in self._adopted.items() if key not in served and self._is_over(one)]
        if over := [self._adopted.pop(key) for key in ended]:
            ending = asyncio.create_task(self._end_adopted(over))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
        # What runs goes on, whoever has taken its announcement away, and whatever new connections would meet.
        kept = {key for key in bypassed & self._workers.keys() if self._workers[key].is_active}
        # Those that end come first: two migrations of one VMI have the same socket names.
        for key in self._workers.keys() - planned.keys() - self.held.keys() - kept:
            self._workers[key].want(None)
        for key, item in planned.items():
            worker = self._workers.get(key)
            if worker is None or worker.wanted is None:
                if self.draining and (fingerprint(key[0]), key[1]) not in self._adopted:
                    continue
                worker = self._workers[key] = _Worker(self, key, self._ending(key))
            worker.want(item)
        self._replan_at_next_start(now)
        self.knows_its_work.set()

    def _ending(self, key: Key) -> list[asyncio.Task[None]]:
        """What ends of the same VMI and role, and still holds the ports and socket names that the next one needs."""
        (migration, role), workers = key, self._workers.items()
        return [
            worker.task
            for (other, its_role), worker in workers
            if (other.vmi_uid, its_role) == (migration.vmi_uid, role) and worker.wanted is None
        ]

    def _plan(self, vmis: Iterable[VMI], now: datetime) -> Plan:
        return make_plan(vmis, self.options.name, self._own_addresses, now, self._beside(), self._listens)

    def _listens(self, migration: Migration, port: int) -> bool:
        """Whether a migration's target listens on a port: this daemon's, or what an earlier one has left of it."""
        worker = self._workers.get((migration, Role.TARGET))
        proxy = worker.proxy if worker else self._adopted.get((fingerprint(migration), Role.TARGET))
        if proxy is None:
            return False
        ports = proxy.ports.values() if isinstance(proxy, Target) else ()
        return port in ports or any(left.socket.getsockname()[1] == port for left in proxy.inherited)

    def _is_over(self, adopted: AdoptedProxy) -> bool:
        """Whether a migration that nothing is planned for has ended; a VMI that cannot be read now says nothing."""
        uid = adopted.migration.vmi_uid
        return uid in self._vmis or not self._inventory.may_hide(uid)

    def _note_held(self, held: Mapping[Key, Held]) -> None:
        for (migration, role), item in held.items():
            if self.held.get((migration, role)) == item:
                continue
            if item.error:
                self.warn((migration, role), item.reason)
            if self.lines.admits(migration.vmi_uid):
                about = {"migration": str(migration), "role": str(role), "reason": item.reason}
                if item.error:
                    log.error("migration cannot be served", **about)
                else:
                    log.info("migration waits", **about)
        self.held = dict(held)

    @property
    def is_beside(self) -> bool:
        """Whether this daemon runs beside virt-handler."""
        return self._announcements is not None

    def _beside(self) -> Readiness | None:
        """Whether this daemon can serve, where it runs beside virt-handler."""
        if self._announcements is None:
            return None
        state = self.address
        address = state.addresses[0] if state and state.addresses and not state.problem else None
        unready = rows.certificate_problem(self._around.security.report()) or self._around.relay.lasting_problem
        if self._starts_until and ((address and not unready) or self._clock() > self._starts_until):
            self._starts_until = None
        return Readiness(address, unready, starting=bool(self._starts_until) and not self.draining)

    def _note_bypassed(self, plan: Plan) -> None:
        """Tells of what virt-handler alone serves: a target that is not announced, a source that stays out."""
        bypassed = {(one.migration, one.role): one for one in plan.bypassed}
        for source in plan.sources:
            key = source.migration, source.role
            out = source.beside.out_reason if source.beside else None
            if (
                source.beside
                and source.beside.stays_out
                and out not in (None, Reason.STARTING)
                and not self._is_served(key)
            ):
                bypassed[key] = Bypassed(*key, out, source.beside.stays_out)
        for key, item in bypassed.items():
            if key not in self.bypassed:
                log.warning("migration goes by virt-handler", migration=str(key[0]), reason=item.reason, why=item.why)
                if vmi := self._vmis.get(item.migration.vmi_uid):
                    self._inventory.note(vmi, BYPASSED, f"migration {item.role} on {self.options.name}: {item.why}")
        for key in self.bypassed.keys() - bypassed.keys() - {(one.migration, one.role) for one in plan.sources}:
            ended = rows.bypass(self.bypassed[key]) | {"state": "ended"}
            self._ended.add(key, Ended(ended, Progress()))
        self.bypassed = bypassed

    def _is_served(self, key: Key) -> bool:
        worker = self._workers.get(key)
        is_in_path = worker is not None and isinstance(worker.proxy, Source) and worker.proxy.is_in_path
        return is_in_path or (fingerprint(key[0]), key[1]) in self._adopted

    def _withdraw_void(self, plan: Plan) -> None:
        """Has every announcement removed that is of no use any more."""
        targets = {one.migration.vmi_uid: one for one in plan.targets}
        held = {one.migration.vmi_uid for one in plan.held if one.role is Role.TARGET}
        self._void = {*plan.stale, *(self._standing.keys() - targets.keys() - held)}
        if self.draining:
            mine = [uid for uid, one in targets.items() if one.announce]
            self._void.update(uid for uid in mine if uid in self._standing or self._vmis[uid].announced)
        for uid in self._void - self._withdrawing.keys():
            self._withdrawing[uid] = asyncio.create_task(self._withdraw(uid))

    def _is_void(self, vmi: VMI) -> bool:
        """Whether what is announced on a VMI, as it stands in the API server, is to go."""
        plan, standing = self._plan([vmi], datetime.now(UTC)), self._standing.get(vmi.uid)
        if plan.stale or (self.draining and any(one.announce for one in plan.targets)):
            return True
        is_ours = standing is not None and standing.announced == vmi.announced
        return is_ours and not plan.targets and all(one.role is Role.SOURCE for one in plan.held)

    async def _withdraw(self, uid: str) -> None:
        """Removes the announcement on a VMI, however often that must be tried, as long as it is to go."""
        assert self._announcements
        pauses, last = doubling(_FIRST_RETRY, _LAST_RETRY), ""
        try:
            while uid in self._void and (vmi := self._vmis.get(uid) or self._standing.get(uid)):
                try:
                    async with self._turns.setdefault(uid, asyncio.Lock()):
                        now = await self._announcements.withdraw(vmi, self._is_void)
                        standing = self._standing.get(uid)
                        if now is None or standing is None or now.announced != standing.announced:
                            self._standing.pop(uid, None)
                except PublishError as error:
                    if str(error) != last:
                        log.warning("announcement stays for now", error=str(error))
                    last = str(error)
                else:
                    if now is None or now.announced is None:
                        log.info("nothing is announced any more", namespace=vmi.namespace, name=vmi.name)
                    if now and self._vmis.get(uid) is vmi:
                        self._vmis[uid] = now  # the watch tells it later
                    self._replan()
                    for key, worker in self._workers.items():
                        if key[0].vmi_uid == uid:
                            worker.look_again()  # it may be announced anew by now
                if uid in self._void:
                    await asyncio.sleep(next(pauses))
        finally:
            del self._withdrawing[uid]  # at once: what is found to be void from now on gets another task

    async def _step_out(self) -> None:
        """Leaves what has not begun to virt-handler; whoever was on the way to us by then is still served."""
        sources = [one.proxy for one in self._workers.values() if isinstance(one.proxy, Source) and not one.is_active]
        await asyncio.gather(*(source.give_back() for source in sources))
        # What is announced goes before its listeners do, if the API server takes it: a source that finds nobody there
        # goes by virt-handler.
        self._replan()
        with suppress(TimeoutError):
            async with asyncio.timeout(_WITHDRAW_SECONDS):
                while self._withdrawing:
                    await asyncio.wait(self._withdrawing.values())
        await asyncio.sleep(_FIRST_RETRY)

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
            folders = SharedFolder if item.beside else SocketFolder
            proxy = Source(item, self._around, self._watcher, self.options.socket_owner, folders)
        else:
            proxy = Target(item, self._around, self.options.ports, self.options.libvirt_socket)
        if ended := self._ended.take((item.migration, item.role)):
            proxy.resume(ended.progress)
        if adopted := self._adopted.pop((fingerprint(item.migration), item.role), None):
            proxy.succeed(adopted)
        proxy.note()  # before anything is kept that the next daemon could not assign
        return proxy

    async def announce(self, target: Target) -> None:
        """Announces where a target listens, unless that is announced already or no longer open.

        Raises:
            PublishError: It cannot be announced; says why.
        """
        announcement, uid = target.announcement, target.migration.vmi_uid
        if announcement is None or self._announcements is None:
            return
        async with self._turns.setdefault(uid, asyncio.Lock()):
            vmi = self._vmis.get(uid)
            if self.draining or uid in self._void or not target.plan.announce or vmi is None:
                return
            announced = self._standing[uid] = replace(vmi, announced=str(announcement))
            if vmi.announced == announced.announced:
                return
            await self._announcements.announce(vmi, announcement)
            if self._vmis.get(uid) is vmi:
                self._vmis[uid] = announced  # the watch tells it later
        target.log.info("announced", address=str(announcement.address), ports=target.ports.published())

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
        told = side is None or (is_address(side.node_address, address) and side.ports == ports.published())
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
            report = worker.report() | {"state": "ended", "history": [], "limited_by": []}
            self._ended.add(key, Ended(report, proxy.progress))
            self._sum_up(proxy)
            if proxy.progress.opened is not None:
                self._around.measures.durations.labels(proxy.role).observe(time.time() - proxy.progress.opened)
        if self._workers.get(key) is worker:
            del self._workers[key]
        self._idle.set()

    def _sum_up(self, proxy: Proxy) -> None:
        """Tells the log, and whoever looks at the VMI, what a proxy that is over has moved, and what limited it."""
        told, progress = rows.summary(proxy.progress), proxy.progress
        if not told or progress.reported == progress.moved:
            return
        progress.reported = progress.moved
        vmi = self._vmis.get(proxy.migration.vmi_uid)
        result = vmi.result(proxy.migration.migration_uid) if vmi else None
        proxy.log.info("migration relayed", result=result or "unknown", **told)
        if vmi and result:
            limited = f"; limited {told['limited']}" if told["limited"] else ""
            message = f"{result}: {told['moved']} in {told['seconds']:.0f} s, {told['rate']}{limited}"
            self._inventory.note(vmi, RELAYED, f"migration {proxy.role} on {self.options.name}: {message}")

    @property
    def problems(self) -> dict[str, str]:
        """What keeps this node from being ready, by name; empty when it is."""
        problems = dict(self._inventory.problems)
        if not self.synchronised:
            problems["inventory"] = self.waits or "not synchronised yet"
        if self.address is None:
            problems["address"] = "the migration address is not known yet"
        elif self.address.problem:
            problems["address"] = self.address.problem
        return problems

    @property
    def checks(self) -> dict[str, str | None]:
        """What a ready node needs, by name: None where it is well, else what is wrong and what to do; printable."""
        problems = self.problems
        checks = {
            "synchronised": problems.pop("inventory", None),
            "address": problems.pop("address", None),
            "inventory": "; ".join(f"{where}: {what}" for where, what in problems.items()) or None,
            "relay": self._around.relay.problem,
            "serving": "draining: no new migration is taken any more" if self.draining else None,
        }
        tls = self._around.security.report()
        if tls["mode"] != "plaintext":
            checks["certificates"] = rows.certificate_problem(tls)
        return {name: printable(problem) if problem else None for name, problem in checks.items()}

    @property
    def queue_depth(self) -> int:
        """Migrations whose proxy is not (yet) as planned."""
        return sum(not worker.is_settled for worker in self._workers.values())

    def _proxies(self) -> list[Proxy]:
        return [*(worker.proxy for worker in self._workers.values() if worker.proxy), *self._adopted.values()]

    @property
    def activity(self) -> Activity:
        """What this node does now, in a few figures."""
        running = sum(worker.is_active for worker in self._workers.values()) + len(self._adopted)
        prepared = len(self._workers) + len(self._adopted) - running
        rate = sum(sum(proxy.rate) for proxy in self._proxies())
        problem = next((f"{what}: {why}" for what, why in self.problems.items()), None)
        return Activity(running, prepared, rate, self.draining, problem)

    def reconfigure(self, ports: PortRange, retention: float) -> None:
        """Changes what can be changed while proxies run; those that run keep their ports.

        Args:
            ports: Where targets listen that are made from now on.
            retention: Seconds that an ended migration is still reported.
        """
        self.options = replace(self.options, ports=ports, retention=retention)
        self._ended.seconds = retention

    def _report_ended_and_running(self) -> list[dict[str, Any]]:
        reports = {key: ended.report for key, ended in self._ended.items()}
        for key, worker in self._workers.items():
            # A proxy that is being made anew goes on with the counters that the one before left.
            reports[key] = {**reports.pop(key, {}), **worker.report()}
        for key, item in self.bypassed.items():
            if key not in self._workers or not self._workers[key].is_active:
                reports[key] = {**reports.pop(key, {}), **rows.bypass(item)}
        left = [rows.adopted(one) for one in self._adopted.values()]
        return left + list(reversed(reports.values()))

    def report(self) -> dict[str, Any]:
        """What `migproxy status` shows and what is exported, as plain values."""
        inventory = self._inventory
        held = [
            {**rows.identity(migration, role), "state": "error" if item.error else "waiting", "error": item.reason}
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
            "flaws": rows.flaws(inventory.flaws),
            "relay": self._around.relay.report(),
            "budget": self._around.budget.report(),
            "address": str(self.address.addresses[0]) if self.address and self.address.addresses else None,
            "vmis": len(self._vmis),
            "queue_depth": self.queue_depth,
            "watch": asdict(inventory.health) if isinstance(inventory, WatchReporter) else None,
            "tls": self._around.security.report(),
            "log": logs.report(),
            "beside": {} if self.is_beside else None,
            "ended_dropped": self._ended.dropped,
            "migrations": held + self._report_ended_and_running(),
        }


class _Worker:
    """Keeps one proxy equal to what is wanted of it; its trouble is retried, and is nobody else's.

    Attributes:
        wanted: The latest plan, None to end; however many came since, only the last one counts.
        proxy: What runs, None before the first attempt.
        problem: What keeps the proxy from being as wanted.
    """

    def __init__(self, node: Node, key: Key, after: Collection[asyncio.Task[None]]) -> None:
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
        if isinstance(self.proxy, Source):
            if isinstance(item, SourceProxy):
                self.proxy.redirect(item)
            else:
                self.proxy.retire()
        self._changed.set()

    async def _run(self, after: Collection[asyncio.Task[None]]) -> None:
        pauses = doubling(_FIRST_RETRY, _LAST_RETRY)
        try:
            if after:
                await asyncio.wait(after)
            while self.wanted is not None:
                self._changed.clear()
                if await self._attempt(self.wanted):
                    pause, pauses = None, doubling(_FIRST_RETRY, _LAST_RETRY)
                else:
                    pause = next(pauses)
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._changed.wait()
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
        migration, role = self._key
        if problem != self.problem and self._node.lines.admits(migration.vmi_uid):
            log.error(
                "migration cannot be served, retrying",
                migration=str(migration),
                role=str(role),
                error=problem,
                exc_info=unexpected,
            )
        self.problem = problem
        now = asyncio.get_running_loop().time()
        self._failing_since = now if self._failing_since is None else self._failing_since
        if problem != self._noted and now - self._failing_since > _NOTED_AFTER:
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
        where = item.published_address if item.beside else None
        if where is None:
            if address is None or address.problem or not address.addresses:
                raise ProxyError(f"no migration address to listen on: {address and address.problem}")
            where = address.addresses[0]
        await self.proxy.apply(item, where)
        if not item.beside:
            await self._node.publish(self.proxy)
        elif self.wanted is item:
            await self._node.announce(self.proxy)

    def report(self) -> dict[str, Any]:
        """What `migproxy status` shows of this migration."""
        migration, role = self._key
        proxy = self.proxy
        held = self._node.held.get(self._key)
        problem = self.problem or (proxy.problem if isinstance(proxy, Source) else None) or (held and held.reason)
        state = "running" if self.is_active else "error" if problem else "prepared" if proxy else "preparing"
        told = problem or (proxy.route_problem if isinstance(proxy, Source) else None)
        report: dict[str, Any] = {**rows.identity(migration, role), "state": state, "error": told}
        if proxy is not None:
            report |= rows.traffic(proxy)
        if proxy is not None and self._node.is_beside:
            path = proxy.path if isinstance(proxy, Source) else ("migproxy", None, None)
            if path:
                report |= dict(zip(("path", "path_reason", "path_why"), (path[0], path[1] or "", path[2]), strict=True))
        return report
