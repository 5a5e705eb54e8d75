"""What a target announces before virt-handler publishes: pure, the text of one annotation.

KubeVirt's own virt-handler publishes where a target listens; the admission policy of deploy/beside-virt-handler puts
the announced ports into that very write, if the announcement is about the same migration, address and channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from migproxy.portmap import (
    AddressError,
    IPAddress,
    PortMap,
    PortMapError,
    parse_address,
    parse_port_map,
    unknown_channels,
)

TARGET_ANNOTATION = "migproxy.io/target"


@dataclass(frozen=True, slots=True)
class Announcement:
    """Where this node listens for one migration.

    Args:
        migration_uid: of that migration alone: for any other, the announcement is stale.
        ports: by channel.
        address: the one that virt-handler will publish; with any other, the announcement is stale.
    """

    migration_uid: str
    ports: PortMap
    address: IPAddress

    def __str__(self) -> str:
        ports = ",".join(f"{port}:{int(channel)}" for channel, port in self.ports.ports)
        return f"{self.migration_uid} {ports} {self.address}"


def parse_announcement(text: str | None) -> Announcement | None:
    """Read the annotation; None where there is none, or none that the admission policy would act on."""
    parts = (text or "").split(" ")
    if len(parts) != 3 or not parts[0]:
        return None
    try:
        pairs = [pair.split(":") for pair in parts[1].split(",")]
        raw = {port: int(channel) for port, channel in pairs}
        if len(raw) != len(pairs) or unknown_channels(raw):
            return None
        return Announcement(parts[0], parse_port_map(raw), parse_address(parts[2]))
    except (ValueError, PortMapError, AddressError):
        return None
