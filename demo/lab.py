"""Two nodes on one machine: namespaces, a migration network, libvirt, and a migproxy each.

Everything here needs `scripts/sandbox` around it, except a laboratory of loopback addresses: its nodes
are two folders, an address each, and a migproxy each.
"""

import asyncio
import json
import os
import shlex
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from migproxy import control
from migproxy.portmap import Channel

MIGPROXY = (sys.executable, "-m", "migproxy")
SEED = Path(__file__).with_name("vmi-migratable.yaml")

# The first process of a node's PID namespace, which reaps what libvirtd and QEMU leave behind. The node's
# folders go over the machine's; /run is the last, because the laboratory's own files are in it.
# /dev/kvm is hidden: emulation gives the same result on every machine. What is there instead cannot be written
# to, or libvirtd would take KVM to be usable and ask QEMU a dozen times a migration why it has none.
_INIT = """
set -e
node=$1; shift
read -r pid _ </proc/self/stat
: >"$node/no-kvm"
[ ! -e /dev/kvm ] || mount --bind -o ro "$node/no-kvm" /dev/kvm
for folder in etc/libvirt var/lib/libvirt var/cache/libvirt var/log/libvirt run; do
    [ ! -d /$folder ] || mount --bind "$node/$folder" /$folder
done
mount -t proc proc /proc
echo "$pid"
exec </dev/null >/dev/null
"$@" &
wait $!
"""

_LIBVIRTD_CONF = """
host_uuid = "{uuid}"
auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""

# No confinement: the node lasts for two minutes, and in a user namespace there is no other user to run
# QEMU as, and no control group to put it in.
_QEMU_CONF = """
user = "+0"
group = "+0"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""


class LabError(Exception):
    """Something in the laboratory did not do what it should; the message says what, and shows its words."""


async def run(*command: str) -> str:
    """Runs a command to its end, and returns what it wrote to its standard output.

    Raises:
        LabError: it failed; with what it wrote to its standard error.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await process.communicate()
    except BaseException:
        await end(process, signal.SIGKILL)
        raise
    if process.returncode:
        raise LabError(f"{shlex.join(command)}: exit status {process.returncode}: {err.decode().strip()}")
    return out.decode()


async def end(process: asyncio.subprocess.Process, how: signal.Signals, seconds: float = 20) -> int:
    """Sends a process a signal unless it has ended, kills it if that does not end it, returns its status."""
    with suppress(ProcessLookupError):
        process.send_signal(how)
    try:
        return await asyncio.wait_for(process.wait(), seconds)
    except TimeoutError:
        process.kill()
        return await process.wait()


async def until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Waits for a condition.

    Raises:
        LabError: it did not become true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"waited {seconds:.0f} s in vain for {what}")
        await asyncio.sleep(0.02)


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Does some work meanwhile, and cancels it at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a daemon counted on one channel of a migration: connections, and bytes to and from its peer node."""

    connections: int
    sent: int
    received: int

    @property
    def reversed(self) -> "Traffic":
        """What the daemon on the other side counts of the same."""
        return Traffic(self.connections, self.received, self.sent)


