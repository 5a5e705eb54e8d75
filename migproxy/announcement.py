"""How two migproxies find each other beside virt-handler: the text of an annotation, and a migration's name. Pure.

What virt-handler publishes stays as it is. A target's migproxy announces on the VMI where it listens, and the source's
prefers that to virt-handler's own way.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from migproxy.portmap import AddressError, IPAddress, PortMap, PortMapError, parse_address, parse_port_map

TARGET_ANNOTATION: Final = "migproxy.io/target"

_VERSION: Final = "1"
"""Of the annotation, and of what is said on the connections to where it leads (`greeting`)."""

_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123, 2.1


@dataclass(frozen=True, slots=True)
class Announcement:
    """Where a target listens for one migration.

    Args:
        migration_uid: of that migration alone: for any other, the announcement is stale.
        ports: by channel.
        address: the target node's migration address.
    """

    migration_uid: str
    ports: PortMap
    address: IPAddress

    def __str__(self) -> str:
        ports = ",".join(f"{port}:{int(channel)}" for channel, port in self.ports.ports)
        return f"{_VERSION} {self.migration_uid} {ports} {self.address}"


class AnnouncementError(ValueError):
    """What is announced cannot be used; says why.

    Attributes:
        is_version: It is of another version.
    """

    def __init__(self, message: str, *, is_version: bool = False) -> None:
        super().__init__(message)
        self.is_version = is_version


def parse_announcement(text: str) -> Announcement:
    """Read the annotation.

    Raises:
        AnnouncementError: it is of another version, or malformed.
    """
    version, *parts = text.split(" ")
    if version != _VERSION:
        raise AnnouncementError(f"announced by another version of migproxy: {text[:100]!r}", is_version=True)
    try:
        migration_uid, ports, address = parts
        pairs = [pair.split(":") for pair in ports.split(",")]
        raw = {port: int(channel) for port, channel in pairs}
        if len(raw) != len(pairs) or not migration_uid:
            raise ValueError("a port or the migration is not told")
        return Announcement(migration_uid, parse_port_map(raw), parse_address(address))
    except (ValueError, PortMapError, AddressError) as error:
        raise AnnouncementError(f"what is announced is malformed: {text[:100]!r}: {error}") from None


def server_name(vmi_uid: str, migration_uid: str) -> str:
    """The TLS server name by which a source tells the target which migration it means (RFC 6066, 3)."""
    labels = (
        uid if _LABEL.fullmatch(uid) else f"x{hashlib.sha256(uid.encode()).hexdigest()[:40]}"
        for uid in (vmi_uid, migration_uid)
    )
    return ".".join((*labels, "migration.migproxy.io"))
