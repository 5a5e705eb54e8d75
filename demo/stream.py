"""Hashed streams through the migration's sockets: what takes the virtual machine's place where there is none."""

import asyncio
import hashlib
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

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

    def send(self, sock: socket.socket, size: int, start: int, gate: Callable[[], object] = lambda: None) -> None:
        """Sends so many bytes, and the end of the stream; waits at the gate before each chunk."""
        while self.moved < size:
            gate()
            at = (start + self.moved // _CHUNK * 4099) % _CHUNK
            chunk = _RANDOM[at : at + min(_CHUNK, size - self.moved)]
            sock.sendall(chunk)
            self.hash.update(chunk)
            self.moved += len(chunk)
        sock.shutdown(socket.SHUT_WR)

    def receive(self, sock: socket.socket, gate: Callable[[], object] = lambda: None) -> None:
        """Receives until the end of the stream; waits at the gate before each chunk."""
        buffer = memoryview(bytearray(_CHUNK))
        while count := sock.recv_into(buffer):
            self.hash.update(buffer[:count])
            self.moved += count
            gate()


class Wires:
    """The launchers of a migration as one of its channels sees them: a context that owns the ends of connections.

    Args:
        source: the node on whose proxy's socket connections are made.
        target: the node on whose launcher's socket they arrive.
        key: the VMI's UID, which the sockets are named by.
        channel: which.
    """

    def __init__(self, source: Node, target: Node, key: str, channel: Channel) -> None:
        self.channel = channel
        self._arrival = target.run_dir / target_socket_path(key, channel, "libvirt/libvirt-sock")
        self._departure = source.migrationproxy / source_socket_name(key, channel)
        self._stack = ExitStack()
        self._listener = socket.socket(socket.AF_UNIX)
        self._connecting = asyncio.Lock()  # one after the other, or the ends would not be each other's

    def __enter__(self) -> Self:
        self._stack.enter_context(waking(self._listener))
        with short_path(self._arrival) as path:
            self._arrival.unlink(missing_ok=True)
            self._listener.bind(path)
        self._stack.callback(self._arrival.unlink)
        self._listener.listen()
        self._listener.setblocking(False)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def connect(self, seconds: float = 30) -> tuple[socket.socket, socket.socket]:
        """Makes a connection; returns the source launcher's end and the target launcher's, which block.

        Raises:
            ConnectionResetError: it ended before it arrived.
        """
        async with self._connecting:
            client = self._stack.enter_context(waking(socket.socket(socket.AF_UNIX)))
            with short_path(self._departure) as path:
                client.connect(path)
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            accepting = asyncio.ensure_future(loop.sock_accept(self._listener))
            ending = asyncio.ensure_future(ended.wait())
            loop.add_reader(client, ended.set)  # nothing is sent to it before it has arrived
            try:
                async with asyncio.timeout(seconds):
                    await asyncio.wait([accepting, ending], return_when=asyncio.FIRST_COMPLETED)
                if not accepting.done():
                    raise ConnectionResetError(f"a connection to {self._departure} ended before it arrived")
                server, _ = accepting.result()
            finally:
                loop.remove_reader(client)
                accepting.cancel()
                ending.cancel()
        server.setblocking(True)
        return client, self._stack.enter_context(waking(server))


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
        wires = stack.enter_context(Wires(self._source, self._target, self._key, channel))
        pairs = [await wires.connect() for _ in range(CONNECTIONS[channel])]
        return [(channel, end) for pair in pairs for end in pair]

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
def waking(sock: socket.socket) -> Iterator[socket.socket]:
    """Closes a socket at the end, and wakes the threads that wait on it."""
    with sock:
        try:
            yield sock
        finally:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A path to a socket that fits a socket address's 107 bytes, however long the path of its folder is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
