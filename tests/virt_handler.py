"""A stand-in for KubeVirt's virt-handler: what its migration proxy does, on one node, as far as another proxy can tell.

Target: wildcard listeners in its own network namespace; where they are is published once, and again before the start
whenever the status has another address than its own. Source: each channel's path is removed, listened at and given to
QEMU's user, and only then may the launcher be asked to migrate; where the target's address or ports change before the
start, the listeners go with all their connections, and are made anew. It polls; the first end of stream in either
direction closes both; what stands at its paths at the end is removed, whoever made it.

As a program it does this by itself, until SIGTERM, and keeps a JSON file that says what it has done.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import signal
import socket
import ssl
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from migproxy.pki import CLIENT_NAMES, SERVER_NAMES
from migproxy.portmap import Channel, channels_for, source_socket_name, target_socket_path

JSON_PATCH = "application/json-patch+json"
VMIS = "/apis/kubevirt.io/v1/virtualmachineinstances"
STATE = "/status/migrationState"

Object = dict[str, Any]


@dataclass
class Listeners:
    """The listening sockets of one migration, and the connections that came in by them.

    Attributes:
        servers: By channel.
        leads_to: The address and ports that a source's lead to.
    """

    servers: dict[Channel, socket.socket] = field(default_factory=dict)
    leads_to: tuple[str, dict[str, int]] | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


def publication(vmi: Object, address: str, ports: dict[str, int]) -> list[Object]:
    """The patch with which a target publishes where it listens."""
    values: Object = {"targetNodeAddress": address, "targetDirectMigrationNodePorts": ports}
    patch = [{"op": "add", "path": f"{STATE}/{name}", "value": value} for name, value in values.items()]
    if "targetState" in vmi["status"]["migrationState"]:
        side = {"nodeAddress": address, "directMigrationNodePorts": ports}
        patch += [{"op": "add", "path": f"{STATE}/targetState/{name}", "value": value} for name, value in side.items()]
    return patch


@contextmanager
def shortened(path: Path) -> Iterator[str]:
    """The path of a unix socket, which may be longer than such an address can be."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class VirtHandler:
    """One node's.

    Attributes:
        relayed: Connections that it has relayed as a source and as a target.
        sources: What it listens with, by the VMI's UID.
        targets: What it listens with, by the migration's UID.

    Args:
        address: That it publishes: its own, which it has looked up once.
        run_dir: The launcher's /var/run.
        libvirt_socket: Below it.
        tls: Of the target's role and of the source's; None for plaintext.
        owner: Whom it gives its sockets to.
    """

    def __init__(
        self,
        address: str,
        run_dir: Path,
        libvirt_socket: str,
        tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
        owner: tuple[int, int] = (0, 0),
    ) -> None:
        self.address = address
        self._run_dir, self._libvirt_socket = run_dir, libvirt_socket
        self._server_tls = tls[0] if tls else None
        self._client_tls = tls[1] if tls else None
        self._owner = owner
        self.relayed: Counter[str] = Counter()
        self.sources: dict[str, Listeners] = {}
        self.targets: dict[str, Listeners] = {}

    # The target's steps

    def listen_for(self, migration: str, key: str, *, block: bool = False) -> dict[str, int]:
        """Listens at the wildcard address, and returns what is to be published of it."""
        listeners = self.targets.setdefault(migration, Listeners())
        for channel in channels_for(block):
            if channel not in listeners.servers:
                server = listeners.servers[channel] = socket.create_server(("0.0.0.0", 0))
                path = self._run_dir / target_socket_path(key, channel, self._libvirt_socket)
                self._serve(listeners, server, str(path), None)
        return {str(server.getsockname()[1]): int(channel) for channel, server in listeners.servers.items()}

    def must_publish(self, vmi: Object) -> bool:
        """Whether the status has another address than its own, or none."""
        state = vmi["status"]["migrationState"]
        return state.get("targetNodeAddress") != self.address and "startTimestamp" not in state

    # The source's steps

    def remove(self, key: str, channel: Channel) -> None:
        """Removes what stands at a path."""
        self.path(key, channel).unlink(missing_ok=True)

    def bind(self, key: str, channel: Channel, target: tuple[str, dict[str, int]]) -> None:
        """Listens at a path, which leads to the target from then on."""
        listeners = self.sources.setdefault(key, Listeners())
        listeners.leads_to = target
        server = socket.socket(socket.AF_UNIX)
        try:
            with shortened(self.path(key, channel)) as path:
                server.bind(path)
        except OSError:
            server.close()
            raise
        server.listen()
        listeners.servers[channel] = server
        address, ports = target
        port = next(int(port) for port, number in ports.items() if number == channel)
        self._serve(listeners, server, None, (address, port))

    def give(self, key: str, channel: Channel) -> None:
        """Gives what stands at the path by now to QEMU's user."""
        os.chown(self.path(key, channel), *self._owner, follow_symlinks=False)

    def path(self, key: str, channel: Channel) -> Path:
        """Of a channel's socket on the source."""
        return self._run_dir / "kubevirt/migrationproxy" / source_socket_name(key, channel)

    async def end_source(self, key: str) -> None:
        """Closes the listeners and all their connections; what stands at the paths is removed, as Go does."""
        if listeners := self.sources.pop(key, None):
            await _end(listeners)
            for channel in listeners.servers:
                self.remove(key, channel)

    async def end_target(self, migration: str) -> None:
        """Closes the listeners and all their connections."""
        if listeners := self.targets.pop(migration, None):
            await _end(listeners)

    async def close(self) -> None:
        """Ends, in order."""
        for key in list(self.sources):
            await self.end_source(key)
        for migration in list(self.targets):
            await self.end_target(migration)

    # By itself

    async def follow(self, vmi: Object, node: str) -> list[Object]:
        """Does what is due for a VMI; returns the patch to publish, if any."""
        state = vmi["status"].get("migrationState") or {}
        uid, migration = vmi["metadata"]["uid"], state.get("migrationUid")
        block = vmi["status"].get("migrationMethod") == "BlockMigration"
        is_done = "endTimestamp" in state and bool(state.get("completed") or state.get("failed"))
        for known in [known for known in self.targets if known != migration or is_done]:
            await self.end_target(known)
        if is_done or not migration:
            await self.end_source(uid)
            return []
        if state.get("sourceNode") == node and vmi["status"].get("nodeName") == node:
            await self._follow_target(uid, state)
        labels = vmi["metadata"].get("labels", {})
        if labels.get("kubevirt.io/migrationTargetNodeName") != node or "startTimestamp" in state:
            return []
        ports = self.listen_for(migration, uid, block=block)
        return publication(vmi, self.address, ports) if self.must_publish(vmi) else []

    async def _follow_target(self, uid: str, state: Object) -> None:
        address, ports = state.get("targetNodeAddress"), state.get("targetDirectMigrationNodePorts")
        if not address or not ports or "startTimestamp" in state:
            return
        known = self.sources.get(uid)
        if known and known.leads_to == (address, ports):
            return
        await self.end_source(uid)
        for number in ports.values():
            channel = Channel(number)
            self.remove(uid, channel)
            self.bind(uid, channel, (address, ports))
            self.give(uid, channel)

    def report(self) -> Object:
        """What it listens for, and how many connections it has relayed."""
        return {"sources": list(self.sources), "targets": list(self.targets), "relayed": dict(self.relayed)}

    # Relaying

    def _serve(self, listeners: Listeners, server: socket.socket, path: str | None, peer: Any) -> None:
        server.setblocking(False)
        with suppress(RuntimeError):  # steps that are driven without a loop relay nothing
            loop = asyncio.get_running_loop()
            listeners.tasks.add(loop.create_task(self._accept(listeners, server, path, peer)))

    async def _accept(self, listeners: Listeners, server: socket.socket, path: str | None, peer: Any) -> None:
        loop = asyncio.get_running_loop()
        while True:
            accepted, _ = await loop.sock_accept(server)
            self.relayed["source" if peer else "target"] += 1
            task = loop.create_task(self._relay(accepted, path, peer))
            listeners.tasks.add(task)
            task.add_done_callback(listeners.tasks.discard)

    async def _relay(self, accepted: socket.socket, path: str | None, peer: Any) -> None:
        writers: list[asyncio.StreamWriter] = []
        try:
            near = await _open_accepted(accepted, self._server_tls if path is not None else None)
            writers.append(near[1])
            if path is not None and self._server_tls:
                _check_name(near[1], CLIENT_NAMES)
            if path is not None:
                far = await asyncio.open_unix_connection(path, limit=1 << 20)
            else:
                name = "" if self._client_tls else None
                far = await asyncio.open_connection(*peer, ssl=self._client_tls, server_hostname=name, limit=1 << 20)
            writers.append(far[1])
            if path is None and self._client_tls:
                _check_name(far[1], SERVER_NAMES)
            pumps = [asyncio.create_task(_pump(near[0], far[1])), asyncio.create_task(_pump(far[0], near[1]))]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError as error:
            print(f"connection failed: {error}", flush=True)
        finally:
            for writer in writers:
                writer.close()


