"""A migration's memory without a guest: bytes through the direct channel of two daemons."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from demo.lab import Lab, background
from migproxy.portmap import Channel, source_socket_name, target_socket_path

_PERIOD = 0.05  # seconds between two portions


@dataclass(slots=True)
class Flow:
    """What has arrived so far: bytes, and whether the sender has ended.

    Args:
        rate: bytes per second and connection to send; None for as fast as it goes.
    """

    rate: int | None
    arrived: int = 0
    sent: int = 0
    _ending: asyncio.Event = field(default_factory=asyncio.Event)

    async def arrive(self, count: int) -> None:
        """Waits until so many bytes have arrived."""
        async with asyncio.timeout(60):
            while self.arrived < count:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def flowing(lab: Lab, rate: int | None = None, connections: int = 1) -> AsyncIterator[Flow]:
    """Sends bytes from node01's launcher to node02's until the context ends; then all that was sent has arrived."""
    key = lab.vmi.read()["metadata"]["uid"]
    source, target = lab.nodes
    flow = Flow(rate)
    arrival = target.run_dir / target_socket_path(key, Channel.DIRECT, "libvirt/libvirt-sock")
    departure = source.migrationproxy / source_socket_name(key, Channel.DIRECT)
    ended = [asyncio.Event() for _ in range(connections)]
    waiting = iter(ended)

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            flow.arrived += len(data)
        writer.close()
        next(waiting).set()

    async with AsyncExitStack() as stack:
        arrival.parent.mkdir(parents=True, exist_ok=True)
        server = await asyncio.start_unix_server(take, _short(stack, arrival), limit=1 << 20)
        stack.callback(arrival.unlink, missing_ok=True)
        stack.push_async_callback(server.wait_closed)
        stack.callback(server.close)
        for _ in range(connections):
            _, writer = await asyncio.open_unix_connection(_short(stack, departure))
            await stack.enter_async_context(background(_send(flow, writer)))
            stack.callback(writer.close)
        yield flow
        flow._ending.set()
        async with asyncio.timeout(60):
            await asyncio.gather(*(event.wait() for event in ended))


def _short(stack: AsyncExitStack, path: Path) -> str:
    """A path that fits a socket address, however long that of its folder is."""
    folder = os.open(path.parent, os.O_PATH)
    stack.callback(os.close, folder)
    return f"/proc/self/fd/{folder}/{path.name}"


async def _send(flow: Flow, writer: asyncio.StreamWriter) -> None:
    portion = os.urandom(1 << 20 if flow.rate is None else max(1, int(flow.rate * _PERIOD)))
    while not flow._ending.is_set():
        writer.write(portion)
        flow.sent += len(portion)
        await writer.drain()
        if flow.rate is not None:
            await asyncio.sleep(_PERIOD)
    writer.write_eof()
