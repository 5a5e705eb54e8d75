"""Two nodes with a real daemon each, and VMIs whose launchers, libvirt and QEMU the test itself plays."""

import asyncio
import fcntl
import json
import os
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from demo.lab import MIGPROXY, LabError, Relay, end, until
from migproxy import control
from migproxy.portmap import Channel, channels_for, source_socket_name, target_socket_path

LIBVIRT_SOCKET = "libvirt/virtqemud-sock"
MIB = 1 << 20


class Daemon:
    """A node's migproxy daemon, `migproxy run`, and its relay, which is started with it and stays.

    Args:
        name: of its node.
        address: its migration address.
        directory: where its files are, and its launchers' folders, by the VMIs' names.
        options: what it is started with besides the node's name and its own sockets.
    """

    def __init__(self, name: str, address: str, directory: Path, *options: str) -> None:
        self.name, self.address, self.directory = name, address, directory
        self.control, self.log = directory / "control.sock", directory / "log"
        directory.mkdir()
        self.relay = Relay(directory)
        self._has_own_relay = False
        self._options = ["--node-name", name, "--control-socket", str(self.control), *self.relay.options]
        self._options += ["--disable-tls", "--http-listen", "off", *options]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Its process ID."""
        assert self._process, "the daemon runs"
        return self._process.pid

    def protect(self, *options: str) -> None:
        """Has it use mTLS from its next start on, with these options."""
        self._options.remove("--disable-tls")
        self._options += options

    async def start(self, *options: str, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        """Starts it, with more options if need be, and waits until it has read the VMIs.

        Args:
            prefix: a command that runs the daemon's.
            env: environment variables besides this process's.

        Raises:
            LabError: it ended at once.
        """
        await self.spawn(*options, prefix=prefix, env=env)
        process = self._process
        assert process
        try:
            await until(lambda: process.returncode is not None or self._has_read(), f"{self.name} to start")
        except LabError:
            for log in (self.log, self.relay.log):
                print(log, log.read_text() if log.exists() else "is not there")
            raise
        if process.returncode is not None:
            raise LabError(f"{self.name}: exit status {process.returncode}: {self.log.read_text()}")

    def start_relays_itself(self) -> None:
        """Leaves it to the daemon to start its relay, from its next start on."""
        self._has_own_relay = True
        self._options.remove("--relay-externally-managed")

    async def spawn(
        self,
        *options: str,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        start_relay: bool = True,
    ) -> None:
        """Starts it, and waits for nothing."""
        if start_relay and not self.relay.runs and not self._has_own_relay:
            await self.relay.start()
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(*prefix, *MIGPROXY, "run", *self._options, *options),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
            )

    def _has_read(self) -> bool:
        try:
            return "inventory" not in self.status()["problems"]
        except control.ControlError:
            return False

    async def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        """Ends it, which drains at SIGINT, and returns its exit status; 0 where it does not run. Its relay stays."""
        process, self._process = self._process, None
        return await end(process, how) if process else 0

    async def ended(self, seconds: float = 10) -> int:
        """Waits for its end, and returns its exit status."""
        assert self._process, "the daemon runs"
        return await asyncio.wait_for(self._process.wait(), seconds)

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)

    def status(self) -> dict[str, Any]:
        """What it answers to `migproxy status`."""
        return control.ask(str(self.control))

    def logged(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines of its log with this event and these fields, oldest first."""
        text = self.log.read_text()
        lines = (json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines())
        return [line for line in lines if line["event"] == event and fields.items() <= line.items()]

    def descriptors(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        """How many threads it has."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def cpu_seconds(self) -> float:
        """The CPU time that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def listeners(address: str) -> set[int]:
    """The ports of the TCP listeners at an address."""
    out = subprocess.run(["ss", "-Hltn", "src", address], check=True, capture_output=True, text=True).stdout
    return {int(line.split()[3].rpartition(":")[2]) for line in out.splitlines()}


class Migration:
    """A VMI that migrates from one node to the other: its file, its two launchers' folders, its sockets.

    Args:
        nodes: the two nodes.
        name: the VMI's.
        block: three channels instead of two.
    """

    def __init__(self, nodes: "Nodes", name: str, *, block: bool = True) -> None:
        self.name, self.uid, self.migration_uid = name, f"u{uuid.uuid4().hex[:15]}", ""
        self.channels = channels_for(block)
        self.source, self.target = nodes.source, nodes.target
        self.path = nodes.vmi_dir / f"{name}.yaml"
        self._block = block
        self._listeners: dict[Path, socket.socket] = {}
        for node in nodes.both:
            (self.run_dir(node) / "kubevirt/migrationproxy").mkdir(parents=True)
            (self.run_dir(node) / "libvirt").mkdir()
        self.listen()

    def run_dir(self, node: Daemon) -> Path:
        """The launcher's /var/run on a node."""
        return node.directory / self.name

    def folder(self, node: Daemon) -> Path:
        """The launcher's migrationproxy folder on a node."""
        return self.run_dir(node) / "kubevirt/migrationproxy"

    def source_path(self, channel: Channel) -> Path:
        """The source proxy's socket of a channel."""
        return self.folder(self.source) / source_socket_name(self.uid, channel)

    def target_path(self, channel: Channel) -> Path:
        """The target launcher's socket of a channel."""
        return self.run_dir(self.target) / target_socket_path(self.uid, channel, LIBVIRT_SOCKET)

    # The target's libvirt and QEMU

    def listen(self, *channels: Channel, backlog: int = 4096) -> None:
        """Listens on the target launcher's sockets of these channels, or of all."""
        for channel in channels or self.channels:
            listener = self._listeners[self.target_path(channel)] = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.target_path(channel)))
            listener.listen(backlog)
            listener.setblocking(False)

    def close(self, *channels: Channel) -> None:
        """Takes the target launcher's sockets of these channels away, or all."""
        paths = [self.target_path(channel) for channel in channels] or list(self._listeners)
        for path in paths:
            self._listeners.pop(path).close()
            path.unlink(missing_ok=True)

    def listener(self, channel: Channel) -> socket.socket:
        """The target launcher's listener of a channel."""
        return self._listeners[self.target_path(channel)]

    # The API server and virt-controller

    def begin(self, *, to: str | None = None, **state: Any) -> str:
        """Writes a new migration into the VMI's file, and returns its UID.

        Args:
            to: name of the target's node, where it is another than the second one.
            state: fields of status.migrationState besides the usual ones.
        """
        target = to or self.target.name
        self.migration_uid = str(uuid.uuid4())
        names = {"sourceNode": self.source.name, "targetNode": target}
        document = {
            "apiVersion": "kubevirt.io/v1",
            "kind": "VirtualMachineInstance",
            "metadata": {
                "namespace": "default",
                "name": self.name,
                "uid": self.uid,
                "labels": {"kubevirt.io/migrationTargetNodeName": target},
            },
            "status": {
                "phase": "Running",
                "nodeName": self.source.name,
                "migrationMethod": "BlockMigration" if self._block else "LiveMigration",
                "migrationTransport": "Unix",
                "migrationState": {"migrationUid": self.migration_uid, **names, **state},
            },
        }
        with _locked(self.path.parent):
            self._write(document)
        return self.migration_uid

    def read(self) -> dict[str, Any]:
        """status.migrationState as it is in the file now."""
        return dict(yaml.safe_load(self.path.read_text())["status"]["migrationState"])

    @contextmanager
    def edit(self) -> Iterator[dict[str, Any]]:
        """Lets the body change the whole document; holds the lock that the daemons take."""
        with _locked(self.path.parent):
            document = yaml.safe_load(self.path.read_text())
            yield document
            self._write(document)

    def set_state(self, **fields: Any) -> None:
        """Sets fields of status.migrationState."""
        with self.edit() as document:
            document["status"]["migrationState"] |= fields

    def start(self) -> None:
        """Marks the migration as running."""
        self.set_state(startTimestamp=_now())

    def end(self) -> None:
        """Marks the migration as completed."""
        self.set_state(endTimestamp=_now(), completed=True)

    def _write(self, document: dict[str, Any]) -> None:
        new = self.path.with_name(f".{self.path.name}.new")
        new.write_text(yaml.safe_dump(document, sort_keys=False))
        new.replace(self.path)

    # What the daemons do

    def report(self, node: Daemon) -> dict[str, Any]:
        """What the node's daemon reports of this migration; empty where it does not know it."""
        role = "source" if node is self.source else "target"
        for one in node.status()["migrations"]:
            if (one["migration_uid"], one["vmi_uid"], one["role"]) == (self.migration_uid, self.uid, role):
                return dict(one)
        return {}

    def connections(self, node: Daemon) -> int:
        """How many connections of this migration are open at the node's daemon."""
        return sum(one["connections_open"] for one in self.report(node).get("channels", ()))

    def published(self) -> dict[Channel, int]:
        """The ports in the status by channel; empty before they are published."""
        ports = self.read().get("targetDirectMigrationNodePorts", {})
        return {Channel(number): int(port) for port, number in ports.items()}

    def is_served(self) -> bool:
        """Both daemons have the listeners that lead to each other, as published."""
        state, ports = self.read(), self.published()
        address = state.get("targetNodeAddress", "")
        host = f"[{address}]" if ":" in address else address
        want = {channel.label: f"{host}:{ports.get(channel)}" for channel in self.channels}
        source, target = self.report(self.source), self.report(self.target)
        return (
            {one["channel"]: one["peer"] for one in source.get("channels", ())} == want
            and {one["channel"]: one["listening"] for one in target.get("channels", ())} == want
            and source["error"] is target["error"] is None
            and all(self.source_path(channel).is_socket() for channel in self.channels)
        )

    async def served(self, seconds: float = 10) -> None:
        """Waits until both daemons serve the migration, and a byte has crossed each channel both ways."""
        try:
            await until(self.is_served, f"{self.name} to be served", seconds)
        except LabError as error:
            reports = [self.report(node) for node in (self.source, self.target)]
            raise LabError(f"{error}: {self.read()}, {reports}") from None
        for channel in self.channels:
            async with self.connection(channel) as (near, far):
                await assert_carries(near, far)

    def is_gone(self) -> bool:
        """Nothing of the migration is left: no socket file of ours, and both daemons are done with it."""
        names = {source_socket_name(self.uid, channel) for channel in self.channels}
        left = names & set(os.listdir(self.folder(self.source)))
        return not left and all(
            self.report(node).get("state", "ended") == "ended" for node in (self.source, self.target)
        )

    async def gone(self) -> None:
        """Waits until nothing of the migration is left."""
        await until(self.is_gone, f"{self.name} to be gone", 10)

    @asynccontextmanager
    async def connection(self, channel: Channel = Channel.DIRECT) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
        """A connection through both daemons: QEMU's end on the source, and its end on the target."""
        with ExitStack() as stack:
            near = stack.enter_context(connect(self.source_path(channel)))
            far, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(self.listener(channel)), 10)
            stack.enter_context(far)
            yield near, far


