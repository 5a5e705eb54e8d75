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
        tcp: The connected socket; whoever has the transport owns it. A unix socket where the way to the other node is
            virt-handler's proxy.
        label: What protects the connection, for people.
        way: How the relay moves it.
        keys: Of user-space TLS (`records.pack`); empty otherwise. Whoever has used them wipes them.
        preface: What the peer is told before anything of the launcher's, by whoever moves the connection: until then
            it is not committed. With keys, they have it.
        is_migproxy: See `handshake.Secured`.
    """

    tcp: socket.socket
    label: str = PLAINTEXT
    way: Way = Way.SPLICED
    keys: bytearray = field(default_factory=bytearray, repr=False)
    preface: bytes = b""
    is_migproxy: bool = False
