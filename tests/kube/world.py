"""What the tests of this folder run against a cluster: inventories, and whole nodes in this process."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from migproxy.budget import Budget
from migproxy.capacity import Capacity
from migproxy.inventory.announcements import Announcements
from migproxy.inventory.kube import KubeInventory
from migproxy.kube.api import ApiServer
from migproxy.kube.reflector import Pace
from migproxy.launcher import Launchers
from migproxy.netif import AddressWatcher, MigrationAddress
from migproxy.node import Node, NodeOptions
from migproxy.proxy import Surroundings
from migproxy.relay.client import Contents
from migproxy.sockets import TCPOptions
from migproxy.target import PortRange
from migproxy.tls import Plaintext, Security
from migproxy.vmi import VMI
from migproxy.watch import Watcher
from tests.clock import eventually
from tests.kube.cluster import Cluster
from tests.relaying import relaying

PACE = Pace(page=7, watch=30, silence=1.0, first_retry=0.02, last_retry=0.3, healthy=0.5)
"""As patient as tests can be; the pages are so small that every list has several."""


class Listener:
    """Iterates an inventory, and keeps what it told.

    Attributes:
        inventory: Which.
        state: VMIs by UID, as told.
        batches: Each batch.
    """

    def __init__(self, inventory: KubeInventory) -> None:
        self.inventory = inventory
        self.state: dict[str, VMI] = {}
        self.batches: list[dict[str, VMI | None]] = []

    async def run(self) -> None:
        async for batch in self.inventory.changes():
            for uid, vmi in batch.items():
                # Nothing is told twice, and nothing ends that was not there.
                assert self.state.get(uid) != vmi
                if vmi is None:
                    del self.state[uid]
                else:
                    self.state[uid] = vmi
            self.batches.append(dict(batch))

    def named(self, name: str) -> VMI | None:
        """The VMI of that name."""
        return next((vmi for vmi in self.state.values() if vmi.name == name), None)

    @property
    def names(self) -> set[str]:
        """The names of all that it was told of."""
        return {vmi.name for vmi in self.state.values()}


@asynccontextmanager
async def listening(
    kubernetes: Cluster, folder: Path, url: str | None = None, node: str = "node01", pace: Pace = PACE
) -> AsyncIterator[Listener]:
    """An inventory of a node's VMIs, followed while the context lasts and synchronised when it begins."""
    kubeconfig = kubernetes.kubeconfig(folder, node, url)
    async with ApiServer(str(kubeconfig)) as api:
        listener = Listener(KubeInventory(api, node, pace))
        task = asyncio.create_task(listener.run())
        try:
            await eventually(lambda: bool(listener.batches) or task.done(), "the first synchronisation")
            yield listener
            if task.done():
                task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class LocalNode:
    """A whole node in this process: reconciler, proxies with real sockets, and the API server as its inventory.

    Attributes:
        name, address: Its name, and its migration address on the loopback interface.
        node: The reconciler.
        launchers: The folder that has a launcher's /var/run for each VMI, by UID.
        security: What protects its connections.
    """

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name = name
        self.address = ipaddress.ip_address(address)
        self.launchers = folder / name
        self.launchers.mkdir()
        self.node: Node
        self.security: Security = Plaintext()
        self.max_connections = 8

    def boot_launcher(self, uid: str) -> None:
        """Makes what a launcher on this node has in its /var/run."""
        (self.launchers / uid / "kubevirt/migrationproxy").mkdir(parents=True)

    @asynccontextmanager
    async def run(
        self,
        kubeconfig: Path,
        pattern: str = "",
        pods: str = "/nowhere",
        *,
        beside: bool = False,
        left: Contents | None = None,
    ) -> AsyncIterator["LocalNode"]:
        """Runs it while the context lasts; beside virt-handler, if so told.

        Args:
            left: What an earlier daemon has left at the relay.
        """

        def migration_address(version: int) -> MigrationAddress:
            return MigrationAddress((self.address,), "--migration-address", None)

        async with relaying() as relay, Watcher() as watcher, ApiServer(str(kubeconfig)) as api:
            self.node = Node(
                NodeOptions(self.name, PortRange(), None, "libvirt/libvirt-sock"),
                Surroundings(
                    launchers=Launchers(pattern or f"{self.launchers}/{{uid}}", pods),
                    tcp=TCPOptions(),
                    security=self.security,
                    migration_address=migration_address,
                    peer_timeout=180,
                    dial_timeout=5,
                    max_connections=self.max_connections,
                    max_handshakes=8,
                    relay=relay,
                    budget=Budget(lambda: Capacity(1000, "nothing", "")),
                    announces=beside,
                ),
                KubeInventory(api, self.name, PACE),
                AddressWatcher("none", self.address),
                watcher,
                Announcements(api) if beside else None,
            )
            if left:
                self.node.take_over(left)
            task = asyncio.create_task(self.node.run())
            try:
                await eventually(lambda: self.node.synchronised or task.done(), "the first synchronisation")
                yield self
                if task.done():
                    task.result()
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def migrations(self) -> list[dict[str, Any]]:
        """What it reports of its migrations that have not ended."""
        return [one for one in self.node.report()["migrations"] if one["state"] != "ended"]

    def migration(self, name: str) -> dict[str, Any]:
        """What it reports of the VMI of that name; nothing where it serves it in no way."""
        return next((one for one in self.migrations() if one["name"] == name), {})

    def socket_files(self) -> set[str]:
        """The sockets in the launchers' folders: UID/NAME."""
        found = self.launchers.glob("*/kubevirt/migrationproxy/*.sock")
        return {f"{path.parents[2].name}/{path.name}" for path in found if path.is_socket()}

    def tcp_ports(self) -> set[int]:
        """The ports that somebody listens on at its address."""
        packed = f"{int.from_bytes(self.address.packed, 'little'):08X}"
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        fields = [line.split() for line in lines]
        return {int(one[1].split(":")[1], 16) for one in fields if one[1].startswith(packed) and one[3] == "0A"}
