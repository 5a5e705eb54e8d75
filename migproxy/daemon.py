"""The life of the daemon: wires the parts, runs until it is told to stop, drains, ends."""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import structlog

from migproxy import control, web
from migproxy.inventory import Inventory, InventoryError
from migproxy.inventory.files import FileInventory
from migproxy.launcher import Launchers
from migproxy.measure import Measures
from migproxy.metrics import Exporter
from migproxy.netif import AddressWatcher, read_interface
from migproxy.node import Node, NodeOptions
from migproxy.portmap import IPAddress
from migproxy.proxy import ProxyError, Surroundings
from migproxy.security import ClusterSecurity, security
from migproxy.settings import Settings, parse_listen
from migproxy.sockets import TCPOptions
from migproxy.target import PortRange
from migproxy.threads import prefer_this_thread
from migproxy.tls import Security
from migproxy.watch import Watcher

if TYPE_CHECKING:
    from migproxy.kube.cluster import Cluster, ClusterSettings

log = structlog.get_logger(__name__)

_SWITCH_INTERVAL = 0.02
"""Seconds that a thread waits for Python's lock before it asks for it. Each of hundreds of pumps that wait wakes up
as often: with 800 connections at full speed, the default of 5 ms costs a third of the throughput, and fairness."""

_KUBEVIRT_OWNER = (107, 107)  # the qemu user and group of KubeVirt's launcher images


async def serve(settings: Settings) -> None:
    """Runs the daemon until a signal ends it.

    SIGTERM or SIGINT drains: no new migration is taken, running ones go on to their end or for
    `drain_timeout` seconds. A second one ends it at once.

    Args:
        settings: The options.

    Raises:
        InventoryError, SecurityError, ControlError, HTTPError: The daemon cannot start; says why.
    """
    _raise_file_limit()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    if not prefer_this_thread():
        log.info("the event loop has no preference over the pumps", remedy="CAP_SYS_NICE, or LimitNICE=-10 in systemd")
    signals = _Signals()
    async with Watcher() as watcher, _inputs(settings, watcher) as (inventory, protection, cluster):
        measures = Measures()
        node = _make_node(settings, protection, inventory, watcher, measures)

        def report() -> dict[str, Any]:
            return node.report() | ({"cluster": cluster.report()} if cluster else {})

        async with (
            control.serve(settings.control_socket, report),
            _http(settings, report, lambda: node.checks, Exporter(node.report, measures)),
        ):
            log.info(
                "started",
                version=version("migproxy"),
                node=settings.node_name,
                vmi_dir=settings.vmi_dir,
                kubeconfig=settings.kubeconfig,
            )
            running, watching = asyncio.create_task(_run(node, cluster)), asyncio.create_task(protection.watch())
            try:
                await _first(running, signals.first())
                await _drain(node, running, signals, settings.drain_timeout)
            finally:
                for task in (watching, running):
                    task.cancel()
                await asyncio.wait([running, watching])
    log.info("stopped")


@asynccontextmanager
async def _inputs(settings: Settings, watcher: Watcher) -> AsyncIterator[tuple[Inventory, Security, Cluster | None]]:
    """Where the VMIs come from, what protects their migrations, and the cluster whose KubeVirt is followed, if any."""
    if settings.vmi_dir is not None:
        yield FileInventory(settings.vmi_dir, watcher), security(settings), None
        return
    # Slow to import, and only needed here.
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
        yield KubeInventory(api, settings.node_name), protection, cluster


def warn_without_network(settings: Settings, cluster: ClusterSettings) -> None:
    """Says it where KubeVirt has a migration network that this daemon's pod is not on: it uses the pods' network then.

    Args:
        settings: The options.
        cluster: KubeVirt's settings.
    """
    name = settings.migration_interface
    if cluster.network and settings.migration_address is None and read_interface(name) is None:
        log.warning(
            "KubeVirt has a migration network, and this node is not on it",
            network=cluster.network,
            interface=name,
            remedy=f"have Multus make the interface: k8s.v1.cni.cncf.io/networks: NAMESPACE/{cluster.network}@{name}",
        )


async def _run(node: Node, cluster: Cluster | None) -> None:
    if cluster is None:
        await node.run()
        return
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(cluster.run())
        await node.run()
        following.cancel()


@asynccontextmanager
async def _http(
    settings: Settings, report: Callable[[], web.Report], checks: Callable[[], web.Checks], exporter: Exporter
) -> AsyncIterator[None]:
    where = parse_listen(settings.http_listen)
    if where is None:
        yield
        return
    options = web.HTTPOptions(*where, settings.http_tls_cert, settings.http_tls_key)
    async with web.serve(options, report, checks, exporter) as url:
        log.info("serving HTTP", url=url)
        yield


def _make_node(
    settings: Settings, protection: Security, inventory: Inventory, watcher: Watcher, measures: Measures
) -> Node:
    def local_address(ip_version: int) -> IPAddress:
        state = node.address
        addresses: tuple[IPAddress, ...] = state.addresses if state else ()
        for address in addresses:
            if address.version == ip_version:
                return address
        why = (state and state.problem) or f"this node's migration address is not IPv{ip_version}"
        raise ProxyError(f"no address to connect from: {why}")

    override, pod_ip = (
        address and ipaddress.ip_address(str(address)) for address in (settings.migration_address, settings.pod_ip)
    )
    low, high = settings.port_range or (0, 0)
    owner = settings.socket_owner or (_KUBEVIRT_OWNER if settings.vmi_dir is None else None)
    node = Node(
        NodeOptions(settings.node_name, PortRange(low, high), owner, settings.libvirt_socket, settings.retention),
        Surroundings(
            launchers=Launchers(settings.launcher_run_dir, settings.pods_dir),
            tcp=TCPOptions(settings.congestion_control, settings.tcp_user_timeout),
            security=protection,
            local_address=local_address,
            dial_timeout=settings.dial_timeout,
            max_connections=settings.max_connections,
            max_handshakes=settings.max_handshakes,
            measures=measures,
        ),
        inventory,
        AddressWatcher(settings.migration_interface, override, pod_ip),
        watcher,
    )
    return node


async def _drain(node: Node, running: asyncio.Task[None], signals: _Signals, timeout: float) -> None:
    log.info("draining: no new migration is taken", timeout=timeout)
    try:
        async with asyncio.timeout(timeout):
            await _first(running, node.drain(), signals.second())
    except TimeoutError:
        log.warning("migrations still run: ended now", timeout=timeout)


class _Signals:
    """Counts the signals that ask the daemon to stop."""

    def __init__(self) -> None:
        self._arrived = (asyncio.Event(), asyncio.Event())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._count)

    def _count(self) -> None:
        first, second = self._arrived
        (second if first.is_set() else first).set()

    async def first(self) -> None:
        """Returns when one has arrived."""
        await self._arrived[0].wait()

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


def _raise_file_limit() -> None:
    """A connection takes six descriptors; the soft limit is meant for programs that use select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
