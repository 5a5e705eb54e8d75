"""The target side of a migration: TCP listeners on the migration address, leading to the launcher's sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from migproxy.launcher import LauncherError, Untrusted
from migproxy.plan import Role, TargetProxy
from migproxy.portmap import Channel, IPAddress, PortMap, target_socket_path
from migproxy.proxy import DialError, Proxy, ProxyError, Surroundings
from migproxy.sockets import PortTaken, listen_tcp


@dataclass(slots=True)
class PortRange:
    """The ports that this node's listeners may take.

    Attributes:
        low, high: The first and the last one; both 0 for the kernel's choice (net.ipv4.ip_local_port_range).
    """

    low: int = 0
    high: int = 0
    _next: int = field(default=0, init=False)

    def __str__(self) -> str:
        return f"{self.low}-{self.high}" if self.low else "the kernel's choice"

    def candidates(self) -> Iterator[int]:
        """Every port to try, beginning after the last one taken: a port just closed is not reused at once."""
        if not self.low:
            yield 0
            return
        size = self.high - self.low + 1
        start = self._next
        for step in range(size):
            offset = (start + step) % size
            self._next = offset + 1
            yield self.low + offset


@dataclass(frozen=True, slots=True)
class _Listener:
    socket: socket.socket
    port: int
    accepting: asyncio.Task[None]

    async def close(self) -> None:
        self.accepting.cancel()
        await asyncio.gather(self.accepting, return_exceptions=True)
        self.socket.close()


class Target(Proxy):
    """The target proxy of one migration: owns its TCP listeners.

    Attributes:
        plan: What it does now.
        address: Where it listens, None before it does.
    """

    role = Role.TARGET
    retriable = (LauncherError,)

    def __init__(self, plan: TargetProxy, around: Surroundings, ports: PortRange, libvirt_socket: str) -> None:
        super().__init__(plan.migration, around)
        self.plan = plan
        self.address: IPAddress | None = None
        self._range = ports
        self._libvirt_socket = libvirt_socket
        self._listeners: dict[Channel, _Listener] = {}

    @property
    def ports(self) -> PortMap:
        """The ports that it listens on."""
        return PortMap.of({channel: listener.port for channel, listener in self._listeners.items()})

    async def apply(self, plan: TargetProxy, address: IPAddress) -> None:
        """Makes the listeners equal to the plan; connections that are open go on as they are.

        Args:
            plan: New or changed: the channels, what is published, the launcher's pod.
            address: This node's migration address, the only one listened on.

        Raises:
            LauncherError: The launcher is not there (yet): nothing is listened on for it.
            ProxyError: A port cannot be had; says which, and what to do. What was there stays.
        """
        self.plan = plan
        self._around.launchers.open(plan.launcher).close()
        moving = address != self.address
        bound = self._bind_all([c for c in plan.channels if moving or c not in self._listeners], address)
        for channel in [known for known in self._listeners if known in bound or known not in plan.channels]:
            await self._listeners.pop(channel).close()
        self.address = address
        for channel, sock in bound.items():
            port = sock.getsockname()[1]
            self._listeners[channel] = _Listener(sock, port, asyncio.create_task(self.accept(sock, channel)))
            self.log.info("listening", channel=channel.label, address=str(address), port=port)
        if bound:
            for warning in plan.warnings:
                self.log.warning(warning)

    def _bind_all(self, channels: list[Channel], address: IPAddress) -> dict[Channel, socket.socket]:
        """Binds all of them or none, on the ports where they are or were promised if there are such."""
        bound: dict[Channel, socket.socket] = {}
        published: Mapping[Channel, int] = self.plan.published or {}
        try:
            for channel in channels:
                known = self._listeners.get(channel)
                bound[channel] = self._bind(channel, address, known.port if known else published.get(channel))
        except ProxyError:
            for sock in bound.values():
                sock.close()
            raise
        return bound

    def _bind(self, channel: Channel, address: IPAddress, port: int | None) -> socket.socket:
        """Binds the port that was promised, or any that is free."""
        tcp = self._around.tcp
        try:
            if port is not None:
                try:
                    return listen_tcp(address, port, tcp)
                except PortTaken as error:
                    if self.plan.running:
                        raise ProxyError(
                            f"channel {channel.label}: {error.strerror}, and the migration has started with it: "
                            f"end whatever listens there (ss -ltnp sport = {port})"
                        ) from error
                    self.log.warning("published port is taken, choosing another", channel=channel.label, port=port)
            for candidate in self._range.candidates():
                try:
                    return listen_tcp(address, candidate, tcp)
                except PortTaken:
                    continue
        except OSError as error:
            raise ProxyError(
                f"channel {channel.label}: cannot listen on {address}: {error.strerror}: is it still this node's?"
            ) from error
        raise ProxyError(
            f"channel {channel.label}: no free port on {address} in {self._range}: "
            "widen --port-range, or end the migrations and programs that hold its ports"
        )

    def listening(self, channel: Channel) -> str | None:
        """Where a channel's connections are accepted, for people; None while they are not."""
        listener = self._listeners.get(channel)
        if listener is None:
            return None
        host = f"[{self.address}]" if self.address is not None and self.address.version == 6 else str(self.address)
        return f"{host}:{listener.port}"

    def peer(self, channel: Channel) -> str:
        return self._socket(channel)

    def _socket(self, channel: Channel) -> str:
        return target_socket_path(self.plan.key, channel, self._libvirt_socket)

    async def _dial(self, channel: Channel) -> socket.socket:
        # The launcher is looked up for each connection: its pod may have been replaced.
        try:
            with self._around.launchers.open(self.plan.launcher) as run:
                return run.connect(self._socket(channel))
        except Untrusted as error:
            raise DialError(str(error)) from error

    async def close(self) -> None:
        """Closes the listeners and ends every connection."""
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            await listener.close()
        await super().close()
