"""The life of the daemon: wires the parts, runs until it is told to stop, drains, ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from migproxy import __version__, control, web
from migproxy.budget import Budget
from migproxy.capacity import node_capacity
from migproxy.fds import raise_file_limit
from migproxy.imports import uncollected
from migproxy.inventory import Inventory, InventoryError
from migproxy.inventory.files import FileInventory
from migproxy.launcher import Launchers
from migproxy.lifeline import is_locked, living
from migproxy.liveness import Liveness
from migproxy.measure import Measures
from migproxy.netif import AddressWatcher, MigrationAddress, read_interface
from migproxy.node import Node, NodeOptions
from migproxy.notify import Notifier
from migproxy.output import lines
from migproxy.proxy import ProxyError, Surroundings
from migproxy.relay.client import RelayClient
from migproxy.reload import Reloader, limits, port_range
from migproxy.security import ClusterSecurity, OptionsSecurity
from migproxy.service import Service
from migproxy.settings import Settings, parse_listen
from migproxy.twins import alone
from migproxy.watch import Watcher

if TYPE_CHECKING:
    from migproxy.inventory.announcements import Announcements
    from migproxy.kube.cluster import Cluster, ClusterSettings

log = structlog.get_logger(__name__)

_SETTLE_SECONDS = 5.0  # that the relay may take to have everything
_BOTH_SECONDS = 2.0  # within which a pod's containers, or systemd's units, are all told to end
_READY_SECONDS = 5.0  # that the inventory and the migration address may take


async def serve(settings: Settings, read_again: Callable[[], Settings]) -> None:
    """Runs the daemon until a signal ends it; where another one serves the same, its end is waited for first (`twins`).

    SIGTERM leaves running migrations to the relay and to the next daemon, unless the relay is told to end too, or has
    nothing to do and was started by this daemon. Then it drains, as SIGINT always does: no new migration is taken,
    running ones go on to their end or for `drain_timeout` seconds. A second signal ends it at once. SIGHUP reads the
    configuration again.

    Args:
        settings: The options.
        read_again: Returns them as they are now; raises SettingsError where they are wrong.

    Raises:
        InventoryError, SecurityError, ControlError, HTTPError, LifelineError, WatchError: The daemon cannot start; says
            why.
    """
    raise_file_limit()  # a connection takes eight descriptors
    signals, liveness = _Signals(), Liveness()
    async with (
        Watcher() as watcher,
        _inputs(settings, watcher, liveness) as inputs,
    ):
        protection, cluster, measures = inputs.security, inputs.cluster, Measures()
        notifier = Notifier.take()
        relay = RelayClient(settings.relay_path, starts=not settings.relay_externally_managed)
        around, node = _make_node(settings, inputs, watcher, measures, relay)
        service = Service(notifier, liveness, lambda: node.activity)
        reloader = Reloader(settings, read_again, node, around, protection)

        def report() -> dict[str, Any]:
            found = node.report() | ({"cluster": cluster.report()} if cluster else {})
            if found["beside"] is not None:
                found["beside"]["failsafe"] = is_locked(settings.failsafe_lock)
            return found

        async with (
            control.serve(settings.control_socket, report),
            _http(settings, report, lambda: node.checks, measures, liveness),
        ):
            log.info(
                "started",
                version=__version__,
                node=settings.node_name,
                vmi_dir=settings.vmi_dir,
                kubeconfig=settings.kubeconfig,
            )
            running = asyncio.create_task(_run(settings, node, cluster, relay))
            beside = [
                asyncio.create_task(task)
                for task in (
                    protection.watch(),
                    service.run(),
                    _ready(node, service),
                    _reload(reloader, service, signals),
                )
            ]
            try:
                await _first(running, signals.first())
                service.stopping()
                timeout = reloader.settings.drain_timeout
                if not node.waits and await _may_leave(relay, signals):
                    await _first(running, _leave(relay), signals.second())
                await _drain(node, running, signals, timeout)
            finally:
                for task in (*beside, running):
                    task.cancel()
                await asyncio.wait([running, *beside])
                await relay.settle(_SETTLE_SECONDS)
                relay.close()
    log.info("stopped")


async def _may_leave(relay: RelayClient, signals: _Signals) -> bool:
    """Decides whether what runs is left to the relay: not where that is to end too, or has nothing to do."""
    if signals.drains or relay.is_idle:
        return False
    with suppress(TimeoutError):
        async with asyncio.timeout(_BOTH_SECONDS):
            await relay.ending.wait()
            return False
    return not relay.is_idle


async def _leave(relay: RelayClient) -> None:
    """Ends this process, and leaves everything to the relay and the next daemon; returns where that cannot be done."""
    if relay.problem is None and await relay.settle(_SETTLE_SECONDS):
        log.info("left to the relay", **relay.report())
        lines.flush()
        os._exit(0)
    log.error("cannot leave, draining instead", error=relay.problem or "the relay does not answer")


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Where the VMIs come from, what protects their migrations, and the cluster whose KubeVirt is followed, if any.

    Args:
        announcements: where targets are announced, beside virt-handler only.
    """

    inventory: Inventory
    security: OptionsSecurity
    cluster: Cluster | None = None
    announcements: Announcements | None = None


