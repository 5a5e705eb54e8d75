"""What protects the connections between the two nodes: the one place that decides between mTLS and plaintext.

mTLS is KubeVirt's default (its `migrations.disableTLS` turns it off) and is what this proxy demands unless it is told
otherwise; certificates are not implemented yet, so today it has to be told.
"""

from __future__ import annotations

import socket
from typing import Protocol


class SecurityError(Exception):
    """The connections between the nodes cannot be protected as demanded."""


class Security(Protocol):
    """Protects one TCP connection after it is made and before a byte of the launcher's crosses it."""

    async def secure(self, tcp: socket.socket, *, server: bool) -> socket.socket:
        """Does what the peers must do first, and returns the socket to relay.

        Args:
            tcp: The connected socket; owned by whoever gets the result.
            server: Whether this end accepted the connection (the target does).
        """


class Plaintext:
    """No protection: every byte of the guest's memory crosses the migration network readable."""

    async def secure(self, tcp: socket.socket, *, server: bool) -> socket.socket:
        return tcp


def security(*, disable_tls: bool) -> Security:
    """Returns what protects this daemon's connections.

    Raises:
        SecurityError: Plaintext was not asked for, and mTLS cannot be had.
    """
    if disable_tls:
        return Plaintext()
    raise SecurityError(
        "mTLS is the default, and this version cannot load certificates yet: nothing is relayed unprotected unless "
        "you ask for it. On a migration network that you trust, start with --disable-tls (the other end must have TLS "
        "off too; in KubeVirt: spec.configuration.migrations.disableTLS)."
    )
