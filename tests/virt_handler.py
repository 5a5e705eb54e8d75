"""A stand-in for KubeVirt's virt-handler: what its migration proxy does, on one node, as far as another proxy can tell.

Target: wildcard listeners, made once. Where they are is published with the whole VMI, again before the start whenever
the status has another address than its own; a conflict is left to the next look. Source: each channel's path is
removed, listened at and given to QEMU's user, and only then may the launcher be asked to migrate. Where the pairs of
address and port change before the start, the listeners go with all their connections, and are made anew. What stands
at its paths at the end is removed, whoever made it.

Of a connection, it closes the leg that it accepted as soon as either direction ends. The leg that it dialled stays open
until its own reading ends, and is then closed by Go's garbage collector, some time later and without a close_notify.
Of TLS, a target begins the handshake only once it has dialled its launcher.

Not as KubeVirt has it: a source that has migrated away keeps its listeners for some seconds there; TLS 1.3 is spoken
with OpenSSL's choice of cipher suite; a refused name is told with another alert where the peer's handshake is over.
Not here at all: decentralized migrations.

As a program it does this by itself, until SIGTERM, and keeps a JSON file that says what it has done.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import signal
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from migproxy.pki import CLIENT_NAMES, OLDER_CLIENT_NAME, SERVER_NAMES
from migproxy.portmap import channels_for, target_socket_path

VMIS = "/apis/kubevirt.io/v1/virtualmachineinstances"

CHUNK = 1 << 20
_CLOSE_SECONDS = 5.0  # for which Go tries to send a close_notify
_BAD_CERTIFICATE = bytes([21, 3, 3, 0, 2, 2, 42])  # the alert, not encrypted
_DAMAGED = bytes([23, 3, 3, 0, 32]) + bytes(32)  # a record that cannot be decrypted

Object = dict[str, Any]
Ports = dict[str, int]
"""A port map: by port, the number of a channel."""
T = TypeVar("T")


def published(vmi: Object, address: str, ports: Ports) -> Object:
    """The VMI with which a target publishes where it listens."""
    after = copy.deepcopy(vmi)
    state = after["status"]["migrationState"]
    state |= {"targetNodeAddress": address, "targetDirectMigrationNodePorts": ports}
    if "targetState" in state:
        state["targetState"] |= {"nodeAddress": address, "directMigrationNodePorts": ports}
    return after


@contextmanager
def shortened(path: Path) -> Iterator[str]:
    """The path of a unix socket, which may be longer than such an address can be."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class Leg:
    """One of the two sockets of a connection.

    As in Go, whatever waits for it fails when it is closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._is_closed = False
        self._waiting: set[asyncio.Task[Any]] = set()

    async def read(self) -> bytes:
        """What has arrived; nothing at the end of the stream."""
        return await self._wait(asyncio.get_running_loop().sock_recv(self._sock, CHUNK))

    async def write(self, data: bytes) -> None:
        """Sends all of it."""
        await self._wait(asyncio.get_running_loop().sock_sendall(self._sock, data))

    async def close(self) -> None:
        """Closes it properly."""
        await self.drop()

    async def drop(self) -> None:
        """Closes the socket and says nothing, as Go's garbage collector does, and the end of the process."""
        self._is_closed = True
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)
        self._sock.close()

    async def _wait(self, operation: Coroutine[Any, Any, T]) -> T:
        if self._is_closed:
            operation.close()
            raise ConnectionAbortedError("the connection is closed")
        task = asyncio.create_task(operation)
        self._waiting.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self._is_closed:
                raise ConnectionAbortedError("the connection is closed") from None
            raise
        finally:
            self._waiting.discard(task)