@asynccontextmanager
async def _inputs(settings: Settings, watcher: Watcher, liveness: Liveness) -> AsyncIterator[_Inputs]:
    if settings.vmi_dir is not None:
        yield _Inputs(FileInventory(settings.vmi_dir, watcher, liveness), OptionsSecurity(settings))
        return
    with uncollected():  # slow to import, and only needed here
        from migproxy.inventory.announcements import Announcements
        from migproxy.inventory.kube import KubeInventory
        from migproxy.kube.api import ApiServer, ConfigurationError
        from migproxy.kube.cluster import Cluster

    async with AsyncExitStack() as stack:
        try:
            api = await stack.enter_async_context(ApiServer(settings.kubeconfig, settings.context))
        except ConfigurationError as error:
            raise InventoryError(str(error)) from error
        protection = ClusterSecurity(settings)

        def apply(settings_of_kubevirt: ClusterSettings) -> None:
            protection.apply(settings_of_kubevirt)
            warn_without_network(settings, settings_of_kubevirt)

        cluster = Cluster(api, settings.kubevirt_namespace, apply)
        announcements = Announcements(api) if settings.is_beside else None
        yield _Inputs(KubeInventory(api, settings.node_name), protection, cluster, announcements)


def warn_without_network(settings: Settings, cluster: ClusterSettings) -> None:
    """Says it where KubeVirt has a migration network that this daemon's pod is not on: it uses the pods' network then.

    Args:
        settings: The options.
        cluster: KubeVirt's settings.
    """
    name = settings.migration_interface
    if not cluster.network or settings.migration_address is not None:
        return
    if read_interface(name) is None:
        log.warning(
            "KubeVirt has a migration network, and this node is not on it",
            network=cluster.network,
            interface=name,
            remedy=f"have Multus make the interface: k8s.v1.cni.cncf.io/networks: NAMESPACE/{cluster.network}@{name}",
        )


async def _run(settings: Settings, node: Node, cluster: Cluster | None, relay: RelayClient) -> None:
    async with alone(settings, node.wait_for):
        node.take_over(await relay.open())
        try:
            async with asyncio.TaskGroup() as tasks:
                beside = [tasks.create_task(relay.run()), tasks.create_task(_let_relay_go(node, relay))]
                if cluster is not None:
                    beside.append(tasks.create_task(cluster.run()))
                await node.run()
                for task in beside:
                    task.cancel()
        except ExceptionGroup as several:
            raise several.exceptions[0] from several


async def _let_relay_go(node: Node, relay: RelayClient) -> None:
    """Lets a relay end that was told to, once it moves nothing, unless this daemon is told to end as well."""
    while True:
        await relay.ending.wait()
        await asyncio.sleep(_BOTH_SECONDS)
        if not node.draining:
            relay.release()
        await relay.replaced.wait()


