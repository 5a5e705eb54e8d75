"""A connection between the two nodes after its handshake, and who can move its bytes."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod

from migproxy.relay.protocol import Way
from migproxy.splice import Pump
from migproxy.tally import Tally

PLAINTEXT = "plaintext"


class KernelTransport:
    """A connection whose bytes stay in the kernel: the relay moves it.

    Attributes:
        tcp: The connected socket; whoever has the transport owns it.
        label: What protects the connection, for people.
        way: How the relay moves it.
    """

    def __init__(self, tcp: socket.socket, label: str = PLAINTEXT, way: Way = Way.SPLICED) -> None:
        self.tcp = tcp
        self.label = label
        self.way = way


class UserTransport(ABC):
    """A connection that is encrypted or decrypted in user space: this process has the keys, and moves it.

    Attributes:
        tcp, label: See KernelTransport.
    """

    def __init__(self, tcp: socket.socket, label: str) -> None:
        self.tcp = tcp
        self.label = label

    @abstractmethod
    def pumps(self, unix: socket.socket, tallies: tuple[Tally, Tally]) -> tuple[Pump, Pump]:
        """Makes the pumps of what the launcher sends and of what it receives; to be closed by the caller.

        Args:
            unix: The launcher's socket.
            tallies: Where they count.

        Raises:
            OSError: No descriptors are left.
        """


Transport = KernelTransport | UserTransport
