"""A relay in a thread of the test's own process, and the daemon's end of it."""

import asyncio
import socket
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from migproxy.connection import RelayedConnection
from migproxy.relay.client import RelayClient
from migproxy.relay.process import Relay
from migproxy.transport import Transport


def patience() -> float:
    """More seconds without an answer of the far node than a test lasts."""
    return 900.0


@asynccontextmanager
async def relaying() -> AsyncIterator[RelayClient]:
    """What hands connections to a relay that moves them while the context lasts."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # a unix socket's address has 107 bytes
        relay = Relay(f"{folder}/relay.sock")
        thread = threading.Thread(target=relay.serve)
        thread.start()
        client = RelayClient(f"{folder}/relay.sock")
        try:
            await client.open()
            yield client
        finally:
            await client.settle(20)
            client.close()
            relay.end()
            await asyncio.to_thread(thread.join)


async def carry(unix: socket.socket, transport: Transport) -> None:
    """Moves one connection to its end, as a daemon does."""
    async with relaying() as relay:
        await RelayedConnection(relay.lease("one"), unix, transport).run(patience)
