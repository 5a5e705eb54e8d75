"""TLS in user space: the pumps for a connection, or a direction of one, that the kernel does not encrypt."""

from __future__ import annotations

import os
import queue
import select
import socket
import ssl
import threading
from contextlib import suppress

from migproxy.splice import Pump, ended_by_reset, shutdown
from migproxy.tally import Tally
from migproxy.tlserrors import Reason, TLSError, Truncated
from migproxy.transport import UserTransport

HANDSHAKE_READ = 1 << 14
"""Bytes taken from the socket at once during the handshake; application data may be among them."""

_RECORD = 1 << 14
_SEALED = 1 << 18  # bytes encrypted per call: what a launcher's socket holds, with the system's default send buffer
_OPENED = 1 << 19  # bytes decrypted per turn; half of it costs a little more CPU, twice as much gives nothing
_ROOM = _OPENED + 2 * _RECORD  # what that can decrypt to, with the record that it completes
_MOST_DESKS = 4  # decrypting takes Python's lock once for each record: more threads would only wait for it
_UNSOLICITED = 1 << 16  # bytes that OpenSSL may want to answer by itself, before the peer counts as hostile


class _Desk:
    """Buffers for one batch: received into `wire`, decrypted into `plain`, sent from there."""

    __slots__ = ("plain", "wire")

    def __init__(self) -> None:
        self.wire = memoryview(bytearray(_OPENED))
        self.plain = memoryview(bytearray(_ROOM))


