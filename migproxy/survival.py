"""What a daemon leaves behind when it dies, and how the next one makes sense of it.

Everything under one name in the descriptor store belongs together; the name says to which migration, role and channel,
and the descriptors themselves say what each of them is.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from migproxy.fdstore import Lease, Store
from migproxy.ktls import offloaded
from migproxy.plan import Migration, Role
from migproxy.portmap import Channel
from migproxy.sockets import identity, is_connected, quench, reset
from migproxy.splice import is_writer
from migproxy.state import VERSION, ProxyState, RelayState, State, UnknownVersion

_PREFIX = "migproxy"
_LABELS = {channel.label: channel for channel in Channel}
_count = itertools.count()


class Fate(StrEnum):
    """What becomes of a connection that an earlier daemon left."""

    RELAY = "relay"
    SET_UP = "set up"
    ABANDON = "abandon"
    LOSE = "lose"


class Kind(StrEnum):
    """What is stored under a name."""

    LISTENER = "listener"
    CONNECTION = "connection"


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """The name of something in the descriptor store.

    Attributes:
        migration: The migration's fingerprint, since its identity is too long for a name.
        serial: Tells those of one channel apart; of connections, later ones are greater.
    """

    kind: Kind
    role: Role
    channel: Channel
    migration: str
    serial: str

    def __str__(self) -> str:
        return f"{_PREFIX}{VERSION}.{self.kind}.{self.role}.{self.channel.label}.{self.migration}.{self.serial}"


def connection_name(role: Role, channel: Channel, migration: Migration) -> str:
    """A name that no other connection has or had."""
    serial = f"{time.time_ns():016x}-{next(_count) & 0xFFFF:04x}"
    return str(Name(Kind.CONNECTION, role, channel, fingerprint(migration), serial))


def listener_name(role: Role, channel: Channel, migration: Migration, identity: tuple[int, int]) -> str:
    """The name of a listener.

    Args:
        identity: Device and inode of the file at which it is found; of a TCP listener, of its socket.
    """
    device, inode = identity
    return str(Name(Kind.LISTENER, role, channel, fingerprint(migration), f"{device:x}-{inode:x}"))


def fingerprint(migration: Migration) -> str:
    """A short name for a migration's identity."""
    whole = f"{migration.namespace}\x00{migration.name}\x00{migration.vmi_uid}\x00{migration.migration_uid}"
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def parse_name(text: str) -> Name | None:
    """Reads a name.

    Returns:
        None for one that is not ours.

    Raises:
        UnknownVersion: Another version of this program made it.
    """
    head, *fields = text.split(".")
    if not head.startswith(_PREFIX):
        return None
    if head != f"{_PREFIX}{VERSION}":
        raise UnknownVersion(f"descriptor {text}: this migproxy knows version {VERSION}")
    try:
        kind, role, label, migration, serial = fields
        return Name(Kind(kind), Role(role), _LABELS[label], migration, serial)
    except (ValueError, KeyError):
        return None


@dataclass(slots=True)
class Listener:
    """A listener that is still accepting into its queue; owns its socket."""

    name: Name
    socket: socket.socket
    lease: Lease

    @property
    def identity(self) -> tuple[int, int]:
        """See `listener_name`."""
        device, inode = self.name.serial.split("-")
        return int(device, 16), int(inode, 16)

    def close(self) -> None:
        """Ends it; whoever waits in its queue is refused."""
        self.lease.release(keep_record=False)
        quench(self.socket)


@dataclass(slots=True)
class Connection:
    """A connection: relayed already if it has pipes, else with one leg or both.

    Attributes:
        unix: To the launcher, None where it was not dialled yet.
        tcp: To the other node, likewise.
        to_network, to_launcher: An end of the pipe of each direction.
        is_ambiguous: There were several different ones of a kind, and nobody knows which belongs to it.
    """

    name: Name
    lease: Lease
    unix: socket.socket | None = None
    tcp: socket.socket | None = None
    to_network: int | None = None
    to_launcher: int | None = None
    is_ambiguous: bool = False

    @property
    def pipes(self) -> tuple[int, int] | None:
        """The ends of its pipes, None where it was not relayed yet."""
        if self.to_network is None or self.to_launcher is None:
            return None
        return self.to_network, self.to_launcher

    def fate(self, before: RelayState | None, *, encrypts: bool | None) -> Fate:
        """Decides what becomes of it.

        Args:
            before: What the state file says of it.
            encrypts: Whether connections between the nodes are encrypted, None while that is not known.

        Returns:
            RELAY to go on with, or begin; SET_UP where nothing was relayed yet and the rest can be done anew, as far as
            is known; ABANDON where nothing was relayed and the other node dials anew; LOSE where bytes are missing.
        """
        if (before and not before.resumable) or self.is_ambiguous:
            return Fate.LOSE
        if self.unix and self.tcp and self.pipes:
            return Fate.RELAY
        if self._may_have_moved or self.to_network is not None or self.to_launcher is not None:
            return Fate.LOSE
        if self.name.role is Role.SOURCE or encrypts is False:
            return Fate.SET_UP
        # A target dials the launcher for nobody who has not authenticated.
        is_secured = self.tcp is not None and offloaded(self.tcp) == (True, True)
        if is_secured and self.unix and is_connected(self.unix):
            return Fate.RELAY
        return Fate.SET_UP if encrypts is None else Fate.ABANDON

    @property
    def _may_have_moved(self) -> bool:
        """Whether it was relayed, for all that is known: then nothing but its pipes knows which bytes are in flight.

        A socket is blocking from the moment that it is relayed (a property of the open file that all its descriptors
        share, fcntl(2)); pipes that a slow or full holder did not take are gone.
        """
        accepted = self.unix if self.name.role is Role.SOURCE else self.tcp
        return accepted is None or os.get_blocking(accepted.fileno())

    def close(self) -> None:
        """Breaks it, so that neither peer takes it for complete."""
        self.lease.release(keep_record=False)
        for sock in (self.tcp, self.unix):
            if sock:
                reset(sock)
        for end in (self.to_network, self.to_launcher):
            if end is not None:
                os.close(end)


