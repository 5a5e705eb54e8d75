"""A connection between the two nodes after its handshake, and how the relay is to move it."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from migproxy.relay.protocol import Way

PLAINTEXT = "plaintext"


@dataclass(slots=True)
class Transport:
    """A secured connection.

    Attributes:
        tcp: The connected socket; whoever has the transport owns it.
        label: What protects the connection, for people.
        way: How the relay moves it.
        keys: Of user-space TLS (`records.pack`); empty otherwise. Whoever has used them wipes them.
    """

    tcp: socket.socket
    label: str = PLAINTEXT
    way: Way = Way.SPLICED
    keys: bytearray = field(default_factory=bytearray, repr=False)
