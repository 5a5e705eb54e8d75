"""What daemon and relay say to each other: messages to bytes and back, and the descriptors that go with them. Pure.

A message is one packet of a unix socket (SOCK_SEQPACKET), a JSON object whose "is" names it. The daemon begins with
Hello; the relay answers with everything that it has (Welcome, any number of Noted and Kept, Synced), or with Refused.

What belongs together has a name, which the daemon chooses. Under a name the relay keeps a few descriptors, which
another Keep or Move replaces; a connection that it moves it keeps until the daemon says Drop, also when it has ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Final, TypeVar

T = TypeVar("T")

VERSION: Final = 3

MOST_BYTES: Final = 1 << 16
"""In one message; a unix socket takes more than that at once."""

MOST_FDS: Final = 16
"""With one message, a few more than any needs."""

MOST_NAMES: Final = 256
"""Names in one message."""

_NAME_LENGTH = 200
_WORDS_LENGTH = MOST_BYTES // 2
_LONGEST_ESCAPE = 12  # bytes that a character may take (RFC 8259, 7)
_to_json = json.JSONEncoder(separators=(",", ":")).encode
_from_json = json.JSONDecoder().decode


class ProtocolError(Exception):
    """What arrived is no message of this protocol; says why."""


class Way(StrEnum):
    """How the relay moves a connection: spliced as it is, spliced through kernel TLS, or in user-space TLS."""

    SPLICED = "spliced"
    KTLS = "ktls"
    TLS = "user-space"


@dataclass(frozen=True, slots=True)
class Hello:
    """The daemon's first message.

    Attributes:
        version: Of this protocol.
        program: The daemon's version, for people.
    """

    version: int
    program: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Keeps the descriptors that come with it, for the next daemon: a listener, or the legs of a connection."""

    name: str


@dataclass(frozen=True, slots=True)
class Move:
    """Moves a connection from now on.

    With it come the launcher's socket, the other node's, the reader and the writer of the pipe to the network, those of
    the pipe to the launcher, and the memory in which the relay counts. In user-space TLS there are no pipes, and last
    comes the reader of one that holds the keys (`records.pack`), which a worker alone reads.
    """

    name: str
    way: Way


