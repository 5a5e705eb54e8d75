"""What the tests of this folder run against a cluster: inventories, and whole nodes in this process."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from migproxy.inventory.kube import KubeInventory
from migproxy.kube.api import ApiServer
from migproxy.kube.reflector import Pace
from migproxy.vmi import VMI
from tests.kube.cluster import Cluster

PACE = Pace(page=7, watch=30, silence=1.0, first_retry=0.02, last_retry=0.3, healthy=0.5)
"""As patient as tests can be; the pages are so small that every list has several."""

ADDRESS = ipaddress.ip_address("10.1.1.2")


async def eventually(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Waits for a condition that an event brings about."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"waited {seconds} s in vain for {what}"
        await asyncio.sleep(0.005)


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