class Relay:
    """A node's `migproxy relay`: moves the bytes of its daemon's connections, and keeps them while the daemon is dead.

    Args:
        directory: where its socket and its log are.
    """

    def __init__(self, directory: Path) -> None:
        self.socket, self.log = directory / "relay.sock", directory / "relay.log"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Its process ID."""
        assert self._process, "the relay runs"
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether it was started, and not stopped since."""
        return self._process is not None

    @property
    def options(self) -> list[str]:
        """What tells a daemon of it."""
        return ["--relay-socket", str(self.socket), "--relay-externally-managed"]

    def descriptors(self) -> int:
        """How many descriptors it has open, those that it keeps among them, without one for each TLS worker."""
        workers = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(OSError):  # the thread has ended meanwhile
                workers += len((task / "children").read_text().split())
        return len(os.listdir(f"/proc/{self.pid}/fd")) - workers

    async def start(self, *, prefix: Sequence[str] = ()) -> None:
        """Starts it, as its systemd unit does; a daemon waits until it listens.

        Args:
            prefix: a command that runs the relay's.
        """
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(*prefix, sys.executable, "-m", "migproxy.relay", str(self.socket)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends it, and returns its exit status; 0 where it does not run."""
        process, self._process = self._process, None
        return await end(process, how) if process else 0

    async def ended(self, seconds: float = 20) -> int:
        """Waits for its end, and returns its exit status."""
        assert self._process, "the relay runs"
        return await asyncio.wait_for(self._process.wait(), seconds)

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)


class Proxy:
    """A node's migproxy daemon.

    Args:
        node: the node, whose network namespace it runs in, and whose relay it has.
        options: what it is started with besides the node's name, its launcher's and its own sockets.
    """

    def __init__(self, node: "Node", *options: str) -> None:
        self.control, self.log = node.directory / "migproxy.sock", node.directory / "migproxy.log"
        self._node = node
        self.arguments = ["run", "--node-name", node.name, "--launcher-run-dir", str(node.run_dir)]
        self.arguments += ["--libvirt-socket", "libvirt/libvirt-sock", "--control-socket", str(self.control)]
        self.arguments += node.relay.options
        self.arguments += options
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The daemon's process ID: nsenter becomes migproxy."""
        assert self._process, "the daemon runs"
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether the daemon was started, and not stopped since."""
        return self._process is not None

    async def start(self, *options: str) -> None:
        """Starts the daemon, with more options if need be, and waits until it is ready."""
        await self.spawn(*options)
        await self.ready()

    async def spawn(self, *options: str) -> None:
        """Starts the daemon, and waits for nothing."""
        command = [*self._node.prefix("net"), *MIGPROXY, *self.arguments, *options]
        self.control.unlink(missing_ok=True)  # a killed daemon leaves its own
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def listens(self) -> bool:
        """Whether its control socket is there. Raises LabError where the daemon has ended."""
        assert self._process, "the daemon was started"
        if self._process.returncode is not None:
            status, log = self._process.returncode, self.log.read_text()[-5000:]
            raise LabError(f"{self._node.name}'s migproxy ended by itself, exit status {status}:\n{log}")
        return self.control.exists()

    async def ready(self) -> None:
        """Waits until the daemon is ready."""
        await until(lambda: self.listens, f"{self.control}")
        await self._until(lambda status: bool(status["ready"]), "be ready")

    def descriptors(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    async def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        """Ends the daemon, which drains at SIGINT, and returns its exit status; 0 where it does not run."""
        process, self._process = self._process, None
        return await end(process, how) if process else 0

    async def status(self) -> dict[str, Any]:
        """What `migproxy status --json` prints."""
        return dict(json.loads(await run(*MIGPROXY, "status", "--json", "--control-socket", str(self.control))))

    async def ended(self, migration: str) -> None:
        """Waits until the daemon has ended a migration, and so its counts are final."""
        await self._until(
            lambda status: all(
                found["state"] == "ended" for found in status["migrations"] if found["migration_uid"] == migration
            ),
            f"end migration {migration}",
        )

    async def _until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                status: object = (answer := await asyncio.to_thread(control.ask, str(self.control)))
                if condition(answer):
                    return
            except control.ControlError as error:  # it is being started
                status = error
            if time.monotonic() > deadline:
                raise LabError(f"waited in vain for {self._node.name}'s migproxy to {what}: {status}; see {self.log}")
            await asyncio.sleep(0.05)

    async def traffic(self, migration: str) -> dict[str, Traffic]:
        """What the daemon counted for a migration UID, by channel ("libvirt", "direct", "block")."""
        return {
            channel["channel"]: Traffic(channel["connections_total"], channel["bytes_sent"], channel["bytes_received"])
            for found in (await self.status())["migrations"]
            if found["migration_uid"] == migration
            for channel in found["channels"]
        }


class Node:
    """A node: a name, an address in the migration network, a folder, a migproxy; with namespaces, a libvirtd.

    Args:
        name: its name, as VMIs have it.
        address: its address in the migration network.
        directory: its folder; what it sees as /run, /etc/libvirt and so on is below.
        proxy_options: see Proxy.
    """

    def __init__(self, name: str, address: str, directory: Path, *proxy_options: str) -> None:
        self.name, self.address, self.directory = name, address, directory
        self.run_dir = directory / "run"
        self.migrationproxy = self.run_dir / "kubevirt/migrationproxy"
        self.images = directory / "var/lib/libvirt/images"
        self.console = directory / "var/log/libvirt/console.log"
        self.migrationproxy.mkdir(parents=True)
        self.pid: int | None = None
        self._init: asyncio.subprocess.Process | None = None
        self.relay = Relay(directory)
        self.proxy = Proxy(self, *proxy_options)

    def prefix(self, *namespaces: str) -> list[str]:
        """The command that enters namespaces of this node ("net", "mount", "pid"); empty for none of them."""
        entered = [f"--{name}" for name in namespaces]
        return ["nsenter", "-t", str(self.pid), *entered] if self.pid and entered else []

    async def exec(self, *command: str) -> str:
        """Runs a command on the node, and returns its standard output."""
        return await run(*self.prefix("net", "mount", "pid"), *command)

    async def virsh(self, *arguments: str) -> str:
        """Runs virsh on the node, and returns its standard output."""
        return (await self.exec("virsh", "--quiet", *arguments)).strip()

    def sockets(self) -> set[str]:
        """The names of the socket files in the launcher's migrationproxy folder; not of those about to be renamed."""
        return {path.name for path in self.migrationproxy.iterdir() if path.is_socket() and path.name[0] != "."}

    async def boot(self, *, libvirt: bool) -> None:
        """Makes the node's namespaces and joins it to the migration network; starts libvirtd if asked to."""
        self._configure_libvirt()
        main = _libvirtd() if libvirt else ["sleep", "infinity"]
        self._init = await asyncio.create_subprocess_exec(
            *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _INIT, self.name),
            *(str(self.directory), *main),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._init.stdout
        line = await self._init.stdout.readline()
        if not line:
            raise LabError(f"{self.name}: its namespaces cannot be made")
        self.pid = int(line)
        await run("ip", "link", "add", self.name, "type", "veth", "peer", "migration0", "netns", str(self.pid))
        await run("ip", "link", "set", self.name, "master", "migration", "up")
        for command in ("link set lo up", f"addr add {self.address}/24 dev migration0", "link set migration0 up"):
            await run(*self.prefix("net"), "ip", *command.split())
        if libvirt:
            await until((self.run_dir / "libvirt/libvirt-sock").exists, f"libvirtd on {self.name}")
            await self.virsh("version")

    async def halt(self) -> None:
        """Ends the node's migproxy, its relay and, with its first process, everything else on it."""
        await self.proxy.stop()
        await self.relay.stop(signal.SIGKILL)
        if self._init:
            # Else the kernel takes it away when it gets round to it, and its name is taken until then.
            with suppress(LabError):
                await run("ip", "link", "delete", self.name)
            await end(self._init, signal.SIGKILL)

    def _configure_libvirt(self) -> None:
        for folder in ("etc/libvirt", "var/lib/libvirt/images", "var/cache/libvirt", "var/log/libvirt"):
            (self.directory / folder).mkdir(parents=True)
        conf = self.directory / "etc/libvirt"
        (conf / "libvirtd.conf").write_text(_LIBVIRTD_CONF.format(uuid=uuid.uuid4()))
        (conf / "qemu.conf").write_text(_QEMU_CONF)


class VMIFile:
    """The VMI that both daemons watch: this file plays the API server, and its user plays virt-controller.

    Args:
        path: the file, in the folder that the daemons' --vmi-dir names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._write(yaml.safe_load(SEED.read_text()))

    def read(self) -> dict[str, Any]:
        """The document as it is now, with what the target's daemon has written into it."""
        return dict(yaml.safe_load(self.path.read_text()))

    def begin(self, source: Node, target: Node, *, block: bool) -> str:
        """Asks for a migration, and returns its new UID. Its disks move too where block is true."""
        vmi, migration = self.read(), str(uuid.uuid4())
        vmi["metadata"]["labels"]["kubevirt.io/migrationTargetNodeName"] = target.name
        vmi["status"]["migrationMethod"] = "BlockMigration" if block else "LiveMigration"
        vmi["status"]["migrationState"] = {
            "migrationUid": migration,
            "sourceNode": source.name,
            "targetNode": target.name,
        }
        self._write(vmi)
        return migration

    def start(self) -> None:
        """Marks the migration as running."""
        vmi = self.read()
        vmi["status"]["migrationState"]["startTimestamp"] = _now()
        self._write(vmi)

    def end(self, *, failed: bool) -> None:
        """Marks the migration as completed, and the VMI as its target node's; or as failed."""
        vmi = self.read()
        state = vmi["status"]["migrationState"]
        state |= {"endTimestamp": _now(), "completed": True, "failed": failed}
        vmi["metadata"]["labels"].pop("kubevirt.io/migrationTargetNodeName", None)
        if not failed:
            vmi["status"]["nodeName"] = vmi["metadata"]["labels"]["kubevirt.io/nodeName"] = state["targetNode"]
        self._write(vmi)

    def _write(self, vmi: dict[str, Any]) -> None:
        new = self.path.with_name(f".{self.path.name}.new")
        new.write_text(yaml.safe_dump(vmi, sort_keys=False))
        new.replace(self.path)


class Lab:
    """Two nodes, node01 and node02, with a migproxy each, and a VMI that can migrate between them.

    Use it as an asynchronous context manager: leaving it ends and removes everything in it.

    Args:
        libvirt: run a libvirtd on each node.
        loopback: do without namespaces: the nodes are 127.0.0.1 and 127.0.0.2.
        tls: protect the connections between the nodes, with certificates made for it.
        say: told what happens, and the commands that a user would type.
    """

    def __init__(
        self,
        *,
        libvirt: bool = True,
        loopback: bool = False,
        tls: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.libvirt, self.loopback, self.tls, self.say = libvirt, loopback, tls, say
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Lab":
        if not self.loopback and "MIGPROXY_SANDBOX" not in os.environ:
            raise LabError("it would make networks and mounts on this machine: start it with scripts/sandbox")
        async with AsyncExitStack() as stack:
            parent = None if self.loopback else "/run"  # the sandbox's own, which goes with it
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lab-", dir=parent))
            self.directory = Path(folder)
            self.vmi_dir = self.directory / "vmis"
            self.vmi_dir.mkdir()
            self.vmi = VMIFile(self.vmi_dir / SEED.name)
            if self.tls:
                self.say(f"migproxy certs {self._certificates}")
                await run(*MIGPROXY, "certs", self._certificates)
            if not self.loopback:
                await run("ip", "link", "add", "migration", "type", "bridge")
                stack.push_async_callback(run, "ip", "link", "delete", "migration")
                await run("ip", "link", "set", "migration", "up")
            self.nodes = [self._node(number) for number in (1, 2)]
            for node in self.nodes:
                stack.push_async_callback(node.halt)
                if not self.loopback:
                    await node.boot(libvirt=self.libvirt)
                await node.relay.start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    @property
    def _certificates(self) -> str:
        return str(self.directory / "tls")

    async def _complaints(self) -> str:
        """What the daemons say about their migrations."""
        reports = [(node.name, await node.proxy.status()) for node in self.nodes]
        return "; ".join(
            f"{name}: {m['error']}" for name, report in reports for m in report["migrations"] if m["error"]
        )

    def _node(self, number: int) -> Node:
        address = f"127.0.0.{number}" if self.loopback else f"10.1.1.{number}"
        where: tuple[str, ...] = (
            ("--migration-address", address) if self.loopback else ("--migration-interface", "migration0")
        )
        if self.loopback:  # nodes that share a network namespace cannot share a port of all its addresses
            where += ("--http-listen", f"{address}:0")
        name = f"node0{number}"
        security = ("--tls-dir", self._certificates) if self.tls else ("--disable-tls",)
        return Node(
            name,
            address,
            self.directory / name,
            "--vmi-dir",
            str(self.vmi_dir),
            *where,
            *security,
        )

    @asynccontextmanager
    async def migration(self, source: Node, target: Node, *, block: bool = False) -> AsyncIterator[str]:
        """A migration through the two daemons: its body moves the bytes, its UID is what it yields.

        It starts once the target's ports are published and the source's sockets are there; at its end it is
        marked as completed, or as failed where the body raised, and waits until both daemons have ended it.
        """
        uid = self.vmi.begin(source, target, block=block)
        self.say(f"{self.vmi.path}: migration {uid}, sourceNode {source.name}, targetNode {target.name}")
        failed = True
        try:
            channels = 3 if block else 2
            try:
                await until(lambda: len(source.sockets()) == channels, f"{channels} sockets in {source.migrationproxy}")
            except LabError as error:
                raise LabError(f"{error}; {await self._complaints()}") from error
            state = self.vmi.read()["status"]["migrationState"]
            published = state["targetDirectMigrationNodePorts"].items()
            ports = ", ".join(f"{port} ({Channel(channel).label})" for port, channel in published)
            self.say(f"{target.name}'s migproxy publishes {state['targetNodeAddress']} and the ports {ports}")
            self.vmi.start()
            yield uid
            failed = False
        finally:
            self.vmi.end(failed=failed)
        for node in self.nodes:
            await node.proxy.ended(uid)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _libvirtd() -> list[str]:
    """The command that runs libvirtd, also where an unprivileged user made the sandbox."""
    setgroups = Path("/proc/self/setgroups")
    if setgroups.exists() and setgroups.read_text() == "deny\n":
        return [sys.executable, str(Path(__file__).with_name("setgroups.py")), "libvirtd"]
    return ["libvirtd"]
