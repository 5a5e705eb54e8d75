"""One connection in user-space TLS, moved by whoever says when its sockets are ready; waits for nothing by itself."""

from __future__ import annotations

import errno
import select
import socket
from contextlib import suppress
from typing import Final

from migproxy import tcpinfo
from migproxy.fds import break_off, reset_on_close
from migproxy.relay.records import MOST_ADDED, MOST_SEALED, RECORD, SLOT, Opener, RecordError, Sealer
from migproxy.splice import ended_by_reset, is_unmissed, shutdown
from migproxy.tally import BROKEN, CLEAN, Tallies
from migproxy.tlserrors import Alert, RefusedByPeer, TLSError, Truncated

_BATCH: Final = 16  # records that are sealed at once: buffers that stay in a core's cache
_ARRIVES: Final = _BATCH * (RECORD + MOST_ADDED)
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_NOTHING: Final = memoryview(b"")


class Buffers:
    """What the connections of a thread share: nothing stays in them from one call to the next."""

    def __init__(self) -> None:
        self.plain = memoryview(bytearray(_BATCH * SLOT))
        self.slots = [self.plain[start : start + RECORD] for start in range(0, _BATCH * SLOT, SLOT)]
        self.sealed = memoryview(bytearray((_BATCH + 1) * (RECORD + MOST_ADDED)))
        self.arrived = memoryview(bytearray(MOST_SEALED + _ARRIVES))
        self.opened = memoryview(bytearray(len(self.arrived) + SLOT))


