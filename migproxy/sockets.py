"""The options of the sockets on both legs, and the calls that make and connect them."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import structlog

from migproxy.portmap import IPAddress, unmapped

log = structlog.get_logger(__name__)

BACKLOG = 512
_UNIX_BUFFER = 1 << 20  # bytes; the default of 208 KiB costs 10 % of the throughput
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h; not among Python's constants
_IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h
_LONGEST_IDLE = 10  # seconds between two probes of an idle connection
_PROBES = 90  # in vain: a quarter of an hour, as the kernel sends data again (tcp_retries2), should no daemon judge
_keeping_lock = ctypes.PyDLL(None, use_errno=True)


class PortTaken(OSError):
    """Somebody else listens on that address and port."""


@dataclass(slots=True)
class TCPOptions:
    """How the connections between the nodes behave.

    Attributes:
        congestion_control: An algorithm of the kernel's, or "system" to leave the system's default. On a LAN,
            cubic moves about twice the bytes of bbr for a third of the CPU: bbr paces every packet by a timer.
    """

    congestion_control: str = "cubic"
    _warned: bool = field(default=False, init=False)

    def apply(self, sock: socket.socket) -> None:
        """Sets the options on a TCP socket; a listener hands them on to what it accepts."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.congestion_control == "system":
            return
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self.congestion_control.encode())
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning(
                    "congestion control left at the system's default",
                    wanted=self.congestion_control,
                    error=error.strerror,
                    remedy=f"modprobe tcp_{self.congestion_control}, add it to net.ipv4.tcp_allowed_congestion_control"
                    ", or choose another with --congestion-control",
                )


def listen_tcp(address: IPAddress, port: int, options: TCPOptions) -> socket.socket:
    """Makes a non-blocking listener; the caller owns it.

    Args:
        address: The one address to listen on.
        port: The port, or 0 for the kernel's choice.
        options: What accepted connections inherit.

    Raises:
        PortTaken: The port is in use on that address.
        OSError: Anything else, such as an address that is not this machine's (EADDRNOTAVAIL).
    """
    sock = socket.socket(family(address), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Connections of an earlier listener that linger in TIME_WAIT do not keep its port.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        options.apply(sock)
        sock.bind(sockaddr(address, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(error.errno, f"port {port} is in use on {address}") from error
        raise
    return sock


def new_tcp(local: IPAddress, options: TCPOptions) -> socket.socket:
    """Makes a non-blocking socket that will connect from `local`; the caller owns it.

    Raises:
        OSError: `local` is not this machine's address.
    """
    sock = socket.socket(family(local), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        options.apply(sock)
        # The port is chosen at connect, where the same one can serve several destinations (ip(7)).
        sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind(sockaddr(local, 0))
    except OSError:
        sock.close()
        raise
    return sock


async def connect_tcp(sock: socket.socket, address: IPAddress, port: int) -> None:
    """Connects a non-blocking TCP socket; the attempt has begun when this first waits.

    uvloop's sock_connect resolves even a numeric address in a thread: a connection would cost 8 % more, and not
    begin in the order in which it was asked for.

    Raises:
        OSError: The peer refuses or cannot be reached.
    """
    error = sock.connect_ex(sockaddr(address, port))
    if error == errno.EINPROGRESS:
        await ready(sock.fileno(), writing=True)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


def accept(listener: socket.socket) -> int:
    """Accepts a connection, and keeps Python's lock meanwhile.

    `socket.accept` would give it away, and have it back only after the pumps: for so long, a connection is known to
    this process alone, and dies with it.

    Args:
        listener: Not blocking.

    Returns:
        The connection's descriptor, not blocking either; owned by the caller.

    Raises:
        OSError: See accept4(2).
    """
    fd: int = _keeping_lock.accept4(listener.fileno(), None, None, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


def probe_when_idle(tcp: socket.socket, patience: float) -> None:
    """Has the kernel ask an idle connection's peer for an answer, often enough to judge it (`TCPInfo.is_gone`).

    No TCP_USER_TIMEOUT: with it, the kernel also ends a connection whose peer answers every probe of its shut window
    (tcp_probe_timer).

    Args:
        patience: Seconds that the peer may be silent.
    """
    interval = round(min(max(1, patience / 6), _LONGEST_IDLE))
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def remote_address(sock: socket.socket) -> str:
    """The address of who is at the other end, for people; "launcher" at that of a unix socket."""
    if sock.family == socket.AF_UNIX:
        return "launcher"
    try:
        return str(sock.getpeername()[0])
    except OSError:  # it is gone already
        return "unknown"


async def ready(fd: int, *, writing: bool) -> None:
    """Waits until a descriptor can be read from or written to, or its connection has failed."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)

    def note() -> None:
        if not ready.done():
            ready.set_result(None)

    add(fd, note)
    try:
        await ready
    finally:
        remove(fd)


def widen_unix(sock: socket.socket) -> None:
    """Gives a launcher's connection a send buffer that a pump fills in one call."""
    with suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _UNIX_BUFFER)
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)


def family(address: IPAddress) -> socket.AddressFamily:
    """The family of an address's sockets."""
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def sockaddr(address: IPAddress, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """An address and port as the methods of sockets take them; of an address with a zone, they would drop that.

    Raises:
        OSError: There is no interface of the zone's name (ENODEV).
    """
    host, _, zone = str(address).partition("%")
    if not zone:
        return host, port
    try:
        return host, port, 0, socket.if_nametoindex(zone)
    except OSError as error:
        raise OSError(errno.ENODEV, f"there is no interface {zone}") from error


def address_of(name: tuple[Any, ...]) -> IPAddress:
    """The address in what `getsockname` or `getpeername` of a TCP or UDP socket says, with its zone.

    Raises:
        OSError: The zone's interface has gone.
    """
    host, _, *zone = name
    return unmapped(ip_address(f"{host}%{socket.if_indextoname(zone[1])}" if zone and zone[1] else host))
