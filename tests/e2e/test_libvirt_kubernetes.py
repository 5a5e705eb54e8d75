"""The end-to-end migration, driven by an API server instead of files: also while that server is gone."""

import asyncio
import json
import ssl
import tempfile
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from demo import guest as vm
from demo.guest import Guest
from demo.lab import Lab, Node, VMIFile, background, run, until
from tests.e2e.test_libvirt_migration import (
    assert_counts_agree,
    assert_heartbeat_goes_on,
    assert_nothing_is_left,
    assert_runs_only_on,
)
from tests.kube.cluster import KUBEVIRTS, VMIS, Cluster, cluster, kubevirt
from tests.kube.gate import Gate, gate

pytestmark = [pytest.mark.tier("soak"), pytest.mark.alone]

SERVER = "10.1.1.254"
"""The API server's address in the nodes' network."""


class ApiVMI(VMIFile):
    """The VMI as the API server has it; the file is what `migproxy uri` reads.

    Args:
        path: Of the file.
        kubernetes: The cluster.
        token: Of whoever writes it.
    """

    def __init__(self, path: Path, kubernetes: Cluster, token: str) -> None:
        self._url = f"{kubernetes.url}{VMIS}"
        self._tls = kubernetes.tls if isinstance(kubernetes.tls, ssl.SSLContext) else None
        self._token = token
        self._exists = False
        super().__init__(path)

    def read(self) -> dict[str, Any]:
        return self._request("GET", f"/{self.path.stem}")

    def _write(self, vmi: dict[str, Any]) -> None:
        made = self._request("PUT", f"/{self.path.stem}", vmi) if self._exists else self._request("POST", "", vmi)
        self._exists = True
        super()._write(made)

    def _request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30, context=self._tls) as answer:
            return dict(json.load(answer))


class KubeLab(Lab):
    """A laboratory whose daemons take the VMI from an API server; without TLS, that is KubeVirt's setting there.

    Attributes:
        kubernetes: The cluster.
        door: What the daemons reach it through.
        publishes: Its migproxies publish themselves, with virt-handler's rights, and there is no virt-handler.
    """

    kubernetes: Cluster
    door: Gate
    publishes = True

    def _node(self, number: int) -> Node:
        name = f"node0{number}"
        options = ["--kubeconfig", str(self.directory / f"{name}.kubeconfig"), "--socket-owner", "0:0"]
        options += ["--publish-status"] if self.publishes else []
        if self.tls:
            options += ["--tls-dir", self._certificates]
        return Node(name, f"10.1.1.{number}", self.directory / name, *options)

    @classmethod
    @asynccontextmanager
    async def run(cls, *, tls: bool = True) -> AsyncIterator["KubeLab"]:
        """Yields it with both daemons running."""
        lab = cls(tls=tls)
        async with lab.served():
            for node in lab.nodes:
                await node.proxy.start()
            yield lab
            for node in lab.nodes:
                await node.proxy.stop()

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """The laboratory with its API server, and no daemon yet."""
        async with self, AsyncExitStack() as stack:
            await run("ip", "address", "add", f"{SERVER}/24", "dev", "migration")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kube-", dir="/run")))
            made = cluster(folder, separate=True)
            self.kubernetes = await stack.enter_async_context(made)
            self.door = await stack.enter_async_context(gate(self.kubernetes.url, self.kubernetes.tls, SERVER))
            configuration = {"migrations": {} if self.tls else {"disableTLS": True}}
            await self.kubernetes.request("POST", KUBEVIRTS, kubevirt(configuration))
            controller = await self.kubernetes.kubevirt_token("kubevirt-controller")
            self.vmi = ApiVMI(self.vmi.path, self.kubernetes, controller)
            if self.publishes:
                await self.kubernetes.use_handlers_token()
            for node in self.nodes:
                self.kubernetes.kubeconfig(self.directory, node.name, self.door.url)
            yield


@pytest.fixture(scope="module", autouse=True)
def _machine_has_what_it_takes() -> None:
    vm.check()


async def test_guest_migrates_there_and_back_by_the_api() -> None:
    async with KubeLab.run() as lab:
        here, there = lab.nodes
        await until(lambda: lab.door.watches == 8, "the watches of both daemons")
        descriptors = {node.name: node.proxy.descriptors() for node in lab.nodes}
        async with Guest.boot(lab, here) as guest:
            at_first = guest.hashes[0]
            for source, target in ((here, there), (there, here)):
                move = await guest.migrate(source, target)
                await assert_runs_only_on(target, lab)
                await assert_heartbeat_goes_on(guest, *await guest.handover(source, target))
                await assert_counts_agree(move, source, target, memory_connections=1, disk=False)
                for node in lab.nodes:
                    await assert_nothing_is_left(node, descriptors[node.name])
                assert (await guest.fresh_hashes()).memory == at_first.memory
                assert published(lab, move.uid) == 1
            reasons = {item["reason"] for item in (await events(lab))}
            assert reasons <= {"MigrationProxyListening", "MigrationProxyRelayed"}


async def test_guest_migrates_while_the_api_server_is_gone() -> None:
    async with KubeLab.run(tls=False) as lab:
        here, there = lab.nodes
        async with Guest.boot(lab, here) as guest:
            # Gone when the migration is asked for, and back a while later.
            await lab.door.close()
            async with background(reopened(lab)):
                move = await guest.migrate(here, there)
            await assert_heartbeat_goes_on(guest, *await guest.handover(here, there))
            await assert_counts_agree(move, here, there, memory_connections=1, disk=False)

            # Gone once it is prepared: while it runs, when it ends, and a while after.
            async with background(gone_from_prepared_to_after_the_end(lab, there)):
                move = await guest.migrate(there, here)
            await assert_heartbeat_goes_on(guest, *await guest.handover(there, here))
            await assert_counts_agree(move, there, here, memory_connections=1, disk=False)
            await assert_runs_only_on(here, lab)
            for node in lab.nodes:
                await until(lambda node=node: not node.sockets(), f"the end of {node.name}'s sockets")  # type: ignore[misc]


async def reopened(lab: KubeLab) -> None:
    await until(lambda: "migrationState" in lab.vmi.read()["status"], "the migration")
    await asyncio.sleep(1)  # for longer than a retry takes
    assert not any(node.sockets() for node in lab.nodes)
    await lab.door.open()
    await asyncio.Event().wait()


async def gone_from_prepared_to_after_the_end(lab: KubeLab, source: Node) -> None:
    await until(lambda: len(source.sockets()) == 2, "the source's sockets", 60)
    await lab.door.close()
    await until(lambda: "endTimestamp" in lab.vmi.read()["status"]["migrationState"], "the migration's end", 120)
    await asyncio.sleep(1)
    assert len(source.sockets()) == 2, "nobody told the daemon that it has ended"
    await lab.door.open()
    await asyncio.Event().wait()


def published(lab: KubeLab, migration: str) -> int:
    """How often the address and ports of a migration have been published."""
    return sum(
        one.method == "PATCH" and one.status == 200 and f"'{migration}'" in str(one.body) for one in lab.door.passed
    )


async def events(lab: KubeLab) -> list[dict[str, Any]]:
    """The Events that have been written about the VMI, both daemons' by now."""
    async with asyncio.timeout(30):
        while True:
            found = await lab.kubernetes.request("GET", "/api/v1/namespaces/default/events")
            if {item["source"]["host"] for item in found["items"]} == {node.name for node in lab.nodes}:
                return list(found["items"])
            await asyncio.sleep(0.1)