@dataclass(frozen=True, slots=True)
class Note:
    """Keeps words for the next daemon, and drops names in the same instant.

    Attributes:
        words: Not looked at.
    """

    name: str
    words: str
    drops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drop:
    """Forgets names, and what is kept under them; a connection that is moved is broken."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sync:
    """Asks for Synced with the same number, when everything before it is done."""

    number: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Lets a relay that was told to end do so as soon as it moves nothing: the daemon stays, and has everything."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The relay's first answer.

    Attributes:
        version: Of this protocol.
        program: The relay's version, for people.
        pid: Its process.
        limit: How many descriptors it can keep.
        memory: Bytes that its cgroup may have; 0 where nothing limits them, or an older relay does not say.
    """

    version: int
    program: str
    pid: int
    limit: int
    memory: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """The relay does not do what it was asked.

    Attributes:
        why: And what to do.
        name: What was to be kept or moved; empty where the daemon itself is refused.
    """

    why: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """A connection is not moved any more: its sockets are closed, with a reset where an error broke it.

    Attributes:
        number: The error's (errno(3)); 0 where both directions have ended.
        error: The error, for people.
        reason: Of an error of TLS.
    """

    name: str
    number: int = 0
    error: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the relay has under a name; the descriptors come with it, as they came.

    Attributes:
        way: How it is moved, None where it is not. Of a connection that has ended only the memory comes, and Ended
            follows.
    """

    name: str
    way: Way | None = None


@dataclass(frozen=True, slots=True)
class Noted:
    """Words that the relay has."""

    name: str
    words: str


@dataclass(frozen=True, slots=True)
class Synced:
    """Everything that came before Sync is done; after Welcome, with the number 0: this is all that the relay has."""

    number: int


@dataclass(frozen=True, slots=True)
class Ending:
    """The relay was told to end."""


FromDaemon = Hello | Keep | Move | Note | Drop | Sync | Leave
FromRelay = Welcome | Refused | Kept | Noted | Synced | Ended | Ending

_TO_RELAY: dict[str, type[FromDaemon]] = {
    kind.__name__.lower(): kind for kind in (Hello, Keep, Move, Note, Drop, Sync, Leave)
}
_TO_DAEMON: dict[str, type[FromRelay]] = {
    kind.__name__.lower(): kind for kind in (Welcome, Refused, Kept, Noted, Synced, Ended, Ending)
}
_FDS: dict[type, Sequence[int]] = {Keep: range(1, 3), Kept: range(1, 8)}
_NONE = (0,)
_MOVED = {Way.SPLICED: (7,), Way.KTLS: (7,), Way.TLS: (4,)}


def encode(message: FromDaemon | FromRelay) -> bytes:
    """Makes a packet of a message.

    Raises:
        ProtocolError: Nobody would take it: a name or text is too long, or all of it.
    """
    kind = type(message)
    values = {name: check(name, getattr(message, name)) for name, check in _FIELDS[kind].items()}
    packet = _to_json({"is": kind.__name__.lower(), **values}).encode()
    _check_length(packet)
    return packet


def for_relay(packet: bytes, fds: int) -> FromDaemon:
    """Reads a packet that a daemon sent.

    Args:
        fds: How many descriptors came with it.

    Raises:
        ProtocolError: It is none, or has not the descriptors that belong to it.
    """
    return _decode(_TO_RELAY, packet, fds)


def for_daemon(packet: bytes, fds: int) -> FromRelay:
    """Reads a packet that a relay sent; see `for_relay`."""
    return _decode(_TO_DAEMON, packet, fds)


def _decode(kinds: Mapping[str, type[T]], packet: bytes, fds: int) -> T:
    _check_length(packet)
    try:
        values = _from_json(packet.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError("not JSON") from error
    if not isinstance(values, dict):
        raise ProtocolError("no JSON object")
    label = str(values.get("is"))
    kind = kinds.get(label)
    if kind is None:
        raise ProtocolError("a message that nobody here knows")
    # A field that is unknown belongs to a later version, which may add some.
    given = {name: check(name, values[name]) for name, check in _FIELDS[kind].items() if name in values}
    try:
        message = kind(**given)
    except TypeError as error:
        raise ProtocolError(f"{label} lacks a field") from error
    if fds not in (_MOVED[message.way] if isinstance(message, Move) else _FDS.get(kind, _NONE)):
        raise ProtocolError(f"{label} came with {fds} descriptors")
    return message


def _check_length(packet: bytes) -> None:
    if len(packet) > MOST_BYTES:
        raise ProtocolError(f"a message of {len(packet)} bytes or more; {MOST_BYTES} are allowed")


def _number(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ProtocolError(f"{name} is no number")
    return value


def _text(name: str, value: object) -> str:
    # As it is sent: what one side took it has to be able to say to the other.
    if not isinstance(value, str) or (
        len(value) * _LONGEST_ESCAPE > _WORDS_LENGTH and len(_to_json(value)) > _WORDS_LENGTH
    ):
        raise ProtocolError(f"{name} is no text of a reasonable length")
    if name in ("name", "program") and (len(value) > _NAME_LENGTH or not value.isprintable()):
        raise ProtocolError(f"{name} is no name")
    return value


def _names(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > MOST_NAMES:
        raise ProtocolError(f"{name} is no list of a reasonable length")
    return tuple(_text("name", one) for one in value)


def _way(name: str, value: object) -> Way:
    try:
        return Way(value)  # type: ignore[arg-type]
    except ValueError as error:
        raise ProtocolError(f"{name} is no way to move a connection") from error


def _way_or_none(name: str, value: object) -> Way | None:
    return None if value is None else _way(name, value)


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "int": _number,
    "str": _text,
    "tuple[str, ...]": _names,
    "Way": _way,
    "Way | None": _way_or_none,
}

_FIELDS: dict[type, dict[str, Callable[[str, object], object]]] = {
    kind: {one.name: _CHECKS[str(one.type)] for one in fields(kind)}
    for kind in (*_TO_RELAY.values(), *_TO_DAEMON.values())
}
