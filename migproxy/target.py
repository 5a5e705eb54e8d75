"""The target side of a migration: TCP listeners on the migration address, leading to the launcher's sockets."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from migproxy.announcement import Announcement
from migproxy.fds import quench
from migproxy.launcher import LauncherError, SocketNode, Untrusted
from migproxy.plan import Role, TargetProxy
from migproxy.portmap import Channel, IPAddress, PortMap, target_socket_path
from migproxy.proxy import DialError, Proxy, ProxyError, Surroundings
from migproxy.relay.client import Lease
from migproxy.sockets import PortTaken, address_of, listen_tcp
from migproxy.survival import LeftListener
from migproxy.tls import Meeting

_FIRST_UNPRIVILEGED = 1024  # net.ipv4.ip_unprivileged_port_start, unless somebody lowers it


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

    def __contains__(self, port: int) -> bool:
        """Whether a port may be listened on because a status names it; the kernel would choose no privileged one."""
        return self.low <= port <= self.high if self.low else port >= _FIRST_UNPRIVILEGED

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
    lease: Lease
    accepting: asyncio.Task[None]

    async def close(self) -> None:
        self.accepting.cancel()
        await asyncio.gather(self.accepting, return_exceptions=True)
        self.lease.drop()
        quench(self.socket)


@dataclass(frozen=True, slots=True)
class _Bound:
    """A socket that listens; an earlier daemon's may be it."""

    socket: socket.socket
    inherited: LeftListener | None = None


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

    @property
    def announcement(self) -> Announcement | None:
        """Where it listens, as it is announced; None before it does."""
        return Announcement(self.migration.migration_uid, self.ports, self.address) if self.address else None

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
        self.inherit_only(plan.channels)
        if not plan.beside:
            await self.thread.run(lambda: self.around.launchers.open(plan.launcher).close())
        moving = self._is_elsewhere(address)
        bound = self._bind_all([c for c in plan.channels if moving or not self._listens_right(c)], address)
        for channel in [known for known in self._listeners if known in bound or known not in plan.channels]:
            await self._listeners.pop(channel).close()
        if moving:
            self.address = address
        for channel, one in bound.items():
            sock, port = one.socket, one.socket.getsockname()[1]
            lease = one.inherited.lease if one.inherited else self.lease_listener(channel, sock, _identity(sock))
            self._listeners[channel] = _Listener(sock, port, lease, asyncio.create_task(self.accept(sock, channel)))
            self.log.info("listening", channel=channel.label, address=str(address), port=port)
        if bound:
            for warning in plan.warnings:
                self.log.warning(warning)

    @property
    def _is_promised(self) -> bool:
        """What was announced stands, by this daemon or the one before it: the migration has started."""
        return self.plan.beside and not self.plan.announce

    def meeting(self, channel: Channel) -> Meeting:
        """See Proxy."""
        return Meeting(self.plan.name, (lambda: self._be_ready(channel)) if self.plan.beside else None)

    async def _be_ready(self, channel: Channel) -> None:
        """Raises DialError where the launcher could not be dialled: the source goes by virt-handler at once."""
        try:
            await self.thread.run(lambda: self._find(channel).close())
        except LauncherError as error:
            raise DialError(str(error)) from error

    def _listens_right(self, channel: Channel) -> bool:
        listener = self._listeners.get(channel)
        if listener is None:
            return False
        promised = self.plan.published if self._is_promised else None
        return promised is None or listener.port == promised.get(channel)

    def _is_elsewhere(self, address: IPAddress) -> bool:
        """It has to listen at another place than it does; beside virt-handler, nothing moves that has started."""
        if self.plan.beside and self.plan.running and self._listeners:
            return False
        return address != self.address

    def _bind_all(self, channels: list[Channel], address: IPAddress) -> dict[Channel, _Bound]:
        """Binds all of them or none, on the ports where they are or were promised if there are such."""
        bound: dict[Channel, _Bound] = {}
        published: Mapping[Channel, int] = self.plan.published or {}
        try:
            for channel in channels:
                known = None if self._is_promised else self._listeners.get(channel)
                port = known.port if known else published.get(channel)
                bound[channel] = self._take_over(channel, address, port) or _Bound(self._bind(channel, address, port))
        except ProxyError:
            for one in bound.values():
                if one.inherited:
                    self.inherited.append(one.inherited)
                else:
                    one.socket.close()
            raise
        return bound

    def _take_over(self, channel: Channel, address: IPAddress, port: int | None) -> _Bound | None:
        """Takes the listener that an earlier daemon left, if it is where this one has to be."""
        found = None
        for left in self.inherit(channel):
            name = left.socket.getsockname()
            if found is None and address_of(name) == address and port in (None, name[1]):
                found = _Bound(left.socket, left)
            else:
                left.close()
        return found

    def _bind(self, channel: Channel, address: IPAddress, port: int | None) -> socket.socket:
        """Binds the port that was promised, or any that is free."""
        tcp = self.around.tcp
        try:
            if port is not None and port not in self._range:
                # Whoever may write the status may name any port. One that an earlier daemon left is not bound anew.
                allowed = f"--port-range {self._range}" if self._range.low else f"{_FIRST_UNPRIVILEGED}-65535"
                if self.plan.running:
                    raise ProxyError(
                        f"channel {channel.label}: port {port} is published, is outside {allowed} and is not listened "
                        "on, and the migration has started with it: abort it and start it anew"
                    )
                self.log.warning(
                    "published port is outside the range, choosing another",
                    channel=channel.label, port=port, range=allowed,
                )  # fmt: skip
            elif port is not None:
                try:
                    return listen_tcp(address, port, tcp)
                except PortTaken as error:
                    if self.plan.running:
                        raise ProxyError(
                            f"channel {channel.label}: {error.strerror}, and the migration has started with it: end "
                            f"whatever listens there (ss -ltnp sport = {port})"
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

    def _find(self, channel: Channel) -> SocketNode:
        with self.around.launchers.open(self.plan.launcher) as run:
            return run.find(self._socket(channel))

    async def _dial(self, channel: Channel, lease: Lease) -> socket.socket:
        # The launcher is looked up for each connection: its pod may have been replaced.
        try:
            return await self.connect_launcher(partial(self._find, channel), lease)
        except Untrusted as error:
            raise DialError(str(error)) from error

    async def close(self) -> None:
        """Closes the listeners and ends every connection."""
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            await listener.close()
        await super().close()


def _identity(sock: socket.socket) -> tuple[int, int]:
    status = os.fstat(sock.fileno())
    return status.st_dev, status.st_ino