class SecureLeg(Leg):
    """A leg with KubeVirt's mTLS. As in Go, its handshake is made by whoever first reads or writes.

    Args:
        sock: Its socket.
        context: What it speaks.
        names: Common names, one of which the peer must have.
        server: Whether this end accepted the connection.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, names: Collection[str], *, server: bool) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._names = names
        self._shaking, self._sending = asyncio.Lock(), asyncio.Lock()
        self._is_established = False
        self._failure: OSError | None = None

    async def handshake(self) -> None:
        """Makes the handshake, unless that has been done.

        Raises:
            OSError: The peer is refused, or refuses.
        """
        async with self._shaking:
            if self._failure:
                raise self._failure
            if not self._is_established:
                try:
                    await self._take(self._shake)
                except OSError as error:
                    self._failure = error
                    raise
                self._is_established = True

    async def read(self) -> bytes:
        await self.handshake()
        return await self._take(self._open)

    async def write(self, data: bytes) -> None:
        await self.handshake()
        await self._take(lambda: self._tls.write(data))

    async def close(self) -> None:
        """Sends a close_notify first, unless something is just being sent."""
        if self._is_established and not self._sending.locked():
            with suppress(OSError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    with suppress(ssl.SSLError):
                        self._tls.unwrap()
                    await self._flush()
        await super().close()

    async def _take(self, step: Callable[[], T]) -> T:
        """Takes a step of OpenSSL's: sends what it wants to send, and receives what it waits for."""
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                pass
            finally:
                await self._flush()
            arrived = await super().read()
            if arrived:
                self._incoming.write(arrived)
            else:
                self._incoming.write_eof()

    async def _flush(self) -> None:
        async with self._sending:
            if data := self._outgoing.read():
                await super().write(data)

    def _open(self) -> bytes:
        """What can be decrypted by now; nothing after a close_notify."""
        opened = bytearray()
        try:
            while len(opened) < CHUNK and (record := self._tls.read(CHUNK)):
                opened += record
        except ssl.SSLError:
            if not opened:
                raise
        return bytes(opened)

    def _shake(self) -> None:
        self._tls.do_handshake()
        # KubeVirt's certificates have no names but the common one: whose it is.
        certificate: Any = self._tls.getpeercert()
        found = [value for part in certificate["subject"] for kind, value in part if kind == "commonName"]
        if not set(found) & set(self._names):
            self._refuse()
            raise ConnectionAbortedError(f"the peer is {found}, none of {self._names}")

    def _refuse(self) -> None:
        """Tells the peer by an alert: OpenSSL sends none once it has finished the handshake."""
        if self._tls.server_side is (self._tls.version() == "TLSv1.3"):
            # The peer has finished it too, and expects an encrypted one: OpenSSL makes one of a damaged record.
            self._incoming.read()
            self._incoming.write(_DAMAGED)
            with suppress(ssl.SSLError):
                self._tls.read(1)
        else:  # in place of the last flight
            self._outgoing.read()
            self._outgoing.write(_BAD_CERTIFICATE)


@dataclass
class Listeners:
    """The listening sockets for one VMI in one role.

    Attributes:
        servers: By the number of the channel.
        leads_to: The address and ports that a source's lead to.
        stopped: Set at their end.
    """

    servers: dict[int, socket.socket] = field(default_factory=dict)
    leads_to: tuple[str, Ports] | None = None
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    def pairs(self) -> set[tuple[str, str]]:
        """The pairs of address and port that a source's lead to."""
        address, ports = self.leads_to or ("", {})
        return {(address, port) for port in ports}

    def ports(self) -> Ports:
        """The port map of a target's."""
        return {str(server.getsockname()[1]): channel for channel, server in self.servers.items()}


