"""One accepted connection: its two sockets, the two pumps between them, and what they have moved."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import socket
import struct
import termios
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from migproxy import tcpinfo
from migproxy.splice import Pump, Transport, shutdown
from migproxy.threads import Threads
from migproxy.verify import Reason, TLSError

_FLUSH_SECONDS = 5.0

_threads = Threads(linger=1.0)


class Relay:
    """A connection between a launcher's unix socket and the other node; owns both, and closes both.

    Each direction has a thread that blocks in the kernel and holds Python's lock for microseconds at a time, so
    that a relay at full speed leaves the event loop free. (Non-blocking splices on readiness measured 7 % slower,
    and would share one thread.)

    Attributes:
        opened: When it was made (`time.monotonic`).
    """

    def __init__(self, unix: socket.socket, transport: Transport) -> None:
        self.opened = time.monotonic()
        self._unix = unix
        self._tcp = transport.tcp
        self._stopped = False
        self._first_error: OSError | None = None
        self._last_tcp_info: tcpinfo.TCPInfo | None = None
        for sock in (unix, self._tcp):
            sock.setblocking(True)
        self._send = transport.sending(unix)
        try:
            self._receive = transport.receiving(unix)
        except OSError:
            self._send.close()
            raise

    @property
    def sent(self) -> int:
        """Bytes taken from the launcher and handed to TCP."""
        return self._send.moved

    @property
    def received(self) -> int:
        """Bytes taken from TCP and handed to the launcher."""
        return self._receive.moved

    @property
    def spliced(self) -> tuple[int, int]:
        """Of the bytes sent and received, those that never left the kernel."""
        send, receive = self._send, self._receive
        return send.moved if send.spliced else 0, receive.moved if receive.spliced else 0

    @property
    def modes(self) -> Counter[str]:
        """Bytes both ways, by how they moved."""
        modes: Counter[str] = Counter()
        for pump in (self._send, self._receive):
            modes[pump.mode] += pump.moved
        return modes

    @property
    def tcp_info(self) -> tcpinfo.TCPInfo | None:
        """TCP's own view of the connection; of a closed one, the last there was."""
        return self._last_tcp_info or tcpinfo.read(self._tcp)

    async def run(self) -> None:
        """Pumps until both directions have ended, then closes both sockets.

        Raises:
            OSError: What broke the connection first; its TCP peer has been told by a reset, never by an end of
                stream that would pass for a complete one.
        """
        running: list[asyncio.Future[None]] = []
        cancelled: asyncio.CancelledError | None = None
        try:
            for pump in (self._send, self._receive):
                running.append(self._start(pump))
        except RuntimeError as error:  # no more threads to be had
            self._first_error = OSError(errno.EAGAIN, str(error))
            self.stop()
        for pump_ended in running:
            while not pump_ended.done():
                try:
                    await asyncio.shield(pump_ended)
                except asyncio.CancelledError as error:
                    cancelled = error
                    self.stop()
        try:
            if self._first_error and not self._stopped and self._send.error is None:
                await self._flush()
        finally:
            self._close(abort=self._stopped or self._first_error is not None)
        if cancelled:
            raise cancelled
        if self._first_error and not self._stopped:
            raise self._cause(self._first_error)

    def _cause(self, first: OSError) -> OSError:
        """The error to report: a peer's own word says more than the reset that follows it and may be noticed first."""
        heard = self._receive.error
        return heard if isinstance(heard, TLSError) and heard.reason is Reason.REFUSED_BY_PEER else first

    def _start(self, pump: Pump) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def work() -> None:
            pump.run()
            self._first_error = self._first_error or pump.error
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(ended.set_result, None)

        _threads.start(work)
        return ended

    def stop(self) -> None:
        """Ends both directions at once; `run` then returns, and the TCP peer sees a reset."""
        self._stopped = True
        for sock in (self._unix, self._tcp):
            with suppress(OSError):
                shutdown(sock, socket.SHUT_RDWR)

    async def _flush(self) -> None:
        """Waits until TCP has delivered what the launcher wrote before it went away: a reset would discard it."""
        deadline = time.monotonic() + _FLUSH_SECONDS
        while _unsent(self._tcp) and time.monotonic() < deadline and not self._stopped:
            await asyncio.sleep(0.01)

    def _close(self, *, abort: bool) -> None:
        self._last_tcp_info = tcpinfo.read(self._tcp)
        if abort:
            with suppress(OSError):
                self._tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for closing in (self._tcp, self._unix, self._send, self._receive):
            closing.close()


def _unsent(tcp: socket.socket) -> int:
    """Bytes in the send queue that the peer has not acknowledged (tcp(7), SIOCOUTQ)."""
    with suppress(OSError):
        return int.from_bytes(fcntl.ioctl(tcp, termios.TIOCOUTQ, bytes(4)), "little")
    return 0


@dataclass
class Traffic:
    """What one channel of one migration has carried; read at any time, at no cost to the relays.

    Attributes:
        connections: Connections relayed so far.
        failures: Connections that ended with an error, dialling included, by reason (`measure.FAILURES`).
        relays: Those that are open now.
    """

    connections: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    relays: set[Relay] = field(default_factory=set)
    _sent: int = 0
    _received: int = 0
    _spliced: tuple[int, int] = (0, 0)
    _modes: Counter[str] = field(default_factory=Counter)
    _retransmits: int = 0

    @property
    def failed(self) -> int:
        """Connections that ended with an error."""
        return self.failures.total()

    @property
    def sent(self) -> int:
        """Bytes from the launcher to the network, all connections."""
        return self._sent + sum(relay.sent for relay in self.relays)

    @property
    def received(self) -> int:
        """Bytes from the network to the launcher, all connections."""
        return self._received + sum(relay.received for relay in self.relays)

    @property
    def spliced(self) -> tuple[int, int]:
        """Of the bytes sent and received, those that never left the kernel."""
        each = [self._spliced, *(relay.spliced for relay in self.relays)]
        return sum(sent for sent, _ in each), sum(received for _, received in each)

    @property
    def modes(self) -> Counter[str]:
        """Bytes both ways, by how they moved, all connections."""
        return sum((relay.modes for relay in self.relays), self._modes)

    @property
    def retransmits(self) -> int:
        """Segments that TCP sent again, all connections."""
        return self._retransmits + sum(info.retransmits for info in self.tcp_infos)

    @property
    def tcp_infos(self) -> list[tcpinfo.TCPInfo]:
        """TCP's view of each open connection."""
        return [info for relay in self.relays if (info := relay.tcp_info)]

    def begin(self, relay: Relay) -> None:
        """Counts a relay as open."""
        self.connections += 1
        self.relays.add(relay)

    def end(self, relay: Relay) -> None:
        """Counts a relay as over, and keeps what it moved."""
        self._spliced = (self._spliced[0] + relay.spliced[0], self._spliced[1] + relay.spliced[1])
        self.relays.discard(relay)
        self._sent += relay.sent
        self._received += relay.received
        self._modes += relay.modes
        if relay.tcp_info:
            self._retransmits += relay.tcp_info.retransmits