@dataclass(slots=True)
class Estate:
    """What is left of one side of one migration.

    Attributes:
        state: What the state file says of it, None where it says nothing.
        listeners, connections: What the store has of it; the connections in the order in which they began.
    """

    state: ProxyState | None = None
    listeners: list[Listener] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)


Key = tuple[str, Role]
"""A migration's fingerprint, and the role."""


def sort(stored: Mapping[str, list[int]], state: State | None, store: Store) -> dict[Key, Estate]:
    """Sorts what an earlier daemon left by migration and role.

    Args:
        stored: Descriptors by name, as the store gave them back; owned by the result, or closed where they are of no
            use.
        state: The state file, None where there is none.
        store: Keeps the result's leases.

    Raises:
        UnknownVersion: Some are of a version that this program does not know; nothing is closed.
    """
    names = {text: parse_name(text) for text in stored}
    estates: dict[Key, Estate] = {}
    for proxy in state.proxies if state else ():
        migration = Migration(proxy.namespace, proxy.name, proxy.vmi_uid, proxy.migration_uid)
        estates[fingerprint(migration), Role(proxy.role)] = Estate(proxy)
    for text, name in names.items():
        lease = store.renew(text, stored[text])
        if name is None:
            lease.release(keep_record=False)
            close(stored[text])
            continue
        if state and text in state.ended:
            lease.release(keep_record=False)
            for fd in stored[text]:  # closed already, for good or by a reset; what TCP has to send yet, it sends
                os.close(fd)
            continue
        estate = estates.setdefault((name.migration, name.role), Estate())
        if name.kind is Kind.LISTENER:
            first, *more = stored[text]
            for fd in more:  # stored twice: the same open file
                lease.fds.remove(fd)
                os.close(fd)
            listener = Listener(name, socket.socket(fileno=first), lease)
            listener.socket.setblocking(False)
            if listens(listener.socket):
                estate.listeners.append(listener)
            else:  # shut down by a daemon whose last words have not reached the holder
                listener.close()
        else:
            estate.connections.append(_connection(name, stored[text], lease))
    for estate in estates.values():
        estate.connections.sort(key=lambda connection: connection.name.serial)
    return estates


def _connection(name: Name, fds: Iterable[int], lease: Lease) -> Connection:
    made = Connection(name, lease)
    for fd in fds:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            sock = socket.socket(fileno=fd)
            part = "unix" if sock.family == socket.AF_UNIX else "tcp"
            found: socket.socket | int = sock
        else:
            part, found = "to_launcher" if is_writer(fd) else "to_network", fd
        known = getattr(made, part)
        if known is None:
            setattr(made, part, found)
            continue
        # Stored twice; or a leg that was dialled anew, whose predecessor's removal has not reached the holder.
        made.is_ambiguous = made.is_ambiguous or identity(_fileno(known)) != identity(fd)
        lease.fds.remove(fd)
        os.close(found.detach() if isinstance(found, socket.socket) else found)
    return made


def _fileno(part: socket.socket | int) -> int:
    return part.fileno() if isinstance(part, socket.socket) else part


def close(fds: Iterable[int]) -> None:
    """Closes descriptors of whatever kind so that no peer takes a connection for complete."""
    for fd in fds:
        with suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.close(fd)
                continue
            sock = socket.socket(fileno=fd)
            (quench if listens(sock) else reset)(sock)


def listens(sock: socket.socket) -> bool:
    """Whether a socket is a listener, and has not been shut down."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