class VirtHandler:
    """One node's.

    Attributes:
        relayed: Connections that it has relayed as a source and as a target.
        sources: What it listens with as a source, by the VMI's UID.
        targets: What it listens with as a target, by the VMI's UID.

    Args:
        address: That it publishes: its own, which it has looked up once.
        run_dir: The launcher's /var/run.
        libvirt_socket: Below it.
        tls: Of the target's role and of the source's; None for plaintext.
        owner: Whom it gives its sockets to.
        client_names: Common names that it accepts as a target.
        collected_after: Seconds for which a leg that nobody uses any more stays open. Go's garbage collector takes less
            than one second where there is much to do, and two minutes where there is nothing.
    """

    def __init__(
        self,
        address: str,
        run_dir: Path,
        libvirt_socket: str,
        tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
        owner: tuple[int, int] = (0, 0),
        client_names: Collection[str] = CLIENT_NAMES,
        collected_after: float = 0.2,
    ) -> None:
        self.address = address
        self._run_dir, self._libvirt_socket = run_dir, libvirt_socket
        self._server_tls = tls[0] if tls else None
        self._client_tls = tls[1] if tls else None
        self._owner, self._client_names = owner, client_names
        self._collected_after = collected_after
        self.relayed: Counter[str] = Counter()
        self.sources: dict[str, Listeners] = {}
        self.targets: dict[str, Listeners] = {}
        self._connections: set[asyncio.Task[None]] = set()

    # The target

    def start_target(self, key: str, *, block: bool = False) -> Ports:
        """Listens at the wildcard address, unless it does already; returns what is to be published of it."""
        if key not in self.targets:
            listeners = self.targets[key] = Listeners()
            for channel in channels_for(block):
                server = listeners.servers[channel] = socket.create_server(("", 0))
                path = self._run_dir / target_socket_path(key, channel, self._libvirt_socket)
                self._serve("target", listeners, server, partial(_dial_unix, path))
        return self.targets[key].ports()

    def stop_target(self, key: str) -> None:
        """Closes the listeners and cuts their connections."""
        if listeners := self.targets.pop(key, None):
            _stop(listeners)

    # The source

    def start_source(self, key: str, address: str, ports: Ports) -> None:
        """Listens for each channel in the port map, known or not; made anew where other ports are listed."""
        if known := self.sources.get(key):
            if known.pairs() == {(address, port) for port in ports}:
                return
            self.stop_source(key)
        self.sources[key] = Listeners(leads_to=(address, ports))
        for channel in ports.values():
            self.remove(key, channel)
            self.bind(key, channel, (address, ports))
            self.give(key, channel)

    def remove(self, key: str, channel: int) -> None:
        """Removes what stands at a path."""
        self.path(key, channel).unlink(missing_ok=True)

    def bind(self, key: str, channel: int, target: tuple[str, Ports]) -> None:
        """Listens at a path, which leads to the target from then on."""
        listeners = self.sources.setdefault(key, Listeners())
        listeners.leads_to = address, ports = target
        server = socket.socket(socket.AF_UNIX)
        try:
            with shortened(self.path(key, channel)) as path:
                server.bind(path)
        except OSError:
            server.close()
            raise
        server.listen()
        listeners.servers[channel] = server
        port = next(int(port) for port, number in ports.items() if number == channel)
        self._serve("source", listeners, server, partial(self._dial_tcp, address, port))

    def give(self, key: str, channel: int) -> None:
        """Gives what stands at the path by now to QEMU's user."""
        os.chown(self.path(key, channel), *self._owner, follow_symlinks=False)

    def path(self, key: str, channel: int) -> Path:
        """Of a channel's socket on the source."""
        name = f"{key}-{int(channel)}" if channel else key
        return self._run_dir / "kubevirt/migrationproxy" / f"{name}-source.sock"

    def stop_source(self, key: str) -> None:
        """Closes the listeners and cuts their connections; what stands at the paths is removed, whoever made it."""
        if listeners := self.sources.pop(key, None):
            _stop(listeners)
            for channel in listeners.servers:
                self.remove(key, channel)

    def die(self) -> None:
        """Ends as one that is killed: what stands at its paths leads to nobody."""
        for listeners in (*self.sources.values(), *self.targets.values()):
            _stop(listeners)
        self.sources.clear()
        self.targets.clear()

    async def close(self) -> None:
        """Ends: the kernel closes everything."""
        for key in list(self.sources):
            self.stop_source(key)
        for key in list(self.targets):
            self.stop_target(key)
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    # By itself

    def follow(self, vmi: Object, node: str, *, is_prepared: bool = True) -> Object | None:
        """Does what is due for a VMI.

        Args:
            vmi: As the API server has it.
            node: Its node's name.
            is_prepared: Whether a target's launcher is.

        Returns:
            What is to be written, None for nothing.
        """
        uid, status = vmi["metadata"]["uid"], vmi["status"]
        state = status.get("migrationState")
        if _is_over(vmi):
            self.stop_source(uid)
            self.stop_target(uid)
        if _is_over(vmi) or not state or "startTimestamp" in state:
            return None
        ports = state.get("targetDirectMigrationNodePorts")
        if state.get("sourceNode") == node == status.get("nodeName") and ports is not None:
            self.start_source(uid, state["targetNodeAddress"], ports)
        if vmi["metadata"].get("labels", {}).get("kubevirt.io/migrationTargetNodeName") != node or not is_prepared:
            return None
        block = status.get("migrationMethod") == "BlockMigration" or bool(status.get("migratedVolumes"))
        ports = self.start_target(uid, block=block)
        return published(vmi, self.address, ports) if state.get("targetNodeAddress") != self.address else None

    def forget(self, uids: Collection[str]) -> None:
        """Ends what it does for VMIs that do not exist any more.

        Args:
            uids: Of those that do.
        """
        for uid in {*self.sources, *self.targets} - {*uids}:
            self.stop_source(uid)
            self.stop_target(uid)

    def report(self) -> Object:
        """What it listens for, and how many connections it has relayed."""
        return {"sources": list(self.sources), "targets": list(self.targets), "relayed": dict(self.relayed)}

    # Relaying

    def _serve(
        self, role: str, listeners: Listeners, server: socket.socket, dial: Callable[[], Awaitable[Leg]]
    ) -> None:
        server.setblocking(False)
        with suppress(RuntimeError):  # steps that are driven without a loop relay nothing
            asyncio.get_running_loop().add_reader(server, self._accept, role, listeners, server, dial)

    def _accept(
        self, role: str, listeners: Listeners, server: socket.socket, dial: Callable[[], Awaitable[Leg]]
    ) -> None:
        with suppress(BlockingIOError):
            sock, _ = server.accept()
            self.relayed[role] += 1
            connection = asyncio.create_task(self._relay(self._accepted(role, sock), dial, listeners.stopped))
            self._connections.add(connection)
            connection.add_done_callback(self._connections.discard)

    def _accepted(self, role: str, sock: socket.socket) -> Leg:
        if role == "source" or not self._server_tls:
            return Leg(sock)
        return SecureLeg(sock, self._server_tls, self._client_names, server=True)

    async def _dial_tcp(self, address: str, port: int) -> Leg:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
            if not self._client_tls:
                return Leg(sock)
            leg = SecureLeg(sock, self._client_tls, SERVER_NAMES, server=False)
            await leg.handshake()
        except BaseException:
            sock.close()
            raise
        return leg

    async def _relay(self, accepted: Leg, dial: Callable[[], Awaitable[Leg]], stopped: asyncio.Event) -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(accepted.drop)
            try:
                dialled = await dial()
            except OSError as error:
                print(f"cannot dial: {error}", flush=True)
                return
            stack.push_async_callback(dialled.drop)
            pumps = [asyncio.create_task(_copy(dialled, accepted)), asyncio.create_task(_copy(accepted, dialled))]
            stop = asyncio.create_task(stopped.wait())
            try:
                await asyncio.wait([*pumps, stop], return_when=asyncio.FIRST_COMPLETED)
                await accepted.close()
                await asyncio.wait(pumps)
                await asyncio.sleep(self._collected_after)
            finally:
                for task in (*pumps, stop):
                    task.cancel()
                await asyncio.gather(*pumps, stop, return_exceptions=True)