class Tunnel:
    """Moves a connection; owns its sockets and its tallies.

    What one socket does not take is kept, and nothing more is read from the other one until it has. An error ends its
    own direction. The other one goes on with what had arrived by then, and both peers are told after that: the network
    by a reset, never by an end of stream that would pass for a complete one.

    Args:
        unix: The launcher's socket.
        tcp: The other node's.
        preface: What the other node is told before anything of the launcher's; not counted.

    Attributes:
        is_over: Nothing is moved any more: to be closed, after an error as soon as `is_delivered`.
        error: What broke it first, or what the peer said of it; None after both ends of stream.
    """

    def __init__(
        self,
        unix: socket.socket,
        tcp: socket.socket,
        sealer: Sealer,
        opener: Opener,
        tallies: Tallies,
        buffers: Buffers,
        preface: bytes = b"",
    ) -> None:
        self.unix, self.tcp = unix, tcp
        self.is_over = False
        self.error: OSError | None = None
        self._sealer, self._opener, self._tallies, self._buffers = sealer, opener, tallies, buffers
        self._to_network, self._to_launcher = tallies.to_network, tallies.to_launcher
        self._sealed = memoryview(sealer.data(preface)) if preface else _NOTHING  # to the network, and not taken yet
        self._holds = 0  # bytes of data in it
        self._opened = _NOTHING  # to the launcher
        self._kept = b""  # the beginning of a record
        self._sends = self._receives = True
        self._has_asked = False
        self._is_busy = False
        for sock in (unix, tcp):
            sock.setblocking(False)
        reset_on_close(tcp, yes=True)

    @property
    def waits(self) -> tuple[int, int]:
        """What the launcher's socket is to be ready for, and the other node's."""
        unix = (_IN if self._sends and not self._sealed else 0) | (_OUT if self._opened else 0)
        tcp = (_IN if self._receives and not self._opened else 0) | (_OUT if self._sealed else 0)
        return unix, tcp

    # The launcher's socket

    def on_unix(self, events: int) -> None:
        """Goes on where the launcher's socket is ready."""
        if self._opened and events & ~_IN:
            self._deliver(self._opened)
        if self._sends and not self._sealed and events & ~_OUT:
            self._read_launcher()

    def _read_launcher(self) -> None:
        try:
            # A short message needs no more than one slot, and one costs less than many.
            slots = self._buffers.slots
            count = self.unix.recvmsg_into(slots)[0] if self._is_busy else self.unix.recv_into(slots[0])
        except BlockingIOError:
            return
        except OSError as error:
            if not (isinstance(error, ConnectionResetError) and ended_by_reset(self.unix)):
                self._stop_sending(error)
                return
            count = 0
        if count:
            self._is_busy = count >= RECORD
            self._holds = count
            self._send(self._buffers.sealed[: self._sealer.seal(self._buffers.plain, count, self._buffers.sealed)])
        else:
            self._sends = False
            self._send(memoryview(self._last_words()))

    def _last_words(self) -> bytes:
        """What the peer is told behind the launcher's last byte."""
        if self.error is None:
            return self._sealer.alert(Alert.CLOSE_NOTIFY)
        return self._sealer.alert(self.error.alert) if isinstance(self.error, RecordError) else b""

    # The other node's socket

    def on_tcp(self, events: int) -> None:
        """Goes on where the other node's socket is ready."""
        if self._sealed and events & ~_IN:
            self._send(self._sealed)
        if self._receives and not self._opened and events & ~_OUT:
            self._read_network()

    def _read_network(self) -> None:
        buffers, kept = self._buffers, len(self._kept)
        try:
            count = self.tcp.recv_into(buffers.arrived[kept:])
        except BlockingIOError:
            return
        except OSError as error:
            self._miss(error)
            return
        if not count:
            try:
                self._opener.end_of_stream()
            except Truncated as error:
                self._miss(error)
            return
        buffers.arrived[:kept] = self._kept
        count += kept
        try:
            taken, filled = self._opener.open(buffers.arrived[:count], buffers.opened)
        except TLSError as error:
            self._stop_receiving(error)
            return
        self._kept = bytes(buffers.arrived[taken:count]) if taken < count else b""
        self._deliver(buffers.opened[:filled])
        if self._opener.is_asked or self._opener.is_worn:
            self._renew()

    def _renew(self) -> None:
        """Changes keys where the peer asks for it, and asks it where it is time, once what was sealed has been sent."""
        self._has_asked = self._has_asked and self._opener.is_worn
        asks = self._opener.is_worn and not self._has_asked
        if (asks or self._opener.is_asked) and self._sends and not self._sealed:
            self._has_asked, self._opener.is_asked = self._opener.is_worn, False
            self._send(memoryview(self._sealer.update(asks=asks)))

    def _miss(self, error: OSError) -> None:
        """Ends what arrives without the peer's word."""
        if self.error is None and is_unmissed(error, self.unix, self.tcp):
            self._end_receiving()
        else:
            self._stop_receiving(error)

    # Sending

    def _send(self, data: memoryview) -> None:
        try:
            sent = self.tcp.send(data) if data else 0
        except BlockingIOError:
            sent = 0
        except OSError as error:
            if self._sends or self._holds:
                self._stop_sending(error)
                return
            sent = len(data)  # a peer that has ended both directions, as KubeVirt's does, misses no close_notify
        if sent < len(data):
            # A copy: the buffer is everybody's.
            self._sealed = data[sent:] if data is self._sealed else memoryview(bytes(data[sent:]))
            return
        self._sealed = _NOTHING
        self._to_network.moved += self._holds
        self._holds = 0
        if self._opener.is_asked:
            self._renew()
        if not (self._sends or self.error):
            self._to_network.end = CLEAN
            with suppress(OSError):
                shutdown(self.tcp, socket.SHUT_WR)
        self._look()

    def _deliver(self, data: memoryview) -> None:
        try:
            sent = self.unix.send(data) if data else 0
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._stop_receiving(error)
            return
        self._to_launcher.moved += sent
        rest = data[sent:]
        self._opened = rest if not rest or data is self._opened else memoryview(bytes(rest))
        if self._opened:
            return
        if self._opener.ended:
            self._end_receiving()
        elif self._opener.failure:
            self._stop_receiving(self._opener.failure)

    def _end_receiving(self) -> None:
        self._receives = False
        self._to_launcher.end = CLEAN
        with suppress(OSError):
            shutdown(self.unix, socket.SHUT_WR)
        self._look()

    # Its end

    def _stop_receiving(self, error: OSError) -> None:
        self._receives, self._opened = False, _NOTHING
        self._note(error)
        with suppress(OSError):
            shutdown(self.unix, socket.SHUT_RDWR)  # what the launcher has written can still be read
        self._look()

    def _stop_sending(self, error: OSError) -> None:
        self._sends, self._sealed, self._holds = False, _NOTHING, 0
        self._note(error)
        with suppress(OSError):
            shutdown(self.tcp, socket.SHUT_RD)  # what has arrived can still be read
        self._look()

    def _note(self, error: OSError) -> None:
        if self.error is None or isinstance(error, RefusedByPeer):  # which says more than the reset that follows
            self.error = error

    def _look(self) -> None:
        if self._sends or self._sealed or self._receives or self._opened:
            return
        if self.error:
            number = BROKEN + (self.error.errno or errno.EIO)
            for tally in (self._to_network, self._to_launcher):
                tally.end = tally.end or number
        else:
            with suppress(OSError):
                reset_on_close(self.tcp, yes=False)
        self.is_over = True

    def fail(self, error: OSError) -> None:
        """Ends both directions at once."""
        self._sends = self._receives = False
        self._sealed = self._opened = _NOTHING
        self._note(error)
        self._look()

    @property
    def is_delivered(self) -> bool:
        """Whether TCP has delivered what was sent, or cannot: a reset would discard it."""
        return tcpinfo.is_over(self.tcp) or not tcpinfo.unsent(self.tcp)

    def close(self) -> None:
        """Closes it, and forgets its keys; one that has not ended by itself is reset."""
        if self.error or not self.is_over:
            break_off(self.tcp, self.unix)
        for sock in (self.tcp, self.unix):
            sock.close()
        for direction in (self._sealer, self._opener):
            direction.close()
        self._tallies.close()