async def _ready(node: Node, service: Service) -> None:
    """Says that migrations are served as soon as they are; what is not to be had soon is no failure to start."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_READY_SECONDS):
            await node.knows_its_work.wait()
    service.ready()


async def _reload(reloader: Reloader, service: Service, signals: _Signals) -> None:
    while True:
        await signals.reload()
        service.reloading()
        try:
            reloader.reload()
        except Exception:  # a defect of ours must not be the last reload
            log.error("configuration cannot be read again", exc_info=True)
        service.ready()


@asynccontextmanager
async def _http(
    settings: Settings,
    report: Callable[[], dict[str, Any]],
    checks: Callable[[], dict[str, str | None]],
    measures: Measures,
    liveness: Liveness,
) -> AsyncIterator[None]:
    where = parse_listen(settings.http_listen)
    if where is None:
        yield
        return
    options = web.HTTPOptions(*where, settings.http_tls_cert, settings.http_tls_key)
    async with web.serve(options, report, checks, measures, lambda: liveness.problems) as url:
        log.info("serving HTTP", url=url)
        yield


def _make_node(
    settings: Settings,
    inputs: _Inputs,
    watcher: Watcher,
    measures: Measures,
    relay: RelayClient,
) -> tuple[Surroundings, Node]:
    def migration_address(ip_version: int) -> MigrationAddress:
        state = node.address
        if state and (of_version := state.of_version(ip_version)):
            return of_version
        lacking = f"this node's migration address is not IPv{ip_version}: give both nodes addresses of one version"
        why = (state and state.problem) or lacking
        raise ProxyError(f"no address to connect from: {why}")

    around = Surroundings(
        launchers=Launchers(settings.launcher_run_dir, settings.pods_dir),
        security=inputs.security,
        migration_address=migration_address,
        measures=measures,
        relay=relay,
        budget=Budget(node_capacity(lambda: relay.limits, together=relay.is_beside)),
        announces=settings.is_beside,
        **limits(settings),
    )
    node = Node(
        NodeOptions(
            settings.node_name,
            port_range(settings),
            settings.owner_of_sockets,
            settings.libvirt_socket,
            settings.retention,
        ),
        around,
        inputs.inventory,
        AddressWatcher(settings.migration_interface, settings.migration_address, settings.pod_ip),
        watcher,
        inputs.announcements,
        living(settings.daemon_lock) if settings.is_beside else None,
    )
    return around, node


async def _drain(node: Node, running: asyncio.Task[None], signals: _Signals, timeout: float) -> None:
    log.info("draining: no new migration is taken", timeout=timeout)
    try:
        async with asyncio.timeout(timeout):
            await _first(running, node.drain(), signals.second())
    except TimeoutError:
        log.warning("migrations still run: ended now", timeout=timeout)


class _Signals:
    """Counts the signals that ask the daemon to stop, and hears the one that asks it to read its configuration.

    Attributes:
        drains: Whether SIGINT was among them: nothing is left to the next daemon.
    """

    def __init__(self) -> None:
        self.drains = False
        self._arrived = (asyncio.Event(), asyncio.Event())
        self._hup = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hup.set)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._count, number)

    def _count(self, number: signal.Signals) -> None:
        self.drains = self.drains or number is signal.SIGINT
        first, second = self._arrived
        (second if first.is_set() else first).set()

    async def first(self) -> None:
        """Returns when one has arrived."""
        await self._arrived[0].wait()

    async def reload(self) -> None:
        """Returns when SIGHUP has arrived since the last time."""
        await self._hup.wait()
        self._hup.clear()

    async def second(self) -> None:
        """Returns when another one has arrived."""
        await self._arrived[1].wait()
        log.warning("told to stop again: running migrations are ended now")


async def _first(running: asyncio.Task[None], *others: Coroutine[Any, Any, None]) -> None:
    """Returns when one of them has ended; raises what it raised."""
    tasks = [running, *(asyncio.create_task(other) for other in others)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks[1:])
