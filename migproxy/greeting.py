"""What two migproxies say before an announced connection is relayed, so that no launcher sees one twice.

The target says READY once it knows the migration, and its launcher's socket is there. The source may go another way
until then, and as long as it has not answered. It hands the connection to its relay with GO as the first byte that is
sent: from then on the connection is the relay's, whatever becomes of the daemon, and takes no other way. The target
dials its launcher for GO alone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from migproxy.handshake import Secured
from migproxy.relay.records import HEADER, SLOT, Opener, Sealer
from migproxy.tlserrors import Reason, TLSError

READY: Final = b"\x05"  # ASCII's enquiry and acknowledge, with which nothing begins that comes here by mistake
GO: Final = b"\x06"

Greet = Callable[[], Awaitable[None]]
"""Returns when this end is ready; raises what keeps it from being so."""


class Wire(Protocol):
    """A connection between two nodes that is not relayed yet."""

    async def say(self, word: bytes) -> None:
        """Says a word of one byte."""

    async def hear(self) -> bytes:
        """Waits for the peer's word.

        Raises:
            TLSError: It has closed the connection, or says something else.
            OSError: The connection broke.
        """


class PlainWire:
    """One that is not encrypted."""

    def __init__(self, tcp: socket.socket) -> None:
        self._tcp = tcp

    async def say(self, word: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._tcp, word)

    async def hear(self) -> bytes:
        return await _receive(self._tcp, 1)


class SecureWire:
    """One in TLS, after its handshake, before the keys have gone to whoever moves the connection.

    Args:
        secured: Counts the records that are sent and received.
        is_client: This end is TLS's client.
    """

    def __init__(self, tcp: socket.socket, secured: Secured, *, is_client: bool) -> None:
        self._tcp, self._secured = tcp, secured
        self._sealer = Sealer(secured.sealing.copy())
        self._opener = Opener(secured.opening.copy(), is_client=is_client)
        self._plain = memoryview(bytearray(SLOT))

    async def say(self, word: bytes) -> None:
        self._secured.sealing.sequence += 1
        await asyncio.get_running_loop().sock_sendall(self._tcp, self._sealer.data(word))

    async def hear(self) -> bytes:
        while True:
            header = await _receive(self._tcp, HEADER)
            record = header + await _receive(self._tcp, int.from_bytes(header[3:], "big"))
            _, filled = self._opener.open(memoryview(record), self._plain)
            self._secured.opening.sequence += 1
            if self._opener.ended:
                raise _closed()
            if self._opener.is_asked or filled > 1:
                raise TLSError(Reason.BAD_RECORD, "the peer is no migproxy: it says something else than is expected")
            if filled:  # else a ticket
                return bytes(self._plain[:1])

    def close(self) -> None:
        """Forgets the keys."""
        self._sealer.close()
        self._opener.close()


async def greet(wire: Wire, ready: Greet, *, server: bool) -> None:
    """Says what this end has to say; the source's GO is its relay's to send.

    Args:
        ready: Awaited before this end says that it is, and by a source before it may answer.
        server: This end is the target.

    Raises:
        TLSError: The peer does not go on, or is no migproxy of this version.
        OSError: The connection broke.
    """
    if server:
        await ready()
        await wire.say(READY)
    if await wire.hear() != (GO if server else READY):
        raise TLSError(Reason.HANDSHAKE, "the peer is no migproxy of this version")
    if not server:
        await ready()


async def _receive(tcp: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            more = await asyncio.get_running_loop().sock_recv(tcp, size - len(data))
        except ConnectionResetError as error:
            raise _closed() from error
        if not more:
            raise _closed()
        data += more
    return data


def _closed() -> TLSError:
    return TLSError(Reason.CLOSED, "the other node's migproxy closed the connection before it was ready")
