"""What a daemon leaves at the relay when it dies, and how the next one makes sense of it.

Everything under one name belongs together; the name says to which migration, role and channel.
"""

from __future__ import annotations

import hashlib
import itertools
import socket
import time
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache

import structlog

from migproxy import state
from migproxy.fds import close_all, is_connected, quench, reset
from migproxy.offload import offloaded
from migproxy.plan import Migration, Role
from migproxy.portmap import Channel
from migproxy.relay.client import Contents, Lease, Left, RelayClient
from migproxy.state import ProxyState, StateError

log = structlog.get_logger(__name__)

_PREFIX = "migproxy1"
"""Begins with the version of the names: those of another one are not ours."""

_STATE = f"{_PREFIX}.state"
_LABELS = {channel.label: channel for channel in Channel}
_count = itertools.count()


class Fate(StrEnum):
    """What becomes of a connection that an earlier daemon was setting up."""

    RELAY = "relay"
    SET_UP = "set up"
    ABANDON = "abandon"


class Kind(StrEnum):
    """What is kept under a name."""

    LISTENER = "listener"
    CONNECTION = "connection"


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """The name of something that the relay has.

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
        return f"{_PREFIX}.{self.kind}.{self.role}.{self.channel.label}.{self.migration}.{self.serial}"


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


def state_name(role: Role, migration: Migration) -> str:
    """The name of what is known of one side of a migration."""
    return f"{_STATE}.{role}.{fingerprint(migration)}"


@lru_cache
def fingerprint(migration: Migration) -> str:
    """A short name for a migration's identity."""
    whole = f"{migration.namespace}\x00{migration.name}\x00{migration.vmi_uid}\x00{migration.migration_uid}"
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def parse_name(text: str) -> Name | None:
    """Reads a name; None for one that is not ours."""
    head, *fields = text.split(".")
    if head != _PREFIX:
        return None
    try:
        kind, role, label, migration, serial = fields
        return Name(Kind(kind), Role(role), _LABELS[label], migration, serial)
    except (ValueError, KeyError):
        return None


@dataclass(slots=True)
class LeftListener:
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
        self.lease.drop()
        quench(self.socket)


@dataclass(slots=True)
class LeftConnection:
    """A connection that was being set up: nothing of it is relayed yet.

    Attributes:
        accepted: Made by the launcher, on the source; by the other node, on the target.
        dialled: The other leg, None where it was not dialled yet.
    """

    name: Name
    lease: Lease
    accepted: socket.socket
    dialled: socket.socket | None = None

    def fate(self, *, encrypts: bool | None, announced: bool) -> Fate:
        """Decides what becomes of it.

        Args:
            encrypts: Whether connections between the nodes are encrypted, None while that is not known.
            announced: It is one of an announced target's: the launcher is dialled when the source has said GO, and not
                before (`greeting`); a source that has not said it goes another way.

        Returns:
            RELAY to begin to relay it; SET_UP where the rest can be done anew, as far as is known; ABANDON where it
            cannot, and the other node sees a reset.
        """
        if self.name.role is Role.SOURCE or (encrypts is False and not announced):
            return Fate.SET_UP
        # A target dials the launcher for nobody who has not authenticated.
        is_secured = encrypts is False or offloaded(self.accepted) == (True, True)
        if is_secured and self.dialled and is_connected(self.dialled):
            return Fate.RELAY
        return Fate.SET_UP if encrypts is None else Fate.ABANDON

    def close(self) -> None:
        """Breaks it, so that neither peer takes it for complete."""
        self.lease.drop()
        for leg in filter(None, (self.accepted, self.dialled)):
            reset(leg)


@dataclass(slots=True)
class RelayedLeft:
    """A connection that the relay moves, or has moved to its end."""

    name: Name
    lease: Lease
    left: Left


@dataclass(slots=True)
class Inheritance:
    """What is left of one side of one migration.

    Attributes:
        state: What the dead daemon knew of it, None where it had not said.
        listeners, connections: The connections that were being set up in the order in which they began.
        relayed: The connections that the relay moves, or moved.
    """

    state: ProxyState | None = None
    listeners: list[LeftListener] = field(default_factory=list)
    connections: list[LeftConnection] = field(default_factory=list)
    relayed: list[RelayedLeft] = field(default_factory=list)


Key = tuple[str, Role]
"""A migration's fingerprint, and the role."""


def sort(contents: Contents, relay: RelayClient) -> dict[Key, Inheritance]:
    """Sorts what an earlier daemon left by migration and role.

    Args:
        contents: What the relay has; owned by the result. What is of no use is closed, and dropped there.
        relay: Keeps the result's leases.
    """
    found: dict[Key, Inheritance] = {}
    for text, words in contents.notes.items():
        relay.adopt_note(text, words)
        if known := _read(text, words):
            migration = Migration(known.namespace, known.name, known.vmi_uid, known.migration_uid)
            found[fingerprint(migration), Role(known.role)] = Inheritance(known)
        else:
            relay.forget_note(text)
    for text, left in sorted(contents.kept.items(), key=lambda item: item[0].rpartition(".")[2]):
        lease = relay.adopt(text, left)
        name = parse_name(text)
        if name is None:
            log.error("another version of migproxy left something: it is ended", name=text)
            lease.drop()
            close_all(left.fds)
            continue
        _add(found.setdefault((name.migration, name.role), Inheritance()), name, lease, left)
    return found


def _read(text: str, words: str) -> ProxyState | None:
    if not text.startswith(_STATE + "."):
        return None
    try:
        return state.read(words)
    except StateError as error:
        log.error("what an earlier daemon noted is of no use: what it counted is lost", error=str(error))
        return None


def _add(inheritance: Inheritance, name: Name, lease: Lease, left: Left) -> None:
    if left.way:
        inheritance.relayed.append(RelayedLeft(name, lease, left))
        return
    first, *more = (socket.socket(fileno=fd) for fd in left.fds)
    first.setblocking(False)
    if name.kind is Kind.CONNECTION:
        connection = LeftConnection(name, lease, first, *more)
        if first.family == socket.AF_UNIX or is_connected(first):
            inheritance.connections.append(connection)
        else:  # reset by a daemon whose last words have not reached the relay
            connection.close()
        return
    listener = LeftListener(name, first, lease)
    if _listens(first):
        inheritance.listeners.append(listener)
    else:  # shut down by a daemon whose last words have not reached the relay
        listener.close()


def _listens(sock: socket.socket) -> bool:
    """Whether a socket is a listener, and has not been shut down."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