_desks: queue.SimpleQueue[_Desk] = queue.SimpleQueue()
"""The few desks at which all connections decrypt; nobody waits for a socket at one.

Each connection decrypting for itself, eight were slower than one: at each record their threads took Python's lock
from each other, and their buffers did not fit into the CPU's cache together.
"""
for _ in range(max(1, min(_MOST_DESKS, len(os.sched_getaffinity(0)) // 2))):
    _desks.put(_Desk())


class MemorySession:
    """OpenSSL on buffers in memory, after the handshake: one thread sends, one receives.

    One call encrypts a whole batch and one system call moves it: twice the throughput of OpenSSL on the socket,
    which makes a system call or two for each record of 16 KiB.

    An OpenSSL connection must not be used by two threads at once (Python before 3.13 crashes, and OpenSSL itself
    does not allow it), so that a lock is held for each batch of calls, and never while a thread waits for a socket.

    Args:
        tls: The connection.
        incoming, outgoing: Its buffers, with what the handshake left in them.

    Attributes:
        early: Data that came with the end of the handshake.
    """

    def __init__(self, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._lock = threading.Lock()
        self._failure: ssl.SSLError | None = None
        self._ended = False
        early = memoryview(bytearray(HANDSHAKE_READ + 2 * _RECORD))
        self.early = bytes(early[: self._decrypt(early)])

    def receives(self) -> bool:
        """Whether there may be more to receive: the peer has not sent its close_notify.

        Raises:
            TLSError: The stream is damaged, or ended without a close_notify.
        """
        if self._failure:
            raise broken(self._failure)
        return not self._ended

    def open(self, wire: memoryview, plain: memoryview) -> int:
        """Decrypts what has arrived, empty at the end of the stream; a failure is raised by the next `receives`.

        Args:
            wire: At most `_OPENED` bytes.
            plain: A buffer of `_ROOM` bytes.

        Returns:
            How much it was; 0 also where no record is complete.
        """
        # Every complete record is taken out of OpenSSL before the lock is free again: see `finish`.
        with self._lock:
            if wire:
                self._incoming.write(wire)
            else:
                self._incoming.write_eof()
            return self._decrypt(plain)

    def _decrypt(self, plain: memoryview) -> int:
        count = 0
        try:
            while got := self._tls.read(len(plain) - count, plain[count:]):
                count += int(got)
            self._ended = True
        except ssl.SSLWantReadError:
            if self._outgoing.pending > _UNSOLICITED:
                self._failure = ssl.SSLError("the peer asks for answers without end")
        except ssl.SSLZeroReturnError:
            self._ended = True
        except ssl.SSLError as error:
            self._failure = error
        return count

    def seal(self, plain: memoryview) -> bytes:
        """Encrypts all of it, for the peer."""
        with self._lock:
            self._tls.write(plain)
            return self._outgoing.read()

    def finish(self) -> bytes:
        """Makes a close_notify, for the peer."""
        with self._lock:
            # unwrap tries to read the peer's close_notify too, and a record of data that it finds instead is lost:
            # but none is complete while the lock is free.
            with suppress(ssl.SSLError):
                self._tls.unwrap()
            return self._outgoing.read()


class UserSend(Pump):
    """Encrypts what the launcher sends."""

    __slots__ = ("_session",)

    def __init__(self, unix: socket.socket, tcp: socket.socket, tally: Tally, session: MemorySession) -> None:
        super().__init__(unix, tcp, tally)
        self._session = session

    def _move(self) -> None:
        plain = memoryview(bytearray(_SEALED))
        # To wait first, and then to read, finds more than to wait in the reading: fewer and larger batches.
        arrivals = _arrivals(self.source)
        while arrivals.poll() and (count := self._fill(plain)):
            self.target.sendall(self._session.seal(plain[:count]))
            self.tally.moved += count

    def _fill(self, plain: memoryview) -> int:
        try:
            return self.source.recv_into(plain)
        except ConnectionResetError:
            if ended_by_reset(self.source):
                return 0
            raise

    def _finish(self) -> None:
        # A peer that has ended both directions, as KubeVirt's proxy does, may be gone: there is nothing left that it
        # could miss, and if it still had something to send, the other pump notices.
        with suppress(OSError):
            self.target.sendall(self._session.finish())
        shutdown(self.target, socket.SHUT_WR)


class UserReceive(Pump):
    """Decrypts what the launcher receives."""

    __slots__ = ("_session",)
    # KubeVirt's source ends without a close_notify, some time after the target's launcher has closed: Go's garbage
    # collector closes the connection that it has dialled.
    unmissed = (Truncated,)

    def __init__(self, tcp: socket.socket, unix: socket.socket, tally: Tally, session: MemorySession) -> None:
        super().__init__(tcp, unix, tally)
        self._session = session

    def _move(self) -> None:
        _deliver(self, memoryview(self._session.early))
        arrivals = _arrivals(self.source)
        while self._session.receives():
            arrivals.poll()
            desk = _desks.get()
            try:
                arrived = self.source.recv_into(desk.wire, 0, socket.MSG_DONTWAIT)
                count = self._session.open(desk.wire[:arrived], desk.plain)
                sent = _send_now(self.target, desk.plain[:count])
                rest = bytes(desk.plain[sent:count])
            except BlockingIOError:
                continue
            finally:
                _desks.put(desk)
            self.tally.moved += sent
            _deliver(self, memoryview(rest))


class SocketReceive(Pump):
    """Decrypts with OpenSSL on the socket itself, for receiving alone: the kernel encrypts the other direction.

    Args:
        tls: The socket after its handshake; blocking by the time that it is read.
    """

    __slots__ = ("_tls",)
    unmissed = (Truncated,)  # see UserReceive

    def __init__(self, tls: ssl.SSLSocket, unix: socket.socket, tally: Tally) -> None:
        super().__init__(tls, unix, tally)
        self._tls = tls

    def _move(self) -> None:
        record = memoryview(bytearray(_RECORD))
        try:
            while count := self._tls.recv_into(record):
                _deliver(self, record[:count])
        except ssl.SSLError as error:
            raise broken(error) from error


def _arrivals(source: socket.socket) -> select.poll:
    """What to wait with until there is something to read."""
    arrivals = select.poll()
    arrivals.register(source, select.POLLIN)
    return arrivals


def _send_now(target: socket.socket, data: memoryview) -> int:
    """Sends what there is room for; returns how much that was."""
    try:
        return target.send(data, socket.MSG_DONTWAIT) if data else 0
    except BlockingIOError:
        return 0


def _deliver(pump: Pump, plain: memoryview) -> None:
    """Blocks until all of it is sent."""
    while plain:
        sent = pump.target.send(plain)
        pump.tally.moved += sent
        plain = plain[sent:]


class MemoryTransport(UserTransport):
    """A connection that is encrypted in user space both ways."""

    def __init__(self, tcp: socket.socket, session: MemorySession, label: str) -> None:
        super().__init__(tcp, label)
        self._session = session

    def pumps(self, unix: socket.socket, tallies: tuple[Tally, Tally]) -> tuple[Pump, Pump]:
        sending, receiving = tallies
        return UserSend(unix, self.tcp, sending, self._session), UserReceive(self.tcp, unix, receiving, self._session)


def broken(error: ssl.SSLError) -> TLSError:
    """What ended an established connection, as its reason."""
    why = error.reason or str(error)
    if isinstance(error, ssl.SSLEOFError) or "EOF" in why:
        return Truncated()
    if "_ALERT_" in why:
        return TLSError(Reason.REFUSED_BY_PEER, f"the peer ended the connection with a TLS alert: {alert(why)}")
    return TLSError(Reason.BAD_RECORD, f"the encrypted stream is damaged: {why.lower().replace('_', ' ')}")


def alert(reason: str) -> str:
    """An alert's name from OpenSSL's name of it: TLSV1_ALERT_UNKNOWN_CA is "unknown ca"."""
    return reason.partition("_ALERT_")[2].lower().replace("_", " ")
