"""Hashed streams through the migration's sockets: what takes the virtual machine's place where there is none."""

import asyncio
import hashlib
import os
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from demo.lab import LabError, Node
from migproxy.portmap import Channel, source_socket_name, target_socket_path

CONNECTIONS = {Channel.LIBVIRT: 1, Channel.DIRECT: 4, Channel.BLOCK: 3}
_CHUNK = 1 << 20
_RANDOM = memoryview(os.urandom(2 * _CHUNK))


@dataclass(slots=True)
class Flow:
    """One direction of one connection: bytes moved so far, and their SHA-256.

    Two connections never send the same: each starts elsewhere in the random bytes, and goes on from there.
    """

    channel: Channel
    moved: int = 0
    hash: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def send(self, sock: socket.socket, size: int, start: int) -> None:
        """Sends so many bytes, and the end of the stream."""
        while self.moved < size:
            at = (start + self.moved // _CHUNK * 4099) % _CHUNK
            chunk = _RANDOM[at : at + min(_CHUNK, size - self.moved)]
            sock.sendall(chunk)
            self.hash.update(chunk)
            self.moved += len(chunk)
        sock.shutdown(socket.SHUT_WR)

    def receive(self, sock: socket.socket) -> None:
        """Receives until the end of the stream."""
        buffer = memoryview(bytearray(_CHUNK))
        while count := sock.recv_into(buffer):
            self.hash.update(buffer[:count])
            self.moved += count


class Streams:
    """Several connections per channel from a source to a target, each carrying bytes both ways at once.

    Args:
        source: the node on whose proxy's sockets the connections are made.
        target: the node on whose launcher's sockets they arrive.
        key: the VMI's UID, which the sockets are named by.
        size: bytes to move, both ways together; the libvirt channel's connection carries a hundredth of another's.
    """

    def __init__(self, source: Node, target: Node, key: str, size: int) -> None:
        self._source, self._target, self._key, self._size = source, target, key, size
        self._sent: list[Flow] = []
        self._received: list[Flow] = []

    def size(self, channel: Channel) -> int:
        """Bytes that a channel is to carry, both ways together."""
        return 2 * CONNECTIONS[channel] * self._flow_size(channel)

    def moved(self, channel: Channel) -> int:
        """Bytes that have arrived over a channel, both ways together."""
        return sum(flow.moved for flow in self._received if flow.channel is channel)

    async def exchange(self) -> None:
        """Moves the bytes.

        Raises:
            LabError: what arrived is not what was sent.
        """
        with ExitStack() as stack:
            flows = 4 * sum(CONNECTIONS.values())
            # Its end waits for the threads, which the sockets' end wakes: so it is entered first.
            threads = stack.enter_context(ThreadPoolExecutor(flows))
            pairs = [pair for channel in CONNECTIONS for pair in await self._connect(stack, channel)]
            await asyncio.gather(*(work for pair in pairs for work in self._start(threads, *pair)))
        sent, received = (Counter(flow.hash.hexdigest() for flow in side) for side in (self._sent, self._received))
        if sent != received:
            raise LabError(f"{sum((sent - received).values())} of {sent.total()} streams arrived with another hash")

    def _flow_size(self, channel: Channel) -> int:
        large = self._size // (2 * (CONNECTIONS[Channel.DIRECT] + CONNECTIONS[Channel.BLOCK]))
        return large // 100 if channel is Channel.LIBVIRT else large

    async def _connect(self, stack: ExitStack, channel: Channel) -> list[tuple[Channel, socket.socket]]:
        loop = asyncio.get_running_loop()
        arrival = self._target.run_dir / target_socket_path(self._key, channel, "libvirt/libvirt-sock")
        departure = self._source.migrationproxy / source_socket_name(self._key, channel)
        listener = stack.enter_context(_waking(socket.socket(socket.AF_UNIX)))
        with _short(arrival) as path:
            arrival.unlink(missing_ok=True)
            listener.bind(path)
        stack.callback(arrival.unlink)
        listener.listen()
        listener.setblocking(False)
        ends = []
        for _ in range(CONNECTIONS[channel]):
            client = stack.enter_context(_waking(socket.socket(socket.AF_UNIX)))
            with _short(departure) as path:
                client.connect(path)
            server, _address = await asyncio.wait_for(loop.sock_accept(listener), 30)
            server.setblocking(True)
            ends += [client, stack.enter_context(_waking(server))]
        return [(channel, end) for end in ends]

    def _start(
        self, threads: ThreadPoolExecutor, channel: Channel, end: socket.socket
    ) -> Iterator["asyncio.Future[None]"]:
        loop = asyncio.get_running_loop()
        sending, receiving = Flow(channel), Flow(channel)
        start = len(self._sent) * _CHUNK // (2 * sum(CONNECTIONS.values()))
        self._sent.append(sending)
        self._received.append(receiving)
        yield loop.run_in_executor(threads, sending.send, end, self._flow_size(channel), start)
        yield loop.run_in_executor(threads, receiving.receive, end)


@contextmanager
def _waking(sock: socket.socket) -> Iterator[socket.socket]:
    """Closes a socket at the end, and wakes the threads that wait on it."""
    with sock:
        try:
            yield sock
        finally:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A path to a socket that fits a socket address's 107 bytes, however long the path of its folder is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
