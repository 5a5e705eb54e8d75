"""The laboratory's daemons and relays as services of booted machines: systemd starts them, and ends them."""

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from demo.lab import Lab, Node, Proxy, until
from demo.stream import Wires
from migproxy.portmap import Channel
from tests.e2e.booted import Booted, boot

PATIENCE = 90.0
RELAY = "migproxy-relay"


class Service(Proxy):
    """A node's daemon and relay as services of a machine; it has that machine's configuration and journal.

    Args:
        node: The node, whose folder the machine shares.
        machine: The machine.
        options: By the configuration file's keys, with underscores for the dashes.
    """

    def __init__(self, node: Node, machine: Booted, **options: str | float | bool) -> None:
        super().__init__(node)
        self.node = node
        self.machine = machine
        self.control = machine.root / "run/migproxy/control.sock"
        self._started = False
        machine.configure(
            node_name=node.name,
            migration_address=node.address,
            launcher_run_dir=str(node.run_dir),
            libvirt_socket="libvirt/libvirt-sock",
            http_listen="off",
            **options,
        )

    async def spawn(self, *_: str) -> None:
        """Starts it; later on, systemd does."""
        if not self._started:
            self._started = True
            await self.systemctl("start", "--no-block")

    @property
    def listens(self) -> bool:
        """Whether somebody answers at its control socket."""
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self.control)) == 0

    async def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        """Kills it, at whatever stage it is; systemd starts it again. Any other end is left to the machine's own."""
        if how is signal.SIGKILL:
            await self.kill("migproxy")
        return 0

    async def kill(self, unit: str) -> None:
        """Kills a unit's process, once there is one, and waits until systemd knows that it is dead."""

        def strike() -> None:
            self.machine.wait(lambda: self.machine.show("MainPID", unit) != "0", "a process", PATIENCE)
            pid = self.machine.show("MainPID", unit)
            self.machine.run("systemctl", "kill", "--kill-whom=main", "--signal", "KILL", unit)
            self.machine.wait(lambda: self.machine.show("MainPID", unit) != pid, "its end", PATIENCE)

        await asyncio.to_thread(strike)

    async def systemctl(self, verb: str, *options: str) -> None:
        """Does that to the service, and waits for it."""
        await asyncio.to_thread(self.machine.run, "systemctl", verb, *options, "migproxy", timeout=PATIENCE)

    async def shows(self, name: str, value: str, unit: str = "migproxy") -> None:
        """Waits until a property of the service, or of another unit (systemctl show), has that value."""
        await until(lambda: self.machine.show(name, unit) == value, f"{self.node.name}: {name}={value}", PATIENCE)

    async def stop_in_order(self) -> None:
        """Has it drained and ended by systemd, and waits for nothing; `spawn` starts it again."""
        self._started = False
        await self.systemctl("stop", "--no-block")

    def descriptors(self, unit: str = "migproxy") -> int:
        return len(self.machine.run("sh", "-c", f"ls /proc/{self.machine.show('MainPID', unit)}/fd").split())

    @property
    def relay(self) -> str:
        """The relay's process."""
        return self.machine.show("MainPID", RELAY)


@asynccontextmanager
async def laboratory(*, tls: bool = False, **options: str | float | bool) -> AsyncIterator[tuple[Lab, list[Service]]]:
    """Two nodes on loopback addresses with a machine each, and their daemons, ready."""
    async with AsyncExitStack() as stack:
        # Nodes' folders are in /run: the unit hides /tmp from the daemon.
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(tempfile, "tempdir", "/run")
        lab = await stack.enter_async_context(Lab(libvirt=False, loopback=True, tls=tls))
        services = []
        for node in lab.nodes:
            machine = stack.enter_context(boot(lab.directory))
            security = {"tls_dir": str(lab.directory / "tls")} if tls else {"disable_tls": True}
            service = Service(node, machine, vmi_dir=str(lab.vmi_dir), **security, **options)
            node.proxy = service
            services.append(service)
        await asyncio.gather(*(service.start() for service in services))
        try:
            yield lab, services
            for service in services:
                assert not [line for line in service.machine.journal() if "EXCEPTION" in line]
        except BaseException:
            for service in services:
                print(service.machine.run("journalctl", "--no-pager", "--lines", "60", check=False))
            raise


Ends = tuple[socket.socket, socket.socket]


@asynccontextmanager
async def connected(lab: Lab) -> AsyncIterator[Ends]:
    """A running migration with one open connection: its end in the source's launcher, and in the target's."""
    source, target = lab.nodes
    async with lab.migration(source, target):
        with Wires(source, target, lab.vmi.read()["metadata"]["uid"], Channel.DIRECT) as wires:
            ends = await wires.connect(PATIENCE)
            await carries(ends)
            yield ends


async def carries(ends: Ends) -> None:
    """Asserts that bytes cross a connection, both ways."""
    for here, there in (ends, ends[::-1]):
        there.settimeout(PATIENCE)
        message = os.urandom(64)
        here.sendall(message)
        assert await asyncio.to_thread(there.recv, len(message), socket.MSG_WAITALL) == message
