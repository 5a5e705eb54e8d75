"""Splicing through TLS in the kernel.

Once the keys are with the kernel (Documentation/networking/tls.rst), a TLS socket takes and gives plain bytes, and
splice(2) works on it. What is no data keeps its record type: the kernel refuses to splice such a record, and it is
read with a control message instead.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress

from migproxy.splice import Splice, is_unmissed, shutdown
from migproxy.tlserrors import Reason, RefusedByPeer, TLSError, Truncated

_SOL_TLS = 282
_TLS_SET_RECORD_TYPE, _TLS_GET_RECORD_TYPE = 1, 2
_ALERT, _HANDSHAKE = 21, 22
_FATAL = 2
_CLOSE_NOTIFY = b"\x01\x00"  # level warning, close_notify (RFC 8446, 6.1)
_NEW_SESSION_TICKET, _KEY_UPDATE = 4, 24
_RECORD = 1 << 14


class KernelSend(Splice):
    """Splices what the launcher sends into a socket that the kernel encrypts."""

    __slots__ = ()

    def _finish(self) -> None:
        # A peer that has ended both directions, as KubeVirt's does, does not miss it.
        with suppress(OSError):
            record = [(_SOL_TLS, _TLS_SET_RECORD_TYPE, bytes([_ALERT]))]
            self.target.sendmsg([_CLOSE_NOTIFY], record)
        shutdown(self.target, socket.SHUT_WR)


class KernelReceive(Splice):
    """Splices what the launcher receives out of a socket that the kernel decrypts."""

    __slots__ = ()

    def _fill(self, source: int, writer: int, capacity: int) -> int:
        try:
            return self._fill_from_records(source, writer, capacity)
        except OSError as error:
            if is_unmissed(error, self.target, self.source):
                return 0
            raise

    def _fill_from_records(self, source: int, writer: int, capacity: int) -> int:
        while True:
            try:
                count = os.splice(source, writer, capacity)
            except OSError as error:
                if error.errno == errno.EBADMSG:
                    raise TLSError(Reason.BAD_RECORD, "a record does not decrypt: the stream was altered") from error
                if error.errno not in (errno.EINVAL, errno.EIO):
                    raise
                if not self._read_control():
                    return 0
            else:
                if not count:
                    raise Truncated
                return count

    def _read_control(self) -> bool:
        """Looks at the record that splice refused; returns whether more may follow.

        A close_notify is left where it is: should this process be killed now, the next one finds the same end.
        """
        kind, body = self._receive_record(socket.MSG_PEEK)
        goes_on = check_control(kind, body)
        if goes_on:
            self._receive_record()
        return goes_on

    def _receive_record(self, flags: int = 0) -> tuple[int | None, bytes]:
        body, ancillary, _, _ = self.source.recvmsg(_RECORD, socket.CMSG_SPACE(1), flags)
        kinds = [data[0] for level, kind, data in ancillary if (level, kind) == (_SOL_TLS, _TLS_GET_RECORD_TYPE)]
        return kinds[0] if kinds else None, body


def check_control(kind: int | None, body: bytes) -> bool:
    """Decides on a record that is no data.

    Args:
        kind: Its type (RFC 8446, 5.1), None where the kernel did not say.
        body: What it holds.

    Returns:
        Whether the stream goes on: not after a close_notify, but after a session ticket, which nobody uses.

    Raises:
        TLSError: It ends the connection.
    """
    if kind == _ALERT and len(body) == 2:
        if body == _CLOSE_NOTIFY or body[1] == 0:
            return False
        if body[0] != _FATAL:
            return True
        raise RefusedByPeer(body[1])
    if kind == _HANDSHAKE and (messages := _handshake_messages(body)):
        if messages == {_NEW_SESSION_TICKET}:
            return True
        if _KEY_UPDATE in messages:
            raise TLSError(
                Reason.KEY_UPDATE, "the peer changes its keys, which the kernel cannot follow: use --ktls off for it"
            )
    raise TLSError(Reason.BAD_RECORD, f"a TLS record of type {kind} where data were expected")


def _handshake_messages(body: bytes) -> set[int]:
    """The types of the messages in a record (RFC 8446, 4); empty for what is not whole messages."""
    types = set()
    while body:
        end = 4 + int.from_bytes(body[1:4], "big")
        if len(body) < end:
            return set()
        types.add(body[0])
        body = body[end:]
    return types
