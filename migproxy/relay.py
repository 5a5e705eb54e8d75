"""One accepted connection: its two sockets, the two pumps between them, and what they have moved."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from migproxy import tcpinfo
from migproxy.fdstore import Lease
from migproxy.ktls import KernelSend, KernelTransport, offloaded
from migproxy.portmap import Channel
from migproxy.sockets import disconnect, reset
from migproxy.splice import Pipe, Pump, Splice, Transport, shutdown
from migproxy.state import ChannelState, RelayState
from migproxy.threads import Threads
from migproxy.verify import Reason, TLSError

_FLUSH_SECONDS = 5.0

_threads = Threads(linger=1.0)


class Relay:
    """A connection between a launcher's unix socket and the other node; owns both, and closes both.

    All of a relay that stays in the kernel is in its descriptors: the two sockets, and a pipe for each direction with
    the bytes in flight. Of each pipe one end is stored, of which the other is made again: the reader of the pipe to
    the network, the writer of the pipe to the launcher, so that they cannot be mistaken for each other.

    Each direction has a thread that blocks in the kernel and holds Python's lock for microseconds at a time, so
    that a relay at full speed leaves the event loop free. (Non-blocking splices on readiness measured 7 % slower,
    and would share one thread.)

    Attributes:
        opened: When it was made (`time.monotonic`).
        lease: Under which the two sockets are stored; released at the end.

    Args:
        pipes: To the network and to the launcher, of the daemon before; owned by the relay from now on.
    """

    def __init__(
        self,
        unix: socket.socket,
        transport: Transport,
        lease: Lease | None = None,
        pipes: tuple[Pipe | None, Pipe | None] = (None, None),
    ) -> None:
        self.opened = time.monotonic()
        self.lease = lease or Lease("")
        self.resumable = transport.resumable
        self._unix = unix
        self._tcp = transport.tcp
        self._stopped = False
        self._first_error: OSError | None = None
        self._running: dict[Pump, asyncio.Future[None]] = {}
        self._last_tcp_info: tcpinfo.TCPInfo | None = None
        self._send = transport.sending(unix, pipes[0])
        try:
            self._receive = transport.receiving(unix, pipes[1])
        except OSError:
            self._send.close()
            raise
        if not self.resumable:
            # So that both peers notice at once when this process dies.
            self.lease.release(keep_record=False)
        elif pipes == (None, None):
            assert isinstance(self._send, Splice)
            assert isinstance(self._receive, Splice)
            self.lease.add(self._send.pipe.reader, self._receive.pipe.writer)

    @classmethod
    def resume(cls, unix: socket.socket, tcp: socket.socket, lease: Lease, ends: tuple[int, int] | None) -> Relay:
        """Goes on with the connection of a daemon that is dead, plain or encrypted by the kernel.

        Args:
            ends: The stored ends of its pipes, to the network and to the launcher; None where it had none yet.

        Raises:
            OSError: No descriptors are left; everything stays open.
        """
        transport = KernelTransport(tcp, "kernel TLS") if offloaded(tcp) == (True, True) else Transport(tcp)
        if ends is None:
            return cls(unix, transport, lease)
        to_network = Pipe.reopen(ends[0])
        try:
            return cls(unix, transport, lease, (to_network, Pipe.reopen(ends[1])))
        except OSError:
            os.close(to_network.writer)
            raise

    def count_on(self, before: RelayState | None, *, dialled: bool) -> None:
        """Goes on counting where an earlier daemon was killed, before it runs.

        Without encryption the kernel knows the figures exactly. With it, it knows those of the encrypted bytes: what
        was added since the state file was written is counted as them, a little more than the payload.

        Args:
            before: What the state file says, None where it says nothing.
            dialled: See `carried`.
        """
        sent, received = self.carried(dialled=dialled)
        if before:
            if self._send.mode == KernelSend.mode:
                sent += before.sent - before.wire_sent
                received += before.received - before.wire_received
            # A reset of our own clears the kernel's figures.
            sent, received = max(sent, before.sent), max(received, before.received)
        self._send.count_from(sent)
        self._receive.count_from(received)

    def carried(self, *, dialled: bool) -> tuple[int, int]:
        """Bytes that TCP was given, and that have left it for the launcher: with encryption, more than the payload.

        Args:
            dialled: Whether this end made the TCP connection.
        """
        given, taken = tcpinfo.carried(self._tcp, dialled=dialled)
        return given, taken - self._receive.pending

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
    def pumps(self) -> list[Pump]:
        """Those that run now."""
        return [pump for pump, ended in self._running.items() if not ended.done()]

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
        # From here on bytes may be in a pipe, and the next daemon knows it by this (`survival.Connection.fate`).
        for sock in (self._unix, self._tcp):
            sock.setblocking(True)
        cancelled: asyncio.CancelledError | None = None
        try:
            for pump in (self._send, self._receive):
                self._running[pump] = self._start(pump)
        except RuntimeError as error:  # no more threads to be had
            self._first_error = OSError(errno.EAGAIN, str(error))
            self.stop()
        for pump_ended in self._running.values():
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
        with suppress(OSError):
            disconnect(self._tcp)  # first: a FIN, or what a pump makes of the launcher's end, would look like an end
        for sock in (self._tcp, self._unix):
            with suppress(OSError):
                shutdown(sock, socket.SHUT_RDWR)

    def discard(self) -> None:
        """Ends it before it has run; the TCP peer sees a reset."""
        self._close(abort=True)

    async def _flush(self) -> None:
        """Waits until TCP has delivered what the launcher wrote before it went away: a reset would discard it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _FLUSH_SECONDS
        while (
            tcpinfo.unsent(self._tcp)
            and not tcpinfo.is_over(self._tcp)
            and loop.time() < deadline
            and not self._stopped
        ):
            await asyncio.sleep(0.01)

    def _close(self, *, abort: bool) -> None:
        self._last_tcp_info = tcpinfo.read(self._tcp)
        self.lease.release()
        if abort:
            for sock in (self._tcp, self._unix):
                reset(sock)
        for closing in (self._tcp, self._unix, self._send, self._receive):
            closing.close()


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

    @classmethod
    def restore(cls, state: ChannelState) -> Traffic:
        """Makes the counters that an earlier daemon left."""
        return cls(
            connections=state.connections,
            failures=Counter(state.failures),
            _sent=state.sent,
            _received=state.received,
            _spliced=state.spliced,
            _modes=Counter(state.modes),
            _retransmits=state.retransmits,
        )

    def state(self) -> ChannelState:
        """What is to be restored: all but what the relays that are open have moved."""
        return ChannelState(
            connections=self.connections - len(self.relays),
            failures=dict(self.failures),
            sent=self._sent,
            received=self._received,
            spliced=self._spliced,
            modes=dict(self._modes),
            retransmits=self._retransmits,
        )

    def lose(self, relay: RelayState) -> None:
        """Counts a connection that an earlier daemon relayed, and that did not survive it."""
        self.connections += 1
        self._sent += relay.sent
        self._received += relay.received

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


@dataclass
class Progress:
    """What one side of a migration has done so far, whichever proxy did it.

    Attributes:
        began: When it was first served (`time.time`).
        opened: When its first connection was relayed (`time.monotonic`), None before that.
        traffic: What each channel has carried.
        last_error: The latest connection's failure, for people.
    """

    began: float = field(default_factory=time.time)
    opened: float | None = None
    traffic: dict[Channel, Traffic] = field(default_factory=dict)
    last_error: str | None = None
