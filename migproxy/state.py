"""What a daemon knows of its migrations that their descriptors do not tell: a small file for the one that comes after.

Which descriptors belong together stands in their names in the store (`survival`), never here: a file that is old,
torn or lost costs counters, and pairs nothing wrongly.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from migproxy.portmap import Channel

VERSION = 1
"""Of the file's format and of the descriptors' names. Another one is refused: what it means is unknown."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class StateError(Exception):
    """The state file cannot be used; says why."""


class UnknownVersion(StateError):
    """The state is of a version that this daemon does not know."""


def _one_of(*known: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in known:
            raise ValueError(f"{text!r} is none of {', '.join(known)}")
        return text

    return check


Label = Annotated[str, AfterValidator(_one_of(*(channel.label for channel in Channel)))]
Side = Annotated[str, AfterValidator(_one_of("source", "target"))]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class RelayState(_Record):
    """An open connection.

    Attributes:
        channel: Its channel's label.
        sent, received: Bytes that it had moved.
        wire_sent, wire_received: Bytes that its TCP socket had been given and had given out by then.
        resumable: Whether its descriptors are in the store; user-space TLS dies with the process.
    """

    channel: Label
    sent: int = 0
    received: int = 0
    wire_sent: int = 0
    wire_received: int = 0
    resumable: bool = True


class ChannelState(_Record):
    """What the connections of a channel that are over have moved, and how they ended."""

    connections: int = 0
    failures: dict[str, int] = {}
    sent: int = 0
    received: int = 0
    spliced: tuple[int, int] = (0, 0)
    modes: dict[str, int] = {}
    retransmits: int = 0


class ProxyState(_Record):
    """One side of one migration.

    Attributes:
        began: When it was first made (`time.time`).
        channels: By label.
        relays: By the name of their lease.
    """

    namespace: str
    name: str
    vmi_uid: str
    migration_uid: str
    role: Side
    began: float
    channels: dict[Label, ChannelState] = {}
    relays: dict[str, RelayState] = {}


class State(_Record):
    """The whole file.

    Attributes:
        version: See VERSION.
        boot: The kernel's boot that it belongs to: descriptors do not survive another one.
        proxies: Of every migration that is served.
        ended: Names in the store that are over, and counted.
    """

    version: int = VERSION
    boot: str
    proxies: tuple[ProxyState, ...] = ()
    ended: frozenset[str] = frozenset()


def boot_id() -> str:
    """What the kernel calls this boot (random(4))."""
    return _BOOT_ID.read_text().strip()


def load(path: str) -> State | None:
    """Reads the state of the daemon before.

    Returns:
        None where there is none, or it belongs to another boot.

    Raises:
        UnknownVersion: A version that this daemon does not know wrote it.
        StateError: It cannot be read, or is no state.
    """
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error
    try:
        version = _Version.model_validate_json(text).version
        if version != VERSION:
            raise UnknownVersion(f"{path}: version {version}, and this migproxy knows version {VERSION}")
        state = State.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise StateError(f"{path}: {where + ': ' if where else ''}{problem['msg']}") from error
    return state if state.boot == boot_id() else None


class _Version(_Record):
    version: int


def save(path: str, state: State) -> None:
    """Writes the file, whole or not at all: whoever reads it sees the one before or this one.

    It need not survive the machine's end, as the descriptors do not either: nothing waits for a disk.

    Args:
        path: Its folder exists.

    Raises:
        OSError: It cannot be written; the one before stays.
    """
    temporary = f"{path}.new"
    content = state.model_dump_json().encode()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        written = 0
        while written < len(content):
            written += os.write(fd, content[written:])
    finally:
        os.close(fd)
    os.rename(temporary, path)