async def _dial_unix(path: Path) -> Leg:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        with shortened(path) as short:
            await asyncio.get_running_loop().sock_connect(sock, short)
    except BaseException:
        sock.close()
        raise
    return Leg(sock)


async def _copy(source: Leg, sink: Leg) -> None:
    try:
        while data := await source.read():
            await sink.write(data)
    except OSError as error:
        print(f"a direction ended: {error}", flush=True)


def _stop(listeners: Listeners) -> None:
    listeners.stopped.set()
    for server in listeners.servers.values():
        asyncio.get_running_loop().remove_reader(server)
        server.close()


def _is_over(vmi: Object) -> bool:
    state = vmi["status"].get("migrationState") or {}
    return (
        ("endTimestamp" in state and bool(state.get("completed") or state.get("failed")))
        or "deletionTimestamp" in vmi["metadata"]
        or vmi["status"].get("phase") in ("Succeeded", "Failed")
    )


def contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The target's and the source's side of KubeVirt's mTLS, of a folder as `migproxy certs` makes it."""
    made = []
    for role, protocol in (("server", ssl.PROTOCOL_TLS_SERVER), ("client", ssl.PROTOCOL_TLS_CLIENT)):
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags = ssl.VERIFY_X509_PARTIAL_CHAIN  # everything in the bundle is an anchor of trust
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # which Python 3.11.2 sets
        context.load_verify_locations(folder / "ca.crt")
        context.load_cert_chain(folder / role / "tls.crt", folder / role / "tls.key")
        made.append(context)
    made[0].num_tickets = 1
    return made[0], made[1]