class Nodes:
    """Two nodes that share a folder of VMIs, as two hosts share an API server: node01 is the source.

    Args:
        directory: where everything is.
        addresses: the two nodes' migration addresses, which exist already.
        by_interface: the daemons find them by themselves, on the interfaces mig1 and mig2.
    """

    def __init__(self, directory: Path, addresses: tuple[str, str], *, by_interface: bool) -> None:
        self.directory, self.vmi_dir = directory, directory / "vmis"
        self.vmi_dir.mkdir()
        self.source, self.target = self.both = [
            self._daemon(number, address, by_interface) for number, address in enumerate(addresses, 1)
        ]
        self._migrations: list[Migration] = []

    def _daemon(self, number: int, address: str, by_interface: bool) -> Daemon:
        folder = self.directory / f"node0{number}"
        where = ("--migration-interface", f"mig{number}") if by_interface else ("--migration-address", address)
        options = ["--vmi-dir", str(self.vmi_dir), "--drain-timeout", "0", "--libvirt-socket", LIBVIRT_SOCKET]
        return Daemon(folder.name, address, folder, *options, *where, "--launcher-run-dir", f"{folder}/{{name}}")

    async def start(self, *, source: Sequence[str] = (), target: Sequence[str] = ()) -> None:
        """Starts both daemons, with more options if need be."""
        await asyncio.gather(self.source.start(*source), self.target.start(*target))

    def migration(self, name: str = "vm", *, block: bool = True) -> Migration:
        """A VMI that is to migrate; nothing is written yet."""
        made = Migration(self, name, block=block)
        self._migrations.append(made)
        return made

    @asynccontextmanager
    async def undisturbed(self) -> AsyncIterator[Migration]:
        """A migration that is served all the while: an open connection stays, and a new one can be made."""
        made = self.migration("well", block=False)
        made.begin()
        await made.served()
        async with made.connection() as (near, far):
            await assert_carries(near, far)  # so that both relays have it
            yield made
            await assert_carries(near, far)
        await made.served()

    async def close(self) -> None:
        """Ends the daemons, and asserts that they logged nothing but JSON, and no defect of their own."""
        for node in self.both:
            await node.stop()
            await node.relay.stop(signal.SIGKILL)
        for made in self._migrations:
            made.close()
        for node in self.both:
            lines = node.log.read_text().splitlines() if node.log.exists() else []
            assert not [line for line in map(json.loads, lines) if "exception" in line], f"{node.name} has a defect"


