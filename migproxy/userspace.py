"""TLS in user space: the pumps for a connection, or a direction of one, that the kernel does not encrypt."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress
from typing import Protocol

from migproxy.splice import Pump, Transport, ended_by_reset, shutdown
from migproxy.verify import Reason, TLSError

HANDSHAKE_READ = 1 << 14
"""Bytes taken from the socket at once during the handshake; application data may be among them."""

_RECORD = 1 << 14
_BATCH = 1 << 18  # bytes per call: one hand-over of Python's lock for sixteen records; more leaves the CPU's cache
_ROOM = _BATCH + 2 * _RECORD  # what a batch can decrypt to, with the record that it completes
_UNSOLICITED = 1 << 16  # bytes that OpenSSL may want to answer by itself, before the peer counts as hostile


class MemorySession:
    """OpenSSL on buffers in memory, after the handshake: one thread sends, one receives.

    One call encrypts a whole batch and one system call moves it: twice the throughput of OpenSSL on the socket,
    which makes a system call or two for each record of 16 KiB.

    An OpenSSL connection must not be used by two threads at once (Python before 3.13 crashes, and OpenSSL itself
    does not allow it), so that a lock is held for each batch of calls, and never while a thread waits for a socket.

    Args:
        tls: The connection.
        incoming, outgoing: Its buffers, with what the handshake left in them.
        tcp: Blocking by the time that the session is used.
    """

    def __init__(
        self, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, tcp: socket.socket
    ) -> None:
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._tcp = tcp
        self._lock = threading.Lock()
        self._wire = memoryview(bytearray(_BATCH))
        self._failure: ssl.SSLError | None = None
        self._ended = False
        early = memoryview(bytearray(HANDSHAKE_READ + 2 * _RECORD))
        self._early = early[: self._decrypt(early)]

    def receive(self, plain: memoryview) -> int:
        """Blocks for data and decrypts what has arrived into `plain`.

        Args:
            plain: A buffer of at least `_ROOM` bytes.

        Returns:
            How much it was; 0 after a close_notify.

        Raises:
            TLSError: The stream is damaged, or ended without a close_notify.
            OSError: The connection broke.
        """
        if count := len(self._early):
            plain[:count] = self._early
            self._early = self._early[:0]
            return count
        while not self._ended:
            if self._failure:
                raise broken(self._failure)
            arrived = self._tcp.recv_into(self._wire)
            # Every complete record is taken out of OpenSSL before the lock is free again: see `finish`.
            with self._lock:
                if arrived:
                    self._incoming.write(self._wire[:arrived])
                else:
                    self._incoming.write_eof()
                count = self._decrypt(plain)
            if count:
                return count
        return 0

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

    def send(self, plain: memoryview) -> None:
        """Encrypts and sends all of it; raises OSError when the connection broke."""
        with self._lock:
            self._tls.write(plain)
            sealed = self._outgoing.read()
        self._tcp.sendall(sealed)

    def finish(self) -> None:
        """Sends close_notify; raises OSError when the connection broke."""
        with self._lock:
            # unwrap tries to read the peer's close_notify too, and a record of data that it finds instead is lost:
            # but none is complete while the lock is free.
            with suppress(ssl.SSLError):
                self._tls.unwrap()
            sealed = self._outgoing.read()
        self._tcp.sendall(sealed)


class SocketReader:
    """OpenSSL on the socket itself, for receiving alone: the kernel encrypts the other direction, without OpenSSL.

    Args:
        tls: The socket after its handshake; blocking by the time that it is read.
    """

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self._tls = tls

    def receive(self, plain: memoryview) -> int:
        """See `MemorySession.receive`; one record at a time."""
        try:
            return self._tls.recv_into(plain)
        except ssl.SSLError as error:
            raise broken(error) from error


class Receiver(Protocol):
    """What a UserReceive decrypts with."""

    def receive(self, plain: memoryview) -> int: ...


class UserSend(Pump):
    """Encrypts what the launcher sends."""

    __slots__ = ("_session",)

    def __init__(self, unix: socket.socket, tcp: socket.socket, session: MemorySession) -> None:
        super().__init__(unix, tcp)
        self._session = session

    def _move(self) -> None:
        plain = memoryview(bytearray(_BATCH))
        while count := self._fill(plain):
            self._session.send(plain[:count])
            self.moved += count

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
            self._session.finish()
        shutdown(self.target, socket.SHUT_WR)


class UserReceive(Pump):
    """Decrypts what the launcher receives."""

    __slots__ = ("_session",)

    def __init__(self, tcp: socket.socket, unix: socket.socket, session: Receiver) -> None:
        super().__init__(tcp, unix)
        self._session = session

    def _move(self) -> None:
        plain = memoryview(bytearray(_ROOM))
        while count := self._session.receive(plain):
            done = 0
            while done < count:
                sent = self.target.send(plain[done:count])
                done += sent
                self.moved += sent


class UserTransport(Transport):
    """A connection that is encrypted in user space, both ways."""

    def __init__(self, tcp: socket.socket, session: MemorySession, label: str) -> None:
        super().__init__(tcp)
        self.label = label
        self._session = session

    def sending(self, unix: socket.socket) -> Pump:
        return UserSend(unix, self.tcp, self._session)

    def receiving(self, unix: socket.socket) -> Pump:
        return UserReceive(self.tcp, unix, self._session)


def broken(error: ssl.SSLError) -> TLSError:
    """What ended an established connection, as its reason."""
    why = error.reason or str(error)
    if isinstance(error, ssl.SSLEOFError) or "EOF" in why:
        return TLSError(Reason.TRUNCATED, "the peer ended the stream without a close_notify: it may be truncated")
    if "_ALERT_" in why:
        return TLSError(Reason.REFUSED_BY_PEER, f"the peer ended the connection with a TLS alert: {alert(why)}")
    return TLSError(Reason.BAD_RECORD, f"the encrypted stream is damaged: {why.lower().replace('_', ' ')}")


def alert(reason: str) -> str:
    """An alert's name from OpenSSL's name of it: TLSV1_ALERT_UNKNOWN_CA is "unknown ca"."""
    return reason.partition("_ALERT_")[2].lower().replace("_", " ")
