"""Two nodes with a daemon, a relay and a virt-handler each, as processes but for the virt-handlers, and a VMI."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from demo.lab import until
from migproxy import control
from migproxy.announcement import TARGET_ANNOTATION
from migproxy.portmap import Channel, source_socket_name
from tests import certificates
from tests.kube.cluster import KUBEVIRTS, MERGE_PATCH, NODES, VMIS, Cluster, begin, kubevirt, vmi
from tests.net.nodes import LIBVIRT_SOCKET, Daemon, receive, send
from tests.virt_handler import VirtHandler, contexts, shortened

ADDRESSES = ("127.77.0.1", "127.77.0.2")
MESSAGE = os.urandom(64)


class Nodes:
    """A VMI that migrates from node01 to node02, with a virt-handler, a daemon and a relay on each.

    Attributes:
        seen: Connections that the target's launcher has been given.
        arrived: When the first byte of the latest one was there (`time.monotonic`).
    """

    def __init__(self, kubernetes: Cluster, folder: Path, uid: str, tls: Path | None) -> None:
        self.kubernetes, self.uid = kubernetes, uid
        self.seen: list[socket.socket] = []
        self.arrived = 0.0
        self.daemons, self.theirs = [], []
        owner = os.getuid(), os.getgid()
        for name, address in zip(NODES, ADDRESSES, strict=True):
            run_dir = folder / f"on-{name}"
            (run_dir / "kubevirt/migrationproxy").mkdir(parents=True)
            options = ["--kubeconfig", str(kubernetes.kubeconfig(folder, name)), "--migration-address", address]
            options += ["--launcher-run-dir", str(run_dir), "--libvirt-socket", LIBVIRT_SOCKET]
            options += ["--socket-owner", f"{owner[0]}:{owner[1]}"]
            daemon = Daemon(name, address, folder / name, *options)
            if tls:
                daemon.protect("--tls-dir", str(tls), "--ktls", "off")
            self.daemons.append(daemon)
            self.theirs.append(VirtHandler(address, run_dir, LIBVIRT_SOCKET, contexts(tls) if tls else None, owner))
        self.folder = folder / f"on-{NODES[0]}/kubevirt/migrationproxy"
        libvirt = folder / f"on-{NODES[1]}" / LIBVIRT_SOCKET
        libvirt.parent.mkdir(exist_ok=True)
        self._launcher = socket.socket(socket.AF_UNIX)
        with shortened(libvirt) as path:
            self._launcher.bind(path)
        self._launcher.listen()
        self._launcher.setblocking(False)
        self._tasks = [asyncio.create_task(self._answer())]

    async def _answer(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            far, _ = await loop.sock_accept(self._launcher)
            self.seen.append(far)
            self._tasks.append(asyncio.create_task(self._echo(far)))

    async def _echo(self, far: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with far, suppress(ConnectionError):
            while data := await loop.sock_recv(far, 1 << 16):
                self.arrived = time.monotonic()
                await loop.sock_sendall(far, data)

    async def change(self, body: object) -> None:
        await self.kubernetes.request("PATCH", f"{VMIS}/one", body, MERGE_PATCH)

    async def prepare(self, migration: str, *, by_ours: bool = True, announced: bool = True) -> None:
        """Begins a migration.

        Args:
            by_ours: The source's migproxy is to be in the path.
            announced: The target's is to be announced.
        """
        for theirs in self.theirs:
            theirs.stop_source(self.uid)
            theirs.stop_target(self.uid)
        await self.change({"status": {"migrationState": None}, "metadata": {"annotations": {TARGET_ANNOTATION: None}}})
        await self.change(begin(migration))
        async with asyncio.timeout(60):
            while by_ours and announced and f" {migration} " not in (await self.announced() or ""):
                await asyncio.sleep(0.01)
        ports = self.theirs[1].start_target(self.uid)
        published = {"targetNodeAddress": ADDRESSES[1], "targetDirectMigrationNodePorts": ports}
        await self.change({"status": {"migrationState": published}})
        self.theirs[0].start_source(self.uid, ADDRESSES[1], ports)
        if by_ours:
            path = "migproxy" if announced else "virt-handler"
            await until(lambda: self.is_in_path(migration, path), "the source in the path", 60)

    async def announced(self) -> str | None:
        found = (await self.kubernetes.request("GET", f"{VMIS}/one"))["metadata"].get("annotations") or {}
        text: str | None = found.get(TARGET_ANNOTATION)
        return text

    def is_in_path(self, migration: str, path: str) -> bool:
        """Whether the source's socket stands over virt-handler's, and leads where it should."""
        kept = self.folder / f".virt-handler-{source_socket_name(self.uid, Channel.LIBVIRT)}"
        with suppress(control.ControlError):
            found = self.daemons[0].status()["migrations"]
            paths = [one.get("path") for one in found if one["migration_uid"] == migration and one["state"] != "ended"]
            return kept.exists() and paths == [path]
        return False

    async def live(self) -> str:
        """One connection's life: a message goes there and comes back; returns "served", or "ended" where none does."""
        before = len(self.seen)
        with socket.socket(socket.AF_UNIX) as near:
            near.setblocking(False)
            with shortened(self.folder / source_socket_name(self.uid, Channel.LIBVIRT)) as path:
                near.connect(path)
            answer = b""
            with suppress(ConnectionError):
                await send(near, MESSAGE)
                answer = await receive(near, len(MESSAGE), seconds=60)
            assert answer in (b"", MESSAGE)
        assert len(self.seen) - before <= 1, "the launcher has seen it twice"
        return "served" if answer else "ended"

    async def close(self) -> None:
        for daemon in self.daemons:
            await daemon.stop(signal.SIGKILL)
            await daemon.relay.stop(signal.SIGKILL)
        for theirs in self.theirs:
            await theirs.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._launcher.close()


@asynccontextmanager
async def nodes(kubernetes: Cluster, folder: Path, *, tls: bool) -> AsyncIterator[Nodes]:
    uid = (await kubernetes.request("POST", VMIS, vmi("one")))["metadata"]["uid"]
    settings = {} if tls else {"migrations": {"disableTLS": True}}
    await kubernetes.request("POST", KUBEVIRTS, kubevirt(settings))
    pki = certificates.Cluster.make(folder / "pki").folder if tls else None
    made = Nodes(kubernetes, folder, uid, pki)
    try:
        yield made
    except BaseException:
        for daemon in made.daemons:
            print(daemon.name, *daemon.log.read_text().splitlines()[-30:], sep="\n")
        raise
    finally:
        await made.close()