async def look(session: aiohttp.ClientSession, handler: VirtHandler, node: str, hold: Path | None = None) -> None:
    """Looks at all VMIs once, and does what is due; a write that is refused is due again at the next look.

    Args:
        session: To the API server.
        handler: Who looks.
        node: Its node's name.
        hold: While this file is there, targets' launchers prepare: looked at after the VMIs.

    Raises:
        aiohttp.ClientError: They cannot be read.
    """
    async with session.get(VMIS) as answer:
        answer.raise_for_status()
        items = (await answer.json())["items"]
    handler.forget([vmi["metadata"]["uid"] for vmi in items])
    is_prepared = not (hold and hold.exists())
    for vmi in items:
        if (after := handler.follow(vmi, node, is_prepared=is_prepared)) is not None:
            namespace, name = vmi["metadata"]["namespace"], vmi["metadata"]["name"]
            url = f"/apis/kubevirt.io/v1/namespaces/{namespace}/virtualmachineinstances/{name}"
            async with session.put(url, json=after) as answer:
                if not answer.ok:
                    print(f"{name} is not updated: {await answer.text()}", flush=True)


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--node", "--address", "--api", "--token", "--libvirt-socket"):
        parser.add_argument(option, required=True)
    for option in ("--run-dir", "--report"):
        parser.add_argument(option, required=True, type=Path)
    parser.add_argument("--tls-dir", type=Path)
    parser.add_argument("--older-clients", action="store_true", help="accepts the client name of older KubeVirts, too")
    parser.add_argument("--hold", type=Path, help="while this file is there, targets' launchers prepare")
    parser.add_argument("--period", type=float, default=1.0)
    options = parser.parse_args()
    tls = contexts(options.tls_dir) if options.tls_dir else None
    names = (*CLIENT_NAMES, OLDER_CLIENT_NAME) if options.older_clients else CLIENT_NAMES
    handler = VirtHandler(options.address, options.run_dir, options.libvirt_socket, tls, client_names=names)
    done = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, done.set)
    headers = {"Authorization": f"Bearer {options.token}"}
    connector = aiohttp.TCPConnector(ssl=False)
    async with aiohttp.ClientSession(options.api, headers=headers, connector=connector) as session:
        while not done.is_set():
            try:
                await look(session, handler, options.node, options.hold)
            except aiohttp.ClientError as error:
                print(f"API server: {error}", flush=True)
            new = options.report.with_suffix(".new")
            new.write_text(json.dumps(handler.report()))
            new.replace(options.report)
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), options.period)
    await handler.close()


if __name__ == "__main__":
    asyncio.run(_main())