@asynccontextmanager
async def make_nodes(
    source: str = "127.0.0.1", target: str = "127.0.0.2", *, by_interface: bool = False
) -> AsyncIterator[Nodes]:
    """Two nodes in a folder of their own, whose daemons end with the context."""
    # A short path: a unix socket's address has 107 bytes.
    with tempfile.TemporaryDirectory(prefix="t", dir="/run") as folder:
        nodes = Nodes(Path(folder), (source, target), by_interface=by_interface)
        try:
            yield nodes
        finally:
            await nodes.close()


def connect(path: Path) -> socket.socket:
    """Connects to a unix socket; the non-blocking result is the caller's to close."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


async def send(sock: socket.socket, data: bytes) -> None:
    """Sends all of it."""
    await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(sock, data), 20)


async def receive(sock: socket.socket, size: int = -1, *, seconds: float = 20) -> bytes:
    """Receives so many bytes, or until the end of the stream; waits so long for each part."""
    data = bytearray()
    while len(data) != size:
        wanted = MIB if size < 0 else size - len(data)
        part = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, wanted), seconds)
        if not part:
            break
        data += part
    return bytes(data)


async def assert_carries(near: socket.socket, far: socket.socket) -> None:
    """Bytes cross a connection both ways."""
    for here, there in ((near, far), (far, near)):
        message = os.urandom(64)
        await send(here, message)
        assert await receive(there, len(message)) == message


async def assert_ends(sock: socket.socket) -> None:
    """The connection ends, be it by an end of stream or by a reset, within a bounded time."""
    with suppress(ConnectionError):
        assert await receive(sock) == b""


async def assert_reported(node: Daemon, migration: Migration, *words: str, field: str = "error") -> None:
    """`migproxy status` tells an error of this migration with all these words."""

    def told() -> bool:
        text = migration.report(node).get(field) or ""
        return all(word in text for word in words)

    await until(told, f"{node.name} to report {words}", 10)


async def assert_logged(node: Daemon, event: str, *words: str, **fields: Any) -> dict[str, Any]:
    """The daemon logs this event with these words somewhere in the line; returns the first such line."""

    def found() -> list[dict[str, Any]]:
        return [line for line in node.logged(event, **fields) if all(word in json.dumps(line) for word in words)]

    await until(lambda: bool(found()), f"{node.name} to log {event!r} with {words} {fields}", 10)
    return found()[0]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