async def _open_accepted(
    accepted: socket.socket, tls: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=1 << 20)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, accepted, ssl=tls)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def _check_name(writer: asyncio.StreamWriter, names: Collection[str]) -> None:
    """KubeVirt's certificates have no names but the common one: whose it is."""
    subject = writer.get_extra_info("peercert")["subject"]
    found = [value for part in subject for kind, value in part if kind == "commonName"]
    if not set(found) & set(names):
        raise ConnectionAbortedError(f"the peer is {found}, none of {names}")


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 20):
            writer.write(data)
            await writer.drain()


async def _end(listeners: Listeners) -> None:
    for server in listeners.servers.values():
        server.close()
    for task in list(listeners.tasks):
        task.cancel()
    await asyncio.gather(*listeners.tasks, return_exceptions=True)


def contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The target's and the source's side of KubeVirt's mTLS, of a folder as `migproxy certs` makes it."""
    made = []
    for role, protocol in (("server", ssl.PROTOCOL_TLS_SERVER), ("client", ssl.PROTOCOL_TLS_CLIENT)):
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(folder / "ca.crt")
        context.load_cert_chain(folder / role / "tls.crt", folder / role / "tls.key")
        made.append(context)
    return made[0], made[1]


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--name", "--node", "--address", "--api", "--token", "--libvirt-socket"):
        parser.add_argument(option, required=True)
    for option in ("--run-dir", "--report"):
        parser.add_argument(option, required=True, type=Path)
    parser.add_argument("--tls-dir", type=Path)
    parser.add_argument("--hold", type=Path, help="publishes nothing while this file is there: its launcher prepares")
    parser.add_argument("--period", type=float, default=1.0)
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(15, options.name.encode(), 0, 0, 0)  # PR_SET_NAME: how migproxy finds it
    tls = contexts(options.tls_dir) if options.tls_dir else None
    handler = VirtHandler(options.address, options.run_dir, options.libvirt_socket, tls)
    done = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, done.set)
    headers = {"Authorization": f"Bearer {options.token}"}
    connector = aiohttp.TCPConnector(ssl=False)
    async with aiohttp.ClientSession(options.api, headers=headers, connector=connector) as session:
        while not done.is_set():
            try:
                await _look(session, handler, options.node, options.hold)
            except aiohttp.ClientError as error:
                print(f"API server: {error}", flush=True)
            new = options.report.with_suffix(".new")
            new.write_text(json.dumps(handler.report()))
            new.replace(options.report)
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), options.period)
    await handler.close()


async def _look(session: aiohttp.ClientSession, handler: VirtHandler, node: str, hold: Path | None) -> None:
    async with session.get(VMIS) as answer:
        answer.raise_for_status()
        items = (await answer.json())["items"]
    for vmi in items:
        if (patch := await handler.follow(vmi, node)) and not (hold and hold.exists()):
            name = f"/apis/kubevirt.io/v1/namespaces/{vmi['metadata']['namespace']}/virtualmachineinstances"
            url = f"{name}/{vmi['metadata']['name']}"
            headers = {"Content-Type": JSON_PATCH}
            async with session.patch(url, data=json.dumps(patch), headers=headers) as answer:
                answer.raise_for_status()


if __name__ == "__main__":
    asyncio.run(_main())
